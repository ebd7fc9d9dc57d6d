// csrc/hole_windows: the CPU kernels, and the CUDA kernels' indices and the whole of the CUDA
// convolution on an emulated block, against the equations of hole_windows.h.
#include "hole_windows/hole_windows.h"

#include <algorithm>
#include <array>
#include <limits>
#include <vector>

#include "emulated_block.h"
#include "hole_cases.h"
#include "hole_windows/hole_conv_tile.h"
#include "hole_windows/hole_windows_tile.h"

using glance::accumulate_t;
using glance::BFloat16;
using glance::Half;
using glance::HoleConvParams;
using glance::HoleGatherBackwardParams;
using glance::widen;
using glance_test::Aligned;
using glance_test::HoleCase;
using glance_test::HoleSizes;
using glance_test::name_of;
using glance_test::Random;
using glance_test::Schedule;
using glance_test::Type;

namespace {

// Layers of Global-Net on a few holes, and shapes at the edges of what the tiles do.
const HoleSizes kFixed[] = {
    {2, 2, 3, 16, false, false, 40, 40, 33, 33, 7, 7, 2, 0, 1, 12, 12, 0, true},
    {2, 3, 16, 32, false, true, 14, 14, 8, 8, 3, 3, 2, 0, 1, 5, 5, 0, true},
    {1, 6, 64, 128, false, true, 9, 9, 5, 5, 3, 3, 2, 0, 1, 5, 5, 0, true},
    {1, 130, 8, 130, false, true, 3, 3, 1, 1, 3, 3, 1, 0, 1, 1, 1, 1, false},
    {1, 1, 1, 1, false, true, 3, 3, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, false},
    {3, 5, 24, 64, true, true, 8, 9, 6, 6, 3, 2, 1, 2, 2, 6, 6, 0.01, true},
    {1, 2, 8, 16, false, true, 9, 9, 4, 4, 5, 5, 1, 2, 1, 1, 1, 1, true},
    {1, 40, 40, 5, false, true, 34, 34, 30, 30, 3, 3, 2, 0, 1, 16, 16, 0.01, true},  // two steps
};

// --- convolution
// ----------------------------------------------------------------------------------

template <typename T>
void expect_output(const HoleCase<T>& call, const std::vector<T>& output, double product_epsilon) {
  const HoleSizes& s = call.sizes;
  size_t at = 0;
  for (int64_t b = 0; b < call.window_count(); ++b)
    for (int64_t i = 0; i < s.out_height; ++i)
      for (int64_t j = 0; j < s.out_width; ++j)
        for (int64_t k = 0; k < s.out_channels; ++k) {
          const auto expected = call.output(b, i, j, k);
          const double smallest = std::is_same_v<T, Half> ? 6e-8 : 0;  // step of subnormals
          const double tolerance = smallest + Type<T>::kEpsilon * std::abs(expected.value) +
                                   product_epsilon * expected.magnitude;
          EXPECT_NEAR(widen(output[at]), expected.value, tolerance);
          ++at;
        }
}

template <typename T>
size_t output_size(const HoleCase<T>& call) {
  const HoleSizes& s = call.sizes;
  return call.window_count() * s.out_height * s.out_width * s.out_channels;
}

// A few roundings of the accumulate type for each product.
template <typename T>
double sum_epsilon() {
  return 8 * Type<accumulate_t<T>>::kEpsilon;
}

template <typename T>
void check_cpu_convolution(const HoleSizes& sizes, uint64_t seed) {
  const HoleCase<T> call(sizes, seed);
  HoleConvParams p = call.conv;
  std::vector<char> packed(glance::packed_weight_bytes(p) + 64);
  p.packed = packed.data();
  std::vector<T> output = glance_test::poison<T>(output_size(call));
  p.output = output.data();
  glance_test::run_in_pieces(glance::pack_weight_cpu, p, glance::weight_panels(p));
  glance_test::run_in_pieces(glance::hole_conv_cpu, p, call.window_count());
  expect_output(call, output, sum_epsilon<T>());
}

// All three gradients, as sums in double with what their rounding errors are relative to.
template <typename T>
struct HoleGradients {
  using Sum = typename HoleCase<T>::Sum;
  std::vector<Sum> tiles, weight, bias;

  HoleGradients(const HoleCase<T>& call, const std::vector<T>& grads, const std::vector<T>& results,
                int64_t tile_height, int64_t tile_width)
      : tiles(call.window_count() * tile_height * tile_width * call.sizes.channels),
        weight(call.weight.size()),
        bias(call.bias.size()) {
    const HoleSizes& s = call.sizes;
    const auto add = [](Sum& sum, double value) {
      sum.value += value;
      sum.magnitude += std::abs(value);
    };
    for (int64_t cell = 0; cell < call.window_count() * s.out_height * s.out_width; ++cell) {
      const int64_t b = cell / (s.out_height * s.out_width), g = call.geometry(b);
      const int64_t i = cell / s.out_width % s.out_height, j = cell % s.out_width;
      const double ratio = call.ratio[(g * s.out_height + i) * s.out_width + j];
      for (int64_t k = 0; ratio != 0 && k < s.out_channels; ++k) {
        double grad = widen(grads[cell * s.out_channels + k]);
        if (s.slope != 1 && !(widen(results[cell * s.out_channels + k]) > 0)) grad *= s.slope;
        add(bias[k], grad);
        grad *= ratio;
        for (int64_t tap = 0; tap < s.kernel_h * s.kernel_w; ++tap) {
          const int64_t y = s.dilation * (tap / s.kernel_w), x = s.dilation * (tap % s.kernel_w);
          const int64_t top = (call.origins[g * 2] + i) * s.stride - s.padding;
          const int64_t left = (call.origins[g * 2 + 1] + j) * s.stride - s.padding;
          const int64_t row = b * tile_height + i * s.stride + y;
          for (int64_t c = 0; c < s.channels; ++c) {
            const int64_t at = (k * s.channels + c) * s.kernel_h * s.kernel_w + tap;
            const int64_t term = (k * s.kernel_h * s.kernel_w + tap) * s.channels + c;
            add(tiles[(row * tile_width + j * s.stride + x) * s.channels + c],
                grad * widen(call.weight[at]));
            add(weight[term], grad * call.input(b, top + y, left + x, c));
          }
        }
      }
    }
  }
};

template <typename T>
void expect_sums(const std::vector<T>& got,
                 const std::vector<typename HoleCase<T>::Sum>& expected) {
  for (size_t at = 0; at < got.size(); ++at) {
    const double smallest = std::is_same_v<T, Half> ? 6e-8 : 0;  // step of subnormals
    EXPECT_NEAR(widen(got[at]), expected[at].value,
                smallest + Type<T>::kEpsilon * std::abs(expected[at].value) +
                    sum_epsilon<T>() * expected[at].magnitude);
  }
}

// Also that they do not depend on the threads, nor on which of them are wanted.
template <typename T>
void check_gradients(const HoleSizes& sizes, uint64_t seed) {
  const HoleCase<T> call(sizes, seed);
  const HoleSizes& s = sizes;
  Random random(seed + 500);
  std::vector<T> grads = glance_test::random_values<T>(random, output_size(call));
  const std::vector<T> results = glance_test::random_values<T>(random, output_size(call));
  const int64_t cells = s.out_height * s.out_width;
  for (size_t at = 0; at < grads.size(); ++at) {  // of cells that no hole reaches: not to be read
    const int64_t cell = at / s.out_channels;
    const bool reached = call.ratio[call.geometry(cell / cells) * cells + cell % cells] != 0;
    if (!reached) grads[at] = glance::narrow<T>(static_cast<accumulate_t<T>>(NAN));
  }
  const int64_t height = (s.out_height - 1) * s.stride + (s.kernel_h - 1) * s.dilation + 1;
  const int64_t width = (s.out_width - 1) * s.stride + (s.kernel_w - 1) * s.dilation + 1;
  const HoleGradients<T> expected(call, grads, results, height, width);
  const glance::ParallelFor whole = [](int64_t count, const auto& body) { body(0, count); };
  const glance::ParallelFor pieces = [](int64_t count, const auto& body) {
    for (int64_t end = count, step = 1; end > 0; end -= step, step = step % 3 + 1) {
      body(std::max<int64_t>(0, end - step), end);
    }
  };
  const auto compute = [&](bool tiles, bool weight, bool bias, const glance::ParallelFor& threads) {
    std::vector<T> got[3] = {glance_test::poison<T>(expected.tiles.size() * tiles),
                             glance_test::poison<T>(expected.weight.size() * weight),
                             glance_test::poison<T>(expected.bias.size() * bias)};
    glance::HoleConvBackwardParams p;
    static_cast<HoleConvParams&>(p) = call.conv;
    p.cells = nullptr;
    p.bias = nullptr;
    p.grad_output = grads.data();
    p.result = s.slope == 1 ? nullptr : results.data();
    p.grad_tiles = tiles ? got[0].data() : nullptr;
    p.grad_weight = weight ? got[1].data() : nullptr;
    p.grad_bias = bias ? got[2].data() : nullptr;
    glance::hole_conv_backward_cpu(p, threads);
    return std::array<std::vector<T>, 3>{got[0], got[1], got[2]};
  };
  const auto all = compute(true, true, true, whole);
  expect_sums(all[0], expected.tiles);
  expect_sums(all[1], expected.weight);
  expect_sums(all[2], expected.bias);
  for (int which = 0; which < 4; ++which) {
    const auto some = which < 3 ? compute(which == 0, which == 1, which == 2, pieces)
                                : compute(true, true, true, pieces);
    for (int i = 0; i < 3; ++i) {
      for (size_t at = 0; at < some[i].size(); ++at) {
        EXPECT_NEAR(widen(some[i][at]), widen(all[i][at]), 0);
      }
    }
  }
}

template <typename Tile>
void run_tiles(const HoleConvParams& p, Schedule schedule) {
  using T = typename Tile::T;
  EXPECT(glance::fits_conv_tile<Tile>(p));
  const glance::ConvWorkspace space = glance::conv_workspace<Tile>(p);
  Aligned workspace(space.total());
  glance::HoleConvWork w = glance::conv_work<Tile>(p);
  w.packed = workspace.data();
  const int64_t base_count = p.batch * p.height * p.width;
  const int64_t window_count = p.window_count() * p.window_height * p.window_width;
  char* copies = workspace.data() + space.packed;
  if (space.base > 0) {
    w.conv.base = glance_test::copied_pixels<T>(w, p.base, copies, base_count);
  }
  if (space.windows > 0) {
    w.conv.windows = glance_test::copied_pixels<T>(w, p.windows, copies + space.base, window_count);
  }
  glance_test::run_gemm<Tile>(
      w, schedule,
      {{static_cast<const char*>(w.conv.base), base_count * w.pixel_bytes},
       {static_cast<const char*>(w.conv.windows), window_count * w.pixel_bytes}});
}

template <typename T>
void check_cuda_convolution(const HoleSizes& sizes, uint64_t seed, bool tf32 = false) {
  const HoleCase<T> call(sizes, seed);
  const Schedule schedules[] = {{false, false}, {false, true}, {true, false}, {true, true}};
  const bool large = sizes.channels * sizes.out_channels > 1000;
  for (int i = 0; i < 4; i += large ? 3 : 1) {
    HoleConvParams p = call.conv;
    p.tf32 = tf32;
    std::vector<T> aligned(output_size(call) + 32, T{});
    T* output = aligned.data();
    while (reinterpret_cast<uintptr_t>(output) % 16) ++output;
    p.output = output;
    if (p.cell_count > 0) {
      glance::dispatch_conv_tile(
          p, [&](auto tag) { run_tiles<typename decltype(tag)::type>(p, schedules[i]); });
    }
    const double tf32_epsilon = 1.0 / 1024;  // two factors, each rounded by half of that
    expect_output(call, std::vector<T>(output, output + output_size(call)),
                  tf32 ? tf32_epsilon : sum_epsilon<T>());
  }
}

// --- gather and scatter
// ----------------------------------------------------------------------------

template <typename T>
HoleGatherBackwardParams gather_params(const HoleCase<T>& call) {
  HoleGatherBackwardParams p;
  static_cast<glance::HoleWindowsParams&>(p) = call.conv;
  p.tile_height = 4;
  p.tile_width = 3;
  p.fill = -1.5;
  p.origins = call.origins.data();
  return p;
}

template <typename T, typename I>
void check_gather(const HoleSizes& sizes, uint64_t seed) {
  using A = accumulate_t<T>;
  const HoleCase<T> call(sizes, seed);
  HoleGatherBackwardParams p = gather_params(call);
  const int64_t c = p.channels, count = p.window_count() * p.tile_height * p.tile_width;
  std::vector<T> tiles = glance_test::poison<T>(count * c);
  p.tiles = tiles.data();
  glance_test::run_in_pieces(glance::gather_holes_cpu, p, p.window_count());
  for (I cell = 0; cell < count; ++cell) {
    const int64_t b = cell / (p.tile_height * p.tile_width);
    const glance::Position at =
        glance::tile_pixel(p, b, cell / p.tile_width % p.tile_height, cell % p.tile_width);
    const glance::Pixel<I> pixel = glance::composed_pixel<I>(p, I(b), at.y, at.x);
    for (int64_t i = 0; i < c; ++i) {
      const double expected = call.input(b, at.y, at.x, i, p.fill);
      EXPECT_NEAR(widen(tiles[cell * c + i]), expected, 0);
      double got = 0;
      if (pixel.source == glance::Source::kOutside) got = p.fill;
      if (pixel.source == glance::Source::kBase) got = widen(call.base[pixel.index * c + i]);
      if (pixel.source == glance::Source::kWindow) got = widen(call.windows[pixel.index * c + i]);
      EXPECT_NEAR(got, expected, 0);
    }
  }

  Random random(seed);
  const std::vector<T> grad = glance_test::random_values<T>(random, count * c);
  std::vector<T> grad_base = glance_test::poison<T>(call.base.size());
  std::vector<T> grad_windows = glance_test::poison<T>(call.windows.size());
  p.grad_tiles = grad.data();
  p.grad_base = grad_base.data();
  p.grad_windows = grad_windows.data();
  glance_test::run_in_pieces(glance::scatter_base_cpu, p, p.batch * p.height);
  if (sizes.windows) {
    glance_test::run_in_pieces(glance::scatter_windows_cpu, p, p.window_count());
  }
  // The gather turned round: each tile's element belongs where it came from.
  std::vector<double> expected_base(call.base.size()), expected_windows(call.windows.size());
  for (int64_t cell = 0; cell < count; ++cell) {
    const int64_t b = cell / (p.tile_height * p.tile_width), g = call.geometry(b);
    const int64_t y = call.origins[g * 2] + cell / p.tile_width % p.tile_height;
    const int64_t x = call.origins[g * 2 + 1] + cell % p.tile_width;
    if (y < 0 || y >= p.height || x < 0 || x >= p.width) continue;
    for (int64_t i = 0; i < c; ++i) {
      const double value = widen(grad[cell * c + i]);
      if (!call.covers(b, y, x)) {
        expected_base[((b / p.holes * p.height + y) * p.width + x) * c + i] += value;
      } else if (sizes.windows) {
        const int64_t row = b * p.window_height + y - call.extent(b)[0];
        expected_windows[(row * p.window_width + x - call.extent(b)[1]) * c + i] += value;
      }
    }
  }
  const double tolerance = 40 * Type<T>::kEpsilon;  // up to 27 values of at most 2
  for (int64_t pixel = 0; pixel < p.batch * p.height * p.width; ++pixel) {
    for (int64_t i = 0; i < c; ++i) {
      const int64_t n = pixel / (p.height * p.width);
      A sum = 0;
      for (int64_t b = n * p.holes; b < (n + 1) * p.holes; ++b) {
        const I from =
            glance::tile_of_base_pixel<I>(p, I(b), pixel / p.width % p.height, pixel % p.width);
        if (from >= 0) sum += widen(grad[from * c + i]);
      }
      EXPECT_NEAR(widen(grad_base[pixel * c + i]), expected_base[pixel * c + i], tolerance);
      EXPECT_NEAR(widen(glance::narrow<T>(sum)), widen(grad_base[pixel * c + i]), 0);
    }
  }
  for (int64_t at = 0; sizes.windows && at < int64_t(call.windows.size()); ++at) {
    const int64_t cell = at / c, b = cell / (p.window_height * p.window_width);
    const I from = glance::tile_of_window_cell<I>(p, I(b), cell / p.window_width % p.window_height,
                                                  cell % p.window_width);
    EXPECT_NEAR(widen(grad_windows[at]), expected_windows[at], 0);
    EXPECT_NEAR(from < 0 ? 0.0 : widen(grad[from * c + at % c]), expected_windows[at], 0);
  }
}

// --- pooling
// ---------------------------------------------------------------------------------------

template <typename T, typename I>
void check_pool(const HoleSizes& sizes, uint64_t seed) {
  const HoleCase<T> call(sizes, seed);
  glance::HolePoolParams p;
  static_cast<glance::HoleWindowsParams&>(p) = call.conv;
  p.out_height = sizes.out_height;
  p.out_width = sizes.out_width;
  for (int axis = 0; axis < 2; ++axis) {
    p.kernel[axis] = call.conv.kernel[axis];
    p.stride[axis] = sizes.stride;
    p.padding[axis] = sizes.padding;
    p.dilation[axis] = sizes.dilation;
  }
  p.origins = call.origins.data();
  const int64_t c = p.channels, count = p.window_count() * p.out_height * p.out_width;
  std::vector<T> output = glance_test::poison<T>(count * c);
  p.output = output.data();
  glance_test::run_in_pieces(glance::hole_max_pool_cpu, p, p.window_count());
  const double nothing = -std::numeric_limits<double>::infinity();
  for (int64_t cell = 0; cell < count; ++cell) {
    const int64_t b = cell / (p.out_height * p.out_width), g = call.geometry(b);
    const int64_t i = cell / p.out_width % p.out_height, j = cell % p.out_width;
    const glance::WindowRow<I> row = glance::pool_row<I>(p, b, i, j);
    for (int64_t channel = 0; channel < c; ++channel) {
      double expected = nothing, got = nothing;
      for (int32_t y = 0; y < p.kernel[0]; ++y) {
        for (int32_t x = 0; x < p.kernel[1]; ++x) {
          const int32_t tap_y = y * int32_t(sizes.dilation), tap_x = x * int32_t(sizes.dilation);
          expected = std::max(
              expected,
              call.input(b, (call.origins[g * 2] + i) * sizes.stride - sizes.padding + tap_y,
                         (call.origins[g * 2 + 1] + j) * sizes.stride - sizes.padding + tap_x,
                         channel, nothing));
          const I place = glance::tap_place<I>(p, row, tap_y, tap_x);
          if (place == glance::kOutside<I>) continue;
          double value = 0;
          if (place >= 0) value = widen(call.base[place * c + channel]);
          if (place < 0 && place != glance::kHole<I>) {
            value = widen(call.windows[~place * c + channel]);
          }
          got = std::max(got, value);
        }
      }
      EXPECT_NEAR(widen(output[cell * c + channel]), expected, 0);
      EXPECT_NEAR(got, expected, 0);
    }
  }
}

// --- extents and cells that a CUDA op does not look at
// ---------------------------------------------

void check_wild_geometry(uint64_t seed) {
  glance_test::context = "wild geometry";
  Random random(seed);
  HoleSizes sizes = glance_test::random_sizes(random);
  sizes.own_geometry = false;
  HoleCase<float> call(sizes, seed);
  const auto wild = [&](int32_t& value) {
    const int32_t values[] = {INT32_MIN, -1000, -1, 0, 7, 1000, INT32_MAX};
    if (random.below(2)) value = values[random.below(7)];
  };
  for (int32_t& value : call.extents) wild(value);
  for (int32_t& value : call.origins) wild(value);
  for (int32_t& value : call.cells) wild(value);
  const HoleConvParams& p = call.conv;
  const int64_t base_count = p.batch * p.height * p.width;
  const int64_t window_count = p.window_count() * p.window_height * p.window_width;
  for (int64_t r = 0; r < (p.cell_count ? glance::conv_rows(p) : 0); ++r) {
    const auto row = glance::conv_row<int64_t>(p, r);
    const auto window_row = glance::window_row<int32_t>(p, row.window, row.y, row.x);
    if (row.window >= 0) {
      EXPECT(row.output >= 0 && row.output < p.window_count() * p.out_height * p.out_width);
      EXPECT(row.cell >= 0 && row.cell < int64_t(call.ratio.size()));
    }
    for (int32_t y = 0; y < p.kernel[0]; ++y) {
      for (int32_t x = 0; x < p.kernel[1]; ++x) {
        const int32_t place = glance::tap_place(p, window_row, y, x);
        if (row.window < 0) {
          EXPECT(place == glance::kOutside<int32_t>);
          continue;
        }
        const auto pixel = glance::composed_pixel<int64_t>(p, row.window, row.y + y, row.x + x);
        switch (pixel.source) {
          case glance::Source::kBase:
            EXPECT(place == pixel.index && place < base_count);
            break;
          case glance::Source::kWindow:
            EXPECT(~place == pixel.index && ~place < window_count);
            break;
          case glance::Source::kHole:
            EXPECT(place == glance::kHole<int32_t>);
            break;
          case glance::Source::kOutside:
            EXPECT(place == glance::kOutside<int32_t>);
        }
      }
    }
  }
}

// Every element of the weight stands in the packed one once; the rest is padding.
template <typename Tile>
void check_packing(int64_t channels, int64_t out_channels) {
  HoleConvParams p;
  p.batch = p.holes = p.geometry_rows = p.cell_count = 1;
  p.channels = channels;
  p.out_channels = out_channels;
  p.kernel[0] = 3;
  p.kernel[1] = 2;
  const glance::HoleConvWork w = glance::conv_work<Tile>(p);
  std::vector<int> seen(out_channels * channels * 6);
  const int64_t count = glance::conv_workspace<Tile>(p).packed / sizeof(typename Tile::T);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t from = glance::packed_source<typename Tile::T>(w, i);
    EXPECT(from >= -1 && from < int64_t(seen.size()));
    if (from >= 0) ++seen[from];
  }
  EXPECT(std::all_of(seen.begin(), seen.end(), [](int times) { return times == 1; }));
}

template <typename T>
void check_type() {
  for (uint64_t seed = 0; seed < 24; ++seed) {
    Random random(1000 + seed);
    const HoleSizes sizes =
        seed < std::size(kFixed) ? kFixed[seed] : glance_test::random_sizes(random);
    glance_test::context = name_of(sizes);
    check_cpu_convolution<T>(sizes, seed);
    check_cuda_convolution<T>(sizes, seed);
    if constexpr (std::is_same_v<T, float>) check_cuda_convolution<T>(sizes, seed, true);
    if constexpr (!std::is_same_v<T, double>) check_gradients<T>(sizes, seed);
    check_gather<T, int32_t>(sizes, seed);
    check_gather<T, int64_t>(sizes, seed);
    check_pool<T, int32_t>(sizes, seed);
    check_pool<T, int64_t>(sizes, seed);
  }
}

}  // namespace

int main() {
  check_type<float>();
  check_type<double>();
  check_type<Half>();
  check_type<BFloat16>();
  for (uint64_t seed = 0; seed < 60; ++seed) check_wild_geometry(seed);
  glance_test::context = "packing";
  check_packing<glance::ConvTile<Half, glance::Math::kTensor, 16, 8>>(3, 17);
  check_packing<glance::ConvTile<Half, glance::Math::kTensor, 128, 16>>(24, 130);
  check_packing<glance::ConvTile<float, glance::Math::kPlain, 32, 16>>(5, 40);
  return glance_test::finish("hole_windows");
}
