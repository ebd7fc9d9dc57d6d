#include "hole_windows/outer_kernel.h"

#include <utility>

#include "common/simd_target.h"

#ifdef GLANCE_X86
#include <immintrin.h>
#endif

namespace glance {
namespace {

using Run = void (*)(const OuterTile&);

template <int kRows>
void plain(const OuterTile& tile) {
  constexpr int kColumns = 8;
  float sum[kRows * kColumns] = {};
  for (int64_t w = 0; w < tile.count; ++w) {
    const float* a = tile.source + tile.places[w];
    const float* b = tile.panel + w * kColumns;
    for (int m = 0; m < kRows; ++m) {
      for (int n = 0; n < kColumns; ++n) sum[m * kColumns + n] += a[m] * b[n];
    }
  }
  for (int i = 0; i < kRows * kColumns; ++i) tile.sums[i] += sum[i];
}

#ifdef GLANCE_X86
template <int kRows, int kVectors>
GLANCE_TARGET("avx512f")
void avx512(const OuterTile& tile) {
  __m512 sum[kRows][kVectors];
  GLANCE_UNROLL
  for (int m = 0; m < kRows; ++m) {
    GLANCE_UNROLL
    for (int v = 0; v < kVectors; ++v) sum[m][v] = _mm512_setzero_ps();
  }
  const float* b = tile.panel;
  for (int64_t w = 0; w < tile.count; ++w, b += kVectors * 16) {
    const float* a = tile.source + tile.places[w];
    __m512 column[kVectors];
    GLANCE_UNROLL
    for (int v = 0; v < kVectors; ++v) column[v] = _mm512_loadu_ps(b + v * 16);
    GLANCE_UNROLL
    for (int m = 0; m < kRows; ++m) {
      const __m512 each = _mm512_set1_ps(a[m]);
      GLANCE_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[m][v] = _mm512_fmadd_ps(each, column[v], sum[m][v]);
    }
  }
  GLANCE_UNROLL
  for (int m = 0; m < kRows; ++m) {
    GLANCE_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float* to = tile.sums + (m * kVectors + v) * 16;
      _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum[m][v]));
    }
  }
}

template <int kRows>
__attribute__((target("avx2,fma"))) void avx2(const OuterTile& tile) {
  __m256 sum[kRows][2];
  GLANCE_UNROLL
  for (int m = 0; m < kRows; ++m) {
    sum[m][0] = sum[m][1] = _mm256_setzero_ps();
  }
  const float* b = tile.panel;
  for (int64_t w = 0; w < tile.count; ++w, b += 16) {
    const float* a = tile.source + tile.places[w];
    const __m256 low = _mm256_loadu_ps(b), high = _mm256_loadu_ps(b + 8);
    GLANCE_UNROLL
    for (int m = 0; m < kRows; ++m) {
      const __m256 each = _mm256_broadcast_ss(a + m);
      sum[m][0] = _mm256_fmadd_ps(each, low, sum[m][0]);
      sum[m][1] = _mm256_fmadd_ps(each, high, sum[m][1]);
    }
  }
  GLANCE_UNROLL
  for (int m = 0; m < kRows; ++m) {
    float* to = tile.sums + m * 16;
    _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), sum[m][0]));
    _mm256_storeu_ps(to + 8, _mm256_add_ps(_mm256_loadu_ps(to + 8), sum[m][1]));
  }
}
#endif

// The kernel of exactly `rows`, of those for 1, 2, ...
template <template <int> class Kernel, int... kIndex>
Run with_rows(int64_t rows, std::integer_sequence<int, kIndex...>) {
  const Run runs[] = {Kernel<kIndex + 1>::run...};
  return runs[rows - 1];
}

template <int kRows>
struct Plain {
  static constexpr Run run = &plain<kRows>;
};
#ifdef GLANCE_X86
template <int kRows>
struct Narrow {
  static constexpr Run run = &avx512<kRows, 1>;
};
template <int kRows>
struct Wide {
  static constexpr Run run = &avx512<kRows, 2>;
};
template <int kRows>
struct Avx2 {
  static constexpr Run run = &avx2<kRows>;
};
#endif

template <template <int> class Kernel, int kMost>
OuterKernel best_of(int64_t length, int64_t columns) {
  const int64_t parts = (length + kMost - 1) / kMost;
  const int64_t rows = (length + parts - 1) / parts;
  return {rows, columns, with_rows<Kernel>(rows, std::make_integer_sequence<int, kMost>{})};
}

}  // namespace

OuterKernel outer_kernel(InstructionSet set, int64_t length, int64_t out_channels) {
#ifdef GLANCE_X86
  if (set >= InstructionSet::kAvx512) {
    if (out_channels <= 16) return best_of<Narrow, 28>(length, 16);
    return best_of<Wide, 14>(length, 32);
  }
  if (set == InstructionSet::kAvx2) return best_of<Avx2, 6>(length, 16);
#endif
  (void)set;
  (void)out_channels;
  return best_of<Plain, 4>(length, 8);
}

}  // namespace glance
