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
  float& operator[](int i) { return value[i]; }
  float operator[](int i) const { return value[i]; }
  Lanes& operator+=(const Lanes& other) {
    for (int i = 0; i < kDepthwiseLanes; ++i) value[i] += other.value[i];
    return *this;
  }
  Lanes& operator*=(const Lanes& other) {
    for (int i = 0; i < kDepthwiseLanes; ++i) value[i] *= other.value[i];
    return *this;
  }
  friend Lanes operator*(Lanes a, const Lanes& b) { return a *= b; }
};
#endif

GLANCE_INLINE const Lanes& lanes(const float* from) {
  return *reinterpret_cast<const Lanes*>(from);
}
GLANCE_INLINE Lanes& lanes(float* to) { return *reinterpret_cast<Lanes*>(to); }

GLANCE_INLINE void fill(Lanes& to, float value) {
  for (int i = 0; i < kDepthwiseLanes; ++i) to[i] = value;
}

// value where `of` is above 0, or NaN if `of_itself`, else value * slope, and 0 if the slope is.
template <bool kNaNStays>
GLANCE_INLINE void slope_below(Lanes& value, const Lanes& of, float slope) {
#if defined(__GNUC__) || defined(__clang__)
  Lanes below = {};
  if (slope != 0) below = value * slope;
  if (kNaNStays) {
    value = of < 0 ? below : value;
  } else {
    value = of > 0 ? value : below;
  }
#else
  for (int i = 0; i < kDepthwiseLanes; ++i) {
    const bool keep = kNaNStays ? !(of[i] < 0) : of[i] > 0;
    if (!keep) value[i] = slope == 0 ? 0 : value[i] * slope;
  }
#endif
}

GLANCE_INLINE void clear_empty(Lanes& value, const Lanes& ratio) {
#if defined(__GNUC__) || defined(__clang__)
  value = ratio == 0 ? Lanes{} : value;
#else
  for (int i = 0; i < kDepthwiseLanes; ++i) value[i] = ratio[i] == 0 ? 0 : value[i];
#endif
}

GLANCE_INLINE void load_ratio(const Finish& f, bool by_channel, int64_t x, int64_t pitch, int64_t c,
                              Lanes& ratio) {
  if (by_channel) {
    ratio = lanes(f.ratio + x * pitch + c);
  } else {
    fill(ratio, f.ratio[x]);
  }
}

enum class Ratio { kNone, kOfPixel, kOfChannel };

// Pixels whose lines stay in the first cache while all their lanes are computed.
constexpr int64_t kTile = 32;

// Parameters are copied first: a store of lanes might change them, as far as compilers know.
template <int kTaps, Ratio kRatio>
GLANCE_INLINE void sum_taps(const TapSum& work) {
  const int64_t from_step = work.from_step, to_step = work.to_step;
  const int64_t pitch = work.pitch, last = work.lanes;
  const bool add = work.add;
  const Finish finish = kRatio == Ratio::kNone ? Finish{} : *work.finish;
  for (int64_t first = 0; first < work.count; first += kTile) {
    const int64_t end = first + kTile < work.count ? first + kTile : work.count;
    for (int64_t c = 0; c < last; c += kDepthwiseLanes) {
      const float* from[kTaps];
      Lanes weight[kTaps];
      GLANCE_UNROLL
      for (int t = 0; t < kTaps; ++t) {
        from[t] = work.taps[t].from + c;
        weight[t] = lanes(work.taps[t].weight + c);
      }
      Lanes bias = {};
      if (kRatio != Ratio::kNone) bias = lanes(finish.bias + c);
      float* to = work.to + first * to_step + c;
      int64_t at = first * from_step;
      for (int64_t x = first; x < end; ++x, at += from_step, to += to_step) {
        Lanes sum = {};
        if (add) sum = lanes(to);
        GLANCE_UNROLL
        for (int t = 0; t < kTaps; ++t) sum += weight[t] * lanes(from[t] + at);
        if (kRatio != Ratio::kNone) {
          Lanes ratio;
          load_ratio(finish, kRatio == Ratio::kOfChannel, x, pitch, c, ratio);
          sum = sum * ratio;
          sum += bias;
          if (finish.slope != 1) slope_below<true>(sum, sum, finish.slope);
          if (kRatio == Ratio::kOfChannel) clear_empty(sum, ratio);
        }
        lanes(to) = sum;
      }
    }
  }
}

template <int kTaps>
GLANCE_INLINE void tap_gradients(const TapGradient& work) {
  const int64_t count = work.count, pitch = work.pitch, from_step = work.from_step;
  for (int64_t c = 0; c < pitch; c += kDepthwiseLanes) {
    const float* from[kTaps];
    Lanes sum[kTaps];
    GLANCE_UNROLL
    for (int t = 0; t < kTaps; ++t) {
      from[t] = work.taps[t].from + c;
      sum[t] = Lanes{};
    }
    const float* grad = work.grad + c;
    for (int64_t x = 0, at = 0; x < count; ++x, at += from_step, grad += pitch) {
      const Lanes each = lanes(grad);
      GLANCE_UNROLL
      for (int t = 0; t < kTaps; ++t) sum[t] += each * lanes(from[t] + at);
    }
    GLANCE_UNROLL
    for (int t = 0; t < kTaps; ++t) lanes(work.sums + t * pitch + c) += sum[t];
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
  static GLANCE_INLINE void run(const TapSum& work) {
    if (!work.finish) return sum_taps<kTaps, Ratio::kNone>(work);
    if (!work.finish->by_channel) return sum_taps<kTaps, Ratio::kOfPixel>(work);
    sum_taps<kTaps, Ratio::kOfChannel>(work);
  }
};
template <int kTaps>
struct TapGradients {
  static GLANCE_INLINE void run(const TapGradient& work) { tap_gradients<kTaps>(work); }
};

GLANCE_INLINE void scale_pixels(const Finish f, int64_t count, int64_t pitch, const float* result,
                                float* grad, float* bias) {
  for (int64_t c = 0; c < pitch; c += kDepthwiseLanes) {
    Lanes sum = {};
    for (int64_t x = 0; x < count; ++x) {
      Lanes& pixel = lanes(grad + x * pitch + c);
      Lanes value = pixel, ratio;
      if (result) slope_below<false>(value, lanes(result + x * pitch + c), f.slope);
      load_ratio(f, f.by_channel, x, pitch, c, ratio);
      clear_empty(value, ratio);
      sum += value;
      pixel = value * ratio;
    }
    lanes(bias + c) += sum;
  }
}

GLANCE_INLINE void move_pixels(const PixelMove m) {
  for (int64_t x = 0; x < m.count; ++x) {
    const float* from = m.from + x * m.from_step;
    float* to = m.to + x * m.to_step;
    for (int64_t c = 0; c < m.lanes; c += kDepthwiseLanes) lanes(to + c) = lanes(from + c);
  }
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
#define GLANCE_DEPTHWISE_LOOPS(Name, TARGET)                                                 \
  struct Name {                                                                              \
    TARGET static void sum(int taps, const TapSum& work) { with_taps<SumTaps>(taps, work); } \
    TARGET static void gradient(int taps, const TapGradient& work) {                         \
      with_taps<TapGradients>(taps, work);                                                   \
    }                                                                                        \
    TARGET static void scale(const Finish& finish, int64_t count, int64_t pitch,             \
                             const float* result, float* grad, float* bias) {                \
      scale_pixels(finish, count, pitch, result, grad, bias);                                \
    }                                                                                        \
    TARGET static void move(const PixelMove& move) { move_pixels(move); }                    \
    template <typename T>                                                                    \
    TARGET static void wide(const T* from, int64_t count, float* to) {                       \
      widen_row(from, count, to);                                                            \
    }                                                                                        \
    template <typename T>                                                                    \
    TARGET static void narrowed(const float* from, int64_t count, T* to) {                   \
      narrow_row(from, count, to);                                                           \
    }                                                                                        \
  };

template <typename Loops>
DepthwiseLoops loops_of() {
  return {&Loops::sum,
          &Loops::gradient,
          &Loops::scale,
          &Loops::move,
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
