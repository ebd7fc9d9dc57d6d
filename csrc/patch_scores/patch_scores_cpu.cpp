#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "patch_scores/idw_weight.h"
#include "patch_scores/patch_scores.h"

namespace glance {
namespace {

template <typename A>
void window_row(const PatchScoresParams& p, int64_t y, const A* scores, A* sum, A* weight) {
  const A* weight_y = static_cast<const A*>(p.weight_y);
  const A* weight_x = static_cast<const A*>(p.weight_x);
  std::fill(sum, sum + p.width, A{0});
  std::fill(weight, weight + p.width, A{0});
  for (int64_t i = p.row_begin[y]; i < p.row_begin[y + 1]; ++i) {
    const int64_t patch = p.row_patches[i];
    const A scale = weight_y[y - p.origins[2 * patch]];
    const A scaled = scale * (scores ? scores[patch] : A{0});
    A* sum_at = sum + p.origins[2 * patch + 1];
    A* weight_at = weight + p.origins[2 * patch + 1];
    for (int64_t j = 0; j < p.patch_width; ++j) {
      sum_at[j] += scaled * weight_x[j];
      weight_at[j] += scale * weight_x[j];
    }
  }
}

// The largest score over each pixel of a row and the first patch that attains it.
template <typename A>
void max_row(const PatchScoresParams& p, int64_t y, const A* scores, A* largest, int32_t* best) {
  std::fill(best, best + p.width, -1);
  for (int64_t i = p.row_begin[y]; i < p.row_begin[y + 1]; ++i) {
    const int64_t patch = p.row_patches[i];
    const A score = scores[patch];
    const int64_t column = p.origins[2 * patch + 1];
    for (int64_t x = column; x < column + p.patch_width; ++x) {
      // A NaN wins over any number, as in torch.amax.
      const bool nan_wins = score != score && largest[x] == largest[x];
      if (best[x] < 0 || score > largest[x] || nan_wins) {
        largest[x] = score;
        best[x] = static_cast<int32_t>(patch);
      }
    }
  }
}

template <typename A>
A nearest_centre(const PatchScoresParams& p, int64_t y, int64_t x, A* squared) {
  A nearest = std::numeric_limits<A>::infinity();
  for (int64_t patch = 0; patch < p.patches; ++patch) {
    squared[patch] = squared_distance<A>(y, x, p.origins[2 * patch], p.origins[2 * patch + 1],
                                         p.patch_height, p.patch_width);
    nearest = std::min(nearest, squared[patch]);
  }
  return nearest;
}

template <typename A, typename T>
std::vector<A> widened(const T* scores, int64_t patches) {
  std::vector<A> wide(patches);
  for (int64_t i = 0; i < patches; ++i) wide[i] = widen(scores[i]);
  return wide;
}

template <typename T>
void idw_rows(const PatchScoresParams& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const T* scores = static_cast<const T*>(p.scores);
  T* map = static_cast<T*>(p.map);
  const A half_power = static_cast<A>(p.power / 2);
  std::vector<A> weight(p.patches);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / p.height, y = row % p.height;
    const std::vector<A> wide = widened<A>(scores + n * p.patches, p.patches);
    for (int64_t x = 0; x < p.width; ++x) {
      const A nearest = nearest_centre<A>(p, y, x, weight.data());
      A sum{0}, total{0};
      for (int64_t i = 0; i < p.patches; ++i) {
        if (idw_excludes<A>(nearest, weight[i])) continue;
        const A w = idw_weight<A>(nearest, weight[i], half_power);
        sum += w * wide[i];
        total += w;
      }
      map[row * p.width + x] = narrow<T>(sum / total);
    }
  }
}

template <typename T>
void aggregate_rows(const PatchScoresParams& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  if (p.mode == PatchMode::kIdw) return idw_rows<T>(p, begin, end);
  const T* scores = static_cast<const T*>(p.scores);
  T* map = static_cast<T*>(p.map);
  std::vector<A> sum(p.width), weight(p.width), wide;
  std::vector<int32_t> best(p.width);
  int64_t widened_image = -1;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / p.height, y = row % p.height;
    if (n != widened_image) {
      wide = widened<A>(scores + n * p.patches, p.patches);
      widened_image = n;
    }
    T* target = map + row * p.width;
    if (p.mode == PatchMode::kMax) {
      max_row<A>(p, y, wide.data(), sum.data(), best.data());
      for (int64_t x = 0; x < p.width; ++x) target[x] = narrow<T>(sum[x]);
    } else {
      window_row<A>(p, y, wide.data(), sum.data(), weight.data());
      for (int64_t x = 0; x < p.width; ++x) target[x] = narrow<T>(sum[x] / weight[x]);
    }
  }
}

template <typename T>
void prepare_rows(const PatchScoresBackwardParams& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  A* norm = static_cast<A*>(p.norm);
  const A half_power = static_cast<A>(p.power / 2);
  std::vector<A> scratch(std::max(p.width, p.patches));
  for (int64_t row = begin; row < end; ++row) {
    if (p.mode == PatchMode::kMax) {
      const int64_t n = row / p.height, y = row % p.height;
      const T* scores = static_cast<const T*>(p.scores) + n * p.patches;
      const std::vector<A> wide = widened<A>(scores, p.patches);
      max_row<A>(p, y, wide.data(), scratch.data(), p.best + row * p.width);
    } else if (p.mode == PatchMode::kWindow) {
      window_row<A>(p, row, nullptr, scratch.data(), norm + row * p.width);
    } else {
      for (int64_t x = 0; x < p.width; ++x) {
        const A nearest = nearest_centre<A>(p, row, x, scratch.data());
        A total{0};
        for (int64_t i = 0; i < p.patches; ++i) {
          total += idw_weight<A>(nearest, scratch[i], half_power);
        }
        norm[row * p.width + x] = nearest;
        norm[(p.height + row) * p.width + x] = total;
      }
    }
  }
}

// The gradient of one patch's score in one image from the pixels that the patch covers.
template <typename T>
accumulate_t<T> covered_gradient(const PatchScoresBackwardParams& p, int64_t n, int64_t patch) {
  using A = accumulate_t<T>;
  const T* grad = static_cast<const T*>(p.grad_map) + n * p.height * p.width;
  const int32_t* best = p.best ? p.best + n * p.height * p.width : nullptr;
  const A* norm = static_cast<const A*>(p.norm);
  const A* weight_y = static_cast<const A*>(p.weight_y);
  const A* weight_x = static_cast<const A*>(p.weight_x);
  const int64_t row = p.origins[2 * patch], column = p.origins[2 * patch + 1];
  A total{0};
  for (int64_t i = 0; i < p.patch_height; ++i) {
    const int64_t start = (row + i) * p.width + column;
    A sum{0};
    for (int64_t j = 0; j < p.patch_width; ++j) {
      if (p.mode == PatchMode::kMax) {
        if (best[start + j] == patch) sum += widen(grad[start + j]);
      } else {
        sum += weight_y[i] * weight_x[j] / norm[start + j] * widen(grad[start + j]);
      }
    }
    total += sum;
  }
  return total;
}

template <typename T>
void backward_patches(const PatchScoresBackwardParams& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  T* grad_scores = static_cast<T*>(p.grad_scores);
  for (int64_t patch = begin; patch < end; ++patch) {
    if (p.mode != PatchMode::kIdw) {
      for (int64_t n = 0; n < p.batch; ++n) {
        grad_scores[n * p.patches + patch] = narrow<T>(covered_gradient<T>(p, n, patch));
      }
      continue;
    }
    const int64_t pixels = p.height * p.width;
    const A* norm = static_cast<const A*>(p.norm);
    const T* grad = static_cast<const T*>(p.grad_map);
    std::vector<A> total(p.batch, A{0});
    for (int64_t i = 0; i < pixels; ++i) {
      const A squared =
          squared_distance<A>(i / p.width, i % p.width, p.origins[2 * patch],
                              p.origins[2 * patch + 1], p.patch_height, p.patch_width);
      if (idw_excludes<A>(norm[i], squared)) continue;
      const A share =
          idw_weight<A>(norm[i], squared, static_cast<A>(p.power / 2)) / norm[pixels + i];
      for (int64_t n = 0; n < p.batch; ++n) total[n] += share * widen(grad[n * pixels + i]);
    }
    for (int64_t n = 0; n < p.batch; ++n) grad_scores[n * p.patches + patch] = narrow<T>(total[n]);
  }
}

}  // namespace

void aggregate_cpu(const PatchScoresParams& params, int64_t begin, int64_t end) {
  dispatch_cpu(params.dtype,
               [&](auto tag) { aggregate_rows<typename decltype(tag)::type>(params, begin, end); });
}

void aggregate_prepare_cpu(const PatchScoresBackwardParams& params, int64_t begin, int64_t end) {
  dispatch_cpu(params.dtype,
               [&](auto tag) { prepare_rows<typename decltype(tag)::type>(params, begin, end); });
}

void aggregate_backward_cpu(const PatchScoresBackwardParams& params, int64_t begin, int64_t end) {
  dispatch_cpu(params.dtype, [&](auto tag) {
    backward_patches<typename decltype(tag)::type>(params, begin, end);
  });
}

}  // namespace glance
