// Tensors -> Hole*Params -> kernels, for glance_ext::gather_holes, hole_max_pool2d, hole_conv2d and
// their backwards.
#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/max_pool2d_with_indices.h>
#include <ATen/ops/max_pool2d_with_indices_backward.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <limits>
#include <tuple>
#include <vector>

#include "common/tensor_check.h"
#include "hole_windows/hole_windows.h"

namespace glance {
namespace {

constexpr auto kLast = at::MemoryFormat::ChannelsLast;

// (N, P, C, h, w) in memory as (N * P, h, w, C), which the kernels read.
at::Tensor windows_last(const at::Tensor& windows) {
  return windows.permute({0, 1, 3, 4, 2}).contiguous();
}

at::Tensor new_windows(const at::Tensor& like, int64_t n, int64_t p, int64_t c, int64_t h,
                       int64_t w, bool zero = false) {
  const std::array<int64_t, 5> size{n, p, h, w, c};
  const at::Tensor last = zero ? at::zeros(size, like.options()) : at::empty(size, like.options());
  return last.permute({0, 1, 4, 2, 3});
}

at::Tensor new_base(const at::Tensor& base) {
  return at::empty(base.sizes(), base.options().memory_format(kLast));
}

void check_index(const char* op, const char* name, const at::Tensor& index,
                 const at::Tensor& base) {
  GLANCE_CHECK_TYPE(index.scalar_type() == at::kInt, op, name, " to be int32, got ",
                    dtype_name(index));
  GLANCE_CHECK_VALUE(index.device() == base.device(), op, name, " on the base's device ",
                     base.device(), ", got ", index.device());
}

// Geometry with a row for each hole, (P, columns), or for each window, (N, P, columns).
void check_geometry(const char* op, const char* name, const at::Tensor& rows,
                    const at::Tensor& extents, int64_t columns) {
  GLANCE_CHECK_VALUE(
      rows.dim() == extents.dim() && rows.size(-1) == columns &&
          rows.sizes().slice(0, rows.dim() - 1) == extents.sizes().slice(0, extents.dim() - 1),
      op, name, " to have a row of ", columns, " for each of the extents ", extents.sizes(),
      ", got ", rows.sizes());
}

// Checks base, windows and extents, and fills in their sizes; pointers stay null.
HoleWindowsParams checked_windows(const char* op, const at::Tensor& base,
                                  const std::optional<at::Tensor>& windows,
                                  const at::Tensor& extents) {
  HoleWindowsParams p;
  p.dtype = scalar_type(op, "base", base);
  GLANCE_CHECK_VALUE(base.dim() == 4 && base.size(1) > 0 && base.size(2) > 0 && base.size(3) > 0,
                     op, "base of shape (N, C, H, W) with at least one pixel, got ", base.sizes());
  check_index(op, "extents", extents, base);
  GLANCE_CHECK_VALUE((extents.dim() == 2 || extents.dim() == 3) && extents.size(-1) == 4, op,
                     "extents of shape (P, 4) or (N, P, 4), got ", extents.sizes());
  GLANCE_CHECK_VALUE(extents.dim() == 2 || extents.size(0) == base.size(0), op, "extents for ",
                     base.size(0), " images, got ", extents.size(0));
  p.batch = base.size(0);
  p.holes = extents.size(-2);
  p.geometry_rows = extents.numel() / 4;
  p.channels = base.size(1);
  p.height = base.size(2);
  p.width = base.size(3);
  if (windows.has_value()) {
    GLANCE_CHECK_TYPE(windows->scalar_type() == base.scalar_type(), op, "windows of the base's ",
                      dtype_name(base), ", got ", dtype_name(*windows));
    GLANCE_CHECK_VALUE(windows->device() == base.device(), op, "windows on the base's device ",
                       base.device(), ", got ", windows->device());
    GLANCE_CHECK_VALUE(windows->dim() == 5 && windows->size(0) == p.batch &&
                           windows->size(1) == p.holes && windows->size(2) == p.channels,
                       op, "windows of shape (", p.batch, ", ", p.holes, ", ", p.channels,
                       ", h, w), got ", windows->sizes());
    p.window_height = windows->size(3);
    p.window_width = windows->size(4);
  }
  return p;
}

// What only a CPU can look at for free; a CUDA kernel reads nothing outside of its tensors anyway.
void check_extents(const char* op, const HoleWindowsParams& p) {
  for (int64_t g = 0; g < p.geometry_rows; ++g) {
    const int32_t* e = p.extents + g * 4;
    GLANCE_CHECK_VALUE(e[0] >= 0 && e[1] >= 0 && e[2] >= 0 && e[3] >= 0 &&
                           e[0] + int64_t(e[2]) <= p.height && e[1] + int64_t(e[3]) <= p.width,
                       op, "every extent inside the ", p.height, "x", p.width, " map, got extent ",
                       g, " of ", e[2], "x", e[3], " at row ", e[0], ", column ", e[1]);
  }
}

void check_windows_hold(const char* op, const HoleWindowsParams& p) {
  for (int64_t g = 0; g < p.geometry_rows; ++g) {
    const int32_t* e = p.extents + g * 4;
    GLANCE_CHECK_VALUE(e[2] <= p.window_height && e[3] <= p.window_width, op,
                       "every extent to fit its window of ", p.window_height, "x", p.window_width,
                       ", got extent ", g, " of ", e[2], "x", e[3]);
  }
}

// The tensors behind the pointers of one call, in the layout of the kernels.
struct Workspace {
  at::Tensor base, windows, extents, origins;
};

Workspace bind_inputs(const char* op, HoleWindowsParams& p, const at::Tensor& base,
                      const std::optional<at::Tensor>& windows, const at::Tensor& extents,
                      const at::Tensor& origins, const int32_t*& origin_pointer) {
  check_index(op, "origins", origins, base);
  check_geometry(op, "origins", origins, extents, 2);
  Workspace work;
  work.base = base.contiguous(kLast);
  if (windows.has_value()) work.windows = windows_last(*windows);
  work.extents = extents.contiguous();
  work.origins = origins.contiguous();
  p.base = work.base.const_data_ptr();
  p.windows = windows.has_value() ? work.windows.const_data_ptr() : nullptr;
  p.extents = work.extents.const_data_ptr<int32_t>();
  origin_pointer = work.origins.const_data_ptr<int32_t>();
  if (base.is_cpu()) {
    check_extents(op, p);
    if (windows.has_value()) check_windows_hold(op, p);
  }
  return work;
}

constexpr const char* kGather = "gather_holes";

HoleGatherParams checked_gather(const at::Tensor& base, const std::optional<at::Tensor>& windows,
                                const at::Tensor& extents, at::IntArrayRef tile_size) {
  HoleGatherParams p;
  static_cast<HoleWindowsParams&>(p) = checked_windows(kGather, base, windows, extents);
  const auto size = pair(kGather, "tile_size", tile_size);
  GLANCE_CHECK_VALUE(size[0] > 0 && size[1] > 0, kGather, "tile_size to be positive, got (",
                     size[0], ", ", size[1], ")");
  p.tile_height = size[0];
  p.tile_width = size[1];
  return p;
}

at::Tensor gather_holes(const at::Tensor& base, const std::optional<at::Tensor>& windows,
                        const at::Tensor& extents, const at::Tensor& origins,
                        at::IntArrayRef tile_size, double fill) {
  HoleGatherParams p = checked_gather(base, windows, extents, tile_size);
  p.fill = fill;
  const DeviceGuard guard(base);
  const Workspace work = bind_inputs(kGather, p, base, windows, extents, origins, p.origins);
  const at::Tensor tiles =
      new_windows(base, p.batch, p.holes, p.channels, p.tile_height, p.tile_width);
  if (tiles.numel() == 0) return tiles;
  p.tiles = tiles.mutable_data_ptr();
  run_kernel(base, p, p.window_count(), grain_size(p.tile_height * p.tile_width * p.channels),
             gather_holes_cpu, GLANCE_CUDA(gather_holes_cuda));
  return tiles;
}

// The gradients of gather_holes, given its tiles' gradient in the kernels' layout.
std::tuple<at::Tensor, at::Tensor> scatter(HoleGatherBackwardParams p, const at::Tensor& base,
                                           const std::optional<at::Tensor>& windows,
                                           const at::Tensor& grad_tiles,
                                           std::array<bool, 2> output_mask) {
  at::Tensor grad_base = at::empty({0}, base.options());
  at::Tensor grad_windows = at::empty({0}, base.options());
  p.grad_tiles = grad_tiles.const_data_ptr();
  if (output_mask[0]) {
    grad_base = new_base(base);
    p.grad_base = grad_base.mutable_data_ptr();
  }
  if (output_mask[1] && windows.has_value()) {
    grad_windows = new_windows(base, p.batch, p.holes, p.channels, p.window_height, p.window_width);
    p.grad_windows = grad_windows.mutable_data_ptr();
  }
  if (p.window_count() == 0) {
    if (p.grad_base) grad_base.zero_();
    return {grad_base, grad_windows};
  }
#ifdef GLANCE_EXT_WITH_CUDA
  if (base.is_cuda()) {
    run_kernel(base, p, 0, 1, scatter_base_cpu, scatter_holes_cuda);
    return {grad_base, grad_windows};
  }
#endif
  const auto never = GLANCE_CUDA(scatter_holes_cuda);
  if (p.grad_base) {
    run_kernel(base, p, p.batch * p.height, grain_size(p.width * p.channels), scatter_base_cpu,
               never);
  }
  if (p.grad_windows && grad_windows.numel() > 0) {
    run_kernel(base, p, p.window_count(), grain_size(p.window_height * p.window_width * p.channels),
               scatter_windows_cpu, never);
  }
  return {grad_base, grad_windows};
}

std::tuple<at::Tensor, at::Tensor> gather_holes_backward(
    const at::Tensor& grad_tiles, const at::Tensor& base, const std::optional<at::Tensor>& windows,
    const at::Tensor& extents, const at::Tensor& origins, std::array<bool, 2> output_mask) {
  GLANCE_CHECK_VALUE(grad_tiles.dim() == 5, "gather_holes_backward",
                     "grad_tiles of shape (N, P, C, th, tw), got ", grad_tiles.sizes());
  HoleGatherBackwardParams p;
  static_cast<HoleGatherParams&>(p) =
      checked_gather(base, windows, extents, {grad_tiles.size(3), grad_tiles.size(4)});
  const std::array<int64_t, 5> expected{p.batch, p.holes, p.channels, p.tile_height, p.tile_width};
  GLANCE_CHECK_VALUE(grad_tiles.sizes() == at::IntArrayRef(expected), "gather_holes_backward",
                     "grad_tiles of shape ", at::IntArrayRef(expected), ", got ",
                     grad_tiles.sizes());
  const DeviceGuard guard(base);
  const Workspace work = bind_inputs(kGather, p, base, windows, extents, origins, p.origins);
  return scatter(p, base, windows, windows_last(grad_tiles), output_mask);
}

constexpr const char* kPool = "hole_max_pool2d";

HolePoolParams checked_pool(const at::Tensor& base, const std::optional<at::Tensor>& windows,
                            const at::Tensor& extents, at::IntArrayRef kernel,
                            at::IntArrayRef stride, at::IntArrayRef padding,
                            at::IntArrayRef dilation, at::IntArrayRef window_size) {
  HolePoolParams p;
  static_cast<HoleWindowsParams&>(p) = checked_windows(kPool, base, windows, extents);
  const auto positive = [&](const char* name, at::IntArrayRef values) {
    const auto two = pair(kPool, name, values);
    GLANCE_CHECK_VALUE(two[0] > 0 && two[1] > 0, kPool, name, " to be positive, got (", two[0],
                       ", ", two[1], ")");
    return two;
  };
  const auto size = positive("window_size", window_size);
  p.out_height = size[0];
  p.out_width = size[1];
  const auto kernels = positive("kernel_size", kernel), strides = positive("stride", stride);
  const auto dilations = positive("dilation", dilation), pads = pair(kPool, "padding", padding);
  GLANCE_CHECK_VALUE(pads[0] >= 0 && pads[1] >= 0, kPool, "padding not to be negative, got (",
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
  const Workspace work = bind_inputs(kPool, p, base, windows, extents, origins, p.origins);
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

// Where a layer's windows begin in its input, and how large their input is.
template <typename Params>
std::pair<at::Tensor, std::array<int64_t, 2>> input_tiles(const Params& p,
                                                          const at::Tensor& origins) {
  at::Tensor at = origins.clone();
  std::array<int64_t, 2> size;
  for (int axis = 0; axis < 2; ++axis) {
    at.select(-1, axis).mul_(p.stride[axis]).sub_(p.padding[axis]);
    size[axis] = ((axis ? p.out_width : p.out_height) - 1) * p.stride[axis] +
                 (p.kernel[axis] - 1) * p.dilation[axis] + 1;
  }
  return {at, size};
}

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
  const Workspace work = bind_inputs(kPool, q, base, windows, extents, tile_origins, q.origins);
  const at::Tensor tiles = gather_holes(base, windows, extents, tile_origins, tile,
                                        -std::numeric_limits<double>::infinity());
  if (tiles.numel() == 0) return scatter(q, base, windows, tiles, output_mask);
  const auto images = [](const at::Tensor& of_windows) {  // (N * P, C, h, w), channels last
    return windows_last(of_windows).flatten(0, 1).permute({0, 3, 1, 2});
  };
  const at::Tensor input = images(tiles);
  const at::Tensor places = std::get<1>(
      at::max_pool2d_with_indices(input, kernel, stride, {0, 0}, dilation, /*ceil_mode=*/false));
  const at::Tensor grad_tiles = at::max_pool2d_with_indices_backward(
      images(grad_output), input, kernel, stride, {0, 0}, dilation, /*ceil_mode=*/false, places);
  return scatter(q, base, windows, grad_tiles.permute({0, 2, 3, 1}).contiguous(), output_mask);
}

constexpr const char* kConv = "hole_conv2d";

HoleConvParams checked_conv(const at::Tensor& base, const std::optional<at::Tensor>& windows,
                            const at::Tensor& extents, const at::Tensor& cells,
                            const at::Tensor& ratio, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                            at::IntArrayRef padding, at::IntArrayRef dilation,
                            double negative_slope) {
  HoleConvParams p;
  static_cast<HoleWindowsParams&>(p) = checked_windows(kConv, base, windows, extents);
  GLANCE_CHECK_VALUE(weight.dim() == 4 && weight.numel() > 0, kConv,
                     "weight of shape (K, C, kh, kw), got ", weight.sizes());
  GLANCE_CHECK_VALUE(weight.size(1) == p.channels, kConv, "weight to have the base's ", p.channels,
                     " channels, got ", weight.size(1));
  const auto like_base = [&](const char* name, const at::Tensor& tensor) {
    GLANCE_CHECK_TYPE(tensor.scalar_type() == base.scalar_type(), kConv, name, " of the base's ",
                      dtype_name(base), ", got ", dtype_name(tensor));
    GLANCE_CHECK_VALUE(tensor.device() == base.device(), kConv, name, " on the base's device ",
                       base.device(), ", got ", tensor.device());
  };
  like_base("weight", weight);
  p.out_channels = weight.size(0);
  if (bias.has_value()) {
    like_base("bias", *bias);
    GLANCE_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == p.out_channels, kConv,
                       "bias of shape (", p.out_channels, ",), got ", bias->sizes());
  }
  GLANCE_CHECK_TYPE(ratio.scalar_type() == accumulate_dtype(p.dtype), kConv, "ratio to be ",
                    p.dtype == ScalarType::kFloat64 ? "float64" : "float32", ", got ",
                    dtype_name(ratio));
  GLANCE_CHECK_VALUE(ratio.device() == base.device(), kConv, "ratio on the base's device ",
                     base.device(), ", got ", ratio.device());
  GLANCE_CHECK_VALUE(
      ratio.dim() == extents.dim() + 1 &&
          ratio.sizes().slice(0, extents.dim() - 1) == extents.sizes().slice(0, extents.dim() - 1),
      kConv, "ratio of one window for each of the extents ", extents.sizes(), ", got ",
      ratio.sizes());
  check_index(kConv, "cells", cells, base);
  GLANCE_CHECK_VALUE(cells.dim() == 1, kConv, "cells of shape (M,), got ", cells.sizes());
  p.out_height = ratio.size(-2);
  p.out_width = ratio.size(-1);
  p.cell_count = cells.size(0);
  GLANCE_CHECK_VALUE(ratio.numel() <= std::numeric_limits<int32_t>::max(), kConv,
                     "at most 2147483647 cells of windows, got ", ratio.numel());
  for (int axis = 0; axis < 2; ++axis) {
    p.kernel[axis] = weight.size(2 + axis);
    p.stride[axis] = pair(kConv, "stride", stride)[axis];
    p.padding[axis] = pair(kConv, "padding", padding)[axis];
    p.dilation[axis] = pair(kConv, "dilation", dilation)[axis];
    GLANCE_CHECK_VALUE(p.stride[axis] > 0, kConv, "stride to be positive, got ", p.stride[axis]);
    GLANCE_CHECK_VALUE(p.padding[axis] >= 0, kConv, "padding not to be negative, got ",
                       p.padding[axis]);
    GLANCE_CHECK_VALUE(p.dilation[axis] > 0, kConv, "dilation to be positive, got ",
                       p.dilation[axis]);
  }
  GLANCE_CHECK_VALUE(negative_slope >= 0, kConv, "negative_slope not to be negative, got ",
                     negative_slope);
  p.negative_slope = negative_slope;
  p.tf32 = at::globalContext().allowTF32CuDNN(at::Float32Op::CONV);  // as for torch's own
  return p;
}

void check_cells(const HoleConvParams& p) {
  const int64_t count = p.geometry_rows * p.out_height * p.out_width;
  int64_t previous = -1;
  for (int64_t i = 0; i < p.cell_count; ++i) {
    GLANCE_CHECK_VALUE(p.cells[i] > previous && p.cells[i] < count, kConv,
                       "cells ascending and below ", count, ", got ", p.cells[i], " after ",
                       previous);
    previous = p.cells[i];
  }
}

int64_t workspace_bytes(const HoleConvParams& p, bool on_cpu) {
#ifdef GLANCE_EXT_WITH_CUDA
  if (!on_cpu) return hole_conv_workspace_bytes(p);
#endif
  TORCH_INTERNAL_ASSERT(on_cpu);
  return packed_weight_bytes(p);
}

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
  const Workspace work = bind_inputs(kConv, p, base, windows, extents, origins, p.origins);
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

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> hole_conv2d_backward(
    const at::Tensor& grad_output, const at::Tensor& output, const at::Tensor& base,
    const std::optional<at::Tensor>& windows, const at::Tensor& extents, const at::Tensor& origins,
    const at::Tensor& ratio, const at::Tensor& weight, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, double negative_slope,
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
      const Workspace work = bind_inputs(kConv, q, base, windows, extents, tile_origins, q.origins);
      std::tie(grad_base, grad_windows) =
          scatter(q, base, windows, grad_tiles.permute({0, 2, 3, 1}).contiguous(),
                  {output_mask[0], output_mask[1]});
    }
  }
  return {grad_base, grad_windows, grad_weight, grad_bias};
}

constexpr const char* kSequence = "hole_sequence";
constexpr size_t kSettings = 8;  // of a layer: kernel, stride, padding, dilation, each of two axes

// The arguments of one layer of a sequence, as hole_conv2d and hole_max_pool2d take them.
struct SequenceLayer {
  at::Tensor base, extents, origins, cells, ratio;
  std::optional<at::Tensor> weight, bias;  // no weight: a max-pooling
  at::IntArrayRef kernel, stride, padding, dilation;
  double negative_slope;
};

std::vector<SequenceLayer> sequence_layers(at::TensorList bases, at::TensorList extents,
                                           at::TensorList origins, at::TensorList cells,
                                           at::TensorList ratios,
                                           const c10::List<std::optional<at::Tensor>>& weights,
                                           const c10::List<std::optional<at::Tensor>>& biases,
                                           at::IntArrayRef settings,
                                           at::ArrayRef<double> negative_slopes) {
  const size_t count = bases.size();
  GLANCE_CHECK_VALUE(count > 0, kSequence, "at least one layer, got 0 bases");
  const auto as_many = [&](const char* name, size_t size, size_t each = 1) {
    GLANCE_CHECK_VALUE(size == each * count, kSequence, each * count, " ", name, " for ", count,
                       " layers, got ", size);
  };
  as_many("extents", extents.size());
  as_many("origins", origins.size());
  as_many("cells", cells.size());
  as_many("ratios", ratios.size());
  as_many("weights", weights.size());
  as_many("biases", biases.size());
  as_many("settings", settings.size(), kSettings);
  as_many("negative_slopes", negative_slopes.size());
  std::vector<SequenceLayer> layers;
  for (size_t i = 0; i < count; ++i) {
    const auto two = [&](size_t first) { return settings.slice(i * kSettings + first, 2); };
    layers.push_back({bases[i], extents[i], origins[i], cells[i], ratios[i], weights.get(i),
                      biases.get(i), two(0), two(2), two(4), two(6), negative_slopes[i]});
    GLANCE_CHECK_VALUE(ratios[i].dim() >= 3, kSequence,
                       "ratios of shape (P, ho, wo) or (N, P, ho, "
                       "wo), got ",
                       ratios[i].sizes());
  }
  return layers;
}

at::Tensor run_layer(const SequenceLayer& layer, const std::optional<at::Tensor>& windows) {
  if (!layer.weight.has_value()) {
    return hole_max_pool2d(layer.base, windows, layer.extents, layer.origins, layer.kernel,
                           layer.stride, layer.padding, layer.dilation,
                           layer.ratio.sizes().slice(layer.ratio.dim() - 2));
  }
  return hole_conv2d(layer.base, windows, layer.extents, layer.origins, layer.cells, layer.ratio,
                     *layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation,
                     layer.negative_slope);
}

// On a CPU: checks every layer as its own op would, and fills in all but the windows.
class BoundSequence {
 public:
  explicit BoundSequence(const std::vector<SequenceLayer>& layers) {
    std::optional<at::Tensor> windows;
    for (const SequenceLayer& layer : layers) {
      bound_.emplace_back();
      HoleLayer& to = bound_.back();
      if (layer.weight.has_value()) {
        bind_conv(to.conv, layer, windows);
      } else {
        to.pool = checked_pool(layer.base, windows, layer.extents, layer.kernel, layer.stride,
                               layer.padding, layer.dilation,
                               layer.ratio.sizes().slice(layer.ratio.dim() - 2));
        bind(kPool, to.pool, layer, windows, to.pool.origins);
      }
      const HoleWindowsParams& p = to.input();
      const int64_t channels = to.is_pool() ? p.channels : to.conv.out_channels;
      // Stands for what this layer will give: a shape without memory.
      windows =
          at::empty({1}, layer.base.options())
              .expand({p.batch, p.holes, channels, layer.ratio.size(-2), layer.ratio.size(-1)});
    }
    const at::Tensor& last = *windows;
    output_ =
        new_windows(last, last.size(0), last.size(1), last.size(2), last.size(3), last.size(4));
  }

  at::Tensor run() {
    HoleLayer& last = bound_.back();
    if (output_.numel() == 0) return output_;
    (last.is_pool() ? last.pool.output : last.conv.output) = output_.mutable_data_ptr();
    for (HoleLayer& layer : bound_) {
      if (layer.is_pool()) continue;
      held_.push_back(
          at::empty({packed_weight_bytes(layer.conv)}, output_.options().dtype(at::kByte)));
      layer.conv.packed = held_.back().mutable_data_ptr();
      run_kernel(output_, layer.conv, weight_panels(layer.conv), 1, pack_weight_cpu,
                 GLANCE_CUDA(hole_conv_cuda));
    }
    const auto sequence = [](const std::vector<HoleLayer>& layers, int64_t begin, int64_t end) {
      hole_sequence_cpu(layers.data(), static_cast<int64_t>(layers.size()), begin, end);
    };
    const auto never = [](const std::vector<HoleLayer>&, void*) { return 0; };
    run_kernel_in_blocks(output_, bound_, last.input().window_count(), 64, sequence, never);
    return output_;
  }

 private:
  template <typename Params>
  void bind(const char* op, Params& p, const SequenceLayer& layer,
            const std::optional<at::Tensor>& windows, const int32_t*& origins) {
    Workspace work =
        bind_inputs(op, p, layer.base, std::nullopt, layer.extents, layer.origins, origins);
    if (windows.has_value()) check_windows_hold(op, p);
    held_.insert(held_.end(), {work.base, work.extents, work.origins});
  }

  void bind_conv(HoleConvParams& p, SequenceLayer layer, const std::optional<at::Tensor>& windows) {
    p = checked_conv(layer.base, windows, layer.extents, layer.cells, layer.ratio, *layer.weight,
                     layer.bias, layer.stride, layer.padding, layer.dilation, layer.negative_slope);
    if (const int64_t missing = windows.has_value() ? 0 : channel_padding(p); missing > 0) {
      layer.base = at::constant_pad_nd(layer.base, {0, 0, 0, 0, 0, missing});
      layer.weight = at::constant_pad_nd(*layer.weight, {0, 0, 0, 0, 0, missing});
      p.channels += missing;
    }
    bind(kConv, p, layer, windows, p.origins);
    for (const at::Tensor& tensor : {layer.cells, layer.ratio, *layer.weight}) {
      held_.push_back(tensor.contiguous());
    }
    const at::Tensor* last = held_.data() + held_.size();
    p.cells = last[-3].const_data_ptr<int32_t>();
    p.ratio = last[-2].const_data_ptr();
    p.weight = last[-1].const_data_ptr();
    if (layer.bias.has_value()) {
      held_.push_back(layer.bias->contiguous());
      p.bias = held_.back().const_data_ptr();
    }
    check_cells(p);
  }

  std::vector<HoleLayer> bound_;
  std::vector<at::Tensor> held_;  // the tensors behind the pointers
  at::Tensor output_;
};

at::Tensor hole_sequence(at::TensorList bases, at::TensorList extents, at::TensorList origins,
                         at::TensorList cells, at::TensorList ratios,
                         const c10::List<std::optional<at::Tensor>>& weights,
                         const c10::List<std::optional<at::Tensor>>& biases,
                         at::IntArrayRef settings, at::ArrayRef<double> negative_slopes) {
  const std::vector<SequenceLayer> layers = sequence_layers(
      bases, extents, origins, cells, ratios, weights, biases, settings, negative_slopes);
  if (bases[0].is_cpu()) return BoundSequence(layers).run();
  std::optional<at::Tensor> windows;
  for (const SequenceLayer& layer : layers) windows = run_layer(layer, windows);
  return *windows;
}

}  // namespace

TORCH_LIBRARY_IMPL(glance_ext, CPU, m) {
  m.impl("gather_holes", &gather_holes);
  m.impl("gather_holes_backward", &gather_holes_backward);
  m.impl("hole_max_pool2d", &hole_max_pool2d);
  m.impl("hole_max_pool2d_backward", &hole_max_pool2d_backward);
  m.impl("hole_conv2d", &hole_conv2d);
  m.impl("hole_conv2d_backward", &hole_conv2d_backward);
  m.impl("hole_sequence", &hole_sequence);
}

#ifdef GLANCE_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(glance_ext, CUDA, m) {
  m.impl("gather_holes", &gather_holes);
  m.impl("gather_holes_backward", &gather_holes_backward);
  m.impl("hole_max_pool2d", &hole_max_pool2d);
  m.impl("hole_max_pool2d_backward", &hole_max_pool2d_backward);
  m.impl("hole_conv2d", &hole_conv2d);
  m.impl("hole_conv2d_backward", &hole_conv2d_backward);
  m.impl("hole_sequence", &hole_sequence);
}
#endif

}  // namespace glance
