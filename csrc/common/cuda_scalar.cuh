// The CUDA side of scalar.h: device element types, widening, and launch sizes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/scalar.h"

namespace glance {

__device__ __forceinline__ float load(const float* p) { return *p; }
__device__ __forceinline__ double load(const double* p) { return *p; }
__device__ __forceinline__ float load(const __half* p) { return __half2float(*p); }
__device__ __forceinline__ float load(const __nv_bfloat16* p) { return __bfloat162float(*p); }

__device__ __forceinline__ void store(float* p, float value) { *p = value; }
__device__ __forceinline__ void store(double* p, double value) { *p = value; }
__device__ __forceinline__ void store(__half* p, float value) { *p = __float2half_rn(value); }
__device__ __forceinline__ void store(__nv_bfloat16* p, float value) {
  *p = __float2bfloat16_rn(value);
}

// Calls `body` with a TypeTag of the CUDA element type that `dtype` names.
template <typename Body>
inline void dispatch_cuda(ScalarType dtype, Body&& body) {
  switch (dtype) {
    case ScalarType::kFloat32:
      return body(TypeTag<float>{});
    case ScalarType::kFloat64:
      return body(TypeTag<double>{});
    case ScalarType::kFloat16:
      return body(TypeTag<__half>{});
    case ScalarType::kBFloat16:
      return body(TypeTag<__nv_bfloat16>{});
  }
}

constexpr int kThreads = 256;

// Blocks for a grid-stride loop over `elements`; the loop covers what the cap leaves.
inline int blocks_for(int64_t elements) {
  const int64_t blocks = (elements + kThreads - 1) / kThreads;
  return static_cast<int>(blocks < (1 << 20) ? blocks : (1 << 20));
}

// A grid-stride loop with an index of type I, which is 32 bits wide where every index fits.
#define GLANCE_GRID_STRIDE(I, index, count)                                            \
  for (I index = static_cast<I>(blockIdx.x) * kThreads + threadIdx.x; index < (count); \
       index += static_cast<I>(gridDim.x) * kThreads)

// A 32-bit loop index must not overflow when it steps past the end by one whole grid.
inline bool fits_32_bits(int64_t elements) { return elements < (int64_t{1} << 30); }

}  // namespace glance
