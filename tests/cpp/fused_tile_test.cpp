// csrc/partial_conv/fused_tile.h: the whole of the fused CUDA kernels on an emulated block, output
// and gradient of the input, against the equation of partial_conv.h written out pixel by pixel.
#include "partial_conv/fused_tile.h"

#include <algorithm>
#include <limits>
#include <sstream>
#include <vector>

#include "emulated_block.h"

using glance::accumulate_t;
using glance::BFloat16;
using glance::Half;
using glance::narrow;
using glance::PartialConvBackwardParams;
using glance::SlideWork;
using glance::Sweep;
using glance::widen;
using glance_test::Aligned;
using glance_test::Random;
using glance_test::Schedule;
using glance_test::Type;

namespace {

struct Shape {
  int64_t batch, channels, height, width, out_channels, kernel_h, kernel_w;
  int64_t stride = 1, padding = 0, dilation = 1, groups = 1;
  bool own_masks = false;
  double valid = 0.6;  // the share of valid pixels outside of the hole
  int64_t hole = 0;    // side of a hole at the top left of each image
  double slope = 1;
  bool bias = true;
};

const Shape kShapes[] = {
    {2, 16, 9, 11, 16, 3, 3, 1, 1, 1, 1, true},                  // rows in order, two images a tile
    {1, 8, 17, 33, 24, 3, 3, 1, 1, 1, 1, false, 0.9, 12, 0.1},   // patches, some in the hole
    {1, 32, 24, 32, 8, 3, 3, 1, 1, 1, 1, true, 1.0, 24, 0},      // most tiles in the hole
    {2, 3, 13, 12, 70, 7, 7, 2, 3, 1, 1, true, 0.5},             // channels that fill no chunk
    {2, 5, 8, 7, 3, 3, 2, 2, 1, 2, 1, false, 0.5, 0, 1, false},  // the same in both directions
    {1, 64, 12, 9, 130, 1, 1, 1, 0, 1, 1, true, 0.7},            // two tiles of columns
    {1, 40, 10, 10, 36, 3, 3, 3, 4, 2, 1, false, 0.4, 3, 0},     // padding of more than a window
    {1, 32, 8, 9, 64, 3, 3, 2, 1, 1, 4, true, 0.6, 0, 0.3},      // groups
    {2, 48, 7, 7, 48, 3, 3, 1, 2, 2, 3, false, 0.3},             // groups, dilated
    {1, 16, 5, 6, 16, 3, 3, 1, 1, 1, 1, false, 0.0},             // nothing valid
    {1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, false, 1.0},
    {2, 16, 9, 8, 16, 3, 3, 2, 1, 1, 16, true, 0.5, 0, 0.1},  // depthwise
    {1, 7, 6, 9, 7, 5, 3, 1, 3, 2, 7, false, 0.4, 4},         // depthwise, odd
};

std::string name_of(const Shape& s) {
  std::ostringstream text;
  text << "N" << s.batch << " C" << s.channels << " " << s.height << "x" << s.width << " K"
       << s.out_channels << " window " << s.kernel_h << "x" << s.kernel_w << " stride " << s.stride
       << " padding " << s.padding << " dilation " << s.dilation << " groups " << s.groups;
  return text.str();
}

// Elements that begin at a multiple of 16 bytes.
template <typename T>
class Values {
 public:
  explicit Values(const std::vector<T>& values)
      : count_(values.size()), memory_(std::max<int64_t>(1, count_ * sizeof(T))) {
    std::copy(values.begin(), values.end(), data());
  }
  T* data() { return reinterpret_cast<T*>(memory_.data()); }
  T& operator[](int64_t i) { return data()[i]; }
  int64_t size() const { return count_; }

 private:
  int64_t count_;
  Aligned memory_;
};

// A call with its tensors, channels last, and what stands behind the mask: NaN and infinity.
template <typename T>
struct Case {
  PartialConvBackwardParams p;
  std::vector<uint8_t> mask, valid;
  Values<T> input, output, grad_conv, grad_input;
  std::vector<T> weight, bias;

  Case(const Shape& s, uint64_t seed, bool channels_last_weight) : Case(sizes(s), s, Random(seed)) {
    const int64_t taps = p.kernel[0] * p.kernel[1], c = p.in_channels / p.groups;
    const int64_t contiguous[4] = {c * taps, taps, p.kernel[1], 1};
    const int64_t last[4] = {c * taps, 1, p.kernel[1] * c, c};
    std::copy_n(channels_last_weight ? last : contiguous, 4, p.weight_strides);
    p.weight = weight.data();
    p.bias = s.bias ? bias.data() : nullptr;
    p.mask = mask.data();
    p.valid = valid.data();
    p.input = input.data();
    p.output = output.data();
    p.grad_conv = grad_conv.data();
    p.grad_input = grad_input.data();
    for (int64_t n = 0; n < p.batch; ++n)
      for (int64_t y = 0; y < p.in_height; ++y)
        for (int64_t x = 0; x < p.in_width; ++x)
          for (int64_t c = 0; c < p.in_channels; ++c) {
            if (sees(n, y, x)) continue;
            const auto garbage = static_cast<accumulate_t<T>>(c % 2 ? NAN : -INFINITY);
            input[pixel(n, y, x) * p.in_channels + c] = narrow<T>(garbage);
          }
  }

  int64_t pixel(int64_t n, int64_t y, int64_t x) const {
    return (n * p.in_height + y) * p.in_width + x;
  }
  bool sees(int64_t n, int64_t y, int64_t x) const {
    if (y < 0 || y >= p.in_height || x < 0 || x >= p.in_width) return false;
    return mask[pixel(p.mask_batch == 1 ? 0 : n, y, x)] != 0;
  }
  double weight_at(int64_t k, int64_t c, int64_t y, int64_t x) const {
    const int64_t* s = p.weight_strides;
    return widen(weight[k * s[0] + c * s[1] + y * s[2] + x * s[3]]);
  }

 private:
  static PartialConvBackwardParams sizes(const Shape& s) {
    PartialConvBackwardParams p;
    p.dtype = Type<T>::kDtype;
    p.channels_last = true;
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
    p.out_height = (s.height + 2 * s.padding - s.dilation * (s.kernel_h - 1) - 1) / s.stride + 1;
    p.out_width = (s.width + 2 * s.padding - s.dilation * (s.kernel_w - 1) - 1) / s.stride + 1;
    p.groups = s.groups;
    p.mask_batch = s.own_masks ? s.batch : 1;
    p.negative_slope = s.slope;
    return p;
  }

  static std::vector<uint8_t> masks(const Shape& s, int64_t count, Random& random) {
    std::vector<uint8_t> mask(count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t x = i % s.width, y = i / s.width % s.height;
      mask[i] = random.uniform(0, 1) < s.valid && !(y < s.hole && x < s.hole);
    }
    return mask;
  }

  Case(const PartialConvBackwardParams& sized, const Shape& s, Random random)
      : p(sized),
        mask(masks(s, p.mask_batch * p.in_height * p.in_width, random)),
        valid(p.mask_batch * p.out_height * p.out_width, 7),
        input(glance_test::random_values<T>(random,
                                            p.batch * p.in_height * p.in_width * p.in_channels)),
        output(glance_test::poison<T>(p.batch * p.out_height * p.out_width * p.out_channels)),
        grad_conv(glance_test::random_values<T>(random, output.size())),
        grad_input(glance_test::poison<T>(input.size())),
        weight(glance_test::random_values<T>(
            random, p.out_channels * p.in_channels / p.groups * p.kernel[0] * p.kernel[1])),
        bias(glance_test::random_values<T>(random, p.out_channels)) {}
};

// The launcher's work in its order: see fused_conv.cu.
template <typename Tile, typename T>
void run_tiles(Case<T>& call, Sweep sweep, Schedule schedule) {
  EXPECT(glance::fits_slide_tile<Tile>(call.p, sweep));
  SlideWork w = glance::slide_work<Tile>(call.p, sweep);
  const int64_t copied = glance::copy_bytes(w, w.pixels, w.source_count());
  Aligned workspace(w.packed_bytes() + copied);
  w.packed = workspace.data();
  if (copied > 0) {
    w.pixels = glance_test::copied_pixels<T>(w, w.pixels, workspace.data() + w.packed_bytes(),
                                             w.source_count());
  }
  glance_test::run_gemm<Tile>(
      w, schedule, {{static_cast<const char*>(w.pixels), w.source_count() * w.pixel_bytes}});
}

template <typename T, int vector>
void run_depthwise(Case<T>& call, Sweep sweep) {
  SlideWork w = glance::depthwise_work(call.p, sweep, sizeof(T));
  Values<T> packed(std::vector<T>(w.taps * w.out_channels));
  for (int64_t i = 0; i < packed.size(); ++i) {
    packed[i] = call.weight[glance::depthwise_source(w, i)];
  }
  w.packed = packed.data();
  glance_test::EmulatedWarp warp(0, {}, {}, {});
  const int64_t pixels = w.batch * w.target[0] * w.target[1];
  for (int64_t i = 0; i < pixels * w.out_channels / vector; ++i) {
    glance::depthwise_run<T, vector>(warp, w, i);
  }
}

template <typename T>
void run(Case<T>& call, Sweep sweep, Schedule schedule) {
  constexpr int kVector = 16 / sizeof(T);
  if (!glance::is_depthwise(call.p)) {
    glance::dispatch_slide_tile(call.p, sweep, [&](auto tag) {
      run_tiles<typename decltype(tag)::type>(call, sweep, schedule);
    });
  } else if (call.p.in_channels % kVector == 0) {
    run_depthwise<T, kVector>(call, sweep);
  } else {
    run_depthwise<T, 1>(call, sweep);
  }
}

// A sum and the sum of its terms' sizes, which bounds its rounding.
struct Sum {
  double value = 0, size = 0;
  void add(double a, double b) {
    value += a * b;
    size += std::abs(a * b);
  }
};

template <typename T>
double tolerance(const Sum& sum, double scale, bool tf32) {
  const double of_products = tf32 ? 1.0 / 1024 : 8 * Type<accumulate_t<T>>::kEpsilon;
  const double smallest = std::is_same_v<T, Half> ? 6e-8 : 0;  // step of subnormals
  return smallest + (of_products * sum.size + Type<T>::kEpsilon * std::abs(sum.value)) * scale;
}

template <typename T>
void expect_output(Case<T>& call) {
  const PartialConvBackwardParams& p = call.p;
  const int64_t group_in = p.in_channels / p.groups, group_out = p.out_channels / p.groups;
  int64_t at = 0;
  for (int64_t n = 0; n < p.batch; ++n)
    for (int64_t y = 0; y < p.out_height; ++y)
      for (int64_t x = 0; x < p.out_width; ++x)
        for (int64_t k = 0; k < p.out_channels; ++k, ++at) {
          Sum sum;
          int64_t count = 0;
          for (int64_t i = 0; i < p.kernel[0]; ++i)
            for (int64_t j = 0; j < p.kernel[1]; ++j) {
              const int64_t in_y = y * p.stride[0] - p.padding[0] + i * p.dilation[0];
              const int64_t in_x = x * p.stride[1] - p.padding[1] + j * p.dilation[1];
              if (!call.sees(n, in_y, in_x)) continue;
              ++count;
              for (int64_t c = 0; c < group_in; ++c) {
                const int64_t channel = k / group_out * group_in + c;
                sum.add(widen(call.input[call.pixel(n, in_y, in_x) * p.in_channels + channel]),
                        call.weight_at(k, c, i, j));
              }
            }
          const double ratio = count ? double(p.window_size()) / count : 0;
          const double bias = count && p.bias ? widen(call.bias[k]) : 0;
          double expected = sum.value * ratio + bias;
          if (expected < 0) expected *= p.negative_slope;
          const double rounding = Type<T>::kEpsilon * std::abs(bias);
          EXPECT_NEAR(widen(call.output[at]), expected,
                      count ? tolerance<T>(sum, ratio, p.tf32) + rounding : 0);
          if (n < p.mask_batch && k == 0) {
            EXPECT(call.valid[(n * p.out_height + y) * p.out_width + x] == (count > 0));
          }
        }
}

template <typename T>
void expect_grad_input(Case<T>& call) {
  const PartialConvBackwardParams& p = call.p;
  const int64_t group_in = p.in_channels / p.groups, group_out = p.out_channels / p.groups;
  std::vector<Sum> sums(call.grad_input.size());
  int64_t at = 0;
  for (int64_t n = 0; n < p.batch; ++n)
    for (int64_t y = 0; y < p.out_height; ++y)
      for (int64_t x = 0; x < p.out_width; ++x)
        for (int64_t k = 0; k < p.out_channels; ++k, ++at)
          for (int64_t i = 0; i < p.kernel[0]; ++i)
            for (int64_t j = 0; j < p.kernel[1]; ++j) {
              const int64_t in_y = y * p.stride[0] - p.padding[0] + i * p.dilation[0];
              const int64_t in_x = x * p.stride[1] - p.padding[1] + j * p.dilation[1];
              if (!call.sees(n, in_y, in_x)) continue;
              for (int64_t c = 0; c < group_in; ++c) {
                const int64_t channel = k / group_out * group_in + c;
                sums[call.pixel(n, in_y, in_x) * p.in_channels + channel].add(
                    widen(call.grad_conv[at]), call.weight_at(k, c, i, j));
              }
            }
  for (size_t i = 0; i < sums.size(); ++i) {
    EXPECT_NEAR(widen(call.grad_input[i]), sums[i].value,
                sums[i].size > 0 ? tolerance<T>(sums[i], 1, p.tf32) : 0);
  }
}

const Schedule kSchedules[] = {{false, false}, {false, true}, {true, false}, {true, true}};

template <typename T>
void check_shapes(bool tf32 = false) {
  uint64_t seed = 1;
  for (const Shape& shape : kShapes) {
    glance_test::context = name_of(shape);
    for (const Sweep sweep : {Sweep::kForward, Sweep::kGradInput}) {
      const bool served =
          shape.groups == 1 || shape.channels % 16 == 0 || shape.groups == shape.channels;
      if (!served) continue;
      for (int i = 0; i < 2; ++i) {
        Case<T> call(shape, seed, seed % 2 == 0);
        call.p.tf32 = tf32;
        run(call, sweep, kSchedules[seed++ % 4]);
        if (sweep == Sweep::kForward) {
          expect_output(call);
        } else {
          expect_grad_input(call);
        }
      }
    }
  }
  glance_test::context.clear();
}

// Every pixel of the target is a row of one tile, and no pixel of two.
void every_pixel_is_one_row() {
  glance_test::context = "rows";
  for (const Shape& shape : kShapes) {
    for (const Sweep sweep : {Sweep::kForward, Sweep::kGradInput}) {
      using Tile = glance::ConvTile<Half, glance::Math::kTensor, 64, 16>;
      const Case<Half> call(shape, 5, false);
      const SlideWork w = glance::slide_work<Tile>(call.p, sweep);
      std::vector<int> times(w.batch * w.target[0] * w.target[1]);
      const int64_t tiles = w.phase_tiles * w.phases[0] * w.phases[1];
      EXPECT(tiles * w.groups * w.column_tiles == w.blocks);
      for (int64_t tile = 0; tile < tiles; ++tile)
        for (int r = 0; r < Tile::kRows; ++r) {
          const auto row = w.row<float>(tile, r, Tile::kRows);
          if (row.output >= 0) ++times[row.output];
        }
      EXPECT(std::all_of(times.begin(), times.end(), [](int t) { return t == 1; }));
    }
  }
  glance_test::context.clear();
}

// A tile is a patch of an image where that costs few tiles more than rows in order.
void patches_are_taken_where_they_fit() {
  using Tile = glance::ConvTile<Half, glance::Math::kTensor, 64, 16>;
  const auto height_of_patch = [](int64_t batch, int64_t side) {
    const Case<Half> call({batch, 8, side, side, 8, 3, 3, 1, 1}, 1, false);
    return glance::slide_work<Tile>(call.p, Sweep::kForward).patch[0];
  };
  EXPECT(height_of_patch(1, 64) == 8);
  EXPECT(height_of_patch(4, 28) == 4);  // of 32 columns, 28 are there
  EXPECT(height_of_patch(8, 14) == 0);
}

// Where nothing may be read, reading fails the emulated copy's check of its range.
void holes_are_not_read() {
  glance_test::context = "a hole";
  using Tile = glance::ConvTile<Half, glance::Math::kTensor, 16, 16>;
  for (const Sweep sweep : {Sweep::kForward, Sweep::kGradInput}) {
    Case<Half> call({1, 16, 16, 16, 16, 3, 3, 1, 1, 1, 1, false, 0.0}, 3, false);
    SlideWork w = glance::slide_work<Tile>(call.p, sweep);
    Aligned packed(w.packed_bytes());
    w.packed = packed.data();
    const int64_t bytes = glance::TileMemory<Tile, SlideWork>::bytes(w.taps, w.steps);
    for (int64_t block = 0; block < w.blocks; ++block) {
      Aligned shared(bytes);
      const std::vector<glance_test::Range> nothing;
      glance_test::EmulatedBlock emulated(Tile::kThreads, {}, {shared.data(), bytes}, nothing);
      glance::convolve_tile<Tile>(emulated, w, block, shared.data());
    }
    if (sweep == Sweep::kForward) {
      expect_output(call);
    } else {
      expect_grad_input(call);
    }
  }
  glance_test::context.clear();
}

// With stride 2 a pixel's gradient comes through a quarter of the taps, more or less.
void steps_of_other_phases_are_skipped() {
  glance_test::context = "phases";
  using Tile = glance::ConvTile<Half, glance::Math::kTensor, 32, 16>;
  Case<Half> call({1, 32, 32, 32, 32, 3, 3, 2, 1, 1, 1, false, 1.0}, 3, false);
  const SlideWork w = glance::slide_work<Tile>(call.p, Sweep::kGradInput);
  EXPECT(w.steps == 9);
  const int64_t bytes = glance::TileMemory<Tile, SlideWork>::bytes(w.taps, w.steps);
  int64_t used = 0;
  for (int64_t block = 0; block < w.blocks; ++block) {
    Aligned shared(bytes);
    const std::vector<glance_test::Range> nothing;
    glance_test::EmulatedBlock emulated(Tile::kThreads, {}, {shared.data(), bytes}, nothing);
    const glance::TileMemory<Tile, SlideWork> memory{shared.data(), w.taps};
    const auto tile = glance::tile_of_block<Tile>(w, block);
    using Warp = glance_test::EmulatedWarp;
    emulated.phase([&](Warp& warp) { glance::find_rows<Tile>(warp, w, tile, memory); });
    emulated.phase([&](Warp& warp) { glance::find_places<Tile>(warp, w, memory); });
    emulated.any([&](Warp& warp) { return glance::count_places<Tile>(warp, w, tile, memory); });
    emulated.phase([&](Warp& warp) { glance::find_steps<Tile>(warp, w, memory); });
    for (int step = -1; (step = glance::next_step(w, memory, step + 1)) < w.steps;) ++used;
  }
  // Phases of 1, 2, 2 and 4 taps, of as many tiles each.
  EXPECT(used * 4 == w.blocks * 9);
  glance_test::context.clear();
}

void activation_keeps_nan_and_makes_zero_of_minus_infinity() {
  const float inf = std::numeric_limits<float>::infinity();
  EXPECT(glance::finished(-inf, 1.0f, 0.0f, 0.0f) == 0.0f);
  EXPECT(glance::finished(-inf, 1.0f, 0.0f, 0.5f) == -inf);
  EXPECT(std::isnan(glance::finished(NAN, 1.0f, 0.0f, 0.0f)));
  EXPECT(glance::finished(NAN, 0.0f, 1.0f, 1.0f) == 0.0f);
  EXPECT(glance::finished(2.0f, 3.0f, -8.0f, 0.25f) == -0.5f);
}

void rule_prefers_what_is_bound_by_memory() {
  PartialConvBackwardParams p = Case<Half>({8, 32, 128, 128, 32, 3, 3, 1, 1}, 1, false).p;
  const auto prefers = [&] { return glance::prefers_fused_cuda(p, Sweep::kForward); };
  EXPECT(prefers());
  const PartialConvBackwardParams good = p;
  p.in_channels = p.out_channels = 512;  // bound by arithmetic, where the library is faster
  EXPECT(!prefers());
  p = good;
  p.channels_last = false;
  EXPECT(!prefers());
  p = good;
  p.dtype = glance::ScalarType::kFloat32;  // without TF32
  EXPECT(!prefers());
  p.tf32 = true;
  p.in_channels = p.out_channels = 16;
  EXPECT(prefers());
  p = good;
  p.mask_channels = p.in_channels;
  EXPECT(!prefers());
  p = good;
  p.groups = p.in_channels;  // depthwise
  EXPECT(prefers());
  p.dtype = glance::ScalarType::kFloat64;
  EXPECT(!prefers());
}

}  // namespace

int main() {
  check_shapes<float>();
  check_shapes<float>(true);
  check_shapes<double>();
  check_shapes<Half>();
  check_shapes<BFloat16>();
  every_pixel_is_one_row();
  patches_are_taken_where_they_fit();
  holes_are_not_read();
  steps_of_other_phases_are_skipped();
  activation_keeps_nan_and_makes_zero_of_minus_infinity();
  rule_prefers_what_is_bound_by_memory();
  return glance_test::finish("fused_tile");
}
