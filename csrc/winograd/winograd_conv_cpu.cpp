#include <algorithm>
#include <cstring>
#include <vector>

#include "common/simd_target.h"
#include "common/workspace.h"
#include "winograd/winograd_conv.h"
#include "winograd/winograd_transforms.h"

namespace glance {
namespace {

constexpr int64_t kLanes = 16;         // channels that are transformed together
constexpr int64_t kLeastTiles = 24;    // of a block: what a panel of the weight is read for
constexpr int64_t kBlockColumns = 64;  // out channels whose products are in flight

int64_t round_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

// Transforms of one tile, `kLanes` channels at a time. Steps are in floats.
struct Transforms {
  // to + point * step = B^T pixels B
  void (*pixels)(const float* const* from, float* to, int64_t step);
  // to[y * side + x], unless it is null, = A^T products A + bias, of the products at from + point * step
  void (*products)(const float* from, int64_t step, const float* bias, float* const* to);
  // to + point * step = G weight G^T; the taps of neighbouring lanes are `lane_step` apart
  void (*taps)(const float* from, int64_t lane_step, float* to, int64_t step);
};

GLANCE_INLINE void pixels_body(const float* const* from, float* GLANCE_RESTRICT to, int64_t step) {
  float between[kPoints][kPoints][kLanes];
  for (int x = 0; x < kPoints; ++x) {
    for (int64_t l = 0; l < kLanes; ++l) {
      float line[kPoints], points[kPoints];
      GLANCE_UNROLL
      for (int y = 0; y < kPoints; ++y) line[y] = from[y * kPoints + x][l];
      transform_pixels(line, points);
      GLANCE_UNROLL
      for (int y = 0; y < kPoints; ++y) between[y][x][l] = points[y];
    }
  }
  for (int y = 0; y < kPoints; ++y) {
    float* row = to + y * kPoints * step;
    for (int64_t l = 0; l < kLanes; ++l) {
      float line[kPoints], points[kPoints];
      GLANCE_UNROLL
      for (int x = 0; x < kPoints; ++x) line[x] = between[y][x][l];
      transform_pixels(line, points);
      GLANCE_UNROLL
      for (int x = 0; x < kPoints; ++x) row[x * step + l] = points[x];
    }
  }
}

template <int kSide>
GLANCE_INLINE void products_body(const float* from, int64_t step, const float* bias,
                                 float* const* to) {
  float between[kSide][kPoints][kLanes];
  for (int x = 0; x < kPoints; ++x) {
    for (int64_t l = 0; l < kLanes; ++l) {
      float line[kPoints], results[kSide];
      GLANCE_UNROLL
      for (int y = 0; y < kPoints; ++y) line[y] = from[(y * kPoints + x) * step + l];
      transform_products(line, results);
      GLANCE_UNROLL
      for (int y = 0; y < kSide; ++y) between[y][x][l] = results[y];
    }
  }
  for (int y = 0; y < kSide; ++y) {
    float row[kSide][kLanes];
    for (int64_t l = 0; l < kLanes; ++l) {
      float line[kPoints], results[kSide];
      GLANCE_UNROLL
      for (int x = 0; x < kPoints; ++x) line[x] = between[y][x][l];
      transform_products(line, results);
      GLANCE_UNROLL
      for (int x = 0; x < kSide; ++x) row[x][l] = results[x] + bias[l];
    }
    for (int x = 0; x < kSide; ++x) {
      if (float* out = to[y * kSide + x]) std::memcpy(out, row[x], sizeof(row[x]));
    }
  }
}

template <int kTaps>
GLANCE_INLINE void taps_body(const float* from, int64_t lane_step, float* GLANCE_RESTRICT to,
                             int64_t step) {
  float taps[kTaps * kTaps][kLanes], between[kPoints][kTaps][kLanes];
  for (int64_t l = 0; l < kLanes; ++l) {
    for (int tap = 0; tap < kTaps * kTaps; ++tap) taps[tap][l] = from[l * lane_step + tap];
  }
  for (int x = 0; x < kTaps; ++x) {
    for (int64_t l = 0; l < kLanes; ++l) {
      float line[kTaps], points[kPoints];
      GLANCE_UNROLL
      for (int y = 0; y < kTaps; ++y) line[y] = taps[y * kTaps + x][l];
      transform_taps(line, points);
      GLANCE_UNROLL
      for (int y = 0; y < kPoints; ++y) between[y][x][l] = points[y];
    }
  }
  for (int y = 0; y < kPoints; ++y) {
    float* row = to + y * kPoints * step;
    for (int64_t l = 0; l < kLanes; ++l) {
      float line[kTaps], points[kPoints];
      GLANCE_UNROLL
      for (int x = 0; x < kTaps; ++x) line[x] = between[y][x][l];
      transform_taps(line, points);
      GLANCE_UNROLL
      for (int x = 0; x < kPoints; ++x) row[x * step + l] = points[x];
    }
  }
}

#define GLANCE_WINOGRAD_TRANSFORMS(Name, target)                                              \
  template <int kTaps>                                                                        \
  struct Name {                                                                               \
    target static void pixels(const float* const* from, float* to, int64_t step) {            \
      pixels_body(from, to, step);                                                            \
    }                                                                                         \
    target static void products(const float* from, int64_t step, const float* bias,           \
                                float* const* to) {                                           \
      products_body<kPoints + 1 - kTaps>(from, step, bias, to);                               \
    }                                                                                         \
    target static void taps(const float* from, int64_t lane_step, float* to, int64_t step) {  \
      taps_body<kTaps>(from, lane_step, to, step);                                            \
    }                                                                                         \
    static Transforms all() { return {&pixels, &products, &taps}; }                           \
  };

GLANCE_WINOGRAD_TRANSFORMS(PlainTransforms, )
#ifdef GLANCE_X86
GLANCE_WINOGRAD_TRANSFORMS(Avx2Transforms, GLANCE_TARGET_AVX2)
GLANCE_WINOGRAD_TRANSFORMS(Avx512Transforms, GLANCE_TARGET_AVX512)
#endif

template <int kTaps>
Transforms transforms_for(InstructionSet instructions) {
#ifdef GLANCE_X86
  if (instructions >= InstructionSet::kAvx512) return Avx512Transforms<kTaps>::all();
  if (instructions == InstructionSet::kAvx2) return Avx2Transforms<kTaps>::all();
#endif
  (void)instructions;
  return PlainTransforms<kTaps>::all();
}

Transforms transforms_of(const WinogradConvParams& p) {
  switch (p.kernel) {
    case 2:
      return transforms_for<2>(p.instructions);
    case 3:
      return transforms_for<3>(p.instructions);
    case 4:
      return transforms_for<4>(p.instructions);
    case 5:
      return transforms_for<5>(p.instructions);
    default:
      return transforms_for<6>(p.instructions);
  }
}

// How one call is cut up.
struct Plan {
  MicroKernel<float, float, float> kernel;
  int64_t channels;      // of the input, rounded up to lanes
  int64_t out_channels;  // rounded up to lanes and panels
  int64_t columns;       // out channels whose products are in flight
  int64_t tiles;         // of a block, a multiple of the kernel's rows

  explicit Plan(const WinogradConvParams& p) : kernel(float_kernel(p.instructions, p.out_channels)) {
    channels = round_up(p.channels, kLanes);
    out_channels = round_up(p.out_channels, std::max(kLanes, kernel.columns));
    columns = std::min(out_channels, round_up(kBlockColumns, kernel.columns));
    const int64_t blocks = (p.tiles() + kLeastTiles - 1) / kLeastTiles;
    tiles = round_up((p.tiles() + blocks - 1) / blocks, kernel.rows);
  }

  int64_t panel_size() const { return channels * kernel.columns; }
  // From one point to the next: a line more than needed, or all points would share a cache set.
  int64_t pixel_step() const { return tiles * channels + kLanes; }
  int64_t product_step() const { return tiles * columns + kLanes; }
};

// A block of tiles: pixels to products to results.
class Block {
 public:
  Block(const WinogradConvParams& p, const Plan& plan)
      : p_(p),
        plan_(plan),
        transforms_(transforms_of(p)),
        pixels_(kWinogradPoints * plan.pixel_step()),
        products_(kWinogradPoints * plan.product_step()),
        bias_(plan.out_channels),
        ones_(plan.kernel.rows, 1.0f),
        zeros_(std::max(plan.kernel.columns, plan.channels)),
        rows_(plan.kernel.rows / plan.kernel.strip),
        out_(plan.kernel.rows) {
    if (p.bias) std::copy(p.bias, p.bias + p.out_channels, bias_.begin());
  }

  // The tiles [first, first + count).
  void run(int64_t first, int64_t count) {
    const int64_t rows = round_up(count, plan_.kernel.rows);
    for (int64_t t = 0; t < count; ++t) load(first + t, t);
    for (int64_t point = 0; point < kWinogradPoints; ++point) {  // rows that no tile has
      float* row = pixels_.data() + point * plan_.pixel_step();
      std::fill(row + count * plan_.channels, row + rows * plan_.channels, 0.0f);
    }
    for (int64_t k = 0; k < plan_.out_channels; k += plan_.columns) {
      const int64_t columns = std::min(plan_.columns, plan_.out_channels - k);
      for (int64_t point = 0; point < kWinogradPoints; ++point) multiply(point, rows, k, columns);
      for (int64_t t = 0; t < count; ++t) store(first + t, t, k, columns);
    }
  }

 private:
  struct Tile {
    int64_t image, y, x;  // of its first result
  };
  Tile tile(int64_t index) const {
    const int64_t columns = p_.tile_columns(), rows = p_.tile_rows();
    return {index / columns / rows, index / columns % rows * p_.tile_side(),
            index % columns * p_.tile_side()};
  }

  void load(int64_t index, int64_t t) {
    const Tile at = tile(index);
    const float* first = p_.input + at.image * p_.batch_step;
    const float* from[kWinogradPoints];
    for (int64_t y = 0; y < kWinogradTile; ++y) {
      for (int64_t x = 0; x < kWinogradTile; ++x) {
        const bool inside = at.y + y < p_.height && at.x + x < p_.width;
        from[y * kWinogradTile + x] =
            inside ? first + (at.y + y) * p_.row_step + (at.x + x) * p_.column_step : nullptr;
      }
    }
    float* to = pixels_.data() + t * plan_.channels;
    for (int64_t c = 0; c < plan_.channels; c += kLanes) {
      const int64_t lanes = std::min(kLanes, p_.channels - c);
      float copies[kWinogradPoints][kLanes];
      const float* sources[kWinogradPoints];
      for (int64_t place = 0; place < kWinogradPoints; ++place) {
        sources[place] = from[place] ? from[place] + c : zeros_.data();
        if (from[place] && lanes < kLanes) {
          std::fill(std::copy(from[place] + c, from[place] + c + lanes, copies[place]),
                    copies[place] + kLanes, 0.0f);
          sources[place] = copies[place];
        }
      }
      transforms_.pixels(sources, to + c, plan_.pixel_step());
    }
  }

  // The products of one point, for out channels [k, k + columns).
  void multiply(int64_t point, int64_t rows, int64_t k, int64_t columns) {
    const auto& kernel = plan_.kernel;
    const float* pixels = pixels_.data() + point * plan_.pixel_step();
    const int64_t panels = plan_.out_channels / kernel.columns;
    const int64_t start = 0;
    MicroTile<float, float, float> tile{};
    tile.rows = rows_.data();
    tile.step = plan_.channels;
    tile.runs = &start;
    tile.run_count = 1;
    tile.run_length = plan_.channels;
    tile.ratio = ones_.data();
    tile.bias = zeros_.data();
    tile.negative_slope = 1;
    tile.out = out_.data();
    tile.width = kernel.columns;
    for (int64_t column = 0; column < columns; column += kernel.columns) {
      const int64_t panel = (k + column) / kernel.columns;
      tile.panel = p_.packed + (point * panels + panel) * plan_.panel_size();
      float* products = products_.data() + point * plan_.product_step() + column;
      for (int64_t row = 0; row < rows; row += kernel.rows) {
        for (int64_t strip = 0; strip < kernel.rows / kernel.strip; ++strip) {
          rows_[strip] = pixels + (row + strip * kernel.strip) * plan_.channels;
        }
        for (int64_t m = 0; m < kernel.rows; ++m) {
          out_[m] = products + (row + m) * plan_.columns;
        }
        kernel.run(tile);
      }
    }
  }

  void store(int64_t index, int64_t t, int64_t k, int64_t columns) {
    const Tile at = tile(index);
    const int64_t side = p_.tile_side();
    const int64_t row = p_.out_width() * p_.out_channels;
    float* first = p_.output + at.image * p_.out_height() * row;
    float* to[kWinogradPoints];
    for (int64_t y = 0; y < side; ++y) {
      for (int64_t x = 0; x < side; ++x) {
        const bool inside = at.y + y < p_.out_height() && at.x + x < p_.out_width();
        to[y * side + x] =
            inside ? first + (at.y + y) * row + (at.x + x) * p_.out_channels + k : nullptr;
      }
    }
    const float* from = products_.data() + t * plan_.columns;
    for (int64_t c = 0; c < columns && k + c < p_.out_channels; c += kLanes) {
      const int64_t lanes = std::min(kLanes, p_.out_channels - k - c);
      float copies[kWinogradPoints][kLanes];
      float* targets[kWinogradPoints];
      for (int64_t place = 0; place < side * side; ++place) {
        targets[place] = !to[place] ? nullptr : lanes < kLanes ? copies[place] : to[place] + c;
      }
      transforms_.products(from + c, plan_.product_step(), bias_.data() + k + c, targets);
      for (int64_t place = 0; lanes < kLanes && place < side * side; ++place) {
        if (to[place]) std::copy(copies[place], copies[place] + lanes, to[place] + c);
      }
    }
  }

  const WinogradConvParams& p_;
  const Plan& plan_;
  const Transforms transforms_;
  Workspace<float> pixels_;    // (points, tiles, channels)
  Workspace<float> products_;  // (points, tiles, columns)
  std::vector<float> bias_, ones_, zeros_;
  std::vector<const float*> rows_;
  std::vector<float*> out_;
};

}  // namespace

// In multiply-adds at the rate of the products: those themselves, and the time that it takes to
// transform an element of a tile or of the weight, as measured; tiles must win by a margin.
bool winograd_pays(const WinogradConvParams& p) {
  constexpr double kTileElement = 25, kWeightElement = 100, kMargin = 0.8;
  if (p.instructions == InstructionSet::kPlain) return false;  // torch's own is vectorised
  const double rate = p.instructions == InstructionSet::kAvx2 ? 1 : 2;  // memory's is the same
  const Plan plan(p);
  const double weight = double(plan.channels) * double(plan.out_channels);
  const double elements = double(p.tiles()) * double(plan.channels + plan.out_channels);
  const double in_tiles = double(p.tiles()) * weight + rate * kTileElement * elements +
                          rate * kWeightElement * weight;
  const double directly = double(p.batch * p.out_height() * p.out_width()) *
                          double(p.kernel * p.kernel * p.channels * p.out_channels);
  return kWinogradPoints * in_tiles < kMargin * directly;
}

int64_t winograd_packed_size(const WinogradConvParams& p) {
  const Plan plan(p);
  return kWinogradPoints * plan.channels * plan.out_channels;
}

int64_t winograd_weight_rows(const WinogradConvParams& p) {
  return Plan(p).out_channels / kLanes;
}

void pack_winograd_weight_cpu(const WinogradConvParams& p, int64_t begin, int64_t end) {
  const Plan plan(p);
  const Transforms transforms = transforms_of(p);
  const int64_t columns = plan.kernel.columns, taps = p.kernel * p.kernel;
  const int64_t step = plan.channels * plan.out_channels;
  std::vector<float> copies(kLanes * taps);
  float spread[kWinogradPoints][kLanes];
  for (int64_t k = begin * kLanes; k < end * kLanes; k += kLanes) {
    const int64_t lanes = std::min(kLanes, p.out_channels - k);
    for (int64_t c = 0; c < plan.channels; ++c) {
      const float* from = p.weight + (k * p.channels + c) * taps;
      int64_t lane_step = p.channels * taps;
      if (c >= p.channels || lanes < kLanes) {
        std::fill(copies.begin(), copies.end(), 0.0f);
        for (int64_t l = 0; c < p.channels && l < lanes; ++l) {
          std::copy(from + l * lane_step, from + l * lane_step + taps, copies.data() + l * taps);
        }
        from = copies.data();
        lane_step = taps;
      }
      float* to = p.packed + k / columns * plan.panel_size() + c * columns + k % columns;
      if (columns >= kLanes) {
        transforms.taps(from, lane_step, to, step);
        continue;
      }
      transforms.taps(from, lane_step, spread[0], kLanes);
      for (int64_t point = 0; point < kWinogradPoints; ++point) {
        for (int64_t l = 0; l < kLanes; l += columns) {
          std::copy(spread[point] + l, spread[point] + l + columns,
                    to + point * step + l / columns * plan.panel_size());
        }
      }
    }
  }
}

int64_t winograd_blocks(const WinogradConvParams& p) {
  const Plan plan(p);
  return (p.tiles() + plan.tiles - 1) / plan.tiles;
}

void winograd_conv_cpu(const WinogradConvParams& p, int64_t begin, int64_t end) {
  const Plan plan(p);
  Block block(p, plan);
  for (int64_t b = begin; b < end; ++b) {
    block.run(b * plan.tiles, std::min(plan.tiles, p.tiles() - b * plan.tiles));
  }
}

}  // namespace glance
