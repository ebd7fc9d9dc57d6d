// Tensors -> HoleConvParams -> kernels, for glance_ext::hole_conv2d; its backward composes ATen's.
#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <limits>

#include "hole_windows/hole_ops.h"

namespace glance {

HoleConvParams checked_conv(const at::Tensor& base, const std::optional<at::Tensor>& windows,
                            const at::Tensor& extents, const at::Tensor& cells,
                            const at::Tensor& ratio, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                            at::IntArrayRef padding, at::IntArrayRef dilation,
                            double negative_slope) {
  HoleConvParams p;
  static_cast<HoleWindowsParams&>(p) = checked_windows(kHoleConv, base, windows, extents);
  GLANCE_CHECK_VALUE(weight.dim() == 4 && weight.numel() > 0, kHoleConv,
                     "weight of shape (K, C, kh, kw), got ", weight.sizes());
  GLANCE_CHECK_VALUE(weight.size(1) == p.channels, kHoleConv, "weight to have the base's ",
                     p.channels, " channels, got ", weight.size(1));
  check_like(kHoleConv, "weight", weight, "base", base);
  p.out_channels = weight.size(0);
  if (bias.has_value()) {
    check_like(kHoleConv, "bias", *bias, "base", base);
    GLANCE_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == p.out_channels, kHoleConv,
                       "bias of shape (", p.out_channels, ",), got ", bias->sizes());
  }
  GLANCE_CHECK_TYPE(ratio.scalar_type() == accumulate_dtype(p.dtype), kHoleConv, "ratio to be ",
                    p.dtype == ScalarType::kFloat64 ? "float64" : "float32", ", got ",
                    dtype_name(ratio));
  GLANCE_CHECK_VALUE(ratio.device() == base.device(), kHoleConv, "ratio on the base's device ",
                     base.device(), ", got ", ratio.device());
  GLANCE_CHECK_VALUE(
      ratio.dim() == extents.dim() + 1 &&
          ratio.sizes().slice(0, extents.dim() - 1) == extents.sizes().slice(0, extents.dim() - 1),
      kHoleConv, "ratio of one window for each of the extents ", extents.sizes(), ", got ",
      ratio.sizes());
  check_index(kHoleConv, "cells", cells, base);
  GLANCE_CHECK_VALUE(cells.dim() == 1, kHoleConv, "cells of shape (M,), got ", cells.sizes());
  p.out_height = ratio.size(-2);
  p.out_width = ratio.size(-1);
  p.cell_count = cells.size(0);
  GLANCE_CHECK_VALUE(ratio.numel() <= std::numeric_limits<int32_t>::max(), kHoleConv,
                     "at most 2147483647 cells of windows, got ", ratio.numel());
  for (int axis = 0; axis < 2; ++axis) {
    p.kernel[axis] = weight.size(2 + axis);
    p.stride[axis] = pair(kHoleConv, "stride", stride)[axis];
    p.padding[axis] = pair(kHoleConv, "padding", padding)[axis];
    p.dilation[axis] = pair(kHoleConv, "dilation", dilation)[axis];
    GLANCE_CHECK_VALUE(p.stride[axis] > 0, kHoleConv, "stride to be positive, got ",
                       p.stride[axis]);
    GLANCE_CHECK_VALUE(p.padding[axis] >= 0, kHoleConv, "padding not to be negative, got ",
                       p.padding[axis]);
    GLANCE_CHECK_VALUE(p.dilation[axis] > 0, kHoleConv, "dilation to be positive, got ",
                       p.dilation[axis]);
  }
  GLANCE_CHECK_VALUE(negative_slope >= 0, kHoleConv, "negative_slope not to be negative, got ",
                     negative_slope);
  p.negative_slope = negative_slope;
  p.tf32 = at::globalContext().allowTF32CuDNN(at::Float32Op::CONV);  // as for torch's own
  return p;
}

void check_cells(const HoleConvParams& p) {
  const int64_t count = p.geometry_rows * p.out_height * p.out_width;
  int64_t previous = -1;
  for (int64_t i = 0; i < p.cell_count; ++i) {
    GLANCE_CHECK_VALUE(p.cells[i] > previous && p.cells[i] < count, kHoleConv,
                       "cells ascending and below ", count, ", got ", p.cells[i], " after ",
                       previous);
    previous = p.cells[i];
  }
}

namespace {

int64_t workspace_bytes(const HoleConvParams& p, bool on_cpu) {
#ifdef GLANCE_EXT_WITH_CUDA
  if (!on_cpu) return hole_conv_workspace_bytes(p);
#endif
  TORCH_INTERNAL_ASSERT(on_cpu);
  return packed_weight_bytes(p);
}

}  // namespace

at::Tensor hole_conv2d(const at::Tensor& base, const std::optional<at::Tensor>& windows,
                       const at::Tensor& extents, const at::Tensor& origins,
                       const at::Tensor& cells, const at::Tensor& ratio, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                       at::IntArrayRef padding, at::IntArrayRef dilation, double negative_slope) {
  HoleConvParams p = checked_conv(base, windows, extents, cells, ratio, weight, bias, stride,
                                  padding, dilation, negative_slope);
  const DeviceGuard guard(base);
  const int64_t missing = base.is_cpu() && !windows.has_value() ? channel_padding(p) : 0;
  if (missing > 0) {  // once here, instead of each pixel for each hole
    const auto padded = [&](const at::Tensor& tensor) {
      return at::constant_pad_nd(tensor, {0, 0, 0, 0, 0, missing});
    };
    return hole_conv2d(padded(base), windows, extents, origins, cells, ratio, padded(weight), bias,
                       stride, padding, dilation, negative_slope);
  }
  const Workspace work = bind_inputs(kHoleConv, p, base, windows, extents, origins, p.origins);
  const at::Tensor of_cells = cells.contiguous(), of_ratio = ratio.contiguous();
  const at::Tensor of_weight = weight.contiguous();
  const at::Tensor of_bias = bias.has_value() ? bias->contiguous() : at::Tensor();
  p.cells = of_cells.const_data_ptr<int32_t>();
  p.ratio = of_ratio.const_data_ptr();
  p.weight = of_weight.const_data_ptr();
  p.bias = bias.has_value() ? of_bias.const_data_ptr() : nullptr;
  if (base.is_cpu()) check_cells(p);
  const at::Tensor output = new_windows(base, p.batch, p.holes, p.out_channels, p.out_height,
                                        p.out_width, /*zero=*/base.is_cuda());
  if (output.numel() == 0) return output;
  p.output = output.mutable_data_ptr();
  const int64_t bytes = workspace_bytes(p, base.is_cpu());
  const at::Tensor packed = at::empty({bytes}, base.options().dtype(at::kByte));
  p.packed = packed.mutable_data_ptr();
  if (base.is_cpu()) {
    run_kernel(base, p, weight_panels(p), 1, pack_weight_cpu, GLANCE_CUDA(hole_conv_cuda));
  }
  run_kernel_in_blocks(base, p, p.window_count(), 4, hole_conv_cpu, GLANCE_CUDA(hole_conv_cuda));
  return output;
}

namespace {

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Gradients fused_backward(const HoleConvParams& checked, const at::Tensor& grad_output,
                         const at::Tensor& output, const at::Tensor& base,
                         const std::optional<at::Tensor>& windows, const at::Tensor& extents,
                         const at::Tensor& origins, const at::Tensor& ratio,
                         const at::Tensor& weight, std::array<bool, 4> output_mask) {
  HoleConvBackwardParams p;
  static_cast<HoleConvParams&>(p) = checked;
  const Workspace work = bind_inputs(kHoleConv, p, base, windows, extents, origins, p.origins);
  const at::Tensor of_ratio = ratio.contiguous(), of_weight = weight.contiguous();
  const at::Tensor grad = windows_last(grad_output), result = windows_last(output);
  p.ratio = of_ratio.const_data_ptr();
  p.weight = of_weight.const_data_ptr();
  p.grad_output = grad.const_data_ptr();
  p.result = p.negative_slope == 1 ? nullptr : result.const_data_ptr();
  at::Tensor grad_base = at::empty({0}, base.options()), grad_windows = grad_base;
  at::Tensor grad_weight = at::empty({0}, weight.options()), grad_bias = grad_base;
  if (output_mask[3]) {
    grad_bias = at::empty({p.out_channels}, base.options());
    p.grad_bias = grad_bias.mutable_data_ptr();
  }
  if (output_mask[2]) {
    grad_weight =
        at::empty({p.out_channels, p.kernel[0], p.kernel[1], p.channels}, weight.options());
    p.grad_weight = grad_weight.mutable_data_ptr();
  }
  const auto [tile_origins, tile] = input_tiles(p, origins);
  at::Tensor grad_tiles;
  if (output_mask[0] || output_mask[1]) {
    grad_tiles = at::empty({p.window_count(), tile[0], tile[1], p.channels}, base.options());
    p.grad_tiles = grad_tiles.mutable_data_ptr();
  }
  hole_conv_backward_cpu(p, parallel_units);
  if (output_mask[2]) {
    grad_weight = grad_weight.permute({0, 3, 1, 2}).contiguous(memory_format(weight));
  }
  if (output_mask[0] || output_mask[1]) {
    HoleGatherBackwardParams q;
    static_cast<HoleGatherParams&>(q) = checked_gather(base, windows, extents, tile);
    const Workspace inputs =
        bind_inputs(kHoleConv, q, base, windows, extents, tile_origins, q.origins);
    std::tie(grad_base, grad_windows) =
        scatter_tiles(q, base, windows, grad_tiles, {output_mask[0], output_mask[1]});
  }
  return {grad_base, grad_windows, grad_weight, grad_bias};
}

Gradients hole_conv2d_backward(const at::Tensor& grad_output, const at::Tensor& output,
                               const at::Tensor& base, const std::optional<at::Tensor>& windows,
                               const at::Tensor& extents, const at::Tensor& origins,
                               const at::Tensor& ratio, const at::Tensor& weight,
                               at::IntArrayRef stride, at::IntArrayRef padding,
                               at::IntArrayRef dilation, double negative_slope,
                               std::array<bool, 4> output_mask) {
  const at::Tensor no_cells = at::empty({0}, extents.options());
  const HoleConvParams p = checked_conv(base, windows, extents, no_cells, ratio, weight,
                                        std::nullopt, stride, padding, dilation, negative_slope);
  const std::array<int64_t, 5> expected{p.batch, p.holes, p.out_channels, p.out_height,
                                        p.out_width};
  for (const at::Tensor* tensor : {&grad_output, &output}) {
    GLANCE_CHECK_VALUE(tensor->sizes() == at::IntArrayRef(expected), "hole_conv2d_backward",
                       tensor == &output ? "output" : "grad_output", " of shape ",
                       at::IntArrayRef(expected), ", got ", tensor->sizes());
  }
  GLANCE_CHECK_TYPE(grad_output.scalar_type() == base.scalar_type(), "hole_conv2d_backward",
                    "grad_output of the base's ", dtype_name(base), ", got ",
                    dtype_name(grad_output));
  const DeviceGuard guard(base);
  if (base.is_cpu() && p.dtype != ScalarType::kFloat64) {
    return fused_backward(p, grad_output, output, base, windows, extents, origins, ratio, weight,
                          output_mask);
  }
  at::Tensor grad_base = at::empty({0}, base.options());
  at::Tensor grad_windows = at::empty({0}, base.options());
  at::Tensor grad_weight = at::empty({0}, weight.options());
  at::Tensor grad_bias = at::empty({0}, base.options());

  // (N, P, ho, wo, K), so that sums do not depend on the layout: the gradient behind the
  // activation, at the cells that were computed.
  const at::Tensor scale = ratio.contiguous().unsqueeze(-1);
  at::Tensor grad = windows_last(grad_output).to(ratio.scalar_type());
  if (negative_slope != 1) {
    grad = at::where(windows_last(output) > 0, grad, grad * negative_slope);
  }
  grad = at::where(scale != 0, grad, at::zeros({}, grad.options()));
  if (output_mask[3]) grad_bias = grad.sum({0, 1, 2, 3}).to(base.scalar_type());
  if (output_mask[0] || output_mask[1] || output_mask[2]) {
    const int64_t count = p.window_count();
    const at::Tensor grad_conv = (grad * scale)
                                     .to(base.scalar_type())
                                     .reshape({count, p.out_height, p.out_width, p.out_channels})
                                     .permute({0, 3, 1, 2});
    const auto [tile_origins, tile] = input_tiles(p, origins);
    const at::Tensor tiles = gather_holes(base, windows, extents, tile_origins, tile, 0)
                                 .permute({0, 1, 3, 4, 2})
                                 .reshape({count, tile[0], tile[1], p.channels})
                                 .permute({0, 3, 1, 2});
    auto [grad_tiles, of_weight, unused] = at::convolution_backward(
        grad_conv, tiles, weight, std::nullopt, stride, {0, 0}, dilation, /*transposed=*/false,
        {0, 0}, 1, {output_mask[0] || output_mask[1], output_mask[2], false});
    if (output_mask[2]) grad_weight = of_weight.contiguous(memory_format(weight));
    if (output_mask[0] || output_mask[1]) {
      HoleGatherBackwardParams q;
      static_cast<HoleGatherParams&>(q) = checked_gather(base, windows, extents, tile);
      const Workspace work =
          bind_inputs(kHoleConv, q, base, windows, extents, tile_origins, q.origins);
      std::tie(grad_base, grad_windows) =
          scatter_tiles(q, base, windows, grad_tiles.permute({0, 2, 3, 1}).contiguous(),
                        {output_mask[0], output_mask[1]});
    }
  }
  return {grad_base, grad_windows, grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(glance_ext, CPU, m) {
  m.impl("hole_conv2d", &hole_conv2d);
  m.impl("hole_conv2d_backward", &hole_conv2d_backward);
}

#ifdef GLANCE_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(glance_ext, CUDA, m) {
  m.impl("hole_conv2d", &hole_conv2d);
  m.impl("hole_conv2d_backward", &hole_conv2d_backward);
}
#endif

}  // namespace glance
