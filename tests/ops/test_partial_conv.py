"""partial_conv2d: its numbers, its masks, its messages."""

import itertools
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from glance_ext.ops import partial_conv2d, reference
from glance_ext.testing import assert_matches_reference
from tests.ops.bad_calls import assert_all_forms_say

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
native = torch.ops.glance_ext.partial_conv2d
property_test = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@dataclass
class Call:
    """Arguments of the torch op, with garbage behind the mask."""

    input: Tensor
    mask: Tensor
    weight: Tensor
    bias: Tensor | None
    geometry: tuple[list[int], list[int], list[int], int]

    def to(self, dtype: torch.dtype, device: str = "cpu") -> list[Any]:
        """The arguments in ``dtype``, a mask of the input's dtype included."""

        def cast(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        tensors = [cast(t) for t in (self.input, self.mask, self.weight, self.bias)]
        return [*tensors, *self.geometry]

    def valid(self) -> Tensor:
        """The mask as (1 or N, 1 or C, H, W) bool."""
        mask = self.mask
        if mask.dim() == 2:
            mask = mask[None, None]
        elif mask.dim() == 3:
            mask = mask[:, None]
        return mask != 0


@st.composite
def calls(draw: st.DrawFn, dtype: torch.dtype, largest: int = 9) -> Call:
    def size(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    n, groups = size(0, 3), size(1, 3)
    c, k = groups * size(1, 3), groups * size(1, 3)
    kernel, stride = [size(1, 4), size(1, 4)], [size(1, 3), size(1, 3)]
    padding, dilation = [size(0, 3), size(0, 3)], [size(1, 2), size(1, 2)]
    sides = []
    for axis in range(2):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        least = max(1, reach - 2 * padding[axis])
        sides.append(size(least, max(least, largest)))
    batch = draw(st.sampled_from([1, n]))
    channels = draw(st.sampled_from([1, c]))
    shape = draw(st.sampled_from([sides, [n, *sides], [batch, channels, *sides]]))
    kind = draw(st.sampled_from([torch.bool, torch.uint8, dtype]))
    seed, share = size(0, 2**31 - 1), draw(st.sampled_from([0.0, 0.2, 0.6, 1.0]))

    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    choices = {torch.bool: [1], torch.uint8: [1, 2, 255]}.get(kind, [1, 0.25, -3])
    values = torch.tensor(choices, dtype=kind)
    mask = values[torch.randint(len(choices), shape, generator=random)]
    mask[torch.rand(shape, generator=random) >= share] = 0
    call = Call(
        normal(n, c, *sides),
        mask,
        normal(k, c // groups, *kernel),
        normal(k) if draw(st.booleans()) else None,
        (stride, padding, dilation, groups),
    )
    garbage = torch.tensor([float("nan"), float("inf"), -float("inf"), 6e4], dtype=dtype)
    chosen = garbage[torch.randint(4, call.input.shape, generator=random)]
    call.input = torch.where(call.valid(), call.input, chosen)
    if draw(st.booleans()):
        call.input = call.input.contiguous(memory_format=torch.channels_last)
    return call


def with_gradients(op: Any, arguments: list[Any], grad: Tensor) -> tuple[Tensor, ...]:
    """Output, mask and the gradients of input, weight and, if there is one, bias."""
    leaves = {
        i: arguments[i].detach().requires_grad_() for i in (0, 2, 3) if arguments[i] is not None
    }
    output, mask_out = op(*(leaves.get(i, value) for i, value in enumerate(arguments)))
    grads = torch.autograd.grad(output, list(leaves.values()), grad.to(output))
    return output, mask_out, *grads


def absolute(arguments: list[Any]) -> list[Any]:
    """The call with all terms positive: its results bound the numbers that are added up."""
    input, mask, weight, bias, *geometry = arguments
    return [input.abs(), mask, weight.abs(), None if bias is None else bias.abs(), *geometry]


@every_dtype
@property_test
@given(data=st.data())
def test_native_op_matches_the_reference_forward_and_backward(
    dtype: torch.dtype, device: str, data: st.DataObject
) -> None:
    call = data.draw(calls(dtype))
    output, mask_out = native(*call.to(dtype, device))
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = with_gradients(native, call.to(dtype, device), grad)
    exact = with_gradients(reference.partial_conv2d, call.to(torch.float64), grad)
    same = with_gradients(reference.partial_conv2d, call.to(dtype), grad)
    sizes = with_gradients(reference.partial_conv2d, absolute(call.to(torch.float64)), grad.abs())
    assert torch.equal(mask_out.cpu(), same[1])
    assert mask_out.dtype == call.mask.dtype
    names = ["output", "mask", "grad of input", "grad of weight", "grad of bias"]
    for name, *tensors, size in zip(names, got, exact, same, sizes, strict=False):
        if name == "mask":
            continue
        largest = float(size.detach().abs().max()) if size.numel() else 1.0
        assert_matches_reference(*tensors, name=name, scale=max(1.0, largest))
        assert tensors[0].isfinite().all()


def steps(tensor: Tensor) -> list[int]:
    """The strides that mean something."""
    if tensor.numel() == 0:
        return []
    return [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


@property_test
@given(data=st.data())
def test_fake_and_reference_have_the_native_layout(data: st.DataObject) -> None:
    call = data.draw(calls(torch.float32))
    arguments = call.to(torch.float32)
    on_meta = [v.to("meta") if isinstance(v, Tensor) else v for v in arguments]
    real, fake = native(*arguments), native(*on_meta)
    plain = reference.partial_conv2d(*arguments)
    for expected, *others in zip(real, fake, plain, strict=True):
        for got in others:
            assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
            assert steps(got) == steps(expected)


def by_hand(call: Call) -> tuple[Tensor, Tensor]:
    """The equation of partial_conv.h, one output pixel at a time."""
    x, w, valid = call.input, call.weight, call.valid()
    (sy, sx), (py, px), (dy, dx), groups = call.geometry
    n, _, height, width = x.shape
    k, group_channels, kh, kw = w.shape
    out_h = (height + 2 * py - dy * (kh - 1) - 1) // sy + 1
    out_w = (width + 2 * px - dx * (kw - 1) - 1) // sx + 1
    many = valid.shape[1] > 1
    output = torch.zeros(n, k, out_h, out_w, dtype=torch.float64)
    mask_out = torch.zeros(valid.shape[0], k if many else 1, out_h, out_w, dtype=torch.bool)
    for b, o, y, z in itertools.product(
        range(max(n, valid.shape[0])), range(k), range(out_h), range(out_w)
    ):
        total, seen = 0.0, 0
        first = o // (k // groups) * group_channels
        for j, i, m in itertools.product(range(group_channels), range(kh), range(kw)):
            row, column, channel = y * sy - py + i * dy, z * sx - px + m * dx, first + j
            if not (0 <= row < height and 0 <= column < width):
                continue
            image = b if valid.shape[0] > 1 else 0
            if not valid[image, channel if many else 0, row, column]:
                continue
            seen += 1
            if b < n:
                total += x[b, channel, row, column].item() * w[o, j, i, m].item()
        if seen == 0:
            continue
        if b < valid.shape[0]:
            mask_out[b, o if many else 0, y, z] = True
        if b < n:
            # For a mask of one channel the counts of all channels are the same: so is the ratio.
            bias = 0.0 if call.bias is None else call.bias[o].item()
            output[b, o, y, z] = total * (kh * kw * group_channels) / seen + bias
    return output, mask_out.to(call.mask.dtype)


@property_test
@given(call=calls(torch.float64, largest=4))
def test_reference_is_the_equation(call: Call) -> None:
    output, mask_out = reference.partial_conv2d(*call.to(torch.float64))
    expected, expected_mask = by_hand(call)
    torch.testing.assert_close(output, expected)
    assert torch.equal(mask_out, expected_mask)


def test_counts_and_ratios_at_the_border_by_hand(device: str) -> None:
    image = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]], device=device)
    mask = torch.tensor([[1, 0], [1, 1]], dtype=torch.uint8, device=device)
    weight = torch.ones(1, 1, 2, 2, device=device)
    output, mask_out = partial_conv2d(
        image, mask, weight, torch.tensor([100.0]).to(device), padding=1
    )
    expected = [[104, 104, 0], [108, 100 + 32 / 3, 116], [112, 114, 116]]
    torch.testing.assert_close(output[0, 0].cpu(), torch.tensor(expected))
    assert mask_out.tolist() == [[[[1, 1, 0], [1, 1, 1], [1, 1, 1]]]]


def test_padding_counts_as_missing_and_not_as_zero(device: str) -> None:
    ones = torch.ones(1, 2, 5, 5, device=device)
    weight = torch.ones(1, 2, 3, 3, device=device)
    output, mask_out = partial_conv2d(ones, torch.ones(5, 5, device=device), weight, padding=1)
    torch.testing.assert_close(output, torch.full_like(output, 18.0))
    assert mask_out.shape == (1, 1, 5, 5)
    assert mask_out.all()


def test_channel_mask_counts_the_channels_of_the_outputs_own_group(device: str) -> None:
    image = torch.tensor([1.0, 10.0, 100.0, 1000.0], device=device).reshape(1, 4, 1, 1)
    mask = torch.tensor([True, False, True, True], device=device).reshape(1, 4, 1, 1)
    weight = torch.ones(4, 2, 1, 1, device=device)
    output, mask_out = partial_conv2d(image, mask, weight, groups=2)
    assert output.flatten().tolist() == [2.0, 2.0, 1100.0, 1100.0]
    assert mask_out.flatten().tolist() == [True, True, True, True]
    mask[0, 0] = False
    output, mask_out = partial_conv2d(image, mask, weight, groups=2)
    assert output.flatten().tolist() == [0.0, 0.0, 1100.0, 1100.0]
    assert mask_out.flatten().tolist() == [False, False, True, True]


@every_dtype
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("mask_channels", [1, 4])
def test_garbage_behind_the_mask_and_over_empty_windows_never_leaks(
    dtype: torch.dtype, layout: torch.memory_format, mask_channels: int, device: str
) -> None:
    mask = torch.rand(2, mask_channels, 9, 9, device=device) > 0.5
    mask[..., :5, :5] = False
    clean = torch.randn(2, 4, 9, 9, device=device).to(dtype)
    weight = torch.randn(4, 2, 3, 3, device=device, dtype=dtype)
    bias = torch.randn(4, device=device, dtype=dtype)
    results = []
    for garbage in (0.0, float("nan"), float("inf")):
        image = torch.where(mask, clean, garbage).to(dtype, memory_format=layout)
        leaves = [t.detach().requires_grad_() for t in (image, weight, bias)]
        output, mask_out = partial_conv2d(leaves[0], mask, *leaves[1:], padding=1, groups=2)
        grad = torch.where(mask_out, torch.ones_like(output), garbage)
        grads = torch.autograd.grad(output, leaves, grad)
        results.append((output, mask_out, *grads))
        assert not grads[0][~mask.expand_as(grads[0])].any()
    for result in results:
        for got, expected in zip(result, results[0], strict=True):
            assert torch.equal(got, expected)
            assert got.isfinite().all()


def test_nan_at_a_valid_pixel_reaches_exactly_the_windows_over_it(device: str) -> None:
    image, mask = torch.zeros(1, 1, 7, 7, device=device), torch.ones(7, 7, device=device)
    image[0, 0, 2, 3] = float("nan")
    output = partial_conv2d(image, mask, torch.ones(1, 1, 3, 3, device=device), padding=1)[0]
    expected = torch.zeros(7, 7, dtype=torch.bool)
    expected[1:4, 2:5] = True
    assert torch.equal(output[0, 0].isnan().cpu(), expected)


@every_dtype
def test_empty_window_is_exactly_zero_without_bias(dtype: torch.dtype, device: str) -> None:
    image = torch.full((1, 3, 8, 8), 1000.0, device=device, dtype=dtype)
    mask = torch.ones(1, 1, 8, 8, device=device, dtype=dtype)
    mask[..., :4, :] = 0
    weight = torch.full((2, 3, 3, 3), 0.01, device=device, dtype=dtype)
    bias = torch.tensor([5.0, -7.0], device=device, dtype=dtype)
    output, mask_out = partial_conv2d(image, mask, weight, bias)
    assert torch.equal(output[:, :, :2], torch.zeros_like(output[:, :, :2]))
    assert (output[:, :, 2:] != 0).all()
    assert output.isfinite().all()
    assert mask_out[0, 0, :, 0].tolist() == [0, 0, 1, 1, 1, 1]
    nothing = partial_conv2d(image, torch.zeros_like(mask), weight, bias)
    assert not nothing[0].any()
    assert not nothing[1].any()


@every_dtype
def test_one_valid_pixel_of_a_large_window_is_rescaled_without_overflow(
    dtype: torch.dtype, device: str
) -> None:
    image = torch.full((1, 64, 7, 7), 2.0, device=device, dtype=dtype)
    mask = torch.zeros(1, 64, 7, 7, device=device, dtype=torch.bool)
    mask[0, 5, 3, 3] = True
    weight = torch.ones(1, 64, 7, 7, device=device, dtype=dtype)
    assert partial_conv2d(image, mask, weight)[0].item() == 2 * 64 * 49


@every_dtype
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("form", [(8, 9), (2, 8, 9), (2, 1, 8, 9), (1, 4, 8, 9)], ids=str)
def test_all_valid_without_padding_equals_conv2d(
    dtype: torch.dtype, groups: int, form: tuple[int, ...], device: str
) -> None:
    image = torch.randn(2, 4, 8, 9, device=device).to(dtype)
    weight = torch.randn(6, 4 // groups, 3, 2, device=device).to(dtype)
    bias = torch.randn(6, device=device).to(dtype)
    geometry = {"stride": (2, 1), "dilation": (1, 3), "groups": groups}
    output, mask_out = partial_conv2d(
        image, torch.ones(form, device=device, dtype=torch.bool), weight, bias, **geometry
    )
    assert mask_out.all()
    exact = F.conv2d(image.double(), weight.double(), bias.double(), **geometry)
    same = F.conv2d(image, weight, bias, **geometry)
    assert_matches_reference(output, exact, same, scale=float(exact.abs().max()))


def test_mask_that_requires_a_gradient_is_an_error() -> None:
    image, weight = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)
    mask = torch.ones(3, 3, requires_grad=True)
    for op in (partial_conv2d, lambda *args: native(*args, None, [1, 1], [0, 0], [1, 1], 1)):
        with pytest.raises(ValueError, match="partial_conv2d: expected a mask that requires no gr"):
            op(image, mask, weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weight_that_only_stands_on_padding_has_no_gradient(
    dtype: torch.dtype, device: str
) -> None:
    """Plain conv2d leaves it unwritten on some CPUs, so each try begins with littered memory."""
    for _ in range(20):
        litter = [torch.full((size,), 1e4, dtype=dtype, device=device) for size in range(1, 200)]
        del litter
        image = torch.randn(2, 3, 3, 1).to(device, dtype, memory_format=torch.channels_last)
        weight = torch.randn(2, 3, 2, 2).to(device, dtype).requires_grad_()
        mask = torch.ones(3, 1, dtype=torch.bool, device=device)
        output, _ = partial_conv2d(image, mask, weight, None, (1, 3), (0, 1))
        (grad,) = torch.autograd.grad(output.sum(), weight)
        assert not grad[..., 0].any()
        assert grad[..., 1].any()


def test_tiny_mask_values_stay_valid_under_float16_autocast() -> None:
    image, weight = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)
    mask = torch.full((3, 3), 1e-30)
    with torch.autocast("cpu", torch.float16):
        output, mask_out = partial_conv2d(image, mask, weight)
    assert output.item() == 9
    assert output.dtype == torch.float16
    assert mask_out.dtype == torch.float32
    assert mask_out.item() == 1


def test_layers_chain_under_autocast() -> None:
    image, mask = torch.randn(1, 2, 6, 6), torch.ones(6, 6)
    weight = torch.randn(2, 2, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        output, mask = partial_conv2d(image, mask, weight)
        output, mask = partial_conv2d(output, mask, weight)
    assert output.dtype == torch.bfloat16
    assert mask.dtype == torch.float32


def test_public_function_compiles_for_training() -> None:
    torch._dynamo.reset()
    image, mask = torch.randn(2, 3, 6, 6), torch.rand(2, 1, 6, 6) > 0.3
    weight, bias = (torch.randn(s, requires_grad=True) for s in [(4, 3, 3, 3), (4,)])

    def loss(image: Tensor, mask: Tensor) -> Tensor:
        output, mask_out = partial_conv2d(image, mask, weight, bias, padding=1)
        return (output.relu() * mask_out).sum()

    expected = torch.autograd.grad(loss(image, mask), (weight, bias))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(image, mask), (weight, bias))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


# Messages


def arguments_with(**changes: Any) -> list[Any]:
    good = {
        "input": torch.ones(2, 4, 5, 6),
        "mask": torch.ones(2, 1, 5, 6),
        "weight": torch.ones(6, 2, 3, 3),
        "bias": torch.ones(6),
        "stride": [1, 1],
        "padding": [0, 0],
        "dilation": [1, 1],
        "groups": 2,
    }
    return list({**good, **changes}.values())


BAD_CALLS = [
    (
        "input to be float32, float64, float16 or bfloat16, got int64",
        {"input": torch.ones(2, 4, 5, 6).long()},
    ),
    ("input of shape (N, C, H, W), got [4, 5, 6]", {"input": torch.ones(4, 5, 6)}),
    (
        "input to have at least one pixel, got 0x6",
        {"input": torch.ones(2, 4, 0, 6), "padding": [2, 2]},
    ),
    ("weight of shape (K, C / groups, kh, kw), got [6, 2, 3]", {"weight": torch.ones(6, 2, 3)}),
    ("weight of the input's float32, got float64", {"weight": torch.ones(6, 2, 3, 3).double()}),
    ("weight to have 2 input channels (C / groups), got 4", {"weight": torch.ones(6, 4, 3, 3)}),
    ("weight of a positive size, got [6, 2, 0, 3]", {"weight": torch.ones(6, 2, 0, 3)}),
    ("groups to divide the input's 4 channels and the output's 6, got 3", {"groups": 3}),
    ("groups to divide the input's 4 channels and the output's 6, got 0", {"groups": 0}),
    ("groups to divide the input's 4 channels and the output's 6, got -2", {"groups": -2}),
    ("groups to divide the input's 4 channels and the output's 6, got 4", {"groups": 4}),
    ("bias of shape (6,), got [4]", {"bias": torch.ones(4)}),
    ("bias of shape (6,), got [6, 1]", {"bias": torch.ones(6, 1)}),
    ("bias of the input's float32, got float16", {"bias": torch.ones(6).half()}),
    (
        "mask to be bool, uint8 or the input's float32, got float64",
        {"mask": torch.ones(5, 6).double()},
    ),
    ("mask to be bool, uint8 or the input's float32, got int64", {"mask": torch.ones(5, 6).long()}),
    ("mask to have 2, 3 or 4 dimensions, got 1", {"mask": torch.ones(6)}),
    ("mask to have 2, 3 or 4 dimensions, got 5", {"mask": torch.ones(1, 1, 1, 5, 6)}),
    ("mask to be 5x6 like the input, got 6x5", {"mask": torch.ones(6, 5)}),
    ("mask to have a batch of 1 or 2, got 3", {"mask": torch.ones(3, 5, 6)}),
    ("mask to have 1 or 4 channels, got 2", {"mask": torch.ones(2, 2, 5, 6)}),
    ("stride to be positive, got 0", {"stride": [1, 0]}),
    ("stride to be (height, width), got [1]", {"stride": [1]}),
    ("stride to be (height, width), got [1, 1, 1]", {"stride": [1, 1, 1]}),
    ("padding not to be negative, got -1", {"padding": [-1, 0]}),
    ("padding to be (height, width), got []", {"padding": []}),
    ("dilation to be positive, got 0", {"dilation": [0, 1]}),
    ("dilation to be (height, width), got [2]", {"dilation": [2]}),
    (
        "the padded input to be at least the window's 7 pixels along its height, got 5",
        {"dilation": [3, 1]},
    ),
    (
        "the padded input to be at least the window's 9 pixels along its width, got 8",
        {"dilation": [2, 4], "padding": [0, 1]},
    ),
]


@pytest.mark.parametrize(("expected", "changes"), BAD_CALLS, ids=[text for text, _ in BAD_CALLS])
def test_native_fake_and_reference_say_the_same_about_a_bad_call(
    expected: str, changes: dict[str, Any], device: str
) -> None:
    assert_all_forms_say("partial_conv2d", expected, arguments_with(**changes), device)


@pytest.mark.parametrize("name", ["mask", "weight", "bias"])
def test_argument_on_another_device_is_an_error(name: str, device: str) -> None:
    tensors = {"mask": torch.ones(5, 6), "weight": torch.ones(6, 2, 3, 3), "bias": torch.ones(6)}
    where = {key: value.to(device) for key, value in tensors.items()}
    other = "meta" if device == "cpu" else "cpu"
    where[name] = tensors[name].to(other)
    arguments = arguments_with(input=torch.ones(2, 4, 5, 6).to(device), **where)
    expected = f"partial_conv2d: expected {name} on the input's device {device}, got {other}"
    for op in (native, reference.partial_conv2d):
        with pytest.raises(ValueError, match=f"^{re.escape(expected)}"):
            op(*arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [("stride", 1.5), ("padding", "same"), ("dilation", (1, 2, 3)), ("stride", True)],
)
def test_public_function_takes_one_or_two_ints(name: str, value: Any) -> None:
    image, mask, weight = torch.ones(1, 1, 5, 5), torch.ones(5, 5), torch.ones(1, 1, 3, 3)
    expected = f"partial_conv2d: expected {name} to be one or two ints, got {value!r}"
    with pytest.raises(TypeError, match=re.escape(expected)):
        partial_conv2d(image, mask, weight, **{name: value})


def test_backward_op_names_a_bad_gradient() -> None:
    input, mask, weight, _, *geometry = arguments_with()
    op = torch.ops.glance_ext.partial_conv2d_backward
    start = "partial_conv2d_backward: expected grad_output of "
    shape = f"{start}shape [2, 6, 3, 4], got [2, 6, 3, 3]"
    with pytest.raises(ValueError, match=f"^{re.escape(shape)}"):
        op(torch.ones(2, 6, 3, 3), input, mask, weight, *geometry, [True] * 3)
    with pytest.raises(TypeError, match=f"^{start}the input's float32, got float64"):
        op(torch.ones(2, 6, 3, 4).double(), input, mask, weight, *geometry, [True] * 3)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [(2, 1), (16, 64)])
def test_taps_that_see_only_padding_have_gradient_zero(
    memory_format: torch.memory_format, channels: tuple[int, int]
) -> None:
    inputs, outputs = channels
    for _ in range(50):  # memory that others have left
        junk = [torch.full((n,), 1e30, dtype=torch.bfloat16) for n in (4, 16, 64, 256, 4096)]
        del junk
        image = torch.ones(1, inputs, 1, 2, dtype=torch.bfloat16)
        image = image.contiguous(memory_format=memory_format)
        weight = torch.ones(outputs, inputs, 1, 2, dtype=torch.bfloat16, requires_grad=True)
        output, _ = partial_conv2d(
            image, torch.ones(1, 2, dtype=torch.bool), weight, stride=(1, 3), padding=(0, 1)
        )
        (grad,) = torch.autograd.grad(output.sum(), weight)
        assert grad[..., 0].abs().max() == 0
        assert (grad[..., 1] == 2).all()  # one of two pixels of the window is there
