// The CUDA convolution of hole windows, without CUDA: convolve_tile() is the whole of the kernel. A
// `Block` runs it: CudaBlock in hole_conv.cu, EmulatedBlock in tests/cpp. It offers
//
//   phase(f)                 calls f(warp) for each warp, then waits for all
//   Registers<V>             a V in each thread, by warp and lane
//
// and its warps what one instruction does for all lanes: copy, end_copies, wait_for_copies (the
// asynchronous copies, in groups), load_matrices (ldmatrix), multiply (mma), and lanes(f), which
// calls f(lane) for each.
//
// Memory of a block: stages of input rows (kRows x 64 bytes) and weight columns (kColumns x 64
// bytes), filled ahead; then `places`, where each row's pixel of each tap stands.
#pragma once

#include <cstdint>

#include "common/scalar.h"
#include "hole_windows/hole_conv_tile.h"
#include "hole_windows/hole_windows.h"
#include "hole_windows/hole_windows_tile.h"

namespace glance {

template <typename Tile>
struct TileMemory {
  static constexpr int kPipeline = Tile::kStages * Tile::kStageBytes;
  static constexpr int kOutput = Tile::kRows * Tile::kOutputPitch;
  static constexpr int kWork = kPipeline > kOutput ? kPipeline : kOutput;  // one after the other
  static constexpr int kOutputs = kWork;
  static constexpr int kRatios = kOutputs + Tile::kRows * int(sizeof(int64_t));
  static constexpr int kTileRows = kRatios + Tile::kRows * int(sizeof(typename Tile::A));
  static constexpr int kPlaces = kTileRows + Tile::kRows * int(sizeof(WindowRow<int32_t>));

  GLANCE_HOST_DEVICE static int64_t bytes(int64_t taps) {
    return kPlaces + taps * Tile::kRows * int64_t(sizeof(int32_t));
  }

  char* start;

  GLANCE_DEVICE char* stage(int step) const {
    return start + step % Tile::kStages * Tile::kStageBytes;
  }
  GLANCE_DEVICE int64_t* outputs() const { return reinterpret_cast<int64_t*>(start + kOutputs); }
  GLANCE_DEVICE typename Tile::A* ratios() const {
    return reinterpret_cast<typename Tile::A*>(start + kRatios);
  }
  GLANCE_DEVICE WindowRow<int32_t>* rows() const {
    return reinterpret_cast<WindowRow<int32_t>*>(start + kTileRows);
  }
  GLANCE_DEVICE int32_t* places() const { return reinterpret_cast<int32_t*>(start + kPlaces); }
};

// Which cells the tile's rows are, where their results go, and what scales them.
template <typename Tile, typename Warp>
GLANCE_DEVICE void find_rows(Warp& warp, const ConvWork& w, int64_t first,
                             TileMemory<Tile> memory) {
  warp.lanes([&](int lane) {
    for (int r = warp.index * 32 + lane; r < Tile::kRows; r += Tile::kThreads) {
      ConvRow<int64_t> row{-1, 0, 0, 0, 0};
      if (first + r < w.rows) row = conv_row<int64_t>(w.conv, first + r);
      const bool real = row.window >= 0;
      memory.rows()[r] = window_row<int32_t>(w.conv, row.window, row.y, row.x);
      memory.outputs()[r] = real ? row.output : -1;
      memory.ratios()[r] = real ? static_cast<const typename Tile::A*>(w.conv.ratio)[row.cell] : 0;
    }
  });
}

// Where the pixels of all rows and taps stand.
template <typename Tile, typename Warp>
GLANCE_DEVICE void find_places(Warp& warp, const ConvWork& w, TileMemory<Tile> memory) {
  constexpr int kTapsAtOnce = Tile::kThreads / Tile::kRows;
  warp.lanes([&](int lane) {
    const int thread = warp.index * 32 + lane, r = thread % Tile::kRows;
    const WindowRow<int32_t> row = memory.rows()[r];
    const int width = static_cast<int>(w.conv.kernel[1]);
    const int dilation_y = static_cast<int>(w.conv.dilation[0]);
    const int dilation_x = static_cast<int>(w.conv.dilation[1]);
    int y = 0, x = thread / Tile::kRows;
    for (int tap = x; tap < w.taps; tap += kTapsAtOnce, x += kTapsAtOnce) {
      while (x >= width) {
        x -= width;
        ++y;
      }
      memory.places()[tap * Tile::kRows + r] =
          tap_place(w.conv, row, y * dilation_y, x * dilation_x);
    }
  });
}

// Starts the copies of one step's input and weight.
template <typename Tile, typename Warp>
GLANCE_DEVICE void load_step(Warp& warp, const ConvWork& w, int column_tile, int step,
                             TileMemory<Tile> memory) {
  constexpr int kPerRow = kStepBytes / Tile::kChunk;
  constexpr int kWeight = Tile::kColumns * kStepBytes;
  char* stage = memory.stage(step);
  const char* base = static_cast<const char*>(w.conv.base);
  const char* windows = static_cast<const char*>(w.conv.windows);
  const char* weight =
      static_cast<const char*>(w.conv.packed) + (int64_t{column_tile} * w.steps + step) * kWeight;
  const int64_t pixel_bytes = int64_t{w.chunks} * Tile::kChunk;
  warp.lanes([&](int lane) {
    const int thread = warp.index * 32 + lane, column = thread % kPerRow;
    const int chunk = step * kPerRow + column;
    const int tap = chunk / w.chunks, within = (chunk - tap * w.chunks) * Tile::kChunk;
    const int32_t* places = memory.places() + tap * Tile::kRows;
    GLANCE_DEVICE_UNROLL
    for (int i = 0; i < Tile::kRows * kPerRow / Tile::kThreads; ++i) {
      const int row = thread / kPerRow + i * (Tile::kThreads / kPerRow);
      const int32_t place = tap < w.taps ? places[row] : kOutside<int32_t>;
      const bool some = place > kHole<int32_t>;
      const char* from = base;
      if (some)
        from = (place >= 0 ? base : windows) + (place >= 0 ? place : ~place) * pixel_bytes + within;
      warp.template copy<Tile::kChunk>(lane, stage + stage_offset(row, column * Tile::kChunk), from,
                                       some);
    }
    GLANCE_DEVICE_UNROLL
    for (int at = thread * 16; at < kWeight; at += Tile::kThreads * 16) {
      warp.template copy<16>(lane, stage + Tile::kRows * kStepBytes + at, weight + at, true);
    }
  });
}

template <typename Tile>
struct Accumulators {
  typename Tile::A values[Tile::kAccumulators];
};

// Four matrices of 8x16 bytes, a word each in every lane.
struct Words {
  uint32_t word[4];
};

// Values that are loaded and stored together.
template <typename T, int count>
struct alignas(count * sizeof(T)) Run {
  T value[count];
};

// Adds the product of one step, of the warp's rows and columns.
template <typename Tile, typename Warp>
GLANCE_DEVICE void multiply_step(Warp& warp, const char* stage,
                                 typename Warp::template Lanes<Accumulators<Tile>>& sums) {
  const int first_row = warp.index / Tile::kColumnWarps * Tile::kWarpRows;
  const int first_column = warp.index % Tile::kColumnWarps * Tile::kWarpColumns;
  const char* columns = stage + Tile::kRows * kStepBytes;
  if constexpr (Tile::kMath == Math::kTensor) {
    GLANCE_DEVICE_UNROLL
    for (int depth = 0; depth < kStepBytes / kDepthBytes; ++depth) {
      typename Warp::template Lanes<Words> a[Tile::kRowTiles], b[Tile::kColumnTiles / 2];
      GLANCE_DEVICE_UNROLL
      for (int i = 0; i < Tile::kRowTiles; ++i) {
        warp.load_matrices(a[i], [&](int lane) {
          return stage + row_fragment_offset(first_row + i * 16, depth, lane);
        });
        if constexpr (sizeof(typename Tile::T) == 4) warp.round_to_tf32(a[i]);
      }
      GLANCE_DEVICE_UNROLL
      for (int j = 0; j < Tile::kColumnTiles / 2; ++j) {
        warp.load_matrices(b[j], [&](int lane) {
          return columns + column_fragment_offset(first_column + j * 16, depth, lane);
        });
      }
      GLANCE_DEVICE_UNROLL
      for (int i = 0; i < Tile::kRowTiles; ++i) {
        GLANCE_DEVICE_UNROLL
        for (int j = 0; j < Tile::kColumnTiles; ++j) {
          warp.template multiply<typename Tile::T>(sums, (i * Tile::kColumnTiles + j) * 4, a[i],
                                                   b[j / 2], j % 2 * 2);
        }
      }
    }
  } else {
    using V = Run<typename Tile::T, Tile::kVector>;
    warp.lanes([&](int lane) {
      auto& sum = sums[lane].values;
      GLANCE_DEVICE_ROLL  // the loads of all chunks ahead would not fit the registers
          for (int chunk = 0; chunk < kStepBytes / 16; ++chunk) {
        V a[Tile::kRowTiles];
        GLANCE_DEVICE_UNROLL
        for (int i = 0; i < Tile::kRowTiles; ++i) {
          const int row = first_row + accumulator_cell<Tile>(lane, i * Tile::kColumnTiles).row;
          a[i] = *reinterpret_cast<const V*>(stage + stage_offset(row, chunk * 16));
        }
        GLANCE_DEVICE_UNROLL
        for (int j = 0; j < Tile::kColumnTiles; ++j) {
          const int column = first_column + accumulator_cell<Tile>(lane, j).column;
          const V b = *reinterpret_cast<const V*>(columns + stage_offset(column, chunk * 16));
          GLANCE_DEVICE_UNROLL
          for (int i = 0; i < Tile::kRowTiles; ++i) {
            GLANCE_DEVICE_UNROLL
            for (int v = 0; v < Tile::kVector; ++v) {
              sum[i * Tile::kColumnTiles + j] += a[i].value[v] * b.value[v];
            }
          }
        }
      }
    });
  }
}

// Scales, adds the bias, activates, and leaves the warp's results in rows of shared memory.
template <typename Tile, typename Warp>
GLANCE_DEVICE void finish_tile(Warp& warp, const ConvWork& w, int column_tile,
                               typename Warp::template Lanes<Accumulators<Tile>>& sums,
                               TileMemory<Tile> memory) {
  using T = typename Tile::T;
  using A = typename Tile::A;
  const int first_row = warp.index / Tile::kColumnWarps * Tile::kWarpRows;
  const int first_column = warp.index % Tile::kColumnWarps * Tile::kWarpColumns;
  const T* bias = static_cast<const T*>(w.conv.bias);
  const A slope = static_cast<A>(w.conv.negative_slope);
  const auto activated = [&](A value, int row, int column) {
    const int64_t k = int64_t{column_tile} * Tile::kColumns + column;
    value *= memory.ratios()[row];
    if (bias && k < w.conv.out_channels) value += warp.widened(bias[k]);
    if (value < A(0)) value = slope == A(0) ? A(0) : value * slope;
    return warp.template narrowed<T>(value);
  };
  warp.lanes([&](int lane) {
    constexpr int kAtOnce = Tile::kMath == Math::kTensor ? 2 : 1;  // neighbouring columns
    GLANCE_DEVICE_UNROLL
    for (int i = 0; i < Tile::kAccumulators; i += kAtOnce) {
      const Cell cell = accumulator_cell<Tile>(lane, i);
      const int row = first_row + cell.row, column = first_column + cell.column;
      Run<T, kAtOnce> results;
      GLANCE_DEVICE_UNROLL
      for (int j = 0; j < kAtOnce; ++j) {
        results.value[j] = activated(sums[lane].values[i + j], row, column + j);
      }
      T* to = reinterpret_cast<T*>(memory.start + row * Tile::kOutputPitch) + column;
      *reinterpret_cast<Run<T, kAtOnce>*>(to) = results;
    }
  });
}

// Writes the results, 16 bytes at a time where a cell's channels are whole chunks.
template <typename Tile, typename Warp>
GLANCE_DEVICE void store_tile(Warp& warp, const ConvWork& w, int column_tile,
                              TileMemory<Tile> memory) {
  using T = typename Tile::T;
  constexpr int kPerRow = Tile::kColumns / Tile::kVector;
  const int64_t channels = w.conv.out_channels, first = int64_t{column_tile} * Tile::kColumns;
  T* output = static_cast<T*>(w.conv.output);
  warp.lanes([&](int lane) {
    for (int at = warp.index * 32 + lane; at < Tile::kRows * kPerRow; at += Tile::kThreads) {
      const int row = at / kPerRow, column = at % kPerRow * Tile::kVector;
      const int64_t cell = memory.outputs()[row], k = first + column;
      if (cell < 0 || k >= channels) continue;
      const T* from = reinterpret_cast<const T*>(memory.start + row * Tile::kOutputPitch) + column;
      T* to = output + cell * channels + k;
      if (channels % Tile::kVector == 0) {
        using V = Run<T, Tile::kVector>;
        *reinterpret_cast<V*>(to) = *reinterpret_cast<const V*>(from);
      } else {
        for (int i = 0; i < Tile::kVector && k + i < channels; ++i) to[i] = from[i];
      }
    }
  });
}

// Tile `index` of the product. Each phase ends with a barrier of the block.
template <typename Tile, typename Block>
GLANCE_DEVICE void convolve_tile(Block& block, const ConvWork& w, int64_t index, char* shared) {
  using Warp = typename Block::Warp;
  const TileMemory<Tile> memory{shared};
  const int column_tile = static_cast<int>(index % w.column_tiles);
  const int64_t first = index / w.column_tiles * Tile::kRows;
  typename Block::template Registers<Accumulators<Tile>> sums{};
  block.phase([&](Warp& warp) { find_rows<Tile>(warp, w, first, memory); });
  block.phase([&](Warp& warp) { find_places<Tile>(warp, w, memory); });
  block.phase([&](Warp& warp) {
    GLANCE_DEVICE_UNROLL
    for (int step = 0; step < Tile::kStages - 1; ++step) {
      if (step < w.steps) load_step<Tile>(warp, w, column_tile, step, memory);
      warp.end_copies();
    }
    warp.template wait_for_copies<Tile::kStages - 2>();
  });
  for (int step = 0; step < w.steps; ++step) {
    block.phase([&](Warp& warp) {
      // Into the stage that was multiplied before the last barrier.
      const int next = step + Tile::kStages - 1;
      if (next < w.steps) load_step<Tile>(warp, w, column_tile, next, memory);
      warp.end_copies();
      multiply_step<Tile>(warp, memory.stage(step), sums[warp.index]);
      warp.template wait_for_copies<Tile::kStages - 2>();
    });
  }
  block.phase(
      [&](Warp& warp) { finish_tile<Tile>(warp, w, column_tile, sums[warp.index], memory); });
  block.phase([&](Warp& warp) { store_tile<Tile>(warp, w, column_tile, memory); });
}

}  // namespace glance
