#include "partial_conv/depthwise_loops.h"

#include "common/simd_target.h"

namespace glance {
namespace {

#if defined(__GNUC__) || defined(__clang__)
// One register, or two where the target's are of 16 bytes; in memory wherever a float may be.
typedef float Lanes __attribute__((vector_size(32), aligned(4), may_alias));
#else
struct Lanes {
  float value[kDepthwiseLanes];
  Lanes& operator+=(const Lanes& other) {
    for (int i = 0; i < kDepthwiseLanes; ++i) value[i] += other.value[i];
    return *this;
  }
  friend Lanes operator*(Lanes a, const Lanes& b) {
    for (int i = 0; i < kDepthwiseLanes; ++i) a.value[i] *= b.value[i];
    return a;
  }
};
#endif

GLANCE_INLINE const Lanes& lanes(const float* from) {
  return *reinterpret_cast<const Lanes*>(from);
}
GLANCE_INLINE Lanes& lanes(float* to) { return *reinterpret_cast<Lanes*>(to); }

template <int kTaps>
GLANCE_INLINE void sum_taps(const TapSum& work) {
  for (int64_t c = 0; c < work.pitch; c += kDepthwiseLanes) {
    const float* from[kTaps];
    Lanes weight[kTaps];
    GLANCE_UNROLL
    for (int t = 0; t < kTaps; ++t) {
      from[t] = work.taps[t].from + c;
      weight[t] = lanes(work.taps[t].weight + c);
    }
    float* to = work.to + c;
    for (int64_t x = 0, at = 0; x < work.count; ++x, at += work.from_step, to += work.to_step) {
      Lanes sum = {};
      if (work.add) sum = lanes(to);
      GLANCE_UNROLL
      for (int t = 0; t < kTaps; ++t) sum += weight[t] * lanes(from[t] + at);
      lanes(to) = sum;
    }
  }
}

template <int kTaps>
GLANCE_INLINE void tap_gradients(const TapGradient& work) {
  for (int64_t c = 0; c < work.pitch; c += kDepthwiseLanes) {
    const float* from[kTaps];
    Lanes sum[kTaps];
    GLANCE_UNROLL
    for (int t = 0; t < kTaps; ++t) {
      from[t] = work.taps[t].from + c;
      sum[t] = Lanes{};
    }
    const float* grad = work.grad + c;
    for (int64_t x = 0, at = 0; x < work.count; ++x, at += work.from_step, grad += work.pitch) {
      const Lanes each = lanes(grad);
      GLANCE_UNROLL
      for (int t = 0; t < kTaps; ++t) sum[t] += each * lanes(from[t] + at);
    }
    GLANCE_UNROLL
    for (int t = 0; t < kTaps; ++t) lanes(work.sums + t * work.pitch + c) += sum[t];
  }
}

template <template <int> class Loop, typename Work>
GLANCE_INLINE void with_taps(int taps, const Work& work) {
  switch (taps) {
    case 1:
      return Loop<1>::run(work);
    case 2:
      return Loop<2>::run(work);
    case 3:
      return Loop<3>::run(work);
    case 4:
      return Loop<4>::run(work);
    case 5:
      return Loop<5>::run(work);
    case 6:
      return Loop<6>::run(work);
    case 7:
      return Loop<7>::run(work);
    case 8:
      return Loop<8>::run(work);
    default:
      return Loop<kDepthwiseTaps>::run(work);
  }
}

template <int kTaps>
struct SumTaps {
  static GLANCE_INLINE void run(const TapSum& work) { sum_taps<kTaps>(work); }
};
template <int kTaps>
struct TapGradients {
  static GLANCE_INLINE void run(const TapGradient& work) { tap_gradients<kTaps>(work); }
};

template <bool kByChannel>
GLANCE_INLINE void finish_pixels(const PixelScale& s, const float* GLANCE_RESTRICT bias,
                                 float* GLANCE_RESTRICT row) {
  for (int64_t c = 0; c < s.pitch; c += kDepthwiseLanes) {
    for (int64_t x = 0; x < s.count; ++x) {
      float* GLANCE_RESTRICT pixel = row + x * s.pitch + c;
      const float* ratio = s.ratio + (kByChannel ? x * s.pitch + c : x);
      for (int i = 0; i < kDepthwiseLanes; ++i) {
        const float r = ratio[kByChannel ? i : 0];
        const float sum = pixel[i] * r + bias[c + i];
        const float scaled = sum * s.slope;
        const float below = s.slope == 0 ? 0 : scaled;
        const float result = sum < 0 ? below : sum;
        pixel[i] = r == 0 ? 0 : result;
      }
    }
  }
}

template <bool kByChannel>
GLANCE_INLINE void scale_lanes(const PixelScale& s, const float* GLANCE_RESTRICT result,
                               float* GLANCE_RESTRICT grad, float* GLANCE_RESTRICT bias) {
  for (int64_t c = 0; c < s.pitch; c += kDepthwiseLanes) {
    float sum[kDepthwiseLanes] = {};
    for (int64_t x = 0; x < s.count; ++x) {
      float* GLANCE_RESTRICT pixel = grad + x * s.pitch + c;
      const float* GLANCE_RESTRICT of = result ? result + x * s.pitch + c : nullptr;
      const float* ratio = s.ratio + (kByChannel ? x * s.pitch + c : x);
      if (of) {
        for (int i = 0; i < kDepthwiseLanes; ++i) {
          const float scaled = pixel[i] * s.slope;
          const float below = s.slope == 0 ? 0 : scaled;
          pixel[i] = of[i] > 0 ? pixel[i] : below;
        }
      }
      for (int i = 0; i < kDepthwiseLanes; ++i) {
        const float r = ratio[kByChannel ? i : 0], scaled = pixel[i] * r;
        sum[i] += r == 0 ? 0 : pixel[i];
        pixel[i] = r == 0 ? 0 : scaled;
      }
    }
    for (int i = 0; i < kDepthwiseLanes; ++i) bias[c + i] += sum[i];
  }
}

GLANCE_INLINE void finish_row(const PixelScale& s, const float* bias, float* row) {
  s.by_channel ? finish_pixels<true>(s, bias, row) : finish_pixels<false>(s, bias, row);
}

GLANCE_INLINE void scale_row(const PixelScale& s, const float* result, float* grad, float* bias) {
  s.by_channel ? scale_lanes<true>(s, result, grad, bias)
               : scale_lanes<false>(s, result, grad, bias);
}

template <typename T>
GLANCE_INLINE void widen_row(const T* GLANCE_RESTRICT from, int64_t count,
                             float* GLANCE_RESTRICT to) {
  for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
}

template <typename T>
GLANCE_INLINE void narrow_row(const float* GLANCE_RESTRICT from, int64_t count,
                              T* GLANCE_RESTRICT to) {
  for (int64_t i = 0; i < count; ++i) to[i] = narrow<T>(from[i]);
}

// All loops, compiled for the target that stands in front of each.
#define GLANCE_DEPTHWISE_LOOPS(Name, TARGET)                                                      \
  struct Name {                                                                                   \
    TARGET static void sum(int taps, const TapSum& work) { with_taps<SumTaps>(taps, work); }      \
    TARGET static void gradient(int taps, const TapGradient& work) {                              \
      with_taps<TapGradients>(taps, work);                                                        \
    }                                                                                             \
    TARGET static void finish(const PixelScale& s, const float* bias, float* row) {               \
      finish_row(s, bias, row);                                                                   \
    }                                                                                             \
    TARGET static void scale(const PixelScale& s, const float* result, float* grad, float* sum) { \
      scale_row(s, result, grad, sum);                                                            \
    }                                                                                             \
    template <typename T>                                                                         \
    TARGET static void wide(const T* from, int64_t count, float* to) {                            \
      widen_row(from, count, to);                                                                 \
    }                                                                                             \
    template <typename T>                                                                         \
    TARGET static void narrowed(const float* from, int64_t count, T* to) {                        \
      narrow_row(from, count, to);                                                                \
    }                                                                                             \
  };

template <typename Loops>
DepthwiseLoops loops_of() {
  return {&Loops::sum,
          &Loops::gradient,
          &Loops::finish,
          &Loops::scale,
          &Loops::template wide<Half>,
          &Loops::template wide<BFloat16>,
          &Loops::template narrowed<Half>,
          &Loops::template narrowed<BFloat16>};
}

GLANCE_DEPTHWISE_LOOPS(PlainLoops, )
#ifdef GLANCE_X86
GLANCE_DEPTHWISE_LOOPS(Avx2Loops, GLANCE_TARGET_AVX2)
#endif

}  // namespace

const DepthwiseLoops& depthwise_loops() {
#ifdef GLANCE_X86
  static const DepthwiseLoops best =
      best_simd_target() == SimdTarget::kPlain ? loops_of<PlainLoops>() : loops_of<Avx2Loops>();
#else
  static const DepthwiseLoops best = loops_of<PlainLoops>();
#endif
  return best;
}

}  // namespace glance
