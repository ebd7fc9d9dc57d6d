// csrc/winograd: tiles against the sum in double, for each kernel and each instruction set.
#include <algorithm>

#include "check.h"
#include "winograd/winograd_conv.h"
#include "winograd/winograd_transforms.h"

using glance::InstructionSet;
using glance::kWinogradPoints;
using glance::WinogradConvParams;
using glance_test::context;
using glance_test::poison;
using glance_test::Random;
using glance_test::random_values;

namespace {

// Lines: A^T [(G w) * (B^T d)] of every unit vector is the filter itself, to a rounding.
template <int kTaps>
void a_line_is_a_correlation() {
  constexpr int kResults = kWinogradPoints + 1 - kTaps;
  context = "taps " + std::to_string(kTaps);
  for (int pixel = 0; pixel < kWinogradPoints; ++pixel) {
    for (int tap = 0; tap < kTaps; ++tap) {
      float d[kWinogradPoints] = {}, w[kTaps] = {}, pixels[kWinogradPoints], taps[kWinogradPoints];
      d[pixel] = w[tap] = 1;
      glance::transform_pixels(d, pixels);
      glance::transform_taps(w, taps);
      float products[kWinogradPoints], results[kResults];
      for (int i = 0; i < kWinogradPoints; ++i) products[i] = pixels[i] * taps[i];
      glance::transform_products(products, results);
      for (int i = 0; i < kResults; ++i) EXPECT_NEAR(results[i], i + tap == pixel ? 1 : 0, 2e-5);
    }
  }
}

// A call whose output was poisoned before, in blocks that are shared out in any way.
std::vector<float> convolved(WinogradConvParams p, int64_t parts) {
  std::vector<float> output =
      poison<float>(p.batch * p.out_height() * p.out_width() * p.out_channels);
  std::vector<float> packed = poison<float>(glance::winograd_packed_size(p.filter()));
  p.output = output.data();
  p.packed = packed.data();
  const auto in_parts = [&](int64_t count, auto run) {
    for (int64_t part = parts - 1; part >= 0; --part) {
      run(p, count * part / parts, count * (part + 1) / parts);
    }
  };
  in_parts(glance::winograd_weight_rows(p.filter()), glance::pack_winograd_weight_cpu);
  in_parts(glance::winograd_blocks(p), glance::winograd_conv_cpu);
  return output;
}

void tiles_equal_the_sum(WinogradConvParams p, uint64_t seed) {
  Random random(seed);
  const int64_t taps = p.kernel * p.kernel;
  p.column_step = p.channels + 1;  // as a crop of something larger
  p.row_step = (p.width + 2) * p.column_step;
  p.batch_step = p.height * p.row_step + 3;
  std::vector<float> input(p.batch * p.batch_step, NAN);
  for (int64_t at = 0; at < p.batch * p.height * p.width; ++at) {
    float* pixel = input.data() + at / (p.height * p.width) * p.batch_step +
                   at / p.width % p.height * p.row_step + at % p.width * p.column_step;
    for (int64_t c = 0; c < p.channels; ++c) pixel[c] = random.uniform(-1, 1);
  }
  const std::vector<float> weight =
      random_values<float>(random, p.out_channels * p.channels * taps);
  const std::vector<float> bias = random_values<float>(random, p.out_channels);
  p.input = input.data();
  p.weight = weight.data();
  p.bias = seed % 2 ? bias.data() : nullptr;
  // Channels behind the taps, or before them.
  const bool last = seed % 3 == 0;
  p.weight_steps[0] = p.channels * taps;
  p.weight_steps[1] = last ? 1 : taps;
  p.weight_steps[2] = last ? p.channels : 1;
  const std::vector<float> output = convolved(p, 1);
  EXPECT(output == convolved(p, 3));
  size_t at = 0;
  for (int64_t cell = 0; cell < p.batch * p.out_height() * p.out_width(); ++cell) {
    const int64_t x = cell % p.out_width(), y = cell / p.out_width() % p.out_height();
    const float* from = p.input + cell / (p.out_width() * p.out_height()) * p.batch_step;
    for (int64_t k = 0; k < p.out_channels; ++k, ++at) {
      double sum = p.bias ? bias[k] : 0, size = std::abs(sum);
      for (int64_t tap = 0; tap < taps; ++tap) {
        const float* pixel =
            from + (y + tap / p.kernel) * p.row_step + (x + tap % p.kernel) * p.column_step;
        const float* of = weight.data() + k * p.weight_steps[0] + tap * p.weight_steps[2];
        for (int64_t c = 0; c < p.channels; ++c) {
          const double product = double(pixel[c]) * of[c * p.weight_steps[1]];
          sum += product;
          size += std::abs(product);
        }
      }
      EXPECT_NEAR(output[at], sum, 3e-5 * (size + 1));
    }
  }
}

void every_kernel_and_instruction_set() {
  for (int set = 0; set <= static_cast<int>(glance::best_instruction_set()); ++set) {
    for (int64_t kernel = 3; kernel <= 6; ++kernel) {
      // channels, out channels, height and width beyond the kernel, batch
      const int64_t sizes[][5] = {{1, 1, 0, 0, 1},   {3, 5, 4, 9, 2},     {16, 16, 12, 12, 1},
                                  {17, 33, 7, 1, 3}, {32, 70, 10, 26, 1}, {20, 64, 5, 40, 2}};
      uint64_t seed = 0;
      for (const auto& size : sizes) {
        WinogradConvParams p{};
        p.channels = size[0];
        p.out_channels = size[1];
        p.kernel = kernel;
        p.height = kernel + size[2];
        p.width = kernel + size[3];
        p.batch = size[4];
        p.instructions = static_cast<InstructionSet>(set);
        context = "set " + std::to_string(set) + ", kernel " + std::to_string(kernel) + ", size " +
                  std::to_string(seed);
        tiles_equal_the_sum(p, seed++);
      }
    }
  }
}

void tiles_pay_where_there_is_much_to_do() {
  WinogradConvParams p{};
  p.batch = 1;
  p.channels = 128;
  p.out_channels = 256;
  p.kernel = 5;
  p.height = p.width = 124;
  p.instructions = InstructionSet::kAvx2;
  EXPECT(glance::winograd_pays(p));
  p.instructions = InstructionSet::kPlain;  // for which torch's own has better loops
  EXPECT(!glance::winograd_pays(p));
  p.instructions = InstructionSet::kAvx2;
  p.height = p.width = 14;  // the weight would take longer than the sum
  EXPECT(!glance::winograd_pays(p));
  p.batch = 64;
  EXPECT(glance::winograd_pays(p));
  p.channels = 3;  // of 16 that are computed
  EXPECT(!glance::winograd_pays(p));
}

}  // namespace

int main() {
  a_line_is_a_correlation<3>();
  a_line_is_a_correlation<4>();
  a_line_is_a_correlation<5>();
  a_line_is_a_correlation<6>();
  every_kernel_and_instruction_set();
  tiles_pay_where_there_is_much_to_do();
  return glance_test::finish("winograd");
}
