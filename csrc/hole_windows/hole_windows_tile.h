// What the CUDA kernels of hole windows compute with indices, without CUDA: which cell a row of the
// product is, and where a pixel of a hole's input stands. The C++ tests run the same functions.
#pragma once

#include <cstdint>
#include <limits>

#include "hole_windows/hole_windows.h"

namespace glance {

// Where a pixel of a composed input is read.
enum class Source : int { kOutside, kHole, kWindow, kBase };

template <typename I>
struct Pixel {
  Source source;
  I index;  // of the pixel in (N, H, W) of the base or in (N * P, h, w) of the windows
};

// Pixel (y, x) of window b. Whatever the extents say, it is a pixel of its tensor.
template <typename I>
GLANCE_HOST_DEVICE inline Pixel<I> composed_pixel(const HoleWindowsParams& p, I b, int64_t y,
                                                  int64_t x) {
  if (y < 0 || y >= p.height || x < 0 || x >= p.width) return {Source::kOutside, 0};
  const int32_t* extent = p.extents + b % static_cast<I>(p.geometry_rows) * 4;
  const int64_t in_y = y - extent[0], in_x = x - extent[1];
  if (in_y >= 0 && in_y < extent[2] && in_x >= 0 && in_x < extent[3]) {
    if (!p.windows || in_y >= p.window_height || in_x >= p.window_width) return {Source::kHole, 0};
    const I row = b * static_cast<I>(p.window_height) + static_cast<I>(in_y);
    return {Source::kWindow, row * static_cast<I>(p.window_width) + static_cast<I>(in_x)};
  }
  const I row = b / static_cast<I>(p.holes) * static_cast<I>(p.height) + static_cast<I>(y);
  return {Source::kBase, row * static_cast<I>(p.width) + static_cast<I>(x)};
}

// composed_pixel() for many pixels of one window, in as few steps: what is known beforehand.
template <typename I>
struct WindowRow {
  int32_t y, x;                      // of the first tap's pixel
  I base, window;                    // pixel index of the image's, of the window's first pixel
  int32_t top, left, height, width;  // the extent
};

// What tap_place() says of pixels that are read nowhere, below all that it says of others.
template <typename I>
inline constexpr I kOutside = std::numeric_limits<I>::min();
template <typename I>
inline constexpr I kHole = kOutside<I> + 1;

GLANCE_HOST_DEVICE inline int32_t clamped(int64_t value) {
  constexpr int64_t kFar = 1 << 29;  // outside of any map, and no sum overflows
  return static_cast<int32_t>(value < -kFar ? -kFar : value > kFar ? kFar : value);
}

// Of window b, or for b = -1 one that is nowhere.
template <typename I>
GLANCE_HOST_DEVICE inline WindowRow<I> window_row(const HoleWindowsParams& p, int64_t b, int64_t y,
                                                  int64_t x) {
  if (b < 0) return {clamped(INT64_MIN), 0, 0, 0, 0, 0, 0, 0};
  const int32_t* extent = p.extents + b % p.geometry_rows * 4;
  return {clamped(y),
          clamped(x),
          static_cast<I>(b / p.holes * p.height * p.width),
          static_cast<I>(b * p.window_height * p.window_width),
          clamped(extent[0]),
          clamped(extent[1]),
          clamped(extent[2]),
          clamped(extent[3])};
}

// Where the tap's pixel stands: an index into the base, the complement of one into the windows,
// kHole, or kOutside.
template <typename I>
GLANCE_HOST_DEVICE inline I tap_place(const HoleWindowsParams& p, const WindowRow<I>& row,
                                      int32_t tap_y, int32_t tap_x) {
  const int32_t y = row.y + tap_y, x = row.x + tap_x;
  if (y < 0 || y >= p.height || x < 0 || x >= p.width) return kOutside<I>;
  const int32_t in_y = y - row.top, in_x = x - row.left;
  if (in_y >= 0 && in_y < row.height && in_x >= 0 && in_x < row.width) {
    const bool known = p.windows && in_y < p.window_height && in_x < p.window_width;
    if (!known) return kHole<I>;
    return ~(row.window + in_y * static_cast<I>(p.window_width) + in_x);
  }
  return row.base + y * static_cast<I>(p.width) + x;
}

// Pixel (y, x) of tile b of gather_holes, in the coordinates of the map.
struct Position {
  int64_t y, x;
};

GLANCE_HOST_DEVICE inline Position tile_pixel(const HoleGatherParams& p, int64_t b, int64_t y,
                                              int64_t x) {
  const int32_t* origin = p.origins + b % p.geometry_rows * 2;
  return {origin[0] + y, origin[1] + x};
}

// Flat in (N * P, th, tw) of the tiles; -1 outside of tile b.
template <typename I>
GLANCE_HOST_DEVICE inline I tile_index(const HoleGatherParams& p, I b, int64_t y, int64_t x) {
  if (y < 0 || y >= p.tile_height || x < 0 || x >= p.tile_width) return -1;
  const I row = b * static_cast<I>(p.tile_height) + static_cast<I>(y);
  return row * static_cast<I>(p.tile_width) + static_cast<I>(x);
}

// Where the gradient of cell (y, x) of window b stands in (N * P, th, tw) of the tiles; -1 where
// the cell is no part of the extent, or the extent there no part of the tile.
template <typename I>
GLANCE_HOST_DEVICE inline I tile_of_window_cell(const HoleGatherParams& p, I b, int64_t y,
                                                int64_t x) {
  const I g = b % static_cast<I>(p.geometry_rows);
  const int32_t* extent = p.extents + g * 4;
  const int32_t* origin = p.origins + g * 2;
  if (y >= extent[2] || x >= extent[3]) return -1;
  return tile_index<I>(p, b, extent[0] + y - origin[0], extent[1] + x - origin[1]);
}

// The same for pixel (y, x) of the base: -1 where the tile has it not or the extent covers it.
template <typename I>
GLANCE_HOST_DEVICE inline I tile_of_base_pixel(const HoleGatherParams& p, I b, int64_t y,
                                               int64_t x) {
  const I g = b % static_cast<I>(p.geometry_rows);
  const int32_t* extent = p.extents + g * 4;
  const int32_t* origin = p.origins + g * 2;
  const int64_t in_y = y - extent[0], in_x = x - extent[1];
  if (in_y >= 0 && in_y < extent[2] && in_x >= 0 && in_x < extent[3]) return -1;
  return tile_index<I>(p, b, y - origin[0], x - origin[1]);
}

// Rows of the convolution seen as a matrix product: the listed cells, image after image where all
// images share the geometry.
GLANCE_HOST_DEVICE inline int64_t conv_rows(const HoleConvParams& p) {
  return p.window_count() / p.geometry_rows * p.cell_count;
}

template <typename I>
struct ConvRow {
  I window;      // b, or -1 for a cell that is not in the list's range
  int32_t cell;  // flat in (G, ho, wo): where its ratio stands
  I output;      // flat in (N * P, ho, wo)
  int64_t y, x;  // of the first tap's pixel
};

template <typename I>
GLANCE_HOST_DEVICE inline ConvRow<I> conv_row(const HoleConvParams& p, I row) {
  const I image = row / static_cast<I>(p.cell_count);
  const int32_t cell = p.cells[row % static_cast<I>(p.cell_count)];
  const int32_t window_cells = static_cast<int32_t>(p.out_height * p.out_width);
  const int32_t g = cell / window_cells, at = cell % window_cells;
  if (cell < 0 || g >= p.geometry_rows) return {-1, 0, 0, 0, 0};
  const int32_t width = static_cast<int32_t>(p.out_width);
  const I window = image * static_cast<I>(p.geometry_rows) + g;
  const int32_t* origin = p.origins + static_cast<int64_t>(g) * 2;
  return {window, cell, window * window_cells + at,
          (origin[0] + int64_t{at / width}) * p.stride[0] - p.padding[0],
          (origin[1] + int64_t{at % width}) * p.stride[1] - p.padding[1]};
}

// The first tap's pixel of cell (i, j) of window b's next window, in pooling.
template <typename I>
GLANCE_HOST_DEVICE inline WindowRow<I> pool_row(const HolePoolParams& p, int64_t b, int64_t i,
                                                int64_t j) {
  const int32_t* origin = p.origins + b % p.geometry_rows * 2;
  return window_row<I>(p, b, (origin[0] + i) * p.stride[0] - p.padding[0],
                       (origin[1] + j) * p.stride[1] - p.padding[1]);
}

}  // namespace glance
