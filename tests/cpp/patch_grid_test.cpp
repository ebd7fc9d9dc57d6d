// csrc/patch_scores: the kernels for grids against those for any list of patches, in double; the
// work of the CUDA kernels' threads, run by the host; and the geometry that both need.
#include "patch_scores/patch_grid.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "check.h"
#include "common/recent_cache.h"
#include "patch_scores/grid_geometry.h"
#include "patch_scores/grid_work.h"

using glance::accumulate_t;
using glance::AxisGeometry;
using glance::narrow;
using glance::PatchGridBackwardParams;
using glance::PatchMode;
using glance::widen;
using glance_test::Random;
using glance_test::Type;

namespace {

template <typename A>
std::vector<A> rounded(const std::vector<double>& values) {
  return std::vector<A>(values.begin(), values.end());
}

// A grid and all that the kernels need of it, on the host.
template <typename A>
struct Grid {
  AxisGeometry rows, columns;
  std::vector<A> row_weight, column_weight, table, total;
  glance::DistanceTable distances;

  Grid(const std::vector<int64_t>& row_starts, const std::vector<int64_t>& column_starts,
       int64_t height, int64_t width, const std::vector<double>& window_y,
       const std::vector<double>& window_x)
      : rows(glance::axis_geometry(row_starts, height, window_y)),
        columns(glance::axis_geometry(column_starts, width, window_x)),
        row_weight(rounded<A>(rows.weight)),
        column_weight(rounded<A>(columns.weight)) {}

  static glance::PatchAxis axis_of(const AxisGeometry& axis, const std::vector<A>& weight) {
    return {axis.size,           axis.patch,        static_cast<int64_t>(axis.starts.size()),
            axis.starts.data(),  axis.first.data(), axis.last.data(),
            axis.repeats.data(), weight.data()};
  }

  PatchGridBackwardParams params(PatchMode mode, double power, int64_t batch) {
    PatchGridBackwardParams p;
    p.dtype = Type<A>::kDtype;
    p.mode = mode;
    p.batch = batch;
    p.rows = axis_of(rows, row_weight);
    p.columns = axis_of(columns, column_weight);
    if (mode != PatchMode::kIdw) return p;
    EXPECT(glance::distance_table(rows, columns, power, 1e-30, distances));
    table = rounded<A>(distances.weight);
    total.resize(rows.size * columns.size);
    p.table = table.data();
    p.table_pitch = distances.pitch;
    p.table_origin = distances.origin;
    p.share_pitch = (columns.size + glance::kGridPad - 1) / glance::kGridPad * glance::kGridPad;
    const std::vector<A> ones(p.rows.count * p.columns.count, A(1));
    glance::PatchGridParams sums = p;
    sums.batch = 1;
    sums.scores = ones.data();
    sums.map = total.data();
    glance::aggregate_idw_grid_cpu(sums, 0, rows.size);
    p.total = total.data();
    return p;
  }
};

// What the kernels for lists of patches give, in double.
struct Expected {
  std::vector<double> map, grad;
};

Expected by_list(const AxisGeometry& rows, const AxisGeometry& columns, PatchMode mode,
                 double power, const std::vector<double>& window_y,
                 const std::vector<double>& window_x, int64_t batch,
                 const std::vector<double>& scores, const std::vector<double>& grad_map) {
  std::vector<int64_t> origins, begin{0}, by_row;
  for (const int32_t row : rows.starts) {
    for (const int32_t column : columns.starts) origins.insert(origins.end(), {row, column});
  }
  const int64_t patches = static_cast<int64_t>(origins.size()) / 2;
  for (int64_t y = 0; y < rows.size; ++y) {
    for (int64_t i = 0; i < patches; ++i) {
      if (y >= origins[2 * i] && y < origins[2 * i] + rows.patch) by_row.push_back(i);
    }
    begin.push_back(static_cast<int64_t>(by_row.size()));
  }
  Expected result{std::vector<double>(grad_map.size()), std::vector<double>(scores.size())};
  std::vector<double> norm(2 * rows.size * columns.size);
  std::vector<int32_t> best(grad_map.size());
  glance::PatchScoresBackwardParams p;
  p.dtype = glance::ScalarType::kFloat64;
  p.mode = mode;
  p.batch = batch;
  p.patches = patches;
  p.height = rows.size;
  p.width = columns.size;
  p.patch_height = rows.patch;
  p.patch_width = columns.patch;
  p.power = power;
  p.origins = origins.data();
  p.row_begin = begin.data();
  p.row_patches = by_row.data();
  p.weight_y = window_y.data();
  p.weight_x = window_x.data();
  p.scores = scores.data();
  p.map = result.map.data();
  p.grad_map = grad_map.data();
  p.grad_scores = result.grad.data();
  p.norm = norm.data();
  p.best = mode == PatchMode::kMax ? best.data() : nullptr;
  glance::aggregate_cpu(p, 0, batch * rows.size);
  glance::aggregate_prepare_cpu(p, 0, mode == PatchMode::kMax ? batch * rows.size : rows.size);
  glance::aggregate_backward_cpu(p, 0, patches);
  return result;
}

// All of a CPU kernel's range, in pieces of `step`.
template <typename Kernel>
void in_pieces(int64_t count, int64_t step, Kernel kernel) {
  for (int64_t end = count; end > 0; end -= step) kernel(std::max<int64_t>(0, end - step), end);
}

void run_cpu(const PatchGridBackwardParams& p, int64_t step) {
  const int64_t rows = p.batch * p.rows.size;
  const auto run = [&](auto kernel, int64_t count) {
    in_pieces(count, step, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  };
  if (p.mode == PatchMode::kIdw) {
    run(glance::aggregate_idw_grid_cpu, p.rows.size);
    run(glance::aggregate_idw_grid_prepare_cpu, rows);
    run(glance::aggregate_idw_grid_backward_cpu, p.rows.count * p.columns.count);
    return;
  }
  run(glance::aggregate_grid_cpu, rows);
  if (p.mode == PatchMode::kMax) run(glance::aggregate_grid_prepare_cpu, rows);
  run(glance::aggregate_grid_backward_cpu, p.batch * p.rows.count);
}

template <typename T, bool kMax>
void run_window_threads(const PatchGridBackwardParams& p) {
  const int64_t columns = p.batch * p.rows.count * p.columns.size;
  const int64_t scores = p.batch * p.rows.count * p.columns.count;
  for (int64_t i = columns; i-- > 0;) glance::spread_column<T, kMax>(p, i, p.best_column);
  for (int64_t i = glance::rows_work(p); i-- > 0;) glance::spread_rows<T, kMax>(p, i, nullptr);
  if (kMax) {
    for (int64_t i = glance::rows_work(p); i-- > 0;) glance::spread_rows<T, kMax>(p, i, p.best);
  }
  for (int64_t i = columns; i-- > 0;) glance::gather_rows<T, kMax>(p, i);
  for (int64_t i = scores; i-- > 0;) glance::gather_columns<T, kMax>(p, i);
}

// As idw_kernel and idw_backward_kernel do, but for the order of a block's sums.
template <typename T>
void run_idw_threads(const PatchGridBackwardParams& p) {
  using A = accumulate_t<T>;
  for (int64_t n = 0; n < p.batch; n += glance::kIdwImages) {
    for (int64_t pixel = 0; pixel < p.rows.size * p.columns.size; ++pixel) {
      const int64_t y = pixel / p.columns.size, x = pixel % p.columns.size;
      A sum[glance::kIdwImages] = {};
      for (int64_t i = 0; i < p.rows.count; ++i) {
        for (int64_t j = 0; j < p.columns.count; j += 3) {
          const int64_t columns = std::min<int64_t>(3, p.columns.count - j);
          A scores[3 * glance::kIdwImages];
          for (int64_t k = 0; k < columns * glance::kIdwImages; ++k) {
            scores[k] =
                glance::idw_score<T>(p, n + k % glance::kIdwImages, i, j + k / glance::kIdwImages);
          }
          glance::add_idw_columns(p, y, x, i, j, columns, scores, sum);
        }
      }
      glance::store_idw<T>(p, n, y, x, sum);
    }
  }
  for (int64_t i = p.batch * p.rows.size * p.columns.size; i-- > 0;) {
    glance::share_gradient<T>(p, i);
  }
  const glance::IdwBackwardTasks tasks(p);
  for (int64_t task = 0; task < tasks.count(); ++task) {
    A sum[glance::kIdwPatches * glance::kIdwPatches] = {};
    for (int64_t y = 0; y < p.rows.size; ++y)
      for (int64_t x = 0; x < p.columns.size; ++x) tasks.add_pixel<A>(task, y, x, sum);
    for (int k = 0; k < glance::kIdwPatches * glance::kIdwPatches; ++k) {
      tasks.store_sum<T>(task, k, sum[k]);
    }
  }
}

template <typename T>
void run_threads(const PatchGridBackwardParams& p) {
  if (p.mode == PatchMode::kIdw) return run_idw_threads<T>(p);
  p.mode == PatchMode::kMax ? run_window_threads<T, true>(p) : run_window_threads<T, false>(p);
}

struct Layout {
  const char* name;
  std::vector<int64_t> rows, columns;
  int64_t height, width, patch_height, patch_width;
};

template <typename T>
void check_layout(const Layout& layout, PatchMode mode, bool bell, double power, int64_t batch) {
  using A = accumulate_t<T>;
  glance_test::context = layout.name;
  Random random(3);
  const auto window = [&](int64_t size) {
    return bell ? glance::bell(size, 0.3) : std::vector<double>(size, 1.0);
  };
  const auto window_y = window(layout.patch_height), window_x = window(layout.patch_width);
  Grid<A> grid(layout.rows, layout.columns, layout.height, layout.width, window_y, window_x);
  PatchGridBackwardParams p = grid.params(mode, power, batch);
  p.dtype = Type<T>::kDtype;
  const int64_t patches = p.rows.count * p.columns.count, pixels = layout.height * layout.width;
  auto scores = glance_test::random_values<T>(random, batch * patches);
  for (size_t i = 0; i < scores.size(); i += 3) scores[i] = scores[0];  // ties for max
  const auto grad_map = glance_test::random_values<T>(random, batch * pixels);
  std::vector<double> wide_scores, wide_grad;
  for (const T value : scores) wide_scores.push_back(widen(value));
  for (const T value : grad_map) wide_grad.push_back(widen(value));
  const Expected expected = by_list(grid.rows, grid.columns, mode, power, window_y, window_x, batch,
                                    wide_scores, wide_grad);

  std::vector<A> spread(batch * p.rows.count * layout.width, A(-777));
  std::vector<A> share(batch * layout.height * p.share_pitch, A(-777));
  std::vector<int32_t> best(batch * pixels, -777), best_column(spread.size(), -777);
  p.spread = spread.data();
  p.share = share.data();
  p.best = best.data();
  p.best_column = best_column.data();
  p.scores = scores.data();
  p.grad_map = grad_map.data();
  std::vector<std::vector<T>> maps, grads;
  const auto run = [&](auto kernels) {
    auto map = glance_test::poison<T>(batch * pixels), grad = glance_test::poison<T>(scores.size());
    p.map = map.data();
    p.grad_scores = grad.data();
    kernels();
    for (size_t i = 0; i < map.size(); ++i) {
      const double exact = mode == PatchMode::kMax ? 0 : Type<T>::kEpsilon + 20 * Type<A>::kEpsilon;
      EXPECT_NEAR(widen(map[i]), expected.map[i], 4 * exact);
    }
    for (size_t i = 0; i < grad.size(); ++i) {
      EXPECT_NEAR(
          widen(grad[i]), expected.grad[i],
          Type<T>::kEpsilon * (std::abs(expected.grad[i]) + 1e-3) + 200 * Type<A>::kEpsilon);
    }
    maps.push_back(map);
    grads.push_back(grad);
  };
  run([&] { run_cpu(p, 1 << 20); });
  run([&] { run_cpu(p, 5); });
  run([&] { run_threads<T>(p); });
  // The same bits however the range is cut.
  EXPECT(std::memcmp(maps[0].data(), maps[1].data(), maps[0].size() * sizeof(T)) == 0);
  EXPECT(std::memcmp(grads[0].data(), grads[1].data(), grads[0].size() * sizeof(T)) == 0);
  glance_test::context.clear();
}

const Layout kLayouts[] = {
    {"regular", {0, 3, 6, 9}, {0, 2, 4, 6, 8, 10, 12}, 13, 17, 4, 5},
    {"flush, uneven", {0, 1, 5, 6}, {0, 4, 7, 8, 12, 13}, 11, 18, 5, 5},
    {"one row", {0}, {0, 1, 2, 3, 4, 5}, 7, 8, 7, 3},
    {"one column", {0, 2, 3}, {0}, 6, 40, 3, 40},
    {"stride 1", {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, {0, 1, 2, 3, 4}, 30, 9, 21, 5},
    {"patch of a pixel", {0, 1, 2}, {0, 1, 2, 3}, 3, 4, 1, 1},
    {"patch = image", {0}, {0}, 5, 37, 5, 37},
    {"wide", {0, 4, 8}, {0, 9, 18, 27, 36, 41}, 17, 50, 9, 9},
};

template <typename T>
void check_type() {
  for (const Layout& layout : kLayouts) {
    for (const int64_t batch : {1, 3, 9}) {
      check_layout<T>(layout, PatchMode::kWindow, false, 0, batch);
      check_layout<T>(layout, PatchMode::kWindow, true, 0, batch);
      check_layout<T>(layout, PatchMode::kMax, false, 0, batch);
      check_layout<T>(layout, PatchMode::kIdw, false, 5, batch);
      check_layout<T>(layout, PatchMode::kIdw, false, 1.7, batch);
    }
  }
}

// Sick scores reach the pixels of their patch, by every path, and of two NaN the first gets the
// gradient.
void sick_scores_stay_in_their_patch() {
  const Layout& layout = kLayouts[1];
  for (const PatchMode mode : {PatchMode::kWindow, PatchMode::kMax}) {
    for (const float sick : {NAN, INFINITY, -INFINITY}) {
      Grid<float> grid(layout.rows, layout.columns, layout.height, layout.width,
                       std::vector<double>(5, 1.0), std::vector<double>(5, 1.0));
      PatchGridBackwardParams p = grid.params(mode, 0, 1);
      std::vector<float> scores(24, 1), map(11 * 18), grad_map(map.size(), 1), grad(24);
      std::vector<float> spread(4 * 18);
      std::vector<int32_t> best(map.size()), best_column(spread.size());
      scores[1 * 6 + 2] = sick;  // row 1, column 7
      scores[1 * 6 + 3] = sick;  // row 1, column 8
      p.scores = scores.data();
      p.map = map.data();
      p.grad_map = grad_map.data();
      p.grad_scores = grad.data();
      p.spread = spread.data();
      p.best = best.data();
      p.best_column = best_column.data();
      for (const bool threads : {false, true}) {
        threads ? run_threads<float>(p) : run_cpu(p, 4);
        for (int64_t y = 0; y < 11; ++y)
          for (int64_t x = 0; x < 18; ++x) {
            const bool covered = y >= 1 && y < 6 && x >= 7 && x < 13;
            const bool hidden = mode == PatchMode::kMax && sick == -INFINITY;
            const float value = map[y * 18 + x];
            EXPECT(std::isfinite(value) == (!covered || (hidden && std::isfinite(value))));
            if (covered && std::isnan(sick)) EXPECT(std::isnan(value));
          }
        if (mode == PatchMode::kMax && std::isnan(sick)) {
          EXPECT(grad[1 * 6 + 2] == 25);
          EXPECT(grad[1 * 6 + 3] == 5);  // the column that the first leaves
        }
      }
    }
  }
}

void products_of_starts_are_found() {
  std::vector<int64_t> rows, columns;
  const auto found = [&](const std::vector<int64_t>& origins) {
    return glance::product_of_starts(origins.data(), static_cast<int64_t>(origins.size()) / 2, rows,
                                     columns);
  };
  EXPECT(found({0, 0, 0, 3, 0, 4, 2, 0, 2, 3, 2, 4}));
  EXPECT((rows == std::vector<int64_t>{0, 2}));
  EXPECT((columns == std::vector<int64_t>{0, 3, 4}));
  EXPECT(found({5, 7}));
  EXPECT(found({1, 0, 1, 2}));
  EXPECT(found({1, 2, 3, 2}));
  EXPECT(!found({}));
  EXPECT(!found({0, 0, 0, 0}));              // twice
  EXPECT(!found({0, 0, 0, 3, 2, 0}));        // one is missing
  EXPECT(!found({0, 0, 0, 3, 2, 0, 2, 4}));  // other columns
  EXPECT(!found({0, 0, 0, 3, 2, 0, 1, 3}));  // another row
  EXPECT(!found({0, 0, 2, 0, 0, 3, 2, 3}));  // column by column
  EXPECT(!found({2, 0, 2, 3, 0, 0, 0, 3}));  // rows descend
  EXPECT(!found({0, 3, 0, 0, 2, 3, 2, 0}));  // columns descend
}

void weights_of_an_axis_add_up_to_one() {
  const AxisGeometry axis = glance::axis_geometry({0, 1, 4, 6}, 10, glance::bell(4, 0.3));
  for (int64_t x = 0; x < 10; ++x) {
    double sum = 0;
    for (int64_t i = 0; i < 4; ++i) {
      const bool covers = axis.starts[i] <= x && x < axis.starts[i] + 4;
      EXPECT(covers == (axis.first[x] <= i && i < axis.last[x]));
      if (covers) sum += axis.weight[i * 4 + x - axis.starts[i]];
    }
    EXPECT_NEAR(sum, 1, 1e-15);
  }
  EXPECT(axis.uncovered() == -1);
  const AxisGeometry flat = glance::axis_geometry({0, 3}, 6, {1, 1, 1, 1});
  EXPECT((flat.repeats == std::vector<int32_t>{0, 1, 1, 0, 0, 1}));
  EXPECT(glance::axis_geometry({0, 5}, 8, {1, 1, 1}).uncovered() == 3);
}

void tables_out_of_range_are_refused() {
  const AxisGeometry axis = glance::axis_geometry({0, 4}, 64, {1, 1, 1});
  glance::DistanceTable table;
  EXPECT(glance::distance_table(axis, axis, 5, 1e-20, table));
  EXPECT(table.weight[table.origin + 1] == 0);  // a centre
  EXPECT(table.weight[table.origin + 2] == 1);  // beside it
  EXPECT(!glance::distance_table(axis, axis, 40, 1e-20, table));
  const AxisGeometry large = glance::axis_geometry({0, 9997}, 10000, {1, 1, 1});
  EXPECT(!glance::distance_table(large, large, 1, 1e-20, table));
}

struct Thing {
  int request;
  int64_t bytes;
  bool kept;
};

void cache_keeps_the_last_used() {
  glance::RecentCache<int, Thing> cache(2, 100);
  const auto add = [&](int request, int64_t bytes, bool kept = false) {
    cache.add(std::make_shared<Thing>(Thing{request, bytes, kept}));
  };
  add(1, 10);
  add(2, 10);
  EXPECT(cache.find(1) && cache.find(1)->request == 1);
  add(3, 10);
  EXPECT(cache.find(1) && cache.find(3) && !cache.find(2));
  add(4, 95);
  EXPECT(cache.find(4) && !cache.find(3) && !cache.find(1));
  add(5, 1000);
  EXPECT(cache.find(5) && !cache.find(4));  // alone too large, but the newest
  add(6, 1000, true);
  add(7, 10);
  add(8, 10);
  add(9, 10);
  EXPECT(!cache.find(5) && cache.find(6) && cache.find(8) && cache.find(9) && !cache.find(7));
}

}  // namespace

int main() {
  check_type<float>();
  check_type<double>();
  check_type<glance::Half>();
  check_type<glance::BFloat16>();
  sick_scores_stay_in_their_patch();
  products_of_starts_are_found();
  weights_of_an_axis_add_up_to_one();
  tables_out_of_range_are_refused();
  cache_keeps_the_last_used();
  return glance_test::finish("patch_grid");
}
