// The inner loop of the weight's gradient on a CPU: outer products, summed over windows.
//
//   sums[m][n] += sum_w source[places[w] + m] * panel[w][n]
//
// A tile's windows are summed by themselves and then added, so that the rounding of many thousands
// of windows grows with their tiles rather than with their number. Its `rows` are neighbours in
// memory, so that one address serves all of them. The kernel of micro_kernel.h, whose rows stand
// anywhere, would load an address for every product here.
#pragma once

#include <cstdint>

#include "common/micro_kernel.h"

namespace glance {

struct OuterTile {
  const float* source;
  const int64_t* places;
  int64_t count;
  const float* panel;  // (count, columns)
  float* sums;         // (rows, columns)
};

struct OuterKernel {
  int64_t rows, columns;
  void (*run)(const OuterTile& tile);
};

// A kernel for `length` neighbours, or for equal parts of them (`rows` each, the last one
// overlapping), and `out_channels` columns in all.
OuterKernel outer_kernel(InstructionSet set, int64_t length, int64_t out_channels);

}  // namespace glance
