// The inner loop of hole_conv on a CPU: a few rows of the input times a panel of the weight.
//
//   out[m][n] = act(ratio[m] * sum_k a[m][k] * b[k][n] + bias[n])
//
// A row a[m] is not contiguous: it consists of `runs`, each of `run_length` elements, the r-th
// beginning at rows[m] + runs[r]. The panel b is packed: run after run, `columns` values for each
// element (or, for kernels of depth 2, pairs of elements: columns x 2 values for every two).
#pragma once

#include <cstdint>

#include "common/scalar.h"

namespace glance {

// T is what is multiplied (float, double, BFloat16), A what is added.
template <typename T, typename A>
struct MicroTile {
  const T* const* rows;  // `rows` of the kernel, all valid pointers
  const int64_t* runs;
  int64_t run_count;
  int64_t run_length;  // a multiple of the kernel's depth
  const T* panel;
  const A* ratio;  // (rows)
  const A* bias;   // (columns)
  A negative_slope;
  A* out;  // (rows, columns)
};

template <typename T, typename A>
struct MicroKernel {
  int64_t rows;     // of the input at a time
  int64_t columns;  // of a panel
  int64_t depth;    // elements of a run that are multiplied together
  void (*run)(const MicroTile<T, A>& tile);
};

enum class InstructionSet : int { kPlain, kAvx2, kAvx512, kAvx512BFloat16 };

// The best that this processor has; each includes those before it.
InstructionSet best_instruction_set();

// The kernels of an instruction set that this processor has, for `out_channels` columns in all.
MicroKernel<float, float> float_kernel(InstructionSet set, int64_t out_channels);
MicroKernel<double, double> double_kernel();
// `run` is null where there are no bfloat16 instructions.
MicroKernel<BFloat16, float> bfloat16_kernel(InstructionSet set, int64_t out_channels);

}  // namespace glance
