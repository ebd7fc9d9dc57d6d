#include <type_traits>

#include "common/cuda_scalar.cuh"
#include "patch_scores/idw_weight.h"
#include "patch_scores/patch_scores.h"

namespace glance {
namespace {

// Whether the patch, which covers the pixel's row, covers its column too.
__device__ __forceinline__ bool covers_column(const PatchScoresParams& p, int64_t patch,
                                              int64_t x) {
  const int64_t offset = x - p.origins[2 * patch + 1];
  return offset >= 0 && offset < p.patch_width;
}

template <typename A>
__device__ __forceinline__ A window_weight(const PatchScoresParams& p, int64_t patch, int64_t y,
                                           int64_t x) {
  return static_cast<const A*>(p.weight_y)[y - p.origins[2 * patch]] *
         static_cast<const A*>(p.weight_x)[x - p.origins[2 * patch + 1]];
}

template <typename A>
__device__ __forceinline__ A distance_to(const PatchScoresParams& p, int64_t patch, int64_t y,
                                         int64_t x) {
  return squared_distance<A>(y, x, p.origins[2 * patch], p.origins[2 * patch + 1], p.patch_height,
                             p.patch_width);
}

template <typename A>
__device__ __forceinline__ A nearest_centre(const PatchScoresParams& p, int64_t y, int64_t x) {
  A nearest = distance_to<A>(p, 0, y, x);
  for (int64_t patch = 1; patch < p.patches; ++patch) {
    const A squared = distance_to<A>(p, patch, y, x);
    nearest = squared < nearest ? squared : nearest;
  }
  return nearest;
}

// The first patch with the largest score over a pixel; a NaN wins over any number.
template <typename T>
__device__ __forceinline__ int32_t best_patch(const PatchScoresParams& p, const T* scores,
                                              int64_t y, int64_t x) {
  using A = accumulate_t<T>;
  int32_t best = -1;
  A largest = A(0);
  for (int64_t i = p.row_begin[y]; i < p.row_begin[y + 1]; ++i) {
    const int64_t patch = p.row_patches[i];
    if (!covers_column(p, patch, x)) continue;
    const A score = load(scores + patch);
    const bool nan_wins = score != score && largest == largest;
    if (best < 0 || score > largest || nan_wins) {
      largest = score;
      best = static_cast<int32_t>(patch);
    }
  }
  return best;
}

template <typename T, PatchMode kMode>
__global__ void aggregate_kernel(PatchScoresParams p, int64_t count) {
  using A = accumulate_t<T>;
  T* map = static_cast<T*>(p.map);
  GLANCE_GRID_STRIDE(int64_t, index, count) {
    const int64_t x = index % p.width;
    const int64_t y = index / p.width % p.height;
    const T* scores = static_cast<const T*>(p.scores) + index / p.width / p.height * p.patches;
    if constexpr (kMode == PatchMode::kMax) {
      map[index] = scores[best_patch<T>(p, scores, y, x)];
    } else {
      A sum = A(0), total = A(0);
      if constexpr (kMode == PatchMode::kWindow) {
        for (int64_t i = p.row_begin[y]; i < p.row_begin[y + 1]; ++i) {
          const int64_t patch = p.row_patches[i];
          if (!covers_column(p, patch, x)) continue;
          const A weight = window_weight<A>(p, patch, y, x);
          sum += weight * load(scores + patch);
          total += weight;
        }
      } else {
        const A nearest = nearest_centre<A>(p, y, x);
        const A half_power = static_cast<A>(p.power / 2);
        for (int64_t patch = 0; patch < p.patches; ++patch) {
          const A squared = distance_to<A>(p, patch, y, x);
          if (idw_excludes<A>(nearest, squared)) continue;
          const A weight = idw_weight<A>(nearest, squared, half_power);
          sum += weight * load(scores + patch);
          total += weight;
        }
      }
      store(map + index, sum / total);
    }
  }
}

template <typename T, PatchMode kMode>
__global__ void prepare_kernel(PatchScoresBackwardParams p, int64_t count) {
  using A = accumulate_t<T>;
  A* norm = static_cast<A*>(p.norm);
  GLANCE_GRID_STRIDE(int64_t, index, count) {
    const int64_t x = index % p.width;
    const int64_t y = index / p.width % p.height;
    if constexpr (kMode == PatchMode::kMax) {
      const T* scores = static_cast<const T*>(p.scores) + index / p.width / p.height * p.patches;
      p.best[index] = best_patch<T>(p, scores, y, x);
    } else if constexpr (kMode == PatchMode::kWindow) {
      A total = A(0);
      for (int64_t i = p.row_begin[y]; i < p.row_begin[y + 1]; ++i) {
        const int64_t patch = p.row_patches[i];
        if (covers_column(p, patch, x)) total += window_weight<A>(p, patch, y, x);
      }
      norm[index] = total;
    } else {
      const A nearest = nearest_centre<A>(p, y, x);
      const A half_power = static_cast<A>(p.power / 2);
      A total = A(0);
      for (int64_t patch = 0; patch < p.patches; ++patch) {
        total += idw_weight<A>(nearest, distance_to<A>(p, patch, y, x), half_power);
      }
      norm[index] = nearest;
      norm[p.height * p.width + index] = total;
    }
  }
}

// One block a patch and image: threads stride over the pixels, then add up in a fixed order.
template <typename T, PatchMode kMode>
__global__ void backward_kernel(PatchScoresBackwardParams p) {
  using A = accumulate_t<T>;
  __shared__ A partial[kThreads];
  const int64_t pixels = p.height * p.width;
  const A* norm = static_cast<const A*>(p.norm);
  for (int64_t task = blockIdx.x; task < p.batch * p.patches; task += gridDim.x) {
    const int64_t n = task / p.patches, patch = task % p.patches;
    const T* grad = static_cast<const T*>(p.grad_map) + n * pixels;
    const int64_t row = p.origins[2 * patch], column = p.origins[2 * patch + 1];
    const int64_t reach = kMode == PatchMode::kIdw ? pixels : p.patch_height * p.patch_width;
    A sum = A(0);
    for (int64_t i = threadIdx.x; i < reach; i += kThreads) {
      if constexpr (kMode == PatchMode::kIdw) {
        const A squared = distance_to<A>(p, patch, i / p.width, i % p.width);
        if (idw_excludes<A>(norm[i], squared)) continue;
        const A weight = idw_weight<A>(norm[i], squared, static_cast<A>(p.power / 2));
        sum += weight / norm[pixels + i] * load(grad + i);
      } else {
        const int64_t y = row + i / p.patch_width, x = column + i % p.patch_width;
        const int64_t pixel = y * p.width + x;
        if constexpr (kMode == PatchMode::kMax) {
          if (p.best[n * pixels + pixel] == patch) sum += load(grad + pixel);
        } else {
          sum += window_weight<A>(p, patch, y, x) / norm[pixel] * load(grad + pixel);
        }
      }
    }
    partial[threadIdx.x] = sum;
    __syncthreads();
    for (int half = kThreads / 2; half > 0; half /= 2) {
      if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
      __syncthreads();
    }
    if (threadIdx.x == 0) store(static_cast<T*>(p.grad_scores) + task, partial[0]);
    __syncthreads();  // before the next task writes partial
  }
}

template <typename Body>
void dispatch_mode(PatchMode mode, Body&& body) {
  switch (mode) {
    case PatchMode::kWindow:
      return body(std::integral_constant<PatchMode, PatchMode::kWindow>{});
    case PatchMode::kMax:
      return body(std::integral_constant<PatchMode, PatchMode::kMax>{});
    case PatchMode::kIdw:
      return body(std::integral_constant<PatchMode, PatchMode::kIdw>{});
  }
}

}  // namespace

int aggregate_cuda(const PatchScoresParams& params, void* stream) {
  const int64_t count = params.batch * params.height * params.width;
  if (count == 0) return cudaSuccess;
  dispatch_cuda(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_mode(params.mode, [&](auto mode) {
      constexpr PatchMode kMode = decltype(mode)::value;
      aggregate_kernel<T, kMode>
          <<<blocks_for(count), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(params, count);
    });
  });
  return cudaGetLastError();
}

int aggregate_backward_cuda(const PatchScoresBackwardParams& params, void* stream) {
  const int64_t pixels = params.height * params.width;
  const int64_t count = params.mode == PatchMode::kMax ? params.batch * pixels : pixels;
  const int64_t tasks = params.batch * params.patches;
  if (count == 0 || tasks == 0) return cudaSuccess;
  dispatch_cuda(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_mode(params.mode, [&](auto mode) {
      constexpr PatchMode kMode = decltype(mode)::value;
      prepare_kernel<T, kMode>
          <<<blocks_for(count), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(params, count);
      const int blocks = static_cast<int>(tasks < (1 << 20) ? tasks : (1 << 20));
      backward_kernel<T, kMode><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(params);
    });
  });
  return cudaGetLastError();
}

}  // namespace glance
