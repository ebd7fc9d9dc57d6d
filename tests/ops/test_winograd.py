"""winograd_conv2d against the sum as it stands, in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glance_ext import _library
from glance_ext.ops import reference, winograd_conv2d
from tests.ops.bad_calls import assert_all_forms_say

native = torch.ops.glance_ext.winograd_conv2d

# Roundings of float32: over hundreds of cases the worst of tiles were 58 (3x3), 50 (4x4) and 30
# (5x5, 6x6), those of the sum 6.
TILES = 100 * 2**-24


def error(got: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """The largest error by the largest sum of magnitudes, which no rounding can be without."""
    wide = [None if t is None else t.double() for t in (input, weight, bias)]
    exact = F.conv2d(*wide)
    size = F.conv2d(*(None if t is None else t.abs() for t in wide))
    assert got.shape == exact.shape
    return float((got.double() - exact).abs().max() / size.max())


def is_in_tiles(input: Tensor, weight: Tensor) -> bool:
    """Tiles round otherwise than the sum."""
    return not torch.equal(native(input, weight, None), F.conv2d(input, weight))


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


needs_vectors = pytest.mark.skipif(
    "AVX2" not in torch.backends.cpu.get_cpu_capability()
    and "AVX512" not in torch.backends.cpu.get_cpu_capability(),
    reason="tiles are for processors with AVX2",
)


@needs_vectors
@pytest.mark.parametrize("kernel", range(3, 7))
def test_each_kernel_of_tiles_is_exact_but_for_rounding(kernel: int) -> None:
    input, bias = values(4, 96, 90, 87), values(80)
    weight = values(80, 96, kernel, kernel, seed=1)
    assert is_in_tiles(input, weight)
    assert error(native(input, weight, bias), input, weight, bias) < TILES
    assert error(native(input, weight, None), input, weight, None) < TILES


@settings(max_examples=80, deadline=None)
@given(
    kernel=st.integers(1, 7),
    batch=st.integers(0, 5),
    channels=st.integers(1, 70),
    out=st.integers(1, 70),
    extra=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    layout=st.sampled_from(["contiguous", "last", "crop", "every second"]),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_size_and_layout(
    kernel: int,
    batch: int,
    channels: int,
    out: int,
    extra: tuple[int, int],
    layout: str,
    with_bias: bool,
    seed: int,
) -> None:
    height, width = (kernel + more for more in extra)
    input = values(batch, channels, height, width, seed=seed)
    if layout == "last":
        input = input.to(memory_format=torch.channels_last)
    elif layout == "crop":
        whole = torch.full((batch, channels, height + 3, width + 2), float("nan"))
        whole = whole.to(memory_format=torch.channels_last)
        input = whole[:, :, 1 : 1 + height, 2:].copy_(input)
    elif layout == "every second":
        input = torch.full((2 * batch, *input.shape[1:]), float("nan"))[::2].copy_(input)
    weight = values(out, channels, kernel, kernel, seed=seed + 1)
    weight = weight.to(memory_format=torch.channels_last) if seed % 2 else weight
    bias = values(out, seed=seed + 2) if with_bias else None
    got = native(input, weight, bias)
    if batch:
        assert error(got, input, weight, bias) < TILES
    assert got.shape == reference.winograd_conv2d(input, weight, bias).shape


@needs_vectors
def test_a_tile_is_the_same_wherever_it_stands() -> None:
    """No number depends on the other images or tiles of a call."""
    weight, input = values(48, 64, 5, 5), values(6, 64, 30, 34, seed=1)
    together = native(input, weight, None)
    assert torch.equal(native(input[2:5], weight, None), together[2:5])
    # From the fourth result on, which is where a tile of 4x4 begins.
    assert torch.equal(native(input[:, :, 4:, 8:], weight, None), together[:, :, 4:, 8:])


@needs_vectors
def test_nothing_outside_of_the_image_is_read() -> None:
    """What overhangs is zeros, not what lies behind the image in memory."""
    whole = torch.full((1, 64, 40, 40), float("nan")).to(memory_format=torch.channels_last)
    input = whole[:, :, :31, :29].copy_(values(1, 64, 31, 29))
    weight = values(64, 64, 5, 5, seed=1)
    assert is_in_tiles(input, weight)
    assert error(native(input, weight, None), input, weight, None) < TILES


def test_a_gradient_and_autocast_are_of_torchs_own() -> None:
    input, weight, bias = values(2, 64, 20, 20), values(64, 64, 5, 5), values(64)
    leaves = [tensor.double().requires_grad_() for tensor in (input, weight, bias)]
    got, expected = winograd_conv2d(*leaves), F.conv2d(*leaves)
    assert torch.equal(got, expected)
    grad = torch.randn_like(got)
    for ours, theirs in zip(
        torch.autograd.grad(got, leaves, grad),
        torch.autograd.grad(expected, leaves, grad),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
    with torch.autocast("cpu", torch.bfloat16):
        assert winograd_conv2d(input, weight, bias).dtype == torch.bfloat16
    with torch.no_grad():  # a parameter is no reason to go without tiles
        parameter = weight.requires_grad_()
        assert torch.equal(winograd_conv2d(input, parameter), native(input, parameter, None))


def test_autocast_lowers_without_the_library_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "module", None)
    input, weight = values(1, 4, 9, 9), values(3, 4, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        first = winograd_conv2d(input, weight)
        assert winograd_conv2d(first, values(2, 3, 3, 3)).dtype == torch.bfloat16


def test_the_op_itself_refuses_a_backward() -> None:
    input = values(1, 2, 8, 8).requires_grad_()
    output = native(input, values(3, 2, 3, 3), None)
    with pytest.raises(RuntimeError, match="winograd_conv2d: expected inference, got a backward"):
        output.sum().backward()


BAD = {
    "input of shape (N, C, H, W), got [4, 9, 8]": {0: values(4, 9, 8)},
    "input to be float32, float64, float16 or bfloat16, got int64": {
        0: torch.ones(2, 4, 9, 8, dtype=torch.int64)
    },
    "weight of shape (K, C, kh, kw), got [4, 3]": {1: values(4, 3)},
    "weight of shape (K, C, kh, kw), got [0, 4, 3, 3]": {1: values(0, 4, 3, 3)},
    "weight of the input's float32, got float64": {1: values(6, 4, 3, 3).double()},
    "weight to have the input's 4 channels, got 2": {1: values(6, 2, 3, 3)},
    "input of at least the kernel's 3x9 pixels, got 9x8": {1: values(6, 4, 3, 9)},
    "bias of shape (6,), got [5]": {2: values(5)},
    "bias of the input's float32, got float64": {2: values(6).double()},
}


@pytest.mark.parametrize("expected", BAD)
def test_a_bad_call_is_told(expected: str, device: str) -> None:
    arguments: list[Any] = [values(2, 4, 9, 8), values(6, 4, 3, 3), values(6)]
    for index, value in BAD[expected].items():
        arguments[index] = value
    assert_all_forms_say("winograd_conv2d", expected, arguments, device)
