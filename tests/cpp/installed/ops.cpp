// A libtorch program with an installed glance_ext: smooths an image around its hole.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <iostream>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

int main() {
  const auto partial_conv2d =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("glance_ext::partial_conv2d", "")
          .typed<std::tuple<at::Tensor, at::Tensor>(
              const at::Tensor&, const at::Tensor&, const at::Tensor&,
              const std::optional<at::Tensor>&, c10::SymIntArrayRef, c10::SymIntArrayRef,
              c10::SymIntArrayRef, c10::SymInt, double)>();
  at::Tensor image = at::full({1, 1, 6, 6}, 5.0);
  at::Tensor mask = at::ones({6, 6}, at::kBool);
  image[0][0][2][2] = std::numeric_limits<float>::quiet_NaN();
  mask[2][2] = false;
  const at::Tensor weight = at::full({1, 1, 3, 3}, 1.0 / 9);
  const std::vector<c10::SymInt> one{1, 1};
  const auto [output, next] =
      partial_conv2d.call(image, mask, weight, std::nullopt, one, one, one, 1, 1.0);
  const bool right = at::allclose(output, at::full_like(output, 5.0)) && next.all().item<bool>();
  std::cout << (right ? "right" : "wrong") << std::endl;
  return right ? 0 : 1;
}
