// The fused partial convolution on CUDA as the product of implicit_gemm/, without CUDA: which
// output pixels a tile's rows are, and where the pixels of their windows stand. The C++ tests run
// the same functions.
//
// One geometry serves the output and the gradient of the input. A pixel of the target reads those
// of the source at (pixel * scale + offset + tap * dilation) / spacing, where that is a whole
// number:
//
//   output       scale stride, offset -padding, dilation as it is,  spacing 1
//   grad_input   scale 1,      offset padding,  dilation negative,  spacing stride
//
// A source pixel behind the mask is missing, like padding. The output is scaled by its ratio, from
// the number of places that a window has; the gradient by the mask of its pixel. So both skip tiles
// in which nothing is left to compute, and steps whose taps no row of a tile has: in the gradient
// that is all but one of stride x stride, since a tile's rows are of one phase of the stride.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/scalar.h"
#include "implicit_gemm/gemm_kernel.h"
#include "implicit_gemm/gemm_tile.h"
#include "partial_conv/partial_conv.h"

namespace glance {

struct SlideRow {
  int32_t y, x;   // of the first tap's pixel, times the spacing
  int32_t image;  // pixel index of the image's first pixel in the source
};

struct SlideWork : GemmWork {
  using Row = SlideRow;
  static constexpr bool kCountsPlaces = true;
  static constexpr int32_t kMissing = -1;

  const void* pixels = nullptr;     // (N, height, width, groups * channels)
  const uint8_t* seen = nullptr;    // mask of the source; null: all of it is read
  const uint8_t* wanted = nullptr;  // mask of the target; null: its scale is the ratio
  uint8_t* valid = nullptr;         // of the target, written where a window has pixels; or null
  int64_t batch = 0, full = 0;      // N, sum(1)
  bool shared_mask = true;          // of all images
  int32_t source[2] = {0, 0}, target[2] = {0, 0};  // height, width
  int32_t scale[2] = {1, 1}, offset[2] = {0, 0}, spacing[2] = {1, 1};
  // Rows go phase by phase, those of a phase in patches, whose pixels share most of what they read
  // and whether they lie in a hole; or, where patches would fit badly, one after the other.
  int32_t phases[2] = {1, 1}, phase_size[2] = {0, 0};
  int32_t patch[2] = {0, 0}, patches[2] = {0, 0};  // patch[0] == 0: none
  int64_t phase_tiles = 0;

  int64_t source_count() const { return batch * source[0] * source[1]; }

  // Of pixel (y, x) of the target in image n, or nowhere.
  template <typename A>
  GLANCE_DEVICE TileRow<Row, A> pixel_row(int64_t n, int64_t y, int64_t x) const {
    if (n >= batch || y >= target[0] || x >= target[1]) return {{INT32_MIN / 2, 0, 0}, -1, A(0)};
    const int64_t at = y * target[1] + x, pixels_before = n * target[0] * target[1];
    const bool some = !wanted || wanted[(shared_mask ? 0 : pixels_before) + at];
    return {{static_cast<int32_t>(y) * scale[0] + offset[0],
             static_cast<int32_t>(x) * scale[1] + offset[1],
             static_cast<int32_t>(n * source[0] * source[1])},
            pixels_before + at,
            A(some)};
  }

  template <typename A>
  GLANCE_DEVICE TileRow<Row, A> row(int64_t tile, int r, int rows_of_a_tile) const {
    const int64_t phase = tile / phase_tiles;
    int64_t in_phase = tile % phase_tiles, n, y, x;
    if (patch[0] == 0) {
      in_phase = in_phase * rows_of_a_tile + r;
      x = in_phase % phase_size[1];
      y = in_phase / phase_size[1] % phase_size[0];
      n = in_phase / phase_size[1] / phase_size[0];
    } else {
      x = in_phase % patches[1] * patch[1] + r % patch[1];
      y = in_phase / patches[1] % patches[0] * patch[0] + r / patch[1];
      n = in_phase / patches[1] / patches[0];
      if (y >= phase_size[0] || x >= phase_size[1]) n = batch;
    }
    return pixel_row<A>(n, y * phases[0] + phase / phases[1], x * phases[1] + phase % phases[1]);
  }

  GLANCE_DEVICE int32_t place(const Row& row, int32_t tap_y, int32_t tap_x) const {
    int32_t y = row.y + tap_y, x = row.x + tap_x;
    if (y < 0 || x < 0) return kMissing;
    if (spacing[0] != 1 || spacing[1] != 1) {
      if (y % spacing[0] != 0 || x % spacing[1] != 0) return kMissing;
      y /= spacing[0];
      x /= spacing[1];
    }
    if (y >= source[0] || x >= source[1]) return kMissing;
    const int32_t at = y * source[1] + x;
    if (seen && !seen[(shared_mask ? 0 : row.image) + at]) return kMissing;
    return row.image + at;
  }
  GLANCE_DEVICE static bool is_missing(int32_t place) { return place < 0; }
  GLANCE_DEVICE const char* somewhere() const { return static_cast<const char*>(pixels); }
  GLANCE_DEVICE const char* pixel(int32_t place) const {
    return static_cast<const char*>(pixels) + place * pixel_bytes;
  }

  // sum(1) / sum(M) for the output; the gradient keeps its mask.
  template <typename A>
  GLANCE_DEVICE A counted(const TileRow<Row, A>& row, int count, bool first) const {
    if (wanted) return row.ratio;
    const bool of_mask = !shared_mask || row.output < int64_t{target[0]} * target[1];
    if (first && valid && of_mask) valid[row.output] = count > 0;
    return count > 0 ? static_cast<A>(full) / static_cast<A>(count) : A(0);
  }
};

// One pixel and `vector` channels of a depthwise convolution; packed is (taps, C).
template <typename T, int vector, typename Warp>
GLANCE_DEVICE void depthwise_run(Warp& warp, const SlideWork& w, int64_t index) {
  using A = accumulate_t<T>;
  using V = Run<T, vector>;
  const int64_t runs = w.out_channels / vector, c = index % runs * vector;
  const int64_t pixel = index / runs, in_image = pixel % (int64_t{w.target[0]} * w.target[1]);
  const auto row = w.pixel_row<A>(pixel / (int64_t{w.target[0]} * w.target[1]),
                                  in_image / w.target[1], in_image % w.target[1]);
  const T* packed = static_cast<const T*>(w.packed) + c;
  A sums[vector] = {};
  int count = 0;
  for (int y = 0, tap = 0; y < w.kernel[0]; ++y) {
    for (int x = 0; x < w.kernel[1]; ++x, ++tap) {
      if (row.ratio == A(0)) continue;
      const int32_t place = w.place(row.row, y * w.dilation[0], x * w.dilation[1]);
      if (w.is_missing(place)) continue;
      ++count;
      const V value = *reinterpret_cast<const V*>(reinterpret_cast<const T*>(w.pixel(place)) + c);
      const V weight = *reinterpret_cast<const V*>(packed + tap * w.out_channels);
      GLANCE_DEVICE_UNROLL
      for (int i = 0; i < vector; ++i) {
        sums[i] += A(warp.widened(value.value[i])) * A(warp.widened(weight.value[i]));
      }
    }
  }
  const A ratio = w.counted(row, count, c == 0), slope = static_cast<A>(w.negative_slope);
  const T* bias = static_cast<const T*>(w.bias);
  V result;
  GLANCE_DEVICE_UNROLL
  for (int i = 0; i < vector; ++i) {
    const A shift = bias ? A(warp.widened(bias[c + i])) : A(0);
    result.value[i] = warp.template narrowed<T>(finished<A>(sums[i], ratio, shift, slope));
  }
  *reinterpret_cast<V*>(static_cast<T*>(w.output) + pixel * w.out_channels + c) = result;
}

// Which element of the weight stands at `index` of a depthwise convolution's packed one.
GLANCE_HOST_DEVICE inline int64_t depthwise_source(const SlideWork& w, int64_t index) {
  const int64_t tap = index / w.out_channels, c = index % w.out_channels;
  return c * w.weight_group + tap / w.kernel[1] * w.weight_strides[2] +
         tap % w.kernel[1] * w.weight_strides[3];
}

// --- On the host.

inline bool is_depthwise(const PartialConvParams& p) {
  return p.groups > 1 && p.groups == p.in_channels && p.groups == p.out_channels;
}

// The sizes of a sweep whose depth is `channels` of a group's source and whose columns are those of
// its target.
struct SweepChannels {
  int64_t channels, columns;
};
inline SweepChannels sweep_channels(const PartialConvParams& p, Sweep sweep) {
  const int64_t in = p.in_channels / p.groups, out = p.out_channels / p.groups;
  return sweep == Sweep::kForward ? SweepChannels{in, out} : SweepChannels{out, in};
}

template <typename Body>
void dispatch_slide_tile(const PartialConvParams& p, Sweep sweep, Body&& body) {
  const SweepChannels c = sweep_channels(p, sweep);
  dispatch_gemm_tile(p.dtype, p.tf32, c.channels, c.columns, body);
}

// The squarest patches that need at most a sixth more tiles than rows one after the other.
inline void choose_patch(SlideWork& w, int64_t rows_of_a_tile) {
  const int64_t in_order = divide_up(w.batch * w.phase_size[0] * w.phase_size[1], rows_of_a_tile);
  w.phase_tiles = in_order;
  for (const int32_t height : {8, 4, 16, 2}) {
    const int32_t width = static_cast<int32_t>(rows_of_a_tile) / height;
    const int64_t down = divide_up(w.phase_size[0], height);
    const int64_t across = divide_up(w.phase_size[1], width), tiles = w.batch * down * across;
    if (tiles * 6 > in_order * 7) continue;
    w.patch[0] = height;
    w.patch[1] = width;
    w.patches[0] = static_cast<int32_t>(down);
    w.patches[1] = static_cast<int32_t>(across);
    w.phase_tiles = tiles;
    return;
  }
}

// All but what depends on the tile.
inline SlideWork sized_slide_work(const PartialConvBackwardParams& p, Sweep sweep) {
  const bool forward = sweep == Sweep::kForward;
  const int64_t in[2] = {p.in_height, p.in_width}, out[2] = {p.out_height, p.out_width};
  SlideWork w;
  w.packed = p.packed;
  w.weight = p.weight;
  std::copy_n(p.weight_strides, 4, w.weight_strides);
  w.weight_group = p.out_channels / p.groups * p.weight_strides[0];
  if (!forward) std::swap(w.weight_strides[0], w.weight_strides[1]);
  w.groups = static_cast<int32_t>(p.groups);
  w.weight_channels = sweep_channels(p, sweep).channels;
  w.out_channels = sweep_channels(p, sweep).columns;
  w.pixels = forward ? p.input : p.grad_conv;
  w.output = forward ? p.output : p.grad_input;
  w.bias = forward ? p.bias : nullptr;
  w.negative_slope = forward ? p.negative_slope : 1;
  (forward ? w.seen : w.wanted) = p.mask;
  w.valid = forward ? p.valid : nullptr;
  w.batch = p.batch;
  w.full = p.window_size();
  w.shared_mask = p.mask_batch == 1;
  for (int axis = 0; axis < 2; ++axis) {
    const int32_t stride = static_cast<int32_t>(p.stride[axis]);
    const int32_t padding = static_cast<int32_t>(p.padding[axis]);
    const int32_t dilation = static_cast<int32_t>(p.dilation[axis]);
    w.kernel[axis] = static_cast<int32_t>(p.kernel[axis]);
    w.source[axis] = static_cast<int32_t>((forward ? in : out)[axis]);
    w.target[axis] = static_cast<int32_t>((forward ? out : in)[axis]);
    w.dilation[axis] = forward ? dilation : -dilation;
    w.scale[axis] = forward ? stride : 1;
    w.offset[axis] = forward ? -padding : padding;
    w.spacing[axis] = w.phases[axis] = forward ? 1 : stride;
    w.phase_size[axis] = static_cast<int32_t>(divide_up(w.target[axis], w.phases[axis]));
  }
  w.taps = w.kernel[0] * w.kernel[1];
  return w;
}

template <typename Tile>
SlideWork slide_work(const PartialConvBackwardParams& p, Sweep sweep) {
  SlideWork w = sized_slide_work(p, sweep);
  choose_patch(w, Tile::kRows);
  size_gemm<Tile>(w, w.phase_tiles * w.phases[0] * w.phases[1]);
  return w;
}

// Packed (taps, C); w.channels and pixel_bytes as depthwise_run() takes them.
inline SlideWork depthwise_work(const PartialConvBackwardParams& p, Sweep sweep,
                                int64_t element_size) {
  SlideWork w = sized_slide_work(p, sweep);
  w.groups = 1;
  w.channels = w.weight_channels = w.out_channels = p.in_channels;
  w.pixel_bytes = p.in_channels * element_size;
  return w;
}

// Whether kernels of 32-bit indices can do it at all.
inline bool fits_slide(const PartialConvParams& p) {
  constexpr int64_t kMost = INT32_MAX - 1, kFar = 1 << 28;
  bool near = true;
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t size = axis == 0 ? p.in_height : p.in_width;
    near = near && size < kFar && p.padding[axis] < kFar && p.stride[axis] < kFar;
  }
  return near && p.channels_last && p.mask_channels == 1 && p.batch > 0 &&
         p.batch * p.in_height * p.in_width < kMost &&
         p.batch * p.out_height * p.out_width < kMost &&
         fits_gemm(p.kernel, p.dilation, std::max(p.in_channels, p.out_channels));
}

template <typename Tile>
bool fits_slide_tile(const PartialConvBackwardParams& p, Sweep sweep) {
  if (!fits_slide(p)) return false;
  const SlideWork w = slide_work<Tile>(p, sweep);
  return (p.groups == 1 || w.channels == w.weight_channels) && w.blocks < INT32_MAX - 1;
}

}  // namespace glance
