// Plain convolution, stride 1 and no padding, in Winograd's tiles of 8x8 pixels: the contract.
//
//   output[n][y][x][k] = bias[k] + sum_ijc input[n][y + i][x + j][c] * weight[k][c][i][j]
//
// For a kernel of 5x5 a tile has 4x4 results, and a sixth of the sum's multiplications
// (winograd_block.h). What that costs is a rounding error some times that of the sum (docs/ops.md
// has figures), and a pixel that is no number spoils its tiles, not only the results that see it.
#pragma once

#include <cstdint>

#include "winograd/winograd_block.h"

namespace glance {

struct WinogradConvParams {
  int64_t batch, channels, height, width;     // of the input
  int64_t batch_step, row_step, column_step;  // elements; channels stand side by side
  int64_t out_channels, kernel;               // kernel: 3 to 6
  const float* input;
  const float* weight;
  int64_t weight_steps[3];  // elements: by out channel, channel, tap
  const float* bias;        // (out_channels) or null
  float* output;            // (batch, out_height(), out_width(), out_channels)
  float* packed;            // winograd_packed_size(filter()) floats
  InstructionSet instructions;

  WinogradFilter filter() const { return {kernel, channels, out_channels, instructions}; }
  int64_t out_height() const { return height - kernel + 1; }
  int64_t out_width() const { return width - kernel + 1; }
  int64_t tile_rows() const { return (out_height() - 1) / filter().results() + 1; }
  int64_t tile_columns() const { return (out_width() - 1) / filter().results() + 1; }
  int64_t tiles() const { return batch * tile_rows() * tile_columns(); }
};

// Whether tiles are expected to be faster than the sum as it stands. Pointers are not looked at.
bool winograd_pays(const WinogradConvParams& p);

// First the weight, then the blocks, which are independent of each other and of their order.
void pack_winograd_weight_cpu(const WinogradConvParams& p, int64_t begin, int64_t end);
int64_t winograd_blocks(const WinogradConvParams& p);
void winograd_conv_cpu(const WinogradConvParams& p, int64_t begin, int64_t end);

}  // namespace glance
