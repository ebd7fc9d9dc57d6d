"""Function transforms: torch.func.grad and what is built of it, through every op."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacrev, jvp, vjp, vmap

from glance_ext.ops import aggregate_patch_scores, partial_conv2d
from tests.ops.cases import CASES, Case

differentiable_case = pytest.mark.parametrize(
    "case", [case for case in CASES if case.differentiable], ids=str
)


def first_result(case: Case, arguments: list[Any], *leaves: Tensor) -> Tensor:
    changes = dict(zip(case.differentiable, leaves, strict=True))
    return case.call([changes.get(i, value) for i, value in enumerate(arguments)])[0]


def by_autograd(case: Case, arguments: list[Any], cotangent: Tensor) -> tuple[Tensor, ...]:
    leaves = [arguments[i].detach().requires_grad_() for i in case.differentiable]
    return torch.autograd.grad(first_result(case, arguments, *leaves), leaves, cotangent)


@differentiable_case
def test_vjp_equals_autograd(case: Case, device: str) -> None:
    arguments = case.arguments(device)
    leaves = [arguments[i] for i in case.differentiable]
    output, pull = vjp(lambda *leaves: first_result(case, arguments, *leaves), *leaves)
    cotangent = torch.randn_like(output)
    assert torch.equal(output, case.call(arguments)[0])
    for got, expected in zip(pull(cotangent), by_autograd(case, arguments, cotangent), strict=True):
        assert torch.equal(got, expected)


@differentiable_case
def test_gradients_of_many_inputs_at_once(case: Case, device: str) -> None:
    """One gradient for each of three values of every leaf: vmap over grad."""
    calls = [case.arguments(device, seed=seed) for seed in range(3)]
    stacked = [torch.stack([call[i] for call in calls]) for i in case.differentiable]

    def loss(*leaves: Tensor) -> Tensor:
        return first_result(case, calls[0], *leaves).square().sum()

    places = tuple(range(len(stacked)))
    together = vmap(grad(loss, places))(*stacked)
    one_by_one = [grad(loss, places)(*(leaf[n] for leaf in stacked)) for n in range(3)]
    for got, *expected in zip(together, *one_by_one, strict=True):
        torch.testing.assert_close(got, torch.stack(expected))


@differentiable_case
def test_derivatives_that_do_not_exist_are_errors(case: Case, device: str) -> None:
    """Among them jacfwd over jacrev, in which the op itself sees no tangent, only its backward."""
    arguments = case.arguments(device)
    leaf = arguments[case.differentiable[0]]

    def loss(leaf: Tensor) -> Tensor:
        rest = [arguments[i] for i in case.differentiable[1:]]
        return first_result(case, arguments, leaf, *rest).square().sum()

    with pytest.raises(RuntimeError, match=f"^{case.op}: .* forward mode"):
        jvp(loss, (leaf,), (leaf,))
    with pytest.raises(RuntimeError, match=f"^{case.op}: .* forward mode"):
        hessian(loss)(leaf)
    with pytest.raises(RuntimeError, match=f"^{case.op}: .* second backward"):
        grad(lambda leaf: grad(loss)(leaf).sum())(leaf)


def convolved(image: Tensor, weight: Tensor) -> Tensor:
    mask = torch.ones(image.shape[-2:], dtype=torch.bool)
    mask[1:4, 2:] = False
    return partial_conv2d(image, mask, weight)[0]


def test_per_sample_gradients() -> None:
    images, weight = torch.randn(5, 2, 6, 6).double(), torch.randn(3, 2, 3, 3).double()

    def loss(weight: Tensor, image: Tensor) -> Tensor:
        return convolved(image[None], weight).square().sum()

    got = vmap(grad(loss), (None, 0))(weight, images)
    expected = torch.stack([grad(loss)(weight, image) for image in images])
    torch.testing.assert_close(got, expected)


def test_jacobian_is_that_of_autograd() -> None:
    image, weight = torch.randn(2, 2, 5, 6).double(), torch.randn(3, 2, 3, 3).double()
    got = jacrev(convolved, 1)(image, weight)
    expected = torch.autograd.functional.jacobian(lambda weight: convolved(image, weight), weight)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("outer", ["autograd", "grad"])
def test_gradient_passes_through_an_inner_transform_of_something_else(outer: str) -> None:
    """The op's forward must not switch off the gradients of the transforms around it."""
    image, weight = torch.randn(1, 2, 6, 6).double(), torch.randn(3, 2, 3, 3).double()

    def inner(scale: Tensor) -> Tensor:
        return grad(lambda t: t * convolved(image * scale, weight).sum())(torch.tensor(3.0))

    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=outer == "autograd")
    got = torch.autograd.grad(inner(scale), scale)[0] if outer == "autograd" else grad(inner)(scale)
    assert got.item() == pytest.approx(convolved(image, weight).sum().item())


@pytest.mark.parametrize("outer", ["autograd", "grad"])
def test_gradient_of_the_level_around_the_ops_own(outer: str) -> None:
    """Both levels track the op, and only the outer one is differentiated through it twice."""
    image, weight = torch.randn(1, 2, 6, 6).double(), torch.randn(3, 2, 3, 3).double()

    def inner(other: Tensor) -> Tensor:
        return grad(lambda w: (convolved(image, w) * other).sum())(weight).sum()

    other = torch.ones(1, dtype=torch.float64, requires_grad=outer == "autograd")
    with pytest.raises(RuntimeError, match="second backward"):  # the backward of grad_output too
        torch.autograd.grad(inner(other), other) if outer == "autograd" else grad(inner)(other)


def test_no_grad_inside_a_transform_is_obeyed() -> None:
    image, weight = torch.randn(1, 2, 6, 6), torch.randn(3, 2, 3, 3)

    def loss(weight: Tensor) -> Tensor:
        with torch.no_grad():
            fixed = convolved(image, weight)
        return (fixed * weight.sum()).sum()

    expected = convolved(image, weight).sum().expand_as(weight)
    torch.testing.assert_close(grad(loss)(weight), expected)


@pytest.mark.parametrize("transform", ["grad", "vmap of grad"])
def test_transforms_compile_in_one_graph(transform: str) -> None:
    torch._dynamo.reset()
    images, weight = torch.randn(3, 2, 6, 6), torch.randn(3, 2, 3, 3)

    def loss(weight: Tensor, image: Tensor) -> Tensor:
        return convolved(image, weight).square().sum()

    def gradient(weight: Tensor, images: Tensor) -> Tensor:
        if transform == "grad":
            return grad(loss)(weight, images)
        return vmap(grad(loss), (None, 0))(weight, images[:, None])

    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weight, images), gradient(weight, images))


def test_scores_of_a_map_by_grad() -> None:
    scores = torch.randn(2, 5, 5)
    got = grad(lambda s: aggregate_patch_scores(s, 4, 12, stride=2).sum())(scores)
    leaf = scores.clone().requires_grad_()
    aggregate_patch_scores(leaf, 4, 12, stride=2).sum().backward()
    assert torch.equal(got, leaf.grad)
