// The lines of Winograd's transforms; each of two dimensions is one of these by columns, then rows.
//
// With the points 0, 1, -1, 2, -2, 1/2, -1/2 and infinity, and a kernel of r taps, 9 - r results
// are
//
//   A^T [ (G taps) * (B^T pixels) ]        A^T (9 - r x 8), G (8 x r), B^T (8 x 8)
//
// Row p of G is scale * (1, p, p^2, ...), where the scale is -1 for 0, -2/9 for 1 and -1, 1/90 for
// 2 and -2, 32/45 for 1/2 and -1/2; its last row takes the last tap. Row i of A^T is p^i for each
// point, and infinity counts in its last row. B^T depends on the points alone:
//
//   -1    0   21/4     0   -21/4    0     1    0
//    0    1     1   -17/4  -17/4    1     1    0
//    0   -1     1    17/4  -17/4   -1     1    0
//    0   1/2   1/4   -5/2   -5/4    2     1    0
//    0  -1/2   1/4    5/2   -5/4   -2     1    0
//    0    2     4    -5/2    -5    1/2    1    0
//    0   -2     4     5/2    -5   -1/2    1    0
//    0   -1     0    21/4     0   -21/4   0    1
//
// A point and its negative share what even and what odd powers give.
#pragma once

#include "common/simd_target.h"
#include "winograd/winograd_block.h"

namespace glance {

// to = B^T d

GLANCE_INLINE void transform_pixels(const float (&d)[kWinogradPoints],
                                    float (&to)[kWinogradPoints]) {
  const float even1 = d[2] + d[6] - 4.25f * d[4], odd1 = d[1] + d[5] - 4.25f * d[3];
  const float even2 = d[6] + 0.25f * d[2] - 1.25f * d[4];
  const float odd2 = 0.5f * d[1] - 2.5f * d[3] + 2 * d[5];
  const float even3 = d[6] + 4 * d[2] - 5 * d[4];
  const float odd3 = 2 * d[1] - 2.5f * d[3] + 0.5f * d[5];
  to[0] = d[6] - d[0] + 5.25f * (d[2] - d[4]);
  to[1] = even1 + odd1;
  to[2] = even1 - odd1;
  to[3] = even2 + odd2;
  to[4] = even2 - odd2;
  to[5] = even3 + odd3;
  to[6] = even3 - odd3;
  to[7] = d[7] - d[1] + 5.25f * (d[3] - d[5]);
}

// to = G w

// The taps of even and of odd powers of a point, each sum times `scale`.
template <int kTaps>
GLANCE_INLINE void powers(const float (&w)[kTaps], float point, float scale, float& even,
                          float& odd) {
  even = odd = 0;
  float power = scale;
  GLANCE_UNROLL
  for (int tap = 0; tap < kTaps; ++tap, power *= point) (tap % 2 ? odd : even) += power * w[tap];
}

template <int kTaps>
GLANCE_INLINE void transform_taps(const float (&w)[kTaps], float (&to)[kWinogradPoints]) {
  float even1, odd1, even2, odd2, even3, odd3;
  powers(w, 1, -2.0f / 9, even1, odd1);
  powers(w, 2, 1.0f / 90, even2, odd2);
  powers(w, 0.5f, 32.0f / 45, even3, odd3);
  to[0] = -w[0];
  to[1] = even1 + odd1;
  to[2] = even1 - odd1;
  to[3] = even2 + odd2;
  to[4] = even2 - odd2;
  to[5] = even3 + odd3;
  to[6] = even3 - odd3;
  to[7] = w[kTaps - 1];
}

// to = A^T m

template <int kResults>
GLANCE_INLINE void transform_products(const float (&m)[kWinogradPoints], float (&to)[kResults]) {
  const float even1 = m[1] + m[2], odd1 = m[1] - m[2];
  const float even2 = m[3] + m[4], odd2 = m[3] - m[4];
  const float even3 = m[5] + m[6], odd3 = m[5] - m[6];
  to[0] = m[0] + even1 + even2 + even3;
  float two = 1, half = 1;
  GLANCE_UNROLL
  for (int i = 1; i < kResults; ++i) {
    two *= 2;
    half /= 2;
    to[i] = i % 2 ? odd1 + two * odd2 + half * odd3 : even1 + two * even2 + half * even3;
  }
  to[kResults - 1] += m[7];
}

}  // namespace glance
