#include "common/cuda_scalar.cuh"
#include "patch_scores/grid_work.h"
#include "patch_scores/patch_grid.h"

namespace glance {
namespace {

// What a thread of a pass reads and writes is in grid_work.h, which the host's tests run too.

template <typename T, bool kMax>
__global__ void columns_kernel(PatchGridParams p, int32_t* best, int64_t count) {
  GLANCE_GRID_STRIDE(int64_t, index, count) { spread_column<T, kMax>(p, index, best); }
}

template <typename T, bool kMax>
__global__ void rows_kernel(PatchGridParams p, int32_t* best, int64_t count) {
  GLANCE_GRID_STRIDE(int64_t, index, count) { spread_rows<T, kMax>(p, index, best); }
}

template <typename T, bool kMax>
__global__ void gather_rows_kernel(PatchGridBackwardParams p, int64_t count) {
  GLANCE_GRID_STRIDE(int64_t, index, count) { gather_rows<T, kMax>(p, index); }
}

template <typename T, bool kMax>
__global__ void gather_columns_kernel(PatchGridBackwardParams p, int64_t count) {
  GLANCE_GRID_STRIDE(int64_t, index, count) { gather_columns<T, kMax>(p, index); }
}

// Pixels of a block for a few images. The scores of some patches of a row at a time, which all
// threads read, are in shared memory.
template <typename T>
__global__ void __launch_bounds__(kThreads) idw_kernel(PatchGridParams p) {
  using A = accumulate_t<T>;
  __shared__ A scores[kIdwColumns * kIdwImages];
  const int64_t pixels = p.rows.size * p.columns.size;
  const int64_t blocks = (pixels + kThreads - 1) / kThreads;
  const int64_t tasks = blocks * ((p.batch + kIdwImages - 1) / kIdwImages);
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t pixel = task % blocks * kThreads + threadIdx.x;
    const int64_t n = task / blocks * kIdwImages;
    const bool inside = pixel < pixels;
    const int64_t y = inside ? pixel / p.columns.size : 0;
    const int64_t x = inside ? pixel % p.columns.size : 0;
    A total[kIdwImages] = {};
    for (int64_t i = 0; i < p.rows.count; ++i) {
      A sum[kIdwImages] = {};
      for (int64_t j = 0; j < p.columns.count; j += kIdwColumns) {
        const int64_t columns =
            p.columns.count - j < kIdwColumns ? p.columns.count - j : int64_t{kIdwColumns};
        __syncthreads();  // the last columns have been read
        for (int64_t k = threadIdx.x; k < columns * kIdwImages; k += kThreads) {
          scores[k] = idw_score<T>(p, n + k % kIdwImages, i, j + k / kIdwImages);
        }
        __syncthreads();
        if (inside) add_idw_columns(p, y, x, i, j, columns, scores, sum);
      }
      for (int m = 0; m < kIdwImages; ++m) total[m] += sum[m];
    }
    if (inside) store_idw<T>(p, n, y, x, total);
  }
}

template <typename T>
__global__ void share_kernel(PatchGridBackwardParams p, int64_t count) {
  GLANCE_GRID_STRIDE(int64_t, index, count) { share_gradient<T>(p, index); }
}

// One block for a few neighbouring patches and images: threads stride over the pixels, then add up
// in a fixed order.
template <typename T>
__global__ void __launch_bounds__(kThreads) idw_backward_kernel(PatchGridBackwardParams p) {
  using A = accumulate_t<T>;
  constexpr int kSums = kIdwPatches * kIdwPatches;
  __shared__ A partial[kThreads];
  const IdwBackwardTasks tasks(p);
  for (int64_t task = blockIdx.x; task < tasks.count(); task += gridDim.x) {
    A sum[kSums] = {};
    int64_t x = threadIdx.x;
    for (int64_t y = 0; y < p.rows.size; x += kThreads) {
      for (; x >= p.columns.size && y < p.rows.size; x -= p.columns.size) ++y;
      if (y < p.rows.size) tasks.template add_pixel<A>(task, y, x, sum);
    }
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      partial[threadIdx.x] = sum[k];
      __syncthreads();
      for (int half = kThreads / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
        __syncthreads();
      }
      if (threadIdx.x == 0) tasks.template store_sum<T>(task, k, partial[0]);
      __syncthreads();  // before the next sum overwrites partial
    }
  }
}

template <typename T, bool kMax>
void launch_spread(const PatchGridParams& p, int32_t* best, cudaStream_t stream) {
  const int64_t columns = p.batch * p.rows.count * p.columns.size;
  int32_t* none = nullptr;
  columns_kernel<T, kMax><<<blocks_for(columns), kThreads, 0, stream>>>(p, none, columns);
  const int64_t rows = rows_work(p);
  rows_kernel<T, kMax><<<blocks_for(rows), kThreads, 0, stream>>>(p, best, rows);
}

// The largest of each pixel, by row and column of its patch; both passes once more.
template <typename T>
void launch_best(const PatchGridBackwardParams& p, cudaStream_t stream) {
  const int64_t columns = p.batch * p.rows.count * p.columns.size, rows = rows_work(p);
  columns_kernel<T, true><<<blocks_for(columns), kThreads, 0, stream>>>(p, p.best_column, columns);
  rows_kernel<T, true><<<blocks_for(rows), kThreads, 0, stream>>>(p, p.best, rows);
}

template <typename T, bool kMax>
void launch_gather(const PatchGridBackwardParams& p, cudaStream_t stream) {
  const int64_t rows = p.batch * p.rows.count * p.columns.size;
  gather_rows_kernel<T, kMax><<<blocks_for(rows), kThreads, 0, stream>>>(p, rows);
  const int64_t columns = p.batch * p.rows.count * p.columns.count;
  gather_columns_kernel<T, kMax><<<blocks_for(columns), kThreads, 0, stream>>>(p, columns);
}

int capped(int64_t blocks) { return static_cast<int>(blocks < (1 << 20) ? blocks : (1 << 20)); }

}  // namespace

int aggregate_grid_cuda(const PatchGridParams& params, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const int64_t pixels = params.rows.size * params.columns.size;
  if (params.batch == 0) return cudaSuccess;
  dispatch_cuda(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (params.mode == PatchMode::kIdw) {
      const int64_t groups = (params.batch + kIdwImages - 1) / kIdwImages;
      const int64_t blocks = (pixels + kThreads - 1) / kThreads * groups;
      idw_kernel<T><<<capped(blocks), kThreads, 0, stream>>>(params);
    } else if (params.mode == PatchMode::kMax) {
      launch_spread<T, true>(params, nullptr, stream);
    } else {
      launch_spread<T, false>(params, nullptr, stream);
    }
  });
  return cudaGetLastError();
}

int aggregate_grid_backward_cuda(const PatchGridBackwardParams& params, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  if (params.batch == 0) return cudaSuccess;
  dispatch_cuda(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (params.mode == PatchMode::kIdw) {
      const int64_t pixels = params.batch * params.rows.size * params.columns.size;
      share_kernel<T><<<blocks_for(pixels), kThreads, 0, stream>>>(params, pixels);
      idw_backward_kernel<T>
          <<<capped(IdwBackwardTasks(params).count()), kThreads, 0, stream>>>(params);
    } else if (params.mode == PatchMode::kMax) {
      launch_best<T>(params, stream);
      launch_gather<T, true>(params, stream);
    } else {
      launch_gather<T, false>(params, stream);
    }
  });
  return cudaGetLastError();
}

}  // namespace glance
