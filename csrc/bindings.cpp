// The Python module glance_ext._C. Importing it registers the ops; all it offers itself is what it
// was built with, for `glance-ext doctor` and for the message when it no longer fits, and the
// choice of a path for tests and benchmarks.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>

#include <atomic>
#include <string>

#include "partial_conv/partial_conv_paths.h"

namespace {

pybind11::dict build_config() {
  pybind11::dict config;
  config["torch"] = GLANCE_EXT_TORCH_VERSION;
  config["cuda"] = GLANCE_EXT_CUDA_VERSION;    // "" in a CPU build
  config["arch_list"] = GLANCE_EXT_ARCH_LIST;  // as TORCH_CUDA_ARCH_LIST, "" in a CPU build
  config["python"] = PY_VERSION;
#if defined(__clang__)
  config["compiler"] = std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  config["compiler"] = std::string("gcc ") + __VERSION__;
#else
  config["compiler"] = "unknown";
#endif
  return config;
}

// How many threads share a parallel loop of this module; 1 if it was built without torch's OpenMP.
int64_t parallel_threads() {
  std::atomic<int64_t> parts{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) { ++parts; });
  return parts;
}

// Takes "rule", "fused" or "library" and returns the one before.
std::string partial_conv_path(const std::string& path) {
  using glance::PartialConvPath;
  constexpr const char* kNames[] = {"rule", "fused", "library"};
  for (int i = 0; i < 3; ++i) {
    if (path == kNames[i]) {
      return kNames[int(glance::exchange_partial_conv_path(PartialConvPath(i)))];
    }
  }
  throw pybind11::value_error("partial_conv_path: expected rule, fused or library, got " + path);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_config", &build_config, "What this module was built with and for.");
  m.def("parallel_threads", &parallel_threads, "Threads that share a loop of a CPU kernel.");
  m.def("partial_conv_path", &partial_conv_path, "Sets the path of partial_conv2d.");
}
