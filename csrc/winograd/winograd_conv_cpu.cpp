#include <algorithm>

#include "winograd/winograd_conv.h"

namespace glance {
namespace {

constexpr int64_t kLeastTiles = 24;  // of a block: what a panel of the weight is read for
constexpr double kMargin = 0.8;      // by which tiles must be expected to win

// Blocks are of equal size, so that threads are.
int64_t block_size(const WinogradConvParams& p) {
  const int64_t blocks = (p.tiles() - 1) / kLeastTiles + 1;
  const int64_t rows = p.filter().product().rows;
  return ((p.tiles() - 1) / blocks + rows) / rows * rows;
}

void place_tile(const WinogradConvParams& p, int64_t index, WinogradTile& tile) {
  const int64_t results = p.filter().results();
  const int64_t image = index / (p.tile_rows() * p.tile_columns());
  const int64_t top = index / p.tile_columns() % p.tile_rows() * results;
  const int64_t left = index % p.tile_columns() * results;
  const float* from = p.input + image * p.batch_step;
  float* to = p.output + image * p.out_height() * p.out_width() * p.out_channels;
  for (int64_t place = 0; place < kWinogradPlaces; ++place) {
    const int64_t y = top + place / kWinogradPoints, x = left + place % kWinogradPoints;
    tile.from[place] =
        y < p.height && x < p.width ? from + y * p.row_step + x * p.column_step : nullptr;
  }
  for (int64_t place = 0; place < results * results; ++place) {
    const int64_t y = top + place / results, x = left + place % results;
    const bool inside = y < p.out_height() && x < p.out_width();
    tile.to[place] = inside ? to + (y * p.out_width() + x) * p.out_channels : nullptr;
  }
}

}  // namespace

bool winograd_pays(const WinogradConvParams& p) {
  if (p.instructions == InstructionSet::kPlain) return false;  // torch's own is vectorised
  const double directly = double(p.batch * p.out_height() * p.out_width()) *
                          double(p.kernel * p.kernel * p.channels * p.out_channels);
  return winograd_cost(p.filter(), p.tiles()) < kMargin * directly;
}

void pack_winograd_weight_cpu(const WinogradConvParams& p, int64_t begin, int64_t end) {
  pack_winograd_weight(p.filter(), p.weight, p.weight_steps, p.packed, begin, end);
}

int64_t winograd_blocks(const WinogradConvParams& p) { return (p.tiles() - 1) / block_size(p) + 1; }

void winograd_conv_cpu(const WinogradConvParams& p, int64_t begin, int64_t end) {
  const int64_t size = block_size(p);
  WinogradBlock block(p.filter(), p.packed, p.bias, size);
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = b * size, count = std::min(size, p.tiles() - first);
    for (int64_t t = 0; t < count; ++t) place_tile(p, first + t, block.tile(t));
    block.run(count);
  }
}

}  // namespace glance
