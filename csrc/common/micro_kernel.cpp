#include "common/micro_kernel.h"

#include <cstring>
#include <type_traits>

#include "common/simd_target.h"

#ifdef GLANCE_X86
#include <immintrin.h>
#define GLANCE_AVX2 "avx2,fma"
#define GLANCE_AVX512 "avx512f,avx512bw,avx512vl"
#define GLANCE_BFLOAT16 "avx512f,avx512bw,avx512vl,avx512bf16"
#endif

namespace glance {
namespace {

// Plain loops, for processors without a kernel of their own and for double.
template <typename T, int kRows, int kColumns>
void plain(const MicroTile<T, T, T>& tile) {
  T sum[kRows][kColumns] = {};
  const T* b = tile.panel;
  for (int64_t r = 0; r < tile.run_count; ++r) {
    for (int64_t k = 0; k < tile.run_length; ++k, b += kColumns) {
      GLANCE_UNROLL
      for (int m = 0; m < kRows; ++m) {
        const T a = tile.rows[m][tile.runs[r] + k];
        GLANCE_UNROLL
        for (int n = 0; n < kColumns; ++n) sum[m][n] += a * b[n];
      }
    }
  }
  for (int m = 0; m < kRows; ++m) {
    if (!tile.out[m]) continue;
    for (int64_t n = 0; n < tile.width; ++n) {
      const T value = sum[m][n] * tile.ratio[m] + tile.bias[n];
      const T below = tile.negative_slope == 0 ? T(0) : value * tile.negative_slope;
      tile.out[m][n] = value < 0 ? below : value;
    }
  }
}

template <typename T>
inline void max_taps(const T* const* taps, int64_t count, int64_t channels, T* out) {
  for (int64_t c = 0; c < channels; ++c) out[c] = taps[0][c];
  for (int64_t t = 1; t < count; ++t) {
    const T* tap = taps[t];
    for (int64_t c = 0; c < channels; ++c) {
      const auto value = widen(tap[c]), most = widen(out[c]);
      out[c] = (value > most) | (value != value) ? tap[c] : out[c];
    }
  }
}

template <typename T>
void plain_max(const T* const* taps, int64_t count, int64_t channels, T* out) {
  max_taps(taps, count, channels, out);
}

#ifdef GLANCE_X86
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // inside GCC's own intrinsics
#endif

// act(sum * ratio + bias). -infinity * 0 is NaN, so that a slope of 0 needs a zero of its own.
GLANCE_TARGET(GLANCE_AVX512)
inline __m512 finished(__m512 sum, __m512 ratio, const float* bias, float negative_slope) {
  const __m512 value = _mm512_fmadd_ps(sum, ratio, _mm512_loadu_ps(bias));
  const __mmask16 scale = negative_slope == 0 ? 0 : 0xffff;
  const __m512 below = _mm512_maskz_mul_ps(scale, value, _mm512_set1_ps(negative_slope));
  const __mmask16 negative = _mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_LT_OQ);
  return _mm512_mask_blend_ps(negative, value, below);
}

inline uint16_t first_lanes(int64_t count) { return count >= 16 ? 0xffff : (1u << count) - 1; }

template <int kRows, int kStrip, int kVectors>
GLANCE_TARGET(GLANCE_AVX512)
void avx512(const MicroTile<float, float, float>& tile) {
  __m512 sum[kRows][kVectors];
  GLANCE_UNROLL
  for (int m = 0; m < kRows; ++m) {
    GLANCE_UNROLL
    for (int v = 0; v < kVectors; ++v) sum[m][v] = _mm512_setzero_ps();
  }
  const float* b = tile.panel;
  for (int64_t r = 0; r < tile.run_count; ++r) {
    const int64_t start = tile.runs[r];
    for (int64_t k = start; k < start + tile.run_length; ++k, b += kVectors * 16) {
      __m512 column[kVectors];
      GLANCE_UNROLL
      for (int v = 0; v < kVectors; ++v) column[v] = _mm512_loadu_ps(b + v * 16);
      GLANCE_UNROLL
      for (int m = 0; m < kRows; ++m) {
        const __m512 a = _mm512_set1_ps(tile.rows[m / kStrip][k + m % kStrip * tile.step]);
        GLANCE_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[m][v] = _mm512_fmadd_ps(a, column[v], sum[m][v]);
      }
    }
  }
  GLANCE_UNROLL
  for (int m = 0; m < kRows; ++m) {
    if (!tile.out[m]) continue;
    const __m512 ratio = _mm512_set1_ps(tile.ratio[m]);
    GLANCE_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      if (tile.width <= v * 16) break;
      _mm512_mask_storeu_ps(tile.out[m] + v * 16, first_lanes(tile.width - v * 16),
                            finished(sum[m][v], ratio, tile.bias + v * 16, tile.negative_slope));
    }
  }
}

template <int kRows, int kStrip, int kVectors>
GLANCE_TARGET(GLANCE_BFLOAT16)
void avx512_bfloat16(const MicroTile<BFloat16, float, BFloat16>& tile) {
  __m512 sum[kRows][kVectors];
  GLANCE_UNROLL
  for (int m = 0; m < kRows; ++m) {
    GLANCE_UNROLL
    for (int v = 0; v < kVectors; ++v) sum[m][v] = _mm512_setzero_ps();
  }
  const BFloat16* b = tile.panel;
  for (int64_t r = 0; r < tile.run_count; ++r) {
    const int64_t start = tile.runs[r];
    for (int64_t k = start; k < start + tile.run_length; k += 2, b += kVectors * 32) {
      __m512bh column[kVectors];
      GLANCE_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        column[v] = (__m512bh)_mm512_loadu_si512(b + v * 32);
      }
      GLANCE_UNROLL
      for (int m = 0; m < kRows; ++m) {
        int32_t pair;
        std::memcpy(&pair, tile.rows[m / kStrip] + k + m % kStrip * tile.step, sizeof(pair));
        const __m512bh a = (__m512bh)_mm512_set1_epi32(pair);
        GLANCE_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], a, column[v]);
      }
    }
  }
  GLANCE_UNROLL
  for (int m = 0; m < kRows; ++m) {
    if (!tile.out[m]) continue;
    const __m512 ratio = _mm512_set1_ps(tile.ratio[m]);
    GLANCE_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      if (tile.width <= v * 16) break;
      const __m512 value = finished(sum[m][v], ratio, tile.bias + v * 16, tile.negative_slope);
      _mm256_mask_storeu_epi16(tile.out[m] + v * 16, first_lanes(tile.width - v * 16),
                               (__m256i)_mm512_cvtneps_pbh(value));
    }
  }
}

template <int kRows, int kVectors>
GLANCE_TARGET(GLANCE_AVX2)
void avx2(const MicroTile<float, float, float>& tile) {
  __m256 sum[kRows][kVectors];
  GLANCE_UNROLL
  for (int m = 0; m < kRows; ++m) {
    GLANCE_UNROLL
    for (int v = 0; v < kVectors; ++v) sum[m][v] = _mm256_setzero_ps();
  }
  const float* b = tile.panel;
  for (int64_t r = 0; r < tile.run_count; ++r) {
    const float* row[kRows];  // in registers, which the rows' pointers in memory would not be
    GLANCE_UNROLL
    for (int m = 0; m < kRows; ++m) row[m] = tile.rows[m] + tile.runs[r];
    GLANCE_UNROLL_BY(4)
    for (int64_t k = 0; k < tile.run_length; ++k, b += kVectors * 8) {
      __m256 column[kVectors];
      GLANCE_UNROLL
      for (int v = 0; v < kVectors; ++v) column[v] = _mm256_loadu_ps(b + v * 8);
      GLANCE_UNROLL
      for (int m = 0; m < kRows; ++m) {
        const __m256 a = _mm256_broadcast_ss(row[m] + k);
        GLANCE_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[m][v] = _mm256_fmadd_ps(a, column[v], sum[m][v]);
      }
    }
  }
  const __m256 slope = _mm256_set1_ps(tile.negative_slope);
  const __m256 zero = _mm256_setzero_ps();
  const bool scale = tile.negative_slope != 0;
  GLANCE_UNROLL
  for (int m = 0; m < kRows; ++m) {
    if (!tile.out[m]) continue;
    const __m256 ratio = _mm256_set1_ps(tile.ratio[m]);
    GLANCE_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      if (tile.width <= v * 8) break;
      const __m256 value = _mm256_fmadd_ps(sum[m][v], ratio, _mm256_loadu_ps(tile.bias + v * 8));
      const __m256 below = scale ? _mm256_mul_ps(value, slope) : zero;
      const __m256 negative = _mm256_cmp_ps(value, zero, _CMP_LT_OQ);
      const __m256 result = _mm256_blendv_ps(value, below, negative);
      if (tile.width >= v * 8 + 8) {  // masked stores are slow on some processors
        _mm256_storeu_ps(tile.out[m] + v * 8, result);
        continue;
      }
      const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
      const __m256i left = _mm256_set1_epi32(static_cast<int>(tile.width - v * 8));
      _mm256_maskstore_ps(tile.out[m] + v * 8, _mm256_cmpgt_epi32(left, lane), result);
    }
  }
}

// The plain loop, which the compiler turns into instructions of the set.
template <typename T>
GLANCE_TARGET(GLANCE_AVX2)
void avx2_max(const T* const* taps, int64_t count, int64_t channels, T* out) {
  max_taps(taps, count, channels, out);
}

// Sixteen elements as floats, and back: exact, since a maximum is one of what was loaded.
GLANCE_TARGET(GLANCE_AVX512)
inline __m512 load_lanes(const float* p, __mmask16 which) {
  return _mm512_maskz_loadu_ps(which, p);
}
GLANCE_TARGET(GLANCE_AVX512)
inline __m512 load_lanes(const Half* p, __mmask16 which) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(which, p));
}
GLANCE_TARGET(GLANCE_AVX512)
inline __m512 load_lanes(const BFloat16* p, __mmask16 which) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(which, p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
GLANCE_TARGET(GLANCE_AVX512)
inline void store_lanes(float* p, __mmask16 which, __m512 value) {
  _mm512_mask_storeu_ps(p, which, value);
}
GLANCE_TARGET(GLANCE_AVX512)
inline void store_lanes(Half* p, __mmask16 which, __m512 value) {
  _mm256_mask_storeu_epi16(p, which, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}
GLANCE_TARGET(GLANCE_AVX512)
inline void store_lanes(BFloat16* p, __mmask16 which, __m512 value) {
  const __m512i bits = _mm512_srli_epi32(_mm512_castps_si512(value), 16);
  _mm256_mask_storeu_epi16(p, which, _mm512_cvtepi32_epi16(bits));
}

template <typename T>
GLANCE_TARGET(GLANCE_AVX512)
void avx512_max(const T* const* taps, int64_t count, int64_t channels, T* out) {
  for (int64_t c = 0; c < channels; c += 16) {
    const __mmask16 which = first_lanes(channels - c);
    __m512 most = load_lanes(taps[0] + c, which);
    for (int64_t t = 1; t < count; ++t) {
      const __m512 value = load_lanes(taps[t] + c, which);
      const __mmask16 greater = _mm512_cmp_ps_mask(value, most, _CMP_GT_OQ);
      const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
      most = _mm512_mask_mov_ps(most, greater | nan, value);
    }
    store_lanes(out + c, which, most);
  }
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif  // GLANCE_X86

}  // namespace

InstructionSet best_instruction_set() {
#ifdef GLANCE_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl")) {
    return __builtin_cpu_supports("avx512bf16") ? InstructionSet::kAvx512BFloat16
                                                : InstructionSet::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return InstructionSet::kAvx2;
#endif
  return InstructionSet::kPlain;
}

MicroKernel<float, float, float> float_kernel(InstructionSet set, int64_t out_channels) {
#ifdef GLANCE_X86
  if (set >= InstructionSet::kAvx512) {
    if (out_channels <= 16) return {20, 2, 16, 1, &avx512<20, 2, 1>};
    return {14, 1, 32, 1, &avx512<14, 1, 2>};
  }
  if (set == InstructionSet::kAvx2) return {6, 1, 16, 1, &avx2<6, 2>};
#endif
  (void)set;
  (void)out_channels;
  return {4, 1, 8, 1, &plain<float, 4, 8>};
}

MicroKernel<double, double, double> double_kernel() { return {4, 1, 4, 1, &plain<double, 4, 4>}; }

MicroKernel<BFloat16, float, BFloat16> bfloat16_kernel(InstructionSet set, int64_t out_channels) {
#ifdef GLANCE_X86
  if (set == InstructionSet::kAvx512BFloat16) {
    if (out_channels <= 16) return {20, 2, 16, 2, &avx512_bfloat16<20, 2, 1>};
    return {14, 1, 32, 2, &avx512_bfloat16<14, 1, 2>};
  }
#endif
  (void)set;
  (void)out_channels;
  return {0, 0, 0, 0, nullptr};
}

template <typename T>
MaxKernel<T> max_kernel(InstructionSet set) {
#ifdef GLANCE_X86
  if constexpr (!std::is_same_v<T, double>) {
    if (set >= InstructionSet::kAvx512) return &avx512_max<T>;
  }
  if (set >= InstructionSet::kAvx2) return &avx2_max<T>;
#endif
  (void)set;
  return &plain_max<T>;
}

template MaxKernel<float> max_kernel<float>(InstructionSet);
template MaxKernel<double> max_kernel<double>(InstructionSet);
template MaxKernel<Half> max_kernel<Half>(InstructionSet);
template MaxKernel<BFloat16> max_kernel<BFloat16>(InstructionSet);

}  // namespace glance
