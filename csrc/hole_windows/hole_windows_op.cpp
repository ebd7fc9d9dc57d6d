// Tensors -> Hole*Params, and glance_ext::gather_holes with its backward.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "hole_windows/hole_ops.h"

namespace glance {
namespace {

constexpr auto kLast = at::MemoryFormat::ChannelsLast;
constexpr const char* kGather = "gather_holes";

at::Tensor new_base(const at::Tensor& base) {
  return at::empty(base.sizes(), base.options().memory_format(kLast));
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

}  // namespace

at::Tensor windows_last(const at::Tensor& windows) {
  return windows.permute({0, 1, 3, 4, 2}).contiguous();
}

at::Tensor new_windows(const at::Tensor& like, int64_t n, int64_t p, int64_t c, int64_t h,
                       int64_t w, bool zero) {
  const std::array<int64_t, 5> size{n, p, h, w, c};
  const at::Tensor last = zero ? at::zeros(size, like.options()) : at::empty(size, like.options());
  return last.permute({0, 1, 4, 2, 3});
}

void check_index(const char* op, const char* name, const at::Tensor& index,
                 const at::Tensor& base) {
  GLANCE_CHECK_TYPE(index.scalar_type() == at::kInt, op, name, " to be int32, got ",
                    dtype_name(index));
  GLANCE_CHECK_VALUE(index.device() == base.device(), op, name, " on the base's device ",
                     base.device(), ", got ", index.device());
}

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

void check_windows_hold(const char* op, const HoleWindowsParams& p) {
  for (int64_t g = 0; g < p.geometry_rows; ++g) {
    const int32_t* e = p.extents + g * 4;
    GLANCE_CHECK_VALUE(e[2] <= p.window_height && e[3] <= p.window_width, op,
                       "every extent to fit its window of ", p.window_height, "x", p.window_width,
                       ", got extent ", g, " of ", e[2], "x", e[3]);
  }
}

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

std::tuple<at::Tensor, at::Tensor> scatter_tiles(HoleGatherBackwardParams p, const at::Tensor& base,
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

namespace {

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
  return scatter_tiles(p, base, windows, windows_last(grad_tiles), output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(glance_ext, CPU, m) {
  m.impl("gather_holes", &gather_holes);
  m.impl("gather_holes_backward", &gather_holes_backward);
}

#ifdef GLANCE_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(glance_ext, CUDA, m) {
  m.impl("gather_holes", &gather_holes);
  m.impl("gather_holes_backward", &gather_holes_backward);
}
#endif

}  // namespace glance
