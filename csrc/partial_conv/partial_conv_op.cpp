// Tensors -> PartialConvParams -> kernels, for glance_ext::partial_conv2d and its backward.
#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "common/tensor_check.h"
#include "partial_conv/partial_conv_paths.h"

namespace glance {
namespace {

constexpr const char* kOp = "partial_conv2d";

// A mask in any accepted form as (1 or N, 1 or C, H, W) zeros and ones of one byte, contiguous.
at::Tensor unified_mask(const at::Tensor& mask, const at::Tensor& input) {
  const int64_t n = input.size(0), c = input.size(1), h = input.size(2), w = input.size(3);
  GLANCE_CHECK_TYPE(mask.scalar_type() == at::kBool || mask.scalar_type() == at::kByte ||
                        mask.scalar_type() == input.scalar_type(),
                    kOp, "mask to be bool, uint8 or the input's ", dtype_name(input), ", got ",
                    dtype_name(mask));
  GLANCE_CHECK_VALUE(mask.device() == input.device(), kOp, "mask on the input's device ",
                     input.device(), ", got ", mask.device());
  GLANCE_CHECK_VALUE(mask.dim() >= 2 && mask.dim() <= 4, kOp,
                     "mask to have 2, 3 or 4 dimensions, got ", mask.dim());
  GLANCE_CHECK_VALUE(mask.size(-2) == h && mask.size(-1) == w, kOp, "mask to be ", h, "x", w,
                     " like the input, got ", mask.size(-2), "x", mask.size(-1));
  const int64_t mask_batch = mask.dim() > 2 ? mask.size(0) : 1;
  const int64_t mask_channels = mask.dim() > 3 ? mask.size(1) : 1;
  GLANCE_CHECK_VALUE(mask_batch == 1 || mask_batch == n, kOp, "mask to have a batch of 1 or ", n,
                     ", got ", mask_batch);
  GLANCE_CHECK_VALUE(mask_channels == 1 || mask_channels == c, kOp, "mask to have 1 or ", c,
                     " channels, got ", mask_channels);
  const at::Tensor valid = mask.scalar_type() == at::kBool ? mask : mask.ne(0);
  return valid.reshape({mask_batch, mask_channels, h, w}).contiguous();
}

// Checks all arguments and fills in all sizes; pointers stay null.
PartialConvParams checked_params(const at::Tensor& input, const at::Tensor& weight,
                                 const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                                 at::IntArrayRef padding, at::IntArrayRef dilation,
                                 int64_t groups) {
  PartialConvParams p;
  p.dtype = scalar_type(kOp, "input", input);
  GLANCE_CHECK_VALUE(input.dim() == 4, kOp, "input of shape (N, C, H, W), got ", input.sizes());
  GLANCE_CHECK_VALUE(input.size(2) > 0 && input.size(3) > 0, kOp,
                     "input to have at least one pixel, got ", input.size(2), "x", input.size(3));
  GLANCE_CHECK_VALUE(weight.dim() == 4, kOp, "weight of shape (K, C / groups, kh, kw), got ",
                     weight.sizes());
  check_like(kOp, "weight", weight, "input", input);
  GLANCE_CHECK_VALUE(groups > 0 && input.size(1) % groups == 0 && weight.size(0) % groups == 0, kOp,
                     "groups to divide the input's ", input.size(1), " channels and the output's ",
                     weight.size(0), ", got ", groups);
  GLANCE_CHECK_VALUE(weight.size(1) == input.size(1) / groups, kOp, "weight to have ",
                     input.size(1) / groups, " input channels (C / groups), got ", weight.size(1));
  GLANCE_CHECK_VALUE(
      weight.size(0) > 0 && weight.size(1) > 0 && weight.size(2) > 0 && weight.size(3) > 0, kOp,
      "weight of a positive size, got ", weight.sizes());
  if (bias.has_value()) {
    GLANCE_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == weight.size(0), kOp, "bias of shape (",
                       weight.size(0), ",), got ", bias->sizes());
    check_like(kOp, "bias", *bias, "input", input);
  }
  p.channels_last = memory_format(input) == at::MemoryFormat::ChannelsLast;
  p.batch = input.size(0);
  p.in_channels = input.size(1);
  p.in_height = input.size(2);
  p.in_width = input.size(3);
  p.out_channels = weight.size(0);
  p.groups = groups;
  int64_t out[2];
  for (int axis = 0; axis < 2; ++axis) {
    p.kernel[axis] = weight.size(2 + axis);
    p.stride[axis] = pair(kOp, "stride", stride)[axis];
    p.padding[axis] = pair(kOp, "padding", padding)[axis];
    p.dilation[axis] = pair(kOp, "dilation", dilation)[axis];
    GLANCE_CHECK_VALUE(p.stride[axis] > 0, kOp, "stride to be positive, got ", p.stride[axis]);
    GLANCE_CHECK_VALUE(p.padding[axis] >= 0, kOp, "padding not to be negative, got ",
                       p.padding[axis]);
    GLANCE_CHECK_VALUE(p.dilation[axis] > 0, kOp, "dilation to be positive, got ",
                       p.dilation[axis]);
    const int64_t reach = p.dilation[axis] * (p.kernel[axis] - 1) + 1;
    const int64_t padded = input.size(2 + axis) + 2 * p.padding[axis];
    GLANCE_CHECK_VALUE(padded >= reach, kOp, "the padded input to be at least the window's ", reach,
                       " pixels along ", axis == 0 ? "its height" : "its width", ", got ", padded);
    out[axis] = (padded - reach) / p.stride[axis] + 1;
  }
  p.out_height = out[0];
  p.out_width = out[1];
  return p;
}

// Checks everything but what only one of the directions has.
PartialConvCall checked_call(const at::Tensor& input, const at::Tensor& mask,
                             const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                             at::IntArrayRef stride, at::IntArrayRef padding,
                             at::IntArrayRef dilation, int64_t groups, double negative_slope) {
  PartialConvCall call;
  PartialConvBackwardParams& p = call.params;
  static_cast<PartialConvParams&>(p) =
      checked_params(input, weight, bias, stride, padding, dilation, groups);
  GLANCE_CHECK_VALUE(negative_slope >= 0, kOp, "negative_slope not to be negative, got ",
                     negative_slope);
  p.negative_slope = negative_slope;
  p.tf32 = at::globalContext().allowTF32CuDNN(at::Float32Op::CONV);  // as for torch's own
  call.mask = unified_mask(mask, input);
  p.mask_batch = call.mask.size(0);
  p.mask_channels = call.mask.size(1);
  p.mask = static_cast<const uint8_t*>(call.mask.const_data_ptr());
  call.all_valid = call.mask.is_cpu() && std::memchr(p.mask, 0, call.mask.numel()) == nullptr;
  call.input = input.contiguous(memory_format(input));
  call.weight = weight.contiguous(memory_format(weight));
  p.weight = call.weight.const_data_ptr();
  std::copy_n(call.weight.strides().begin(), 4, p.weight_strides);
  if (bias.has_value()) {
    call.bias = bias->contiguous();
    p.bias = call.bias->const_data_ptr();
  }
  return call;
}

// The next layer's mask: one channel, or one for every output channel.
at::Tensor next_mask(const PartialConvParams& p, at::Tensor valid, at::ScalarType dtype) {
  if (p.mask_channels != 1) valid = valid.repeat_interleave(p.out_channels / p.groups, 1);
  return valid.to(dtype);
}

std::tuple<at::Tensor, at::Tensor> partial_conv2d(const at::Tensor& input, const at::Tensor& mask,
                                                  const at::Tensor& weight,
                                                  const std::optional<at::Tensor>& bias,
                                                  at::IntArrayRef stride, at::IntArrayRef padding,
                                                  at::IntArrayRef dilation, int64_t groups,
                                                  double negative_slope) {
  const DeviceGuard guard(input);
  PartialConvCall call =
      checked_call(input, mask, weight, bias, stride, padding, dilation, groups, negative_slope);
  auto [output, valid] =
      takes_fused(call, Sweep::kForward) ? forward_fused(call) : forward_library(call);
  return {output, next_mask(call.params, valid, mask.scalar_type())};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> partial_conv2d_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mask,
    const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, std::array<bool, 3> output_mask,
    const std::optional<at::Tensor>& output, double negative_slope) {
  constexpr const char* kBackward = "partial_conv2d_backward";
  const DeviceGuard guard(input);
  PartialConvCall call = checked_call(input, mask, weight, std::nullopt, stride, padding, dilation,
                                      groups, negative_slope);
  const PartialConvParams& p = call.params;
  const std::array<int64_t, 4> expected{p.batch, p.out_channels, p.out_height, p.out_width};
  const auto like_output = [&](const char* name, const at::Tensor& tensor) {
    GLANCE_CHECK_VALUE(tensor.sizes() == at::IntArrayRef(expected), kBackward, name, " of shape ",
                       at::IntArrayRef(expected), ", got ", tensor.sizes());
    GLANCE_CHECK_TYPE(tensor.scalar_type() == input.scalar_type(), kBackward, name,
                      " of the input's ", dtype_name(input), ", got ", dtype_name(tensor));
    return tensor.contiguous(memory_format(input));
  };
  const at::Tensor grad = like_output("grad_output", grad_output);
  GLANCE_CHECK_VALUE(output.has_value() || negative_slope == 1, kBackward,
                     "the output for a negative_slope of ", negative_slope, ", got none");
  if (negative_slope != 1) call.result = like_output("output", *output);
  const auto gradients = [&](bool fused, std::array<bool, 3> wanted) {
    return fused ? backward_fused(call, grad, wanted) : backward_library(call, grad, wanted);
  };
  const bool of_input = takes_fused(call, Sweep::kGradInput);
  const bool of_weight = takes_fused_weight(call);
  if (of_input == of_weight) return gradients(of_input, output_mask);
  at::Tensor grad_input = std::get<0>(gradients(of_input, {output_mask[0], false, false}));
  auto [unused, grad_weight, grad_bias] =
      gradients(of_weight, {false, output_mask[1], output_mask[2]});
  return {grad_input, grad_weight, grad_bias};
}

// Autocast: feature tensors in the low precision, as conv2d; the mask keeps its dtype outside.
std::tuple<at::Tensor, at::Tensor> partial_conv2d_autocast(
    c10::DeviceType device, const at::Tensor& input, const at::Tensor& mask,
    const at::Tensor& weight, const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, double negative_slope) {
  const auto key = device == c10::DeviceType::CUDA ? c10::DispatchKey::AutocastCUDA
                                                   : c10::DispatchKey::AutocastCPU;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  const auto lower = [&](const at::Tensor& t) {
    return at::autocast::cached_cast(dtype, t, device);
  };
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("glance_ext::partial_conv2d", "")
                             .typed<std::tuple<at::Tensor, at::Tensor>(
                                 const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                 const std::optional<at::Tensor>&, at::IntArrayRef, at::IntArrayRef,
                                 at::IntArrayRef, int64_t, double)>();
  // Not cast to the low precision, where what is small but not zero might round to zero.
  const at::Tensor valid = mask.is_floating_point() ? mask.ne(0) : mask;
  auto [output, mask_out] =
      op.call(lower(input), valid, lower(weight),
              bias.has_value() ? std::optional<at::Tensor>(lower(*bias)) : std::nullopt, stride,
              padding, dilation, groups, negative_slope);
  return {output, mask_out.to(mask.scalar_type())};
}

template <c10::DeviceType kDevice>
std::tuple<at::Tensor, at::Tensor> autocast_for(const at::Tensor& input, const at::Tensor& mask,
                                                const at::Tensor& weight,
                                                const std::optional<at::Tensor>& bias,
                                                at::IntArrayRef stride, at::IntArrayRef padding,
                                                at::IntArrayRef dilation, int64_t groups,
                                                double negative_slope) {
  return partial_conv2d_autocast(kDevice, input, mask, weight, bias, stride, padding, dilation,
                                 groups, negative_slope);
}

}  // namespace

TORCH_LIBRARY_IMPL(glance_ext, CPU, m) {
  m.impl("partial_conv2d", &partial_conv2d);
  m.impl("partial_conv2d_backward", &partial_conv2d_backward);
}

#ifdef GLANCE_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(glance_ext, CUDA, m) {
  m.impl("partial_conv2d", &partial_conv2d);
  m.impl("partial_conv2d_backward", &partial_conv2d_backward);
}
#endif

TORCH_LIBRARY_IMPL(glance_ext, AutocastCPU, m) {
  m.impl("partial_conv2d", &autocast_for<c10::DeviceType::CPU>);
}
TORCH_LIBRARY_IMPL(glance_ext, AutocastCUDA, m) {
  m.impl("partial_conv2d", &autocast_for<c10::DeviceType::CUDA>);
}

}  // namespace glance
