#include "patch_scores/grid_passes.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "common/simd_target.h"

namespace glance {
namespace {

// out (+)= w[0] * from[0] + w[1] * from[1] + ..., in this order.
template <int kRows, bool kFirst, typename A>
GLANCE_INLINE void add_rows(const A* GLANCE_RESTRICT const* from, const A* w, int64_t length,
                            A* GLANCE_RESTRICT out) {
  for (int64_t x = 0; x < length; ++x) {
    A sum = kFirst ? w[0] * from[0][x] : out[x] + w[0] * from[0][x];
    if constexpr (kRows > 1) sum += w[1] * from[1][x];
    if constexpr (kRows > 2) sum += w[2] * from[2][x];
    if constexpr (kRows > 3) sum += w[3] * from[3][x];
    if constexpr (kRows > 4) sum += w[4] * from[4][x];
    if constexpr (kRows > 5) sum += w[5] * from[5][x];
    if constexpr (kRows > 6) sum += w[6] * from[6][x];
    if constexpr (kRows > 7) sum += w[7] * from[7][x];
    out[x] = sum;
  }
}

template <int kRows, typename A>
GLANCE_INLINE void add_rows(const A* const* from, const A* w, int64_t length, A* out, bool first) {
  if (first) {
    add_rows<kRows, true>(from, w, length, out);
  } else {
    add_rows<kRows, false>(from, w, length, out);
  }
}

// A weighted sum of any number of rows, eight at a time.
template <typename A>
class Summation {
 public:
  GLANCE_INLINE Summation(int64_t length, A* out) : length_(length), out_(out) {}
  GLANCE_INLINE void add(const A* row, A weight) {
    from_[held_] = row;
    weight_[held_++] = weight;
    if (held_ == 8) flush<8>();
  }
  GLANCE_INLINE void finish() {
    switch (held_) {
      case 7:
        return flush<7>();
      case 6:
        return flush<6>();
      case 5:
        return flush<5>();
      case 4:
        return flush<4>();
      case 3:
        return flush<3>();
      case 2:
        return flush<2>();
      case 1:
        return flush<1>();
      default:
        if (first_) std::memset(out_, 0, length_ * sizeof(A));
    }
  }

 private:
  template <int kRows>
  GLANCE_INLINE void flush() {
    add_rows<kRows>(from_, weight_, length_, out_, first_);
    first_ = false;
    held_ = 0;
  }

  int64_t length_;
  A* out_;
  int held_ = 0;
  bool first_ = true;
  const A* from_[8];
  A weight_[8];
};

template <typename A>
GLANCE_INLINE void spread_body(const PatchAxis& axis, int64_t begin, int64_t end, int64_t length,
                               PassRows<const A> from, PassRows<A> to) {
  const A* weight = static_cast<const A*>(axis.weight);
  for (int64_t x = begin; x < end; ++x) {
    if (x > begin && axis.repeats[x]) {
      std::memcpy(to.at(x), to.at(x - 1), length * sizeof(A));
      continue;
    }
    Summation<A> sum(length, to.at(x));
    for (int64_t i = axis.first[x]; i < axis.last[x]; ++i) {
      sum.add(from.at(i), weight[i * axis.patch + x - axis.starts[i]]);
    }
    sum.finish();
  }
}

template <typename A>
GLANCE_INLINE void gather_body(const PatchAxis& axis, int64_t begin, int64_t end, int64_t length,
                               PassRows<const A> from, PassRows<A> to) {
  const A* weight = static_cast<const A*>(axis.weight);
  for (int64_t i = begin; i < end; ++i) {
    Summation<A> sum(length, to.at(i));
    for (int64_t t = 0; t < axis.patch; ++t) {
      sum.add(from.at(axis.starts[i] + t), weight[i * axis.patch + t]);
    }
    sum.finish();
  }
}

// A NaN wins over any number, as in torch.amax; of equals the first stays. No short circuits, which
// would be branches.
template <typename A>
GLANCE_INLINE bool wins(A score, A largest) {
  return (score > largest) | ((score != score) & (largest == largest));
}

template <typename A>
GLANCE_INLINE void spread_max_body(const PatchAxis& axis, int64_t begin, int64_t end,
                                   int64_t length, PassRows<const A> from, PassRows<A> to,
                                   PassRows<int32_t> best) {
  for (int64_t x = begin; x < end; ++x) {
    A* GLANCE_RESTRICT largest = to.at(x);
    int32_t* GLANCE_RESTRICT winner = best.data ? best.at(x) : nullptr;
    if (x > begin && axis.repeats[x]) {
      std::memcpy(largest, to.at(x - 1), length * sizeof(A));
      if (winner) std::memcpy(winner, best.at(x - 1), length * sizeof(int32_t));
      continue;
    }
    int64_t i = axis.first[x];
    const int64_t last = axis.last[x];
    std::memcpy(largest, from.at(i), length * sizeof(A));
    if (winner) {
      std::fill(winner, winner + length, static_cast<int32_t>(i));
      for (++i; i < last; ++i) {
        const A* GLANCE_RESTRICT score = from.at(i);
        const int32_t index = static_cast<int32_t>(i);
        for (int64_t k = 0; k < length; ++k) {
          const bool win = wins(score[k], largest[k]);
          largest[k] = win ? score[k] : largest[k];
          winner[k] = win ? index : winner[k];
        }
      }
      continue;
    }
    for (++i; i + 4 <= last; i += 4) {
      const A* GLANCE_RESTRICT a = from.at(i);
      const A* GLANCE_RESTRICT b = from.at(i + 1);
      const A* GLANCE_RESTRICT c = from.at(i + 2);
      const A* GLANCE_RESTRICT d = from.at(i + 3);
      for (int64_t k = 0; k < length; ++k) {
        // A NaN that is in `largest` already stays, since nothing is greater.
        const bool is_nan = (a[k] != a[k]) | (b[k] != b[k]) | (c[k] != c[k]) | (d[k] != d[k]);
        A value = largest[k];
        value = a[k] > value ? a[k] : value;
        value = b[k] > value ? b[k] : value;
        value = c[k] > value ? c[k] : value;
        value = d[k] > value ? d[k] : value;
        largest[k] = is_nan ? std::numeric_limits<A>::quiet_NaN() : value;
      }
    }
    for (; i < last; ++i) {
      const A* GLANCE_RESTRICT a = from.at(i);
      for (int64_t k = 0; k < length; ++k) largest[k] = wins(a[k], largest[k]) ? a[k] : largest[k];
    }
  }
}

template <typename A>
GLANCE_INLINE void gather_best_body(const PatchAxis& axis, int64_t begin, int64_t end,
                                    int64_t length, PassRows<const A> from,
                                    PassRows<const int32_t> best, PassRows<A> to) {
  for (int64_t i = begin; i < end; ++i) {
    const int32_t index = static_cast<int32_t>(i);
    A* GLANCE_RESTRICT out = to.at(i);
    std::memset(out, 0, length * sizeof(A));
    for (int64_t t = 0; t < axis.patch; ++t) {
      const A* GLANCE_RESTRICT row = from.at(axis.starts[i] + t);
      const int32_t* GLANCE_RESTRICT winner = best.at(axis.starts[i] + t);
      // A choice, not a product with zero, which would keep NaN.
      for (int64_t k = 0; k < length; ++k) out[k] += winner[k] == index ? row[k] : A(0);
    }
  }
}

// In squares, which stay in registers or at least in the cache.
template <typename A>
GLANCE_INLINE void transpose_body(const A* from, int64_t pitch, int64_t rows, int64_t columns,
                                  A* to, int64_t to_pitch) {
  constexpr int64_t kSide = 16;
  for (int64_t i0 = 0; i0 < rows; i0 += kSide) {
    const int64_t i1 = std::min(rows, i0 + kSide);
    for (int64_t j0 = 0; j0 < columns; j0 += kSide) {
      const int64_t j1 = std::min(columns, j0 + kSide);
      for (int64_t i = i0; i < i1; ++i) {
        for (int64_t j = j0; j < j1; ++j) to[j * to_pitch + i] = from[i * pitch + j];
      }
    }
  }
}

#define GLANCE_PASSES(name, target)                                                              \
  template <typename A>                                                                          \
  struct name {                                                                                  \
    target static void spread(const PatchAxis& axis, int64_t begin, int64_t end, int64_t length, \
                              PassRows<const A> from, PassRows<A> to) {                          \
      spread_body<A>(axis, begin, end, length, from, to);                                        \
    }                                                                                            \
    target static void spread_max(const PatchAxis& axis, int64_t begin, int64_t end,             \
                                  int64_t length, PassRows<const A> from, PassRows<A> to,        \
                                  PassRows<int32_t> best) {                                      \
      spread_max_body<A>(axis, begin, end, length, from, to, best);                              \
    }                                                                                            \
    target static void gather(const PatchAxis& axis, int64_t begin, int64_t end, int64_t length, \
                              PassRows<const A> from, PassRows<A> to) {                          \
      gather_body<A>(axis, begin, end, length, from, to);                                        \
    }                                                                                            \
    target static void gather_best(const PatchAxis& axis, int64_t begin, int64_t end,            \
                                   int64_t length, PassRows<const A> from,                       \
                                   PassRows<const int32_t> best, PassRows<A> to) {               \
      gather_best_body<A>(axis, begin, end, length, from, best, to);                             \
    }                                                                                            \
    target static void transpose(const A* from, int64_t pitch, int64_t rows, int64_t columns,    \
                                 A* to, int64_t to_pitch) {                                      \
      transpose_body<A>(from, pitch, rows, columns, to, to_pitch);                               \
    }                                                                                            \
    static constexpr GridPasses<A> kAll = {&spread, &spread_max, &gather, &gather_best,          \
                                           &transpose};                                          \
  }

GLANCE_PASSES(PlainPasses, );
#ifdef GLANCE_X86
GLANCE_PASSES(Avx2Passes, GLANCE_TARGET_AVX2);
GLANCE_PASSES(Avx512Passes, GLANCE_TARGET_AVX512);
#endif

}  // namespace

template <typename A>
const GridPasses<A>& grid_passes() {
#ifdef GLANCE_X86
  switch (best_simd_target()) {
    case SimdTarget::kAvx512:
      return Avx512Passes<A>::kAll;
    case SimdTarget::kAvx2:
      return Avx2Passes<A>::kAll;
    case SimdTarget::kPlain:
      break;
  }
#endif
  return PlainPasses<A>::kAll;
}

template const GridPasses<float>& grid_passes<float>();
template const GridPasses<double>& grid_passes<double>();

}  // namespace glance
