// The two paths of partial_conv.h on checked tensors. Which one is taken is the caller's choice.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "partial_conv/partial_conv.h"

namespace glance {

// One call: sizes, and the tensors whose pointers the kernels get. Input, weight and result are
// dense in a layout of their own, contiguous or channels_last; the mask is bool, (1 or N, 1 or C,
// H, W), contiguous.
struct PartialConvCall {
  PartialConvBackwardParams params;
  at::Tensor input, mask, weight;
  std::optional<at::Tensor> bias;
  at::Tensor result;       // in the backward pass behind an activation, else not defined
  bool all_valid = false;  // nothing is masked, which a CPU finds out at once; false if not known
};

// Which path calls take: the one that is faster by the rule, or everywhere the one that a test or a
// benchmark asks for (the library's where there is no fused one).
enum class PartialConvPath : int { kRule, kFused, kLibrary };

// Sets it for all threads and returns what it was.
PartialConvPath exchange_partial_conv_path(PartialConvPath path);
bool takes_fused(const PartialConvCall& call, Sweep sweep);
bool takes_fused_weight(const PartialConvCall& call);  // for the gradients of weight and bias

// The output, and the valid windows as bool (1 or N, 1 or groups, Ho, Wo).
std::tuple<at::Tensor, at::Tensor> forward_fused(PartialConvCall& call);
std::tuple<at::Tensor, at::Tensor> forward_library(PartialConvCall& call);

// On CUDA the fused path of the gradients is that of the input's; those of weight and bias are the
// library's in both. Gradients of input, weight and bias, each empty where `wanted` says that
// nobody asks; `grad_output` is dense in the input's layout.
std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_fused(PartialConvCall& call,
                                                              const at::Tensor& grad_output,
                                                              std::array<bool, 3> wanted);
std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_library(PartialConvCall& call,
                                                                const at::Tensor& grad_output,
                                                                std::array<bool, 3> wanted);

}  // namespace glance
