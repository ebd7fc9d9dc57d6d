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


def partial_conv2d(
    input: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Partial convolution as two convolutions, of the valid pixels and of the mask.

    As the native op rounds: the convolution in the input's dtype, ratio and bias in float32 or
    wider. The counts are exact, since sums of ones are, below 2^24.

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

    Returns:
        Output and the next layer's mask.
    """
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    outputs, group_channels, height, width = weight.shape
    if mask.dim() < 4:
        mask = mask[None, None] if mask.dim() == 2 else mask[:, None]
    valid = mask if mask.dtype == torch.bool else mask != 0
    many = mask.shape[1] != 1
    mask_groups, mask_channels = (groups, group_channels) if many else (1, 1)
    geometry = (list(stride), list(padding), list(dilation))

    ones = torch.ones((mask_groups, mask_channels, height, width), dtype=wide, device=input.device)
    count = F.conv2d(valid.to(wide), ones, None, *geometry, mask_groups)
    if many and groups != 1:  # a group's count for each of its outputs
        count = count.repeat_interleave(outputs // groups, 1)
    seen = count > 0
    ratio = (mask_channels * height * width) / count.clamp_min(1)
    output = F.conv2d(torch.where(valid, input, 0), weight, None, *geometry, groups)
    output = output.to(wide) * ratio
    if bias is not None:
        output = output + bias.to(wide)[:, None, None]
    output = torch.where(seen, output, 0).to(input.dtype)
    if many and groups == 1:
        seen = seen.expand(-1, outputs, -1, -1)
    return output, seen.to(mask.dtype)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The table for ``ExportedProgram.run_decompositions``, to leave only ATen's operators.

    ``torch.onnx.export`` needs no table: it finds these by itself.

    Returns:
        An entry for each op that has a decomposition; none where the compiled library is missing,
        since programs then hold ATen's operators from the start.
    """
    if not _library.is_loaded():
        return {}
    return {torch.ops.glance_ext.partial_conv2d.default: partial_conv2d}


for _op, _function in decompositions().items():
    torch._decomp.register_decomposition(_op)(_function)
