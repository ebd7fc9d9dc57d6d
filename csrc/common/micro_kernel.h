// The inner loops of convolutions and max-pooling on a CPU.
//
// A convolution: a few rows of the input times a panel of the weight.
//
//   out[m][n] = act(ratio[m] * sum_k a[m][k] * b[k][n] + bias[n])
//
// A row a[m] is not contiguous: it consists of `runs`, each of `run_length` elements, the r-th
// beginning at its pointer + runs[r]. The panel b is packed: run after run, `columns` values for
// each element (or, for kernels of depth 2, pairs of elements: columns x 2 values for every two).
#pragma once

#include <cstdint>

#include "common/scalar.h"

namespace glance {

// T is what is multiplied (float, double, BFloat16), A what is added, O what is stored.
template <typename T, typename A, typename O>
struct MicroTile {
  const T* const* rows;  // (rows / strip): of each strip's first row, all valid pointers
  int64_t step;          // elements from a row to the next of its strip
  const int64_t* runs;
  int64_t run_count;
  int64_t run_length;  // a multiple of the kernel's depth
  const T* panel;
  const A* ratio;  // (rows)
  const A* bias;   // (columns)
  A negative_slope;
  O* const* out;  // (rows): where `width` results of each row go; null: nowhere
  int64_t width;  // at most the kernel's columns
};

// A kernel whose columns fill one vector register would spend half of its loads on pointers to
// rows, if each row had its own. So rows come in strips of equally spaced ones: neighbouring cells.
template <typename T, typename A, typename O>
struct MicroKernel {
  int64_t rows;     // of the input at a time
  int64_t strip;    // rows that share a pointer
  int64_t columns;  // of a panel
  int64_t depth;    // elements of a run that are multiplied together
  void (*run)(const MicroTile<T, A, O>& tile);
};

enum class InstructionSet : int { kPlain, kAvx2, kAvx512, kAvx512BFloat16 };

// The best that this processor has; each includes those before it.
InstructionSet best_instruction_set();

// The kernels of an instruction set that this processor has, for `out_channels` columns in all.
MicroKernel<float, float, float> float_kernel(InstructionSet set, int64_t out_channels);
MicroKernel<double, double, double> double_kernel();
// `run` is null where there are no bfloat16 instructions.
MicroKernel<BFloat16, float, BFloat16> bfloat16_kernel(InstructionSet set, int64_t out_channels);

// Max-pooling: out[c] = the greatest of taps[t][c], or NaN if one is. All of `count` >= 1 taps
// are runs of `channels` elements.
template <typename T>
using MaxKernel = void (*)(const T* const* taps, int64_t count, int64_t channels, T* out);

template <typename T>
MaxKernel<T> max_kernel(InstructionSet set);

}  // namespace glance
