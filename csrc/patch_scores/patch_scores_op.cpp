// Tensors -> PatchScoresParams -> kernels, for glance_ext::aggregate_patch_scores and its backward.
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/tensor.h>
#include <torch/library.h>

#ifdef GLANCE_EXT_WITH_CUDA
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/recent_cache.h"
#include "common/tensor_check.h"
#include "patch_scores/grid_geometry.h"
#include "patch_scores/patch_grid.h"
#include "patch_scores/patch_scores.h"

namespace glance {
namespace {

constexpr const char* kOp = "aggregate_patch_scores";

PatchMode parse_mode(const std::string& mode) {
  GLANCE_CHECK_VALUE(mode == "mean" || mode == "gaussian" || mode == "max" || mode == "idw", kOp,
                     "mode to be 'mean', 'gaussian', 'max' or 'idw', got '", mode, "'");
  if (mode == "max") return PatchMode::kMax;
  return mode == "idw" ? PatchMode::kIdw : PatchMode::kWindow;
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

// All that a geometry depends on.
struct Request {
  std::string mode;
  double parameter;
  std::array<int64_t, 2> patch, image, grid, stride;  // grid and stride: zeros with origins
  at::Tensor origins;                                 // (P, 2) on the CPU, contiguous, or none
  at::Device device;
  ScalarType accumulate;

  bool operator==(const Request& other) const {
    if (mode != other.mode || parameter != other.parameter || patch != other.patch ||
        image != other.image || grid != other.grid || stride != other.stride ||
        device != other.device || accumulate != other.accumulate ||
        origins.defined() != other.origins.defined()) {
      return false;
    }
    return !origins.defined() ||
           (origins.scalar_type() == other.origins.scalar_type() &&
            origins.numel() == other.origins.numel() &&
            std::memcmp(origins.const_data_ptr(), other.origins.const_data_ptr(),
                        origins.nbytes()) == 0);
  }

  // The patches' origins as pairs.
  std::vector<int64_t> origin_list() const {
    std::vector<int64_t> list;
    if (origins.defined()) {
      const at::Tensor wide = origins.to(at::kLong);
      list.assign(wide.const_data_ptr<int64_t>(), wide.const_data_ptr<int64_t>() + wide.numel());
      return list;
    }
    list.reserve(2 * grid[0] * grid[1]);
    for (int64_t i = 0; i < grid[0]; ++i) {
      for (int64_t j = 0; j < grid[1]; ++j) {
        list.push_back(i * stride[0]);
        list.push_back(j * stride[1]);
      }
    }
    return list;
  }

  void check_inside(const std::vector<int64_t>& list) const {
    const int64_t i = first_outside(list, patch, image);
    GLANCE_CHECK_VALUE(i < 0, kOp, "every patch inside the ", image[0], "x", image[1],
                       " image, got patch ", i, " of ", patch[0], "x", patch[1], " at row ",
                       list[2 * i], ", column ", list[2 * i + 1]);
  }

  // A patch's weights along one axis.
  std::vector<double> window(int axis) const {
    if (mode == "gaussian") return bell(patch[axis], parameter);
    return std::vector<double>(patch[axis], 1.0);
  }
};

// Arrays that are put together into one tensor on a device, so that one copy moves them.
template <typename From>
class Arrays {
 public:
  template <typename Pointer>
  void add(const std::vector<From>& values, Pointer* where) {
    places_.push_back({reinterpret_cast<const void**>(where), values_.size()});
    values_.insert(values_.end(), values.begin(), values.end());
  }
  at::Tensor put(at::Device device, at::ScalarType dtype) {
    const at::Tensor tensor =
        at::tensor(values_, c10::CppTypeToScalarType<From>::value).to(device, dtype);
    const char* data = static_cast<const char*>(tensor.const_data_ptr());
    for (const auto& [where, offset] : places_) *where = data + offset * tensor.itemsize();
    return tensor;
  }

 private:
  std::vector<From> values_;
  std::vector<std::pair<const void**, size_t>> places_;
};

// Everything about the patches that does not depend on the scores, on their device.
struct Geometry {
  Request request;
  bool is_grid = false;      // which of the two Params is filled, but for dtype, batch and data
  PatchScoresParams listed;  // any list of patches
  PatchGridParams grid;      // every pair of some rows and some columns
  std::vector<at::Tensor> tensors;
  int64_t bytes = 0;
  mutable std::atomic<bool> kept{false};  // by the cache, for as long as the process

  explicit Geometry(Request wanted) : request(std::move(wanted)) {
    const std::vector<int64_t> origins = request.origin_list();
    const int64_t patches = static_cast<int64_t>(origins.size()) / 2;
    GLANCE_CHECK_VALUE(patches <= std::numeric_limits<int32_t>::max(), kOp,
                       "fewer than 2^31 patches, got ", patches);
    request.check_inside(origins);
    GLANCE_CHECK_VALUE(patches > 0 || request.mode != "idw", kOp, "at least one patch, got 0");
    is_grid = fill_grid(origins);
    if (!is_grid) fill_list(origins);
    for (const at::Tensor& tensor : tensors) bytes += static_cast<int64_t>(tensor.nbytes());
    if (request.origins.defined()) bytes += static_cast<int64_t>(request.origins.nbytes());
  }

 private:
  at::ScalarType accumulate() const { return accumulate_dtype(request.accumulate); }

  bool fill_grid(const std::vector<int64_t>& origins) {
    std::vector<int64_t> rows, columns;
    if (std::max(request.image[0], request.image[1]) >= (int64_t{1} << 30) ||
        !product_of_starts(origins.data(), static_cast<int64_t>(origins.size()) / 2, rows,
                           columns)) {
      return false;
    }
    const AxisGeometry axes[2] = {axis_geometry(rows, request.image[0], request.window(0)),
                                  axis_geometry(columns, request.image[1], request.window(1))};
    grid.mode = parse_mode(request.mode);
    Arrays<double> numbers;
    DistanceTable table;
    if (grid.mode == PatchMode::kIdw) {
      const double smallest = accumulate() == at::kDouble ? 1e-200 : 1e-20;
      if (!distance_table(axes[0], axes[1], request.parameter, smallest, table)) return false;
      grid.table_pitch = table.pitch;
      grid.table_origin = table.origin;
      numbers.add(table.weight, &grid.table);
    } else {
      check_covered(first_uncovered(axes[0], axes[1]));
    }
    Arrays<int32_t> integers;
    for (int i = 0; i < 2; ++i) {
      PatchAxis& axis = i == 0 ? grid.rows : grid.columns;
      axis.size = axes[i].size;
      axis.patch = axes[i].patch;
      axis.count = static_cast<int64_t>(axes[i].starts.size());
      integers.add(axes[i].starts, &axis.starts);
      integers.add(axes[i].first, &axis.first);
      integers.add(axes[i].last, &axis.last);
      integers.add(axes[i].repeats, &axis.repeats);
      if (grid.mode == PatchMode::kWindow) numbers.add(axes[i].weight, &axis.weight);
    }
    tensors.push_back(integers.put(request.device, at::kInt));
    tensors.push_back(numbers.put(request.device, accumulate()));
    if (grid.mode == PatchMode::kIdw) sum_distance_weights();
    return true;
  }

  static void check_covered(std::array<int64_t, 2> uncovered) {
    GLANCE_CHECK_VALUE(uncovered[0] < 0, kOp,
                       "every pixel to be covered by a patch, got none over row ", uncovered[0],
                       ", column ", uncovered[1]);
  }

  // The sum of each pixel's weights: the map of scores of 1 before it is divided.
  void sum_distance_weights() {
    const auto options = at::TensorOptions().device(request.device).dtype(accumulate());
    const at::Tensor ones = at::ones({grid.rows.count, grid.columns.count}, options);
    const at::Tensor total = at::empty({grid.rows.size, grid.columns.size}, options);
    PatchGridParams p = grid;
    p.dtype = request.accumulate;
    p.batch = 1;
    p.scores = ones.const_data_ptr();
    p.map = total.mutable_data_ptr();
    run_kernel(ones, p, grid.rows.size, 1, aggregate_idw_grid_cpu,
               GLANCE_CUDA(aggregate_grid_cuda));
    grid.total = total.const_data_ptr();
    tensors.push_back(total);
  }

  void fill_list(const std::vector<int64_t>& origins) {
    PatchScoresParams& p = listed;
    p.mode = parse_mode(request.mode);
    if (p.mode != PatchMode::kIdw) {
      check_covered(first_uncovered(origins, request.patch, request.image));
    }
    p.power = p.mode == PatchMode::kIdw ? request.parameter : 0.0;
    p.patches = static_cast<int64_t>(origins.size()) / 2;
    p.height = request.image[0];
    p.width = request.image[1];
    p.patch_height = request.patch[0];
    p.patch_width = request.patch[1];
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
    Arrays<int64_t> integers;
    integers.add(origins, &p.origins);
    integers.add(begin, &p.row_begin);
    integers.add(by_row, &p.row_patches);
    Arrays<double> weights;
    weights.add(request.window(0), &p.weight_y);
    weights.add(request.window(1), &p.weight_x);
    tensors.push_back(integers.put(request.device, at::kLong));
    tensors.push_back(weights.put(request.device, accumulate()));
  }
};

// Checks all arguments and finds or makes the geometry.
std::shared_ptr<const Geometry> checked_geometry(const at::Tensor& scores,
                                                 const std::optional<at::Tensor>& origins,
                                                 at::IntArrayRef patch_size,
                                                 at::IntArrayRef image_size,
                                                 at::IntArrayRef stride_argument,
                                                 const std::string& mode, double parameter) {
  const ScalarType dtype = scalar_type(kOp, "scores", scores);
  parse_mode(mode);
  check_parameter(mode, parameter);
  const std::array<int64_t, 2> patch = pair(kOp, "patch_size", patch_size);
  const std::array<int64_t, 2> image = pair(kOp, "image_size", image_size);
  GLANCE_CHECK_VALUE(patch[0] > 0 && patch[1] > 0, kOp, "patch_size to be positive, got (",
                     patch[0], ", ", patch[1], ")");
  GLANCE_CHECK_VALUE(image[0] > 0 && image[1] > 0, kOp, "image_size to be positive, got (",
                     image[0], ", ", image[1], ")");
  const std::array<int64_t, 2> stride = pair(kOp, "stride", stride_argument);
  Request request{mode,
                  mode == "gaussian" || mode == "idw" ? parameter : 0.0,
                  patch,
                  image,
                  {0, 0},
                  {0, 0},
                  at::Tensor(),
                  scores.device(),
                  dtype == ScalarType::kFloat64 ? dtype : ScalarType::kFloat32};
  if (origins.has_value()) {
    GLANCE_CHECK_VALUE(scores.dim() == 2, kOp, "scores of shape (N, P) with origins, got ",
                       scores.sizes());
    GLANCE_CHECK_TYPE(origins->scalar_type() == at::kLong || origins->scalar_type() == at::kInt,
                      kOp, "origins to be int64 or int32, got ", dtype_name(*origins));
    GLANCE_CHECK_VALUE(
        origins->dim() == 2 && origins->size(0) == scores.size(1) && origins->size(1) == 2, kOp,
        "origins of shape (", scores.size(1), ", 2), got ", origins->sizes());
    request.origins = origins->to(at::kCPU).contiguous();
  } else {
    GLANCE_CHECK_VALUE(scores.dim() == 3, kOp,
                       "scores of shape (N, gh, gw) on a regular grid, got ", scores.sizes());
    GLANCE_CHECK_VALUE(stride[0] > 0 && stride[1] > 0, kOp, "stride to be positive, got (",
                       stride[0], ", ", stride[1], ")");
    request.grid = {scores.size(1), scores.size(2)};
    request.stride = stride;
  }
  // A detector calls with one or two geometries again and again; on a GPU a call that finds its own
  // copies nothing from the host. Never deleted: the CUDA driver may be shut down by then.
  static auto* const cache = new RecentCache<Request, Geometry>(16, int64_t{64} << 20);
  bool capturing = false;
#ifdef GLANCE_EXT_WITH_CUDA
  capturing = scores.is_cuda() &&
              c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
#endif
  std::shared_ptr<const Geometry> geometry = cache->find(request);
  TORCH_CHECK(geometry || !capturing, kOp,
              ": expected a call with the same patches before the capture of a CUDA graph, got "
              "none among the last");
  if (!geometry) {
    if (request.origins.defined()) request.origins = request.origins.clone();  // theirs may change
    geometry = std::make_shared<const Geometry>(std::move(request));
    cache->add(geometry);
  }
  if (capturing) geometry->kept = true;  // the graph has its addresses
#ifdef GLANCE_EXT_WITH_CUDA
  if (scores.is_cuda() && !capturing) {
    // Memory that the cache lets go of must not be used again before this stream has read it.
    const auto stream = c10::cuda::getCurrentCUDAStream(scores.get_device());
    for (const at::Tensor& tensor : geometry->tensors) {
      c10::cuda::CUDACachingAllocator::recordStream(tensor.storage().data_ptr(), stream);
    }
  }
#endif
  return geometry;
}

template <typename Params>
Params filled(const Params& geometry, const at::Tensor& scores) {
  Params p = geometry;
  p.dtype = scalar_type(kOp, "scores", scores);
  p.batch = scores.size(0);
  return p;
}

at::Tensor workspace(const at::Tensor& scores, at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::empty(sizes, scores.options().dtype(dtype));
}

at::Tensor aggregate_patch_scores(const at::Tensor& scores,
                                  const std::optional<at::Tensor>& origins,
                                  at::IntArrayRef patch_size, at::IntArrayRef image_size,
                                  at::IntArrayRef stride, c10::string_view mode, double parameter) {
  const DeviceGuard guard(scores);
  const auto geometry = checked_geometry(scores, origins, patch_size, image_size, stride,
                                         std::string(mode), parameter);
  const at::Tensor dense = scores.contiguous();
  const int64_t height = image_size[0], width = image_size[1];
  at::Tensor map = at::empty({scores.size(0), height, width}, scores.options());
  if (!geometry->is_grid) {
    PatchScoresParams p = filled(geometry->listed, scores);
    p.scores = dense.const_data_ptr();
    p.map = map.mutable_data_ptr();
    const int64_t work = p.mode == PatchMode::kIdw ? width * p.patches : 8 * width;
    run_kernel(scores, p, p.batch * height, grain_size(work), aggregate_cpu,
               GLANCE_CUDA(aggregate_cuda));
    return map;
  }
  PatchGridParams p = filled(geometry->grid, scores);
  p.scores = dense.const_data_ptr();
  p.map = map.mutable_data_ptr();
  at::Tensor spread;
  if (scores.is_cuda() && p.mode != PatchMode::kIdw) {
    spread = workspace(scores, {p.batch, p.rows.count, width}, accumulate_dtype(p.dtype));
    p.spread = spread.mutable_data_ptr();
  }
  if (p.mode == PatchMode::kIdw) {
    run_kernel(scores, p, height, 1, aggregate_idw_grid_cpu, GLANCE_CUDA(aggregate_grid_cuda));
  } else {
    run_kernel(scores, p, p.batch * height, grain_size(width), aggregate_grid_cpu,
               GLANCE_CUDA(aggregate_grid_cuda));
  }
  return map;
}

void backward_of_list(PatchScoresBackwardParams p, const at::Tensor& scores) {
  at::Tensor norm, best;
  if (p.mode == PatchMode::kMax) {
    best = workspace(scores, {p.batch, p.height, p.width}, at::kInt);
    p.best = best.mutable_data_ptr<int32_t>();
  } else {
    norm = workspace(scores, {2, p.height, p.width}, accumulate_dtype(p.dtype));
    p.norm = norm.mutable_data_ptr();
  }
#ifdef GLANCE_EXT_WITH_CUDA
  if (scores.is_cuda()) {
    run_kernel(scores, p, 0, 1, aggregate_backward_cpu, aggregate_backward_cuda);
    return;
  }
#endif
  const int64_t rows = p.mode == PatchMode::kMax ? p.batch * p.height : p.height;
  run_kernel(scores, p, rows, grain_size(p.width * 8), aggregate_prepare_cpu,
             GLANCE_CUDA(aggregate_backward_cuda));
  run_kernel(scores, p, p.patches, grain_size(p.batch * p.patch_height * p.patch_width),
             aggregate_backward_cpu, GLANCE_CUDA(aggregate_backward_cuda));
}

void backward_of_grid(PatchGridBackwardParams p, const at::Tensor& scores) {
  const int64_t height = p.rows.size, width = p.columns.size;
  const at::ScalarType accumulate = accumulate_dtype(p.dtype);
  at::Tensor best, best_column, share, spread;
  if (p.mode == PatchMode::kMax) {
    best = workspace(scores, {p.batch, height, width}, at::kInt);
    p.best = best.mutable_data_ptr<int32_t>();
  } else if (p.mode == PatchMode::kIdw) {
    p.share_pitch = (width + kGridPad - 1) / kGridPad * kGridPad;
    share = workspace(scores, {p.batch, height, p.share_pitch}, accumulate);
    p.share = share.mutable_data_ptr();
  }
#ifdef GLANCE_EXT_WITH_CUDA
  if (scores.is_cuda()) {
    if (p.mode != PatchMode::kIdw) {
      spread = workspace(scores, {p.batch, p.rows.count, width}, accumulate);
      p.spread = spread.mutable_data_ptr();
    }
    if (p.mode == PatchMode::kMax) {
      best_column = workspace(scores, {p.batch, p.rows.count, width}, at::kInt);
      p.best_column = best_column.mutable_data_ptr<int32_t>();
    }
    run_kernel(scores, p, 0, 1, aggregate_grid_backward_cpu, aggregate_grid_backward_cuda);
    return;
  }
#endif
  const auto cuda = GLANCE_CUDA(aggregate_grid_backward_cuda);
  if (p.mode == PatchMode::kMax) {
    run_kernel(scores, p, p.batch * height, grain_size(width), aggregate_grid_prepare_cpu, cuda);
  }
  if (p.mode == PatchMode::kIdw) {
    run_kernel(scores, p, p.batch * height, grain_size(width), aggregate_idw_grid_prepare_cpu,
               cuda);
    const int64_t work = p.batch * height * width;
    run_kernel(scores, p, p.rows.count * p.columns.count, grain_size(work),
               aggregate_idw_grid_backward_cpu, cuda);
  } else {
    run_kernel(scores, p, p.batch * p.rows.count, grain_size(4 * width),
               aggregate_grid_backward_cpu, cuda);
  }
}

at::Tensor aggregate_patch_scores_backward(const at::Tensor& grad_map, const at::Tensor& scores,
                                           const std::optional<at::Tensor>& origins,
                                           at::IntArrayRef patch_size, at::IntArrayRef stride,
                                           c10::string_view mode, double parameter) {
  const DeviceGuard guard(scores);
  GLANCE_CHECK_VALUE(grad_map.dim() == 3 && grad_map.size(0) == scores.size(0),
                     "aggregate_patch_scores_backward", "grad_map of shape (", scores.size(0),
                     ", H, W), got ", grad_map.sizes());
  GLANCE_CHECK_TYPE(grad_map.scalar_type() == scores.scalar_type(),
                    "aggregate_patch_scores_backward", "grad_map of the scores' ",
                    dtype_name(scores), ", got ", dtype_name(grad_map));
  const auto geometry = checked_geometry(scores, origins, patch_size, grad_map.sizes().slice(1),
                                         stride, std::string(mode), parameter);
  const at::Tensor dense = scores.contiguous(), grad = grad_map.contiguous();
  at::Tensor grad_scores = at::empty(scores.sizes(), scores.options());
  const auto fill = [&](auto& p) {
    p.scores = dense.const_data_ptr();
    p.grad_map = grad.const_data_ptr();
    p.grad_scores = grad_scores.mutable_data_ptr();
  };
  if (geometry->is_grid) {
    PatchGridBackwardParams p{filled(geometry->grid, scores)};
    fill(p);
    backward_of_grid(p, scores);
  } else {
    PatchScoresBackwardParams p{filled(geometry->listed, scores)};
    fill(p);
    backward_of_list(p, scores);
  }
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
