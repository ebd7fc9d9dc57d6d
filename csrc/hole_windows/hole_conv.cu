#include "hole_windows/hole_conv_tile.h"
#include "hole_windows/hole_windows.h"
#include "hole_windows/hole_windows_tile.h"
#include "implicit_gemm/gemm_cuda.cuh"

namespace glance {
namespace {

// One thread an output element: for devices and sizes that the tiles do not serve.
template <typename T>
__global__ void direct_kernel(HoleConvParams p, int64_t count) {
  using A = accumulate_t<T>;
  const int64_t columns = p.out_channels, channels = p.channels;
  const int64_t taps = p.kernel[0] * p.kernel[1];
  const T* base = static_cast<const T*>(p.base);
  const T* windows = static_cast<const T*>(p.windows);
  const T* bias = static_cast<const T*>(p.bias);
  GLANCE_GRID_STRIDE(int64_t, index, count) {
    const int64_t k = index % columns;
    const ConvRow<int64_t> row = conv_row<int64_t>(p, index / columns);
    if (row.window < 0) continue;
    const T* weight = static_cast<const T*>(p.weight) + k * channels * taps;
    A sum = 0;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const Pixel<int64_t> pixel =
          composed_pixel<int64_t>(p, row.window, row.y + tap / p.kernel[1] * p.dilation[0],
                                  row.x + tap % p.kernel[1] * p.dilation[1]);
      if (pixel.source != Source::kBase && pixel.source != Source::kWindow) continue;
      const T* input = (pixel.source == Source::kBase ? base : windows) + pixel.index * channels;
      for (int64_t c = 0; c < channels; ++c) sum += load(input + c) * load(weight + c * taps + tap);
    }
    A value = sum * static_cast<const A*>(p.ratio)[row.cell] + (bias ? load(bias + k) : A(0));
    if (value < A(0)) value = p.negative_slope == 0 ? A(0) : value * A(p.negative_slope);
    store(static_cast<T*>(p.output) + row.output * columns + k, value);
  }
}

cudaError_t direct_convolution(const HoleConvParams& p, cudaStream_t stream) {
  const int64_t count = conv_rows(p) * p.out_channels;
  dispatch_cuda(p.dtype, [&](auto tag) {
    direct_kernel<typename decltype(tag)::type>
        <<<blocks_for(count), kThreads, 0, stream>>>(p, count);
  });
  return cudaGetLastError();
}

template <typename Tile>
cudaError_t tiled_convolution(const HoleConvParams& p, cudaStream_t stream) {
  using T = typename Tile::T;
  const ConvWorkspace space = conv_workspace<Tile>(p);
  HoleConvWork w = conv_work<Tile>(p);
  char* copies = static_cast<char*>(p.packed) + space.packed;
  if (space.base > 0) {
    w.conv.base = copied_pixels<T>(w, p.base, copies, p.batch * p.height * p.width, stream);
  }
  if (space.windows > 0) {
    w.conv.windows = copied_pixels<T>(w, p.windows, copies + space.base,
                                      p.window_count() * p.window_height * p.window_width, stream);
  }
  return launch_gemm<Tile>(w, stream);
}

}  // namespace

int64_t hole_conv_workspace_bytes(const HoleConvParams& params) {
  int64_t bytes = 0;
  dispatch_conv_tile(params, [&](auto tag) {
    using Tile = typename decltype(tag)::type;
    if (fits_conv_tile<Tile>(params)) bytes = conv_workspace<Tile>(params).total();
  });
  return bytes;
}

int hole_conv_cuda(const HoleConvParams& params, void* stream) {
  if (params.cell_count == 0) return cudaSuccess;
  cudaError_t error = cudaSuccess;
  dispatch_conv_tile(params, [&](auto tag) {
    using Tile = typename decltype(tag)::type;
    if (fits_conv_tile<Tile>(params) && device_fits<Tile>(conv_work<Tile>(params))) {
      error = tiled_convolution<Tile>(params, static_cast<cudaStream_t>(stream));
    } else {
      error = direct_convolution(params, static_cast<cudaStream_t>(stream));
    }
  });
  return error;
}

}  // namespace glance
