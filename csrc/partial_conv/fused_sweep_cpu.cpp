// The fused path's output and gradient of the input: tiles of the source are brought into cache,
// masked or scaled on the way, or read in their place where that changes nothing; the micro-kernel
// multiplies the windows of all cells that are not empty, and writes into the target where that
// holds a pixel's channels side by side; elsewhere into sums in cache, which are stored in the
// target's layout.
#include <cstring>

#include "common/workspace.h"
#include "partial_conv/sweep_plan.h"
#include "partial_conv/tile_rows.h"

namespace glance {
namespace {

constexpr int64_t kPackChannels = 8;  // whose taps of a panel fit into the innermost cache

// Packs the panel whose first weight is `weight`, one value after the other.
template <typename Plan>
void pack_values(const Plan& plan, const typename Plan::Stored* weight, int64_t real,
                 typename Plan::Factor* panel) {
  using C = typename Plan::Factor;
  const int64_t columns = plan.kernel.columns, depth = plan.kernel.depth;
  for (const Phase& phase : plan.phases) {
    for (int64_t c = 0; c < plan.source_channels; ++c) {
      for (size_t tap = 0; tap < phase.taps.size(); ++tap) {
        const auto* from = weight + phase.taps[tap].weight + c * plan.weight_source;
        C* to =
            panel + phase.packed + (tap * plan.factors + c / depth * depth) * columns + c % depth;
        for (int64_t k = 0; k < real; ++k) to[k * depth] = convert<C>(from[k * plan.weight_column]);
      }
    }
  }
}

// The same by blocks, for the layouts that weights have.
void pack_blocks(const PartialConvParams& p, const SweepPlan<float, float, float, float>& plan,
                 const float* weight, int64_t real, float* panel) {
  const int64_t columns = plan.kernel.columns, taps = p.kernel[0] * p.kernel[1];
  const bool source_first = plan.weight_source == 1, columns_first = plan.weight_column == 1;
  const bool taps_first = p.weight_strides[3] == 1 && p.weight_strides[2] == p.kernel[1];
  if (!source_first && !columns_first && !taps_first) {
    return pack_values(plan, weight, real, panel);
  }
  if (source_first || columns_first) {
    for (const Phase& phase : plan.phases) {
      for (size_t tap = 0; tap < phase.taps.size(); ++tap) {
        const float* from = weight + phase.taps[tap].weight;
        float* to = panel + phase.packed + tap * plan.factors * columns;
        if (source_first) {
          transpose(from, plan.weight_column, real, plan.source_channels, to, columns);
          continue;
        }
        for (int64_t c = 0; c < plan.source_channels; ++c) {
          std::copy_n(from + c * plan.weight_source, real, to + c * columns);
        }
      }
    }
    return;
  }
  // Taps of neighbouring channels are neighbours where the source's channels are the weight's.
  const int64_t most = plan.weight_source == taps ? kPackChannels : 1;
  std::vector<float> windows(most * taps * columns);
  for (int64_t c = 0; c < plan.source_channels; c += most) {
    const int64_t count = std::min(most, plan.source_channels - c);
    transpose(weight + c * plan.weight_source, plan.weight_column, real, count * taps,
              windows.data(), columns);
    for (const Phase& phase : plan.phases) {
      float* to = panel + phase.packed + c * columns;
      for (const Tap& tap : phase.taps) {
        for (int64_t i = 0; i < count; ++i) {
          std::memcpy(to + i * columns, windows.data() + (i * taps + tap.weight) * columns,
                      columns * sizeof(float));
        }
        to += plan.factors * columns;
      }
    }
  }
}

template <typename Plan>
void pack(const PartialConvBackwardParams& p, const Plan& plan, int64_t begin, int64_t end) {
  using T = typename Plan::Stored;
  using C = typename Plan::Factor;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t group = index / plan.panels;
    const int64_t first = index % plan.panels * plan.kernel.columns;
    const int64_t real = std::min(plan.kernel.columns, plan.target_channels - first);
    const T* weight =
        static_cast<const T*>(p.weight) + group * plan.weight_group + first * plan.weight_column;
    C* panel = static_cast<C*>(p.packed) + index * plan.panel_size;
    if (real < plan.kernel.columns || plan.factors != plan.source_channels) {
      std::fill(panel, panel + plan.panel_size, C{});
    }
    if constexpr (std::is_same_v<T, float>) {
      pack_blocks(p, plan, weight, real, panel);
    } else {
      pack_values(plan, weight, real, panel);
    }
  }
}

template <typename Plan>
class SweepWorker {
  using T = typename Plan::Stored;
  using C = typename Plan::Factor;
  using A = typename Plan::Sum;
  using O = typename Plan::Result;

  struct Tile {
    int64_t image, top, left, height, width;  // of the target, in pixels
    int64_t cell_y, cell_x;
    C* copy;
    const C* source;  // the copy, or where the tile stands in the map
    bool in_map;
    int64_t first;  // of its pixels among the sums
    int64_t place(const SweepWorker& worker, int64_t y, int64_t x) const {
      if (!worker.in_place_) return first + y * width + x;
      return (image * worker.plan_.target[0] + top + y) * worker.plan_.target[1] + left + x;
    }
  };

  static constexpr int64_t kNowhere = -1;

  // The cells of one phase that meet the source with the same runs: those above and below it are
  // left out. They come in the micro-kernel's strips, of which one cell at least is not empty.
  struct Rows {
    int64_t phase, first_run, end_run;
    bool in_map;
    std::vector<const C*> source;  // of each strip
    std::vector<A> ratio;          // of each cell
    std::vector<int64_t> place;    // of each cell, in pixels; kNowhere of an empty one
  };

 public:
  SweepWorker(const PartialConvBackwardParams& p, const Plan& plan)
      : p_(p),
        plan_(plan),
        counts_(p),
        in_flight_(std::max<int64_t>(
            1, std::min(Plan::kTileBytes / (plan.tile_size() * int64_t(sizeof(C))),
                        Plan::kTileCells / tile_pixels()))),
        // A strip at the end of a row of cells reads on: its other cells are stored nowhere.
        sources_(in_flight_ * plan.tile_size() + reads_on()),
        in_place_(std::is_same_v<T, O> && p.channels_last &&
                  (!plan.backward || p.mask_channels == 1)),
        sums_(in_place_ ? 0 : in_flight_ * tile_pixels() * plan.kernel.columns),
        out_(plan.kernel.rows),
        ratio_(std::max(p.in_width, p.out_width)),
        bias_(plan.panels * plan.kernel.columns * p.groups) {
    const T* bias = static_cast<const T*>(p.bias);
    for (int64_t k = 0; !plan.backward && bias && k < p.out_channels; ++k) {
      const int64_t group = k / plan.target_channels, own = k % plan.target_channels;
      bias_[group * plan.panels * plan.kernel.columns + own] = widen(bias[k]);
    }
    const T* of_source = static_cast<const T*>(plan.backward ? p.grad_output : p.input);
    const int64_t channels = plan.source_channels * p.groups;
    source_ = {of_source, channels, plan.source[0], plan.source[1], p.channels_last};
    result_map_ = source_;
    result_map_.data = static_cast<const T*>(p.result);
    if (plan.backward && p.result) activation_.resize(plan.tile_pixels[1] * plan.pitch);
  }

  // Units of work are numbered by group, part of the panels, image, row, column of a tile.
  void run(int64_t begin, int64_t end) {
    const int64_t of_part = plan_.all_tiles(), of_group = of_part * plan_.parts;
    while (begin < end) {
      const int64_t group = begin / of_group, part = begin % of_group / of_part;
      const int64_t tile = begin % of_part, last = std::min(end, (group + 1) * of_group);
      // Tiles are read once for all parts that have every one of them here.
      const int64_t whole = tile == 0 ? (last - begin) / of_part : 0;
      const int64_t count = whole > 0 ? of_part : std::min(last - begin, of_part - tile);
      const int64_t parts = std::max<int64_t>(whole, 1);
      const int64_t first_panel = part * plan_.panels / plan_.parts;
      const int64_t end_panel = (part + parts) * plan_.panels / plan_.parts;
      for (int64_t from = tile; from < tile + count; from += in_flight_) {
        run_tiles(group, from, std::min(from + in_flight_, tile + count), first_panel, end_panel);
      }
      begin += parts * count;
    }
  }

 private:
  void run_tiles(int64_t group, int64_t begin, int64_t end, int64_t first_panel,
                 int64_t end_panel) {
    const int64_t of_image = plan_.tiles[0] * plan_.tiles[1];
    tiles_.clear();
    rows_.clear();
    empty_.clear();
    writes_valid_ = p_.valid && first_panel == 0;
    int64_t pixels = 0;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t at = index % of_image;
      Tile tile;
      tile.image = index / of_image;
      tile.cell_y = at / plan_.tiles[1] * plan_.tile_cells[0];
      tile.cell_x = at % plan_.tiles[1] * plan_.tile_cells[1];
      tile.top = tile.cell_y * plan_.step[0];
      tile.left = tile.cell_x * plan_.step[1];
      tile.height = std::min(plan_.tile_cells[0] * plan_.step[0], plan_.target[0] - tile.top);
      tile.width = std::min(plan_.tile_cells[1] * plan_.step[1], plan_.target[1] - tile.left);
      tile.copy = sources_.data() + (index - begin) * plan_.tile_size();
      tile.first = pixels;
      pixels += tile.height * tile.width;
      tile.source = place_in_map(tile);
      tile.in_map = tile.source;
      if (!tile.in_map) tile.source = tile.copy;
      if (list_cells(tile, group) && !tile.in_map) load(tile, group);
      tiles_.push_back(tile);
    }
    multiply(group, first_panel, end_panel);
  }

  int64_t tile_pixels() const {
    return plan_.tile_cells[0] * plan_.tile_cells[1] * plan_.step[0] * plan_.step[1];
  }

  // Elements that a strip at the end of a row of cells may reach behind it.
  int64_t reads_on() const { return (plan_.kernel.strip - 1) * plan_.advance[1] * plan_.pitch; }

  // The tile's first pixel in the source if the tile is all valid and all inside, else null.
  const C* place_in_map(const Tile& tile) const {
    if constexpr (std::is_same_v<T, C>) {
      if (!plan_.in_map) return nullptr;
      const int64_t top = tile.cell_y * plan_.advance[0] + plan_.first[0];
      const int64_t left = tile.cell_x * plan_.advance[1] + plan_.first[1];
      const int64_t height = (tile.height - 1) * plan_.advance[0] + plan_.reach[0];
      const int64_t width = (tile.width - 1) * plan_.advance[1] + plan_.reach[1];
      const int64_t rows = plan_.source[0], columns = plan_.source[1];
      if (top < 0 || left < 0 || top + height > rows || left + width > columns) return nullptr;
      const int64_t first = (tile.image * rows + top) * columns + left;
      const int64_t end = (first + (height - 1) * columns + width) * plan_.pitch + reads_on();
      if (end > plan_.batch * rows * columns * plan_.pitch) return nullptr;
      const uint8_t* mask =
          p_.mask + ((p_.mask_batch == 1 ? 0 : tile.image) * rows + top) * columns + left;
      for (int64_t y = 0; y < height; ++y) {
        if (!all_valid(mask + y * columns, width)) return nullptr;
      }
      return source_.data + first * plan_.pitch;
    }
    return nullptr;
  }

  // Whether there is a cell that is not empty.
  bool list_cells(const Tile& tile, int64_t group) {
    bool any = false;
    const int64_t n = p_.mask_batch == 1 ? 0 : tile.image;
    const int64_t ratio_group = p_.ratio_groups() == 1 ? 0 : group;
    for (int64_t y = 0; y < tile.height; ++y) {
      const A* ratio = ratio_.data();
      if (plan_.backward) {
        target_validity(n, group, tile.top + y, tile.left, tile.width);
      } else if (tile.in_map) {
        std::fill_n(ratio_.begin(), tile.width, A{1});
        write_valid(tile, n, group, y);
      } else {
        const int32_t* counts = counts_.row(n, ratio_group, tile.top + y);
        counts_.ratios(counts, tile.left, tile.left + tile.width, ratio_.data());
        write_valid(tile, n, group, y);
      }
      const int64_t in_row = y % plan_.step[0] * plan_.step[1];
      const int64_t columns = tile.in_map ? plan_.source[1] : plan_.tile_pixels[1];
      const int64_t source_y = y / plan_.step[0] * plan_.advance[0] * columns;
      for (int64_t a = 0; a < plan_.step[1]; ++a) {
        const int64_t at = (tile.cell_y + y / plan_.step[0]) * plan_.advance[0];
        Rows* rows = rows_of(in_row + a, at, tile.in_map);
        any = list_row(tile, rows, ratio, y, a, tile.source + source_y * plan_.pitch) || any;
      }
    }
    return any;
  }

  // Of row y of the tile, from the ratio; once for each mask.
  void write_valid(const Tile& tile, int64_t n, int64_t group, int64_t y) {
    if (!writes_valid_ || tile.image >= p_.mask_batch || group >= p_.ratio_groups()) return;
    const int64_t row = (n * p_.ratio_groups() + group) * p_.out_height + tile.top + y;
    uint8_t* valid = p_.valid + row * p_.out_width + tile.left;
    for (int64_t x = 0; x < tile.width; ++x) valid[x] = ratio_[x] > 0;
  }

  // Lists the cells of one phase in a row of the tile: pixels a, a + step, ... of row y.
  bool list_row(const Tile& tile, Rows* rows, const A* ratio, int64_t y, int64_t a, const C* from) {
    const int64_t strip = plan_.kernel.strip, next = plan_.step[1];
    const int64_t advance = strip * plan_.advance[1] * plan_.pitch;
    const int64_t cells = (tile.width - a + next - 1) / next;
    int64_t place = tile.place(*this, y, a);
    if (!rows) {
      for (int64_t i = 0; i < cells; ++i, place += next) empty_.push_back(place);
      return false;
    }
    const size_t strips = rows->source.size(), listed = rows->place.size();
    const int64_t most = (cells + strip - 1) / strip;
    rows->source.resize(strips + most);
    rows->ratio.resize(listed + most * strip);
    rows->place.resize(listed + most * strip);
    const C** source_at = rows->source.data() + strips;
    A* ratio_at = rows->ratio.data() + listed;
    int64_t* place_at = rows->place.data() + listed;
    int64_t kept = 0;
    if (tile.in_map) {  // every cell counts
      for (; kept < most; ++kept) source_at[kept] = from + kept * advance;
      for (int64_t i = 0; i < most * strip; ++i) {
        ratio_at[i] = i < cells ? A(1) : A(0);
        place_at[i] = i < cells ? place + i : kNowhere;
      }
      return true;
    }
    for (int64_t i = 0; i < cells; i += strip, from += advance) {
      bool filled = false;
      for (int64_t m = 0; m < strip; ++m, place += next) {
        const bool inside = i + m < cells;
        const A own = inside ? ratio[a + (i + m) * next] : A(0);
        const bool valid = own > 0;
        if (inside && !valid) empty_.push_back(place);
        filled = filled || valid;
        ratio_at[kept * strip + m] = own;
        place_at[kept * strip + m] = valid ? place : kNowhere;
      }
      source_at[kept] = from;
      kept += filled;
    }
    rows->source.resize(strips + kept);
    rows->ratio.resize(listed + kept * strip);
    rows->place.resize(listed + kept * strip);
    return kept > 0;
  }

  // The list of a phase's cells at row `at` of the source; null if no tap meets it.
  Rows* rows_of(int64_t phase, int64_t at, bool in_map) {
    const std::vector<int64_t>& offsets = plan_.phases[phase].run_rows;
    const auto first = std::lower_bound(offsets.begin(), offsets.end(), -at) - offsets.begin();
    const auto last =
        std::lower_bound(offsets.begin(), offsets.end(), plan_.source[0] - at) - offsets.begin();
    if (first == last) return nullptr;
    for (Rows& rows : rows_) {
      const bool same_runs = rows.first_run == first && rows.end_run == last;
      if (rows.phase == phase && same_runs && rows.in_map == in_map) return &rows;
    }
    rows_.push_back({phase, first, last, in_map, {}, {}, {}});
    return &rows_.back();
  }

  // 1 where a pixel of the input counts in one channel at least.
  void target_validity(int64_t n, int64_t group, int64_t y, int64_t x, int64_t count) {
    const int64_t plane = p_.in_height * p_.in_width;
    const int64_t channels = p_.mask_channels == 1 ? 1 : plan_.target_channels;
    const int64_t first = p_.mask_channels == 1 ? 0 : group * channels;
    std::fill_n(ratio_.begin(), count, A{0});
    for (int64_t c = first; c < first + channels; ++c) {
      const uint8_t* mask = p_.mask + (n * p_.mask_channels + c) * plane + y * p_.in_width + x;
      for (int64_t i = 0; i < count; ++i) ratio_[i] = mask[i] ? A{1} : ratio_[i];
    }
  }

  void load(const Tile& tile, int64_t group) {
    const int64_t width = plan_.tile_pixels[1], pitch = plan_.pitch;
    const int64_t top = tile.cell_y * plan_.advance[0] + plan_.first[0];
    const int64_t left = tile.cell_x * plan_.advance[1] + plan_.first[1];
    const int64_t from = std::clamp<int64_t>(-left, 0, width);
    const int64_t to = std::clamp<int64_t>(plan_.source[1] - left, from, width);
    for (int64_t y = 0; y < plan_.tile_pixels[0]; ++y) {
      C* row = tile.copy + y * width * pitch;
      if (top + y < 0 || top + y >= plan_.source[0]) {
        std::fill(row, row + width * pitch, C{});
        continue;
      }
      std::fill(row, row + from * pitch, C{});
      std::fill(row + to * pitch, row + width * pitch, C{});
      if (from == to) continue;
      const PixelRow pixels{
          tile.image,           top + y, left + from, to - from, group * plan_.source_channels,
          plan_.source_channels};
      copy_pixels(source_, pixels, pitch, row + from * pitch);
      if (!plan_.backward) {
        mask_pixels(p_, pixels, pitch, row + from * pitch);
        continue;
      }
      if (p_.result) {
        copy_pixels(result_map_, pixels, pitch, activation_.data());
        activation_gradient<C>(activation_.data(), pixels.count * pitch, A(p_.negative_slope),
                               row + from * pitch);
      }
      const int64_t n = p_.mask_batch == 1 ? 0 : tile.image;
      const int32_t* counts = counts_.row(n, p_.ratio_groups() == 1 ? 0 : group, pixels.y);
      counts_.ratios(counts, pixels.x, pixels.x + pixels.count, ratio_.data());
      scale_pixels(ratio_.data(), pixels.count, pitch, row + from * pitch);
    }
  }

  void multiply(int64_t group, int64_t first_panel, int64_t end_panel) {
    const int64_t step = plan_.kernel.rows, strip = plan_.kernel.strip;
    const int64_t columns = plan_.kernel.columns;
    for (Rows& rows : rows_) {
      while (rows.place.size() % step != 0) {  // the last strip again; its results go nowhere
        rows.source.push_back(rows.source.back());
        rows.ratio.insert(rows.ratio.end(), strip, A(0));
        rows.place.insert(rows.place.end(), strip, kNowhere);
      }
    }
    const A slope = plan_.backward ? A(1) : A(p_.negative_slope);
    for (int64_t panel = first_panel; panel < end_panel; ++panel) {
      const int64_t index = group * plan_.panels + panel, first = panel * columns;
      const int64_t width = std::min(columns, plan_.target_channels - first);
      const int64_t pitch = in_place_ ? plan_.target_channels * p_.groups : columns;
      O* base = sums_.data();
      if constexpr (std::is_same_v<T, O>) {
        if (in_place_) base = target() + group * plan_.target_channels + first;
      }
      for (const int64_t place : empty_) std::fill_n(base + place * pitch, width, O{});
      for (const Rows& rows : rows_) {
        const Phase& phase = plan_.phases[rows.phase];
        const int64_t* runs = (rows.in_map ? phase.map_runs : phase.runs).data();
        const C* packed = static_cast<const C*>(p_.packed) + index * plan_.panel_size +
                          phase.packed + rows.first_run * phase.run_length * columns;
        for (size_t row = 0; row < rows.place.size(); row += step) {
          for (int64_t m = 0; m < step; ++m) {
            const int64_t place = rows.place[row + m];
            out_[m] = place == kNowhere ? nullptr : base + place * pitch;
          }
          plan_.kernel.run({rows.source.data() + row / strip, plan_.advance[1] * plan_.pitch,
                            runs + rows.first_run, rows.end_run - rows.first_run, phase.run_length,
                            packed, rows.ratio.data() + row, bias_.data() + index * columns, slope,
                            out_.data(), width});
        }
      }
      if (in_place_) continue;
      for (const Tile& tile : tiles_) store(tile, group, panel);
    }
  }

  T* target() const { return static_cast<T*>(plan_.backward ? p_.grad_input : p_.output); }

  // Columns of a panel to the target.
  void store(const Tile& tile, int64_t group, int64_t panel) {
    const int64_t columns = plan_.kernel.columns, first = panel * columns;
    const int64_t width = std::min(columns, plan_.target_channels - first);
    const int64_t channel = group * plan_.target_channels + first;
    const int64_t channels = plan_.target_channels * p_.groups;
    const int64_t plane = plan_.target[0] * plan_.target[1];
    for (int64_t y = 0; y < tile.height; ++y) {
      O* sums = sums_.data() + (tile.first + y * tile.width) * columns;
      if (plan_.backward && p_.mask_channels != 1) {
        const PixelRow row{tile.image, tile.top + y, tile.left, tile.width, channel, width};
        mask_pixels(p_, row, columns, sums);
      }
      const int64_t at = (tile.top + y) * plan_.target[1] + tile.left;
      if (p_.channels_last) {
        T* out = target() + (tile.image * plane + at) * channels + channel;
        for (int64_t x = 0; x < tile.width; ++x) {
          for (int64_t k = 0; k < width; ++k) {
            out[x * channels + k] = convert<T>(sums[x * columns + k]);
          }
        }
        continue;
      }
      T* out = target() + (tile.image * channels + channel) * plane + at;
      if constexpr (std::is_same_v<T, O>) {
        transpose(sums, columns, tile.width, width, out, plane);
      } else {
        for (int64_t k = 0; k < width; ++k) {
          for (int64_t x = 0; x < tile.width; ++x) {
            out[k * plane + x] = convert<T>(sums[x * columns + k]);
          }
        }
      }
    }
  }

  const PartialConvBackwardParams& p_;
  const Plan& plan_;
  WindowCounts counts_;
  int64_t in_flight_;     // tiles
  Workspace<C> sources_;  // filled tile by tile
  bool writes_valid_ = false;
  bool in_place_;               // results go to the target
  Workspace<O> sums_;           // (pixels of all tiles, columns)
  std::vector<O*> out_;         // of each of the micro-kernel's rows
  std::vector<int64_t> empty_;  // places of cells that are zero
  std::vector<Rows> rows_;
  std::vector<A> ratio_;
  std::vector<A> bias_;
  std::vector<C> activation_;
  std::vector<Tile> tiles_;
  FeatureMap<T> source_{}, result_map_{};
};

template <Sweep kSweep>
void pack_panels(const PartialConvBackwardParams& p, int64_t begin, int64_t end) {
  with_sweep_plan(p, kSweep, [&](const auto& plan) { pack(p, plan, begin, end); });
}

template <Sweep kSweep>
void run_units(const PartialConvBackwardParams& p, int64_t begin, int64_t end) {
  with_sweep_plan(p, kSweep, [&](const auto& plan) {
    SweepWorker<std::decay_t<decltype(plan)>>(p, plan).run(begin, end);
  });
}

}  // namespace

SweepSizes sweep_sizes(const PartialConvBackwardParams& params, Sweep sweep) {
  SweepSizes sizes;
  with_sweep_plan(params, sweep, [&](const auto& plan) {
    using C = typename std::decay_t<decltype(plan)>::Factor;
    sizes.panels = params.groups * plan.panels;
    sizes.packed_bytes = sizes.panels * plan.panel_size * int64_t(sizeof(C));
    sizes.units = params.groups * plan.parts * plan.all_tiles();
  });
  return sizes;
}

void pack_forward_cpu(const PartialConvBackwardParams& params, int64_t begin, int64_t end) {
  pack_panels<Sweep::kForward>(params, begin, end);
}

void fused_forward_cpu(const PartialConvBackwardParams& params, int64_t begin, int64_t end) {
  run_units<Sweep::kForward>(params, begin, end);
}

void pack_grad_input_cpu(const PartialConvBackwardParams& params, int64_t begin, int64_t end) {
  pack_panels<Sweep::kGradInput>(params, begin, end);
}

void fused_grad_input_cpu(const PartialConvBackwardParams& params, int64_t begin, int64_t end) {
  run_units<Sweep::kGradInput>(params, begin, end);
}

}  // namespace glance
