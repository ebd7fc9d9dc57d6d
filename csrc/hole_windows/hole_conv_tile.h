// The CUDA convolution of hole windows as the product of implicit_gemm/: its rows are the listed
// cells, and a window's pixels stand in the base or in the windows. The C++ tests run the same.
#pragma once

#include <cstdint>

#include "common/scalar.h"
#include "hole_windows/hole_windows.h"
#include "hole_windows/hole_windows_tile.h"
#include "implicit_gemm/gemm_kernel.h"
#include "implicit_gemm/gemm_tile.h"

namespace glance {

template <typename Body>
void dispatch_conv_tile(const HoleConvParams& p, Body&& body) {
  dispatch_gemm_tile(p.dtype, p.tf32, p.channels, p.out_channels, body);
}

// What a launch hands to the kernel: rows are cells, places as of tap_place().
struct HoleConvWork : GemmWork {
  using Row = WindowRow<int32_t>;
  static constexpr bool kCountsPlaces = false;  // ratios are given, and all cells have valid pixels

  HoleConvParams conv;  // base and windows are the padded ones
  int64_t rows = 0;

  template <typename A>
  GLANCE_DEVICE TileRow<Row, A> row(int64_t tile, int r, int rows_of_a_tile) const {
    const int64_t index = tile * rows_of_a_tile + r;
    ConvRow<int64_t> found{-1, 0, 0, 0, 0};
    if (index < rows) found = conv_row<int64_t>(conv, index);
    const bool real = found.window >= 0;
    return {window_row<int32_t>(conv, found.window, found.y, found.x), real ? found.output : -1,
            real ? static_cast<const A*>(conv.ratio)[found.cell] : A(0)};
  }

  GLANCE_DEVICE int32_t place(const Row& row, int32_t tap_y, int32_t tap_x) const {
    return tap_place(conv, row, tap_y, tap_x);
  }
  GLANCE_DEVICE static bool is_missing(int32_t place) { return place <= kHole<int32_t>; }
  GLANCE_DEVICE const char* somewhere() const { return static_cast<const char*>(conv.base); }
  GLANCE_DEVICE const char* pixel(int32_t place) const {
    return place >= 0 ? static_cast<const char*>(conv.base) + place * pixel_bytes
                      : static_cast<const char*>(conv.windows) + ~place * pixel_bytes;
  }
};

struct ConvWorkspace {
  // Bytes, multiples of 16: of the packed weight, and of copies of what cannot be read as it is.
  int64_t packed, base, windows;
  int64_t total() const { return packed + base + windows; }
};

template <typename Tile>
HoleConvWork conv_work(const HoleConvParams& p) {
  HoleConvWork w;
  w.conv = p;
  w.rows = conv_rows(p);
  w.packed = p.packed;
  w.weight = p.weight;
  w.bias = p.bias;
  w.output = p.output;
  w.weight_channels = p.channels;
  w.out_channels = p.out_channels;
  w.negative_slope = p.negative_slope;
  for (int axis = 0; axis < 2; ++axis) {
    w.kernel[axis] = static_cast<int32_t>(p.kernel[axis]);
    w.dilation[axis] = static_cast<int32_t>(p.dilation[axis]);
  }
  w.weight_strides[3] = 1;
  w.weight_strides[2] = p.kernel[1];
  w.weight_strides[1] = p.kernel[0] * p.kernel[1];
  w.weight_strides[0] = p.channels * w.weight_strides[1];
  size_gemm<Tile>(w, divide_up(w.rows, Tile::kRows));
  return w;
}

template <typename Tile>
ConvWorkspace conv_workspace(const HoleConvParams& p) {
  const HoleConvWork w = conv_work<Tile>(p);
  return {w.packed_bytes(), copy_bytes(w, p.base, p.batch * p.height * p.width),
          copy_bytes(w, p.windows, p.window_count() * p.window_height * p.window_width)};
}

// Whether the kernel's 32-bit indices suffice.
template <typename Tile>
bool fits_conv_tile(const HoleConvParams& p) {
  constexpr int64_t kMost = INT32_MAX - 1;
  return p.batch * p.height * p.width < kMost &&
         p.window_count() * p.window_height * p.window_width < kMost &&
         conv_work<Tile>(p).blocks < kMost && fits_gemm(p.kernel, p.dilation, p.channels);
}

}  // namespace glance
