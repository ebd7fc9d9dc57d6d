"""``hole_sequence``: docstring, fake, call; csrc/hole_windows/."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glance_ext import _library
from glance_ext.ops import reference
from glance_ext.ops._derivatives import forbid_backward
from glance_ext.ops._vmap import loop_over
from glance_ext.ops.hole_windows import fake_conv, fake_pool


class HoleLayer(NamedTuple):
    """One layer of a sequence.

    The arguments of ``hole_conv2d``, or without a weight those of ``hole_max_pool2d``; the windows
    come from the layer before.

    Attributes:
        base: ``(N, C, H, W)``, the layer's input without holes.
        extents: ``(P, 4)`` or ``(N, P, 4)`` int32.
        origins: ``(P, 2)`` or ``(N, P, 2)`` int32.
        cells: ``(M,)`` int32; a max-pooling computes every cell.
        ratio: ``(P, ho, wo)`` or ``(N, P, ho, wo)``; of a max-pooling only the size counts.
        weight: ``(K, C, kh, kw)``; None for a max-pooling.
        bias: ``(K,)`` or None.
        kernel_size: (height, width), of a max-pooling.
        stride: (height, width).
        padding: (height, width).
        dilation: (height, width).
        negative_slope: Of the LeakyReLU behind a convolution.
    """

    base: Tensor
    extents: Tensor
    origins: Tensor
    cells: Tensor
    ratio: Tensor
    weight: Tensor | None
    bias: Tensor | None
    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    negative_slope: float


def hole_sequence(layers: Sequence[HoleLayer]) -> Tensor:
    """Several layers seen through many holes, one after the other, in one call.

    The same as :func:`hole_conv2d` and :func:`hole_max_pool2d` in turn, each on the windows of the
    one before and the first on holes alone. On a CPU a few holes at a time go through all layers,
    so that what lies between stays in the cache and takes no memory. For inference: it has no
    derivative.

    Args:
        layers: At least one.

    Returns:
        The last layer's windows ``(N, P, K, ho, wo)``, channels last in memory.

    Raises:
        ValueError: Shapes, devices or numbers do not fit.
        TypeError: A dtype is not supported.
        RuntimeError: In a backward.
    """
    arguments = flattened(layers)
    if _library.is_loaded():
        return torch.ops.glance_ext.hole_sequence(*arguments)
    _library.warn_reference("hole_sequence")
    return reference.hole_sequence(*arguments)


def flattened(layers: Sequence[HoleLayer]) -> list[Any]:
    """The arguments of the torch op, which takes lists of tensors and of numbers."""
    columns: list[Any] = [[layer[i] for layer in layers] for i in range(7)]
    settings = [n for layer in layers for pair in layer[7:11] for n in pair]
    return [*columns, settings, [float(layer.negative_slope) for layer in layers]]


_fake_sequence = partial(reference.hole_sequence, conv=fake_conv, pool=fake_pool)


def _vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    return loop_over(torch.ops.glance_ext.hole_sequence, info, in_dims, *args)


if _library.is_loaded():
    torch.library.register_fake("glance_ext::hole_sequence", _fake_sequence)
    torch.library.register_vmap("glance_ext::hole_sequence", _vmap)
    forbid_backward("hole_sequence", "use hole_conv2d and hole_max_pool2d, layer by layer")
