#include <algorithm>
#include <limits>
#include <vector>

#include "common/micro_kernel.h"
#include "hole_windows/composed_input.h"
#include "hole_windows/hole_windows.h"

namespace glance {
namespace {

template <typename T>
void gather(const HoleGatherParams& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const T fill = narrow<T>(static_cast<A>(p.fill));
  const int64_t row_size = p.tile_width * p.channels;
  for (int64_t b = begin; b < end; ++b) {
    const Composed<T> from = composed_input<T>(p, b);
    const int32_t* origin = p.origins + b % p.geometry_rows * 2;
    T* tile = static_cast<T*>(p.tiles) + b * p.tile_height * row_size;
    for (int64_t y = 0; y < p.tile_height; ++y) {
      copy_row(p, from, origin[0] + y, origin[1], p.tile_width, fill, p.channels,
               tile + y * row_size);
    }
  }
}

template <typename T>
void scatter_windows(const HoleGatherBackwardParams& p, int64_t begin, int64_t end) {
  const int64_t c = p.channels;
  for (int64_t b = begin; b < end; ++b) {
    const int32_t* extent = p.extents + b % p.geometry_rows * 4;
    const int32_t* origin = p.origins + b % p.geometry_rows * 2;
    const T* tile = static_cast<const T*>(p.grad_tiles) + b * p.tile_height * p.tile_width * c;
    T* window = static_cast<T*>(p.grad_windows) + b * p.window_height * p.window_width * c;
    std::fill(window, window + p.window_height * p.window_width * c, T{});
    for (int64_t y = 0; y < extent[2]; ++y) {
      const int64_t tile_y = extent[0] + y - origin[0];
      if (tile_y < 0 || tile_y >= p.tile_height) continue;
      const int64_t left = extent[1] - origin[1];  // the window's first column in the tile
      const int64_t from = std::max<int64_t>(0, -left);
      const int64_t to = std::min<int64_t>(extent[3], p.tile_width - left);
      if (from >= to) continue;
      std::copy_n(tile + (tile_y * p.tile_width + left + from) * c, (to - from) * c,
                  window + (y * p.window_width + from) * c);
    }
  }
}

template <typename T>
void scatter_base(const HoleGatherBackwardParams& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const int64_t c = p.channels;
  std::vector<A> sum(p.width * c);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / p.height, y = row % p.height;
    std::fill(sum.begin(), sum.end(), A{});
    for (int64_t b = n * p.holes; b < (n + 1) * p.holes; ++b) {
      const int32_t* extent = p.extents + b % p.geometry_rows * 4;
      const int32_t* origin = p.origins + b % p.geometry_rows * 2;
      const int64_t tile_y = y - origin[0];
      if (tile_y < 0 || tile_y >= p.tile_height) continue;
      const T* tile = static_cast<const T*>(p.grad_tiles) +
                      (b * p.tile_height + tile_y) * p.tile_width * c - origin[1] * c;
      const auto add = [&](int64_t from, int64_t to) {
        for (int64_t i = from * c; i < to * c; ++i) sum[i] += widen(tile[i]);
      };
      const int64_t first = std::max<int64_t>(0, origin[1]);
      const int64_t last = std::min<int64_t>(p.width, origin[1] + p.tile_width);
      if (y < extent[0] || y >= extent[0] + extent[2]) {
        add(first, last);
      } else {
        add(first, std::min<int64_t>(last, extent[1]));
        add(std::max<int64_t>(first, extent[1] + extent[3]), last);
      }
    }
    T* out = static_cast<T*>(p.grad_base) + row * p.width * c;
    for (int64_t i = 0; i < p.width * c; ++i) out[i] = narrow<T>(sum[i]);
  }
}

// The greatest of each window of the composed input; a NaN is the greatest of all.
template <typename T>
void max_pool(const HolePoolParams& p, int64_t begin, int64_t end) {
  const MaxKernel<T> kernel = max_kernel<T>(best_instruction_set());
  const T nothing = narrow<T>(-std::numeric_limits<accumulate_t<T>>::infinity());
  const int64_t c = p.channels;
  const int64_t height = (p.out_height - 1) * p.stride[0] + (p.kernel[0] - 1) * p.dilation[0] + 1;
  const int64_t width = (p.out_width - 1) * p.stride[1] + (p.kernel[1] - 1) * p.dilation[1] + 1;
  std::vector<T> tile(height * width * c);
  std::vector<int64_t> offsets;
  for (int64_t y = 0; y < p.kernel[0]; ++y) {
    for (int64_t x = 0; x < p.kernel[1]; ++x) {
      offsets.push_back((y * p.dilation[0] * width + x * p.dilation[1]) * c);
    }
  }
  std::vector<const T*> taps(offsets.size());
  for (int64_t b = begin; b < end; ++b) {
    const Composed<T> from = composed_input<T>(p, b);
    const int32_t* origin = p.origins + b % p.geometry_rows * 2;
    for (int64_t y = 0; y < height; ++y) {
      copy_row(p, from, origin[0] * p.stride[0] - p.padding[0] + y,
               origin[1] * p.stride[1] - p.padding[1], width, nothing, c,
               tile.data() + y * width * c);
    }
    T* output = static_cast<T*>(p.output) + (b - p.first_output) * p.out_height * p.out_width * c;
    for (int64_t y = 0; y < p.out_height; ++y) {
      for (int64_t x = 0; x < p.out_width; ++x, output += c) {
        const T* corner = tile.data() + (y * p.stride[0] * width + x * p.stride[1]) * c;
        for (size_t t = 0; t < taps.size(); ++t) taps[t] = corner + offsets[t];
        kernel(taps.data(), static_cast<int64_t>(taps.size()), c, output);
      }
    }
  }
}

}  // namespace

void gather_holes_cpu(const HoleGatherParams& params, int64_t begin, int64_t end) {
  dispatch_cpu(params.dtype,
               [&](auto tag) { gather<typename decltype(tag)::type>(params, begin, end); });
}

void scatter_windows_cpu(const HoleGatherBackwardParams& params, int64_t begin, int64_t end) {
  dispatch_cpu(params.dtype, [&](auto tag) {
    scatter_windows<typename decltype(tag)::type>(params, begin, end);
  });
}

void scatter_base_cpu(const HoleGatherBackwardParams& params, int64_t begin, int64_t end) {
  dispatch_cpu(params.dtype,
               [&](auto tag) { scatter_base<typename decltype(tag)::type>(params, begin, end); });
}

void hole_max_pool_cpu(const HolePoolParams& params, int64_t begin, int64_t end) {
  dispatch_cpu(params.dtype,
               [&](auto tag) { max_pool<typename decltype(tag)::type>(params, begin, end); });
}

}  // namespace glance
