#include <algorithm>
#include <memory>
#include <type_traits>

#include "patch_scores/grid_passes.h"
#include "patch_scores/patch_grid.h"

namespace glance {
namespace {

// Numbers that nobody has written yet.
template <typename A>
class Scratch {
 public:
  A* of(int64_t size) {
    if (size > size_) {
      data_.reset(new A[size]);
      size_ = size;
    }
    return data_.get();
  }

 private:
  int64_t size_ = 0;
  std::unique_ptr<A[]> data_;
};

// Rows of a vector's width, so that no pass has a rest; what is behind them is never looked at.
int64_t padded(int64_t length) { return (length + 15) / 16 * 16; }

template <typename T, typename A>
void widen_row(const T* from, int64_t count, A* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
}

template <typename T, typename A>
void narrow_row(const A* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = narrow<T>(from[i]);
}

// The scores of one image as both passes along the columns want them: (gw, patch rows).
template <typename T>
class ImagePasses {
 public:
  using A = accumulate_t<T>;

  explicit ImagePasses(const PatchGridParams& params) : p_(params) {}

  // The first pass for patch rows [first, last) of image n: (last - first, W).
  PassRows<const A> along_columns(int64_t n, int64_t first, int64_t last, int32_t* best = nullptr) {
    const int64_t rows = last - first, pitch = padded(rows), width = p_.columns.size;
    const A* turned = turned_scores(n, first, last);
    A* spread = spread_.of(width * pitch);
    const PassRows<const A> from{turned, pitch, 0};
    const PassRows<A> to{spread, pitch, 0};
    if (p_.mode == PatchMode::kMax) {
      passes_.spread_max(p_.columns, 0, width, pitch, from, to, {best, pitch, 0});
    } else {
      passes_.spread(p_.columns, 0, width, pitch, from, to);
    }
    A* result = result_.of(rows * width);
    passes_.transpose(spread, pitch, width, rows, result, width);
    return {result, width, first};
  }

  // The second pass, for rows [begin, end) of a map.
  void along_rows(PassRows<const A> from, int64_t begin, int64_t end, A* map, int32_t* best) {
    const PassRows<A> to{map, p_.columns.size, begin};
    if (p_.mode == PatchMode::kMax) {
      const PassRows<int32_t> winner{best, p_.columns.size, begin};
      passes_.spread_max(p_.rows, begin, end, p_.columns.size, from, to, winner);
    } else {
      passes_.spread(p_.rows, begin, end, p_.columns.size, from, to);
    }
  }

  const GridPasses<A>& passes() const { return passes_; }

 private:
  const A* turned_scores(int64_t n, int64_t first, int64_t last) {
    const int64_t rows = last - first, pitch = padded(rows), count = p_.columns.count;
    const T* scores = static_cast<const T*>(p_.scores) + (n * p_.rows.count + first) * count;
    A* turned = turned_.of(count * pitch);
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t i = 0; i < rows; ++i) turned[j * pitch + i] = widen(scores[i * count + j]);
      std::fill(turned + j * pitch + rows, turned + (j + 1) * pitch, A(0));
    }
    return turned;
  }

  const PatchGridParams& p_;
  const GridPasses<A>& passes_ = grid_passes<A>();
  Scratch<A> turned_, spread_, result_;
};

// Calls body(n, begin, end) for the rows of each image in a range of all images' rows.
template <typename Body>
void by_image(int64_t rows, int64_t begin, int64_t end, Body body) {
  while (begin < end) {
    const int64_t n = begin / rows;
    const int64_t stop = std::min(end, (n + 1) * rows);
    body(n, begin - n * rows, stop - n * rows);
    begin = stop;
  }
}

template <typename T>
void aggregate_rows(const PatchGridParams& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const int64_t width = p.columns.size;
  ImagePasses<T> image(p);
  Scratch<A> buffer;
  by_image(p.rows.size, begin, end, [&](int64_t n, int64_t from, int64_t to) {
    const auto spread = image.along_columns(n, p.rows.first[from], p.rows.last[to - 1]);
    T* map = static_cast<T*>(p.map) + (n * p.rows.size + from) * width;
    if constexpr (std::is_same_v<T, A>) {
      image.along_rows(spread, from, to, map, nullptr);
    } else {
      constexpr int64_t kRows = 32;  // which stay in the cache until they are narrowed
      A* wide = buffer.of(kRows * width);
      for (int64_t y = from; y < to; y += kRows, map += kRows * width) {
        const int64_t stop = std::min(to, y + kRows);
        image.along_rows(spread, y, stop, wide, nullptr);
        narrow_row(wide, (stop - y) * width, map);
      }
    }
  });
}

template <typename T>
void best_rows(const PatchGridBackwardParams& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const int64_t width = p.columns.size;
  ImagePasses<T> image(p);
  Scratch<A> map;
  by_image(p.rows.size, begin, end, [&](int64_t n, int64_t from, int64_t to) {
    const auto spread = image.along_columns(n, p.rows.first[from], p.rows.last[to - 1]);
    int32_t* best = p.best + (n * p.rows.size + from) * width;
    image.along_rows(spread, from, to, map.of((to - from) * width), best);
  });
}

template <typename T>
void backward_rows(const PatchGridBackwardParams& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const int64_t width = p.columns.size, count = p.columns.count;
  ImagePasses<T> image(p);
  const GridPasses<A>& passes = image.passes();
  Scratch<A> wide, gathered, turned, result;
  Scratch<int32_t> best_column;
  by_image(p.rows.count, begin, end, [&](int64_t n, int64_t from, int64_t to) {
    const int64_t rows = to - from, pitch = padded(rows);
    const int64_t top = p.rows.starts[from];
    const int64_t covered = p.rows.starts[to - 1] + p.rows.patch - top;
    const int64_t pixel = (n * p.rows.size + top) * width;
    const T* grad = static_cast<const T*>(p.grad_map) + pixel;
    const A* grad_rows;
    if constexpr (std::is_same_v<T, A>) {
      grad_rows = grad;
    } else {
      A* target = wide.of(covered * width);
      widen_row(grad, covered * width, target);
      grad_rows = target;
    }
    A* sums = gathered.of(rows * width);
    A* turned_sums = turned.of(width * pitch);
    A* grads = result.of(count * pitch);
    const PassRows<const A> pixels{grad_rows, width, top}, by_column{turned_sums, pitch, 0};
    const PassRows<A> to_rows{sums, width, from}, to_columns{grads, pitch, 0};
    if (p.mode == PatchMode::kMax) {
      passes.gather_best(p.rows, from, to, width, pixels, {p.best + pixel, width, top}, to_rows);
    } else {
      passes.gather(p.rows, from, to, width, pixels, to_rows);
    }
    passes.transpose(sums, width, rows, width, turned_sums, pitch);
    for (int64_t x = 0; x < width; ++x) {
      std::fill(turned_sums + x * pitch + rows, turned_sums + (x + 1) * pitch, A(0));
    }
    if (p.mode == PatchMode::kMax) {
      int32_t* best = best_column.of(width * pitch);
      image.along_columns(n, from, to, best);
      passes.gather_best(p.columns, 0, count, pitch, by_column, {best, pitch, 0}, to_columns);
    } else {
      passes.gather(p.columns, 0, count, pitch, by_column, to_columns);
    }
    T* target = static_cast<T*>(p.grad_scores) + (n * p.rows.count + from) * count;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < count; ++j) target[i * count + j] = narrow<T>(grads[j * pitch + i]);
    }
  });
}

}  // namespace

void aggregate_grid_cpu(const PatchGridParams& params, int64_t begin, int64_t end) {
  dispatch_cpu(params.dtype,
               [&](auto tag) { aggregate_rows<typename decltype(tag)::type>(params, begin, end); });
}

void aggregate_grid_prepare_cpu(const PatchGridBackwardParams& params, int64_t begin, int64_t end) {
  dispatch_cpu(params.dtype,
               [&](auto tag) { best_rows<typename decltype(tag)::type>(params, begin, end); });
}

void aggregate_grid_backward_cpu(const PatchGridBackwardParams& params, int64_t begin,
                                 int64_t end) {
  dispatch_cpu(params.dtype,
               [&](auto tag) { backward_rows<typename decltype(tag)::type>(params, begin, end); });
}

}  // namespace glance
