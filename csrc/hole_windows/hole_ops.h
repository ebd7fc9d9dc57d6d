// What the op files of this folder share: tensors -> Hole*Params, and the ops as functions.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <utility>

#include "common/tensor_check.h"
#include "hole_windows/hole_windows.h"

namespace glance {

constexpr const char* kHolePool = "hole_max_pool2d";
constexpr const char* kHoleConv = "hole_conv2d";

// (N, P, C, h, w) in memory as (N * P, h, w, C), which the kernels read.
at::Tensor windows_last(const at::Tensor& windows);
// An empty (N, P, C, h, w) in that layout.
at::Tensor new_windows(const at::Tensor& like, int64_t n, int64_t p, int64_t c, int64_t h,
                       int64_t w, bool zero = false);

void check_index(const char* op, const char* name, const at::Tensor& index, const at::Tensor& base);
// Every extent fits its window; what only a CPU can look at for free.
void check_windows_hold(const char* op, const HoleWindowsParams& p);

// These check all arguments but the windows' values, and fill in their sizes; pointers stay null.
HoleWindowsParams checked_windows(const char* op, const at::Tensor& base,
                                  const std::optional<at::Tensor>& windows,
                                  const at::Tensor& extents);
HoleGatherParams checked_gather(const at::Tensor& base, const std::optional<at::Tensor>& windows,
                                const at::Tensor& extents, at::IntArrayRef tile_size);
HolePoolParams checked_pool(const at::Tensor& base, const std::optional<at::Tensor>& windows,
                            const at::Tensor& extents, at::IntArrayRef kernel,
                            at::IntArrayRef stride, at::IntArrayRef padding,
                            at::IntArrayRef dilation, at::IntArrayRef window_size);
HoleConvParams checked_conv(const at::Tensor& base, const std::optional<at::Tensor>& windows,
                            const at::Tensor& extents, const at::Tensor& cells,
                            const at::Tensor& ratio, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                            at::IntArrayRef padding, at::IntArrayRef dilation,
                            double negative_slope);
void check_cells(const HoleConvParams& p);

// The tensors behind the pointers of one call, in the layout of the kernels.
struct Workspace {
  at::Tensor base, windows, extents, origins;
};
Workspace bind_inputs(const char* op, HoleWindowsParams& p, const at::Tensor& base,
                      const std::optional<at::Tensor>& windows, const at::Tensor& extents,
                      const at::Tensor& origins, const int32_t*& origin_pointer);

at::Tensor gather_holes(const at::Tensor& base, const std::optional<at::Tensor>& windows,
                        const at::Tensor& extents, const at::Tensor& origins,
                        at::IntArrayRef tile_size, double fill);
// The gradients of gather_holes, given its tiles' gradient in the kernels' layout.
std::tuple<at::Tensor, at::Tensor> scatter_tiles(HoleGatherBackwardParams p, const at::Tensor& base,
                                                 const std::optional<at::Tensor>& windows,
                                                 const at::Tensor& grad_tiles,
                                                 std::array<bool, 2> output_mask);
at::Tensor hole_max_pool2d(const at::Tensor& base, const std::optional<at::Tensor>& windows,
                           const at::Tensor& extents, const at::Tensor& origins,
                           at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                           at::IntArrayRef dilation, at::IntArrayRef window_size);
at::Tensor hole_conv2d(const at::Tensor& base, const std::optional<at::Tensor>& windows,
                       const at::Tensor& extents, const at::Tensor& origins,
                       const at::Tensor& cells, const at::Tensor& ratio, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                       at::IntArrayRef padding, at::IntArrayRef dilation, double negative_slope);

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

}  // namespace glance
