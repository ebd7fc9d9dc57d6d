"""``winograd_conv2d``: docstring, fake, call; csrc/winograd/."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glance_ext import _library
from glance_ext.ops import reference
from glance_ext.ops._checks import check_winograd_conv2d, side_by_side
from glance_ext.ops._derivatives import forbid_backward
from glance_ext.ops._vmap import loop_over


def winograd_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``conv2d`` of stride 1 without padding, with fewer multiplications than the sum has.

    In place of ``F.conv2d(input, weight, bias)``. On a CPU in float32, for square kernels of 3 to 6
    taps and where enough is computed to pay for it, tiles of the output are computed by Winograd's
    minimal filtering (A. Lavin and S. Gray, CVPR 2016) on 8x8 pixels: for a kernel of 5x5 by a
    sixth of the multiplications. The rounding error of that is five (5x5) to ten times (3x3) that
    of the sum, and a pixel that is NaN or infinite makes NaN of its whole tiles. In every other
    case, and where a gradient is wanted, ``F.conv2d`` itself runs.

    Args:
        input: ``(N, C, H, W)``, float32, float64, float16 or bfloat16. A channels_last input, or a
            crop of one, gives a channels_last output.
        weight: ``(K, C, kh, kw)``.
        bias: ``(K,)`` or None.

    Returns:
        ``(N, K, H - kh + 1, W - kw + 1)``.

    Raises:
        ValueError: Shapes or devices do not fit.
        TypeError: A dtype is not supported.
    """
    device = input.device.type
    differentiable = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (input, weight, bias)
    )
    lowered = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if differentiable or lowered:
        return F.conv2d(input, weight, bias)
    if not _library.is_loaded():
        _library.warn_reference("winograd_conv2d")
        return reference.winograd_conv2d(input, weight, bias)
    return torch.ops.glance_ext.winograd_conv2d(input, weight, bias)


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_winograd_conv2d(input, weight, bias)
    (n, _, height, width), (k, _, kh, kw) = input.shape, weight.shape
    output = input.new_empty((n, k, height - kh + 1, width - kw + 1))
    return output.to(memory_format=side_by_side(input))


def _vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    return loop_over(torch.ops.glance_ext.winograd_conv2d, info, in_dims, *args)


if _library.is_loaded():
    torch.library.register_fake("glance_ext::winograd_conv2d", _fake)
    torch.library.register_vmap("glance_ext::winograd_conv2d", _vmap)
    forbid_backward("winograd_conv2d", "glance_ext.ops.winograd_conv2d is differentiable")
