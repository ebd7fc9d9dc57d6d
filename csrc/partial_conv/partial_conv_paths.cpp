#include "partial_conv/partial_conv_paths.h"

#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <atomic>

#include "common/tensor_check.h"

namespace glance {
namespace {

std::atomic<PartialConvPath> path_asked_for{PartialConvPath::kRule};

// Masked copies and convolutions before their rescaling are held for a few images at a time on a
// CPU: about a cache of them, instead of a whole batch.
constexpr int64_t kPartBytes = 4 * 1024 * 1024;

int64_t images_at_a_time(const PartialConvCall& call) {
  const PartialConvParams& p = call.params;
  if (!call.input.is_cpu()) return std::max<int64_t>(p.batch, 1);
  const int64_t in = p.in_channels * p.in_height * p.in_width;
  const int64_t out = p.out_channels * p.out_height * p.out_width;
  const int64_t bytes = std::max<int64_t>((in + out) * call.input.element_size(), 1);
  return std::clamp<int64_t>(kPartBytes / bytes, 1, std::max<int64_t>(p.batch, 1));
}

// Zeroes the gradient of taps that see nothing but padding. oneDNN leaves memory as it found it
// there in bfloat16 and channels_last (torch 2.14).
void clear_unseen_taps(const PartialConvParams& p, const at::Tensor& grad_weight) {
  const int64_t sizes[2] = {p.in_height, p.in_width}, outputs[2] = {p.out_height, p.out_width};
  for (int axis = 0; axis < 2; ++axis) {
    for (int64_t tap = 0; tap < p.kernel[axis]; ++tap) {
      bool seen = false;
      for (int64_t out = 0; out < outputs[axis] && !seen; ++out) {
        const int64_t at = out * p.stride[axis] - p.padding[axis] + tap * p.dilation[axis];
        seen = at >= 0 && at < sizes[axis];
      }
      if (!seen) grad_weight.select(2 + axis, tap).zero_();
    }
  }
}

// The call on images [first, first + count) of its batch.
PartialConvCall part_of(const PartialConvCall& call, int64_t first, int64_t count) {
  PartialConvCall part = call;
  part.input = call.input.narrow(0, first, count);
  if (call.mask.size(0) != 1) part.mask = call.mask.narrow(0, first, count);
  if (call.result.defined()) part.result = call.result.narrow(0, first, count);
  part.params.batch = count;
  part.params.mask_batch = part.mask.size(0);
  part.params.mask = static_cast<const uint8_t*>(part.mask.const_data_ptr());
  return part;
}

template <typename Body>
void for_parts(const PartialConvCall& call, int64_t step, Body&& body) {
  int64_t first = 0;
  do {  // once for an empty batch too
    const int64_t count = std::min(step, call.params.batch - first);
    body(part_of(call, first, count), first, count);
    first += count;
  } while (first < call.params.batch);
}

at::Tensor window_ratio(PartialConvCall& call) {
  PartialConvParams& p = call.params;
  const at::Tensor ratio = at::empty({p.mask_batch, p.ratio_groups(), p.out_height, p.out_width},
                                     call.input.options().dtype(accumulate_dtype(p.dtype)));
  p.ratio = ratio.mutable_data_ptr();
  run_kernel(call.input, p, ratio_rows(p), grain_size(p.out_width * p.window_size()),
             window_ratio_cpu, GLANCE_CUDA(window_ratio_cuda));
  return ratio;
}

// where(mask, input, 0) into `target`, which may be the input itself.
void mask_into(PartialConvParams p, const at::Tensor& input, const at::Tensor& target) {
  p.input = input.const_data_ptr();
  p.masked_input = target.mutable_data_ptr();
  run_kernel(input, p, input_rows(p), grain_size(p.in_width), mask_input_cpu,
             GLANCE_CUDA(mask_input_cuda));
}

// The input itself where nothing is masked.
at::Tensor masked_input(const PartialConvCall& call) {
  if (call.all_valid) return call.input;
  at::Tensor masked = at::empty_like(call.input, at::MemoryFormat::Preserve);
  mask_into(call.params, call.input, masked);
  return masked;
}

// Whether the ratio is 1 everywhere: this is the plain convolution.
bool every_window_is_whole(const PartialConvCall& call) {
  return call.all_valid && call.params.padding[0] == 0 && call.params.padding[1] == 0;
}

at::Tensor convolution(const PartialConvCall& call, const at::Tensor& input,
                       const std::optional<at::Tensor>& bias) {
  const PartialConvParams& p = call.params;
  return at::convolution(input, call.weight, bias, p.stride, p.padding, p.dilation,
                         /*transposed=*/false, {0, 0}, p.groups);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(const PartialConvCall& call,
                                                                    const at::Tensor& grad,
                                                                    const at::Tensor& input,
                                                                    std::array<bool, 3> wanted) {
  const PartialConvParams& p = call.params;
  return at::convolution_backward(grad, input, call.weight, at::IntArrayRef(p.out_channels),
                                  p.stride, p.padding, p.dilation, /*transposed=*/false, {0, 0},
                                  p.groups, wanted);
}

// The gradient of what the activation was given.
at::Tensor behind_activation(const PartialConvCall& call, const at::Tensor& grad) {
  if (!call.result.defined()) return grad;
  const double slope = call.params.negative_slope;
  const at::Tensor below = slope == 0 ? at::zeros({}, grad.options()) : grad.mul(slope);
  return at::where(call.result.gt(0), grad, below).contiguous(memory_format(call.input));
}

at::Tensor pack_weights(PartialConvCall& call, const SweepSizes& sizes,
                        void (*pack)(const PartialConvBackwardParams&, int64_t, int64_t)) {
  PartialConvBackwardParams& p = call.params;
  at::Tensor packed = at::empty({sizes.packed_bytes}, call.input.options().dtype(at::kByte));
  p.packed = packed.mutable_data_ptr();
  at::parallel_for(0, sizes.panels, 1, [&](int64_t begin, int64_t end) { pack(p, begin, end); });
  return packed;
}

// -1 where the fused path of CUDA does not serve the call.
int64_t cuda_bytes(const PartialConvBackwardParams& p, Sweep sweep) {
#ifdef GLANCE_EXT_WITH_CUDA
  return fused_cuda_bytes(p, sweep);
#else
  (void)p, (void)sweep;
  return -1;
#endif
}

void run_fused_cuda(const at::Tensor& on, PartialConvBackwardParams p, Sweep sweep) {
  const at::Tensor workspace = at::empty({cuda_bytes(p, sweep)}, on.options().dtype(at::kByte));
  p.packed = workspace.mutable_data_ptr();
#ifdef GLANCE_EXT_WITH_CUDA
  void* stream = c10::cuda::getCurrentCUDAStream(on.get_device()).stream();
  C10_CUDA_CHECK(static_cast<cudaError_t>(fused_conv_cuda(p, sweep, stream)));
#endif
}

at::Tensor empty_channels_last(const at::Tensor& like, at::IntArrayRef sizes) {
  return at::empty(sizes, like.options(), at::MemoryFormat::ChannelsLast);
}

std::tuple<at::Tensor, at::Tensor> forward_fused_cuda(const PartialConvCall& call) {
  PartialConvBackwardParams p = call.params;
  const at::Tensor input = call.input.contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor output =
      empty_channels_last(input, {p.batch, p.out_channels, p.out_height, p.out_width});
  at::Tensor valid = at::empty({p.mask_batch, 1, p.out_height, p.out_width}, call.mask.options());
  p.channels_last = true;
  p.input = input.const_data_ptr();
  p.output = output.mutable_data_ptr();
  p.valid = static_cast<uint8_t*>(valid.mutable_data_ptr());
  run_fused_cuda(input, p, Sweep::kForward);
  return {output.contiguous(memory_format(call.input)), valid};
}

// From the gradient of the plain convolution; 0 behind the mask.
at::Tensor grad_input_fused_cuda(const PartialConvCall& call, const at::Tensor& grad_conv) {
  PartialConvBackwardParams p = call.params;
  at::Tensor grad = grad_conv.contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor grad_input = empty_channels_last(call.input, call.input.sizes());
  p.channels_last = true;
  p.grad_conv = grad.mutable_data_ptr();
  p.grad_input = grad_input.mutable_data_ptr();
  run_fused_cuda(grad, p, Sweep::kGradInput);
  return grad_input.contiguous(memory_format(call.input));
}

}  // namespace

PartialConvPath exchange_partial_conv_path(PartialConvPath path) {
  return path_asked_for.exchange(path);
}

bool takes_fused(const PartialConvCall& call, Sweep sweep) {
  if (path_asked_for == PartialConvPath::kLibrary) return false;
  const bool asked = path_asked_for == PartialConvPath::kFused;
  if (call.input.is_cpu()) return asked ? has_fused(call.params) : prefers_fused(call.params);
  if (!asked && !prefers_fused_cuda(call.params, sweep)) return false;
  PartialConvBackwardParams p = call.params;
  p.channels_last = true;  // the kernel's; contiguous tensors are transposed for it
  return cuda_bytes(p, sweep) >= 0;
}

bool takes_fused_weight(const PartialConvCall& call) {
  if (!call.input.is_cpu() || path_asked_for != PartialConvPath::kRule) {
    return takes_fused(call, Sweep::kGradInput);
  }
  return prefers_fused(call.params, /*of_weight=*/true);
}

std::tuple<at::Tensor, at::Tensor> forward_fused(PartialConvCall& call) {
  if (!call.input.is_cpu()) return forward_fused_cuda(call);
  PartialConvBackwardParams& p = call.params;
  at::Tensor output = at::empty({p.batch, p.out_channels, p.out_height, p.out_width},
                                call.input.options(), memory_format(call.input));
  at::Tensor valid =
      at::empty({p.mask_batch, p.ratio_groups(), p.out_height, p.out_width}, call.mask.options());
  p.input = call.input.const_data_ptr();
  p.output = output.mutable_data_ptr();
  p.valid = static_cast<uint8_t*>(valid.mutable_data_ptr());
  if (p.batch == 0) {
    window_valid_cpu(p, 0, ratio_rows(p));
    return {output, valid};
  }
  if (has_depthwise(p)) {
    depthwise_forward_cpu(p, parallel_units);
    return {output, valid};
  }
  const SweepSizes sizes = sweep_sizes(p, Sweep::kForward);
  const at::Tensor packed = pack_weights(call, sizes, pack_forward_cpu);
  at::parallel_for(0, sizes.units, 1,
                   [&](int64_t begin, int64_t end) { fused_forward_cpu(p, begin, end); });
  return {output, valid};
}

std::tuple<at::Tensor, at::Tensor> forward_library(PartialConvCall& call) {
  PartialConvBackwardParams& all = call.params;
  const at::MemoryFormat format = memory_format(call.input);
  if (every_window_is_whole(call)) {
    at::Tensor output = convolution(call, call.input, call.bias).contiguous(format);
    if (all.negative_slope == 0) output.relu_();
    if (all.negative_slope != 0 && all.negative_slope != 1) {
      at::leaky_relu_(output, all.negative_slope);
    }
    return {output, at::ones({all.mask_batch, all.ratio_groups(), all.out_height, all.out_width},
                             call.mask.options())};
  }
  const at::Tensor ratio = window_ratio(call);
  at::Tensor output;
  // Without a masked copy there is nothing to hold but the output.
  const int64_t step = call.all_valid ? std::max<int64_t>(all.batch, 1) : images_at_a_time(call);
  for_parts(call, step, [&](PartialConvCall part, int64_t first, int64_t count) {
    PartialConvParams& p = part.params;
    const bool whole = count == all.batch;
    at::Tensor plain = convolution(part, masked_input(part), std::nullopt).contiguous(format);
    if (!output.defined()) {
      output = whole ? plain
                     : at::empty({all.batch, p.out_channels, p.out_height, p.out_width},
                                 call.input.options(), format);
    }
    const at::Tensor of_ratio = all.mask_batch == 1 ? ratio : ratio.narrow(0, first, count);
    const at::Tensor target = output.narrow(0, first, count);
    p.ratio = of_ratio.mutable_data_ptr();
    p.plain = plain.const_data_ptr();
    p.output = target.mutable_data_ptr();
    const int64_t row = p.out_width * (p.channels_last ? p.out_channels : 1);
    run_kernel(call.input, p, output_rows(p), grain_size(row), rescale_cpu,
               GLANCE_CUDA(rescale_cuda));
  });
  return {output, ratio.ne(0)};
}

namespace {

// By the library, but for the input's gradient where `fused_input` (on CUDA).
std::tuple<at::Tensor, at::Tensor, at::Tensor> gradients(PartialConvCall& call,
                                                         const at::Tensor& grad_output,
                                                         std::array<bool, 3> wanted,
                                                         bool fused_input) {
  const at::Tensor ratio = window_ratio(call);
  const PartialConvBackwardParams& all = call.params;
  at::Tensor grad_input = at::empty({0}, call.input.options());
  at::Tensor grad_weight = at::empty({0}, call.weight.options());
  at::Tensor grad_bias = at::empty({0}, call.input.options());
  at::Tensor weight_sum, bias_sum;  // over the parts, in the accumulate type
  const auto add = [&](at::Tensor& sum, const at::Tensor& part) {
    const at::Tensor wide = part.to(accumulate_dtype(all.dtype));
    sum = sum.defined() ? sum.add_(wide) : wide;
  };
  if (wanted[0] && !fused_input) {
    grad_input = at::empty_like(call.input, at::MemoryFormat::Preserve);
  }
  for_parts(call, images_at_a_time(call), [&](PartialConvCall part, int64_t first, int64_t count) {
    PartialConvBackwardParams& p = part.params;
    const at::Tensor of_ratio = all.mask_batch == 1 ? ratio : ratio.narrow(0, first, count);
    const at::Tensor grad = behind_activation(part, grad_output.narrow(0, first, count));
    if (wanted[2]) {
      at::Tensor valid = of_ratio.ne(0);
      if (p.ratio_groups() != 1) valid = valid.repeat_interleave(p.out_channels / p.groups, 1);
      add(bias_sum, at::where(valid, grad, at::zeros({}, grad.options())).sum({0, 2, 3}));
    }
    if (!wanted[0] && !wanted[1]) return;
    at::Tensor grad_conv = at::empty_like(grad, at::MemoryFormat::Preserve);
    p.ratio = of_ratio.mutable_data_ptr();
    p.grad_output = grad.const_data_ptr();
    p.grad_conv = grad_conv.mutable_data_ptr();
    const int64_t row = p.out_width * (p.channels_last ? p.out_channels : 1);
    run_kernel(call.input, p, output_rows(p), grain_size(row), rescale_backward_cpu,
               GLANCE_CUDA(rescale_backward_cuda));
    if (wanted[0] && fused_input) grad_input = grad_input_fused_cuda(part, grad_conv);
    const bool of_library = wanted[0] && !fused_input;
    if (!of_library && !wanted[1]) return;
    auto [of_input, of_weight, unused] =
        convolution_backward(part, grad_conv, wanted[1] ? masked_input(part) : part.input,
                             {of_library, wanted[1], false});
    if (of_library) {
      mask_into(p, of_input.contiguous(memory_format(call.input)),
                grad_input.narrow(0, first, count));
    }
    if (wanted[1]) add(weight_sum, of_weight);
  });
  if (wanted[1]) {
    grad_weight = weight_sum.to(call.weight.scalar_type()).contiguous(memory_format(call.weight));
    clear_unseen_taps(call.params, grad_weight);
  }
  if (wanted[2]) grad_bias = bias_sum.to(call.input.scalar_type());
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_fused(PartialConvCall& call,
                                                              const at::Tensor& grad_output,
                                                              std::array<bool, 3> wanted) {
  if (!call.input.is_cpu()) return gradients(call, grad_output, wanted, /*fused_input=*/true);
  PartialConvBackwardParams& p = call.params;
  at::Tensor grads[3];
  grads[0] = wanted[0] ? at::empty_like(call.input, at::MemoryFormat::Preserve)
                       : at::empty({0}, call.input.options());
  grads[1] = wanted[1] ? at::empty_like(call.weight, at::MemoryFormat::Preserve)
                       : at::empty({0}, call.weight.options());
  grads[2] = at::empty({wanted[2] ? p.out_channels : 0}, call.input.options());
  p.input = call.input.const_data_ptr();
  p.grad_output = grad_output.const_data_ptr();
  p.result = call.result.defined() ? call.result.const_data_ptr() : nullptr;
  p.grad_input = wanted[0] ? grads[0].mutable_data_ptr() : nullptr;
  p.grad_weight = wanted[1] ? grads[1].mutable_data_ptr() : nullptr;
  p.grad_bias = wanted[2] ? grads[2].mutable_data_ptr() : nullptr;
  if (has_depthwise(p)) {
    depthwise_backward_cpu(p, parallel_units);
    return {grads[0], grads[1], grads[2]};
  }
  if (wanted[0] && p.batch > 0) {
    const SweepSizes sizes = sweep_sizes(p, Sweep::kGradInput);
    const at::Tensor packed = pack_weights(call, sizes, pack_grad_input_cpu);
    at::parallel_for(0, sizes.units, 1,
                     [&](int64_t begin, int64_t end) { fused_grad_input_cpu(p, begin, end); });
  }
  if (wanted[1] || wanted[2]) fused_grad_weight_cpu(p, parallel_units);
  return {grads[0], grads[1], grads[2]};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_library(PartialConvCall& call,
                                                                const at::Tensor& grad_output,
                                                                std::array<bool, 3> wanted) {
  if (every_window_is_whole(call)) {
    auto [of_input, of_weight, of_bias] =
        convolution_backward(call, behind_activation(call, grad_output), call.input, wanted);
    const auto dense = [](const at::Tensor& grad, const at::Tensor& like) {
      return grad.defined() ? grad.contiguous(memory_format(like)) : at::empty({0}, like.options());
    };
    return {dense(of_input, call.input), dense(of_weight, call.weight),
            of_bias.defined() ? of_bias : at::empty({0}, call.input.options())};
  }
  return gradients(call, grad_output, wanted, /*fused_input=*/false);
}

}  // namespace glance
