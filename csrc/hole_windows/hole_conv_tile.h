// Indices of the CUDA convolution of hole windows, without CUDA. It is a matrix product whose rows
// are the listed cells, whose columns are the output channels, and whose depth is taps x channels,
// gathered on the way; a block computes one tile of it (hole_conv_kernel.h). The C++ tests run the
// same functions.
//
// A step takes 64 bytes of every row and column: four chunks of 16, which are the rows of the
// 8x16-byte matrices that ldmatrix reads. They are swizzled by row, so that eight of them in a
// column lie in different banks.
#pragma once

#include <cstdint>

#include "common/scalar.h"
#include "hole_windows/hole_windows.h"
#include "hole_windows/hole_windows_tile.h"

namespace glance {

constexpr int kStepBytes = 64;   // of each row and column at a time
constexpr int kDepthBytes = 32;  // that one mma multiplies: 16 values of 2 bytes, 8 of 4

// kTensor multiplies 16-bit floats as they are and float32 as TF32; kPlain float32 and float64.
enum class Math : int { kTensor, kPlain };
template <Math math>
struct MathTag {
  static constexpr Math value = math;
};

template <typename Element, Math math, int columns, int chunk>
struct ConvTile {
  using T = Element;
  using A = accumulate_t<T>;
  static constexpr Math kMath = math;
  static constexpr int kChunk = chunk;  // bytes of input copied at a time: 16, or 8
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr int kStep = kStepBytes / sizeof(T);
  static constexpr int kRows = 128, kColumns = columns;
  static constexpr int kWarpColumns = columns < 32 ? columns : 32;
  static constexpr int kColumnWarps = columns / kWarpColumns;
  static constexpr int kRowWarps = columns < 64 ? 4 : 2;
  static constexpr int kWarpRows = kRows / kRowWarps;
  static constexpr int kThreads = 32 * kColumnWarps * kRowWarps;
  static constexpr int kBlocks = kThreads > 128 ? 2 : columns > 32 || sizeof(T) == 8 ? 3 : 4;
  static constexpr int kStages = columns < 64 ? 3 : 4;
  static constexpr int kStageBytes = (kRows + kColumns) * kStepBytes;
  // A warp's accumulators: tiles of 16x8, or for plain lanes a grid of 8x4.
  static constexpr int kRowTiles = kWarpRows / (math == Math::kTensor ? 16 : 8);
  static constexpr int kColumnTiles = kWarpColumns / (math == Math::kTensor ? 8 : 4);
  static constexpr int kAccumulators = kWarpRows * kWarpColumns / 32;
  // Output rows on their way to memory, padded so that rows begin in different banks.
  static constexpr int kOutputPitch = kColumns * int(sizeof(T)) + 16;
};

// --- On the host: sizes.

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Channels of the kernel's input: padded with zeros so that pixels consist of whole chunks.
template <typename Tile>
int64_t tile_channels(const HoleConvParams& p) {
  constexpr int64_t kElements = Tile::kChunk / sizeof(typename Tile::T);
  return divide_up(p.channels, kElements) * kElements;
}

// Calls `body` with a TypeTag of the tile that suits the dtype, the columns and the channels.
template <typename Body>
void dispatch_conv_tile(const HoleConvParams& p, Body&& body) {
  const int64_t k = p.out_channels;
  const auto by_columns = [&](auto type, auto math) {
    using T = typename decltype(type)::type;
    constexpr Math kMath = decltype(math)::value;
    if (k <= 16) return body(TypeTag<ConvTile<T, kMath, 16, 16>>{});
    if (k <= 32) return body(TypeTag<ConvTile<T, kMath, 32, 16>>{});
    if constexpr (kMath == Math::kTensor) {
      if (k > 64) return body(TypeTag<ConvTile<T, kMath, 128, 16>>{});
    }
    return body(TypeTag<ConvTile<T, kMath, 64, 16>>{});
  };
  const auto halves = [&](auto type) {
    using T = typename decltype(type)::type;
    if (p.channels % 8 == 0) return by_columns(type, MathTag<Math::kTensor>{});
    if (k <= 16) return body(TypeTag<ConvTile<T, Math::kTensor, 16, 8>>{});
    return body(TypeTag<ConvTile<T, Math::kTensor, 64, 8>>{});
  };
  switch (p.dtype) {
    case ScalarType::kFloat32:
      if (p.tf32) return by_columns(TypeTag<float>{}, MathTag<Math::kTensor>{});
      return by_columns(TypeTag<float>{}, MathTag<Math::kPlain>{});
    case ScalarType::kFloat64:
      return body(TypeTag<ConvTile<double, Math::kPlain, 32, 16>>{});
    case ScalarType::kFloat16:
      return halves(TypeTag<Half>{});
    case ScalarType::kBFloat16:
      return halves(TypeTag<BFloat16>{});
  }
}

// What a launch hands to the kernel.
struct ConvWork {
  HoleConvParams conv;      // base, windows and channels are the padded ones
  int64_t weight_channels;  // C of the weight
  int64_t rows;
  int64_t blocks;
  int32_t taps, chunks;  // chunks of a pixel
  int32_t steps;         // of kStepBytes over the depth
  int32_t column_tiles;
};

struct ConvWorkspace {
  // Bytes, multiples of 16: of the packed weight, and of copies of what cannot be read as it is,
  // because its pixels are not whole chunks or do not begin at a multiple of 16 bytes.
  int64_t packed, base, windows;
  int64_t total() const { return packed + base + windows; }
};

template <typename Tile>
ConvWork conv_work(const HoleConvParams& p) {
  ConvWork w{};
  w.conv = p;
  w.weight_channels = p.channels;
  w.conv.channels = tile_channels<Tile>(p);
  w.rows = conv_rows(p);
  w.taps = static_cast<int32_t>(p.kernel[0] * p.kernel[1]);
  w.chunks =
      static_cast<int32_t>(w.conv.channels * int64_t(sizeof(typename Tile::T)) / Tile::kChunk);
  w.steps = static_cast<int32_t>(divide_up(w.taps * w.conv.channels, Tile::kStep));
  w.column_tiles = static_cast<int32_t>(divide_up(p.out_channels, Tile::kColumns));
  w.blocks = divide_up(w.rows, Tile::kRows) * w.column_tiles;
  return w;
}

template <typename Tile>
ConvWorkspace conv_workspace(const HoleConvParams& p) {
  const ConvWork w = conv_work<Tile>(p);
  const int64_t pixel = w.conv.channels * sizeof(typename Tile::T);
  const auto bytes = [&](const void* pixels, int64_t count) {
    const bool usable =
        w.conv.channels == p.channels && reinterpret_cast<uintptr_t>(pixels) % 16 == 0;
    return usable ? 0 : divide_up(count * pixel, 16) * 16;
  };
  return {int64_t{w.column_tiles} * w.steps * Tile::kColumns * kStepBytes,
          bytes(p.base, p.batch * p.height * p.width),
          bytes(p.windows, p.window_count() * p.window_height * p.window_width)};
}

// Whether the kernel's 32-bit indices suffice.
template <typename Tile>
bool fits_conv_tile(const HoleConvParams& p) {
  constexpr int64_t kMost = INT32_MAX - 1;
  const ConvWork w = conv_work<Tile>(p);
  return p.batch * p.height * p.width < kMost &&
         p.window_count() * p.window_height * p.window_width < kMost && w.blocks < kMost &&
         p.kernel[0] * p.kernel[1] * p.channels < (1 << 24) &&
         p.kernel[0] * p.dilation[0] < (1 << 24) && p.kernel[1] * p.dilation[1] < (1 << 24);
}

// --- On host and device: which element is where.

// The 16-byte chunk of a row's four that holds its chunk `chunk`; its own inverse.
GLANCE_HOST_DEVICE inline int swizzled(int row, int chunk) { return chunk ^ (row >> 1 & 3); }

// Byte of a stage where byte `at` of a row, or of a column, stands.
GLANCE_HOST_DEVICE inline int stage_offset(int row, int at) {
  return row * kStepBytes + swizzled(row, at / 16) * 16 + at % 16;
}

// Which element of the weight (K, C, kh, kw) stands at `index` of the packed one: column tile by
// column tile, step by step, each as it will lie in a stage. -1 for padding.
template <typename Tile>
GLANCE_HOST_DEVICE inline int64_t packed_source(const ConvWork& w, int64_t index) {
  constexpr int kPart = Tile::kColumns * Tile::kStep;
  const int within = static_cast<int>(index % kPart);
  const int64_t part = index / kPart;
  const int row = within / Tile::kStep, at = within % Tile::kStep;
  const int chunk = swizzled(row, at / Tile::kVector);
  const int64_t depth = part % w.steps * Tile::kStep + chunk * Tile::kVector + at % Tile::kVector;
  const int64_t k = part / w.steps * Tile::kColumns + row;
  const int64_t tap = depth / w.conv.channels, c = depth % w.conv.channels;
  if (k >= w.conv.out_channels || tap >= w.taps || c >= w.weight_channels) return -1;
  return (k * w.weight_channels + c) * w.taps + tap;
}

// Which element of the pixels stands at `index` of those padded to more channels; -1 for padding.
GLANCE_HOST_DEVICE inline int64_t unpadded(int64_t index, int64_t channels, int64_t padded) {
  const int64_t c = index % padded;
  return c < channels ? index / padded * channels + c : -1;
}

struct Cell {
  int row, column;
};

// Which element of a warp's tile its lane's accumulator `i` is: for an mma row lane / 4 and columns
// 2 (lane % 4) and the next of a 16x8 tile, then the same eight rows below.
template <typename Tile>
GLANCE_HOST_DEVICE inline Cell accumulator_cell(int lane, int i) {
  if constexpr (Tile::kMath == Math::kTensor) {
    const int tile = i / 4, r = i % 4;
    return {tile / Tile::kColumnTiles * 16 + r / 2 * 8 + lane / 4,
            tile % Tile::kColumnTiles * 8 + lane % 4 * 2 + r % 2};
  }
  return {i / Tile::kColumnTiles * 8 + lane / 4, i % Tile::kColumnTiles * 4 + lane % 4};
}

// Byte of a stage's rows that a lane hands to ldmatrix for a 16x32-byte fragment at `row`: four
// matrices, the upper and lower rows of the left half and then of the right.
GLANCE_HOST_DEVICE inline int row_fragment_offset(int row, int depth, int lane) {
  return stage_offset(row + lane / 8 % 2 * 8 + lane % 8, depth * kDepthBytes + lane / 16 * 16);
}

// The same for two 8-column fragments at `column`: left and right half of each.
GLANCE_HOST_DEVICE inline int column_fragment_offset(int column, int depth, int lane) {
  return stage_offset(column + lane / 16 * 8 + lane % 8, depth * kDepthBytes + lane / 8 % 2 * 16);
}

}  // namespace glance
