#include "hole_windows/micro_kernel.h"

#include <cstring>

// Functions for one instruction set, chosen at run time, in a library that runs everywhere.
#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define GLANCE_X86 1
#include <immintrin.h>
#define GLANCE_TARGET(sets) __attribute__((target(sets)))
#define GLANCE_AVX2 "avx2,fma"
#define GLANCE_AVX512 "avx512f"
#define GLANCE_BFLOAT16 "avx512f,avx512bf16"
#endif

#if defined(__clang__)
#define GLANCE_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define GLANCE_UNROLL _Pragma("GCC unroll 16")
#else
#define GLANCE_UNROLL
#endif

namespace glance {
namespace {

// Plain loops, for processors without a kernel of their own and for double.
template <typename T, int kRows, int kColumns>
void plain(const MicroTile<T, T>& tile) {
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
    for (int n = 0; n < kColumns; ++n) {
      const T value = sum[m][n] * tile.ratio[m] + tile.bias[n];
      const T below = tile.negative_slope == 0 ? T(0) : value * tile.negative_slope;
      tile.out[m * kColumns + n] = value < 0 ? below : value;
    }
  }
}

#ifdef GLANCE_X86

// -infinity * 0 is NaN, so that a slope of 0 needs a zero of its own.
template <int kRows, int kVectors>
GLANCE_TARGET(GLANCE_AVX512)
inline void finish(const __m512 (&sum)[kRows][kVectors], const float* ratio, const float* bias,
                   float negative_slope, float* out) {
  const __m512 slope = _mm512_set1_ps(negative_slope);
  const __m512 zero = _mm512_setzero_ps();
  const __mmask16 scale = negative_slope == 0 ? 0 : 0xffff;
  GLANCE_UNROLL
  for (int m = 0; m < kRows; ++m) {
    const __m512 r = _mm512_set1_ps(ratio[m]);
    GLANCE_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const __m512 value = _mm512_fmadd_ps(sum[m][v], r, _mm512_loadu_ps(bias + v * 16));
      const __m512 below = _mm512_maskz_mul_ps(scale, value, slope);
      const __mmask16 negative = _mm512_cmp_ps_mask(value, zero, _CMP_LT_OQ);
      _mm512_storeu_ps(out + (m * kVectors + v) * 16, _mm512_mask_blend_ps(negative, value, below));
    }
  }
}

template <int kRows, int kVectors>
GLANCE_TARGET(GLANCE_AVX512)
void avx512(const MicroTile<float, float>& tile) {
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
        const __m512 a = _mm512_set1_ps(tile.rows[m][k]);
        GLANCE_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[m][v] = _mm512_fmadd_ps(a, column[v], sum[m][v]);
      }
    }
  }
  finish<kRows, kVectors>(sum, tile.ratio, tile.bias, tile.negative_slope, tile.out);
}

template <int kRows, int kVectors>
GLANCE_TARGET(GLANCE_BFLOAT16)
void avx512_bfloat16(const MicroTile<BFloat16, float>& tile) {
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
        std::memcpy(&pair, tile.rows[m] + k, sizeof(pair));
        const __m512bh a = (__m512bh)_mm512_set1_epi32(pair);
        GLANCE_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], a, column[v]);
      }
    }
  }
  finish<kRows, kVectors>(sum, tile.ratio, tile.bias, tile.negative_slope, tile.out);
}

template <int kRows, int kVectors>
GLANCE_TARGET(GLANCE_AVX2)
void avx2(const MicroTile<float, float>& tile) {
  __m256 sum[kRows][kVectors];
  GLANCE_UNROLL
  for (int m = 0; m < kRows; ++m) {
    GLANCE_UNROLL
    for (int v = 0; v < kVectors; ++v) sum[m][v] = _mm256_setzero_ps();
  }
  const float* b = tile.panel;
  for (int64_t r = 0; r < tile.run_count; ++r) {
    const int64_t start = tile.runs[r];
    for (int64_t k = start; k < start + tile.run_length; ++k, b += kVectors * 8) {
      __m256 column[kVectors];
      GLANCE_UNROLL
      for (int v = 0; v < kVectors; ++v) column[v] = _mm256_loadu_ps(b + v * 8);
      GLANCE_UNROLL
      for (int m = 0; m < kRows; ++m) {
        const __m256 a = _mm256_broadcast_ss(tile.rows[m] + k);
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
    const __m256 ratio = _mm256_set1_ps(tile.ratio[m]);
    GLANCE_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const __m256 value = _mm256_fmadd_ps(sum[m][v], ratio, _mm256_loadu_ps(tile.bias + v * 8));
      const __m256 below = scale ? _mm256_mul_ps(value, slope) : zero;
      const __m256 negative = _mm256_cmp_ps(value, zero, _CMP_LT_OQ);
      _mm256_storeu_ps(tile.out + (m * kVectors + v) * 8, _mm256_blendv_ps(value, below, negative));
    }
  }
}

#endif  // GLANCE_X86

}  // namespace

InstructionSet best_instruction_set() {
#ifdef GLANCE_X86
  if (__builtin_cpu_supports("avx512f")) {
    return __builtin_cpu_supports("avx512bf16") ? InstructionSet::kAvx512BFloat16
                                                : InstructionSet::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return InstructionSet::kAvx2;
#endif
  return InstructionSet::kPlain;
}

MicroKernel<float, float> float_kernel(InstructionSet set, int64_t out_channels) {
#ifdef GLANCE_X86
  if (set >= InstructionSet::kAvx512) {
    if (out_channels <= 16) return {14, 16, 1, &avx512<14, 1>};
    return {14, 32, 1, &avx512<14, 2>};
  }
  if (set == InstructionSet::kAvx2) return {6, 16, 1, &avx2<6, 2>};
#endif
  (void)set;
  (void)out_channels;
  return {4, 8, 1, &plain<float, 4, 8>};
}

MicroKernel<double, double> double_kernel() { return {4, 4, 1, &plain<double, 4, 4>}; }

MicroKernel<BFloat16, float> bfloat16_kernel(InstructionSet set, int64_t out_channels) {
#ifdef GLANCE_X86
  if (set == InstructionSet::kAvx512BFloat16) {
    if (out_channels <= 16) return {14, 16, 2, &avx512_bfloat16<14, 1>};
    return {14, 32, 2, &avx512_bfloat16<14, 2>};
  }
#endif
  (void)set;
  (void)out_channels;
  return {0, 0, 0, nullptr};
}

}  // namespace glance
