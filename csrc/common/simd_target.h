// Functions for one instruction set, chosen at run time, in a library that runs everywhere: either
// written for it, GLANCE_TARGET("avx2,fma"), or a body that is GLANCE_INLINE, which a function with
// GLANCE_TARGET_AVX2 around it has the compiler vectorise anew.
#pragma once

#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define GLANCE_X86 1
#define GLANCE_TARGET(sets) __attribute__((target(sets)))
#define GLANCE_TARGET_AVX2 GLANCE_TARGET("avx2,fma")
#if defined(__clang__)
#define GLANCE_TARGET_AVX512 GLANCE_TARGET("avx512f,avx512dq,avx512vl,avx512bw")
#else
#define GLANCE_TARGET_AVX512 \
  GLANCE_TARGET("avx512f,avx512dq,avx512vl,avx512bw,prefer-vector-width=512")
#endif
#endif

#if defined(__GNUC__) || defined(__clang__)
#define GLANCE_INLINE inline __attribute__((always_inline))
#define GLANCE_RESTRICT __restrict__
#else
#define GLANCE_INLINE inline
#define GLANCE_RESTRICT __restrict
#endif

// In front of a loop of a constant length, and of one whose count only the caller knows.
#define GLANCE_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define GLANCE_UNROLL _Pragma("unroll")
#define GLANCE_UNROLL_BY(count) GLANCE_PRAGMA(unroll(count))
#elif defined(__GNUC__)
#define GLANCE_UNROLL _Pragma("GCC unroll 32")
#define GLANCE_UNROLL_BY(count) GLANCE_PRAGMA(GCC unroll count)
#else
#define GLANCE_UNROLL
#define GLANCE_UNROLL_BY(count)
#endif

namespace glance {

enum class SimdTarget { kPlain, kAvx2, kAvx512 };

// The widest that this processor runs.
inline SimdTarget best_simd_target() {
#ifdef GLANCE_X86
  static const SimdTarget best = [] {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")) {
      return SimdTarget::kAvx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return SimdTarget::kAvx2;
    return SimdTarget::kPlain;
  }();
  return best;
#else
  return SimdTarget::kPlain;
#endif
}

}  // namespace glance
