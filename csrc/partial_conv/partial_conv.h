// Partial convolution: the contract that every kernel in this folder keeps.
//
// Equation (Liu et al., ECCV 2018; used by Global-Net in Wang et al., CVPR 2021, section 3.3).
// For every output pixel, with the window's input X, its validity M and the window's full size 1:
//
//   output = (W * where(M, X, 0)) * sum(1) / sum(M) + bias    if sum(M) > 0
//   output = 0                                                otherwise
//   valid  = sum(M) > 0
//
// - sum(1) counts the full window whether or not it hangs over the border: kh * kw for a mask of
//   one channel, kh * kw * C / groups for a mask of C channels, where sum(M) counts the channels of
//   the output's own group. Padding counts as missing.
// - Counts are integers. The ratio and all arithmetic are in float (double for double). No epsilon.
// - A value behind the mask is never read into arithmetic: NaN and infinity there do not leak.
// - The mask is not differentiable. With r the ratio (0 where invalid) and g the output's gradient,
//   the gradient of the plain convolution's result is g * r where valid and 0 elsewhere, and the
//   bias' gradient is the sum of g over valid pixels.
//
// The plain convolution itself is the library's. The kernels here are what is around it: masked
// copy before, ratio beside, rescaling after, and the rescaling's gradient.
#pragma once

#include <cstdint>

#include "common/scalar.h"

namespace glance {

struct PartialConvParams {
  ScalarType dtype = ScalarType::kFloat32;
  bool channels_last = false;  // layout of all feature tensors: NHWC instead of NCHW

  int64_t batch = 0;         // N
  int64_t in_channels = 0;   // C
  int64_t in_height = 0;     // H
  int64_t in_width = 0;      // W
  int64_t out_channels = 0;  // K
  int64_t out_height = 0;    // Ho
  int64_t out_width = 0;     // Wo
  int64_t kernel[2] = {1, 1};
  int64_t stride[2] = {1, 1};
  int64_t padding[2] = {0, 0};
  int64_t dilation[2] = {1, 1};
  int64_t groups = 1;
  int64_t mask_batch = 1;     // 1 or N
  int64_t mask_channels = 1;  // 1 or C

  const uint8_t* mask = nullptr;  // (mask_batch, mask_channels, H, W), contiguous, 0 or 1
  const void* input = nullptr;    // (N, C, H, W)
  void* masked_input = nullptr;   // (N, C, H, W); may be `input` itself
  void* ratio = nullptr;  // (mask_batch, ratio_groups(), Ho, Wo), accumulate type; 0 where invalid
  const void* bias = nullptr;  // (K), or null
  void* output = nullptr;      // (N, K, Ho, Wo); in: the plain convolution, out: the result

  GLANCE_HOST_DEVICE int64_t ratio_groups() const { return mask_channels == 1 ? 1 : groups; }
  GLANCE_HOST_DEVICE int64_t window_size() const {
    return kernel[0] * kernel[1] * (mask_channels == 1 ? 1 : in_channels / groups);
  }
};

struct PartialConvBackwardParams : PartialConvParams {
  const void* grad_output = nullptr;  // (N, K, Ho, Wo)
  void* grad_conv = nullptr;          // (N, K, Ho, Wo): grad_output * ratio where valid, else 0
};

// CPU kernels work on a range of rows, so that the caller owns the threads. A row is W contiguous
// elements of one channel (NCHW) or W * channels of one image row (NHWC).
int64_t input_rows(const PartialConvParams& params);
int64_t ratio_rows(const PartialConvParams& params);
int64_t output_rows(const PartialConvParams& params);

void mask_input_cpu(const PartialConvParams& params, int64_t begin, int64_t end);
void window_ratio_cpu(const PartialConvParams& params, int64_t begin, int64_t end);
void rescale_cpu(const PartialConvParams& params, int64_t begin, int64_t end);
void rescale_backward_cpu(const PartialConvBackwardParams& params, int64_t begin, int64_t end);

// CUDA launchers: asynchronous on `stream` (a cudaStream_t), returning a cudaError_t as an int.
int mask_input_cuda(const PartialConvParams& params, void* stream);
int window_ratio_cuda(const PartialConvParams& params, void* stream);
int rescale_cuda(const PartialConvParams& params, void* stream);
int rescale_backward_cuda(const PartialConvBackwardParams& params, void* stream);

}  // namespace glance
