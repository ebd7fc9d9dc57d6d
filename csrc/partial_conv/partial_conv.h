// Partial convolution: the contract that every kernel in this folder keeps.
//
// Equation (Liu et al., ECCV 2018; used by Global-Net in Wang et al., CVPR 2021, section 3.3).
// For every output pixel, with the window's input X, its validity M and the window's full size 1:
//
//   output = act((W * where(M, X, 0)) * sum(1) / sum(M) + bias)    if sum(M) > 0
//   output = 0                                                     otherwise
//   valid  = sum(M) > 0
//   act(x) = x if x > 0, else x * negative_slope (1: no activation, 0: ReLU)
//
// - sum(1) counts the full window whether or not it hangs over the border: kh * kw for a mask of
//   one channel, kh * kw * C / groups for a mask of C channels, where sum(M) counts the channels of
//   the output's own group. Padding counts as missing.
// - Counts are integers. The ratio and all arithmetic are in float (double for double). No epsilon.
// - A value behind the mask is never read into arithmetic: NaN and infinity there do not leak.
// - The mask is not differentiable. With r the ratio (0 where invalid) and g the output's gradient
//   behind the activation (its own times negative_slope where output <= 0), the gradient of the
//   plain convolution's result is g * r where valid and 0 elsewhere, and the bias' gradient is the
//   sum of g over valid pixels.
//
// Two paths do the same work. On the library's path the plain convolution is the library's, and the
// kernels here are what is around it: masked copy before, ratio beside, rescaling after, and the
// rescaling's gradient. On the fused path one kernel reads the input tile by tile into cache,
// masked on the way, multiplies, and writes the result with ratio, bias and activation applied, so
// that nothing of an image's size is held but input and output, and empty windows cost nothing.
#pragma once

#include <cstdint>

#include "common/parallel_for.h"
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
  double negative_slope = 1;  // not negative
  bool tf32 = false;  // CUDA may multiply float32 as TF32, which keeps 10 bits of the fraction

  const uint8_t* mask = nullptr;  // (mask_batch, mask_channels, H, W), contiguous, 0 or 1
  const void* input = nullptr;    // (N, C, H, W)
  void* masked_input = nullptr;   // (N, C, H, W); may be `input` itself
  void* ratio = nullptr;  // (mask_batch, ratio_groups(), Ho, Wo), accumulate type; 0 where invalid
  const void* weight = nullptr;  // (K, C / groups, kh, kw), of any strides
  int64_t weight_strides[4] = {0, 0, 0, 0};
  const void* bias = nullptr;   // (K), or null
  const void* plain = nullptr;  // (N, K, Ho, Wo): the plain convolution; may be `output` itself
  void* output = nullptr;       // (N, K, Ho, Wo)
  uint8_t* valid = nullptr;     // (mask_batch, ratio_groups(), Ho, Wo): 0 or 1; or null
  void* packed = nullptr;  // fused path: SweepSizes::packed_bytes, or on CUDA fused_cuda_bytes()

  GLANCE_HOST_DEVICE int64_t ratio_groups() const { return mask_channels == 1 ? 1 : groups; }
  GLANCE_HOST_DEVICE int64_t window_size() const {
    return kernel[0] * kernel[1] * (mask_channels == 1 ? 1 : in_channels / groups);
  }
};

struct PartialConvBackwardParams : PartialConvParams {
  const void* grad_output = nullptr;  // (N, K, Ho, Wo)
  const void* result = nullptr;       // (N, K, Ho, Wo): the output, or null without an activation
  void* grad_conv = nullptr;          // (N, K, Ho, Wo): library's path: of the plain convolution
  void* grad_input = nullptr;         // (N, C, H, W)
  void* grad_weight = nullptr;        // (K, C / groups, kh, kw), of the weight's strides; or null
  void* grad_bias = nullptr;          // (K), or null
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

// The valid pixels of the next mask alone, for a batch of no images; rows as of window_ratio_cpu.
void window_valid_cpu(const PartialConvParams& params, int64_t begin, int64_t end);

// The fused path: whether it is there for these arguments, and whether it is the faster one on this
// processor (docs/ops.md has the measurements that the rule comes from), for the gradients of
// weight and bias or for the rest.
bool has_fused(const PartialConvParams& params);
bool prefers_fused(const PartialConvParams& params, bool of_weight = false);

// The two products that slide a window over a map: the output, and the gradient of the input. They
// read weights in the order of their inner loop: pack those first, over `panels`, then compute,
// over `units`.
enum class Sweep : int { kForward, kGradInput };

struct SweepSizes {
  int64_t packed_bytes = 0;
  int64_t panels = 0;
  int64_t units = 0;
};

SweepSizes sweep_sizes(const PartialConvBackwardParams& params, Sweep sweep);
void pack_forward_cpu(const PartialConvBackwardParams& params, int64_t begin, int64_t end);
void fused_forward_cpu(const PartialConvBackwardParams& params, int64_t begin, int64_t end);
void pack_grad_input_cpu(const PartialConvBackwardParams& params, int64_t begin, int64_t end);
void fused_grad_input_cpu(const PartialConvBackwardParams& params, int64_t begin, int64_t end);

// The gradients of weight and bias: sums over all windows in an order of their own, whatever the
// threads.
void fused_grad_weight_cpu(const PartialConvBackwardParams& params, const ParallelFor& parallel);

// The fused path of depthwise layers (one channel a group, in and out), and of those with groups of
// 2 or 4 channels, has kernels of its own, which pack nothing: output and valid pixels, and all
// gradients that have a pointer.
bool has_depthwise(const PartialConvParams& params);
void depthwise_forward_cpu(const PartialConvBackwardParams& params, const ParallelFor& parallel);
void depthwise_backward_cpu(const PartialConvBackwardParams& params, const ParallelFor& parallel);

// CUDA launchers: asynchronous on `stream` (a cudaStream_t), returning a cudaError_t as an int.
int mask_input_cuda(const PartialConvParams& params, void* stream);
int window_ratio_cuda(const PartialConvParams& params, void* stream);
int rescale_cuda(const PartialConvParams& params, void* stream);
int rescale_backward_cuda(const PartialConvBackwardParams& params, void* stream);

// The fused path on CUDA, of channels_last tensors: the output with its valid pixels from `input`,
// or the gradient of the input from `grad_conv` (fused_tile.h). Bytes of workspace, aligned to 16;
// -1 where the device, the layout or the sizes are none that it serves. And whether it is expected
// to be faster than the library's path where it serves.
int64_t fused_cuda_bytes(const PartialConvBackwardParams& params, Sweep sweep);
bool prefers_fused_cuda(const PartialConvBackwardParams& params, Sweep sweep);
int fused_conv_cuda(const PartialConvBackwardParams& params, Sweep sweep, void* stream);

}  // namespace glance
