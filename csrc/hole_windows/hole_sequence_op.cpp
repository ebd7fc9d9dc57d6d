// Layers of tensors -> HoleLayers -> kernels, for glance_ext::hole_sequence.
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "hole_windows/hole_ops.h"

namespace glance {
namespace {

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
        bind(kHolePool, to.pool, layer, windows, to.pool.origins);
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
    bind(kHoleConv, p, layer, windows, p.origins);
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

TORCH_LIBRARY_IMPL(glance_ext, CPU, m) { m.impl("hole_sequence", &hole_sequence); }

#ifdef GLANCE_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(glance_ext, CUDA, m) { m.impl("hole_sequence", &hole_sequence); }
#endif

}  // namespace glance
