// Tensors -> PatchScoresParams -> kernels, for glance_ext::aggregate_patch_scores and its backward.
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "common/tensor_check.h"
#include "patch_scores/patch_scores.h"

namespace glance {
namespace {

constexpr const char* kOp = "aggregate_patch_scores";

// Everything about the patches that does not depend on the scores.
struct Geometry {
  at::Tensor origins, row_begin, row_patches, weight_y, weight_x;  // on the scores' device
};

PatchMode parse_mode(const std::string& mode) {
  GLANCE_CHECK_VALUE(mode == "mean" || mode == "gaussian" || mode == "max" || mode == "idw", kOp,
                     "mode to be 'mean', 'gaussian', 'max' or 'idw', got '", mode, "'");
  if (mode == "max") return PatchMode::kMax;
  return mode == "idw" ? PatchMode::kIdw : PatchMode::kWindow;
}

// The patches' origins as pairs, from the argument or from the regular grid.
std::vector<int64_t> origin_list(const at::Tensor& scores, const std::optional<at::Tensor>& origins,
                                 std::array<int64_t, 2> stride) {
  std::vector<int64_t> list;
  if (!origins.has_value()) {
    GLANCE_CHECK_VALUE(scores.dim() == 3, kOp,
                       "scores of shape (N, gh, gw) on a regular grid, got ", scores.sizes());
    GLANCE_CHECK_VALUE(stride[0] > 0 && stride[1] > 0, kOp, "stride to be positive, got (",
                       stride[0], ", ", stride[1], ")");
    list.reserve(2 * scores.size(1) * scores.size(2));
    for (int64_t i = 0; i < scores.size(1); ++i) {
      for (int64_t j = 0; j < scores.size(2); ++j) {
        list.push_back(i * stride[0]);
        list.push_back(j * stride[1]);
      }
    }
    return list;
  }
  GLANCE_CHECK_VALUE(scores.dim() == 2, kOp, "scores of shape (N, P) with origins, got ",
                     scores.sizes());
  GLANCE_CHECK_TYPE(origins->scalar_type() == at::kLong || origins->scalar_type() == at::kInt, kOp,
                    "origins to be int64 or int32, got ", dtype_name(*origins));
  GLANCE_CHECK_VALUE(
      origins->dim() == 2 && origins->size(0) == scores.size(1) && origins->size(1) == 2, kOp,
      "origins of shape (", scores.size(1), ", 2), got ", origins->sizes());
  const at::Tensor host = origins->to(at::kCPU, at::kLong).contiguous();
  const int64_t* data = host.const_data_ptr<int64_t>();
  list.assign(data, data + host.numel());
  return list;
}

void check_inside(const PatchScoresParams& p, const std::vector<int64_t>& origins) {
  for (int64_t i = 0; i < p.patches; ++i) {
    const int64_t row = origins[2 * i], column = origins[2 * i + 1];
    // Differences of sizes, since row + patch_height may overflow.
    GLANCE_CHECK_VALUE(row >= 0 && column >= 0 && row <= p.height - p.patch_height &&
                           column <= p.width - p.patch_width,
                       kOp, "every patch inside the ", p.height, "x", p.width, " image, got patch ",
                       i, " of ", p.patch_height, "x", p.patch_width, " at row ", row, ", column ",
                       column);
  }
}

// A two-dimensional difference array: +1 where patches begin, -1 behind where they end.
void check_covered(const PatchScoresParams& p, const std::vector<int64_t>& origins) {
  if (p.height * p.width == 0) return;
  const int64_t pitch = p.width + 1;
  std::vector<int64_t> count((p.height + 1) * pitch, 0);
  for (int64_t i = 0; i < p.patches; ++i) {
    int64_t* corner = count.data() + origins[2 * i] * pitch + origins[2 * i + 1];
    corner[0] += 1;
    corner[p.patch_width] -= 1;
    corner[p.patch_height * pitch] -= 1;
    corner[p.patch_height * pitch + p.patch_width] += 1;
  }
  for (int64_t y = 0; y < p.height; ++y) {
    for (int64_t x = 0; x < p.width; ++x) {
      int64_t& here = count[y * pitch + x];
      if (y > 0) here += count[(y - 1) * pitch + x];
      if (x > 0) here += count[y * pitch + x - 1];
      if (y > 0 && x > 0) here -= count[(y - 1) * pitch + x - 1];
      GLANCE_CHECK_VALUE(here > 0, kOp, "every pixel to be covered by a patch, got none over row ",
                         y, ", column ", x);
    }
  }
}

at::Tensor to_device(const std::vector<int64_t>& values, const at::Tensor& like) {
  at::Tensor host = at::empty({static_cast<int64_t>(values.size())}, at::kLong);
  if (!values.empty()) {
    std::memcpy(host.mutable_data_ptr(), values.data(), values.size() * sizeof(int64_t));
  }
  return host.to(like.device());
}

at::Tensor window_weights(int64_t size, const std::string& mode, double sigma,
                          const at::Tensor& like, at::ScalarType dtype) {
  std::vector<double> weights(size, 1.0);
  if (mode == "gaussian") {
    const double centre = static_cast<double>(size - 1) / 2;
    const double width = sigma * static_cast<double>(size);
    for (int64_t i = 0; i < size; ++i) {
      const double offset = (static_cast<double>(i) - centre) / width;
      weights[i] = std::exp(-0.5 * offset * offset);
    }
  }
  return at::tensor(weights, at::kDouble).to(like.device(), dtype);
}

void check_parameter(const std::string& mode, double parameter) {
  if (mode == "gaussian") {
    GLANCE_CHECK_VALUE(parameter >= 0.1 && std::isfinite(parameter), kOp,
                       "sigma to be at least 0.1 of the patch, got ", parameter);
  } else if (mode == "idw") {
    GLANCE_CHECK_VALUE(parameter > 0 && std::isfinite(parameter), kOp,
                       "power to be positive and finite, got ", parameter);
  }
}

// Checks all arguments and fills all of `p` but scores, map and gradients.
Geometry checked_geometry(PatchScoresParams& p, const at::Tensor& scores,
                          const std::optional<at::Tensor>& origins_argument,
                          at::IntArrayRef patch_size, at::IntArrayRef image_size,
                          at::IntArrayRef stride, const std::string& mode, double parameter) {
  p.dtype = scalar_type(kOp, "scores", scores);
  p.mode = parse_mode(mode);
  check_parameter(mode, parameter);
  p.power = p.mode == PatchMode::kIdw ? parameter : 0.0;
  const std::array<int64_t, 2> patch = pair(kOp, "patch_size", patch_size);
  const std::array<int64_t, 2> image = pair(kOp, "image_size", image_size);
  p.patch_height = patch[0];
  p.patch_width = patch[1];
  p.height = image[0];
  p.width = image[1];
  GLANCE_CHECK_VALUE(p.patch_height > 0 && p.patch_width > 0, kOp,
                     "patch_size to be positive, got (", p.patch_height, ", ", p.patch_width, ")");
  GLANCE_CHECK_VALUE(p.height > 0 && p.width > 0, kOp, "image_size to be positive, got (", p.height,
                     ", ", p.width, ")");
  const std::vector<int64_t> origins =
      origin_list(scores, origins_argument, pair(kOp, "stride", stride));
  p.batch = scores.size(0);
  p.patches = static_cast<int64_t>(origins.size()) / 2;
  GLANCE_CHECK_VALUE(p.patches <= std::numeric_limits<int32_t>::max(), kOp,
                     "fewer than 2^31 patches, got ", p.patches);
  check_inside(p, origins);
  if (p.mode == PatchMode::kIdw) {
    GLANCE_CHECK_VALUE(p.patches > 0, kOp, "at least one patch, got 0");
  } else {
    check_covered(p, origins);
  }

  // Patches by row, ascending in each row: a counting sort.
  std::vector<int64_t> begin(p.height + 1, 0);
  for (int64_t i = 0; i < p.patches; ++i) {
    for (int64_t y = origins[2 * i]; y < origins[2 * i] + p.patch_height; ++y) ++begin[y + 1];
  }
  for (int64_t y = 0; y < p.height; ++y) begin[y + 1] += begin[y];
  std::vector<int64_t> by_row(begin[p.height]), next(begin.begin(), begin.end() - 1);
  for (int64_t i = 0; i < p.patches; ++i) {
    for (int64_t y = origins[2 * i]; y < origins[2 * i] + p.patch_height; ++y) {
      by_row[next[y]++] = i;
    }
  }

  Geometry g;
  g.origins = to_device(origins, scores);
  g.row_begin = to_device(begin, scores);
  g.row_patches = to_device(by_row, scores);
  const at::ScalarType dtype = accumulate_dtype(p.dtype);
  g.weight_y = window_weights(p.patch_height, mode, parameter, scores, dtype);
  g.weight_x = window_weights(p.patch_width, mode, parameter, scores, dtype);
  p.origins = g.origins.const_data_ptr<int64_t>();
  p.row_begin = g.row_begin.const_data_ptr<int64_t>();
  p.row_patches = g.row_patches.const_data_ptr<int64_t>();
  p.weight_y = g.weight_y.const_data_ptr();
  p.weight_x = g.weight_x.const_data_ptr();
  return g;
}

at::Tensor aggregate_patch_scores(const at::Tensor& scores,
                                  const std::optional<at::Tensor>& origins,
                                  at::IntArrayRef patch_size, at::IntArrayRef image_size,
                                  at::IntArrayRef stride, c10::string_view mode, double parameter) {
  PatchScoresParams p;
  const DeviceGuard guard(scores);
  const Geometry geometry = checked_geometry(p, scores, origins, patch_size, image_size, stride,
                                             std::string(mode), parameter);
  const at::Tensor dense = scores.contiguous();
  at::Tensor map = at::empty({p.batch, p.height, p.width}, scores.options());
  p.scores = dense.const_data_ptr();
  p.map = map.mutable_data_ptr();
  const int64_t work = p.mode == PatchMode::kIdw ? p.width * p.patches : 8 * p.width;
  run_kernel(scores, p, p.batch * p.height, grain_size(work), aggregate_cpu,
             GLANCE_CUDA(aggregate_cuda));
  return map;
}

at::Tensor aggregate_patch_scores_backward(const at::Tensor& grad_map, const at::Tensor& scores,
                                           const std::optional<at::Tensor>& origins,
                                           at::IntArrayRef patch_size, at::IntArrayRef stride,
                                           c10::string_view mode, double parameter) {
  PatchScoresBackwardParams p;
  const DeviceGuard guard(scores);
  GLANCE_CHECK_VALUE(grad_map.dim() == 3 && grad_map.size(0) == scores.size(0),
                     "aggregate_patch_scores_backward", "grad_map of shape (", scores.size(0),
                     ", H, W), got ", grad_map.sizes());
  GLANCE_CHECK_TYPE(grad_map.scalar_type() == scores.scalar_type(),
                    "aggregate_patch_scores_backward", "grad_map of the scores' ",
                    dtype_name(scores), ", got ", dtype_name(grad_map));
  const Geometry geometry =
      checked_geometry(p, scores, origins, patch_size, grad_map.sizes().slice(1), stride,
                       std::string(mode), parameter);
  const at::Tensor dense = scores.contiguous(), grad = grad_map.contiguous();
  at::Tensor grad_scores = at::empty(scores.sizes(), scores.options());
  at::Tensor norm, best;
  if (p.mode == PatchMode::kMax) {
    best = at::empty({p.batch, p.height, p.width}, scores.options().dtype(at::kInt));
    p.best = best.mutable_data_ptr<int32_t>();
  } else {
    norm = at::empty({2, p.height, p.width}, scores.options().dtype(accumulate_dtype(p.dtype)));
    p.norm = norm.mutable_data_ptr();
  }
  p.scores = dense.const_data_ptr();
  p.grad_map = grad.const_data_ptr();
  p.grad_scores = grad_scores.mutable_data_ptr();
#ifdef GLANCE_EXT_WITH_CUDA
  if (scores.is_cuda()) {
    run_kernel(scores, p, 0, 1, aggregate_backward_cpu, aggregate_backward_cuda);
    return grad_scores;
  }
#endif
  const int64_t rows = p.mode == PatchMode::kMax ? p.batch * p.height : p.height;
  run_kernel(scores, p, rows, grain_size(p.width * 8), aggregate_prepare_cpu,
             GLANCE_CUDA(aggregate_backward_cuda));
  run_kernel(scores, p, p.patches, grain_size(p.batch * p.patch_height * p.patch_width),
             aggregate_backward_cpu, GLANCE_CUDA(aggregate_backward_cuda));
  return grad_scores;
}

}  // namespace

TORCH_LIBRARY_IMPL(glance_ext, CPU, m) {
  m.impl("aggregate_patch_scores", &aggregate_patch_scores);
  m.impl("aggregate_patch_scores_backward", &aggregate_patch_scores_backward);
}

#ifdef GLANCE_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(glance_ext, CUDA, m) {
  m.impl("aggregate_patch_scores", &aggregate_patch_scores);
  m.impl("aggregate_patch_scores_backward", &aggregate_patch_scores_backward);
}
#endif

}  // namespace glance
