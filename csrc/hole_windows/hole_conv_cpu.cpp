#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "common/micro_kernel.h"
#include "hole_windows/composed_input.h"
#include "hole_windows/hole_windows.h"

namespace glance {
namespace {

constexpr int64_t kTileBytes = 256 * 1024;  // of the input tiles in flight: half of a small L2
constexpr int64_t kMostWindows = 64;        // whose cells share the micro-kernel's rows

// How a convolution is computed: what is stored as T is multiplied as C, added as A, and leaves the
// kernel as O.
template <typename T, typename C, typename A, typename O>
struct Plan {
  MicroKernel<C, A, O> kernel;
  int64_t pitch;       // elements of a pixel in a tile: C, padded to the kernel's depth
  int64_t tile_width;  // of the widest window
  std::vector<int64_t> runs;
  int64_t run_length;

  Plan(const HoleConvParams& p, MicroKernel<C, A, O> micro) : kernel(micro) {
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
  // Elements from a cell's pixels to its right neighbour's.
  int64_t strip_step(const HoleConvParams& p) const { return p.stride[1] * pitch; }
  int64_t tile_size(const HoleConvParams& p) const {
    const int64_t reach = (p.kernel[0] - 1) * p.dilation[0] + 1;
    return ((p.out_height - 1) * p.stride[0] + reach) * tile_width * pitch;
  }
};

template <typename T, typename C, typename A, typename O>
void pack(const HoleConvParams& p, const Plan<T, C, A, O>& plan, int64_t begin, int64_t end) {
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

template <typename T, typename C, typename A, typename O>
class WindowConv {
 public:
  WindowConv(const HoleConvParams& p, const Plan<T, C, A, O>& plan)
      : p_(p),
        plan_(plan),
        window_cells_(p.out_height * p.out_width),
        group_(std::clamp<int64_t>(kTileBytes / (plan.tile_size(p) * int64_t(sizeof(C))), 1,
                                   kMostWindows)),
        // Not cleared: a strip may reach beyond its last cell, but its results there go nowhere.
        tiles_(new C[group_ * plan.tile_size(p) + plan.strip_step(p) * plan.kernel.strip]),
        bias_(plan.panels(p) * plan.kernel.columns) {
    for (int64_t k = 0; p.bias && k < p.out_channels; ++k) {
      bias_[k] = widen(static_cast<const T*>(p.bias)[k]);
    }
    if (!kDirect) results_.resize(plan.kernel.rows * plan.kernel.columns);
  }

  void run(int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b += group_) {
      strips_.clear();
      ratio_.clear();
      outputs_.clear();
      const int64_t last = std::min(b + group_, end);
      for (int64_t i = b; i < last; ++i) load(i, tiles_.get() + (i - b) * plan_.tile_size(p_));
      multiply();
    }
  }

 private:
  static constexpr bool kDirect = std::is_same_v<T, O>;  // the kernel stores what is kept

  // Fills the tile of window b and lists its cells as rows of the product.
  void load(int64_t b, C* tile) {
    T* output =
        static_cast<T*>(p_.output) + (b - p_.first_output) * window_cells_ * p_.out_channels;
    const int64_t g = b % p_.geometry_rows;
    // The cells of a window follow those of the window before.
    const int32_t* all = p_.cells + p_.cell_count;
    const int32_t* cell =
        g == next_geometry_ ? next_cell_ : std::lower_bound(p_.cells, all, g * window_cells_);
    const int32_t* most = cell + std::min<int64_t>(window_cells_, all - cell);
    const int32_t* cells_end = std::lower_bound(cell, most, (g + 1) * window_cells_);
    next_geometry_ = g + 1;
    next_cell_ = cells_end;
    int64_t cleared = 0;  // cells before this one are computed or zero
    const auto clear_until = [&](int64_t at) {
      if (at > cleared) {
        std::fill(output + cleared * p_.out_channels, output + at * p_.out_channels, T{});
      }
      cleared = at + 1;
    };
    if (cell == cells_end) return clear_until(window_cells_);
    const int64_t first = (*cell - g * window_cells_) / p_.out_width;
    const int64_t final = (cells_end[-1] - g * window_cells_) / p_.out_width;
    int64_t y = first, row_begin = first * p_.out_width;
    int64_t columns = 0;  // how far to the right the window's cells go
    const A* ratio = static_cast<const A*>(p_.ratio);
    int64_t strip_left = 0, expected = -1;  // what the last strip still takes, and where from
    for (; cell < cells_end; ++cell) {
      const int64_t at = *cell - g * window_cells_;
      for (; at >= row_begin + p_.out_width; row_begin += p_.out_width) ++y;
      const int64_t x = at - row_begin;
      if (strip_left == 0 || at != expected || x == 0) {
        close_strip(strip_left);
        strips_.push_back(tile +
                          (y * p_.stride[0] * plan_.tile_width + x * p_.stride[1]) * plan_.pitch);
        strip_left = plan_.kernel.strip;
      }
      --strip_left;
      expected = at + 1;
      columns = std::max(columns, x + 1);
      ratio_.push_back(ratio[*cell]);
      outputs_.push_back(output + at * p_.out_channels);
      clear_until(at);
    }
    close_strip(strip_left);
    clear_until(window_cells_);
    const Composed<T> from = composed_input<T>(p_, b);
    const int32_t* origin = p_.origins + g * 2;
    const int64_t top = origin[0] * p_.stride[0] - p_.padding[0];
    const int64_t left = origin[1] * p_.stride[1] - p_.padding[1];
    const int64_t tile_end = final * p_.stride[0] + (p_.kernel[0] - 1) * p_.dilation[0] + 1;
    const int64_t width = (columns - 1) * p_.stride[1] + (p_.kernel[1] - 1) * p_.dilation[1] + 1;
    for (int64_t row = first * p_.stride[0]; row < tile_end; ++row) {
      copy_row(p_, from, top + row, left, width, C{}, plan_.pitch,
               tile + row * plan_.tile_width * plan_.pitch);
    }
  }

  // Rows whose results nobody wants, to fill up a strip.
  void close_strip(int64_t left) {
    for (; left > 0; --left) {
      ratio_.push_back(A{});
      outputs_.push_back(nullptr);
    }
  }

  void multiply() {
    if (strips_.empty()) return;
    const int64_t step = plan_.kernel.rows, strip = plan_.kernel.strip;
    const int64_t columns = plan_.kernel.columns;
    while (int64_t(outputs_.size()) % step != 0) {  // the last strip again
      strips_.push_back(strips_.back());
      close_strip(strip);
    }
    const int64_t count = outputs_.size();
    const C* packed = static_cast<const C*>(p_.packed);
    std::vector<O*> targets(step);
    for (int64_t panel = 0; panel < plan_.panels(p_); ++panel) {
      const int64_t k = panel * columns, width = std::min(columns, p_.out_channels - k);
      for (int64_t row = 0; row < count; row += step) {
        for (int64_t m = 0; m < step; ++m) {
          T* output = outputs_[row + m];
          if constexpr (kDirect) {
            targets[m] = output ? output + k : nullptr;
          } else {
            targets[m] = output ? results_.data() + m * columns : nullptr;
          }
        }
        plan_.kernel.run({strips_.data() + row / strip, plan_.strip_step(p_), plan_.runs.data(),
                          int64_t(plan_.runs.size()), plan_.run_length,
                          packed + panel * plan_.panel_size(p_), ratio_.data() + row,
                          bias_.data() + k, A(p_.negative_slope), targets.data(), width});
        if constexpr (!kDirect) {
          for (int64_t m = 0; m < step; ++m) {
            T* output = outputs_[row + m];
            for (int64_t n = 0; output && n < width; ++n) {
              output[k + n] = narrow<T>(targets[m][n]);
            }
          }
        }
      }
    }
  }

  const HoleConvParams& p_;
  const Plan<T, C, A, O>& plan_;
  int64_t window_cells_;
  int64_t group_;
  int64_t next_geometry_ = -1;  // whose first cell is next_cell_
  const int32_t* next_cell_ = nullptr;
  std::unique_ptr<C[]> tiles_;
  std::vector<A> bias_;
  std::vector<O> results_;
  std::vector<const C*> strips_;
  std::vector<A> ratio_;
  std::vector<T*> outputs_;
};

// Calls `body` with the plan for the dtype on this processor.
template <typename Body>
void with_plan(const HoleConvParams& p, Body&& body) {
  const InstructionSet set = best_instruction_set();
  if (p.dtype == ScalarType::kBFloat16) {
    const auto native = bfloat16_kernel(set, p.out_channels);
    if (native.run) return body(Plan<BFloat16, BFloat16, float, BFloat16>(p, native));
  }
  const auto single = float_kernel(set, p.out_channels);
  switch (p.dtype) {
    case ScalarType::kFloat32:
      return body(Plan<float, float, float, float>(p, single));
    case ScalarType::kFloat64:
      return body(Plan<double, double, double, double>(p, double_kernel()));
    case ScalarType::kFloat16:
      return body(Plan<Half, float, float, float>(p, single));
    case ScalarType::kBFloat16:
      return body(Plan<BFloat16, float, float, float>(p, single));
  }
}

template <typename T, typename C, typename A, typename O>
int64_t packed_bytes(const HoleConvParams& p, const Plan<T, C, A, O>& plan) {
  return plan.panels(p) * plan.panel_size(p) * sizeof(C);
}

template <typename T, typename C, typename A, typename O>
void convolve(const HoleConvParams& p, const Plan<T, C, A, O>& plan, int64_t begin, int64_t end) {
  WindowConv<T, C, A, O>(p, plan).run(begin, end);
}

}  // namespace

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

int64_t channel_padding(const HoleConvParams& params) {
  int64_t count = 0;
  with_plan(params, [&](const auto& plan) { count = plan.pitch - params.channels; });
  return count;
}

void pack_weight_cpu(const HoleConvParams& params, int64_t begin, int64_t end) {
  with_plan(params, [&](const auto& plan) { pack(params, plan, begin, end); });
}

void hole_conv_cpu(const HoleConvParams& params, int64_t begin, int64_t end) {
  with_plan(params, [&](const auto& plan) { convolve(params, plan, begin, end); });
}

}  // namespace glance
