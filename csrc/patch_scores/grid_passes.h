// Passes along one axis over rows of numbers that lie side by side, for every instruction set. A
// "row" has what is not summed: along the rows of a map its columns, along its columns (transposed)
// its rows.
#pragma once

#include <cstdint>

#include "patch_scores/patch_grid.h"

namespace glance {

// Rows of `length` numbers, `pitch` apart; index `base` along the axis comes first.
template <typename A>
struct PassRows {
  A* data;
  int64_t pitch;
  int64_t base;

  A* at(int64_t index) const { return data + (index - base) * pitch; }
};

template <typename A>
struct GridPasses {
  // Pixels [begin, end) from the patches over them: to = sum of weight * from.
  void (*spread)(const PatchAxis& axis, int64_t begin, int64_t end, int64_t length,
                 PassRows<const A> from, PassRows<A> to);
  // The same with the largest; `best` (its data may be null) takes the patch that has it.
  void (*spread_max)(const PatchAxis& axis, int64_t begin, int64_t end, int64_t length,
                     PassRows<const A> from, PassRows<A> to, PassRows<int32_t> best);
  // Patches [begin, end) from the pixels under them: to = sum of weight * from.
  void (*gather)(const PatchAxis& axis, int64_t begin, int64_t end, int64_t length,
                 PassRows<const A> from, PassRows<A> to);
  // The same, from the pixels alone whose best the patch is.
  void (*gather_best)(const PatchAxis& axis, int64_t begin, int64_t end, int64_t length,
                      PassRows<const A> from, PassRows<const int32_t> best, PassRows<A> to);
  // (rows, columns) to (columns, rows).
  void (*transpose)(const A* from, int64_t pitch, int64_t rows, int64_t columns, A* to,
                    int64_t to_pitch);
};

// Of the widest instruction set that this processor has; A is float or double.
template <typename A>
const GridPasses<A>& grid_passes();

}  // namespace glance
