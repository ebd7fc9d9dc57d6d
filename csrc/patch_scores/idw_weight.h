// The weight and the distance of inverse-distance weighting, shared by CPU and CUDA kernels.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/scalar.h"

namespace glance {

// (d_min / d)^power from squared distances; 1 at the nearest centre, be it at distance 0.
template <typename A>
GLANCE_HOST_DEVICE inline A idw_weight(A nearest, A squared, A half_power) {
  if (squared == nearest) return A(1);
  const A closeness = nearest / squared;
  if (half_power == A(2.5)) return closeness * closeness * std::sqrt(closeness);
  if (half_power == A(1)) return closeness;
  return std::pow(closeness, half_power);
}

// Whether the pixel is on centres, but not on this patch's: then the patch has no part in the
// pixel, so that its NaN or infinity, times a weight of zero, does not reach it.
template <typename A>
GLANCE_HOST_DEVICE inline bool idw_excludes(A nearest, A squared) {
  return nearest == A(0) && squared != A(0);
}

// Squared distance from pixel (y, x) to the centre of the patch at (row, column).
template <typename A>
GLANCE_HOST_DEVICE inline A squared_distance(int64_t y, int64_t x, int64_t row, int64_t column,
                                             int64_t patch_height, int64_t patch_width) {
  // Twice the offset is an integer, so the difference is exact.
  const A dy = static_cast<A>(2 * (y - row) - (patch_height - 1)) / A(2);
  const A dx = static_cast<A>(2 * (x - column) - (patch_width - 1)) / A(2);
  return dy * dy + dx * dx;
}

}  // namespace glance
