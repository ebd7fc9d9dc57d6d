// Every op of glance_ext: its schema. Kernels are registered in the *_op.cpp files, fakes and
// autograd formulas in glance_ext/ops/*.py.
#include <torch/library.h>

TORCH_LIBRARY(glance_ext, m) {
  // (output, mask_out); csrc/partial_conv/partial_conv.h
  m.def(
      "partial_conv2d(Tensor input, Tensor mask, Tensor weight, Tensor? bias, SymInt[2] stride, "
      "SymInt[2] padding, SymInt[2] dilation, SymInt groups, float negative_slope=1.0) "
      "-> (Tensor, Tensor)");
  // (grad_input, grad_weight, grad_bias), each empty where output_mask says that nobody asks; the
  // output is needed where there is an activation
  m.def(
      "partial_conv2d_backward(Tensor grad_output, Tensor input, Tensor mask, Tensor weight, "
      "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, "
      "bool[3] output_mask, Tensor? output=None, float negative_slope=1.0) "
      "-> (Tensor, Tensor, Tensor)");

  // map (N, H, W); csrc/patch_scores/patch_scores.h. `parameter` is gaussian's sigma as a share of
  // the patch, or idw's power.
  m.def(
      "aggregate_patch_scores(Tensor scores, Tensor? origins, SymInt[2] patch_size, "
      "SymInt[2] image_size, SymInt[2] stride, str mode, float parameter) -> Tensor");
  m.def(
      "aggregate_patch_scores_backward(Tensor grad_map, Tensor scores, Tensor? origins, "
      "SymInt[2] patch_size, SymInt[2] stride, str mode, float parameter) -> Tensor");

  // Windows of features that holes change, (N, P, C, h, w); csrc/hole_windows/hole_windows.h.
  // tiles (N, P, C, th, tw)
  m.def(
      "gather_holes(Tensor base, Tensor? windows, Tensor extents, Tensor origins, "
      "SymInt[2] tile_size, float fill) -> Tensor");
  // (grad_base, grad_windows), each empty where output_mask says that nobody asks
  m.def(
      "gather_holes_backward(Tensor grad_tiles, Tensor base, Tensor? windows, Tensor extents, "
      "Tensor origins, bool[2] output_mask) -> (Tensor, Tensor)");
  // the next layer's windows (N, P, C, ho, wo)
  m.def(
      "hole_max_pool2d(Tensor base, Tensor? windows, Tensor extents, Tensor origins, "
      "SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, "
      "SymInt[2] window_size) -> Tensor");
  // (grad_base, grad_windows)
  m.def(
      "hole_max_pool2d_backward(Tensor grad_output, Tensor base, Tensor? windows, Tensor extents, "
      "Tensor origins, SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, "
      "SymInt[2] dilation, bool[2] output_mask) -> (Tensor, Tensor)");
  // the next layer's windows (N, P, K, ho, wo)
  m.def(
      "hole_conv2d(Tensor base, Tensor? windows, Tensor extents, Tensor origins, Tensor cells, "
      "Tensor ratio, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[2] padding, "
      "SymInt[2] dilation, float negative_slope) -> Tensor");
  // (grad_base, grad_windows, grad_weight, grad_bias)
  m.def(
      "hole_conv2d_backward(Tensor grad_output, Tensor output, Tensor base, Tensor? windows, "
      "Tensor extents, Tensor origins, Tensor ratio, Tensor weight, SymInt[2] stride, "
      "SymInt[2] padding, SymInt[2] dilation, float negative_slope, bool[4] output_mask) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  // the last layer's windows; a layer without a weight is a max-pooling, and `settings` has its
  // kernel, stride, padding and dilation. No autograd: for inference.
  m.def(
      "hole_sequence(Tensor[] bases, Tensor[] extents, Tensor[] origins, Tensor[] cells, "
      "Tensor[] ratios, Tensor?[] weights, Tensor?[] biases, SymInt[] settings, "
      "float[] negative_slopes) -> Tensor");

  // conv2d of stride 1 without padding; csrc/winograd/winograd_conv.h. No autograd: for inference.
  m.def("winograd_conv2d(Tensor input, Tensor weight, Tensor? bias) -> Tensor");
}
