#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "hole_windows/hole_windows.h"
#include "hole_windows/micro_kernel.h"

namespace glance {
namespace {

constexpr int64_t kTileBytes = 256 * 1024;  // of the input tiles in flight: half of a small L2
constexpr int64_t kMostWindows = 64;        // whose cells share the micro-kernel's rows

template <typename To, typename From>
inline To convert(From value) {
  if constexpr (std::is_same_v<To, From>) {
    return value;
  } else {
    return widen(value);
  }
}

// The composed input of one window: base, window and border as one map.
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
          windows ? windows + b * p.window_height * p.window_width * p.channels : nullptr,
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

// How a convolution is computed: what is stored as T is multiplied as C and added as A.
template <typename T, typename C, typename A>
struct Plan {
  MicroKernel<C, A> kernel;
  int64_t pitch;       // elements of a pixel in a tile: C, padded to the kernel's depth
  int64_t tile_width;  // of the widest window
  std::vector<int64_t> runs;
  int64_t run_length;

  Plan(const HoleConvParams& p, MicroKernel<C, A> micro) : kernel(micro) {
    pitch = (p.channels + kernel.depth - 1) / kernel.depth * kernel.depth;
    tile_width = (p.out_width - 1) * p.stride[1] + (p.kernel[1] - 1) * p.dilation[1] + 1;
    const bool whole_rows = p.dilation[1] == 1;  // neighbouring taps are one run of memory
    run_length = whole_rows ? p.kernel[1] * pitch : pitch;
    for (int64_t y = 0; y < p.kernel[0]; ++y) {
      for (int64_t x = 0; x < (whole_rows ? 1 : p.kernel[1]); ++x) {
        runs.push_back((y * p.dilation[0] * tile_width + x * p.dilation[1]) * pitch);
      }
    }
  }

  int64_t panels(const HoleConvParams& p) const {
    return (p.out_channels + kernel.columns - 1) / kernel.columns;
  }
  int64_t panel_size(const HoleConvParams& p) const {
    return p.kernel[0] * p.kernel[1] * pitch * kernel.columns;
  }
  int64_t tile_size(const HoleConvParams& p) const {
    const int64_t reach = (p.kernel[0] - 1) * p.dilation[0] + 1;
    return ((p.out_height - 1) * p.stride[0] + reach) * tile_width * pitch;
  }
};

template <typename T, typename C, typename A>
void pack(const HoleConvParams& p, const Plan<T, C, A>& plan, int64_t begin, int64_t end) {
  const int64_t columns = plan.kernel.columns, depth = plan.kernel.depth;
  const int64_t taps = p.kernel[0] * p.kernel[1];
  const T* weight = static_cast<const T*>(p.weight);
  for (int64_t panel = begin; panel < end; ++panel) {
    C* out = static_cast<C*>(p.packed) + panel * plan.panel_size(p);
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t c0 = 0; c0 < plan.pitch; c0 += depth) {
        for (int64_t column = 0; column < columns; ++column) {
          const int64_t k = panel * columns + column;
          for (int64_t c = c0; c < c0 + depth; ++c) {
            const bool real = k < p.out_channels && c < p.channels;
            *out++ = real ? convert<C>(weight[(k * p.channels + c) * taps + tap]) : C{};
          }
        }
      }
    }
  }
}

template <typename T, typename C, typename A>
class WindowConv {
 public:
  WindowConv(const HoleConvParams& p, const Plan<T, C, A>& plan)
      : p_(p),
        plan_(plan),
        window_cells_(p.out_height * p.out_width),
        group_(std::clamp<int64_t>(kTileBytes / (plan.tile_size(p) * int64_t(sizeof(C))), 1,
                                   kMostWindows)),
        tiles_(group_ * plan.tile_size(p)),
        bias_(plan.panels(p) * plan.kernel.columns),
        result_(plan.kernel.rows * plan.kernel.columns) {
    for (int64_t k = 0; p.bias && k < p.out_channels; ++k) {
      bias_[k] = widen(static_cast<const T*>(p.bias)[k]);
    }
  }

  void run(int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b += group_) {
      rows_.clear();
      ratio_.clear();
      outputs_.clear();
      const int64_t last = std::min(b + group_, end);
      for (int64_t i = b; i < last; ++i) load(i, tiles_.data() + (i - b) * plan_.tile_size(p_));
      multiply();
    }
  }

 private:
  // Fills the tile of window b and lists its cells as rows of the product.
  void load(int64_t b, C* tile) {
    T* output = static_cast<T*>(p_.output) + b * window_cells_ * p_.out_channels;
    std::fill(output, output + window_cells_ * p_.out_channels, T{});
    const int64_t g = b % p_.geometry_rows;
    const int32_t* all = p_.cells + p_.cell_count;
    const int32_t* cell = std::lower_bound(p_.cells, all, g * window_cells_);
    const int32_t* cells_end = std::lower_bound(cell, all, (g + 1) * window_cells_);
    if (cell == cells_end) return;
    const int64_t first = (*cell - g * window_cells_) / p_.out_width;
    const int64_t final = (cells_end[-1] - g * window_cells_) / p_.out_width;
    int64_t columns = 0;  // how far to the right the window's cells go
    const A* ratio = static_cast<const A*>(p_.ratio);
    for (; cell < cells_end; ++cell) {
      const int64_t at = *cell - g * window_cells_, y = at / p_.out_width, x = at % p_.out_width;
      columns = std::max(columns, x + 1);
      rows_.push_back(tile +
                      (y * p_.stride[0] * plan_.tile_width + x * p_.stride[1]) * plan_.pitch);
      ratio_.push_back(ratio[*cell]);
      outputs_.push_back(output + at * p_.out_channels);
    }
    const Composed<T> from = composed_input<T>(p_, b);
    const int32_t* origin = p_.origins + g * 2;
    const int64_t top = origin[0] * p_.stride[0] - p_.padding[0];
    const int64_t left = origin[1] * p_.stride[1] - p_.padding[1];
    const int64_t tile_end = final * p_.stride[0] + (p_.kernel[0] - 1) * p_.dilation[0] + 1;
    const int64_t width = (columns - 1) * p_.stride[1] + (p_.kernel[1] - 1) * p_.dilation[1] + 1;
    for (int64_t y = first * p_.stride[0]; y < tile_end; ++y) {
      copy_row(p_, from, top + y, left, width, C{}, plan_.pitch,
               tile + y * plan_.tile_width * plan_.pitch);
    }
  }

  void multiply() {
    const int64_t count = rows_.size(), step = plan_.kernel.rows, columns = plan_.kernel.columns;
    if (count == 0) return;
    while (rows_.size() % step != 0) {  // the last rows again; their results are not stored
      rows_.push_back(rows_.back());
      ratio_.push_back(ratio_.back());
    }
    const C* packed = static_cast<const C*>(p_.packed);
    for (int64_t panel = 0; panel < plan_.panels(p_); ++panel) {
      const int64_t k = panel * columns, width = std::min(columns, p_.out_channels - k);
      for (int64_t row = 0; row < count; row += step) {
        plan_.kernel.run({rows_.data() + row, plan_.runs.data(), int64_t(plan_.runs.size()),
                          plan_.run_length, packed + panel * plan_.panel_size(p_),
                          ratio_.data() + row, bias_.data() + k, A(p_.negative_slope),
                          result_.data()});
        for (int64_t m = 0; m < std::min(step, count - row); ++m) {
          T* output = outputs_[row + m] + k;
          for (int64_t n = 0; n < width; ++n) output[n] = narrow<T>(result_[m * columns + n]);
        }
      }
    }
  }

  const HoleConvParams& p_;
  const Plan<T, C, A>& plan_;
  int64_t window_cells_;
  int64_t group_;
  std::vector<C> tiles_;
  std::vector<A> bias_;
  std::vector<A> result_;
  std::vector<const C*> rows_;
  std::vector<A> ratio_;
  std::vector<T*> outputs_;
};

// Calls `body` with the plan for the dtype on this processor.
template <typename Body>
void with_plan(const HoleConvParams& p, Body&& body) {
  const InstructionSet set = best_instruction_set();
  if (p.dtype == ScalarType::kBFloat16) {
    const auto native = bfloat16_kernel(set, p.out_channels);
    if (native.run) return body(Plan<BFloat16, BFloat16, float>(p, native));
  }
  const auto single = float_kernel(set, p.out_channels);
  switch (p.dtype) {
    case ScalarType::kFloat32:
      return body(Plan<float, float, float>(p, single));
    case ScalarType::kFloat64:
      return body(Plan<double, double, double>(p, double_kernel()));
    case ScalarType::kFloat16:
      return body(Plan<Half, float, float>(p, single));
    case ScalarType::kBFloat16:
      return body(Plan<BFloat16, float, float>(p, single));
  }
}

template <typename T, typename C, typename A>
int64_t packed_bytes(const HoleConvParams& p, const Plan<T, C, A>& plan) {
  return plan.panels(p) * plan.panel_size(p) * sizeof(C);
}

template <typename T, typename C, typename A>
void convolve(const HoleConvParams& p, const Plan<T, C, A>& plan, int64_t begin, int64_t end) {
  WindowConv<T, C, A>(p, plan).run(begin, end);
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

int64_t packed_weight_bytes(const HoleConvParams& params) {
  int64_t bytes = 0;
  with_plan(params, [&](const auto& plan) { bytes = packed_bytes(params, plan); });
  return bytes;
}

int64_t weight_panels(const HoleConvParams& params) {
  int64_t count = 0;
  with_plan(params, [&](const auto& plan) { count = plan.panels(params); });
  return count;
}

void pack_weight_cpu(const HoleConvParams& params, int64_t begin, int64_t end) {
  with_plan(params, [&](const auto& plan) { pack(params, plan, begin, end); });
}

void hole_conv_cpu(const HoleConvParams& params, int64_t begin, int64_t end) {
  with_plan(params, [&](const auto& plan) { convolve(params, plan, begin, end); });
}

}  // namespace glance
