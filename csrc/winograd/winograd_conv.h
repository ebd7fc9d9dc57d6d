// Plain convolution, stride 1 and no padding, by Winograd's minimal filtering: the contract.
//
//   output[n][y][x][k] = bias[k] + sum_ijc input[n][y + i][x + j][c] * weight[k][c][i][j]
//
// The output is cut into tiles of m x m, m = 9 - kernel, each of which depends on 8x8 pixels. With
// the matrices of winograd_transforms.h, whose size is 8 for every kernel,
//
//   tile = A^T [ sum_c (G weight G^T) * (B^T pixels B) ] A + bias
//
// where * is element by element: 64 multiplications for m^2 results instead of m^2 kernel^2, for a
// kernel of 5x5 a sixth. The sums over c are 64 products of matrices (tiles x channels) x (channels
// x out_channels). (A. Lavin, S. Gray, Fast Algorithms for Convolutional Neural Networks, 2016.)
//
// What it costs is a rounding error some times that of the sum itself (docs/ops.md has figures),
// and a pixel that is no number spoils its tiles, not only the results that see it.
#pragma once

#include <cstdint>

#include "hole_windows/micro_kernel.h"

namespace glance {

constexpr int64_t kWinogradTile = 8;   // rows and columns of a tile's pixels
constexpr int64_t kWinogradPoints = kWinogradTile * kWinogradTile;
constexpr int64_t kWinogradLeastKernel = 2, kWinogradMostKernel = 6;

struct WinogradConvParams {
  int64_t batch, channels, height, width;  // of the input
  int64_t batch_step, row_step, column_step;  // elements; channels stand side by side
  int64_t out_channels, kernel;
  const float* input;
  const float* weight;  // (out_channels, channels, kernel, kernel)
  const float* bias;    // (out_channels) or null
  float* output;        // (batch, height - kernel + 1, width - kernel + 1, out_channels)
  float* packed;        // winograd_packed_size(p) floats: the weight as the tiles need it
  InstructionSet instructions;  // of this processor

  int64_t out_height() const { return height - kernel + 1; }
  int64_t out_width() const { return width - kernel + 1; }
  int64_t tile_side() const { return kWinogradTile + 1 - kernel; }  // of the output
  int64_t tile_rows() const { return (out_height() + tile_side() - 1) / tile_side(); }
  int64_t tile_columns() const { return (out_width() + tile_side() - 1) / tile_side(); }
  int64_t tiles() const { return batch * tile_rows() * tile_columns(); }
};

// Whether tiles are expected to be faster than the sum as it stands. Pointers are not looked at.
bool winograd_pays(const WinogradConvParams& p);

// First the weight, then the blocks; the rows of either are independent of each other.
int64_t winograd_packed_size(const WinogradConvParams& p);
int64_t winograd_weight_rows(const WinogradConvParams& p);
void pack_winograd_weight_cpu(const WinogradConvParams& p, int64_t begin, int64_t end);
int64_t winograd_blocks(const WinogradConvParams& p);
void winograd_conv_cpu(const WinogradConvParams& p, int64_t begin, int64_t end);

}  // namespace glance
