// The inner loops of depthwise_cpu.cpp: rows of pixels, each of `pitch` floats, one a channel.
#pragma once

#include <cstdint>

#include "common/scalar.h"

namespace glance {

constexpr int64_t kDepthwiseLanes = 8;  // what a pitch is a multiple of
constexpr int kDepthwiseTaps = 9;       // of one call, at the most
constexpr int kDepthwiseOrders = 4;     // of the lanes, at the most

struct DepthwiseTap {
  const float* from;    // the tap's first pixel
  const float* weight;  // (pitch)
};

// What stands between sums and output: act(sum * ratio + bias), 0 where the ratio is.
struct Finish {
  const float* ratio;  // (count), or where `by_channel` (count, pitch)
  bool by_channel;
  const float* bias;  // (pitch)
  float slope;
};

// to[x] = the sum over taps of weight * from[x], or added to it; then finished, unless `finish` is
// null. Steps are in elements.
struct TapSum {
  const DepthwiseTap* taps;
  int64_t count, lanes, pitch, from_step, to_step;
  float* to;
  bool add;
  const Finish* finish;
};

// sums[tap] += the sum over x of grad[x] * from[x].
struct TapGradient {
  const DepthwiseTap* taps;
  int64_t count, pitch, from_step;
  const float* grad;  // (count, pitch)
  float* sums;        // (taps, pitch)
};

// `count` pixels of `lanes` floats, which stand these steps apart.
struct PixelMove {
  const float* from;
  float* to;
  int64_t count, lanes, from_step, to_step;
};

struct DepthwiseLoops {
  void (*sum)(int taps, const TapSum& work);
  void (*gradient)(int taps, const TapGradient& work);
  // grad = (grad behind the activation) * ratio, 0 where the ratio is; before that summed to bias
  // over the pixels where it is not. `result` may be null; `finish.bias` is not read.
  void (*scale)(const Finish& finish, int64_t count, int64_t pitch, const float* result,
                float* grad, float* bias);
  void (*move)(const PixelMove& move);
  // to[i] = from[i ^ order], for an order from 1 to kDepthwiseOrders - 1, of whole vectors.
  void (*reorder)(int64_t order, const float* from, int64_t count, float* to);
  void (*widen_half)(const Half* from, int64_t count, float* to);
  void (*widen_bfloat16)(const BFloat16* from, int64_t count, float* to);
  void (*narrow_half)(const float* from, int64_t count, Half* to);
  void (*narrow_bfloat16)(const float* from, int64_t count, BFloat16* to);
};

// For this processor.
const DepthwiseLoops& depthwise_loops();

}  // namespace glance
