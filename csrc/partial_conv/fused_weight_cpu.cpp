// The fused path's gradients of weight and bias. A step takes a few images (or rows of one) into
// memory of a cache's size: their input, masked, and of their gradient the windows that are not
// empty, scaled. A term
// is one tap and channel of a weight, summed over those windows.
#include <algorithm>
#include <cstring>
#include <vector>

#include "common/workspace.h"
#include "hole_windows/outer_products.h"
#include "partial_conv/depthwise_loops.h"
#include "partial_conv/partial_conv.h"
#include "partial_conv/tile_rows.h"

namespace glance {
namespace {

constexpr int64_t kStepBytes = 2 * 1024 * 1024;
constexpr int64_t kPanels = 8;  // at the least, to share them among threads whole
constexpr int64_t kManyGroups = 8;
constexpr int64_t kShares = 64;  // of what comes before the products: each has some of everything

template <typename T>
class WeightGradient {
  using A = float;

  struct Slab {
    int64_t image, top, height;  // rows of windows
  };

 public:
  WeightGradient(const PartialConvBackwardParams& p, const ParallelFor& parallel)
      : p_(p),
        parallel_(parallel),
        in_(p.in_channels / p.groups),
        out_(p.out_channels / p.groups),
        whole_rows_(p.dilation[1] == 1),
        width_((p.out_width - 1) * p.stride[1] + (p.kernel[1] - 1) * p.dilation[1] + 1),
        products_((whole_rows_ ? p.kernel[1] : 1) * in_, run_offsets(), out_),
        input_{static_cast<const T*>(p.input), p.in_channels, p.in_height, p.in_width,
               p.channels_last},
        grad_{static_cast<const T*>(p.grad_output), p.out_channels, p.out_height, p.out_width,
              p.channels_last},
        result_{static_cast<const T*>(p.result), p.out_channels, p.out_height, p.out_width,
                p.channels_last},
        loops_(depthwise_loops()),
        slab_height_(slab_height()),
        slabs_(std::clamp<int64_t>(kStepBytes / slab_bytes(slab_height_), 1, all_slabs())),
        one_step_(slabs_ >= all_slabs() && products_.panels() >= kPanels),
        source_(slabs_ * slab_rows(slab_height_) * width_ * in_),
        scaled_(windows() * products_.pitch()),
        ratio_(windows()),
        places_(windows()) {}

  void run(int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      sums_.assign(p_.grad_weight && !one_step_ ? products_.shared_sums() : 0, 0);
      bias_.assign(out_, 0);
      step_.clear();
      for (int64_t n = 0; n < p_.batch; ++n) {
        for (int64_t y = 0; y < p_.out_height; y += slab_height_) {
          step_.push_back({n, y, std::min(slab_height_, p_.out_height - y)});
          if (int64_t(step_.size()) == slabs_) take_step(group);
        }
      }
      take_step(group);
      store(group);
    }
  }

 private:
  // Of each run from a window's place.
  std::vector<int64_t> run_offsets() const {
    std::vector<int64_t> offsets;
    for (int64_t y = 0; y < p_.kernel[0]; ++y) {
      for (int64_t x = 0; x < (whole_rows_ ? 1 : p_.kernel[1]); ++x) {
        offsets.push_back((y * p_.dilation[0] * width_ + x * p_.dilation[1]) * in_);
      }
    }
    return offsets;
  }

  // How many rows of windows of an image are one slab, how many slabs there are in all, and how
  // many windows a step has at the most.
  int64_t slab_height() const {
    int64_t rows = p_.out_height;
    while (rows > 1 && slab_bytes(rows) > kStepBytes) rows = (rows + 1) / 2;
    return rows;
  }
  int64_t all_slabs() const {
    const int64_t of_image = (p_.out_height + slab_height_ - 1) / slab_height_;
    return std::max<int64_t>(1, of_image * p_.batch);
  }
  int64_t windows() const { return slabs_ * slab_height_ * p_.out_width; }

  int64_t slab_rows(int64_t rows) const {
    return (rows - 1) * p_.stride[0] + (p_.kernel[0] - 1) * p_.dilation[0] + 1;
  }
  int64_t slab_bytes(int64_t rows) const {
    return (slab_rows(rows) * width_ * in_ + rows * p_.out_width * products_.pitch()) *
           int64_t(sizeof(A));
  }

  void take_step(int64_t group) {
    if (step_.empty()) return;
    const int64_t rows = step_.size() * slab_height_;
    const int64_t source_rows = step_.size() * slab_rows(slab_height_);
    firsts_.assign(rows + 1, 0);
    parallel_(rows, [&](int64_t begin, int64_t end) { count_windows(group, begin, end); });
    for (int64_t row = 0; row < rows; ++row) firsts_[row + 1] += firsts_[row];
    bias_rows_.assign(rows * pitch(), 0);
    const int64_t loaded = p_.grad_weight ? source_rows : 0;
    parallel_(kShares, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin * loaded / kShares; row < end * loaded / kShares; ++row) {
        load_input(group, row);
      }
      scale_gradients(group, begin * rows / kShares, end * rows / kShares);
    });
    for (int64_t row = 0; p_.grad_bias && row < rows; ++row) {
      for (int64_t k = 0; k < out_; ++k) bias_[k] += bias_rows_[row * pitch() + k];
    }
    const OuterProducts::Windows all{source_.data(), places_.data(), scaled_.data(), ratio_.size()};
    if (p_.grad_weight && one_step_) {
      parallel_(products_.panels(), [&](int64_t begin, int64_t end) {
        const Workspace<A> sums(products_.panel_sums());
        for (int64_t panel = begin; panel < end; ++panel) {
          std::fill_n(sums.data(), sums.size(), A{0});
          products_.add(all, panel, 0, products_.blocks(), 0, firsts_[rows], sums.data());
          store_rows(group, panel, 0, stored_rows(), sums.data());
        }
      });
    } else if (p_.grad_weight) {
      products_.add_in_shares(all, firsts_[rows], sums_.data(), parallel_);
    }
    step_.clear();
  }

  // Ratios of rows of windows, and how many of each are not empty.
  void count_windows(int64_t group, int64_t begin, int64_t end) {
    WindowCounts counts(p_);
    for (int64_t row = begin; row < end; ++row) {
      const Slab& slab = step_[row / slab_height_];
      const int64_t y = row % slab_height_;
      if (y >= slab.height) continue;
      A* ratio = ratio_.data() + row * p_.out_width;
      counts.ratios(counts.row(p_.mask_batch == 1 ? 0 : slab.image,
                               p_.ratio_groups() == 1 ? 0 : group, slab.top + y),
                    0, p_.out_width, ratio);
      firsts_[row + 1] = std::count_if(ratio, ratio + p_.out_width, [](A r) { return r > 0; });
    }
  }

  void load_input(int64_t group, int64_t row) {
    const int64_t slab_size = slab_rows(slab_height_);
    const Slab& slab = step_[row / slab_size];
    const int64_t y = slab.top * p_.stride[0] - p_.padding[0] + row % slab_size;
    A* to = source_.data() + row * width_ * in_;
    const int64_t from = std::min(p_.padding[1], width_);
    const int64_t count =
        y < 0 || y >= p_.in_height ? 0 : std::clamp<int64_t>(p_.in_width, 0, width_ - from);
    if (count <= 0) {
      std::fill(to, to + width_ * in_, A{0});
      return;
    }
    std::fill(to, to + from * in_, A{0});
    std::fill(to + (from + count) * in_, to + width_ * in_, A{0});
    const PixelRow pixels{slab.image, y, 0, count, group * in_, in_};
    copy_pixels(input_, pixels, in_, to + from * in_);
    mask_pixels(p_, pixels, in_, to + from * in_);
  }

  void scale_gradients(int64_t group, int64_t begin, int64_t end) {
    const int64_t width = p_.out_width;
    const Workspace<A> row_of_grad(width * pitch()), result(p_.result ? width * pitch() : 0);
    for (int64_t row = begin; row < end; ++row) {
      const Slab& slab = step_[row / slab_height_];
      const int64_t y = row % slab_height_;
      const int64_t first = firsts_[row], count = firsts_[row + 1] - first;
      if (count == 0) continue;
      const PixelRow pixels{slab.image, slab.top + y, 0, width, group * out_, out_};
      // Where they are wanted, if all windows of the row are and one panel has all columns.
      const bool in_place = count == width && products_.panels() == 1;
      A* grad = in_place ? scaled_.data() + first * pitch() : row_of_grad.data();
      copy_pixels(grad_, pixels, pitch(), grad);
      if (p_.result) copy_pixels(result_, pixels, pitch(), result.data());
      const A* ratio = ratio_.data() + row * width;
      const Finish finish{ratio, /*by_channel=*/false, nullptr, float(p_.negative_slope)};
      loops_.scale(finish, width, pitch(), p_.result ? result.data() : nullptr, grad,
                   bias_rows_.data() + row * pitch());
      list_windows(row, ratio);
      if (!in_place) keep_windows(grad, ratio, first);
    }
  }

  // Where the windows of a row that are not empty stand in source_.
  void list_windows(int64_t row, const A* ratio) {
    const int64_t y = row % slab_height_ * p_.stride[0];
    const int64_t start = (row / slab_height_ * slab_rows(slab_height_) + y) * width_;
    int64_t window = firsts_[row];
    for (int64_t x = 0; x < p_.out_width; ++x) {
      if (ratio[x] != 0) places_[window++] = (start + x * p_.stride[1]) * in_;
    }
  }

  // Their gradients, panel by panel.
  void keep_windows(const A* grad, const A* ratio, int64_t first) {
    const int64_t columns = products_.columns();
    for (int64_t panel = 0; panel < products_.panels(); ++panel) {
      A* to = scaled_.data() + (panel * ratio_.size() + first) * columns;
      for (int64_t x = 0; x < p_.out_width; ++x) {
        if (ratio[x] == 0) continue;
        std::memcpy(to, grad + x * pitch() + panel * columns, columns * sizeof(A));
        to += columns;
      }
    }
  }

  int64_t pitch() const { return products_.pitch(); }

  void store(int64_t group) {
    T* grad_bias = static_cast<T*>(p_.grad_bias);
    for (int64_t k = 0; grad_bias && k < out_; ++k) {
      grad_bias[group * out_ + k] = narrow<T>(static_cast<A>(bias_[k]));
    }
    if (!p_.grad_weight || (one_step_ && p_.batch > 0)) return;
    products_.fold_shares(sums_.data());
    parallel_(products_.panels() * stored_rows(), [&](int64_t begin, int64_t end) {
      OuterProducts::in_parts(
          stored_rows(), begin, end, [&](int64_t panel, int64_t first, int64_t last) {
            store_rows(group, panel, first, last, sums_.data() + panel * products_.panel_sums());
          });
    });
  }

  // A row of the gradient's memory is either the taps of a channel or the channels of a tap.
  bool channels_first() const { return p_.weight_strides[1] == 1 && in_ > 1; }
  int64_t stored_rows() const { return channels_first() ? p_.kernel[0] * p_.kernel[1] : in_; }

  void store_rows(int64_t group, int64_t panel, int64_t begin, int64_t end, const A* sums) const {
    const int64_t columns = products_.columns();
    const int64_t first = panel * columns, width = std::min(columns, out_ - first);
    const int64_t length = channels_first() ? in_ : p_.kernel[0] * p_.kernel[1];
    T* to = static_cast<T*>(p_.grad_weight) + (group * out_ + first) * p_.weight_strides[0];
    std::vector<A> window(length * columns);
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t i = 0; i < length; ++i) {
        const A* sum = sums + (channels_first() ? place_of(row, i) : place_of(i, row));
        std::copy_n(sum, columns, window.data() + i * columns);
      }
      const auto place = [&](int64_t i) {
        const int64_t c = channels_first() ? i : row, tap = channels_first() ? row : i;
        return c * p_.weight_strides[1] + tap / p_.kernel[1] * p_.weight_strides[2] +
               tap % p_.kernel[1] * p_.weight_strides[3];
      };
      if constexpr (std::is_same_v<T, A>) {
        if (place(length - 1) - place(0) == length - 1) {
          transpose(window.data(), columns, length, width, to + place(0), p_.weight_strides[0]);
          continue;
        }
      }
      for (int64_t i = 0; i < length; ++i) {
        for (int64_t k = 0; k < width; ++k) {
          to[k * p_.weight_strides[0] + place(i)] = narrow<T>(window[i * columns + k]);
        }
      }
    }
  }

  // Where a panel's sums have those of one tap and channel, a value for each column.
  int64_t place_of(int64_t tap, int64_t c) const {
    if (!whole_rows_) return products_.place_of(tap, c);
    return products_.place_of(tap / p_.kernel[1], tap % p_.kernel[1] * in_ + c);
  }

  const PartialConvBackwardParams& p_;
  const ParallelFor& parallel_;
  int64_t in_, out_;  // channels of one group
  bool whole_rows_;   // neighbouring taps are neighbours in memory, and so one run
  int64_t width_;     // pixels of a row of the input with what padding the windows see
  OuterProducts products_;
  FeatureMap<T> input_, grad_, result_;
  const DepthwiseLoops& loops_;
  int64_t slab_height_, slabs_;
  bool one_step_;  // for all windows, so that a panel's sums are held only until they are stored
  Workspace<A> source_, scaled_, ratio_;
  Workspace<int64_t> places_;  // of each window that is not empty, in source_
  std::vector<Slab> step_;
  std::vector<A> sums_, bias_rows_;
  std::vector<double> bias_;
  std::vector<int64_t> firsts_;  // of each row of windows, among those that are not empty
};

// Threads share the work of a group, or the groups if there are many: a result is the same.
template <typename T>
void weight_gradient(const PartialConvBackwardParams& p, const ParallelFor& parallel) {
  if (p.groups < kManyGroups) return WeightGradient<T>(p, parallel).run(0, p.groups);
  const ParallelFor alone = [](int64_t count, const std::function<void(int64_t, int64_t)>& body) {
    if (count > 0) body(0, count);
  };
  parallel(p.groups,
           [&](int64_t begin, int64_t end) { WeightGradient<T>(p, alone).run(begin, end); });
}

}  // namespace

void fused_grad_weight_cpu(const PartialConvBackwardParams& params, const ParallelFor& parallel) {
  switch (params.dtype) {
    case ScalarType::kFloat32:
      return weight_gradient<float>(params, parallel);
    case ScalarType::kFloat16:
      return weight_gradient<Half>(params, parallel);
    case ScalarType::kBFloat16:
      return weight_gradient<BFloat16>(params, parallel);
    case ScalarType::kFloat64:
      return;
  }
}

}  // namespace glance
