// What the kernels for grids of patches need to know of a grid, computed once on the host.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace glance {

using Pair = std::array<int64_t, 2>;  // of rows and columns

// The first of the patches at `origins` (P, 2) that sticks out of the image, or -1.
int64_t first_outside(const std::vector<int64_t>& origins, Pair patch, Pair image);

// The first pixel under none of the patches, which are inside the image, or {-1, -1}.
Pair first_uncovered(const std::vector<int64_t>& origins, Pair patch, Pair image);

// A bell over `size` pixels around their centre, sigma in shares of the size.
std::vector<double> bell(int64_t size, double sigma);

// One axis of a grid, as PatchAxis in patch_grid.h has it.
struct AxisGeometry {
  int64_t size = 0, patch = 0;
  std::vector<int32_t> starts, first, last, repeats;
  std::vector<double> weight;  // (starts, patch)

  // The first pixel under no patch, or -1.
  int64_t uncovered() const;
};

// Whether the origins (P, 2) are, in this order, all pairs of ascending rows and ascending columns;
// then fills those.
bool product_of_starts(const int64_t* origins, int64_t patches, std::vector<int64_t>& rows,
                       std::vector<int64_t>& columns);

// Bands and normalised weights from ascending starts inside the axis; `window` (patch) is each
// patch's weight in its own pixels.
AxisGeometry axis_geometry(const std::vector<int64_t>& starts, int64_t size,
                           const std::vector<double>& window);

// The first pixel under none of the grid's patches, or {-1, -1}.
Pair first_uncovered(const AxisGeometry& rows, const AxisGeometry& columns);

// Weights of inverse-distance weighting by distance along rows and along columns.
struct DistanceTable {
  int64_t rows = 0, pitch = 0, origin = 0;
  std::vector<double> weight;  // (rows, pitch)
};

// Bytes of a table beyond which a pixel computes its weights instead.
constexpr int64_t kMostTableBytes = int64_t{1} << 28;

// Fills the table with (nearest possible distance / distance)^power, 0 at distance 0. False if it
// would be too large, or if somewhere even the nearest patch's weight would be below `smallest`.
bool distance_table(const AxisGeometry& rows, const AxisGeometry& columns, double power,
                    double smallest, DistanceTable& table);

}  // namespace glance
