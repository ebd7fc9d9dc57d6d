// Winograd's minimal filtering of tiles, wherever their pixels come from and their results go.
//
// A tile is 8x8 pixels, of which a kernel of r x r taps, r from 3 to 6, makes m x m results with
// m = 9 - r:
//
//   results = A^T [ sum_c (G weight G^T) * (B^T pixels B) ] A + bias
//
// where * is element by element (winograd_transforms.h has the matrices): 64 multiplications a
// channel for what takes the sum m^2 r^2. The sums over channels are 64 products of matrices,
// (tiles x channels) x (channels x out_channels). (A. Lavin, S. Gray, Fast Algorithms for
// Convolutional Neural Networks, CVPR 2016.) A kernel of 2x2 would gain little, at a rounding error
// of twice that of 3x3.
#pragma once

#include <cstdint>
#include <vector>

#include "common/micro_kernel.h"
#include "common/workspace.h"

namespace glance {

constexpr int kWinogradPoints = 8;  // rows and columns of a tile's pixels
constexpr int kWinogradPlaces = kWinogradPoints * kWinogradPoints;
constexpr int kWinogradMostResults = 6 * 6;

// What all tiles have in common.
struct WinogradFilter {
  int64_t kernel, channels, out_channels;
  InstructionSet instructions;  // of this processor

  int64_t results() const { return kWinogradPoints + 1 - kernel; }  // m

  // The sizes as the products need them.
  MicroKernel<float, float, float> product() const;
  int64_t padded_channels() const;
  int64_t padded_out_channels() const;
};

// What `tiles` tiles and the weight take, in multiply-adds at the rate of the products.
double winograd_cost(const WinogradFilter& filter, int64_t tiles);

// The transformed weight: its floats, and in how many independent rows it is made. `steps` are
// those of `weight` by out channel, channel and tap.
int64_t winograd_packed_size(const WinogradFilter& filter);
int64_t winograd_weight_rows(const WinogradFilter& filter);
void pack_winograd_weight(const WinogradFilter& filter, const float* weight, const int64_t* steps,
                          float* packed, int64_t begin, int64_t end);

struct WinogradTile {
  const float* from[kWinogradPlaces];  // pixels by rows; null: zeros
  float* to[kWinogradMostResults];     // results by rows; null: nowhere
};

// Some tiles at a time, which stay in the cache from pixels to results.
class WinogradBlock {
 public:
  struct Transforms;  // the inner loops

  // bias (out_channels) or null
  WinogradBlock(const WinogradFilter& filter, const float* packed, const float* bias,
                int64_t most_tiles);

  WinogradTile& tile(int64_t t) { return tiles_[t]; }
  void run(int64_t count);  // the first `count` of them

 private:
  void load(int64_t t);
  void multiply(int64_t place, int64_t rows, int64_t k, int64_t columns);
  void store(int64_t t, int64_t k, int64_t columns);

  const WinogradFilter filter_;
  const MicroKernel<float, float, float> kernel_;
  const Transforms& transforms_;
  const float* const packed_;
  const int64_t channels_, out_channels_;  // padded
  const int64_t columns_;                  // out channels whose products are in flight
  const int64_t rows_;                     // tiles, rounded up to the kernel's rows
  const int64_t pixel_step_, product_step_;
  Workspace<float> pixels_;    // (places, tiles, channels)
  Workspace<float> products_;  // (places, tiles, columns)
  std::vector<WinogradTile> tiles_;
  std::vector<float> bias_, ones_, zeros_;
  std::vector<const float*> from_;
  std::vector<float*> to_;
};

}  // namespace glance
