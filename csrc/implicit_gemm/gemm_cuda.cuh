// convolve_tile() on a GPU: the block that runs it, and what is launched before and around it.
#pragma once

#include <type_traits>

#include "common/cuda_scalar.cuh"
#include "implicit_gemm/gemm_kernel.h"
#include "implicit_gemm/gemm_tile.h"

namespace glance {
namespace {

__device__ __forceinline__ float load(const Half* p) {
  return __half2float(__ushort_as_half(p->bits));
}
__device__ __forceinline__ float load(const BFloat16* p) {
  return __bfloat162float(__ushort_as_bfloat16(p->bits));
}
using glance::load;

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ uint32_t rounded_to_tf32(float value) {
  uint32_t bits = 0;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(value));
#endif
  return bits;
}

// The calling thread's part of a warp: see convolve_tile(). What all lanes do together is one
// instruction, what each does is done by each.
struct CudaWarp {
  int index;
  int lane;

  template <typename V>
  struct Lanes {
    V value;
    __device__ __forceinline__ V& operator[](int) { return value; }
  };

  template <typename F>
  __device__ __forceinline__ void lanes(F&& body) {
    body(lane);
  }

  template <typename F>
  __device__ __forceinline__ bool any(F&& body) {
    return __any_sync(0xffffffffu, body(lane));
  }

  // Input is read again by neighbouring cells and taps, so 16 bytes go through the first cache too.
  template <int kBytes>
  __device__ __forceinline__ void copy(int, char* to, const char* from, bool some) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(shared_address(to)),
                 "l"(from), "n"(kBytes), "r"(some ? kBytes : 0)
                 : "memory");
  }
  __device__ __forceinline__ void end_copies() {
    asm volatile("cp.async.commit_group;\n" ::: "memory");
  }
  template <int kPending>
  __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
  }

  template <typename F>
  __device__ __forceinline__ void load_matrices(Lanes<Words>& to, F&& row) {
    uint32_t* w = to.value.word;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "r"(shared_address(row(lane)))
                 : "memory");
  }
  __device__ __forceinline__ void round_to_tf32(Lanes<Words>& words) {
    for (uint32_t& word : words.value.word) word = rounded_to_tf32(__uint_as_float(word));
  }

#define GLANCE_MMA(shape, types)                                                        \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." types                          \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                         \
               : "r"(a.value.word[0]), "r"(a.value.word[1]), "r"(a.value.word[2]),      \
                 "r"(a.value.word[3]), "r"(b.value.word[first]), "r"(b.value.word[first + 1]))

  // Four sums, from `at` on, of a 16x8 tile.
  template <typename T, typename Sums>
  __device__ __forceinline__ void multiply(Sums& sums, int at, const Lanes<Words>& a,
                                           const Lanes<Words>& b, int first) {
    float* c = sums.value.values + at;
    if constexpr (std::is_same_v<T, Half>) GLANCE_MMA("m16n8k16", "f16.f16");
    if constexpr (std::is_same_v<T, BFloat16>) GLANCE_MMA("m16n8k16", "bf16.bf16");
    if constexpr (std::is_same_v<T, float>) GLANCE_MMA("m16n8k8", "tf32.tf32");
  }
#undef GLANCE_MMA

  __device__ __forceinline__ double widened(double value) const { return value; }
  __device__ __forceinline__ float widened(float value) const { return value; }
  __device__ __forceinline__ float widened(Half value) const { return load(&value); }
  __device__ __forceinline__ float widened(BFloat16 value) const { return load(&value); }

  template <typename T>
  __device__ __forceinline__ T narrowed(accumulate_t<T> value) const {
    if constexpr (std::is_same_v<T, Half>) {
      return Half{__half_as_ushort(__float2half_rn(value))};
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      return BFloat16{__bfloat16_as_ushort(__float2bfloat16_rn(value))};
    } else {
      return value;
    }
  }
};

struct CudaBlock {
  using Warp = CudaWarp;

  template <typename V>
  struct Registers {
    Warp::Lanes<V> value;
    __device__ __forceinline__ Warp::Lanes<V>& operator[](int) { return value; }
  };

  template <typename F>
  __device__ __forceinline__ void phase(F&& body) {
    Warp warp{static_cast<int>(threadIdx.x) / 32, static_cast<int>(threadIdx.x) % 32};
    body(warp);
    __syncthreads();
  }
  template <typename F>
  __device__ __forceinline__ bool any(F&& body) {
    Warp warp{static_cast<int>(threadIdx.x) / 32, static_cast<int>(threadIdx.x) % 32};
    return __syncthreads_or(body(warp));
  }
};

template <typename Tile, typename Work>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    convolve_kernel(const __grid_constant__ Work w) {
#if __CUDA_ARCH__ >= 800  // asynchronous copies, bfloat16 and TF32: see device_fits()
  extern __shared__ __align__(16) char shared[];
  CudaBlock block;
  convolve_tile<Tile>(block, w, blockIdx.x, shared);
#endif
}

template <typename T, bool round>
__global__ void pack_weight_kernel(const __grid_constant__ GemmWork w, int64_t count) {
  const T* weight = static_cast<const T*>(w.weight);
  T* packed = static_cast<T*>(w.packed);
  GLANCE_GRID_STRIDE(int64_t, index, count) {
    const int64_t from = packed_source<T>(w, index);
    T value = from < 0 ? T{} : weight[from];
    if constexpr (round) value = __uint_as_float(rounded_to_tf32(value));
    packed[index] = value;
  }
}

template <typename T>
__global__ void pad_pixels_kernel(const T* from, T* to, int64_t channels, int64_t padded,
                                  int64_t count) {
  GLANCE_GRID_STRIDE(int64_t, index, count) {
    const int64_t source = unpadded(index, channels, padded);
    to[index] = source < 0 ? T{} : from[source];
  }
}

// Copies `count` pixels to workspace, padded with zero channels: see copy_bytes().
template <typename T>
const void* copied_pixels(const GemmWork& w, const void* pixels, void* to, int64_t count,
                          cudaStream_t stream) {
  const int64_t elements = count * w.groups * w.channels;
  pad_pixels_kernel<T><<<blocks_for(elements), kThreads, 0, stream>>>(
      static_cast<const T*>(pixels), static_cast<T*>(to), w.groups * w.weight_channels,
      w.groups * w.channels, elements);
  return to;
}

// Packs the weight and multiplies.
template <typename Tile, typename Work>
cudaError_t launch_gemm(const Work& w, cudaStream_t stream) {
  using T = typename Tile::T;
  constexpr bool kRound = std::is_same_v<T, float> && Tile::kMath == Math::kTensor;
  const int64_t packed = w.packed_bytes() / static_cast<int64_t>(sizeof(T));
  pack_weight_kernel<T, kRound><<<blocks_for(packed), kThreads, 0, stream>>>(w, packed);
  const int shared = static_cast<int>(TileMemory<Tile, Work>::bytes(w.taps, w.steps));
  const cudaError_t error = cudaFuncSetAttribute(
      convolve_kernel<Tile, Work>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  convolve_kernel<Tile, Work>
      <<<static_cast<unsigned>(w.blocks), Tile::kThreads, shared, stream>>>(w);
  return cudaGetLastError();
}

// Asks the driver, which answers without waiting for the device: allowed while a graph is captured.
template <typename Tile, typename Work>
bool device_fits(const Work& w) {
  int device = 0, generation = 0, shared = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  cudaDeviceGetAttribute(&generation, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return generation >= 8 && TileMemory<Tile, Work>::bytes(w.taps, w.steps) <= shared;
}

}  // namespace
}  // namespace glance
