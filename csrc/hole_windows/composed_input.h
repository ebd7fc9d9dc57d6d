// What a layer sees of one hole on a CPU: base, window and border as one map.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "hole_windows/hole_windows.h"

namespace glance {

template <typename T>
struct Composed {
  const T* base;    // (H, W, C) of the image
  const T* window;  // (h, w, C), or null
  int64_t row, column, rows, columns;
};

template <typename T>
Composed<T> composed_input(const HoleWindowsParams& p, int64_t b) {
  const int32_t* extent = p.extents + b % p.geometry_rows * 4;
  const T* windows = static_cast<const T*>(p.windows);
  return {static_cast<const T*>(p.base) + b / p.holes * p.height * p.width * p.channels,
          windows ? windows + (b - p.first_window) * p.window_height * p.window_width * p.channels
                  : nullptr,
          extent[0],
          extent[1],
          extent[2],
          extent[3]};
}

// Copies `count` pixels of C channels, each padded with zeros to `pitch` elements.
template <typename T, typename To>
void copy_pixels(const T* source, To* target, int64_t count, int64_t channels, int64_t pitch) {
  if (std::is_same_v<T, To> && channels == pitch) {
    std::memcpy(target, source, count * channels * sizeof(T));
    return;
  }
  for (int64_t x = 0; x < count; ++x) {
    for (int64_t c = 0; c < channels; ++c) {
      target[x * pitch + c] = convert<To>(source[x * channels + c]);
    }
    for (int64_t c = channels; c < pitch; ++c) target[x * pitch + c] = To{};
  }
}

// Pixels [x, x + count) of row y of the composed input.
template <typename T, typename To>
void copy_row(const HoleWindowsParams& p, const Composed<T>& from, int64_t y, int64_t x,
              int64_t count, To fill, int64_t pitch, To* target) {
  const int64_t end = x + count;
  const int64_t in_map = std::min<int64_t>(std::max<int64_t>(x, 0), end);
  const int64_t map_end = y < 0 || y >= p.height ? in_map : std::min(end, p.width);
  const auto fill_until = [&](int64_t until) {
    for (; x < until; ++x, target += pitch) std::fill(target, target + pitch, fill);
  };
  const auto copy_until = [&](int64_t until, const T* source) {
    if (x >= until) return;
    copy_pixels(source, target, until - x, p.channels, pitch);
    target += (until - x) * pitch;
    x = until;
  };
  fill_until(in_map);
  const T* base_row = from.base + y * p.width * p.channels;
  if (y >= from.row && y < from.row + from.rows) {
    copy_until(std::min(map_end, from.column), base_row + x * p.channels);
    const int64_t until = std::min(map_end, from.column + from.columns);
    if (x < until && x >= from.column) {
      if (from.window) {
        const int64_t at = (y - from.row) * p.window_width + (x - from.column);
        copy_until(until, from.window + at * p.channels);
      } else {
        const int64_t zeros = (until - x) * pitch;
        std::fill(target, target + zeros, To{});
        target += zeros;
        x = until;
      }
    }
  }
  copy_until(map_end, base_row + x * p.channels);
  fill_until(end);
}

}  // namespace glance
