#include <algorithm>
#include <memory>
#include <vector>

#include "hole_windows/hole_windows.h"

namespace glance {
namespace {

constexpr int64_t kInputBytes = 256 * 1024;  // of a layer's windows in flight: a quarter of an L2
constexpr int64_t kMostWindows = 64;

int64_t element_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::kFloat64:
      return 8;
    case ScalarType::kFloat32:
      return 4;
    default:
      return 2;
  }
}

// The windows shrink from layer to layer. So a late layer takes many of them at a time, which its
// large weights are read for, and has the layer before make its input in smaller groups.
class Sequence {
 public:
  Sequence(const HoleLayer* layers, int64_t count) : layers_(layers, layers + count) {
    const int64_t item = element_size(layers->input().dtype);
    groups_.resize(count);
    buffers_.resize(count);
    int64_t most = kMostWindows;
    for (int64_t i = count - 1; i >= 0; --i) {
      if (i > 0) {
        const int64_t bytes = std::max<int64_t>(1, layers_[i - 1].output_size() * item);
        most = std::clamp<int64_t>(kInputBytes / bytes, 1, most);
        buffers_[i - 1].reset(new char[most * bytes]);
      }
      groups_[i] = most;
    }
  }

  void run(int64_t begin, int64_t end) { through(layers_.size() - 1, begin, end); }

 private:
  // Windows [begin, end) through the layers up to `index`; begin is the first in its output.
  void through(int64_t index, int64_t begin, int64_t end) {
    HoleLayer& layer = layers_[index];
    for (int64_t b = begin; b < end; b += groups_[index]) {
      const int64_t last = std::min(b + groups_[index], end);
      const void* windows = nullptr;
      if (index > 0) {
        HoleLayer& before = layers_[index - 1];
        windows = buffers_[index - 1].get();
        (before.is_pool() ? before.pool.output : before.conv.output) = buffers_[index - 1].get();
        (before.is_pool() ? before.pool.first_output : before.conv.first_output) = b;
        through(index - 1, b, last);
      }
      if (layer.is_pool()) {
        layer.pool.windows = windows;
        layer.pool.first_window = b;
        hole_max_pool_cpu(layer.pool, b, last);
      } else {
        layer.conv.windows = windows;
        layer.conv.first_window = b;
        hole_conv_cpu(layer.conv, b, last);
      }
    }
  }

  std::vector<HoleLayer> layers_;
  std::vector<int64_t> groups_;                   // windows that each layer takes at a time
  std::vector<std::unique_ptr<char[]>> buffers_;  // each layer's output but the last's
};

}  // namespace

void hole_sequence_cpu(const HoleLayer* layers, int64_t count, int64_t begin, int64_t end) {
  Sequence(layers, count).run(begin, end);
}

}  // namespace glance
