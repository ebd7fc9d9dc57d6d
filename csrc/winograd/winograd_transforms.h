// Winograd's transforms of 8 points: 0, 1, -1, 2, -2, 1/2, -1/2 and infinity.
//
// Each is one line of a two-dimensional one. The matrices, for a kernel of r taps and m = 9 - r
// results:
//
//   B^T (8 x 8)  -1    0   21/4    0   -21/4   0    1   0     the points in their order; what
//                 0    1    1   -17/4  -17/4   1    1   0     differs between a point and its
//                 0   -1    1    17/4  -17/4  -1    1   0     negative is the sign of the odd
//                 0   1/2  1/4   -5/2   -5/4   2    1   0     columns
//                 0  -1/2  1/4    5/2   -5/4  -2    1   0
//                 0    2    4    -5/2    -5   1/2   1   0
//                 0   -2    4     5/2    -5  -1/2   1   0
//                 0   -1    0    21/4    0  -21/4   0   1
//   G (8 x r)    row p: 1, p, p^2, ... times -1 for 0, -2/9 for +-1, 1/90 for +-2, 32/45 for +-1/2;
//                the last row takes the last tap
//   A^T (m x 8)  row i: p^i for each point; infinity counts in the last row
#pragma once

#include <cstdint>

#include "common/simd_target.h"

namespace glance {

constexpr int kPoints = 8;  // of a line

// to = B^T from
GLANCE_INLINE void transform_pixels(const float (&d)[kPoints], float (&to)[kPoints]) {
  to[0] = d[6] - d[0] + 5.25f * (d[2] - d[4]);
  to[7] = d[7] - d[1] + 5.25f * (d[3] - d[5]);
  const float even1 = d[2] + d[6] - 4.25f * d[4], odd1 = d[1] + d[5] - 4.25f * d[3];
  const float even2 = d[6] + 0.25f * d[2] - 1.25f * d[4];
  const float odd2 = 0.5f * d[1] - 2.5f * d[3] + 2.0f * d[5];
  const float even3 = d[6] + 4.0f * d[2] - 5.0f * d[4];
  const float odd3 = 2.0f * d[1] - 2.5f * d[3] + 0.5f * d[5];
  to[1] = even1 + odd1;
  to[2] = even1 - odd1;
  to[3] = even2 + odd2;
  to[4] = even2 - odd2;
  to[5] = even3 + odd3;
  to[6] = even3 - odd3;
}

// to = G from, for kTaps taps.
template <int kTaps>
GLANCE_INLINE void transform_taps(const float (&w)[kTaps], float (&to)[kPoints]) {
  to[0] = -1.0f * w[0];
  to[7] = w[kTaps - 1];
  constexpr float kPoint[3] = {1.0f, 2.0f, 0.5f};
  constexpr float kScale[3] = {-2.0f / 9, 1.0f / 90, 32.0f / 45};
  GLANCE_UNROLL
  for (int i = 0; i < 3; ++i) {
    float power = kScale[i];
    float even = power * w[0], odd = (power *= kPoint[i]) * w[1];
    GLANCE_UNROLL
    for (int tap = 2; tap < kTaps; ++tap) {
      power *= kPoint[i];
      if (tap % 2) {
        odd = odd + power * w[tap];
      } else {
        even = even + power * w[tap];
      }
    }
    to[1 + 2 * i] = even + odd;
    to[2 + 2 * i] = even - odd;
  }
}

// to = A^T from, for kResults results.
template <int kResults>
GLANCE_INLINE void transform_products(const float (&m)[kPoints], float (&to)[kResults]) {
  const float sum1 = m[1] + m[2], sum2 = m[3] + m[4], sum3 = m[5] + m[6];
  const float odd1 = m[1] - m[2], odd2 = m[3] - m[4], odd3 = m[5] - m[6];
  to[0] = m[0] + sum1 + sum2 + sum3;
  float two = 1, half = 1;
  GLANCE_UNROLL
  for (int i = 1; i < kResults; ++i) {
    two *= 2;
    half /= 2;
    to[i] = i % 2 ? odd1 + two * odd2 + half * odd3 : sum1 + two * sum2 + half * sum3;
  }
  to[kResults - 1] = to[kResults - 1] + m[7];
}

}  // namespace glance
