#include <algorithm>

#include "common/micro_kernel.h"
#include "partial_conv/partial_conv.h"
#include "partial_conv/window_counts.h"

namespace glance {
namespace {

// A row of output pixels that share n, and for NCHW also the channel.
struct OutputRow {
  int64_t image, channel, y;
};

OutputRow output_row(const PartialConvParams& p, int64_t row) {
  if (p.channels_last) return {row / p.out_height, 0, row % p.out_height};
  const int64_t plane = row / p.out_height;
  return {plane / p.out_channels, plane % p.out_channels, row % p.out_height};
}

// The ratios of one output row for the group that `channel` belongs to.
template <typename A>
const A* ratio_row(const PartialConvParams& p, int64_t image, int64_t channel, int64_t y) {
  const int64_t n = p.mask_batch == 1 ? 0 : image;
  const int64_t groups = p.ratio_groups();
  const int64_t group = groups == 1 ? 0 : channel / (p.out_channels / groups);
  const A* ratio = static_cast<const A*>(p.ratio);
  return ratio + ((n * groups + group) * p.out_height + y) * p.out_width;
}

// Applies `pixel(value_in, ratio, channel) -> value_out` to one output row of either layout.
template <typename T, typename Pixel>
void for_output_row(const PartialConvParams& p, int64_t row, const T* source, T* target,
                    Pixel&& pixel) {
  using A = accumulate_t<T>;
  const OutputRow at = output_row(p, row);
  if (!p.channels_last) {
    const A* ratio = ratio_row<A>(p, at.image, at.channel, at.y);
    const int64_t start = row * p.out_width;
    for (int64_t x = 0; x < p.out_width; ++x) {
      target[start + x] = pixel(source[start + x], ratio[x], at.channel);
    }
    return;
  }
  const int64_t groups = p.ratio_groups();
  const int64_t group_channels = p.out_channels / groups;
  for (int64_t group = 0; group < groups; ++group) {
    const A* ratio = ratio_row<A>(p, at.image, group * group_channels, at.y);
    for (int64_t x = 0; x < p.out_width; ++x) {
      const int64_t start = (row * p.out_width + x) * p.out_channels;
      for (int64_t k = group * group_channels; k < (group + 1) * group_channels; ++k) {
        target[start + k] = pixel(source[start + k], ratio[x], k);
      }
    }
  }
}

template <typename T>
void mask_rows(const PartialConvParams& p, int64_t begin, int64_t end) {
  const T* input = static_cast<const T*>(p.input);
  T* output = static_cast<T*>(p.masked_input);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t y = row % p.in_height;
    const int64_t plane = row / p.in_height;
    const int64_t image = p.channels_last ? plane : plane / p.in_channels;
    const int64_t n = p.mask_batch == 1 ? 0 : image;
    if (!p.channels_last) {
      const int64_t c = p.mask_channels == 1 ? 0 : plane % p.in_channels;
      const uint8_t* mask = p.mask + ((n * p.mask_channels + c) * p.in_height + y) * p.in_width;
      for (int64_t x = 0; x < p.in_width; ++x) {
        const int64_t i = row * p.in_width + x;
        output[i] = mask[x] ? input[i] : T{};
      }
      continue;
    }
    const int64_t mask_plane = p.in_height * p.in_width;
    const uint8_t* mask = p.mask + n * p.mask_channels * mask_plane + y * p.in_width;
    if (p.mask_channels == 1) {
      const int64_t size = p.in_width * p.in_channels;
      if (input != output) std::copy_n(input + row * size, size, output + row * size);
      for (int64_t x = 0; x < p.in_width; ++x) {
        if (mask[x]) continue;
        T* pixel = output + row * size + x * p.in_channels;
        std::fill(pixel, pixel + p.in_channels, T{});
      }
      continue;
    }
    for (int64_t x = 0; x < p.in_width; ++x) {
      const int64_t start = (row * p.in_width + x) * p.in_channels;
      for (int64_t c = 0; c < p.in_channels; ++c) {
        const bool valid = mask[(p.mask_channels == 1 ? 0 : c) * mask_plane + x];
        output[start + c] = valid ? input[start + c] : T{};
      }
    }
  }
}

// Calls `row(index, counts)` for rows [begin, end) of windows.
template <typename Row>
void for_window_rows(const PartialConvParams& p, int64_t begin, int64_t end, Row&& row) {
  WindowCounts counts(p);
  const int64_t groups = p.ratio_groups();
  for (int64_t i = begin; i < end; ++i) {
    const int64_t plane = i / p.out_height;
    row(counts, i, counts.row(plane / groups, plane % groups, i % p.out_height));
  }
}

template <typename A>
void ratio_rows_of(const PartialConvParams& p, int64_t begin, int64_t end) {
  A* ratio = static_cast<A*>(p.ratio);
  for_window_rows(p, begin, end, [&](const WindowCounts& counts, int64_t i, const int32_t* row) {
    counts.ratios(row, 0, p.out_width, ratio + i * p.out_width);
  });
}

}  // namespace

int64_t input_rows(const PartialConvParams& p) {
  return p.batch * (p.channels_last ? 1 : p.in_channels) * p.in_height;
}

int64_t ratio_rows(const PartialConvParams& p) {
  return p.mask_batch * p.ratio_groups() * p.out_height;
}

int64_t output_rows(const PartialConvParams& p) {
  return p.batch * (p.channels_last ? 1 : p.out_channels) * p.out_height;
}

void mask_input_cpu(const PartialConvParams& params, int64_t begin, int64_t end) {
  dispatch_cpu(params.dtype,
               [&](auto tag) { mask_rows<typename decltype(tag)::type>(params, begin, end); });
}

void window_ratio_cpu(const PartialConvParams& params, int64_t begin, int64_t end) {
  if (params.dtype == ScalarType::kFloat64) return ratio_rows_of<double>(params, begin, end);
  ratio_rows_of<float>(params, begin, end);
}

void window_valid_cpu(const PartialConvParams& params, int64_t begin, int64_t end) {
  for_window_rows(params, begin, end, [&](const WindowCounts&, int64_t i, const int32_t* counts) {
    uint8_t* valid = params.valid + i * params.out_width;
    for (int64_t x = 0; x < params.out_width; ++x) valid[x] = counts[x] > 0;
  });
}

void rescale_cpu(const PartialConvParams& params, int64_t begin, int64_t end) {
  dispatch_cpu(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulate_t<T>;
    const T* plain = static_cast<const T*>(params.plain);
    T* output = static_cast<T*>(params.output);
    const T* bias = static_cast<const T*>(params.bias);
    const A slope = static_cast<A>(params.negative_slope);
    for (int64_t row = begin; row < end; ++row) {
      for_output_row<T>(params, row, plain, output, [=](T value, A ratio, int64_t k) {
        // Computed for empty windows too and then left out, which compilers turn into vectors.
        const A sum = widen(value) * ratio + (bias ? widen(bias[k]) : A{0});
        const A scaled = sum * slope;
        const A below = slope == A{0} ? A{0} : scaled;
        const A result = sum < A{0} ? below : sum;
        return narrow<T>(ratio == A{0} ? A{0} : result);
      });
    }
  });
}

void rescale_backward_cpu(const PartialConvBackwardParams& params, int64_t begin, int64_t end) {
  dispatch_cpu(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulate_t<T>;
    const T* source = static_cast<const T*>(params.grad_output);
    T* target = static_cast<T*>(params.grad_conv);
    for (int64_t row = begin; row < end; ++row) {
      for_output_row<T>(params, row, source, target, [](T value, A ratio, int64_t) {
        const A scaled = widen(value) * ratio;
        return narrow<T>(ratio == A{0} ? A{0} : scaled);
      });
    }
  });
}

bool has_fused(const PartialConvParams& p) { return p.dtype != ScalarType::kFloat64; }

bool prefers_fused(const PartialConvParams& p, bool of_weight) {
  if (!has_fused(p) || best_instruction_set() == InstructionSet::kPlain) return false;
  // Of a vector of AVX-512 groups of few channels leave most empty.
  const bool wide = best_instruction_set() >= InstructionSet::kAvx512;
  const int64_t least = wide && (!of_weight || p.channels_last) ? 16 : 4;
  return p.out_channels / p.groups >= least || p.groups == 1 || has_depthwise(p);
}

}  // namespace glance
