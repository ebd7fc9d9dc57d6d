// The CUDA convolution as a matrix product, without CUDA: convolve_tile() is the whole of the
// kernel. A `Block` runs it: CudaBlock in gemm_cuda.cuh, EmulatedBlock in tests/cpp. It offers
//
//   phase(f)                 calls f(warp) for each warp, then waits for all
//   any(f)                   the same, and tells whether f was true for any
//   Registers<V>             a V in each thread, by warp and lane
//
// and its warps what one instruction does for all lanes: copy, end_copies, wait_for_copies (the
// asynchronous copies, in groups), load_matrices (ldmatrix), multiply (mma), any (vote), and
// lanes(f), which calls f(lane) for each.
//
// `Work`, derived from GemmWork, says what the product is of:
//
//   Row                      what is known of a row before its taps
//   row<A>(tile, r, rows)    its TileRow: where its result goes and what scales it
//   place(row, y, x)         where the pixel of a tap stands, (y, x) pixels from the first tap's
//   is_missing(place)        whether there is none: it counts as 0
//   pixel(place)             its first byte
//   somewhere()              a byte that may be addressed and is not read
//   kCountsPlaces            whether a row's scale comes from its number of pixels: then
//   counted<A>(row, count, first)   is that scale; `first` for one block of those with this row.
//                            Blocks whose rows all come to 0, and steps without pixels, are skipped
//
// Memory of a block: stages of input rows (kRows x 64 bytes) and weight columns (kColumns x 64
// bytes), filled ahead; then `places`, where each row's pixel of each tap stands.
#pragma once

#include <cstdint>

#include "common/scalar.h"
#include "implicit_gemm/gemm_tile.h"

namespace glance {

template <typename Row, typename A>
struct TileRow {
  Row row;
  int64_t output;  // which pixel of the output, or -1 for none
  A ratio;
};

template <typename Tile, typename Work>
struct TileMemory {
  using A = typename Tile::A;
  using Row = typename Work::Row;
  static constexpr int kPipeline = Tile::kStages * Tile::kStageBytes;
  static constexpr int kOutput = Tile::kRows * Tile::kOutputPitch;
  static constexpr int kWork = kPipeline > kOutput ? kPipeline : kOutput;  // one after the other
  static constexpr int kOutputs = kWork;
  static constexpr int kRatios = kOutputs + Tile::kRows * int(sizeof(int64_t));
  static constexpr int kTileRows = kRatios + Tile::kRows * int(sizeof(A));
  static constexpr int kPlaces = kTileRows + Tile::kRows * int(sizeof(Row));

  GLANCE_HOST_DEVICE static int64_t bytes(int64_t taps, int64_t steps) {
    const int64_t flags = Work::kCountsPlaces ? taps + steps : 0;
    return kPlaces + taps * Tile::kRows * int64_t(sizeof(int32_t)) + flags;
  }

  char* start;
  int taps;

  GLANCE_DEVICE char* stage(int ordinal) const {
    return start + ordinal % Tile::kStages * Tile::kStageBytes;
  }
  GLANCE_DEVICE int64_t* outputs() const { return reinterpret_cast<int64_t*>(start + kOutputs); }
  GLANCE_DEVICE A* ratios() const { return reinterpret_cast<A*>(start + kRatios); }
  GLANCE_DEVICE Row* rows() const { return reinterpret_cast<Row*>(start + kTileRows); }
  GLANCE_DEVICE int32_t* places() const { return reinterpret_cast<int32_t*>(start + kPlaces); }
  // Whether any row has a pixel of the tap, of the step; where Work counts places.
  GLANCE_DEVICE char* used_taps() const {
    return start + kPlaces + taps * Tile::kRows * int(sizeof(int32_t));
  }
  GLANCE_DEVICE char* used_steps() const { return used_taps() + taps; }
};

// Which tile of the product a block computes.
struct TileIndex {
  int64_t rows;  // the how manieth tile of rows
  int columns;   // of columns, of all groups
  int group;
  int first_column;  // in its group
};

template <typename Tile>
GLANCE_DEVICE TileIndex tile_of_block(const GemmWork& w, int64_t block) {
  const int across = w.groups * w.column_tiles;
  const int columns = static_cast<int>(block % across), group = columns / w.column_tiles;
  return {block / across, columns, group, columns % w.column_tiles * Tile::kColumns};
}

// Which pixels the tile's rows are, where their results go, and what scales them.
template <typename Tile, typename Warp, typename Work>
GLANCE_DEVICE void find_rows(Warp& warp, const Work& w, const TileIndex& tile,
                             TileMemory<Tile, Work> memory) {
  warp.lanes([&](int lane) {
    for (int r = warp.index * 32 + lane; r < Tile::kRows; r += Tile::kThreads) {
      const auto row = w.template row<typename Tile::A>(tile.rows, r, Tile::kRows);
      memory.rows()[r] = row.row;
      memory.outputs()[r] = row.output;
      memory.ratios()[r] = row.ratio;
    }
  });
}

// Where the pixels of all rows and taps stand.
template <typename Tile, typename Warp, typename Work>
GLANCE_DEVICE void find_places(Warp& warp, const Work& w, TileMemory<Tile, Work> memory) {
  constexpr int kTapsAtOnce = Tile::kThreads / Tile::kRows;
  warp.lanes([&](int lane) {
    const int thread = warp.index * 32 + lane, r = thread % Tile::kRows;
    const typename Work::Row row = memory.rows()[r];
    int y = 0, x = thread / Tile::kRows;
    for (int tap = x; tap < w.taps; tap += kTapsAtOnce, x += kTapsAtOnce) {
      while (x >= w.kernel[1]) {
        x -= w.kernel[1];
        ++y;
      }
      memory.places()[tap * Tile::kRows + r] = w.place(row, y * w.dilation[0], x * w.dilation[1]);
    }
  });
}

// Scales rows by how many pixels they have, and marks the taps that any has. False where there is
// nothing to compute.
template <typename Tile, typename Warp, typename Work>
GLANCE_DEVICE bool count_places(Warp& warp, const Work& w, const TileIndex& tile,
                                TileMemory<Tile, Work> memory) {
  const int32_t* places = memory.places();
  bool some = false;
  warp.lanes([&](int lane) {
    for (int r = warp.index * 32 + lane; r < Tile::kRows; r += Tile::kThreads) {
      int count = 0;
      for (int tap = 0; tap < w.taps; ++tap) {
        count += !w.is_missing(places[tap * Tile::kRows + r]);
      }
      TileRow<typename Work::Row, typename Tile::A> row{memory.rows()[r], memory.outputs()[r],
                                                        memory.ratios()[r]};
      if (row.output >= 0) row.ratio = w.counted(row, count, tile.columns == 0);
      memory.ratios()[r] = row.ratio;
      some = some || (count > 0 && row.ratio != 0);
    }
  });
  for (int tap = warp.index; tap < w.taps; tap += Tile::kThreads / 32) {
    const bool used = warp.any([&](int lane) {
      bool found = false;
      for (int r = lane; r < Tile::kRows; r += 32) {
        found = found || !w.is_missing(places[tap * Tile::kRows + r]);
      }
      return found;
    });
    warp.lanes([&](int lane) {
      if (lane == 0) memory.used_taps()[tap] = used;
    });
  }
  return some;
}

template <typename Tile, typename Warp, typename Work>
GLANCE_DEVICE void find_steps(Warp& warp, const Work& w, TileMemory<Tile, Work> memory) {
  constexpr int kPerRow = kStepBytes / Tile::kChunk;
  warp.lanes([&](int lane) {
    for (int step = warp.index * 32 + lane; step < w.steps; step += Tile::kThreads) {
      char used = 0;
      const int last = (step * kPerRow + kPerRow - 1) / w.chunks;
      for (int tap = step * kPerRow / w.chunks; tap <= last && tap < w.taps; ++tap) {
        used |= memory.used_taps()[tap];
      }
      memory.used_steps()[step] = used;
    }
  });
}

// The first step from `step` on that is to be multiplied.
template <typename Tile, typename Work>
GLANCE_DEVICE int next_step(const Work& w, TileMemory<Tile, Work> memory, int step) {
  if constexpr (Work::kCountsPlaces) {
    while (step < w.steps && !memory.used_steps()[step]) ++step;
  }
  return step;
}

// Starts the copies of one step's input and weight.
template <typename Tile, typename Warp, typename Work>
GLANCE_DEVICE void load_step(Warp& warp, const Work& w, const TileIndex& tile, int step,
                             char* stage, TileMemory<Tile, Work> memory) {
  constexpr int kPerRow = kStepBytes / Tile::kChunk;
  constexpr int kWeight = Tile::kColumns * kStepBytes;
  const char* weight =
      static_cast<const char*>(w.packed) + (int64_t{tile.columns} * w.steps + step) * kWeight;
  const int of_group = tile.group * w.chunks * Tile::kChunk;
  warp.lanes([&](int lane) {
    const int thread = warp.index * 32 + lane, column = thread % kPerRow;
    const int chunk = step * kPerRow + column;
    const int tap = chunk / w.chunks, within = (chunk - tap * w.chunks) * Tile::kChunk + of_group;
    const int32_t* places = memory.places() + tap * Tile::kRows;
    GLANCE_DEVICE_UNROLL
    for (int i = 0; i < Tile::kRows * kPerRow / Tile::kThreads; ++i) {
      const int row = thread / kPerRow + i * (Tile::kThreads / kPerRow);
      bool some = tap < w.taps;
      const char* from = w.somewhere();
      if (some) {
        const int32_t place = places[row];
        some = !w.is_missing(place);
        if (some) from = w.pixel(place) + within;
      }
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

// What becomes of a sum: scaled, with the bias, activated; exactly 0 where nothing was valid.
template <typename A>
GLANCE_DEVICE A finished(A sum, A ratio, A bias, A slope) {
  const A value = sum * ratio + bias;
  if (ratio == A(0)) return A(0);
  if (value < A(0)) return slope == A(0) ? A(0) : value * slope;
  return value;
}

// Scales, adds the bias, activates, and leaves the warp's results in rows of shared memory.
template <typename Tile, typename Warp, typename Work>
GLANCE_DEVICE void finish_tile(Warp& warp, const Work& w, const TileIndex& tile,
                               typename Warp::template Lanes<Accumulators<Tile>>& sums,
                               TileMemory<Tile, Work> memory) {
  using T = typename Tile::T;
  using A = typename Tile::A;
  const int first_row = warp.index / Tile::kColumnWarps * Tile::kWarpRows;
  const int first_column = warp.index % Tile::kColumnWarps * Tile::kWarpColumns;
  const T* bias = static_cast<const T*>(w.bias);
  if (bias) bias += tile.group * w.out_channels;
  const A slope = static_cast<A>(w.negative_slope);
  const auto activated = [&](A value, int row, int column) {
    const int64_t k = tile.first_column + column;
    const A shift = bias && k < w.out_channels ? A(warp.widened(bias[k])) : A(0);
    return warp.template narrowed<T>(finished<A>(value, memory.ratios()[row], shift, slope));
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

// Writes the results, or zeros, 16 bytes at a time where a pixel's channels are whole chunks.
template <typename Tile, bool zeros, typename Warp, typename Work>
GLANCE_DEVICE void store_tile(Warp& warp, const Work& w, const TileIndex& tile,
                              TileMemory<Tile, Work> memory) {
  using T = typename Tile::T;
  using V = Run<T, Tile::kVector>;
  constexpr int kPerRow = Tile::kColumns / Tile::kVector;
  const int64_t channels = w.out_channels;
  T* output = static_cast<T*>(w.output) + tile.group * channels;
  warp.lanes([&](int lane) {
    for (int at = warp.index * 32 + lane; at < Tile::kRows * kPerRow; at += Tile::kThreads) {
      const int row = at / kPerRow, column = at % kPerRow * Tile::kVector;
      const int64_t pixel = memory.outputs()[row], k = tile.first_column + column;
      if (pixel < 0 || k >= channels) continue;
      const T* from = reinterpret_cast<const T*>(memory.start + row * Tile::kOutputPitch) + column;
      T* to = output + pixel * w.groups * channels + k;
      if (channels % Tile::kVector == 0) {
        *reinterpret_cast<V*>(to) = zeros ? V{} : *reinterpret_cast<const V*>(from);
      } else {
        for (int i = 0; i < Tile::kVector && k + i < channels; ++i) to[i] = zeros ? T{} : from[i];
      }
    }
  });
}

// The product's tile `index`. Each phase ends with a barrier of the block.
template <typename Tile, typename Block, typename Work>
GLANCE_DEVICE void convolve_tile(Block& block, const Work& w, int64_t index, char* shared) {
  using Warp = typename Block::Warp;
  constexpr int kAhead = Tile::kStages - 1;
  const TileMemory<Tile, Work> memory{shared, w.taps};
  const TileIndex tile = tile_of_block<Tile>(w, index);
  typename Block::template Registers<Accumulators<Tile>> sums{};
  block.phase([&](Warp& warp) { find_rows<Tile>(warp, w, tile, memory); });
  block.phase([&](Warp& warp) { find_places<Tile>(warp, w, memory); });
  if constexpr (Work::kCountsPlaces) {
    if (!block.any([&](Warp& warp) { return count_places<Tile>(warp, w, tile, memory); })) {
      block.phase([&](Warp& warp) { store_tile<Tile, true>(warp, w, tile, memory); });
      return;
    }
    block.phase([&](Warp& warp) { find_steps<Tile>(warp, w, memory); });
  }
  const int first = next_step(w, memory, 0);
  block.phase([&](Warp& warp) {
    int step = first;
    GLANCE_DEVICE_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      if (step < w.steps) {
        load_step<Tile>(warp, w, tile, step, memory.stage(i), memory);
        step = next_step(w, memory, step + 1);
      }
      warp.end_copies();
    }
    warp.template wait_for_copies<kAhead - 1>();
  });
  int step = first, loaded = 0;
  for (; loaded < kAhead && step < w.steps; ++loaded) step = next_step(w, memory, step + 1);
  for (int done = 0; done < loaded; ++done) {
    block.phase([&](Warp& warp) {
      // Into the stage that was multiplied before the last barrier.
      if (step < w.steps) {
        load_step<Tile>(warp, w, tile, step, memory.stage(done + kAhead), memory);
      }
      warp.end_copies();
      multiply_step<Tile>(warp, memory.stage(done), sums[warp.index]);
      warp.template wait_for_copies<kAhead - 1>();
    });
    if (step < w.steps) {
      ++loaded;
      step = next_step(w, memory, step + 1);
    }
  }
  block.phase([&](Warp& warp) { finish_tile<Tile>(warp, w, tile, sums[warp.index], memory); });
  block.phase([&](Warp& warp) { store_tile<Tile, false>(warp, w, tile, memory); });
}

}  // namespace glance
