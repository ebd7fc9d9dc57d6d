// glance_ops from a C++ program: the ops are registered, run, and are differentiable no further
// than their backward ops (autograd formulas live in Python).
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <tuple>

#include "check.h"

using Pair = std::tuple<at::Tensor, at::Tensor>;

int main() {
  const auto find = [](const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  };
  const at::Tensor input = at::randn({2, 3, 9, 9}), weight = at::randn({4, 3, 3, 3});
  const auto conv =
      find("glance_ext::partial_conv2d")
          .typed<Pair(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                      const std::optional<at::Tensor>&, c10::SymIntArrayRef, c10::SymIntArrayRef,
                      c10::SymIntArrayRef, c10::SymInt, double)>();
  const std::vector<c10::SymInt> one{1, 1}, zero{0, 0};
  const auto [output, mask] =
      conv.call(input, at::ones({9, 9}), weight, std::nullopt, one, zero, one, 1, 1.0);
  EXPECT(at::allclose(output, at::conv2d(input, weight), 1e-4, 1e-5));
  EXPECT(mask.sizes() == at::IntArrayRef({1, 1, 7, 7}) && mask.all().item<bool>());

  const auto aggregate = find("glance_ext::aggregate_patch_scores")
                             .typed<at::Tensor(const at::Tensor&, const std::optional<at::Tensor>&,
                                               c10::SymIntArrayRef, c10::SymIntArrayRef,
                                               c10::SymIntArrayRef, c10::string_view, double)>();
  const std::vector<c10::SymInt> four{4, 4}, eight{8, 8};
  const at::Tensor scores = at::arange(4.0).reshape({1, 2, 2});
  const at::Tensor map = aggregate.call(scores, std::nullopt, four, eight, four, "mean", 0.0);
  EXPECT(at::equal(map, scores.repeat_interleave(4, 1).repeat_interleave(4, 2)));
  return glance_test::finish("op_library");
}
