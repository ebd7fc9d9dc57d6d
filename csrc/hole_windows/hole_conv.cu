#include "common/cuda_scalar.cuh"
#include "hole_windows/hole_conv_kernel.h"
#include "hole_windows/hole_conv_tile.h"
#include "hole_windows/hole_windows.h"
#include "hole_windows/hole_windows_tile.h"

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
};

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    convolve_kernel(const __grid_constant__ ConvWork w) {
#if __CUDA_ARCH__ >= 800  // asynchronous copies, bfloat16 and TF32; others take direct_kernel
  extern __shared__ __align__(16) char shared[];
  CudaBlock block;
  convolve_tile<Tile>(block, w, blockIdx.x, shared);
#endif
}

template <typename Tile>
__global__ void pack_weight_kernel(const __grid_constant__ ConvWork w, int64_t count) {
  using T = typename Tile::T;
  const T* weight = static_cast<const T*>(w.conv.weight);
  T* packed = static_cast<T*>(w.conv.packed);
  GLANCE_GRID_STRIDE(int64_t, index, count) {
    const int64_t from = packed_source<Tile>(w, index);
    T value = from < 0 ? T{} : weight[from];
    if constexpr (std::is_same_v<T, float> && Tile::kMath == Math::kTensor) {
      value = __uint_as_float(rounded_to_tf32(value));
    }
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

// Copies pixels into the workspace, padded with zero channels, and moves the pointer there.
template <typename T>
void pad_pixels(const void*& pixels, char* to, int64_t pixel_count, const HoleConvParams& p,
                int64_t padded, cudaStream_t stream) {
  const int64_t count = pixel_count * padded;
  pad_pixels_kernel<T><<<blocks_for(count), kThreads, 0, stream>>>(
      static_cast<const T*>(pixels), reinterpret_cast<T*>(to), p.channels, padded, count);
  pixels = to;
}

template <typename Tile>
cudaError_t tiled_convolution(const HoleConvParams& p, cudaStream_t stream) {
  using T = typename Tile::T;
  const ConvWorkspace space = conv_workspace<Tile>(p);
  ConvWork w = conv_work<Tile>(p);
  char* workspace = static_cast<char*>(p.packed);
  if (space.base > 0) {
    pad_pixels<T>(w.conv.base, workspace + space.packed, p.batch * p.height * p.width, p,
                  w.conv.channels, stream);
  }
  if (space.windows > 0) {
    pad_pixels<T>(w.conv.windows, workspace + space.packed + space.base,
                  p.window_count() * p.window_height * p.window_width, p, w.conv.channels, stream);
  }
  const int64_t packed = space.packed / static_cast<int64_t>(sizeof(T));
  pack_weight_kernel<Tile><<<blocks_for(packed), kThreads, 0, stream>>>(w, packed);
  const int shared = static_cast<int>(TileMemory<Tile>::bytes(w.taps));
  const cudaError_t error = cudaFuncSetAttribute(
      convolve_kernel<Tile>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  convolve_kernel<Tile><<<static_cast<unsigned>(w.blocks), Tile::kThreads, shared, stream>>>(w);
  return cudaGetLastError();
}

// Asks the driver, which answers without waiting for the device: allowed while a graph is captured.
template <typename Tile>
bool device_fits(const HoleConvParams& p) {
  int device = 0, generation = 0, shared = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  cudaDeviceGetAttribute(&generation, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return generation >= 8 && TileMemory<Tile>::bytes(p.kernel[0] * p.kernel[1]) <= shared;
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
    if (fits_conv_tile<Tile>(params) && device_fits<Tile>(params)) {
      error = tiled_convolution<Tile>(params, static_cast<cudaStream_t>(stream));
    } else {
      error = direct_convolution(params, static_cast<cudaStream_t>(stream));
    }
  });
  return error;
}

}  // namespace glance
