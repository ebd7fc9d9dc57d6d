#include "patch_scores/grid_geometry.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "patch_scores/idw_weight.h"
#include "patch_scores/patch_grid.h"

namespace glance {

int64_t first_outside(const std::vector<int64_t>& origins, Pair patch, Pair image) {
  for (size_t i = 0; i < origins.size() / 2; ++i) {
    for (int axis = 0; axis < 2; ++axis) {
      // A difference of sizes, since the start + the patch may overflow.
      const int64_t start = origins[2 * i + axis];
      if (start < 0 || start > image[axis] - patch[axis]) return static_cast<int64_t>(i);
    }
  }
  return -1;
}

// By a two-dimensional difference array: +1 where patches begin, -1 behind where they end.
Pair first_uncovered(const std::vector<int64_t>& origins, Pair patch, Pair image) {
  const int64_t pitch = image[1] + 1;
  std::vector<int64_t> count((image[0] + 1) * pitch, 0);
  for (size_t i = 0; i < origins.size() / 2; ++i) {
    int64_t* corner = count.data() + origins[2 * i] * pitch + origins[2 * i + 1];
    corner[0] += 1;
    corner[patch[1]] -= 1;
    corner[patch[0] * pitch] -= 1;
    corner[patch[0] * pitch + patch[1]] += 1;
  }
  for (int64_t y = 0; y < image[0]; ++y) {
    for (int64_t x = 0; x < image[1]; ++x) {
      int64_t& here = count[y * pitch + x];
      if (y > 0) here += count[(y - 1) * pitch + x];
      if (x > 0) here += count[y * pitch + x - 1];
      if (y > 0 && x > 0) here -= count[(y - 1) * pitch + x - 1];
      if (here <= 0) return {y, x};
    }
  }
  return {-1, -1};
}

std::vector<double> bell(int64_t size, double sigma) {
  std::vector<double> weights(size);
  const double centre = static_cast<double>(size - 1) / 2;
  for (int64_t i = 0; i < size; ++i) {
    const double offset = (static_cast<double>(i) - centre) / (sigma * static_cast<double>(size));
    weights[i] = std::exp(-0.5 * offset * offset);
  }
  return weights;
}

Pair first_uncovered(const AxisGeometry& rows, const AxisGeometry& columns) {
  const int64_t row = rows.uncovered(), column = columns.uncovered();
  if (row == 0) return {0, 0};
  if (column >= 0) return {0, column};
  return row > 0 ? Pair{row, 0} : Pair{-1, -1};
}

int64_t AxisGeometry::uncovered() const {
  for (int64_t x = 0; x < size; ++x) {
    if (first[x] == last[x]) return x;
  }
  return -1;
}

bool product_of_starts(const int64_t* origins, int64_t patches, std::vector<int64_t>& rows,
                       std::vector<int64_t>& columns) {
  rows.clear();
  columns.clear();
  for (int64_t i = 0; i < patches && origins[2 * i] == origins[0]; ++i) {
    if (i > 0 && origins[2 * i + 1] <= columns.back()) break;
    columns.push_back(origins[2 * i + 1]);
  }
  const int64_t width = static_cast<int64_t>(columns.size());
  if (width == 0 || patches % width != 0) return false;
  for (int64_t i = 0; i < patches; i += width) {
    const int64_t row = origins[2 * i];
    if (i > 0 && row <= rows.back()) return false;
    for (int64_t j = 0; j < width; ++j) {
      if (origins[2 * (i + j)] != row || origins[2 * (i + j) + 1] != columns[j]) return false;
    }
    rows.push_back(row);
  }
  return true;
}

AxisGeometry axis_geometry(const std::vector<int64_t>& starts, int64_t size,
                           const std::vector<double>& window) {
  AxisGeometry axis;
  axis.size = size;
  axis.patch = static_cast<int64_t>(window.size());
  axis.starts.assign(starts.begin(), starts.end());
  axis.first.resize(size);
  axis.last.resize(size);
  axis.repeats.assign(size, 0);
  axis.weight.resize(starts.size() * window.size());
  size_t first = 0, last = 0;
  for (int64_t x = 0; x < size; ++x) {
    while (last < starts.size() && starts[last] <= x) ++last;
    while (first < last && starts[first] + axis.patch <= x) ++first;
    axis.first[x] = static_cast<int32_t>(first);
    axis.last[x] = static_cast<int32_t>(last);
    double total = 0;
    for (size_t i = first; i < last; ++i) total += window[x - starts[i]];
    bool repeats = x > 0 && axis.first[x - 1] == axis.first[x] && axis.last[x - 1] == axis.last[x];
    for (size_t i = first; i < last; ++i) {
      double* weight = axis.weight.data() + i * axis.patch + (x - starts[i]);
      *weight = window[x - starts[i]] / total;
      repeats = repeats && weight[0] == weight[-1];
    }
    axis.repeats[x] = repeats ? 1 : 0;
  }
  return axis;
}

namespace {

// The largest over the pixels of the smallest squared distance to a patch's centre.
double farthest_nearest(const AxisGeometry& axis) {
  double farthest = 0;
  for (int64_t x = 0; x < axis.size; ++x) {
    double nearest = std::numeric_limits<double>::infinity();
    for (const int32_t start : axis.starts) {
      nearest = std::min(nearest, squared_distance<double>(x, 0, start, 0, axis.patch, 1));
    }
    farthest = std::max(farthest, nearest);
  }
  return farthest;
}

}  // namespace

bool distance_table(const AxisGeometry& rows, const AxisGeometry& columns, double power,
                    double smallest, DistanceTable& table) {
  table.rows = rows.size;
  table.origin = columns.starts.back();
  const int64_t width = (columns.size + kGridPad - 1) / kGridPad * kGridPad;
  table.pitch = width + table.origin;
  if (table.rows * table.pitch > kMostTableBytes / static_cast<int64_t>(sizeof(double))) {
    return false;
  }
  // Twice a distance is even along an axis of odd patches, where it may be 0, and odd along others.
  const bool odd_rows = rows.patch % 2 == 0, odd_columns = columns.patch % 2 == 0;
  const double unit = odd_rows || odd_columns ? 0.25 * (odd_rows + odd_columns) : 1;
  const double half_power = power / 2;
  const double far = farthest_nearest(rows) + farthest_nearest(columns);
  if (far > 0 && std::pow(unit / far, half_power) < smallest) return false;
  table.weight.resize(table.rows * table.pitch);
  for (int64_t i = 0; i < table.rows; ++i) {
    const double dy = static_cast<double>(i) + (odd_rows ? 0.5 : 0);
    for (int64_t j = 0; j < table.pitch; ++j) {
      const double dx = static_cast<double>(2 * (j - table.origin) - (columns.patch - 1)) / 2;
      const double squared = dy * dy + dx * dx;
      table.weight[i * table.pitch + j] = squared > 0 ? std::pow(unit / squared, half_power) : 0;
    }
  }
  return true;
}

}  // namespace glance
