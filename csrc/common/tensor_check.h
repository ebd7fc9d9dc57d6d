// What op files share: messages, dtypes, layouts, and where a kernel runs.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#ifdef GLANCE_EXT_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <functional>
#include <string>

#include "common/scalar.h"

namespace glance {

// A mistake in a value (ValueError) and in a type (TypeError): "op: expected ..., got ...".
#define GLANCE_CHECK_VALUE(condition, op, ...) \
  TORCH_CHECK_VALUE(condition, op, ": expected ", __VA_ARGS__)
#define GLANCE_CHECK_TYPE(condition, op, ...) \
  TORCH_CHECK_TYPE(condition, op, ": expected ", __VA_ARGS__)

// The dtype as Python writes it, without `torch.`.
inline std::string dtype_name(const at::Tensor& tensor) {
  return std::string(c10::getDtypeNames(tensor.scalar_type()).first);
}

inline ScalarType scalar_type(const char* op, const char* argument, const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return ScalarType::kFloat32;
    case at::kDouble:
      return ScalarType::kFloat64;
    case at::kHalf:
      return ScalarType::kFloat16;
    case at::kBFloat16:
      return ScalarType::kBFloat16;
    default:
      TORCH_CHECK_TYPE(false, op, ": expected ", argument,
                       " to be float32, float64, float16 or bfloat16, got ", dtype_name(tensor));
  }
}

inline at::ScalarType accumulate_dtype(ScalarType dtype) {
  return dtype == ScalarType::kFloat64 ? at::kDouble : at::kFloat;
}

// That a tensor has the dtype and the device of another argument.
inline void check_like(const char* op, const char* name, const at::Tensor& tensor,
                       const char* other, const at::Tensor& like) {
  GLANCE_CHECK_TYPE(tensor.scalar_type() == like.scalar_type(), op, name, " of the ", other, "'s ",
                    dtype_name(like), ", got ", dtype_name(tensor));
  GLANCE_CHECK_VALUE(tensor.device() == like.device(), op, name, " on the ", other, "'s device ",
                     like.device(), ", got ", tensor.device());
}

// The layout that outputs take from an input: channels_last only where it is unambiguous.
inline at::MemoryFormat memory_format(const at::Tensor& tensor) {
  const bool channels_last =
      !tensor.is_contiguous() && tensor.is_contiguous(at::MemoryFormat::ChannelsLast);
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// A list of sizes as (height, width); the schema's `SymInt[2]` does not count them.
inline std::array<int64_t, 2> pair(const char* op, const char* argument, at::IntArrayRef values) {
  GLANCE_CHECK_VALUE(values.size() == 2, op, argument, " to be (height, width), got ", values);
  return {values[0], values[1]};
}

// Makes `tensor`'s device current for a scope, where there is such a thing.
class DeviceGuard {
 public:
  explicit DeviceGuard(const at::Tensor& tensor) {
#ifdef GLANCE_EXT_WITH_CUDA
    if (tensor.is_cuda()) guard_.set_device(tensor.device());
#endif
    (void)tensor;
  }

 private:
#ifdef GLANCE_EXT_WITH_CUDA
  c10::cuda::OptionalCUDAGuard guard_;
#endif
};

// torch's threads, for kernels that share out their work themselves (a ParallelFor).
inline void parallel_units(int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(begin, end); });
}

// Runs a kernel on the device of `on`: the launcher on the current stream, or the range function
// over `rows` with torch's threads, each taking at least `grain` of them.
template <typename Params, typename Cpu, typename Cuda>
void run_kernel(const at::Tensor& on, const Params& params, int64_t rows, int64_t grain, Cpu cpu,
                Cuda cuda) {
#ifdef GLANCE_EXT_WITH_CUDA
  if (on.is_cuda()) {
    const int error = cuda(params, c10::cuda::getCurrentCUDAStream(on.get_device()).stream());
    C10_CUDA_CHECK(static_cast<cudaError_t>(error));
    return;
  }
#endif
  (void)cuda;
  TORCH_INTERNAL_ASSERT(on.is_cpu());
  at::parallel_for(0, rows, grain > 0 ? grain : 1,
                   [&](int64_t begin, int64_t end) { cpu(params, begin, end); });
}

// The same where rows cost differently: threads take blocks of at least `grain` rows as they come.
template <typename Params, typename Cpu, typename Cuda>
void run_kernel_in_blocks(const at::Tensor& on, const Params& params, int64_t rows, int64_t grain,
                          Cpu cpu, Cuda cuda) {
  if (!on.is_cpu()) return run_kernel(on, params, rows, grain, cpu, cuda);
  constexpr int64_t kBlocksPerThread = 8;
  const int64_t threads = at::get_num_threads();
  const int64_t block = std::max(grain, rows / (threads * kBlocksPerThread));
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min(threads, (rows + block - 1) / block), 1, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(block)) < rows;) {
      cpu(params, begin, std::min(begin + block, rows));
    }
  });
}

// The CUDA launcher of a kernel, or a stand-in that is never called in a CPU build.
#ifdef GLANCE_EXT_WITH_CUDA
#define GLANCE_CUDA(launcher) launcher
#else
#define GLANCE_CUDA(launcher) nullptr
#endif

// Rows of `row_size` elements that make a thread's start worth its while.
inline int64_t grain_size(int64_t row_size) { return 1 + 16384 / (row_size > 0 ? row_size : 1); }

}  // namespace glance
