#include "common/transpose.h"

#include "common/simd_target.h"

#ifdef GLANCE_X86
#include <immintrin.h>
#endif

namespace glance {
namespace {

void plain(const float* from, int64_t from_pitch, int64_t rows, int64_t columns, float* to,
           int64_t to_pitch) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      to[column * to_pitch + row] = from[row * from_pitch + column];
    }
  }
}

#ifdef GLANCE_X86
GLANCE_TARGET("avx2")
void eight_by_eight(const float* from, int64_t from_pitch, float* to, int64_t to_pitch) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(from + i * from_pitch);
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * to_pitch, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * to_pitch, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
}
#endif

}  // namespace

void transpose(const float* from, int64_t from_pitch, int64_t rows, int64_t columns, float* to,
               int64_t to_pitch) {
#ifdef GLANCE_X86
  static const bool avx2 = __builtin_cpu_supports("avx2");
  if (avx2) {
    const int64_t whole_rows = rows / 8 * 8, whole_columns = columns / 8 * 8;
    for (int64_t row = 0; row < whole_rows; row += 8) {
      for (int64_t column = 0; column < whole_columns; column += 8) {
        eight_by_eight(from + row * from_pitch + column, from_pitch, to + column * to_pitch + row,
                       to_pitch);
      }
    }
    plain(from + whole_columns, from_pitch, whole_rows, columns - whole_columns,
          to + whole_columns * to_pitch, to_pitch);
    plain(from + whole_rows * from_pitch, from_pitch, rows - whole_rows, columns, to + whole_rows,
          to_pitch);
    return;
  }
#endif
  plain(from, from_pitch, rows, columns, to, to_pitch);
}

}  // namespace glance
