#include "partial_conv/depthwise_loops.h"

#include "common/simd_target.h"

namespace glance {
namespace {

#if defined(__GNUC__) || defined(__clang__)
// One register, or two where the target's are of half the size; in memory wherever a float may be.
struct Narrow {
  typedef float Vector __attribute__((vector_size(32), aligned(4), may_alias));
};
struct Wide {
  typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));
};
#else
struct Narrow {
  struct Vector {
    float value[kDepthwiseLanes];
    float& operator[](int i) { return value[i]; }
    float operator[](int i) const { return value[i]; }
    Vector& operator+=(const Vector& other) {
      for (int i = 0; i < kDepthwiseLanes; ++i) value[i] += other.value[i];
      return *this;
    }
    Vector& operator*=(const Vector& other) {
      for (int i = 0; i < kDepthwiseLanes; ++i) value[i] *= other.value[i];
      return *this;
    }
    friend Vector operator*(Vector a, const Vector& b) { return a *= b; }
  };
};
#endif
using Lanes = Narrow::Vector;

#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector)
#define GLANCE_SHUFFLE 1
#endif
#endif

// The vector is a member of W, since a template's own argument would lose its attributes.
template <typename W>
constexpr int64_t kLanesOf = sizeof(typename W::Vector) / sizeof(float);

template <typename W = Narrow>
GLANCE_INLINE const typename W::Vector& lanes(const float* from) {
  return *reinterpret_cast<const typename W::Vector*>(from);
}
template <typename W = Narrow>
GLANCE_INLINE typename W::Vector& lanes(float* to) {
  return *reinterpret_cast<typename W::Vector*>(to);
}

template <typename W>
GLANCE_INLINE void fill(typename W::Vector& to, float value) {
  for (int i = 0; i < kLanesOf<W>; ++i) to[i] = value;
}

// value where `of` is above 0, or NaN if `of_itself`, else value * slope, and 0 if the slope is.
template <bool kNaNStays, typename W>
GLANCE_INLINE void slope_below(typename W::Vector& value, const typename W::Vector& of,
                               float slope) {
#if defined(__GNUC__) || defined(__clang__)
  typename W::Vector below = {};
  if (slope != 0) below = value * slope;
  if (kNaNStays) {
    value = of < 0 ? below : value;
  } else {
    value = of > 0 ? value : below;
  }
#else
  for (int i = 0; i < kLanesOf<W>; ++i) {
    const bool keep = kNaNStays ? !(of[i] < 0) : of[i] > 0;
    if (!keep) value[i] = slope == 0 ? 0 : value[i] * slope;
  }
#endif
}

template <typename W>
GLANCE_INLINE void clear_empty(typename W::Vector& value, const typename W::Vector& ratio) {
#if defined(__GNUC__) || defined(__clang__)
  value = ratio == 0 ? typename W::Vector{} : value;
#else
  for (int i = 0; i < kLanesOf<W>; ++i) value[i] = ratio[i] == 0 ? 0 : value[i];
#endif
}

template <typename W>
GLANCE_INLINE void load_ratio(const Finish& f, bool by_channel, int64_t x, int64_t pitch, int64_t c,
                              typename W::Vector& ratio) {
  if (by_channel) {
    ratio = lanes<W>(f.ratio + x * pitch + c);
  } else {
    fill<W>(ratio, f.ratio[x]);
  }
}

enum class Ratio { kNone, kOfPixel, kOfChannel };

// Pixels whose lines stay in the first cache while all their lanes are computed.
constexpr int64_t kTile = 32;

// Lines that are to be written are asked for together: one by one each would wait for the one
// before.
GLANCE_INLINE void prefetch(const float* to, int64_t count) {
#if defined(__GNUC__) || defined(__clang__)
  constexpr int64_t kLine = 64 / sizeof(float);
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(to + i, /*write=*/1);
#else
  (void)to, (void)count;
#endif
}

// Of pixels [first, end) and the channels of a vector from `c` on. Parameters are copied first: a
// store of lanes might change them, as far as compilers know.
template <typename W, int kTaps, Ratio kRatio>
GLANCE_INLINE void sum_lanes(const TapSum& work, int64_t first, int64_t end, int64_t c) {
  using V = typename W::Vector;
  const int64_t from_step = work.from_step, to_step = work.to_step, pitch = work.pitch;
  const bool add = work.add;
  const Finish finish = kRatio == Ratio::kNone ? Finish{} : *work.finish;
  const float* from[kTaps];
  V weight[kTaps];
  GLANCE_UNROLL
  for (int t = 0; t < kTaps; ++t) {
    from[t] = work.taps[t].from + c;
    weight[t] = lanes<W>(work.taps[t].weight + c);
  }
  V bias = {};
  if (kRatio != Ratio::kNone) bias = lanes<W>(finish.bias + c);
  float* to = work.to + first * to_step + c;
  int64_t at = first * from_step;
  for (int64_t x = first; x < end; ++x, at += from_step, to += to_step) {
    V sum = {}, odd = {};  // two sums: one alone would wait for itself
    if (add) sum = lanes<W>(to);
    GLANCE_UNROLL
    for (int t = 0; t < kTaps; ++t) (t % 2 ? odd : sum) += weight[t] * lanes<W>(from[t] + at);
    sum += odd;
    if (kRatio != Ratio::kNone) {
      V ratio;
      load_ratio<W>(finish, kRatio == Ratio::kOfChannel, x, pitch, c, ratio);
      sum = sum * ratio;
      sum += bias;
      if (finish.slope != 1) slope_below<true, W>(sum, sum, finish.slope);
      if (kRatio == Ratio::kOfChannel) clear_empty<W>(sum, ratio);
    }
    lanes<W>(to) = sum;
  }
}

template <typename W, int kTaps, Ratio kRatio>
GLANCE_INLINE void sum_taps(const TapSum& work) {
  for (int64_t first = 0; first < work.count; first += kTile) {
    const int64_t end = first + kTile < work.count ? first + kTile : work.count;
    for (int64_t x = first; x < end; ++x) prefetch(work.to + x * work.to_step, work.lanes);
    int64_t c = 0;
    for (; c + kLanesOf<W> <= work.lanes; c += kLanesOf<W>) {
      sum_lanes<W, kTaps, kRatio>(work, first, end, c);
    }
    if (c < work.lanes) sum_lanes<Narrow, kTaps, kRatio>(work, first, end, c);
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

template <typename W>
struct By {
  template <int kTaps>
  struct SumTaps {
    static GLANCE_INLINE void run(const TapSum& work) {
      if (!work.finish) return sum_taps<W, kTaps, Ratio::kNone>(work);
      if (!work.finish->by_channel) return sum_taps<W, kTaps, Ratio::kOfPixel>(work);
      sum_taps<W, kTaps, Ratio::kOfChannel>(work);
    }
  };
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
      if (result) slope_below<false, Narrow>(value, lanes(result + x * pitch + c), f.slope);
      load_ratio<Narrow>(f, f.by_channel, x, pitch, c, ratio);
      clear_empty<Narrow>(value, ratio);
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

template <int kOrder>
GLANCE_INLINE void reorder_lanes(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kDepthwiseLanes) {
#ifdef GLANCE_SHUFFLE
    const Lanes v = lanes(from + i);
    lanes(to + i) = __builtin_shufflevector(v, v, 0 ^ kOrder, 1 ^ kOrder, 2 ^ kOrder, 3 ^ kOrder,
                                            4 ^ kOrder, 5 ^ kOrder, 6 ^ kOrder, 7 ^ kOrder);
#else
    for (int j = 0; j < kDepthwiseLanes; ++j) to[i + j] = from[i + (j ^ kOrder)];
#endif
  }
}

GLANCE_INLINE void reorder_row(int64_t order, const float* from, int64_t count, float* to) {
  switch (order) {
    case 1:
      return reorder_lanes<1>(from, count, to);
    case 2:
      return reorder_lanes<2>(from, count, to);
    default:
      return reorder_lanes<kDepthwiseOrders - 1>(from, count, to);
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

// All loops, compiled for the target that stands in front of each; sums go by vectors of W.
#define GLANCE_DEPTHWISE_LOOPS(Name, W, TARGET)                                              \
  struct Name {                                                                              \
    TARGET static void sum(int taps, const TapSum& work) {                                   \
      with_taps<By<W>::template SumTaps>(taps, work);                                        \
    }                                                                                        \
    TARGET static void gradient(int taps, const TapGradient& work) {                         \
      with_taps<TapGradients>(taps, work);                                                   \
    }                                                                                        \
    TARGET static void scale(const Finish& finish, int64_t count, int64_t pitch,             \
                             const float* result, float* grad, float* bias) {                \
      scale_pixels(finish, count, pitch, result, grad, bias);                                \
    }                                                                                        \
    TARGET static void move(const PixelMove& move) { move_pixels(move); }                    \
    TARGET static void reorder(int64_t order, const float* from, int64_t count, float* to) { \
      reorder_row(order, from, count, to);                                                   \
    }                                                                                        \
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
          &Loops::reorder,
          &Loops::template wide<Half>,
          &Loops::template wide<BFloat16>,
          &Loops::template narrowed<Half>,
          &Loops::template narrowed<BFloat16>};
}

GLANCE_DEPTHWISE_LOOPS(PlainLoops, Narrow, )
#ifdef GLANCE_X86
GLANCE_DEPTHWISE_LOOPS(Avx2Loops, Narrow, GLANCE_TARGET_AVX2)
GLANCE_DEPTHWISE_LOOPS(Avx512Loops, Wide, GLANCE_TARGET_AVX512)
#endif

}  // namespace

const DepthwiseLoops& depthwise_loops() {
#ifdef GLANCE_X86
  static const DepthwiseLoops best = [] {
    switch (best_simd_target()) {
      case SimdTarget::kAvx512:
        return loops_of<Avx512Loops>();
      case SimdTarget::kAvx2:
        return loops_of<Avx2Loops>();
      default:
        return loops_of<PlainLoops>();
    }
  }();
#else
  static const DepthwiseLoops best = loops_of<PlainLoops>();
#endif
  return best;
}

}  // namespace glance
