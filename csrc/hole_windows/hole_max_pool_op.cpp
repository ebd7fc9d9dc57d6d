// Tensors -> HolePoolParams -> kernels, for glance_ext::hole_max_pool2d; its backward composes
// ATen's.
#include <ATen/ops/max_pool2d_with_indices.h>
#include <ATen/ops/max_pool2d_with_indices_backward.h>
#include <torch/library.h>

#include <limits>

#include "hole_windows/hole_ops.h"

namespace glance {

HolePoolParams checked_pool(const at::Tensor& base, const std::optional<at::Tensor>& windows,
                            const at::Tensor& extents, at::IntArrayRef kernel,
                            at::IntArrayRef stride, at::IntArrayRef padding,
                            at::IntArrayRef dilation, at::IntArrayRef window_size) {
  HolePoolParams p;
  static_cast<HoleWindowsParams&>(p) = checked_windows(kHolePool, base, windows, extents);
  const auto positive = [&](const char* name, at::IntArrayRef values) {
    const auto two = pair(kHolePool, name, values);
    GLANCE_CHECK_VALUE(two[0] > 0 && two[1] > 0, kHolePool, name, " to be positive, got (", two[0],
                       ", ", two[1], ")");
    return two;
  };
  const auto size = positive("window_size", window_size);
  p.out_height = size[0];
  p.out_width = size[1];
  const auto kernels = positive("kernel_size", kernel), strides = positive("stride", stride);
  const auto dilations = positive("dilation", dilation), pads = pair(kHolePool, "padding", padding);
  GLANCE_CHECK_VALUE(pads[0] >= 0 && pads[1] >= 0, kHolePool, "padding not to be negative, got (",
                     pads[0], ", ", pads[1], ")");
  for (int axis = 0; axis < 2; ++axis) {
    p.kernel[axis] = kernels[axis];
    p.stride[axis] = strides[axis];
    p.padding[axis] = pads[axis];
    p.dilation[axis] = dilations[axis];
  }
  return p;
}

at::Tensor hole_max_pool2d(const at::Tensor& base, const std::optional<at::Tensor>& windows,
                           const at::Tensor& extents, const at::Tensor& origins,
                           at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                           at::IntArrayRef dilation, at::IntArrayRef window_size) {
  HolePoolParams p =
      checked_pool(base, windows, extents, kernel, stride, padding, dilation, window_size);
  const DeviceGuard guard(base);
  const Workspace work = bind_inputs(kHolePool, p, base, windows, extents, origins, p.origins);
  const at::Tensor output =
      new_windows(base, p.batch, p.holes, p.channels, p.out_height, p.out_width);
  if (output.numel() == 0) return output;
  p.output = output.mutable_data_ptr();
  run_kernel_in_blocks(
      base, p, p.window_count(),
      grain_size(p.kernel[0] * p.kernel[1] * p.out_height * p.out_width * p.channels),
      hole_max_pool_cpu, GLANCE_CUDA(hole_max_pool_cuda));
  return output;
}

namespace {

std::tuple<at::Tensor, at::Tensor> hole_max_pool2d_backward(
    const at::Tensor& grad_output, const at::Tensor& base, const std::optional<at::Tensor>& windows,
    const at::Tensor& extents, const at::Tensor& origins, at::IntArrayRef kernel,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
    std::array<bool, 2> output_mask) {
  constexpr const char* op = "hole_max_pool2d_backward";
  GLANCE_CHECK_VALUE(grad_output.dim() == 5, op, "grad_output of shape (N, P, C, ho, wo), got ",
                     grad_output.sizes());
  const HolePoolParams p = checked_pool(base, windows, extents, kernel, stride, padding, dilation,
                                        grad_output.sizes().slice(3));
  const std::array<int64_t, 5> expected{p.batch, p.holes, p.channels, p.out_height, p.out_width};
  GLANCE_CHECK_VALUE(grad_output.sizes() == at::IntArrayRef(expected), op, "grad_output of shape ",
                     at::IntArrayRef(expected), ", got ", grad_output.sizes());
  GLANCE_CHECK_TYPE(grad_output.scalar_type() == base.scalar_type(), op,
                    "grad_output of the base's ", dtype_name(base), ", got ",
                    dtype_name(grad_output));
  const DeviceGuard guard(base);
  const auto [tile_origins, tile] = input_tiles(p, origins);
  HoleGatherBackwardParams q;
  static_cast<HoleGatherParams&>(q) = checked_gather(base, windows, extents, tile);
  const Workspace work = bind_inputs(kHolePool, q, base, windows, extents, tile_origins, q.origins);
  const at::Tensor tiles = gather_holes(base, windows, extents, tile_origins, tile,
                                        -std::numeric_limits<double>::infinity());
  if (tiles.numel() == 0) return scatter_tiles(q, base, windows, tiles, output_mask);
  const auto images = [](const at::Tensor& of_windows) {  // (N * P, C, h, w), channels last
    return windows_last(of_windows).flatten(0, 1).permute({0, 3, 1, 2});
  };
  const at::Tensor input = images(tiles);
  const at::Tensor places = std::get<1>(
      at::max_pool2d_with_indices(input, kernel, stride, {0, 0}, dilation, /*ceil_mode=*/false));
  const at::Tensor grad_tiles = at::max_pool2d_with_indices_backward(
      images(grad_output), input, kernel, stride, {0, 0}, dilation, /*ceil_mode=*/false, places);
  return scatter_tiles(q, base, windows, grad_tiles.permute({0, 2, 3, 1}).contiguous(),
                       output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(glance_ext, CPU, m) {
  m.impl("hole_max_pool2d", &hole_max_pool2d);
  m.impl("hole_max_pool2d_backward", &hole_max_pool2d_backward);
}

#ifdef GLANCE_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(glance_ext, CUDA, m) {
  m.impl("hole_max_pool2d", &hole_max_pool2d);
  m.impl("hole_max_pool2d_backward", &hole_max_pool2d_backward);
}
#endif

}  // namespace glance
