// Indices of a convolution as a matrix product on the GPU, without CUDA. Its rows are the pixels of
// the output that are wanted, its columns the output channels, and its depth is taps x channels,
// gathered on the way; a block computes one tile of it (gemm_kernel.h). Which pixels the rows are,
// and where those of their windows stand, says the work of each op, derived from GemmWork. The C++
// tests run the same functions.
//
// A step takes 64 bytes of every row and column: four chunks of 16, which are the rows of the
// 8x16-byte matrices that ldmatrix reads. They are swizzled by row, so that eight of them in a
// column lie in different banks.
#pragma once

#include <cstdint>

#include "common/scalar.h"

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

// What a launch hands to the kernel, whatever the op.
struct GemmWork {
  // Workspace, of packed_bytes(): the weight, tile of columns by tile of columns.
  void* packed = nullptr;
  const void* weight = nullptr;  // of one group: (out_channels, weight_channels, kh, kw)
  int64_t weight_strides[4] = {0, 0, 0, 0};
  int64_t weight_group = 0;     // from one group's weight to the next, in elements
  const void* bias = nullptr;   // (groups * out_channels), or null
  void* output = nullptr;       // pixels of groups * out_channels
  int64_t channels = 0;         // of a group's pixels as they are read: whole chunks
  int64_t weight_channels = 0;  // that the weight has of them: the others are padding
  int64_t out_channels = 0;     // of a group
  int64_t pixel_bytes = 0;      // from one pixel that is read to the next
  int64_t blocks = 0;           // row tiles * groups * column_tiles
  double negative_slope = 1;
  int32_t kernel[2] = {1, 1};
  int32_t dilation[2] = {1, 1};  // from tap to tap; may be negative
  int32_t groups = 1;
  int32_t taps = 1;
  int32_t chunks = 0;        // of a pixel
  int32_t steps = 0;         // of kStepBytes over the depth
  int32_t column_tiles = 0;  // of a group
  int32_t tile_columns = 0;  // Tile::kColumns

  GLANCE_HOST_DEVICE int64_t packed_bytes() const {
    return int64_t{groups} * column_tiles * steps * tile_columns * kStepBytes;
  }
};

// --- On the host: sizes.

GLANCE_HOST_DEVICE inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls `body` with a TypeTag of the tile that suits the dtype, the channels and the columns.
template <typename Body>
void dispatch_gemm_tile(ScalarType dtype, bool tf32, int64_t channels, int64_t columns,
                        Body&& body) {
  const auto by_columns = [&](auto type, auto math) {
    using T = typename decltype(type)::type;
    constexpr Math kMath = decltype(math)::value;
    if (columns <= 16) return body(TypeTag<ConvTile<T, kMath, 16, 16>>{});
    if (columns <= 32) return body(TypeTag<ConvTile<T, kMath, 32, 16>>{});
    if constexpr (kMath == Math::kTensor) {
      if (columns > 64) return body(TypeTag<ConvTile<T, kMath, 128, 16>>{});
    }
    return body(TypeTag<ConvTile<T, kMath, 64, 16>>{});
  };
  const auto halves = [&](auto type) {
    using T = typename decltype(type)::type;
    if (channels % 8 == 0) return by_columns(type, MathTag<Math::kTensor>{});
    if (columns <= 16) return body(TypeTag<ConvTile<T, Math::kTensor, 16, 8>>{});
    return body(TypeTag<ConvTile<T, Math::kTensor, 64, 8>>{});
  };
  switch (dtype) {
    case ScalarType::kFloat32:
      if (tf32) return by_columns(TypeTag<float>{}, MathTag<Math::kTensor>{});
      return by_columns(TypeTag<float>{}, MathTag<Math::kPlain>{});
    case ScalarType::kFloat64:
      return body(TypeTag<ConvTile<double, Math::kPlain, 32, 16>>{});
    case ScalarType::kFloat16:
      return halves(TypeTag<Half>{});
    case ScalarType::kBFloat16:
      return halves(TypeTag<BFloat16>{});
  }
}

// Fills in what follows from the kernel, the channels and the number of rows.
template <typename Tile>
void size_gemm(GemmWork& w, int64_t row_tiles) {
  constexpr int64_t kElements = Tile::kChunk / sizeof(typename Tile::T);
  w.taps = w.kernel[0] * w.kernel[1];
  w.channels = divide_up(w.weight_channels, kElements) * kElements;
  w.chunks = static_cast<int32_t>(w.channels / kElements);
  w.steps = static_cast<int32_t>(divide_up(w.taps * w.channels, Tile::kStep));
  w.column_tiles = static_cast<int32_t>(divide_up(w.out_channels, Tile::kColumns));
  w.tile_columns = Tile::kColumns;
  w.pixel_bytes = w.groups * w.channels * int64_t(sizeof(typename Tile::T));
  w.blocks = row_tiles * w.groups * w.column_tiles;
}

// Whether the kernel's 32-bit indices suffice for these sizes of a problem.
inline bool fits_gemm(const int64_t (&kernel)[2], const int64_t (&dilation)[2], int64_t channels) {
  constexpr int64_t kMost = 1 << 24;
  return kernel[0] * kernel[1] * (channels + 16) < kMost && kernel[0] * dilation[0] < kMost &&
         kernel[1] * dilation[1] < kMost;
}

// Bytes of a copy of pixels that cannot be read as they are, because they are not whole chunks or
// do not begin at a multiple of 16 bytes; 0 for those that can.
inline int64_t copy_bytes(const GemmWork& w, const void* pixels, int64_t count) {
  const bool usable =
      w.channels == w.weight_channels && reinterpret_cast<uintptr_t>(pixels) % 16 == 0;
  return usable ? 0 : divide_up(count * w.pixel_bytes, 16) * 16;
}

// --- On host and device: which element is where.

// The 16-byte chunk of a row's four that holds its chunk `chunk`; its own inverse.
GLANCE_HOST_DEVICE inline int swizzled(int row, int chunk) { return chunk ^ (row >> 1 & 3); }

// Byte of a stage where byte `at` of a row, or of a column, stands.
GLANCE_HOST_DEVICE inline int stage_offset(int row, int at) {
  return row * kStepBytes + swizzled(row, at / 16) * 16 + at % 16;
}

// Which element of the weight stands at `index` of the packed one: group by group, column tile by
// column tile, step by step, each as it will lie in a stage. -1 for padding.
template <typename T>
GLANCE_HOST_DEVICE inline int64_t packed_source(const GemmWork& w, int64_t index) {
  constexpr int kStep = kStepBytes / sizeof(T), kVector = 16 / sizeof(T);
  const int within = static_cast<int>(index % (w.tile_columns * kStep));
  int64_t part = index / (w.tile_columns * kStep);
  const int row = within / kStep, at = within % kStep;
  const int chunk = swizzled(row, at / kVector);
  const int64_t depth = part % w.steps * kStep + chunk * kVector + at % kVector;
  part /= w.steps;
  const int64_t k = part % w.column_tiles * w.tile_columns + row;
  const int64_t group = part / w.column_tiles;
  const int64_t tap = depth / w.channels, c = depth % w.channels;
  if (k >= w.out_channels || tap >= w.taps || c >= w.weight_channels) return -1;
  return group * w.weight_group + k * w.weight_strides[0] + c * w.weight_strides[1] +
         tap / w.kernel[1] * w.weight_strides[2] + tap % w.kernel[1] * w.weight_strides[3];
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
