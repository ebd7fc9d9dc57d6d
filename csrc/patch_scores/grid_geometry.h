// What the kernels for grids of patches need to know of a grid, computed once on the host.
#pragma once

#include <cstdint>
#include <vector>

namespace glance {

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
