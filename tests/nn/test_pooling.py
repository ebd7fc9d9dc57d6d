"""MaskedMaxPool2d: features as usual, and a mask that is valid where any pixel is."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glance_ext.nn import MaskedMaxPool2d, masked_max_pool2d

GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0)},
    {"kernel_size": 2, "dilation": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
    {"kernel_size": 2, "stride": 3, "ceil_mode": True},
]
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)


def both(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def any_valid(valid: Tensor, out: tuple[int, int], geometry: dict[str, Any]) -> Tensor:
    """The rule, window by window."""
    kernel = both(geometry["kernel_size"])
    stride = both(geometry.get("stride", kernel))
    padding, dilation = both(geometry.get("padding", 0)), both(geometry.get("dilation", 1))
    height, width = valid.shape[-2:]
    result = torch.zeros(*valid.shape[:2], *out, dtype=torch.bool)
    for n, c in itertools.product(range(valid.shape[0]), range(valid.shape[1])):
        for y, x, i, j in itertools.product(*map(range, (*out, *kernel))):
            row = y * stride[0] - padding[0] + i * dilation[0]
            column = x * stride[1] - padding[1] + j * dilation[1]
            if 0 <= row < height and 0 <= column < width and valid[n, c, row, column]:
                result[n, c, y, x] = True
    return result


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "shape", [(8, 7), (2, 8, 7), (2, 1, 8, 7), (1, 1, 8, 7), (2, 3, 8, 7), (1, 3, 8, 7)], ids=str
)
@every_geometry
def test_mask_is_valid_where_any_pixel_of_the_window_is(
    geometry: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    features = torch.randn(2, 3, 8, 7)
    mask = (torch.rand(shape) > 0.8).to(dtype)
    if dtype != torch.bool:
        mask = mask * 2
    pooled, pooled_mask = MaskedMaxPool2d(**geometry)(features, mask)
    assert torch.equal(pooled, nn.MaxPool2d(**geometry)(features))
    four = mask if mask.dim() == 4 else mask.reshape(-1, 1, 8, 7)
    expected = any_valid(four != 0, tuple(pooled.shape[-2:]), geometry)
    assert torch.equal(pooled_mask, expected.to(dtype))
    assert pooled_mask.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_features_of_any_float_dtype(dtype: torch.dtype) -> None:
    features = torch.randn(1, 2, 6, 6).to(dtype)
    mask = torch.zeros(6, 6)
    mask[3, 2] = -1e-30  # not zero, so valid
    pooled, pooled_mask = masked_max_pool2d(features, mask, 2)
    assert pooled.dtype == dtype
    assert pooled_mask.tolist() == [[[[0, 0, 0], [0, 1, 0], [0, 0, 0]]]]


def test_window_that_meets_no_pixel_is_invalid() -> None:
    """Padding 1 and dilation 3 step over both pixels."""
    pooled, mask = masked_max_pool2d(
        torch.ones(1, 1, 2, 2), torch.ones(2, 2), 2, stride=1, padding=1, dilation=3
    )
    assert pooled.shape == (1, 1, 1, 1)
    assert mask.tolist() == [[[[0.0]]]]


def test_gradient_goes_to_the_largest_feature() -> None:
    features = torch.tensor([[[[1.0, 5.0], [3.0, 2.0]]]], requires_grad=True)
    pooled, _ = masked_max_pool2d(features, torch.ones(2, 2), 2)
    (grad,) = torch.autograd.grad(pooled.sum(), features)
    assert grad.tolist() == [[[[0.0, 1.0], [0.0, 0.0]]]]


def test_empty_batch() -> None:
    pooled, mask = masked_max_pool2d(torch.ones(0, 2, 4, 4), torch.ones(0, 4, 4), 2)
    assert pooled.shape == (0, 2, 2, 2)
    assert mask.shape == (0, 1, 2, 2)


def test_mask_of_another_size_is_an_error() -> None:
    expected = "masked_max_pool2d: expected mask to be 6x5 like the input, got 5x6"
    with pytest.raises(ValueError, match=expected):
        masked_max_pool2d(torch.ones(1, 2, 6, 5), torch.ones(5, 6), 2)


def test_repr_names_all_settings() -> None:
    pool = MaskedMaxPool2d(3, padding=1, ceil_mode=True)
    assert pool.extra_repr() == nn.MaxPool2d(3, padding=1, ceil_mode=True).extra_repr()
