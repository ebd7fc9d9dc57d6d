#include "common/cuda_scalar.cuh"
#include "partial_conv/partial_conv.h"

namespace glance {
namespace {

// Where one element of a dense feature tensor of either layout stands.
template <typename I>
struct Place {
  I image, channel, pixel;
};

template <typename I>
__device__ __forceinline__ Place<I> place(I index, I channels, I pixels, bool channels_last) {
  if (channels_last) {
    const I rest = index / channels;
    return {rest / pixels, index % channels, rest % pixels};
  }
  const I plane = index / pixels;
  return {plane / channels, plane % channels, index % pixels};
}

template <typename T, typename I>
__global__ void mask_input_kernel(PartialConvParams p, I count) {
  const I pixels = static_cast<I>(p.in_height * p.in_width);
  const I channels = static_cast<I>(p.in_channels);
  const T* input = static_cast<const T*>(p.input);
  T* output = static_cast<T*>(p.masked_input);
  GLANCE_GRID_STRIDE(I, index, count) {
    const Place<I> at = place<I>(index, channels, pixels, p.channels_last);
    const I n = p.mask_batch == 1 ? 0 : at.image;
    const I c = p.mask_channels == 1 ? 0 : at.channel;
    const bool valid = p.mask[(n * static_cast<I>(p.mask_channels) + c) * pixels + at.pixel];
    if (valid) {
      output[index] = input[index];
    } else {
      store(output + index, accumulate_t<T>(0));
    }
  }
}

template <typename A, typename I>
__global__ void window_ratio_kernel(PartialConvParams p, I count) {
  const I groups = static_cast<I>(p.ratio_groups());
  const I channels = static_cast<I>(p.mask_channels) / groups;
  const I out_pixels = static_cast<I>(p.out_height * p.out_width);
  const int height = static_cast<int>(p.in_height), width = static_cast<int>(p.in_width);
  const A full = static_cast<A>(p.window_size());
  A* ratio = static_cast<A*>(p.ratio);
  GLANCE_GRID_STRIDE(I, index, count) {
    const I plane = index / out_pixels;  // image * groups + group
    const I pixel = index % out_pixels;
    const int y = static_cast<int>(pixel / p.out_width) * static_cast<int>(p.stride[0]) -
                  static_cast<int>(p.padding[0]);
    const int x = static_cast<int>(pixel % p.out_width) * static_cast<int>(p.stride[1]) -
                  static_cast<int>(p.padding[1]);
    const uint8_t* mask = p.mask + static_cast<int64_t>(plane) * channels * height * width;
    int64_t valid = 0;
    for (I c = 0; c < channels; ++c) {
      for (int i = 0; i < p.kernel[0]; ++i) {
        const int in_y = y + i * static_cast<int>(p.dilation[0]);
        if (in_y < 0 || in_y >= height) continue;
        const uint8_t* row = mask + (static_cast<int64_t>(c) * height + in_y) * width;
        for (int j = 0; j < p.kernel[1]; ++j) {
          const int in_x = x + j * static_cast<int>(p.dilation[1]);
          if (in_x >= 0 && in_x < width) valid += row[in_x];
        }
      }
    }
    ratio[index] = valid > 0 ? full / static_cast<A>(valid) : A(0);
  }
}

template <typename I>
__device__ __forceinline__ I ratio_index(const PartialConvParams& p, Place<I> at, I out_pixels) {
  const I groups = static_cast<I>(p.ratio_groups());
  const I n = p.mask_batch == 1 ? 0 : at.image;
  const I group = groups == 1 ? 0 : at.channel / (static_cast<I>(p.out_channels) / groups);
  return (n * groups + group) * out_pixels + at.pixel;
}

template <typename T, typename I>
__global__ void rescale_kernel(PartialConvParams p, I count) {
  using A = accumulate_t<T>;
  const I pixels = static_cast<I>(p.out_height * p.out_width);
  const A* ratio = static_cast<const A*>(p.ratio);
  const T* bias = static_cast<const T*>(p.bias);
  const T* plain = static_cast<const T*>(p.plain);
  T* output = static_cast<T*>(p.output);
  const A slope = static_cast<A>(p.negative_slope);
  GLANCE_GRID_STRIDE(I, index, count) {
    const Place<I> at = place<I>(index, static_cast<I>(p.out_channels), pixels, p.channels_last);
    const A r = ratio[ratio_index<I>(p, at, pixels)];
    A value = A(0);
    if (r != A(0)) value = load(plain + index) * r + (bias ? load(bias + at.channel) : A(0));
    if (value < A(0)) value = slope == A(0) ? A(0) : value * slope;
    store(output + index, value);
  }
}

template <typename T, typename I>
__global__ void rescale_backward_kernel(PartialConvBackwardParams p, I count) {
  using A = accumulate_t<T>;
  const I pixels = static_cast<I>(p.out_height * p.out_width);
  const A* ratio = static_cast<const A*>(p.ratio);
  const T* grad = static_cast<const T*>(p.grad_output);
  T* grad_conv = static_cast<T*>(p.grad_conv);
  GLANCE_GRID_STRIDE(I, index, count) {
    const Place<I> at = place<I>(index, static_cast<I>(p.out_channels), pixels, p.channels_last);
    const A r = ratio[ratio_index<I>(p, at, pixels)];
    store(grad_conv + index, r != A(0) ? load(grad + index) * r : A(0));
  }
}

// Launches `kernel<T, index type>` over `count` elements.
#define GLANCE_LAUNCH(kernel, T, params, count, stream)                                         \
  if (fits_32_bits(count)) {                                                                    \
    kernel<T, int32_t><<<blocks_for(count), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(  \
        params, static_cast<int32_t>(count));                                                   \
  } else {                                                                                      \
    kernel<T, int64_t>                                                                          \
        <<<blocks_for(count), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(params, count); \
  }

}  // namespace

int mask_input_cuda(const PartialConvParams& params, void* stream) {
  const int64_t count = params.batch * params.in_channels * params.in_height * params.in_width;
  if (count == 0) return cudaSuccess;
  dispatch_cuda(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    GLANCE_LAUNCH(mask_input_kernel, T, params, count, stream);
  });
  return cudaGetLastError();
}

int window_ratio_cuda(const PartialConvParams& params, void* stream) {
  const int64_t count =
      params.mask_batch * params.ratio_groups() * params.out_height * params.out_width;
  if (count == 0) return cudaSuccess;
  if (params.dtype == ScalarType::kFloat64) {
    GLANCE_LAUNCH(window_ratio_kernel, double, params, count, stream);
  } else {
    GLANCE_LAUNCH(window_ratio_kernel, float, params, count, stream);
  }
  return cudaGetLastError();
}

int rescale_cuda(const PartialConvParams& params, void* stream) {
  const int64_t count = params.batch * params.out_channels * params.out_height * params.out_width;
  if (count == 0) return cudaSuccess;
  dispatch_cuda(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    GLANCE_LAUNCH(rescale_kernel, T, params, count, stream);
  });
  return cudaGetLastError();
}

int rescale_backward_cuda(const PartialConvBackwardParams& params, void* stream) {
  const int64_t count = params.batch * params.out_channels * params.out_height * params.out_width;
  if (count == 0) return cudaSuccess;
  dispatch_cuda(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    GLANCE_LAUNCH(rescale_backward_kernel, T, params, count, stream);
  });
  return cudaGetLastError();
}

}  // namespace glance
