// How a window slides over a map in tiles: geometry that the output and the gradient of the input
// share. A cell of the target reads source pixels at (cell * advance + tap offset).
//
// The output's cells are its pixels, which advance by the stride. The input's gradient at stride s
// falls apart into s x s phases: pixels of one phase are s apart, read the output's gradient at an
// advance of 1, and only through the taps that meet them.
#pragma once

#include <algorithm>
#include <vector>

#include "common/micro_kernel.h"
#include "partial_conv/partial_conv.h"

namespace glance {

struct Tap {
  int64_t y, x;    // offset in the source
  int64_t weight;  // in the weight, in elements
};

struct Phase {
  int64_t y, x;  // first pixel in the target
  std::vector<Tap> taps;
  std::vector<int64_t> runs;      // of the micro-kernel, in elements of a tile
  std::vector<int64_t> map_runs;  // the same in elements of the source's own map
  std::vector<int64_t> run_rows;  // offset of each in the source, in rows, ascending
  int64_t run_length = 0;
  int64_t packed = 0;  // first element of its panel within the panels of a group's columns
};

// T is stored, C is multiplied, A is added, O is what the micro-kernel writes.
template <typename T, typename C, typename A, typename O>
struct SweepPlan {
  using Stored = T;
  using Factor = C;
  using Sum = A;
  using Result = O;
  static constexpr int64_t kTileBytes = 1024 * 1024;  // of source tiles in flight: of an L2
  static constexpr int64_t kTileCells = 1024;         // whose sums are held beside them
  static constexpr int64_t kMapCells = 256;           // of a tile that may be read in its place
  static constexpr int64_t kAliasBytes = 2048;  // of which a few have their lines in one place
  static constexpr int64_t kLineBytes = 64;
  static constexpr int64_t kUnits = 64;  // of work, for an even share of each thread

  MicroKernel<C, A, O> kernel;
  bool backward;
  bool in_map;  // whether a tile where nothing is masked is as it would be copied
  int64_t batch;
  int64_t source_channels, target_channels;  // of one group
  int64_t factors;                           // source channels, padded to the kernel's depth
  int64_t pitch;                             // elements from a pixel of a tile to the next
  int64_t panels;                            // of one group
  int64_t parts = 1;       // that they are in, for threads that have no tiles of their own
  int64_t panel_size = 0;  // elements of one panel of all phases
  int64_t step[2], advance[2];
  int64_t first[2] = {0, 0}, reach[2] = {1, 1};  // of all taps: smallest offset, and extent
  int64_t target[2], source[2];                  // height, width
  int64_t cells[2];                              // of the widest phase
  int64_t tile_cells[2], tiles[2], tile_pixels[2];
  int64_t weight_column, weight_source, weight_group;  // steps in the weight
  std::vector<Phase> phases;

  SweepPlan(const PartialConvBackwardParams& p, Sweep sweep, MicroKernel<C, A, O> micro)
      : kernel(micro), backward(sweep == Sweep::kGradInput) {
    const int64_t in = p.in_channels / p.groups, out = p.out_channels / p.groups;
    source_channels = backward ? out : in;
    target_channels = backward ? in : out;
    weight_column = p.weight_strides[backward ? 1 : 0];
    weight_source = p.weight_strides[backward ? 0 : 1];
    weight_group = p.weight_strides[0] * out;
    factors = (source_channels + kernel.depth - 1) / kernel.depth * kernel.depth;
    panels = (target_channels + kernel.columns - 1) / kernel.columns;
    const int64_t in_size[2] = {p.in_height, p.in_width}, out_size[2] = {p.out_height, p.out_width};
    for (int axis = 0; axis < 2; ++axis) {
      step[axis] = backward ? p.stride[axis] : 1;
      advance[axis] = backward ? 1 : p.stride[axis];
      target[axis] = backward ? in_size[axis] : out_size[axis];
      source[axis] = backward ? out_size[axis] : in_size[axis];
      cells[axis] = (target[axis] + step[axis] - 1) / step[axis];
      int64_t low = INT64_MAX, high = INT64_MIN;
      for (int64_t a = 0; a < step[axis]; ++a) {
        for (const auto& [offset, index] : axis_taps(p, axis, a)) {
          low = std::min(low, offset);
          high = std::max(high, offset);
        }
      }
      first[axis] = low;
      reach[axis] = high - low + 1;
    }
    // Cells that are whole powers of two apart would drive each other out of the innermost cache.
    pitch = factors;
    if (advance[1] * pitch * int64_t(sizeof(C)) % kAliasBytes == 0) {
      pitch += kLineBytes / int64_t(sizeof(C));
    }
    in_map = std::is_same_v<T, C> && !backward && p.channels_last && p.groups == 1 &&
             p.mask_channels == 1 && pitch == source_channels;
    choose_tiles();
    batch = p.batch;
    parts = std::clamp<int64_t>(kUnits / (p.groups * all_tiles()), 1, panels);
    for (int64_t y = 0; y < step[0]; ++y) {
      for (int64_t x = 0; x < step[1]; ++x) phases.push_back(phase(p, y, x));
    }
    for (Phase& each : phases) {
      each.packed = panel_size;
      panel_size += int64_t(each.taps.size()) * factors * kernel.columns;
    }
  }

  int64_t all_tiles() const { return batch * tiles[0] * tiles[1]; }  // of one group
  int64_t tile_size() const { return tile_pixels[0] * tile_pixels[1] * pitch; }

 private:
  // (offset, index in the window) of the taps that meet phase `a` of an axis, by offset.
  std::vector<std::pair<int64_t, int64_t>> axis_taps(const PartialConvParams& p, int axis,
                                                     int64_t a) const {
    std::vector<std::pair<int64_t, int64_t>> taps;
    for (int64_t i = 0; i < p.kernel[axis]; ++i) {
      if (!backward) {
        taps.emplace_back(i * p.dilation[axis] - p.padding[axis], i);
      } else {
        const int64_t at = a + p.padding[axis] - i * p.dilation[axis];
        if (at % p.stride[axis] == 0) taps.emplace_back(at / p.stride[axis], i);
      }
    }
    std::sort(taps.begin(), taps.end());
    return taps;
  }

  void choose_tiles() {
    const int64_t pixels_a_cell = step[0] * step[1];
    const auto bytes = [&](int64_t rows, int64_t columns) {
      return ((rows - 1) * advance[0] + reach[0]) * ((columns - 1) * advance[1] + reach[1]) *
             pitch * int64_t(sizeof(C));
    };
    const auto fits = [&](int64_t rows, int64_t columns) {
      const int64_t most = in_map ? kMapCells : kTileCells;
      return bytes(rows, columns) <= kTileBytes && rows * columns * pixels_a_cell <= most;
    };
    int64_t columns = cells[1], rows = 1;
    while (columns > 32 && !fits(1, columns)) columns = (columns + 1) / 2;
    while (rows < cells[0] && fits(rows + 1, columns)) ++rows;
    const int64_t chosen[2] = {rows, columns};
    for (int axis = 0; axis < 2; ++axis) {
      tiles[axis] = (cells[axis] + chosen[axis] - 1) / chosen[axis];
      tile_cells[axis] = (cells[axis] + tiles[axis] - 1) / tiles[axis];  // of one size, nearly
      tiles[axis] = (cells[axis] + tile_cells[axis] - 1) / tile_cells[axis];
      tile_pixels[axis] = (tile_cells[axis] - 1) * advance[axis] + reach[axis];
    }
  }

  Phase phase(const PartialConvParams& p, int64_t y, int64_t x) const {
    Phase made;
    made.y = y;
    made.x = x;
    const auto rows = axis_taps(p, 0, y), columns = axis_taps(p, 1, x);
    for (const auto& [offset_y, i] : rows) {
      for (const auto& [offset_x, j] : columns) {
        made.taps.push_back(
            {offset_y, offset_x, i * p.weight_strides[2] + j * p.weight_strides[3]});
      }
    }
    // Neighbouring taps of a row are one run of memory.
    bool neighbours = pitch == factors;
    for (size_t j = 1; j < columns.size(); ++j) {
      neighbours = neighbours && columns[j].first == columns[j - 1].first + 1;
    }
    const int64_t together = neighbours ? int64_t(columns.size()) : 1;
    made.run_length = together * factors;
    for (size_t i = 0; together > 0 && i < made.taps.size(); i += together) {
      const Tap& tap = made.taps[i];
      made.run_rows.push_back(tap.y);
      made.runs.push_back(((tap.y - first[0]) * tile_pixels[1] + tap.x - first[1]) * pitch);
      made.map_runs.push_back(((tap.y - first[0]) * source[1] + tap.x - first[1]) * pitch);
    }
    return made;
  }
};

// Calls `body` with the plan for the dtype on this processor; never for double.
template <typename Body>
void with_sweep_plan(const PartialConvBackwardParams& p, Sweep sweep, Body&& body) {
  const InstructionSet set = best_instruction_set();
  const int64_t columns = (sweep == Sweep::kForward ? p.out_channels : p.in_channels) / p.groups;
  const auto single = float_kernel(set, columns);
  switch (p.dtype) {
    case ScalarType::kFloat32:
      return body(SweepPlan<float, float, float, float>(p, sweep, single));
    case ScalarType::kFloat16:
      return body(SweepPlan<Half, float, float, float>(p, sweep, single));
    case ScalarType::kBFloat16: {
      const auto native = bfloat16_kernel(set, columns);
      if (native.run) return body(SweepPlan<BFloat16, BFloat16, float, BFloat16>(p, sweep, native));
      return body(SweepPlan<BFloat16, float, float, float>(p, sweep, single));
    }
    case ScalarType::kFloat64:
      return;
  }
}

}  // namespace glance
