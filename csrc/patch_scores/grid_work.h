// What one thread of the CUDA kernels in patch_grid.cu does, as functions that the host can call
// too, so that tests without a GPU run the same indexing. T is the element type of the side that
// calls; `load` and `store` come from cuda_scalar.cuh, or on the host from below.
#pragma once

#include <cstdint>

#include "common/scalar.h"
#include "patch_scores/patch_grid.h"

namespace glance {

#ifndef __CUDACC__
template <typename T>
inline accumulate_t<T> load(const T* p) {
  return widen(*p);
}
template <typename T>
inline void store(T* p, accumulate_t<T> value) {
  *p = narrow<T>(value);
}
#endif

// A NaN wins over any number, as in torch.amax; of equals the first stays.
template <typename A>
GLANCE_HOST_DEVICE inline bool wins_over(A score, A largest) {
  return score > largest || (score != score && largest == largest);
}

template <typename A>
GLANCE_HOST_DEVICE inline A axis_weight(const PatchAxis& axis, int64_t patch, int64_t pixel) {
  return static_cast<const A*>(axis.weight)[patch * axis.patch + pixel - axis.starts[patch]];
}

// First pass: element `index` of (N, gh, W) from the patches of its row that are over its column.
template <typename T, bool kMax>
GLANCE_HOST_DEVICE inline void spread_column(const PatchGridParams& p, int64_t index,
                                             int32_t* best) {
  using A = accumulate_t<T>;
  const int64_t x = index % p.columns.size;
  const T* scores = static_cast<const T*>(p.scores) + index / p.columns.size * p.columns.count;
  const int32_t first = p.columns.first[x], last = p.columns.last[x];
  A value = A(0);
  int32_t winner = first;
  for (int32_t j = first; j < last; ++j) {
    const A score = load(scores + j);
    if constexpr (kMax) {
      if (j == first || wins_over(score, value)) {
        value = score;
        winner = j;
      }
    } else {
      value += axis_weight<A>(p.columns, j, x) * score;
    }
  }
  static_cast<A*>(p.spread)[index] = value;
  if (kMax && best) best[index] = winner;
}

// Rows of the map that one thread computes: neighbours are under almost the same patches, which it
// reads once for all of them.
constexpr int kRowsOfThread = 4;

GLANCE_HOST_DEVICE inline int64_t rows_work(const PatchGridParams& p) {
  return p.batch * ((p.rows.size + kRowsOfThread - 1) / kRowsOfThread) * p.columns.size;
}

// Second pass: kRowsOfThread pixels of one column of a map, from (N, gh, W). With `best` the index
// of each pixel's winner instead of its value.
template <typename T, bool kMax>
GLANCE_HOST_DEVICE inline void spread_rows(const PatchGridParams& p, int64_t index, int32_t* best) {
  using A = accumulate_t<T>;
  const int64_t height = p.rows.size, width = p.columns.size;
  const int64_t groups = (height + kRowsOfThread - 1) / kRowsOfThread;
  const int64_t x = index % width;
  const int64_t top = index / width % groups * kRowsOfThread;
  const int64_t n = index / width / groups;
  const A* spread = static_cast<const A*>(p.spread) + n * p.rows.count * width + x;
  const int64_t bottom = top + kRowsOfThread < height ? top + kRowsOfThread : height;
  A value[kRowsOfThread] = {};
  int32_t winner[kRowsOfThread] = {};
  for (int32_t i = p.rows.first[top]; i < p.rows.last[bottom - 1]; ++i) {
    const A score = spread[i * width];
    const int64_t start = p.rows.starts[i];
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int k = 0; k < kRowsOfThread; ++k) {
      const int64_t y = top + k;
      if (y >= bottom || y < start || y >= start + p.rows.patch) continue;
      if constexpr (kMax) {
        if (i == p.rows.first[y] || wins_over(score, value[k])) {
          value[k] = score;
          winner[k] = i;
        }
      } else {
        value[k] += axis_weight<A>(p.rows, i, y) * score;
      }
    }
  }
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int k = 0; k < kRowsOfThread; ++k) {
    if (top + k >= bottom) break;
    const int64_t pixel = (n * height + top + k) * width + x;
    if (kMax && best) {
      best[pixel] = winner[k];
    } else {
      store(static_cast<T*>(p.map) + pixel, value[k]);
    }
  }
}

// Backward's first pass: element `index` of (N, gh, W) from the pixels of its column.
template <typename T, bool kMax>
GLANCE_HOST_DEVICE inline void gather_rows(const PatchGridBackwardParams& p, int64_t index) {
  using A = accumulate_t<T>;
  const int64_t width = p.columns.size;
  const int64_t x = index % width, i = index / width % p.rows.count;
  const int64_t n = index / width / p.rows.count;
  const int64_t first = (n * p.rows.size + p.rows.starts[i]) * width + x;
  const T* grad = static_cast<const T*>(p.grad_map) + first;
  A sum = A(0);
  for (int64_t t = 0; t < p.rows.patch; ++t) {
    if constexpr (kMax) {
      if (p.best[first + t * width] == i) sum += load(grad + t * width);
    } else {
      sum += static_cast<const A*>(p.rows.weight)[i * p.rows.patch + t] * load(grad + t * width);
    }
  }
  static_cast<A*>(p.spread)[index] = sum;
}

// Backward's second pass: the gradient of score `index` of (N, gh, gw) from its row of the first's.
template <typename T, bool kMax>
GLANCE_HOST_DEVICE inline void gather_columns(const PatchGridBackwardParams& p, int64_t index) {
  using A = accumulate_t<T>;
  const int64_t j = index % p.columns.count;
  const int64_t first = index / p.columns.count * p.columns.size + p.columns.starts[j];
  const A* gathered = static_cast<const A*>(p.spread) + first;
  A sum = A(0);
  for (int64_t t = 0; t < p.columns.patch; ++t) {
    if constexpr (kMax) {
      if (p.best_column[first + t] == j) sum += gathered[t];
    } else {
      sum += static_cast<const A*>(p.columns.weight)[j * p.columns.patch + t] * gathered[t];
    }
  }
  store(static_cast<T*>(p.grad_scores) + index, sum);
}

// Inverse-distance weighting: images and columns of patches that a block takes at a time.
constexpr int kIdwImages = 8;
constexpr int kIdwColumns = 64;

// Where the table has the weights of the pixels of row y for patch row i, from column 0 on.
template <typename A>
GLANCE_HOST_DEVICE inline const A* idw_table(const PatchGridParams& p, int64_t y, int64_t i) {
  return static_cast<const A*>(p.table) +
         distance_index(y, p.rows.starts[i], p.rows.patch) * p.table_pitch + p.table_origin;
}

// The score of a patch, or 0 of an image behind the last.
template <typename T>
GLANCE_HOST_DEVICE inline accumulate_t<T> idw_score(const PatchGridParams& p, int64_t n, int64_t i,
                                                    int64_t j) {
  if (n >= p.batch) return accumulate_t<T>(0);
  return load(static_cast<const T*>(p.scores) + (n * p.rows.count + i) * p.columns.count + j);
}

// Adds the part of the patches [j, j + columns) of row i, whose scores (columns, images) are given.
template <typename A>
GLANCE_HOST_DEVICE inline void add_idw_columns(const PatchGridParams& p, int64_t y, int64_t x,
                                               int64_t i, int64_t j, int64_t columns,
                                               const A* scores, A* sum) {
  const A* table = idw_table<A>(p, y, i) + x;
  for (int64_t k = 0; k < columns; ++k) {
    const A weight = table[-p.columns.starts[j + k]];
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int m = 0; m < kIdwImages; ++m) sum[m] += weight * scores[k * kIdwImages + m];
  }
}

// The patch whose centre is at a pixel of an axis, or -1.
GLANCE_HOST_DEVICE inline int64_t centred_patch(const PatchAxis& axis, int64_t pixel) {
  const int64_t start = pixel - axis.patch / 2;
  if (axis.patch % 2 == 0) return -1;
  int64_t low = 0, high = axis.count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (axis.starts[middle] < start) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < axis.count && axis.starts[low] == start ? low : -1;
}

// Writes a pixel of each image from its weighted sum; on a centre the score of that patch alone.
template <typename T>
GLANCE_HOST_DEVICE inline void store_idw(const PatchGridParams& p, int64_t n, int64_t y, int64_t x,
                                         const accumulate_t<T>* sum) {
  using A = accumulate_t<T>;
  const int64_t pixels = p.rows.size * p.columns.size, pixel = y * p.columns.size + x;
  const int64_t i = centred_patch(p.rows, y), j = centred_patch(p.columns, x);
  for (int m = 0; m < kIdwImages && n + m < p.batch; ++m) {
    A value = sum[m];
    if (p.total) {
      value = i >= 0 && j >= 0 ? idw_score<T>(p, n + m, i, j)
                               : value / static_cast<const A*>(p.total)[pixel];
    }
    store(static_cast<T*>(p.map) + (n + m) * pixels + pixel, value);
  }
}

// Backward's first pass: grad_map / total of pixel `index` of (N, H, W), but 0 on centres.
template <typename T>
GLANCE_HOST_DEVICE inline void share_gradient(const PatchGridBackwardParams& p, int64_t index) {
  using A = accumulate_t<T>;
  const int64_t x = index % p.columns.size, row = index / p.columns.size;
  const int64_t y = row % p.rows.size;
  const bool centre = centred_patch(p.rows, y) >= 0 && centred_patch(p.columns, x) >= 0;
  const A total = static_cast<const A*>(p.total)[y * p.columns.size + x];
  const A grad = load(static_cast<const T*>(p.grad_map) + index);
  static_cast<A*>(p.share)[row * p.share_pitch + x] = centre ? A(0) : grad / total;
}

// Backward's second pass: kIdwPatches neighbours of a patch row in kIdwPatches images at a time.
constexpr int kIdwPatches = 4;

class IdwBackwardTasks {
 public:
  GLANCE_HOST_DEVICE explicit IdwBackwardTasks(const PatchGridBackwardParams& params)
      : p_(params), columns_((params.columns.count + kIdwPatches - 1) / kIdwPatches) {}

  GLANCE_HOST_DEVICE int64_t count() const {
    return (p_.batch + kIdwPatches - 1) / kIdwPatches * p_.rows.count * columns_;
  }

  // Adds a pixel's part to the sums (images, patches) of a task.
  template <typename A>
  GLANCE_HOST_DEVICE void add_pixel(int64_t task, int64_t y, int64_t x, A* sum) const {
    const int64_t i = row(task), j = column(task), n = image(task);
    const A* table = idw_table<A>(p_, y, i) + x;
    const A* share = static_cast<const A*>(p_.share) + y * p_.share_pitch + x;
    A weight[kIdwPatches];
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int k = 0; k < kIdwPatches; ++k) {
      weight[k] = j + k < p_.columns.count ? table[-p_.columns.starts[j + k]] : A(0);
    }
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int m = 0; m < kIdwPatches; ++m) {
      const A part = n + m < p_.batch ? share[(n + m) * p_.rows.size * p_.share_pitch] : A(0);
#ifdef __CUDACC__
#pragma unroll
#endif
      for (int k = 0; k < kIdwPatches; ++k) sum[m * kIdwPatches + k] += weight[k] * part;
    }
  }

  // Writes sum k of a task, with the whole gradient of the pixel on the patch's centre.
  template <typename T>
  GLANCE_HOST_DEVICE void store_sum(int64_t task, int k, accumulate_t<T> sum) const {
    const int64_t i = row(task), j = column(task) + k % kIdwPatches;
    const int64_t n = image(task) + k / kIdwPatches;
    if (n >= p_.batch || j >= p_.columns.count) return;
    if (p_.rows.patch % 2 == 1 && p_.columns.patch % 2 == 1) {
      const int64_t y = p_.rows.starts[i] + p_.rows.patch / 2;
      const int64_t x = p_.columns.starts[j] + p_.columns.patch / 2;
      sum +=
          load(static_cast<const T*>(p_.grad_map) + (n * p_.rows.size + y) * p_.columns.size + x);
    }
    store(static_cast<T*>(p_.grad_scores) + (n * p_.rows.count + i) * p_.columns.count + j, sum);
  }

 private:
  GLANCE_HOST_DEVICE int64_t column(int64_t task) const { return task % columns_ * kIdwPatches; }
  GLANCE_HOST_DEVICE int64_t row(int64_t task) const { return task / columns_ % p_.rows.count; }
  GLANCE_HOST_DEVICE int64_t image(int64_t task) const {
    return task / columns_ / p_.rows.count * kIdwPatches;
  }

  const PatchGridBackwardParams& p_;
  int64_t columns_;
};

}  // namespace glance
