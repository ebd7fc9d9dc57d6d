"""hole_conv2d and gather_holes: their numbers, what stays behind a hole, their messages."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from glance_ext.ops import gather_holes, hole_conv2d, hole_max_pool2d, reference
from glance_ext.testing import assert_matches_reference
from tests.ops.bad_calls import assert_all_forms_say
from tests.ops.cases import CASES

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
property_test = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def conv_calls(draw: Any) -> list[Any]:
    """Arguments of hole_conv2d in float64: any geometry, whether or not a hole would make it."""

    def of(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    random = torch.Generator().manual_seed(of(0, 1 << 30))

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, dtype=torch.float64)

    n, p, c, k = of(1, 3), of(1, 4), of(1, 19), draw(st.sampled_from([1, 3, 16, 17, 33, 40]))
    height, width, h, w = of(3, 9), of(3, 9), of(1, 6), of(1, 6)
    kernel = (of(1, 3), of(1, 3))
    own = draw(st.booleans())
    rows = n * p if own else p
    size = torch.tensor([[min(h, height), min(w, width)]]) - torch.randint(
        0, min(h, w, height, width), (rows, 2), generator=random
    )
    first = (torch.rand(rows, 2, generator=random) * (torch.tensor([height, width]) - size + 1)).to(
        torch.int64
    )
    extents = torch.cat((first, size), 1).to(torch.int32)
    origins = torch.randint(-1, 4, (rows, 2), generator=random, dtype=torch.int32)
    out = (of(1, 4), of(1, 4))
    ratio = torch.rand(rows, *out, generator=random, dtype=torch.float64) + 0.5
    ratio = torch.where(torch.rand(ratio.shape, generator=random) < 0.8, ratio, 0)
    if draw(st.booleans()):
        ratio[0] = 0  # a hole with nothing to compute
    shape = (n, p) if own else (p,)
    stride, dilation = [of(1, 2), of(1, 3)], [of(1, 2), of(1, 2)]
    padding = [of(0, 2), of(0, 2)]
    return [
        randn(n, c, height, width),
        randn(n, p, c, h, w) if draw(st.booleans()) else None,
        extents.reshape(*shape, 4),
        origins.reshape(*shape, 2),
        ratio.flatten().nonzero().flatten().to(torch.int32),
        ratio.reshape(*shape, *out),
        randn(k, c, *kernel),
        randn(k) if draw(st.booleans()) else None,
        stride,
        padding,
        dilation,
        draw(st.sampled_from([0.0, 0.01, 1.0])),
    ]


def cast(arguments: list[Any], dtype: torch.dtype, device: str) -> list[Any]:
    """Everything in ``dtype``; the ratio (argument 5) at least in float32."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [
        value.to(device, (wide if i == 5 else dtype) if value.is_floating_point() else None)
        if isinstance(value, Tensor)
        else value
        for i, value in enumerate(arguments)
    ]


@property_test
@given(arguments=conv_calls(), dtype=st.sampled_from(DTYPES))
def test_conv_equals_whole_maps(arguments: list[Any], dtype: torch.dtype, device: str) -> None:
    rounded = cast(cast(arguments, dtype, "cpu"), torch.float64, "cpu")
    same = cast(arguments, dtype, "cpu")
    assert_matches_reference(
        torch.ops.glance_ext.hole_conv2d(*cast(arguments, dtype, device)),
        reference.hole_conv2d(*rounded),
        reference.hole_conv2d(*same),
        scale=float(reference.hole_conv2d(*rounded).abs().max().clamp_min(1)),
    )


@property_test
@given(arguments=conv_calls(), dtype=st.sampled_from(DTYPES), fill=st.sampled_from([0.0, -1.5]))
def test_gather_equals_whole_maps(
    arguments: list[Any], dtype: torch.dtype, fill: float, device: str
) -> None:
    base, windows, extents, origins = cast(arguments, dtype, device)[:4]
    origins = origins * 4 - 5
    got = gather_holes(base, windows, extents, origins, (3, 4), fill)
    expected = reference.gather_holes(base, windows, extents, origins, (3, 4), fill)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@property_test
@given(arguments=conv_calls(), dtype=st.sampled_from(DTYPES), nan=st.booleans())
def test_max_pool_equals_whole_maps(
    arguments: list[Any], dtype: torch.dtype, nan: bool, device: str
) -> None:
    base, windows, extents, origins, _, ratio, weight, _, stride, padding, dilation, _ = cast(
        arguments, dtype, device
    )
    if nan:
        base[0, 0, 1, 1] = float("nan")
    geometry = (weight.shape[-2:], stride, ratio.shape[-2:], padding, dilation)
    got = hole_max_pool2d(base, windows, extents, origins, *geometry)
    expected = reference.hole_max_pool2d(
        base, windows, extents, origins, weight.shape[-2:], stride, padding, dilation,
        ratio.shape[-2:],
    )  # fmt: skip
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("windows", [True, False])
def test_what_a_hole_hides_does_not_leak(windows: bool, device: str) -> None:
    torch.manual_seed(0)
    base = torch.randn(1, 3, 8, 8, device=device)
    base[0, :, 2:5, 3:6] = float("nan")
    extents = torch.tensor([[2, 3, 3, 3]], dtype=torch.int32, device=device)
    origins = torch.zeros(1, 2, dtype=torch.int32, device=device)
    inside = torch.randn(1, 1, 3, 4, 4, device=device) if windows else None
    if inside is not None:
        inside[..., 3, :] = float("inf")  # the part of the window that is not in the extent
        inside[..., :, 3] = float("inf")
    ratio = torch.ones(1, 6, 6, device=device)
    cells = torch.arange(36, dtype=torch.int32, device=device)
    weight = torch.randn(4, 3, 3, 3, device=device)
    assert gather_holes(base, inside, extents, origins, 8).isfinite().all()
    output = hole_conv2d(base, inside, extents, origins, cells, ratio, weight)
    assert output.isfinite().all()
    grads = torch.autograd.grad(
        hole_conv2d(base.requires_grad_(), inside, extents, origins, cells, ratio, weight).sum(),
        base,
    )
    assert not grads[0][0, :, 2:5, 3:6].any()
    assert grads[0][0, :, 1, 1:].all()


def test_negative_infinity_becomes_zero_behind_relu_and_nan_stays(device: str) -> None:
    base = torch.tensor([[[[-1.0, float("nan"), 2.0]]]], device=device)
    extents = torch.tensor([[0, 0, 1, 0]], dtype=torch.int32, device=device)
    origins = torch.zeros(1, 2, dtype=torch.int32, device=device)
    cells = torch.arange(3, dtype=torch.int32, device=device)
    weight = torch.full((1, 1, 1, 1), float("inf"), device=device)
    output = hole_conv2d(
        base,
        None,
        extents,
        origins,
        cells,
        torch.ones(1, 1, 3, device=device),
        weight,
        negative_slope=0.0,
    )
    expected = torch.tensor([0.0, float("nan"), float("inf")], device=device)
    torch.testing.assert_close(output.flatten(), expected, equal_nan=True)


BAD_CONV = [
    (0, torch.zeros(1, 4, 9, 8, dtype=torch.int64), "base to be float32, float64, float16 or "
     "bfloat16, got int64"),
    (0, torch.zeros(1, 4, 9), "base of shape (N, C, H, W) with at least one pixel, got [1, 4, 9]"),
    (0, torch.zeros(1, 4, 0, 8), "base of shape (N, C, H, W) with at least one pixel, got "
     "[1, 4, 0, 8]"),
    (1, torch.zeros(1, 3, 4, 4, 4, dtype=torch.float64), "windows of the base's float32, got "
     "float64"),
    (1, torch.zeros(1, 2, 4, 4, 4), "windows of shape (1, 3, 4, h, w), got [1, 2, 4, 4, 4]"),
    (2, torch.zeros(3, 4), "extents to be int32, got float32"),
    (2, torch.zeros(3, 5, dtype=torch.int32), "extents of shape (P, 4) or (N, P, 4), got [3, 5]"),
    (2, torch.zeros(2, 3, 4, dtype=torch.int32), "extents for 1 images, got 2"),
    (3, torch.zeros(3, 2, dtype=torch.int64), "origins to be int32, got int64"),
    (3, torch.zeros(2, 2, dtype=torch.int32), "origins to have a row of 2 for each of the extents "
     "[3, 4], got [2, 2]"),
    (4, torch.zeros(3, dtype=torch.int64), "cells to be int32, got int64"),
    (4, torch.zeros(3, 1, dtype=torch.int32), "cells of shape (M,), got [3, 1]"),
    (5, torch.zeros(3, 4, 3, dtype=torch.float64), "ratio to be float32, got float64"),
    (5, torch.zeros(2, 4, 3), "ratio of one window for each of the extents [3, 4], got [2, 4, 3]"),
    (6, torch.zeros(5, 4, 3), "weight of shape (K, C, kh, kw), got [5, 4, 3]"),
    (6, torch.zeros(5, 3, 3, 2), "weight to have the base's 4 channels, got 3"),
    (6, torch.zeros(5, 4, 3, 2).double(), "weight of the base's float32, got float64"),
    (7, torch.zeros(4), "bias of shape (5,), got [4]"),
    (7, torch.zeros(5).double(), "bias of the base's float32, got float64"),
    (8, [0, 1], "stride to be positive, got 0"),
    (8, [1, 1, 1], "stride to be (height, width), got [1, 1, 1]"),
    (9, [0, -1], "padding not to be negative, got -1"),
    (10, [1, 0], "dilation to be positive, got 0"),
    (11, -0.5, "negative_slope not to be negative, got -0.5"),
]  # fmt: skip


def conv_arguments(name: str) -> list[Any]:
    case = next(case for case in CASES if str(case) == f"hole_conv2d-{name}")
    return case.arguments("cpu", torch.float32, batch=1)


@pytest.mark.parametrize(("position", "value", "expected"), BAD_CONV)
def test_bad_conv_calls_are_told_in_the_same_words(
    position: int, value: Any, expected: str, device: str
) -> None:
    arguments = conv_arguments("windows_relu")
    arguments[position] = value
    assert_all_forms_say("hole_conv2d", expected, arguments, device)


@pytest.mark.parametrize(
    ("position", "value", "expected"),
    [
        (0, torch.zeros(4, 9, 8), "base of shape (N, C, H, W) with at least one pixel, got "
         "[4, 9, 8]"),
        (3, torch.zeros(3, 3, dtype=torch.int32), "origins to have a row of 2 for each of the "
         "extents [3, 4], got [3, 3]"),
        (4, [0, 3], "tile_size to be positive, got (0, 3)"),
        (4, [3], "tile_size to be (height, width), got [3]"),
    ],
)  # fmt: skip
def test_bad_gather_calls_are_told_in_the_same_words(
    position: int, value: Any, expected: str, device: str
) -> None:
    case = next(case for case in CASES if str(case) == "gather_holes-windows")
    arguments = case.arguments("cpu", torch.float32, batch=1)
    arguments[position] = value
    assert_all_forms_say("gather_holes", expected, arguments, device)


@pytest.mark.parametrize(
    ("position", "value", "expected"),
    [
        (0, torch.zeros(4, 9, 8), "base of shape (N, C, H, W) with at least one pixel, got "
         "[4, 9, 8]"),
        (3, torch.zeros(3, 3, dtype=torch.int32), "origins to have a row of 2 for each of the "
         "extents [3, 4], got [3, 3]"),
        (4, [0, 3], "kernel_size to be positive, got (0, 3)"),
        (5, [1, 0], "stride to be positive, got (1, 0)"),
        (6, [-1, 0], "padding not to be negative, got (-1, 0)"),
        (7, [1], "dilation to be (height, width), got [1]"),
        (8, [0, 1], "window_size to be positive, got (0, 1)"),
    ],
)  # fmt: skip
def test_bad_pool_calls_are_told_in_the_same_words(
    position: int, value: Any, expected: str, device: str
) -> None:
    case = next(case for case in CASES if str(case) == "hole_max_pool2d-windows")
    arguments = case.arguments("cpu", torch.float32, batch=1)
    arguments[position] = value
    assert_all_forms_say("hole_max_pool2d", expected, arguments, device)


@pytest.mark.parametrize(
    ("position", "change", "expected"),
    [
        (2, (1, 0, 7), "every extent inside the 9x8 map, got extent 1 of 4x3 at row 7, column 3"),
        (2, (2, 2, 5), "every extent to fit its window of 4x4, got extent 2 of 5x4"),
        (2, (0, 3, -1), "every extent inside the 9x8 map, got extent 0 of 3x-1 at row 0, column 0"),
        (4, (0, 36), "cells ascending and below 36, got 36 after -1"),
        (4, (1, 0), "cells ascending and below 36, got 0 after 0"),
    ],
)
def test_geometry_that_would_read_elsewhere_is_an_error_on_the_cpu(
    position: int, change: tuple[int, ...], expected: str
) -> None:
    arguments = conv_arguments("windows_relu")
    arguments[4] = torch.tensor([0, 5], dtype=torch.int32)
    if position == 2 and change[:2] == (2, 2):
        arguments[2][2, 0] = 4  # so that the larger extent is inside the map
    arguments[position][change[:-1]] = change[-1]
    with pytest.raises(ValueError, match=r"^hole_conv2d: ") as caught:
        torch.ops.glance_ext.hole_conv2d(*arguments)
    assert str(caught.value).splitlines()[0] == f"hole_conv2d: expected {expected}"
