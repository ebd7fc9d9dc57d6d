// A weight's gradient as sums of outer products over windows, cut into what outer_kernel.h takes.
//
//   sums[run][term][k] += sum_w source[places[w] + offsets[run] + term] * scaled[w][k]
//
// A window's values that are neighbours in memory are a run, a row of taps with their channels or
// the channels of one tap. A run in parts of the kernel's rows makes blocks, all of one size: the
// last one of a run begins early enough, and overlaps the one before.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "common/parallel_for.h"
#include "hole_windows/outer_kernel.h"

namespace glance {

class OuterProducts {
  static constexpr int64_t kChunk = 256;    // windows whose gradients stay in the innermost cache
  static constexpr int64_t kProducts = 32;  // of a block and a panel, at the least

 public:
  // `run` values behind each of `offsets` from a window's place, and `out_channels` columns.
  OuterProducts(int64_t run, const std::vector<int64_t>& offsets, int64_t out_channels)
      : run_(run),
        kernel_(outer_kernel(best_instruction_set(), run, out_channels)),
        panels_((out_channels + kernel_.columns - 1) / kernel_.columns),
        parts_((run + kernel_.rows - 1) / kernel_.rows) {
    for (int64_t offset : offsets) {
      for (int64_t part = 0; part < parts_; ++part) offsets_.push_back(offset + first_term(part));
    }
    const int64_t products = panels_ * blocks();
    shares_ = (kProducts + products - 1) / products;
  }

  int64_t panels() const { return panels_; }
  int64_t columns() const { return kernel_.columns; }  // of a panel
  int64_t pitch() const { return panels_ * kernel_.columns; }
  int64_t blocks() const { return offsets_.size(); }

  // Of one panel: a value for each run, term and column, in blocks; of all; and of all in as many
  // shares as give threads enough to do, each with some of the windows.
  int64_t panel_sums() const { return blocks() * kernel_.rows * kernel_.columns; }
  int64_t all_sums() const { return panels_ * panel_sums(); }
  int64_t shared_sums() const { return shares_ * all_sums(); }

  // Where a panel's sums have those of one term of a run, a value for each column.
  int64_t place_of(int64_t run, int64_t term) const {
    const int64_t part = term / kernel_.rows;
    const int64_t row = term - first_term(part);
    return ((run * parts_ + part) * kernel_.rows + row) * kernel_.columns;
  }

  struct Windows {
    const float* source;
    const int64_t* places;
    const float* scaled;  // (panels, panel_pitch windows, columns)
    int64_t panel_pitch;
  };

  // Adds the products of windows [from, to) to the sums of a panel's blocks [begin, end).
  void add(const Windows& windows, int64_t panel, int64_t begin, int64_t end, int64_t from,
           int64_t to, float* sums) const {
    const int64_t size = kernel_.rows * kernel_.columns;
    for (int64_t first = from; first < to; first += kChunk) {
      const int64_t count = std::min(kChunk, to - first);
      const float* scaled =
          windows.scaled + (panel * windows.panel_pitch + first) * kernel_.columns;
      for (int64_t block = begin; block < end; ++block) {
        kernel_.run({windows.source + offsets_[block], windows.places + first, count, scaled,
                     sums + block * size});
      }
    }
  }

  // The same for `count` windows and all blocks of all panels, to `shared_sums()`.
  void add_in_shares(const Windows& windows, int64_t count, float* sums,
                     const ParallelFor& parallel) const {
    const int64_t products = panels_ * blocks();
    parallel(shares_ * products, [&](int64_t begin, int64_t end) {
      in_parts(products, begin, end, [&](int64_t share, int64_t of_first, int64_t of_last) {
        const int64_t from = count * share / shares_, to = count * (share + 1) / shares_;
        in_parts(blocks(), of_first, of_last, [&](int64_t panel, int64_t first, int64_t last) {
          add(windows, panel, first, last, from, to,
              sums + share * all_sums() + panel * panel_sums());
        });
      });
    });
  }

  // Folds all shares into the first.
  void fold_shares(float* sums) const {
    for (int64_t i = all_sums(); i < shared_sums(); ++i) sums[i % all_sums()] += sums[i];
  }

  // Calls body(part, first, last) on what [begin, end) has of each part's `count` items.
  template <typename Body>
  static void in_parts(int64_t count, int64_t begin, int64_t end, Body&& body) {
    while (begin < end) {
      const int64_t part = begin / count, last = std::min(end, (part + 1) * count);
      body(part, begin - part * count, last - part * count);
      begin = last;
    }
  }

 private:
  int64_t first_term(int64_t part) const {
    return std::min(part * kernel_.rows, run_ - kernel_.rows);
  }

  int64_t run_;
  OuterKernel kernel_;
  int64_t panels_, parts_, shares_ = 1;
  std::vector<int64_t> offsets_;  // of each block from a window's place
};

}  // namespace glance
