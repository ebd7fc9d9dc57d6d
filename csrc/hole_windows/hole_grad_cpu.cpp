// The gradients of hole_conv2d on a CPU: products over the cells that a hole reaches, and no
// others. A step takes as many windows as fit a cache: their input, and of the output's gradient
// the cells, behind the activation and scaled.
#include <algorithm>
#include <vector>

#include "common/micro_kernel.h"
#include "common/simd_target.h"
#include "common/transpose.h"
#include "common/workspace.h"
#include "hole_windows/composed_input.h"
#include "hole_windows/hole_windows.h"
#include "hole_windows/outer_products.h"

namespace glance {
namespace {

constexpr int64_t kStepBytes = 4 * 1024 * 1024;
constexpr int64_t kLeastWindows = 16;        // of a step, whatever their size: threads share them
constexpr int64_t kGroupBytes = 128 * 1024;  // of the cells whose products with a panel are one go
constexpr int64_t kTileBytes = 256 * 1024;   // of the tiles that these are added to

// Which cells of each window the holes reach: those whose ratio is not 0.
struct Cells {
  std::vector<int32_t> flat;
  std::vector<int64_t> firsts;  // of each row of the geometry

  explicit Cells(const HoleConvParams& p) {
    const float* ratio = static_cast<const float*>(p.ratio);
    const int64_t size = p.out_height * p.out_width;
    firsts.reserve(p.geometry_rows + 1);
    for (int64_t g = 0; g < p.geometry_rows; ++g) {
      firsts.push_back(flat.size());
      for (int64_t at = 0; at < size; ++at) {
        if (ratio[g * size + at] != 0) flat.push_back(static_cast<int32_t>(at));
      }
    }
    firsts.push_back(flat.size());
  }

  int64_t count(int64_t g) const { return firsts[g + 1] - firsts[g]; }
};

template <typename T>
class HoleGradient {
  using A = float;

 public:
  HoleGradient(const HoleConvBackwardParams& p, const ParallelFor& parallel)
      : p_(p),
        parallel_(parallel),
        cells_(p),
        whole_rows_(p.dilation[1] == 1),
        tile_height_((p.out_height - 1) * p.stride[0] + (p.kernel[0] - 1) * p.dilation[0] + 1),
        tile_width_((p.out_width - 1) * p.stride[1] + (p.kernel[1] - 1) * p.dilation[1] + 1),
        run_((whole_rows_ ? p.kernel[1] : 1) * p.channels),
        runs_(p.kernel[0] * (whole_rows_ ? 1 : p.kernel[1])),
        products_(run_, run_offsets(), p.out_channels),
        kernel_(float_kernel(best_instruction_set(), run_)),
        panels_((run_ + kernel_.columns - 1) / kernel_.columns),
        step_windows_(std::min(p.window_count(), step_windows())),
        source_(p.grad_weight ? step_windows_ * tile_size() : 0),
        scaled_(p.grad_weight ? step_windows_ * window_cells() * products_.pitch() : 0),
        places_(p.grad_weight ? step_windows_ * window_cells() : 0),
        packed_(p.grad_tiles ? runs_ * panels_ * p.out_channels * kernel_.columns : 0),
        sums_(p.grad_weight ? products_.shared_sums() : 0),
        bias_(p.out_channels) {}

  void run() {
    std::fill_n(sums_.data(), sums_.size(), A{0});
    if (p_.grad_tiles) {
      parallel_(runs_ * panels_, [&](int64_t begin, int64_t end) { pack(begin, end); });
    }
    for (int64_t first = 0; first < p_.window_count(); first += step_windows_) {
      take_step(first, std::min(step_windows_, p_.window_count() - first));
    }
    store();
  }

 private:
  int64_t window_cells() const { return p_.out_height * p_.out_width; }
  int64_t tile_size() const { return tile_height_ * tile_width_ * p_.channels; }
  int64_t step_windows() const {
    const int64_t bytes = (tile_size() + window_cells() * products_.pitch()) * int64_t(sizeof(A));
    return std::max(kLeastWindows, kStepBytes / bytes);
  }

  // Of each run of neighbours from a window's place in its tile.
  std::vector<int64_t> run_offsets() const {
    std::vector<int64_t> offsets;
    for (int64_t y = 0; y < p_.kernel[0]; ++y) {
      for (int64_t x = 0; x < (whole_rows_ ? 1 : p_.kernel[1]); ++x) {
        offsets.push_back((y * p_.dilation[0] * tile_width_ + x * p_.dilation[1]) * p_.channels);
      }
    }
    return offsets;
  }

  int64_t place(int32_t cell) const {
    const int64_t y = cell / p_.out_width, x = cell % p_.out_width;
    return (y * p_.stride[0] * tile_width_ + x * p_.stride[1]) * p_.channels;
  }

  // The weight for the input's gradient: for each run its values as columns, a row for each k.
  void pack(int64_t begin, int64_t end) {
    const T* weight = static_cast<const T*>(p_.weight);
    const int64_t taps = p_.kernel[0] * p_.kernel[1];
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t run = panel / panels_, first = panel % panels_ * kernel_.columns;
      const int64_t last = std::min(run_, first + kernel_.columns);
      const int64_t first_tap = run * (whole_rows_ ? p_.kernel[1] : 1) + first / p_.channels;
      A* to = packed_.data() + panel * p_.out_channels * kernel_.columns;
      for (int64_t k = 0; k < p_.out_channels; ++k, to += kernel_.columns) {
        const T* of_k = weight + k * p_.channels * taps + first_tap;
        int64_t c = first % p_.channels;
        for (int64_t n = first; n < last; ++n) {
          to[n - first] = widen(of_k[c * taps]);
          if (++c == p_.channels) c = 0, ++of_k;
        }
        std::fill(to + (last - first), to + kernel_.columns, A{0});
      }
    }
  }

  void take_step(int64_t first, int64_t count) {
    firsts_.assign(1, 0);
    for (int64_t w = 0; w < count; ++w) {
      firsts_.push_back(firsts_.back() + cells_.count((first + w) % p_.geometry_rows));
    }
    bias_rows_.assign(count * p_.out_channels, 0);
    parallel_(count, [&](int64_t begin, int64_t end) {
      const int64_t most_cells = kGroupBytes / (p_.out_channels * int64_t(sizeof(A)));
      const int64_t most_windows = kTileBytes / (tile_size() * int64_t(sizeof(A)));
      while (begin < end) {
        int64_t until = begin + 1;
        while (until < end && until - begin < most_windows &&
               firsts_[until + 1] - firsts_[begin] <= most_cells) {
          ++until;
        }
        take_group(first, begin, until);
        begin = until;
      }
    });
    for (size_t i = 0; i < bias_rows_.size(); ++i) bias_[i % p_.out_channels] += bias_rows_[i];
    if (p_.grad_weight) {
      products_.add_in_shares(
          {source_.data(), places_.data(), scaled_.data(), step_windows_ * window_cells()},
          firsts_[count], sums_.data(), parallel_);
    }
  }

  // Windows [begin, end) of a step: everything but the weight's products.
  void take_group(int64_t first, int64_t begin, int64_t end) {
    const int64_t count = firsts_[end] - firsts_[begin], k = p_.out_channels;
    const int64_t padded = (count + kernel_.rows - 1) / kernel_.rows * kernel_.rows;
    const Workspace<A> grads(padded * k);  // (cells, K)
    for (int64_t w = begin; w < end; ++w) {
      A* rows = grads.data() + (firsts_[w] - firsts_[begin]) * k;
      load_gradients(first + w, w, rows);
      if (p_.grad_weight) keep(first + w, w, rows);
    }
    if (!p_.grad_tiles) return;
    std::fill(grads.data() + count * k, grads.data() + padded * k, A{0});
    const bool direct = std::is_same_v<T, A>;
    const Workspace<A> scratch(direct ? 0 : (end - begin) * tile_size());
    T* result = static_cast<T*>(p_.grad_tiles) + (first + begin) * tile_size();
    A* tiles = scratch.data();
    if constexpr (std::is_same_v<T, A>) tiles = result;
    std::fill_n(tiles, (end - begin) * tile_size(), A{0});
    add_products(first, begin, end, grads.data(), padded, tiles);
    if constexpr (!std::is_same_v<T, A>) {
      std::transform(tiles, tiles + scratch.size(), result,
                     [](A value) { return narrow<T>(value); });
    }
  }

  // The cells' gradients, behind the activation and scaled; and the bias's before they are.
  void load_gradients(int64_t window, int64_t in_step, A* rows) {
    const int64_t k = p_.out_channels, g = window % p_.geometry_rows;
    const T* grads = static_cast<const T*>(p_.grad_output) + window * window_cells() * k;
    const T* results = static_cast<const T*>(p_.result);
    if (results) results += window * window_cells() * k;
    const A* ratios = static_cast<const A*>(p_.ratio) + g * window_cells();
    const A slope = A(p_.negative_slope);
    A* GLANCE_RESTRICT bias = bias_rows_.data() + in_step * k;
    for (int64_t i = cells_.firsts[g]; i < cells_.firsts[g + 1]; ++i) {
      const int64_t cell = cells_.flat[i];
      A* GLANCE_RESTRICT row = rows + (i - cells_.firsts[g]) * k;
      const auto take = [&](int64_t n, A grad) {
        bias[n] += grad;
        row[n] = grad * ratios[cell];
      };
      if (results) {
        for (int64_t n = 0; n < k; ++n) {
          const A grad = widen(grads[cell * k + n]);
          take(n, widen(results[cell * k + n]) > 0 ? grad : grad * slope);
        }
      } else {
        for (int64_t n = 0; n < k; ++n) take(n, widen(grads[cell * k + n]));
      }
    }
  }

  // What the weight's products read of a window: its input, and its cells' gradients in panels.
  void keep(int64_t window, int64_t in_step, const A* rows) {
    const int64_t g = window % p_.geometry_rows;
    A* tile = source_.data() + in_step * tile_size();
    int64_t to = firsts_[in_step];
    for (int64_t i = cells_.firsts[g]; i < cells_.firsts[g + 1]; ++i, ++to) {
      places_[to] = tile - source_.data() + place(cells_.flat[i]);
      for (int64_t panel = 0; panel < products_.panels(); ++panel) {
        const int64_t n = panel * products_.columns();
        const int64_t width = std::min(products_.columns(), p_.out_channels - n);
        A* row =
            scaled_.data() + (panel * step_windows_ * window_cells() + to) * products_.columns();
        std::fill(std::copy_n(rows + n, width, row), row + products_.columns(), A{0});
      }
      rows += p_.out_channels;
    }
    if (cells_.count(g) == 0) return;
    const Composed<T> from = composed_input<T>(p_, window);
    const int32_t* origin = p_.origins + g * 2;
    const int64_t top = origin[0] * p_.stride[0] - p_.padding[0];
    const int64_t left = origin[1] * p_.stride[1] - p_.padding[1];
    for (int64_t y = 0; y < tile_height_; ++y) {
      copy_row(p_, from, top + y, left, tile_width_, A{0}, p_.channels,
               tile + y * tile_width_ * p_.channels);
    }
  }

  // Adds each cell's gradient times the weight to its window's tile.
  void add_products(int64_t first, int64_t begin, int64_t end, const A* grads, int64_t padded,
                    A* tiles) {
    const int64_t columns = kernel_.columns, k = p_.out_channels;
    std::vector<A*> windows;
    for (int64_t w = begin; w < end; ++w) {
      const int64_t g = (first + w) % p_.geometry_rows;
      for (int64_t i = cells_.firsts[g]; i < cells_.firsts[g + 1]; ++i) {
        windows.push_back(tiles + (w - begin) * tile_size() + place(cells_.flat[i]));
      }
    }
    const int64_t count = windows.size();
    const std::vector<A> ones(kernel_.rows, 1), zeros(columns, 0);
    std::vector<A> product(kernel_.rows * columns);
    std::vector<A*> targets;
    for (int64_t m = 0; m < kernel_.rows; ++m) targets.push_back(product.data() + m * columns);
    std::vector<const A*> strips(kernel_.rows / kernel_.strip);
    const std::vector<int64_t> offsets = run_offsets();
    const int64_t no_offset = 0;
    for (int64_t panel = 0; panel < runs_ * panels_; ++panel) {
      const int64_t n = panel % panels_ * columns, width = std::min(columns, run_ - n);
      const int64_t offset = offsets[panel / panels_] + n;
      const A* weight = packed_.data() + panel * k * columns;
      for (int64_t row = 0; row < padded; row += kernel_.rows) {
        for (size_t s = 0; s < strips.size(); ++s) {
          strips[s] = grads + (row + int64_t(s) * kernel_.strip) * k;
        }
        kernel_.run({strips.data(), k, &no_offset, 1, k, weight, ones.data(), zeros.data(), A{1},
                     targets.data(), columns});
        for (int64_t m = row; m < std::min(count, row + kernel_.rows); ++m) {
          A* to = windows[m] + offset;
          const A* from = targets[m - row];
          for (int64_t i = 0; i < width; ++i) to[i] += from[i];
        }
      }
    }
  }

  void store() {
    T* grad_bias = static_cast<T*>(p_.grad_bias);
    for (int64_t k = 0; grad_bias && k < p_.out_channels; ++k) {
      grad_bias[k] = narrow<T>(static_cast<A>(bias_[k]));
    }
    if (!p_.grad_weight) return;
    products_.fold_shares(sums_.data());
    parallel_(products_.panels() * runs_, [&](int64_t begin, int64_t end) {
      std::vector<A> block(run_ * products_.columns()), turned(block.size());
      for (int64_t i = begin; i < end; ++i) store_run(i / runs_, i % runs_, block, turned);
    });
  }

  // A run's sums of a panel, to (K, kh, kw, C).
  void store_run(int64_t panel, int64_t run, std::vector<A>& block, std::vector<A>& turned) {
    const int64_t columns = products_.columns(), k = panel * columns;
    const A* sums = sums_.data() + panel * products_.panel_sums();
    for (int64_t term = 0; term < run_; ++term) {
      std::copy_n(sums + products_.place_of(run, term), columns, block.data() + term * columns);
    }
    const int64_t width = std::min(columns, p_.out_channels - k);
    transpose(block.data(), columns, run_, width, turned.data(), run_);
    T* to = static_cast<T*>(p_.grad_weight) + (k * runs_ + run) * run_;
    for (int64_t n = 0; n < width; ++n, to += runs_ * run_) {
      const A* from = turned.data() + n * run_;
      std::transform(from, from + run_, to, [](A value) { return narrow<T>(value); });
    }
  }

  const HoleConvBackwardParams& p_;
  const ParallelFor& parallel_;
  const Cells cells_;
  bool whole_rows_;  // neighbouring taps are neighbours in memory, and so one run
  int64_t tile_height_, tile_width_;
  int64_t run_, runs_;
  OuterProducts products_;        // for the weight's gradient
  MicroKernel<A, A, A> kernel_;   // for the input's
  int64_t panels_;                // of a run's columns, of the latter
  int64_t step_windows_;          // at the most
  Workspace<A> source_, scaled_;  // of a step: tiles, and (panels, cells, columns)
  Workspace<int64_t> places_;     // of each cell in source_
  Workspace<A> packed_, sums_;
  std::vector<double> bias_;
  std::vector<A> bias_rows_;     // of each window
  std::vector<int64_t> firsts_;  // of each window of a step, among the cells
};

}  // namespace

void hole_conv_backward_cpu(const HoleConvBackwardParams& params, const ParallelFor& parallel) {
  switch (params.dtype) {
    case ScalarType::kFloat32:
      return HoleGradient<float>(params, parallel).run();
    case ScalarType::kFloat16:
      return HoleGradient<Half>(params, parallel).run();
    case ScalarType::kBFloat16:
      return HoleGradient<BFloat16>(params, parallel).run();
    case ScalarType::kFloat64:
      return;
  }
}

}  // namespace glance
