// Tensors -> WinogradConvParams -> kernels, for glance_ext::winograd_conv2d; where tiles do not pay
// or are not for this dtype or device, ATen's conv2d.
#include <ATen/ops/conv2d.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "common/tensor_check.h"
#include "common/workspace.h"
#include "winograd/winograd_conv.h"

namespace glance {
namespace {

constexpr const char* kOp = "winograd_conv2d";

void check(const at::Tensor& input, const at::Tensor& weight,
           const std::optional<at::Tensor>& bias) {
  scalar_type(kOp, "input", input);
  GLANCE_CHECK_VALUE(input.dim() == 4, kOp, "input of shape (N, C, H, W), got ", input.sizes());
  GLANCE_CHECK_VALUE(weight.dim() == 4 && weight.numel() > 0, kOp,
                     "weight of shape (K, C, kh, kw), got ", weight.sizes());
  check_like(kOp, "weight", weight, "input", input);
  GLANCE_CHECK_VALUE(weight.size(1) == input.size(1), kOp, "weight to have the input's ",
                     input.size(1), " channels, got ", weight.size(1));
  for (int axis = 2; axis < 4; ++axis) {
    GLANCE_CHECK_VALUE(input.size(axis) >= weight.size(axis), kOp,
                       "input of at least the kernel's ", weight.size(2), "x", weight.size(3),
                       " pixels, got ", input.size(2), "x", input.size(3));
  }
  if (bias.has_value()) {
    check_like(kOp, "bias", *bias, "input", input);
    GLANCE_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == weight.size(0), kOp, "bias of shape (",
                       weight.size(0), ",), got ", bias->sizes());
  }
}

// The sizes, and the steps of an input whose channels stand side by side.
WinogradConvParams sizes_of(const at::Tensor& input, const at::Tensor& weight) {
  WinogradConvParams p{};
  p.batch = input.size(0);
  p.channels = input.size(1);
  p.height = input.size(2);
  p.width = input.size(3);
  p.batch_step = input.stride(0);
  p.row_step = input.stride(2);
  p.column_step = input.stride(3);
  p.out_channels = weight.size(0);
  p.kernel = weight.size(2);
  p.instructions = best_instruction_set();
  return p;
}

bool in_tiles(const at::Tensor& input, const at::Tensor& weight) {
  const int64_t kernel = weight.size(2);
  return input.is_cpu() && input.numel() > 0 && input.scalar_type() == at::kFloat &&
         kernel == weight.size(3) && kernel >= 3 && kernel <= 6 &&
         winograd_pays(sizes_of(input, weight));
}

// What the output is like: a crop of a channels_last image, which is not contiguous, is so too.
at::MemoryFormat output_format(const at::Tensor& input) {
  const bool side_by_side = input.stride(1) == 1 && !input.is_contiguous();
  return side_by_side ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

at::Tensor winograd_conv2d(const at::Tensor& input, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias) {
  check(input, weight, bias);
  const auto format = output_format(input);
  if (!in_tiles(input, weight)) {
    // Of these very dtypes, whatever a caller's autocast makes of a convolution.
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    return at::conv2d(input, weight, bias).contiguous(format);
  }
  const bool side_by_side = input.stride(1) == 1 || input.size(1) == 1;
  const at::Tensor pixels = side_by_side ? input : input.contiguous(at::MemoryFormat::ChannelsLast);
  const bool rows_follow = weight.stride(2) == weight.size(3) * weight.stride(3);
  const at::Tensor taps = rows_follow ? weight : weight.contiguous();
  const at::Tensor offsets = bias.has_value() ? bias->contiguous() : at::Tensor();
  WinogradConvParams p = sizes_of(pixels, taps);
  const at::Tensor output =
      at::empty({p.batch, p.out_channels, p.out_height(), p.out_width()},
                input.options().memory_format(at::MemoryFormat::ChannelsLast));
  const Workspace<float> packed(winograd_packed_size(p.filter()));
  p.input = pixels.const_data_ptr<float>();
  p.weight = taps.const_data_ptr<float>();
  p.weight_steps[0] = taps.stride(0);
  p.weight_steps[1] = taps.stride(1);
  p.weight_steps[2] = taps.stride(3);
  p.bias = offsets.defined() ? offsets.const_data_ptr<float>() : nullptr;
  p.output = output.mutable_data_ptr<float>();
  p.packed = packed.data();
  const auto never = [](const WinogradConvParams&, void*) { return 0; };
  run_kernel(input, p, winograd_weight_rows(p.filter()), 1, pack_winograd_weight_cpu, never);
  run_kernel(input, p, winograd_blocks(p), 1, winograd_conv_cpu, never);
  return output.contiguous(format);
}

}  // namespace

TORCH_LIBRARY_IMPL(glance_ext, CPU, m) { m.impl("winograd_conv2d", &winograd_conv2d); }

#ifdef GLANCE_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(glance_ext, CUDA, m) { m.impl("winograd_conv2d", &winograd_conv2d); }
#endif

}  // namespace glance
