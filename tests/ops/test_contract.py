"""What every op of glance_ext keeps. An op without a case in cases.py fails."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from glance_ext.ops import aggregate_patch_scores, partial_conv2d
from tests.ops.cases import CASES, Case

OPS = sorted(
    name.removeprefix("glance_ext::").partition(".")[0]
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("glance_ext::")
)
every_case = pytest.mark.parametrize("case", CASES, ids=str)
differentiable_case = pytest.mark.parametrize(
    "case", [case for case in CASES if case.differentiable], ids=str
)


def tensors_of(arguments: list[Any]) -> dict[int, Tensor]:
    return {i: value for i, value in enumerate(arguments) if isinstance(value, Tensor)}


def images_of(arguments: list[Any]) -> dict[int, Tensor]:
    return {i: tensor for i, tensor in tensors_of(arguments).items() if tensor.dim() == 4}


def is_channels_last(tensor: Tensor) -> bool:
    """Whether channels are the fastest dimension, also of windows ``(N, P, C, h, w)``."""
    if tensor.dim() == 5:
        tensor = tensor.flatten(0, 1)
    return tensor.is_contiguous(memory_format=torch.channels_last)


def replaced(arguments: list[Any], changes: dict[int, Any]) -> list[Any]:
    return [changes.get(i, value) for i, value in enumerate(arguments)]


def with_gradients(case: Case, arguments: list[Any]) -> list[Any]:
    leaves = {i: arguments[i].detach().requires_grad_() for i in case.differentiable}
    return replaced(arguments, leaves)


def leaves_of(case: Case, arguments: list[Any]) -> list[Tensor]:
    return [arguments[i] for i in case.differentiable]


def gradients(case: Case, arguments: list[Any], grad: Tensor | None = None) -> list[Tensor]:
    """The gradients of the op's first result, for a random ``grad`` if none is given."""
    output = case.call(arguments)[0]
    if grad is None:
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output)
    return list(torch.autograd.grad(output, leaves_of(case, arguments), grad))


def assert_all_equal(actual: Any, expected: Any) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)


def assert_all_close(actual: Any, expected: Any) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


# Non-contiguous copies. What lies between the elements must not be read: NaN, or a large number.


def _garbage(tensor: Tensor, shape: list[int]) -> Tensor:
    return tensor.new_full(shape, float("nan") if tensor.is_floating_point() else 113)


def every_second(tensor: Tensor) -> Tensor:
    wide = _garbage(tensor, [2 * size for size in tensor.shape])
    view = wide[tuple(slice(None, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor.detach())


def inner_window(tensor: Tensor) -> Tensor:
    wide = _garbage(tensor, [size + 3 for size in tensor.shape])
    view = wide[tuple(slice(1, 1 + size) for size in tensor.shape)]
    return view.copy_(tensor.detach())


def reversed_order(tensor: Tensor) -> Tensor:
    dims = list(reversed(range(tensor.dim())))
    return tensor.detach().permute(dims).contiguous().permute(dims)


def expanded(tensor: Tensor) -> Tensor:
    return tensor.detach()[:1].expand(tensor.shape)


LAYOUTS = [every_second, inner_window, reversed_order, expanded]
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)


def applies(layout: Callable[[Tensor], Tensor], tensor: Tensor) -> bool:
    """Origins that are all the same cover no image."""
    return layout is not expanded or tensor.dtype not in (torch.int32, torch.int64)


image_case = pytest.mark.parametrize(
    "case", [case for case in CASES if images_of(case.arguments("cpu"))], ids=str
)


def test_every_op_has_a_case() -> None:
    assert OPS
    assert sorted({case.op for case in CASES}) == OPS


@every_case
def test_opcheck(case: Case, device: str) -> None:
    arguments = with_gradients(case, case.arguments(device, torch.float32))
    torch.library.opcheck(case.overload(), tuple(case.pack(arguments)))


@differentiable_case
def test_gradcheck(case: Case, device: str) -> None:
    arguments = with_gradients(case, case.arguments(device))

    def first_result(*leaves: Tensor) -> Tensor:
        changes = dict(zip(case.differentiable, leaves, strict=True))
        return case.call(replaced(arguments, changes))[0]

    assert torch.autograd.gradcheck(first_result, tuple(leaves_of(case, arguments)))


@differentiable_case
def test_second_backward_is_an_error(case: Case, device: str) -> None:
    arguments = with_gradients(case, case.arguments(device))
    leaves = leaves_of(case, arguments)
    output = case.call(arguments)[0]
    grads = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
    total = torch.stack([grad.sum() for grad in grads]).sum()
    with pytest.raises(RuntimeError, match=f"{case.op}: expected to be differentiated once"):
        torch.autograd.grad(total, leaves)


@every_case
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_fake_has_the_real_shape_dtype_and_strides(case: Case, layout: str, device: str) -> None:
    arguments = case.arguments(device, torch.float32)
    if layout == "channels_last":
        for i, tensor in images_of(arguments).items():
            arguments[i] = tensor.to(memory_format=torch.channels_last)
    real = case.call(arguments)
    meta = {i: t.to("meta") for i, t in tensors_of(arguments).items()}
    for got, expected in zip(case.call(replaced(arguments, meta)), real, strict=True):
        assert got.shape == expected.shape
        assert got.dtype == expected.dtype
        assert got.stride() == expected.stride()


@every_case
def test_compiles_in_one_graph(case: Case, device: str) -> None:
    torch._dynamo.reset()
    arguments = with_gradients(case, case.arguments(device))
    compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager")
    result = compiled(arguments)
    assert_all_equal(result, case.call(arguments))
    if case.differentiable:
        leaves = leaves_of(case, arguments)
        grad = torch.randn_like(result[0])
        assert_all_equal(
            torch.autograd.grad(result[0], leaves, grad), gradients(case, arguments, grad)
        )


@every_case
def test_exports_with_any_batch_size(case: Case, device: str) -> None:
    arguments = case.arguments(device)
    positions = list(tensors_of(arguments))

    class Call(nn.Module):
        def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            return case.call(replaced(arguments, dict(zip(positions, tensors, strict=True))))

    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} if i in case.batched else {} for i in positions)
    tensors = tuple(tensors_of(arguments).values())
    program = torch.export.export(Call(), tensors, dynamic_shapes=(shapes,)).module()
    other = case.arguments(device, seed=1, batch=5)
    assert_all_equal(program(*tensors_of(other).values()), case.call(other))


@every_case
@every_layout
def test_layout_of_an_argument_does_not_matter(
    case: Case, layout: Callable[[Tensor], Tensor], device: str
) -> None:
    arguments = case.arguments(device)
    for i, tensor in tensors_of(arguments).items():
        if not applies(layout, tensor):
            continue
        view = layout(tensor)
        changed = replaced(arguments, {i: view})
        plain = replaced(arguments, {i: view.contiguous()})
        assert_all_equal(case.call(changed), case.call(plain))
        if case.differentiable and i in case.differentiable:
            assert_all_equal(
                gradients(case, with_gradients(case, changed)),
                gradients(case, with_gradients(case, plain)),
            )


@differentiable_case
@every_layout
def test_layout_of_a_gradient_does_not_matter(
    case: Case, layout: Callable[[Tensor], Tensor], device: str
) -> None:
    arguments = with_gradients(case, case.arguments(device))
    grad = layout(torch.randn_like(case.call(arguments)[0]))
    assert not grad.is_contiguous()
    assert_all_equal(
        gradients(case, arguments, grad), gradients(case, arguments, grad.contiguous())
    )


@image_case
def test_channels_last_is_kept_and_changes_nothing(case: Case, device: str) -> None:
    arguments = case.arguments(device)
    images = images_of(arguments)
    last = {i: t.to(memory_format=torch.channels_last) for i, t in images.items()}
    changed = replaced(arguments, last)
    results = case.call(changed)
    assert_all_close(results, case.call(arguments))
    assert is_channels_last(results[0])
    if case.differentiable:
        grads = gradients(case, with_gradients(case, changed))
        assert_all_close(grads, gradients(case, with_gradients(case, arguments)))
        for grad in grads:
            if grad.dim() >= 4:
                assert is_channels_last(grad)


@every_case
def test_empty_batch(case: Case, device: str) -> None:
    whole = case.call(case.arguments(device, batch=3))
    arguments = with_gradients(case, case.arguments(device, batch=0))
    for got, of_three in zip(case.call(arguments), whole, strict=True):
        batched = of_three.dim() > 1 and of_three.shape[0] == 3
        assert got.shape == (0, *of_three.shape[1:]) if batched else of_three.shape
        assert got.dtype == of_three.dtype
        if not got.requires_grad and got.is_floating_point() and case.op.endswith("_backward"):
            assert not got.any()  # a sum over nothing
    if case.differentiable:
        leaves = leaves_of(case, arguments)
        for leaf, grad in zip(leaves, gradients(case, arguments), strict=True):
            assert grad.shape == leaf.shape
            assert not grad.any()


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_result_is_the_same_every_time_and_for_any_number_of_threads(
    case: Case, dtype: torch.dtype, device: str
) -> None:
    arguments = case.arguments(device, dtype, batch=256)
    first = case.call(arguments)
    assert_all_equal(case.call(arguments), first)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for i, (got, expected) in enumerate(zip(case.call(arguments), first, strict=True)):
                if i not in case.summed_by_torch:
                    assert_all_equal([got], [expected])
    finally:
        torch.set_num_threads(threads)


@every_case
@pytest.mark.filterwarnings("error")  # that there is no rule, and a slow one of torch's runs
def test_vmap_equals_a_loop(case: Case, device: str) -> None:
    calls = [case.arguments(device, seed=seed) for seed in range(3)]
    positions = list(tensors_of(calls[0]))
    for mapped in [*([i] for i in positions), positions]:
        for out_of in (0, 1):
            in_dims = tuple(out_of if i in mapped else None for i in range(len(calls[0])))
            stacked = {i: torch.stack([call[i] for call in calls], out_of) for i in mapped}
            got = torch.func.vmap(lambda *a: case.call(list(a)), in_dims)(
                *replaced(calls[0], stacked)
            )
            rows = [case.call(replaced(calls[0], {i: c[i] for i in mapped})) for c in calls]
            assert_all_close(got, [torch.stack(column) for column in zip(*rows, strict=True)])


class CountCalls(TorchDispatchMode):
    """How often glance_ext's kernels run."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += func.namespace == "glance_ext"
        return func(*args, **(kwargs or {}))


@differentiable_case
def test_vmap_over_the_first_argument_is_one_call_unless_others_have_a_batch(
    case: Case, device: str
) -> None:
    arguments = case.arguments(device)
    in_dims = (0, *[None] * (len(arguments) - 1))
    stacked = replaced(arguments, {0: torch.stack([arguments[0]] * 3)})
    with CountCalls() as calls:
        torch.func.vmap(case.overload(), in_dims)(*stacked)
    assert calls.count == (1 if case.batched == (0,) else 3)


@differentiable_case
@pytest.mark.filterwarnings("error")
def test_batched_gradients_equal_a_loop(case: Case, device: str) -> None:
    arguments = with_gradients(case, case.arguments(device))
    output = case.call(arguments)[0]
    leaves = leaves_of(case, arguments)
    grads = torch.randn(3, *output.shape, dtype=output.dtype, device=output.device)
    got = torch.autograd.grad(output, leaves, grads, retain_graph=True, is_grads_batched=True)
    rows = [torch.autograd.grad(output, leaves, grad, retain_graph=True) for grad in grads]
    assert_all_close(got, [torch.stack(column) for column in zip(*rows, strict=True)])


@every_case
def test_autocast_lowers_what_it_should_and_nothing_else(case: Case, device: str) -> None:
    arguments = case.arguments(device, torch.float32)
    low = {i: arguments[i].bfloat16() for i in case.lowered}
    if case.lowered and arguments[1].is_floating_point():
        low[1] = arguments[1].bfloat16()  # the mask's dtype has to be the input's
    expected = list(case.call(replaced(arguments, low)))
    if case.op == "partial_conv2d":
        assert expected[0].dtype == torch.bfloat16
        expected[1] = expected[1].to(arguments[1].dtype)  # the mask keeps its own
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        got = case.call(arguments)
    assert_all_equal(got, expected)


@differentiable_case
def test_autocast_gradients_have_the_parameters_dtype(case: Case, device: str) -> None:
    arguments = with_gradients(case, case.arguments(device, torch.float32))
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        output = case.call(arguments)[0]
    for grad in torch.autograd.grad(output.float().sum(), leaves_of(case, arguments)):
        assert grad.dtype == torch.float32
        assert grad.isfinite().all()


@every_case
@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_a_device_that_is_not_the_current_one(case: Case) -> None:
    other = f"cuda:{torch.cuda.device_count() - 1}"
    assert torch.cuda.current_device() == 0
    arguments = case.arguments(other)
    on_cpu = replaced(arguments, {i: t.cpu() for i, t in tensors_of(arguments).items()})
    results = case.call(arguments)
    assert all(result.device == torch.device(other) for result in results)
    assert_all_close([result.cpu() for result in results], case.call(on_cpu))


def test_forward_mode_is_an_error_that_names_the_op() -> None:
    image, weight = torch.randn(1, 2, 8, 8), torch.randn(3, 2, 3, 3)
    mask = torch.ones(8, 8, dtype=torch.bool)
    scores = torch.randn(1, 2, 2)
    calls = {
        "partial_conv2d": (lambda x: partial_conv2d(x, mask, weight)[0], image),
        "aggregate_patch_scores": (lambda s: aggregate_patch_scores(s, 4, 8, stride=4), scores),
    }
    for op, (call, at) in calls.items():
        with pytest.raises(RuntimeError, match=rf"{op}: .* forward mode"):
            torch.func.jvp(call, (at,), (torch.ones_like(at),))
