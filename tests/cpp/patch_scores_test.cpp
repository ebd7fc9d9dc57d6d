// csrc/patch_scores: the CPU kernels against the formulas of patch_scores.h written out pixel by
// pixel in double, and the gradients also against finite differences.
#include "patch_scores/patch_scores.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "patch_scores/idw_weight.h"

using glance::accumulate_t;
using glance::narrow;
using glance::PatchMode;
using glance::PatchScoresBackwardParams;
using glance::widen;
using glance_test::Random;
using glance_test::Type;

namespace {

// A set of patches over a map, with everything that the kernels want precomputed.
template <typename A>
struct Patches {
  int64_t height, width, patch_height, patch_width;
  std::vector<int64_t> origins, row_begin, row_patches;
  std::vector<A> weight_y, weight_x;

  Patches(int64_t h, int64_t w, int64_t ph, int64_t pw, std::vector<int64_t> places, bool bell)
      : height(h), width(w), patch_height(ph), patch_width(pw), origins(std::move(places)) {
    row_begin.push_back(0);
    for (int64_t y = 0; y < h; ++y) {
      for (int64_t p = 0; p < count(); ++p) {
        if (y >= origins[2 * p] && y < origins[2 * p] + ph) row_patches.push_back(p);
      }
      row_begin.push_back(static_cast<int64_t>(row_patches.size()));
    }
    for (int64_t i = 0; i < ph; ++i) weight_y.push_back(bell ? bell_at(i, ph) : A(1));
    for (int64_t j = 0; j < pw; ++j) weight_x.push_back(bell ? bell_at(j, pw) : A(1));
  }

  static A bell_at(int64_t i, int64_t size) {
    const double offset = (i - (size - 1) / 2.0) / (0.3 * size);
    return static_cast<A>(std::exp(-0.5 * offset * offset));
  }

  int64_t count() const { return static_cast<int64_t>(origins.size()) / 2; }
  bool covers(int64_t p, int64_t y, int64_t x) const {
    return y >= origins[2 * p] && y < origins[2 * p] + patch_height && x >= origins[2 * p + 1] &&
           x < origins[2 * p + 1] + patch_width;
  }
};

// A grid over the whole map whose last row and column are moved in to the border, plus two patches
// that lie upon each other, in no order. Centres fall on pixels where the patches' height is odd.
template <typename A>
Patches<A> make_patches(Random& random, bool bell, int64_t ph = 4) {
  const int64_t height = 11, width = 14, pw = 5, step = 3;
  std::vector<int64_t> places;
  for (int64_t y = 0; y < height; y += step) {
    for (int64_t x = 0; x < width; x += step) {
      places.push_back(std::min(y, height - ph));
      places.push_back(std::min(x, width - pw));
    }
  }
  for (int i = 0; i < 2; ++i) {
    places.push_back(5);
    places.push_back(6);
  }
  for (int64_t i = static_cast<int64_t>(places.size()) / 2 - 1; i > 0; --i) {
    const int64_t other = random.below(i + 1);
    std::swap(places[2 * i], places[2 * other]);
    std::swap(places[2 * i + 1], places[2 * other + 1]);
  }
  return Patches<A>(height, width, ph, pw, places, bell);
}

template <typename A>
PatchScoresBackwardParams params_of(const Patches<A>& patches, PatchMode mode, double power,
                                    int64_t batch) {
  PatchScoresBackwardParams p;
  p.mode = mode;
  p.batch = batch;
  p.patches = patches.count();
  p.height = patches.height;
  p.width = patches.width;
  p.patch_height = patches.patch_height;
  p.patch_width = patches.patch_width;
  p.power = power;
  p.origins = patches.origins.data();
  p.row_begin = patches.row_begin.data();
  p.row_patches = patches.row_patches.data();
  p.weight_y = patches.weight_y.data();
  p.weight_x = patches.weight_x.data();
  return p;
}

// The share of each patch in a pixel, by the header's formulas, in double.
template <typename A, typename Score>
std::vector<double> shares(const Patches<A>& patches, PatchMode mode, double power, int64_t y,
                           int64_t x, Score score) {
  std::vector<double> share(patches.count(), 0);
  int64_t best = -1;
  double total = 0;
  bool on_centre = false;
  for (int64_t p = 0; p < patches.count(); ++p) {
    const int64_t row = patches.origins[2 * p], column = patches.origins[2 * p + 1];
    if (mode == PatchMode::kIdw) {
      const double d = std::hypot(y - row - (patches.patch_height - 1) / 2.0,
                                  x - column - (patches.patch_width - 1) / 2.0);
      if (d == 0 && !on_centre) {
        on_centre = true;
        std::fill(share.begin(), share.end(), 0);
      }
      if (d == 0 || !on_centre) share[p] = d == 0 ? 1 : std::pow(d, -power);
    } else if (patches.covers(p, y, x)) {
      if (mode == PatchMode::kWindow) {
        share[p] = static_cast<double>(patches.weight_y[y - row]) * patches.weight_x[x - column];
      } else if (best < 0 || score(p) > score(best)) {
        best = p;
      }
    }
  }
  if (mode == PatchMode::kMax) share[best] = 1;
  for (const double s : share) total += s;
  for (double& s : share) s /= total;
  return share;
}

template <typename T>
void check_mode(PatchMode mode, bool bell, double power, const char* name,
                int64_t patch_height = 4) {
  using A = accumulate_t<T>;
  glance_test::context = name;
  Random random(7);
  const Patches<A> patches = make_patches<A>(random, bell, patch_height);
  const int64_t batch = 3, count = patches.count(), pixels = patches.height * patches.width;
  std::vector<T> scores = glance_test::random_values<T>(random, batch * count);
  for (int64_t i = 0; i < batch * count; i += 5) scores[i] = scores[0];  // ties for max
  const std::vector<T> grad_map = glance_test::random_values<T>(random, batch * pixels);
  std::vector<T> map = glance_test::poison<T>(batch * pixels);
  std::vector<T> grad = glance_test::poison<T>(batch * count);
  std::vector<A> norm(2 * pixels, A(-777));
  std::vector<int32_t> best(batch * pixels, -777);

  PatchScoresBackwardParams p = params_of(patches, mode, power, batch);
  p.dtype = Type<T>::kDtype;
  p.scores = scores.data();
  p.map = map.data();
  p.grad_map = grad_map.data();
  p.grad_scores = grad.data();
  if (mode == PatchMode::kMax) {
    p.best = best.data();
  } else {
    p.norm = norm.data();
  }
  const int64_t rows = batch * patches.height;
  const int64_t prepare_rows = mode == PatchMode::kMax ? rows : patches.height;
  glance::aggregate_cpu(p, 0, rows);
  glance::aggregate_prepare_cpu(p, 0, prepare_rows);
  glance::aggregate_backward_cpu(p, 0, count);

  std::vector<double> expected_grad(batch * count, 0);
  for (int64_t n = 0; n < batch; ++n) {
    const auto score = [&](int64_t i) { return static_cast<double>(widen(scores[n * count + i])); };
    for (int64_t y = 0; y < patches.height; ++y)
      for (int64_t x = 0; x < patches.width; ++x) {
        const std::vector<double> share = shares(patches, mode, power, y, x, score);
        const int64_t at = (n * patches.height + y) * patches.width + x;
        double expected = 0;
        for (int64_t i = 0; i < count; ++i) {
          expected += share[i] * score(i);
          expected_grad[n * count + i] += share[i] * widen(grad_map[at]);
        }
        const double exact =
            mode == PatchMode::kMax ? 0 : Type<T>::kEpsilon + 20 * Type<A>::kEpsilon;
        EXPECT_NEAR(widen(map[at]), expected, 4 * exact);
      }
  }
  for (int64_t i = 0; i < batch * count; ++i) {
    EXPECT_NEAR(widen(grad[i]), expected_grad[i],
                Type<T>::kEpsilon * (std::abs(expected_grad[i]) + 1e-3) + 200 * Type<A>::kEpsilon);
  }

  // Ranges in pieces, from the back, give the same bits.
  std::vector<T> map_pieces = glance_test::poison<T>(map.size());
  std::vector<T> grad_pieces = glance_test::poison<T>(grad.size());
  p.map = map_pieces.data();
  p.grad_scores = grad_pieces.data();
  std::fill(norm.begin(), norm.end(), A(-777));
  std::fill(best.begin(), best.end(), -777);
  for (int64_t end = rows; end > 0; end -= 4) {
    glance::aggregate_cpu(p, std::max<int64_t>(0, end - 4), end);
  }
  for (int64_t end = prepare_rows; end > 0; end -= 3) {
    glance::aggregate_prepare_cpu(p, std::max<int64_t>(0, end - 3), end);
  }
  for (int64_t end = count; end > 0; end -= 7) {
    glance::aggregate_backward_cpu(p, std::max<int64_t>(0, end - 7), end);
  }
  EXPECT(std::memcmp(map.data(), map_pieces.data(), map.size() * sizeof(T)) == 0);
  EXPECT(std::memcmp(grad.data(), grad_pieces.data(), grad.size() * sizeof(T)) == 0);
  glance_test::context.clear();
}

// The gradient of sum(map * grad_map) by moving each score a little; exact for linear modes.
void gradients_agree_with_finite_differences(PatchMode mode, bool bell, double power,
                                             const char* name) {
  glance_test::context = name;
  Random random(11);
  const Patches<double> patches = make_patches<double>(random, bell, 3);
  const int64_t count = patches.count(), pixels = patches.height * patches.width;
  std::vector<double> scores = glance_test::random_values<double>(random, count);
  const std::vector<double> grad_map = glance_test::random_values<double>(random, pixels);
  std::vector<double> map(pixels), grad(count), norm(2 * pixels);
  std::vector<int32_t> best(pixels);
  PatchScoresBackwardParams p = params_of(patches, mode, power, 1);
  p.dtype = glance::ScalarType::kFloat64;
  p.scores = scores.data();
  p.map = map.data();
  p.grad_map = grad_map.data();
  p.grad_scores = grad.data();
  p.norm = mode == PatchMode::kMax ? nullptr : norm.data();
  p.best = mode == PatchMode::kMax ? best.data() : nullptr;
  glance::aggregate_prepare_cpu(p, 0, patches.height);
  glance::aggregate_backward_cpu(p, 0, count);
  const auto loss = [&] {
    glance::aggregate_cpu(p, 0, patches.height);
    double sum = 0;
    for (int64_t i = 0; i < pixels; ++i) sum += map[i] * grad_map[i];
    return sum;
  };
  const double step = 1e-6;
  for (int64_t i = 0; i < count; ++i) {
    const double kept = scores[i];
    scores[i] = kept + step;
    const double up = loss();
    scores[i] = kept - step;
    const double down = loss();
    scores[i] = kept;
    EXPECT_NEAR(grad[i], (up - down) / (2 * step), 1e-7);
  }
  glance_test::context.clear();
}

void nan_scores_reach_exactly_the_pixels_that_they_cover(PatchMode mode, const char* name) {
  glance_test::context = name;
  Random random(5);
  const Patches<float> patches = make_patches<float>(random, false);
  const int64_t sick = 4;
  std::vector<float> scores = glance_test::random_values<float>(random, patches.count());
  scores[sick] = NAN;
  std::vector<float> map(patches.height * patches.width);
  PatchScoresBackwardParams p = params_of(patches, mode, 0, 1);
  p.scores = scores.data();
  p.map = map.data();
  glance::aggregate_cpu(p, 0, patches.height);
  for (int64_t y = 0; y < patches.height; ++y)
    for (int64_t x = 0; x < patches.width; ++x)
      EXPECT(std::isnan(map[y * patches.width + x]) == patches.covers(sick, y, x));
  glance_test::context.clear();
}

void idw_keeps_nan_away_from_other_patches_centres() {
  Random random(5);
  const Patches<float> patches = make_patches<float>(random, false, 3);
  const int64_t sick = 4;
  std::vector<float> scores = glance_test::random_values<float>(random, patches.count());
  scores[sick] = NAN;
  std::vector<float> map(patches.height * patches.width);
  PatchScoresBackwardParams p = params_of(patches, PatchMode::kIdw, 5, 1);
  p.scores = scores.data();
  p.map = map.data();
  glance::aggregate_cpu(p, 0, patches.height);
  int64_t healthy_centres = 0;
  for (int64_t y = 0; y < patches.height; ++y)
    for (int64_t x = 0; x < patches.width; ++x) {
      bool healthy = false, ill = false;
      for (int64_t i = 0; i < patches.count(); ++i) {
        if (patches.origins[2 * i] + 1 != y || patches.origins[2 * i + 1] + 2 != x) continue;
        (i == sick ? ill : healthy) = true;
      }
      healthy_centres += healthy && !ill;
      EXPECT(std::isnan(map[y * patches.width + x]) == (ill || !healthy));
    }
  EXPECT(healthy_centres > 5);
}

template <typename A>
void idw_weight_is_the_power_of_the_distances_ratio() {
  const double epsilon = 8 * Type<A>::kEpsilon;
  for (const double power : {0.5, 2.0, 3.0, 5.0, 7.0, 7.5}) {
    for (const double nearest : {0.25, 1.0, 17.0}) {
      for (const double squared : {0.25, 1.0, 17.0, 400.0, 1e5}) {
        if (squared < nearest) continue;
        const double expected = std::pow(std::sqrt(nearest / squared), power);
        const A got = glance::idw_weight<A>(static_cast<A>(nearest), static_cast<A>(squared),
                                            static_cast<A>(power / 2));
        EXPECT_NEAR(got, expected, epsilon * expected);
      }
    }
    EXPECT(glance::idw_weight<A>(A(0), A(0), static_cast<A>(power / 2)) == A(1));  // on a centre
    EXPECT(glance::idw_weight<A>(A(0), A(2), static_cast<A>(power / 2)) == A(0));  // beside one
  }
}

void squared_distance_is_from_the_patchs_centre() {
  EXPECT(glance::squared_distance<float>(3, 5, 1, 2, 4, 5) == 1.25f);  // centre 2.5, 4
  EXPECT(glance::squared_distance<float>(3, 4, 2, 3, 3, 3) == 0.0f);
  EXPECT(glance::squared_distance<double>(0, 0, 100000, 0, 1, 1) == 1e10);
}

template <typename T>
void check_all_modes() {
  check_mode<T>(PatchMode::kWindow, false, 0, "mean");
  check_mode<T>(PatchMode::kWindow, true, 0, "gaussian");
  check_mode<T>(PatchMode::kMax, false, 0, "max");
  check_mode<T>(PatchMode::kIdw, false, 5, "idw, power 5");
  check_mode<T>(PatchMode::kIdw, false, 5, "idw with centres on pixels", 3);
  check_mode<T>(PatchMode::kIdw, false, 2, "idw, power 2");
  check_mode<T>(PatchMode::kIdw, false, 1.7, "idw, power 1.7");
}

}  // namespace

int main() {
  check_all_modes<float>();
  check_all_modes<double>();
  check_all_modes<glance::Half>();
  check_all_modes<glance::BFloat16>();
  gradients_agree_with_finite_differences(PatchMode::kWindow, false, 0, "mean");
  gradients_agree_with_finite_differences(PatchMode::kWindow, true, 0, "gaussian");
  gradients_agree_with_finite_differences(PatchMode::kMax, false, 0, "max");
  gradients_agree_with_finite_differences(PatchMode::kIdw, false, 5, "idw");
  nan_scores_reach_exactly_the_pixels_that_they_cover(PatchMode::kWindow, "mean");
  nan_scores_reach_exactly_the_pixels_that_they_cover(PatchMode::kMax, "max");
  idw_keeps_nan_away_from_other_patches_centres();
  idw_weight_is_the_power_of_the_distances_ratio<float>();
  idw_weight_is_the_power_of_the_distances_ratio<double>();
  squared_distance_is_from_the_patchs_centre();
  return glance_test::finish("patch_scores");
}
