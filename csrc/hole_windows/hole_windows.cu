#include <cmath>
#include <initializer_list>
#include <type_traits>

#include "common/cuda_scalar.cuh"
#include "hole_windows/hole_windows.h"
#include "hole_windows/hole_windows_tile.h"

namespace glance {
namespace {

// Gathering copies bits: as many at a time as divide a pixel, whatever the dtype.
template <typename Chunk, typename I>
__global__ void gather_kernel(HoleGatherParams p, Chunk fill, I chunks, I count) {
  const I width = static_cast<I>(p.tile_width), height = static_cast<I>(p.tile_height);
  const Chunk* base = static_cast<const Chunk*>(p.base);
  const Chunk* windows = static_cast<const Chunk*>(p.windows);
  Chunk* tiles = static_cast<Chunk*>(p.tiles);
  GLANCE_GRID_STRIDE(I, index, count) {
    const I c = index % chunks, cell = index / chunks;
    const I b = cell / width / height;
    const Position at = tile_pixel(p, b, cell / width % height, cell % width);
    const Pixel<I> pixel = composed_pixel<I>(p, b, at.y, at.x);
    Chunk value = fill;
    if (pixel.source == Source::kBase) value = base[pixel.index * chunks + c];
    if (pixel.source == Source::kWindow) value = windows[pixel.index * chunks + c];
    if (pixel.source == Source::kHole) value = Chunk{};
    tiles[index] = value;
  }
}

template <typename Chunk, typename I>
__global__ void scatter_windows_kernel(HoleGatherBackwardParams p, I chunks, I count) {
  const I width = static_cast<I>(p.window_width), height = static_cast<I>(p.window_height);
  const Chunk* tiles = static_cast<const Chunk*>(p.grad_tiles);
  Chunk* windows = static_cast<Chunk*>(p.grad_windows);
  GLANCE_GRID_STRIDE(I, index, count) {
    const I c = index % chunks, cell = index / chunks;
    const I from =
        tile_of_window_cell<I>(p, cell / width / height, cell / width % height, cell % width);
    windows[index] = from < 0 ? Chunk{} : tiles[from * chunks + c];
  }
}

// Each element of the base adds up what the tiles say of it, in the order of the holes.
template <typename T, typename I>
__global__ void scatter_base_kernel(HoleGatherBackwardParams p, I count) {
  const I channels = static_cast<I>(p.channels), holes = static_cast<I>(p.holes);
  const I width = static_cast<I>(p.width), height = static_cast<I>(p.height);
  const T* tiles = static_cast<const T*>(p.grad_tiles);
  T* base = static_cast<T*>(p.grad_base);
  GLANCE_GRID_STRIDE(I, index, count) {
    const I c = index % channels, pixel = index / channels;
    const I n = pixel / width / height;
    accumulate_t<T> sum = 0;
    for (I b = n * holes; b < (n + 1) * holes; ++b) {
      const I from = tile_of_base_pixel<I>(p, b, pixel / width % height, pixel % width);
      if (from >= 0) sum += load(tiles + from * channels + c);
    }
    store(base + index, sum);
  }
}

// As many channels at a time as 16 bytes hold, or one.
template <typename T, int kCount, typename I>
__global__ void max_pool_kernel(HolePoolParams p, I count) {
  using A = accumulate_t<T>;
  struct alignas(kCount * sizeof(T)) Run {
    T value[kCount];
  };
  const I runs = static_cast<I>(p.channels) / kCount;
  const I width = static_cast<I>(p.out_width), height = static_cast<I>(p.out_height);
  const Run* base = static_cast<const Run*>(p.base);
  const Run* windows = static_cast<const Run*>(p.windows);
  GLANCE_GRID_STRIDE(I, index, count) {
    const I c = index % runs, cell = index / runs;
    const WindowRow<I> row =
        pool_row<I>(p, cell / width / height, cell / width % height, cell % width);
    A best[kCount];
    for (A& value : best) value = -static_cast<A>(INFINITY);
    for (int y = 0; y < p.kernel[0]; ++y) {
      for (int x = 0; x < p.kernel[1]; ++x) {
        const I place = tap_place<I>(p, row, y * static_cast<int>(p.dilation[0]),
                                     x * static_cast<int>(p.dilation[1]));
        if (place == kOutside<I>) continue;
        Run run{};
        if (place >= 0) {
          run = base[place * runs + c];
        } else if (place != kHole<I>) {
          run = windows[~place * runs + c];
        }
        for (int i = 0; i < kCount; ++i) {
          const A value = load(run.value + i);
          if (value > best[i] || value != value) best[i] = value;
        }
      }
    }
    Run result;
    for (int i = 0; i < kCount; ++i) store(result.value + i, best[i]);
    static_cast<Run*>(p.output)[index] = result;
  }
}

int element_bytes(ScalarType dtype) {
  int bytes = 0;
  dispatch_cpu(dtype, [&](auto tag) { bytes = sizeof(typename decltype(tag)::type); });
  return bytes;
}

template <typename Chunk>
Chunk repeated(ScalarType dtype, double fill) {
  Chunk chunk;
  dispatch_cpu(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T value = narrow<T>(static_cast<accumulate_t<T>>(fill));
    for (size_t at = 0; at < sizeof(Chunk); at += sizeof(T)) {
      std::memcpy(reinterpret_cast<char*>(&chunk) + at, &value, sizeof(T));
    }
  });
  return chunk;
}

// Calls `body` with the widest chunk that divides `bytes`, a multiple of two, and where everything
// begins: a tensor may be a slice of another.
template <typename Body>
void dispatch_chunk(int64_t bytes, std::initializer_list<const void*> pointers, Body&& body) {
  for (const void* pointer : pointers) bytes |= reinterpret_cast<intptr_t>(pointer);
  if (bytes % 16 == 0) return body(TypeTag<uint4>{});
  if (bytes % 8 == 0) return body(TypeTag<uint2>{});
  if (bytes % 4 == 0) return body(TypeTag<uint32_t>{});
  return body(TypeTag<uint16_t>{});
}

// Calls `body` with a 32-bit index if the elements of all tensors can be counted with it.
template <typename Body>
void dispatch_index(int64_t elements, Body&& body) {
  if (fits_32_bits(elements)) return body(TypeTag<int32_t>{});
  return body(TypeTag<int64_t>{});
}

int64_t input_elements(const HoleWindowsParams& p) {
  const int64_t base = p.batch * p.height * p.width;
  const int64_t windows = p.window_count() * p.window_height * p.window_width;
  return (base > windows ? base : windows) * p.channels;
}

int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace

int gather_holes_cuda(const HoleGatherParams& params, void* stream) {
  const int64_t cells = params.window_count() * params.tile_height * params.tile_width;
  const int64_t bytes = params.channels * element_bytes(params.dtype);
  if (cells * bytes == 0) return cudaSuccess;
  dispatch_chunk(bytes, {params.base, params.windows, params.tiles}, [&](auto chunk_tag) {
    using Chunk = typename decltype(chunk_tag)::type;
    const int64_t chunks = bytes / static_cast<int64_t>(sizeof(Chunk));
    const int64_t most = larger(input_elements(params), cells * params.channels);
    dispatch_index(most, [&](auto index_tag) {
      using I = typename decltype(index_tag)::type;
      gather_kernel<Chunk, I>
          <<<blocks_for(cells * chunks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
              params, repeated<Chunk>(params.dtype, params.fill), static_cast<I>(chunks),
              static_cast<I>(cells * chunks));
    });
  });
  return cudaGetLastError();
}

int scatter_holes_cuda(const HoleGatherBackwardParams& params, void* stream) {
  const int64_t tiles =
      params.window_count() * params.tile_height * params.tile_width * params.channels;
  const int64_t most = larger(input_elements(params), tiles);
  const int64_t cells = params.window_count() * params.window_height * params.window_width;
  const int64_t bytes = params.channels * element_bytes(params.dtype);
  if (params.grad_windows && cells > 0) {
    dispatch_chunk(bytes, {params.grad_tiles, params.grad_windows}, [&](auto chunk_tag) {
      using Chunk = typename decltype(chunk_tag)::type;
      const int64_t chunks = bytes / static_cast<int64_t>(sizeof(Chunk));
      dispatch_index(most, [&](auto index_tag) {
        using I = typename decltype(index_tag)::type;
        scatter_windows_kernel<Chunk, I>
            <<<blocks_for(cells * chunks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
                params, static_cast<I>(chunks), static_cast<I>(cells * chunks));
      });
    });
  }
  const int64_t count = params.batch * params.height * params.width * params.channels;
  if (params.grad_base && count > 0) {
    dispatch_cuda(params.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      dispatch_index(most, [&](auto index_tag) {
        using I = typename decltype(index_tag)::type;
        scatter_base_kernel<T, I>
            <<<blocks_for(count), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
                params, static_cast<I>(count));
      });
    });
  }
  return cudaGetLastError();
}

int hole_max_pool_cuda(const HolePoolParams& params, void* stream) {
  const int64_t cells = params.window_count() * params.out_height * params.out_width;
  if (cells == 0) return cudaSuccess;
  const int64_t most = larger(input_elements(params), cells * params.channels);
  dispatch_cuda(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto launch = [&](auto channels) {
      constexpr int kCount = decltype(channels)::value;
      const int64_t count = cells * (params.channels / kCount);
      dispatch_index(most, [&](auto index_tag) {
        using I = typename decltype(index_tag)::type;
        max_pool_kernel<T, kCount, I>
            <<<blocks_for(count), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
                params, static_cast<I>(count));
      });
    };
    constexpr int kMost = 16 / sizeof(T);
    intptr_t places = 0;
    for (const void* pointer :
         {params.base, params.windows, static_cast<const void*>(params.output)}) {
      places |= reinterpret_cast<intptr_t>(pointer);
    }
    if (params.channels % kMost == 0 && places % 16 == 0) {
      launch(std::integral_constant<int, kMost>{});
    } else {
      launch(std::integral_constant<int, 1>{});
    }
  });
  return cudaGetLastError();
}

}  // namespace glance
