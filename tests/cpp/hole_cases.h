// Random geometry of holes for the C++ tests, and the equations of hole_windows.h written out for
// one cell at a time, in double.
#pragma once

#include <algorithm>
#include <sstream>
#include <string>
#include <vector>

#include "check.h"
#include "hole_windows/hole_windows.h"

namespace glance_test {

struct HoleSizes {
  int64_t batch, holes, channels, out_channels;
  bool own_geometry, windows;
  int64_t height, width, window_height, window_width;
  int64_t kernel_h, kernel_w, stride = 1, padding = 0, dilation = 1;
  int64_t out_height, out_width;
  double slope = 1;
  bool bias = true;
};

inline std::string name_of(const HoleSizes& s) {
  std::ostringstream text;
  text << "N" << s.batch << " P" << s.holes << (s.own_geometry ? " of their own" : "") << " C"
       << s.channels << " K" << s.out_channels << " " << s.height << "x" << s.width
       << (s.windows ? " windows " : " no windows ") << s.window_height << "x" << s.window_width
       << " kernel " << s.kernel_h << "x" << s.kernel_w << " stride " << s.stride << " padding "
       << s.padding << " dilation " << s.dilation << " out " << s.out_height << "x" << s.out_width;
  return text.str();
}

inline HoleSizes random_sizes(Random& random) {
  const int64_t channels[] = {1, 3, 4, 5, 8, 12, 16, 24, 40};
  const int64_t columns[] = {1, 3, 16, 17, 32, 33, 64, 72, 130};
  const double slopes[] = {0, 0.01, 1};
  HoleSizes s{};
  s.batch = 1 + random.below(3);
  s.holes = 1 + random.below(9);
  s.channels = channels[random.below(9)];
  s.out_channels = columns[random.below(9)];
  s.own_geometry = random.below(2);
  s.windows = random.below(3);
  s.height = 3 + random.below(9);
  s.width = 3 + random.below(9);
  s.window_height = 1 + random.below(6);
  s.window_width = 1 + random.below(6);
  s.kernel_h = 1 + random.below(4);
  s.kernel_w = 1 + random.below(4);
  s.stride = 1 + random.below(2);
  s.padding = random.below(3);
  s.dilation = 1 + random.below(2);
  s.out_height = 1 + random.below(6);
  s.out_width = 1 + random.below(6);
  s.slope = slopes[random.below(3)];
  s.bias = random.below(3);
  return s;
}

// Tensors of one call. Pixels of the base that holes hide, and parts of windows outside of the
// extent, are NaN: none may leak.
template <typename T>
struct HoleCase {
  using A = glance::accumulate_t<T>;
  HoleSizes sizes;
  glance::HoleConvParams conv;
  std::vector<int32_t> extents, origins, cells;
  std::vector<T> base, windows, weight, bias;
  std::vector<A> ratio;

  HoleCase(const HoleSizes& s, uint64_t seed) : sizes(s) {
    Random random(seed);
    const int64_t rows = s.own_geometry ? s.batch * s.holes : s.holes;
    for (int64_t g = 0; g < rows; ++g) {
      const int64_t most_h = std::min(s.height, s.window_height);
      const int64_t most_w = std::min(s.width, s.window_width);
      const int64_t h = random.below(most_h + 1), w = random.below(most_w + 1);
      for (int64_t value : {random.below(s.height - h + 1), random.below(s.width - w + 1), h, w}) {
        extents.push_back(static_cast<int32_t>(value));
      }
      for (int i = 0; i < 2; ++i) origins.push_back(static_cast<int32_t>(random.below(6)) - 2);
    }
    ratio.resize(rows * s.out_height * s.out_width);
    for (size_t i = 0; i < ratio.size(); ++i) {
      const bool empty_hole = rows > 1 && i < ratio.size() / rows;
      if (empty_hole || random.uniform(0, 1) < 0.2) continue;
      ratio[i] = static_cast<A>(random.uniform(0.5, 1.5));
      cells.push_back(static_cast<int32_t>(i));
    }
    base = random_values<T>(random, s.batch * s.height * s.width * s.channels);
    windows =
        random_values<T>(random, s.batch * s.holes * s.window_height * s.window_width * s.channels);
    weight = random_values<T>(random, s.out_channels * s.channels * s.kernel_h * s.kernel_w, -1, 1);
    bias = random_values<T>(random, s.out_channels);

    glance::HoleConvParams& p = conv;
    p.dtype = Type<T>::kDtype;
    p.batch = s.batch;
    p.holes = s.holes;
    p.geometry_rows = rows;
    p.channels = s.channels;
    p.height = s.height;
    p.width = s.width;
    p.window_height = s.windows ? s.window_height : 0;
    p.window_width = s.windows ? s.window_width : 0;
    p.out_channels = s.out_channels;
    p.out_height = s.out_height;
    p.out_width = s.out_width;
    p.kernel[0] = s.kernel_h;
    p.kernel[1] = s.kernel_w;
    for (int axis = 0; axis < 2; ++axis) {
      p.stride[axis] = s.stride;
      p.padding[axis] = s.padding;
      p.dilation[axis] = s.dilation;
    }
    p.negative_slope = s.slope;
    p.cell_count = cells.size();
    hide();
    p.extents = extents.data();
    p.origins = origins.data();
    p.cells = cells.data();
    p.ratio = ratio.data();
    p.base = base.data();
    p.windows = s.windows ? windows.data() : nullptr;
    p.weight = weight.data();
    p.bias = s.bias ? bias.data() : nullptr;
  }
  HoleCase(const HoleCase&) = delete;

  int64_t window_count() const { return sizes.batch * sizes.holes; }
  int64_t geometry(int64_t b) const { return sizes.own_geometry ? b : b % sizes.holes; }
  const int32_t* extent(int64_t b) const { return extents.data() + geometry(b) * 4; }
  bool covers(int64_t b, int64_t y, int64_t x) const {
    const int32_t* e = extent(b);
    return y >= e[0] && y < e[0] + e[2] && x >= e[1] && x < e[1] + e[3];
  }

  // Element c of pixel (y, x) as hole b sees it.
  double input(int64_t b, int64_t y, int64_t x, int64_t c, double outside = 0) const {
    const HoleSizes& s = sizes;
    if (y < 0 || y >= s.height || x < 0 || x >= s.width) return outside;
    if (!covers(b, y, x)) {
      const int64_t n = b / s.holes;
      return glance::widen(base[((n * s.height + y) * s.width + x) * s.channels + c]);
    }
    if (!s.windows) return 0;
    const int64_t in_y = y - extent(b)[0], in_x = x - extent(b)[1];
    return glance::widen(
        windows[((b * s.window_height + in_y) * s.window_width + in_x) * s.channels + c]);
  }

  struct Sum {
    double value = 0, magnitude = 0;
  };

  // Output k of cell (i, j) of window b, and what its rounding errors are relative to.
  Sum output(int64_t b, int64_t i, int64_t j, int64_t k) const {
    const HoleSizes& s = sizes;
    const int64_t g = geometry(b);
    const double r = ratio[(g * s.out_height + i) * s.out_width + j];
    Sum sum;
    if (r == 0) return sum;
    for (int64_t ty = 0; ty < s.kernel_h; ++ty) {
      for (int64_t tx = 0; tx < s.kernel_w; ++tx) {
        const int64_t y = (origins[g * 2] + i) * s.stride - s.padding + s.dilation * ty;
        const int64_t x = (origins[g * 2 + 1] + j) * s.stride - s.padding + s.dilation * tx;
        for (int64_t c = 0; c < s.channels; ++c) {
          const double product =
              input(b, y, x, c) *
              glance::widen(weight[((k * s.channels + c) * s.kernel_h + ty) * s.kernel_w + tx]);
          sum.value += product;
          sum.magnitude += std::abs(product);
        }
      }
    }
    const double add = s.bias ? glance::widen(bias[k]) : 0;
    sum.value = sum.value * r + add;
    sum.magnitude = sum.magnitude * r + std::abs(add);
    if (sum.value < 0) sum.value *= s.slope;
    return sum;
  }

 private:
  void hide() {
    const HoleSizes& s = sizes;
    const T nan = glance::narrow<T>(static_cast<A>(NAN));
    for (int64_t n = 0; n < s.batch; ++n) {
      for (int64_t y = 0; y < s.height; ++y) {
        for (int64_t x = 0; x < s.width; ++x) {
          bool hidden = true;
          for (int64_t b = n * s.holes; b < (n + 1) * s.holes; ++b) {
            hidden = hidden && covers(b, y, x);
          }
          if (!hidden) continue;
          std::fill_n(base.data() + ((n * s.height + y) * s.width + x) * s.channels, s.channels,
                      nan);
        }
      }
    }
    for (int64_t b = 0; b < window_count(); ++b) {
      for (int64_t y = 0; y < s.window_height; ++y) {
        for (int64_t x = 0; x < s.window_width; ++x) {
          if (y < extent(b)[2] && x < extent(b)[3]) continue;
          const int64_t at = (b * s.window_height + y) * s.window_width + x;
          std::fill_n(windows.data() + at * s.channels, s.channels, nan);
        }
      }
    }
  }
};

// Runs `kernel` over [0, rows) in pieces of odd sizes, last piece first.
template <typename Kernel, typename Params>
void run_in_pieces(Kernel kernel, const Params& p, int64_t rows) {
  for (int64_t end = rows, step = 1; end > 0; end -= step, step = step % 3 + 1) {
    kernel(p, std::max<int64_t>(0, end - step), end);
  }
}

}  // namespace glance_test
