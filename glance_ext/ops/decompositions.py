"""Ops as compositions of ATen's, for what knows no op of ours: ONNX and other exporters.

torch's own tracers never use these: an exported or compiled program holds the native ops, until
someone asks to take them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glance_ext import _library
from glance_ext.ops.partial_conv_nd import compose
from glance_ext.ops.reference import activation


def partial_conv2d(
    input: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    negative_slope: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Partial convolution as two convolutions, of the valid pixels and of the mask.

    Args:
        input: As :func:`glance_ext.ops.partial_conv2d`, with each of stride, padding and dilation
            as (height, width).
        mask: The same.
        weight: The same.
        bias: The same.
        stride: The same.
        padding: The same.
        dilation: The same.
        groups: The same.
        negative_slope: The same.

    Returns:
        Output and the next layer's mask.
    """
    if mask.dim() < 4:
        mask = mask[None, None] if mask.dim() == 2 else mask[:, None]
    height, width = weight.shape[2:]

    def convolve(x: Tensor, w: Tensor, parts: int) -> Tensor:
        return F.conv2d(x, w, None, list(stride), list(padding), list(dilation), parts)

    def count(x: Tensor, parts: int) -> Tensor:
        return convolve(x, x.new_ones(parts, x.shape[1] // parts, height, width), parts)

    output, mask_out = compose(
        input,
        mask,
        bias,
        weight.shape[0],
        groups,
        lambda x: convolve(x, weight, groups),
        count,
        height * width,
    )
    return activation(output, negative_slope), mask_out


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The table for ``ExportedProgram.run_decompositions``, to leave only ATen's operators.

    ``torch.onnx.export`` of a module needs no table: ops are taken apart as it traces them.

    Returns:
        An entry for each op that has a decomposition; none where the compiled library is missing,
        since programs then hold ATen's operators from the start.
    """
    if not _library.is_loaded():
        return {}
    return {torch.ops.glance_ext.partial_conv2d.default: partial_conv2d}
