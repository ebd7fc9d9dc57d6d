// Rows of a feature map as the fused kernels hold them in cache: pixel after pixel, the channels of
// one group together, converted to what is multiplied.
#pragma once

#include <cstring>
#include <type_traits>
#include <vector>

#include "common/transpose.h"
#include "partial_conv/partial_conv.h"
#include "partial_conv/window_counts.h"

namespace glance {

// Pixels [x, x + count) of row y of an image; `channels` of them from `first` on.
struct PixelRow {
  int64_t image, y, x, count, first, channels;
};

template <typename T>
struct FeatureMap {
  const T* data;  // (N, C, H, W) or (N, H, W, C)
  int64_t channels, height, width;
  bool channels_last;
};

// Few channels side by side, which compilers turn into shuffles.
template <int kChannels, typename T>
void interleave(const T* from, int64_t plane, int64_t count, T* to) {
  for (int64_t x = 0; x < count; ++x) {
    for (int c = 0; c < kChannels; ++c) to[x * kChannels + c] = from[c * plane + x];
  }
}

// Writes the row's pixels, each of `pitch` elements, zeros behind its channels.
template <typename T, typename C>
void copy_pixels(const FeatureMap<T>& map, const PixelRow& row, int64_t pitch, C* to) {
  const int64_t plane = map.height * map.width;
  if (map.channels_last) {
    const T* from =
        map.data + (row.image * plane + row.y * map.width + row.x) * map.channels + row.first;
    if (std::is_same_v<T, C> && row.channels == map.channels && row.channels == pitch) {
      std::memcpy(to, from, row.count * pitch * sizeof(T));
      return;
    }
    for (int64_t x = 0; x < row.count; ++x) {
      for (int64_t c = 0; c < row.channels; ++c) {
        to[x * pitch + c] = convert<C>(from[x * map.channels + c]);
      }
    }
  } else {
    const T* from =
        map.data + (row.image * map.channels + row.first) * plane + row.y * map.width + row.x;
    if constexpr (std::is_same_v<T, C>) {
      if (row.channels == 3 && pitch == 3) return interleave<3>(from, plane, row.count, to);
      if (row.channels == 1 && pitch == 1) {
        std::memcpy(to, from, row.count * sizeof(T));
        return;
      }
      transpose(from, plane, row.channels, row.count, to, pitch);
    } else {
      for (int64_t c = 0; c < row.channels; ++c) {
        for (int64_t x = 0; x < row.count; ++x) {
          to[x * pitch + c] = convert<C>(from[c * plane + x]);
        }
      }
    }
  }
  if (row.channels == pitch) return;
  for (int64_t x = 0; x < row.count; ++x) {
    for (int64_t c = row.channels; c < pitch; ++c) to[x * pitch + c] = C{};
  }
}

// where(mask, input, 0).
template <typename C>
void mask_pixels(const PartialConvParams& p, const PixelRow& row, int64_t pitch, C* to) {
  const int64_t n = p.mask_batch == 1 ? 0 : row.image;
  const int64_t first = p.mask_channels == 1 ? 0 : row.first;
  const int64_t count = p.mask_channels == 1 ? 1 : row.channels;
  for (int64_t c = 0; c < count; ++c) {
    const uint8_t* mask =
        p.mask + ((n * p.mask_channels + first + c) * p.in_height + row.y) * p.in_width + row.x;
    if (all_valid(mask, row.count)) continue;
    for (int64_t x = 0; x < row.count; ++x) {
      if (mask[x]) continue;
      if (p.mask_channels == 1) {
        std::fill(to + x * pitch, to + (x + 1) * pitch, C{});
      } else {
        to[x * pitch + c] = C{};
      }
    }
  }
}

// The gradient behind the activation: as it is where `result` > 0, else times the slope.
template <typename C>
void activation_gradient(const C* result, int64_t count, accumulate_t<C> slope, C* grad) {
  using A = accumulate_t<C>;
  for (int64_t i = 0; i < count; ++i) {
    const A below = slope == 0 ? A(0) : widen(grad[i]) * slope;
    grad[i] = narrow<C>(widen(result[i]) > 0 ? widen(grad[i]) : below);
  }
}

// where(ratio > 0, grad * ratio, 0).
template <typename C, typename A>
void scale_pixels(const A* ratio, int64_t count, int64_t pitch, C* grad) {
  for (int64_t x = 0; x < count; ++x) {
    if (ratio[x] == 1) continue;
    for (int64_t k = x * pitch; k < (x + 1) * pitch; ++k) {
      grad[k] = ratio[x] == 0 ? C{} : narrow<C>(widen(grad[k]) * ratio[x]);
    }
  }
}

}  // namespace glance
