// How many values of a window are valid, one row of windows at a time.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "partial_conv/partial_conv.h"

namespace glance {

inline bool all_valid(const uint8_t* mask, int64_t count) {
  return std::memchr(mask, 0, count) == nullptr;
}

// Counts as sums of columns: a row of windows costs about kh + 2 passes over a row of the mask, and
// less where all of it is valid, as almost everywhere with a small hole.
class WindowCounts {
 public:
  explicit WindowCounts(const PartialConvParams& p)
      : p_(p),
        channels_(p.mask_channels / p.ratio_groups()),
        inside_(p.out_width),
        columns_(p.in_width + 2 * p.padding[1]),
        counts_(p.out_width) {
    for (int64_t x = 0; x < p.out_width; ++x) {
      for (int64_t j = 0; j < p.kernel[1]; ++j) {
        const int64_t in_x = x * p.stride[1] - p.padding[1] + j * p.dilation[1];
        inside_[x] += in_x >= 0 && in_x < p.in_width;
      }
    }
  }

  // Of the windows of output row y of mask n (0 for a shared mask) and ratio group `group`; valid
  // until the next call.
  const int32_t* row(int64_t n, int64_t group, int64_t y) {
    const uint8_t* mask =
        p_.mask + (n * p_.mask_channels + group * channels_) * p_.in_height * p_.in_width;
    const int64_t top = y * p_.stride[0] - p_.padding[0];
    int32_t rows = 0;
    bool whole = true;
    for_rows(mask, top, [&](const uint8_t* mask_row) {
      ++rows;
      whole = whole && all_valid(mask_row, p_.in_width);
    });
    if (whole && rows == whole_rows_) return counts_.data();
    whole_rows_ = whole ? rows : -1;
    ++changes_;
    if (whole) {
      for (int64_t x = 0; x < p_.out_width; ++x) counts_[x] = rows * inside_[x];
      return counts_.data();
    }
    // Padding columns are there as zeros; a window is then a sum of columns.
    std::fill(columns_.begin(), columns_.end(), 0);
    int32_t* column = columns_.data() + p_.padding[1];
    for_rows(mask, top, [&](const uint8_t* mask_row) {
      for (int64_t x = 0; x < p_.in_width; ++x) column[x] += mask_row[x];
    });
    std::fill(counts_.begin(), counts_.end(), 0);
    for (int64_t j = 0; j < p_.kernel[1]; ++j) {
      const int32_t* first = columns_.data() + j * p_.dilation[1];
      for (int64_t x = 0; x < p_.out_width; ++x) counts_[x] += first[x * p_.stride[1]];
    }
    return counts_.data();
  }

  // How often row() gave other counts than at the call before.
  int64_t changes() const { return changes_; }

  // Writes sum(1) / sum(M) of counts [begin, end) to `ratio`, 0 where the window is empty.
  template <typename A>
  void ratios(const int32_t* counts, int64_t begin, int64_t end, A* ratio) const {
    const A full = static_cast<A>(p_.window_size());
    for (int64_t x = begin; x < end; ++x) {
      ratio[x - begin] = counts[x] > 0 ? full / static_cast<A>(counts[x]) : A{0};
    }
  }

 private:
  template <typename Row>
  void for_rows(const uint8_t* mask, int64_t top, Row&& row) const {
    for (int64_t c = 0; c < channels_; ++c) {
      for (int64_t i = 0; i < p_.kernel[0]; ++i) {
        const int64_t y = top + i * p_.dilation[0];
        if (y >= 0 && y < p_.in_height) row(mask + (c * p_.in_height + y) * p_.in_width);
      }
    }
  }

  const PartialConvParams& p_;
  int64_t channels_;             // of the mask that one window counts
  std::vector<int32_t> inside_;  // (Wo): taps of a window's row that are not padding
  std::vector<int32_t> columns_;
  std::vector<int32_t> counts_;
  int32_t whole_rows_ = -1;  // that counts_ are of, if nothing is masked in them
  int64_t changes_ = 0;
};

}  // namespace glance
