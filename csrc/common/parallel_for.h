// Threads as the kernels see them: the caller's.
#pragma once

#include <cstdint>
#include <functional>

namespace glance {

// Calls body(begin, end) on parts of [0, count).
using ParallelFor =
    std::function<void(int64_t count, const std::function<void(int64_t, int64_t)>& body)>;

}  // namespace glance
