#include "implicit_gemm/gemm_cuda.cuh"
#include "partial_conv/fused_tile.h"
#include "partial_conv/partial_conv.h"

namespace glance {
namespace {

template <typename T>
__global__ void pack_depthwise_kernel(const __grid_constant__ SlideWork w, int64_t count) {
  GLANCE_GRID_STRIDE(int64_t, index, count) {
    static_cast<T*>(w.packed)[index] = static_cast<const T*>(w.weight)[depthwise_source(w, index)];
  }
}

template <typename T, int vector>
__global__ void depthwise_kernel(const __grid_constant__ SlideWork w, int64_t count) {
  CudaWarp warp{};
  GLANCE_GRID_STRIDE(int64_t, index, count) { depthwise_run<T, vector>(warp, w, index); }
}

template <typename T>
cudaError_t depthwise(const PartialConvBackwardParams& p, Sweep sweep, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const SlideWork w = depthwise_work(p, sweep, sizeof(T));
  const int64_t packed = w.taps * w.out_channels;
  const int64_t count = w.batch * w.target[0] * w.target[1] * w.out_channels;
  pack_depthwise_kernel<T><<<blocks_for(packed), kThreads, 0, stream>>>(w, packed);
  if (w.out_channels % kVector == 0 && reinterpret_cast<uintptr_t>(w.pixels) % 16 == 0) {
    depthwise_kernel<T, kVector>
        <<<blocks_for(count / kVector), kThreads, 0, stream>>>(w, count / kVector);
  } else {
    depthwise_kernel<T, 1><<<blocks_for(count), kThreads, 0, stream>>>(w, count);
  }
  return cudaGetLastError();
}

template <typename Tile>
cudaError_t tiled(const PartialConvBackwardParams& p, Sweep sweep, cudaStream_t stream) {
  SlideWork w = slide_work<Tile>(p, sweep);
  if (copy_bytes(w, w.pixels, w.source_count()) > 0) {
    w.pixels = copied_pixels<typename Tile::T>(
        w, w.pixels, static_cast<char*>(w.packed) + w.packed_bytes(), w.source_count(), stream);
  }
  return launch_gemm<Tile>(w, stream);
}

}  // namespace

int64_t fused_cuda_bytes(const PartialConvBackwardParams& params, Sweep sweep) {
  int64_t bytes = -1;
  if (is_depthwise(params)) {
    const int64_t size = params.dtype == ScalarType::kFloat64 ? 8 : 4;
    const int64_t packed = params.kernel[0] * params.kernel[1] * params.in_channels * size;
    return fits_slide(params) ? divide_up(packed, 16) * 16 : -1;
  }
  dispatch_slide_tile(params, sweep, [&](auto tag) {
    using Tile = typename decltype(tag)::type;
    if (!fits_slide_tile<Tile>(params, sweep)) return;
    const SlideWork w = slide_work<Tile>(params, sweep);
    if (device_fits<Tile>(w)) bytes = w.packed_bytes() + copy_bytes(w, w.pixels, w.source_count());
  });
  return bytes;
}

int fused_conv_cuda(const PartialConvBackwardParams& params, Sweep sweep, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaSuccess;
  if (is_depthwise(params)) {
    dispatch_cpu(params.dtype, [&](auto tag) {
      error = depthwise<typename decltype(tag)::type>(params, sweep, on);
    });
    return error;
  }
  dispatch_slide_tile(params, sweep, [&](auto tag) {
    error = tiled<typename decltype(tag)::type>(params, sweep, on);
  });
  return error;
}

}  // namespace glance
