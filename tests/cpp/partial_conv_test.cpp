// csrc/partial_conv: the CPU kernels against the equation of partial_conv.h, written out window by
// window, with a plain double-precision convolution of the masked input between them.
#include "partial_conv/partial_conv.h"

#include <algorithm>
#include <limits>
#include <sstream>
#include <vector>

#include "check.h"

using glance::accumulate_t;
using glance::narrow;
using glance::PartialConvBackwardParams;
using glance::PartialConvParams;
using glance::widen;
using glance_test::Random;
using glance_test::Type;

namespace {

struct Shape {
  int64_t batch, channels, height, width, out_channels, kernel_h, kernel_w;
  int64_t stride = 1, padding = 0, dilation = 1, groups = 1;
  int64_t mask_batch = 1;
  bool multi_channel = false;
  double valid = 0.6;  // the share of valid pixels
};

const Shape kShapes[] = {
    {2, 3, 7, 6, 4, 3, 3},
    {2, 4, 6, 9, 6, 3, 2, 2, 1, 1, 2, 2},
    {1, 4, 9, 8, 4, 3, 3, 1, 2, 2, 4},
    {3, 6, 5, 7, 4, 2, 3, 1, 1, 1, 2, 3, true},
    {2, 4, 8, 8, 4, 3, 3, 2, 3, 2, 4, 1, true},
    {2, 3, 8, 8, 5, 3, 3, 1, 1, 1, 1, 2, false, 0.05},  // mostly empty windows
    {1, 2, 5, 5, 2, 3, 3, 1, 1, 1, 1, 1, true, 0.0},    // nothing but empty windows
    {1, 2, 5, 5, 3, 5, 5, 1, 0, 1, 1, 1, false, 1.0},   // one window, all valid
    {2, 3, 1, 1, 2, 1, 1},
};

std::string name_of(const Shape& s, bool channels_last) {
  std::ostringstream text;
  text << "N" << s.batch << " C" << s.channels << " " << s.height << "x" << s.width << " K"
       << s.out_channels << " window " << s.kernel_h << "x" << s.kernel_w << " stride " << s.stride
       << " padding " << s.padding << " dilation " << s.dilation << " groups " << s.groups
       << (s.multi_channel ? " multi-channel" : "") << (channels_last ? " NHWC" : " NCHW");
  return text.str();
}

int64_t out_size(int64_t size, int64_t kernel, const Shape& s) {
  return (size + 2 * s.padding - s.dilation * (kernel - 1) - 1) / s.stride + 1;
}

PartialConvBackwardParams sizes_of(const Shape& s, bool channels_last) {
  PartialConvBackwardParams p;
  p.channels_last = channels_last;
  p.batch = s.batch;
  p.in_channels = s.channels;
  p.in_height = s.height;
  p.in_width = s.width;
  p.out_channels = s.out_channels;
  p.kernel[0] = s.kernel_h;
  p.kernel[1] = s.kernel_w;
  p.stride[0] = p.stride[1] = s.stride;
  p.padding[0] = p.padding[1] = s.padding;
  p.dilation[0] = p.dilation[1] = s.dilation;
  p.out_height = out_size(s.height, s.kernel_h, s);
  p.out_width = out_size(s.width, s.kernel_w, s);
  p.groups = s.groups;
  p.mask_batch = s.mask_batch;
  p.mask_channels = s.multi_channel ? s.channels : 1;
  return p;
}

int64_t feature(int64_t n, int64_t c, int64_t y, int64_t x, int64_t channels, int64_t height,
                int64_t width, bool channels_last) {
  return channels_last ? ((n * height + y) * width + x) * channels + c
                       : ((n * channels + c) * height + y) * width + x;
}

// Runs `kernel` over [0, rows) in pieces of odd sizes, last piece first.
template <typename Kernel>
void run_in_pieces(Kernel kernel, const PartialConvBackwardParams& p, int64_t rows) {
  for (int64_t end = rows, step = 1; end > 0; end -= step, step = step % 3 + 1) {
    kernel(p, std::max<int64_t>(0, end - step), end);
  }
}

// What the equation says for one output pixel, in double.
struct Window {
  double sum = 0;     // W * where(M, X, 0)
  int64_t count = 0;  // sum(M)
  int64_t full = 0;   // sum(1)
};

template <typename T>
Window window_at(const PartialConvParams& p, const std::vector<T>& input,
                 const std::vector<uint8_t>& mask, const std::vector<T>& weight, int64_t n,
                 int64_t k, int64_t oy, int64_t ox) {
  Window w;
  const int64_t group_size = p.in_channels / p.groups;
  const int64_t group = k / (p.out_channels / p.groups);
  for (int64_t c = 0; c < group_size; ++c) {
    const int64_t channel = group * group_size + c;
    for (int64_t i = 0; i < p.kernel[0]; ++i) {
      for (int64_t j = 0; j < p.kernel[1]; ++j) {
        const bool counts = p.mask_channels != 1 || c == 0;  // one channel stands for all
        w.full += counts;
        const int64_t y = oy * p.stride[0] - p.padding[0] + i * p.dilation[0];
        const int64_t x = ox * p.stride[1] - p.padding[1] + j * p.dilation[1];
        if (y < 0 || y >= p.in_height || x < 0 || x >= p.in_width) continue;
        const int64_t mask_n = p.mask_batch == 1 ? 0 : n;
        const int64_t mask_c = p.mask_channels == 1 ? 0 : channel;
        const int64_t at = ((mask_n * p.mask_channels + mask_c) * p.in_height + y) * p.in_width + x;
        if (!mask[at]) continue;
        w.count += counts;
        const int64_t in =
            feature(n, channel, y, x, p.in_channels, p.in_height, p.in_width, p.channels_last);
        w.sum += static_cast<double>(widen(input[in])) *
                 widen(weight[((k * group_size + c) * p.kernel[0] + i) * p.kernel[1] + j]);
      }
    }
  }
  return w;
}

// The plain convolution that the library does between the kernels: sums in double, stored as T.
template <typename T>
void convolve(const PartialConvParams& p, const std::vector<T>& masked,
              const std::vector<T>& weight, std::vector<T>& output) {
  PartialConvParams plain = p;
  plain.mask_batch = plain.mask_channels = 1;
  const std::vector<uint8_t> ones(p.in_height * p.in_width, 1);
  for (int64_t n = 0; n < p.batch; ++n)
    for (int64_t k = 0; k < p.out_channels; ++k)
      for (int64_t y = 0; y < p.out_height; ++y)
        for (int64_t x = 0; x < p.out_width; ++x)
          output[feature(n, k, y, x, p.out_channels, p.out_height, p.out_width, p.channels_last)] =
              narrow<T>(static_cast<accumulate_t<T>>(
                  window_at(plain, masked, ones, weight, n, k, y, x).sum));
}

template <typename T>
void check_shape(const Shape& shape, bool channels_last, bool with_bias, uint64_t seed) {
  using A = accumulate_t<T>;
  glance_test::context = name_of(shape, channels_last);
  Random random(seed);
  PartialConvBackwardParams p = sizes_of(shape, channels_last);
  p.dtype = Type<T>::kDtype;
  const int64_t in_count = p.batch * p.in_channels * p.in_height * p.in_width;
  const int64_t out_count = p.batch * p.out_channels * p.out_height * p.out_width;
  std::vector<uint8_t> mask(p.mask_batch * p.mask_channels * p.in_height * p.in_width);
  for (uint8_t& m : mask) m = random.uniform(0, 1) < shape.valid;
  std::vector<T> input = glance_test::random_values<T>(random, in_count);
  const std::vector<T> weight = glance_test::random_values<T>(
      random, p.out_channels * p.in_channels / p.groups * p.kernel[0] * p.kernel[1]);
  const std::vector<T> bias = glance_test::random_values<T>(random, p.out_channels);
  const std::vector<T> grad = glance_test::random_values<T>(random, out_count);

  // Behind the mask stand NaN and infinity, which must not leak.
  for (int64_t n = 0; n < p.batch; ++n)
    for (int64_t c = 0; c < p.in_channels; ++c)
      for (int64_t i = 0; i < p.in_height * p.in_width; ++i) {
        const int64_t mask_n = p.mask_batch == 1 ? 0 : n, mask_c = p.mask_channels == 1 ? 0 : c;
        if (mask[(mask_n * p.mask_channels + mask_c) * p.in_height * p.in_width + i]) continue;
        input[feature(n, c, i / p.in_width, i % p.in_width, p.in_channels, p.in_height, p.in_width,
                      channels_last)] = narrow<T>(static_cast<A>(i % 2 ? NAN : -INFINITY));
      }

  std::vector<T> masked = glance_test::poison<T>(in_count);
  std::vector<T> output = glance_test::poison<T>(out_count);
  std::vector<T> grad_conv = glance_test::poison<T>(out_count);
  std::vector<A> ratio(p.mask_batch * p.ratio_groups() * p.out_height * p.out_width, A(-777));
  p.mask = mask.data();
  p.input = input.data();
  p.masked_input = masked.data();
  p.ratio = ratio.data();
  p.bias = with_bias ? bias.data() : nullptr;
  p.output = output.data();
  p.plain = p.output;
  p.grad_output = grad.data();
  p.grad_conv = grad_conv.data();

  run_in_pieces(glance::mask_input_cpu, p, glance::input_rows(p));
  run_in_pieces(glance::window_ratio_cpu, p, glance::ratio_rows(p));
  convolve(p, masked, weight, output);
  const std::vector<T> plain = output;
  run_in_pieces(glance::rescale_cpu, p, glance::output_rows(p));
  run_in_pieces(glance::rescale_backward_cpu, p, glance::output_rows(p));

  // Two roundings to T at the size of the values at hand, and sums in double.
  for (int64_t n = 0; n < p.batch; ++n)
    for (int64_t k = 0; k < p.out_channels; ++k)
      for (int64_t y = 0; y < p.out_height; ++y)
        for (int64_t x = 0; x < p.out_width; ++x) {
          const Window w = window_at(p, input, mask, weight, n, k, y, x);
          const int64_t at =
              feature(n, k, y, x, p.out_channels, p.out_height, p.out_width, channels_last);
          const double r = w.count ? static_cast<double>(w.full) / w.count : 0;
          const double b = with_bias ? widen(bias[k]) : 0;
          const double expected = w.count ? w.sum * r + b : 0;
          const double tolerance = 4 * Type<T>::kEpsilon * (1 + std::abs(w.sum * r) + std::abs(b));
          EXPECT_NEAR(widen(output[at]), expected, w.count ? tolerance : 0);
          const double expected_grad = widen(grad[at]) * r;
          EXPECT_NEAR(widen(grad_conv[at]), expected_grad,
                      2 * Type<T>::kEpsilon * std::abs(expected_grad));
          const int64_t group = p.ratio_groups() == 1 ? 0 : k / (p.out_channels / p.groups);
          const int64_t ratio_n = p.mask_batch == 1 ? 0 : n;
          const int64_t ratio_at =
              ((ratio_n * p.ratio_groups() + group) * p.out_height + y) * p.out_width + x;
          EXPECT_NEAR(ratio[ratio_at], r, 2 * Type<A>::kEpsilon * r);
        }

  // One piece gives the same bits as many.
  std::vector<T> whole = plain, whole_grad = glance_test::poison<T>(out_count);
  std::vector<T> whole_masked = glance_test::poison<T>(in_count);
  std::vector<A> whole_ratio(ratio.size(), A(-777));
  p.masked_input = whole_masked.data();
  p.output = whole.data();
  p.plain = p.output;
  p.grad_conv = whole_grad.data();
  p.ratio = whole_ratio.data();
  glance::mask_input_cpu(p, 0, glance::input_rows(p));
  glance::window_ratio_cpu(p, 0, glance::ratio_rows(p));
  glance::rescale_cpu(p, 0, glance::output_rows(p));
  glance::rescale_backward_cpu(p, 0, glance::output_rows(p));
  const auto same = [](const auto& a, const auto& b) {
    return std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0;
  };
  EXPECT(same(masked, whole_masked));
  EXPECT(same(ratio, whole_ratio));
  EXPECT(same(output, whole));
  EXPECT(same(grad_conv, whole_grad));

  // In place, as the backward pass uses it.
  std::vector<T> in_place = input;
  p.input = p.masked_input = in_place.data();
  glance::mask_input_cpu(p, 0, glance::input_rows(p));
  EXPECT(same(masked, in_place));
  glance_test::context.clear();
}

template <typename T>
void check_all_shapes() {
  uint64_t seed = 1;
  for (const Shape& shape : kShapes) {
    for (const bool channels_last : {false, true}) {
      check_shape<T>(shape, channels_last, seed % 2 == 0, seed);
      ++seed;
    }
  }
}

void empty_ranges_touch_nothing() {
  PartialConvBackwardParams p = sizes_of(kShapes[0], false);
  p.batch = 0;
  EXPECT(glance::input_rows(p) == 0);
  EXPECT(glance::output_rows(p) == 0);
  glance::mask_input_cpu(p, 0, 0);
  glance::rescale_cpu(p, 0, 0);
  glance::rescale_backward_cpu(p, 0, 0);
}

void half_stays_finite_where_one_pixel_is_valid() {
  // 1 of 25 pixels at a value whose 25-fold still fits: the ratio must not be rounded to half
  // first.
  PartialConvBackwardParams p = sizes_of({1, 1, 5, 5, 1, 5, 5}, false);
  p.dtype = glance::ScalarType::kFloat16;
  std::vector<uint8_t> mask(25, 0);
  mask[7] = 1;
  float ratio = 0;
  glance::Half output = narrow<glance::Half>(2600.0f);
  p.mask = mask.data();
  p.ratio = &ratio;
  p.output = &output;
  p.plain = p.output;
  glance::window_ratio_cpu(p, 0, 1);
  glance::rescale_cpu(p, 0, 1);
  EXPECT(ratio == 25.0f);
  EXPECT(widen(output) == widen(narrow<glance::Half>(65000.0f)));
}

}  // namespace

int main() {
  check_all_shapes<float>();
  check_all_shapes<double>();
  check_all_shapes<glance::Half>();
  check_all_shapes<glance::BFloat16>();
  empty_ranges_touch_nothing();
  half_stays_finite_where_one_pixel_is_valid();
  return glance_test::finish("partial_conv");
}
