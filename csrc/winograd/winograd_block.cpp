#include "winograd/winograd_block.h"

#include <algorithm>
#include <cstring>

#include "common/simd_target.h"
#include "winograd/winograd_transforms.h"

namespace glance {

// Of one tile, kLanes channels at a time; steps are in floats. Places go row by row.
struct WinogradBlock::Transforms {
  // to + place * step = B^T pixels B
  void (*pixels)(const float* const* from, float* to, int64_t step);
  // to[place] = A^T products A + bias, unless it is null; the products are at from + place * step
  void (*results)(const float* from, int64_t step, const float* bias, float* const* to);
  // to + place * step = G taps G^T; `steps` are from lane to lane and from tap to tap
  void (*taps)(const float* from, const int64_t* steps, float* to, int64_t step);

  static const Transforms& of(const WinogradFilter& filter);
};

namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kColumns = 64;  // out channels whose products are in flight

int64_t round_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

GLANCE_INLINE void pixels_body(const float* const* from, float* GLANCE_RESTRICT to, int64_t step) {
  float between[kWinogradPoints][kWinogradPoints][kLanes];
  for (int x = 0; x < kWinogradPoints; ++x) {
    for (int64_t l = 0; l < kLanes; ++l) {
      float line[kWinogradPoints], points[kWinogradPoints];
      GLANCE_UNROLL
      for (int y = 0; y < kWinogradPoints; ++y) line[y] = from[y * kWinogradPoints + x][l];
      transform_pixels(line, points);
      GLANCE_UNROLL
      for (int y = 0; y < kWinogradPoints; ++y) between[y][x][l] = points[y];
    }
  }
  for (int y = 0; y < kWinogradPoints; ++y) {
    float row[kWinogradPoints][kLanes];
    for (int64_t l = 0; l < kLanes; ++l) {
      float line[kWinogradPoints], points[kWinogradPoints];
      GLANCE_UNROLL
      for (int x = 0; x < kWinogradPoints; ++x) line[x] = between[y][x][l];
      transform_pixels(line, points);
      GLANCE_UNROLL
      for (int x = 0; x < kWinogradPoints; ++x) row[x][l] = points[x];
    }
    for (int x = 0; x < kWinogradPoints; ++x, to += step) std::memcpy(to, row[x], sizeof(row[x]));
  }
}

template <int kTaps>
GLANCE_INLINE void results_body(const float* from, int64_t step, const float* bias,
                                float* const* to) {
  constexpr int kResults = kWinogradPoints + 1 - kTaps;
  float between[kResults][kWinogradPoints][kLanes];
  for (int x = 0; x < kWinogradPoints; ++x) {
    for (int64_t l = 0; l < kLanes; ++l) {
      float line[kWinogradPoints], results[kResults];
      GLANCE_UNROLL
      for (int y = 0; y < kWinogradPoints; ++y)
        line[y] = from[(y * kWinogradPoints + x) * step + l];
      transform_products(line, results);
      GLANCE_UNROLL
      for (int y = 0; y < kResults; ++y) between[y][x][l] = results[y];
    }
  }
  float offset[kLanes];
  std::memcpy(offset, bias, sizeof(offset));
  for (int y = 0; y < kResults; ++y) {
    float row[kResults][kLanes];
    for (int64_t l = 0; l < kLanes; ++l) {
      float line[kWinogradPoints], results[kResults];
      GLANCE_UNROLL
      for (int x = 0; x < kWinogradPoints; ++x) line[x] = between[y][x][l];
      transform_products(line, results);
      GLANCE_UNROLL
      for (int x = 0; x < kResults; ++x) row[x][l] = results[x] + offset[l];
    }
    for (int x = 0; x < kResults; ++x) {
      if (to[x]) std::memcpy(to[x], row[x], sizeof(row[x]));
    }
    to += kResults;
  }
}

template <int kTaps>
GLANCE_INLINE void taps_body(const float* from, const int64_t* steps, float* GLANCE_RESTRICT to,
                             int64_t step) {
  float taps[kTaps * kTaps][kLanes], between[kWinogradPoints][kTaps][kLanes];
  for (int64_t l = 0; l < kLanes; ++l) {
    for (int tap = 0; tap < kTaps * kTaps; ++tap)
      taps[tap][l] = from[l * steps[0] + tap * steps[1]];
  }
  for (int x = 0; x < kTaps; ++x) {
    for (int64_t l = 0; l < kLanes; ++l) {
      float line[kTaps], points[kWinogradPoints];
      GLANCE_UNROLL
      for (int y = 0; y < kTaps; ++y) line[y] = taps[y * kTaps + x][l];
      transform_taps(line, points);
      GLANCE_UNROLL
      for (int y = 0; y < kWinogradPoints; ++y) between[y][x][l] = points[y];
    }
  }
  for (int y = 0; y < kWinogradPoints; ++y) {
    float row[kWinogradPoints][kLanes];
    for (int64_t l = 0; l < kLanes; ++l) {
      float line[kTaps], points[kWinogradPoints];
      GLANCE_UNROLL
      for (int x = 0; x < kTaps; ++x) line[x] = between[y][x][l];
      transform_taps(line, points);
      GLANCE_UNROLL
      for (int x = 0; x < kWinogradPoints; ++x) row[x][l] = points[x];
    }
    for (int x = 0; x < kWinogradPoints; ++x, to += step) std::memcpy(to, row[x], sizeof(row[x]));
  }
}

#define GLANCE_WINOGRAD_TRANSFORMS(Name, target)                                                \
  template <int kTaps>                                                                          \
  struct Name {                                                                                 \
    target static void pixels(const float* const* from, float* to, int64_t step) {              \
      pixels_body(from, to, step);                                                              \
    }                                                                                           \
    target static void results(const float* from, int64_t step, const float* bias,              \
                               float* const* to) {                                              \
      results_body<kTaps>(from, step, bias, to);                                                \
    }                                                                                           \
    target static void taps(const float* from, const int64_t* steps, float* to, int64_t step) { \
      taps_body<kTaps>(from, steps, to, step);                                                  \
    }                                                                                           \
    template <typename Transforms>                                                              \
    static Transforms all() {                                                                   \
      return {&pixels, &results, &taps};                                                        \
    }                                                                                           \
  };

GLANCE_WINOGRAD_TRANSFORMS(PlainTransforms, )
#ifdef GLANCE_X86
GLANCE_WINOGRAD_TRANSFORMS(Avx2Transforms, GLANCE_TARGET_AVX2)
GLANCE_WINOGRAD_TRANSFORMS(Avx512Transforms, GLANCE_TARGET_AVX512)
#endif

template <template <int> class Set, typename Transforms>
const Transforms& transforms_in(int64_t kernel) {
  static const Transforms all[] = {
      Set<3>::template all<Transforms>(), Set<4>::template all<Transforms>(),
      Set<5>::template all<Transforms>(), Set<6>::template all<Transforms>()};
  return all[kernel - 3];
}

}  // namespace

const WinogradBlock::Transforms& WinogradBlock::Transforms::of(const WinogradFilter& filter) {
#ifdef GLANCE_X86
  if (filter.instructions >= InstructionSet::kAvx512) {
    return transforms_in<Avx512Transforms, Transforms>(filter.kernel);
  }
  if (filter.instructions == InstructionSet::kAvx2) {
    return transforms_in<Avx2Transforms, Transforms>(filter.kernel);
  }
#endif
  return transforms_in<PlainTransforms, Transforms>(filter.kernel);
}

MicroKernel<float, float, float> WinogradFilter::product() const {
  return float_kernel(instructions, out_channels);
}

int64_t WinogradFilter::padded_channels() const { return round_up(channels, kLanes); }

int64_t WinogradFilter::padded_out_channels() const {
  return round_up(out_channels, std::max(kLanes, product().columns));
}

// The products themselves, and the time that it takes to transform an element of a tile or of the
// weight, as measured on a processor with AVX2; with wider vectors memory is no faster.
double winograd_cost(const WinogradFilter& filter, int64_t tiles) {
  constexpr double kTileElement = 15, kWeightElement = 100;
  const double rate = filter.instructions >= InstructionSet::kAvx512 ? 2 : 1;
  const double channels = double(filter.padded_channels());
  const double out_channels = double(filter.padded_out_channels());
  const double weight = channels * out_channels, count = double(tiles);
  return double(kWinogradPlaces) *
         (count * weight +
          rate * (kTileElement * count * (channels + out_channels) + kWeightElement * weight));
}

int64_t winograd_packed_size(const WinogradFilter& filter) {
  return kWinogradPlaces * filter.padded_channels() * filter.padded_out_channels();
}

int64_t winograd_weight_rows(const WinogradFilter& filter) {
  return filter.padded_out_channels() / kLanes;
}

// A panel is (channels, columns of the kernel); of each place one panel stands behind the other.
void pack_winograd_weight(const WinogradFilter& filter, const float* weight, const int64_t* steps,
                          float* packed, int64_t begin, int64_t end) {
  const auto& transforms = WinogradBlock::Transforms::of(filter);
  const int64_t columns = filter.product().columns, taps = filter.kernel * filter.kernel;
  const int64_t channels = filter.padded_channels();
  const int64_t step = channels * filter.padded_out_channels();
  std::vector<float> copies(kLanes * taps);
  float spread[kWinogradPlaces][kLanes];
  for (int64_t k = begin * kLanes; k < end * kLanes; k += kLanes) {
    const int64_t lanes = std::min(kLanes, filter.out_channels - k);
    for (int64_t c = 0; c < channels; ++c) {
      const float* from = weight + k * steps[0] + c * steps[1];
      int64_t lane_steps[2] = {steps[0], steps[2]};
      if (c >= filter.channels || lanes < kLanes) {  // not all of them are there
        std::fill(copies.begin(), copies.end(), 0.0f);
        for (int64_t l = 0; c < filter.channels && l < lanes; ++l) {
          for (int64_t tap = 0; tap < taps; ++tap) {
            copies[l * taps + tap] = from[l * steps[0] + tap * steps[2]];
          }
        }
        from = copies.data();
        lane_steps[0] = taps;
        lane_steps[1] = 1;
      }
      float* to = packed + k / columns * channels * columns + c * columns + k % columns;
      if (columns >= kLanes) {
        transforms.taps(from, lane_steps, to, step);
        continue;
      }
      transforms.taps(from, lane_steps, spread[0], kLanes);
      for (int64_t place = 0; place < kWinogradPlaces; ++place) {
        for (int64_t l = 0; l < kLanes; l += columns) {
          std::copy(spread[place] + l, spread[place] + l + columns,
                    to + place * step + l / columns * channels * columns);
        }
      }
    }
  }
}

WinogradBlock::WinogradBlock(const WinogradFilter& filter, const float* packed, const float* bias,
                             int64_t most_tiles)
    : filter_(filter),
      kernel_(filter.product()),
      transforms_(Transforms::of(filter)),
      packed_(packed),
      channels_(filter.padded_channels()),
      out_channels_(filter.padded_out_channels()),
      columns_(std::min(out_channels_, round_up(kColumns, kernel_.columns))),
      rows_(round_up(most_tiles, kernel_.rows)),
      // A line more than needed, or all places would share a set of the innermost cache.
      pixel_step_(rows_ * channels_ + kLanes),
      product_step_(rows_ * columns_ + kLanes),
      pixels_(kWinogradPlaces * pixel_step_),
      products_(kWinogradPlaces * product_step_),
      tiles_(most_tiles),
      bias_(out_channels_),
      ones_(kernel_.rows, 1.0f),
      zeros_(std::max(kernel_.columns, kLanes)),
      from_(kernel_.rows / kernel_.strip),
      to_(kernel_.rows) {
  if (bias) std::copy(bias, bias + filter.out_channels, bias_.begin());
}

void WinogradBlock::run(int64_t count) {
  const int64_t rows = round_up(count, kernel_.rows);
  for (int64_t t = 0; t < count; ++t) load(t);
  for (int64_t place = 0; place < kWinogradPlaces; ++place) {  // rows that no tile has
    float* row = pixels_.data() + place * pixel_step_;
    std::fill(row + count * channels_, row + rows * channels_, 0.0f);
  }
  for (int64_t k = 0; k < out_channels_; k += columns_) {
    const int64_t columns = std::min(columns_, out_channels_ - k);
    for (int64_t place = 0; place < kWinogradPlaces; ++place) multiply(place, rows, k, columns);
    for (int64_t t = 0; t < count; ++t) store(t, k, columns);
  }
}

void WinogradBlock::load(int64_t t) {
  const float* const* from = tiles_[t].from;
  float* to = pixels_.data() + t * channels_;
  for (int64_t c = 0; c < channels_; c += kLanes) {
    const int64_t lanes = std::min(kLanes, filter_.channels - c);
    float copies[kWinogradPlaces][kLanes];
    const float* sources[kWinogradPlaces];
    for (int64_t place = 0; place < kWinogradPlaces; ++place) {
      sources[place] = from[place] ? from[place] + c : zeros_.data();
      if (from[place] && lanes < kLanes) {
        std::fill(std::copy(from[place] + c, from[place] + c + lanes, copies[place]),
                  copies[place] + kLanes, 0.0f);
        sources[place] = copies[place];
      }
    }
    transforms_.pixels(sources, to + c, pixel_step_);
  }
}

// The products of one place, for out channels [k, k + columns).
void WinogradBlock::multiply(int64_t place, int64_t rows, int64_t k, int64_t columns) {
  const int64_t start = 0;
  MicroTile<float, float, float> tile{};
  tile.rows = from_.data();
  tile.step = channels_;
  tile.runs = &start;
  tile.run_count = 1;
  tile.run_length = channels_;
  tile.ratio = ones_.data();
  tile.bias = zeros_.data();
  tile.negative_slope = 1;
  tile.out = to_.data();
  tile.width = kernel_.columns;
  const float* pixels = pixels_.data() + place * pixel_step_;
  for (int64_t column = 0; column < columns; column += kernel_.columns) {
    tile.panel = packed_ + (place * out_channels_ + k + column) * channels_;
    float* products = products_.data() + place * product_step_ + column;
    for (int64_t row = 0; row < rows; row += kernel_.rows) {
      for (int64_t strip = 0; strip < kernel_.rows / kernel_.strip; ++strip) {
        from_[strip] = pixels + (row + strip * kernel_.strip) * channels_;
      }
      for (int64_t m = 0; m < kernel_.rows; ++m) to_[m] = products + (row + m) * columns_;
      kernel_.run(tile);
    }
  }
}

void WinogradBlock::store(int64_t t, int64_t k, int64_t columns) {
  const int64_t places = filter_.results() * filter_.results();
  const WinogradTile& tile = tiles_[t];
  const float* from = products_.data() + t * columns_;
  for (int64_t c = 0; c < columns && k + c < filter_.out_channels; c += kLanes) {
    const int64_t lanes = std::min(kLanes, filter_.out_channels - k - c);
    float copies[kWinogradMostResults][kLanes];
    float* targets[kWinogradMostResults];
    for (int64_t place = 0; place < places; ++place) {
      float* to = tile.to[place];
      targets[place] = !to ? nullptr : lanes < kLanes ? copies[place] : to + k + c;
    }
    transforms_.results(from + c, product_step_, bias_.data() + k + c, targets);
    for (int64_t place = 0; lanes < kLanes && place < places; ++place) {
      if (float* to = tile.to[place]) {
        std::copy(copies[place], copies[place] + lanes, to + k + c);
      }
    }
  }
}

}  // namespace glance
