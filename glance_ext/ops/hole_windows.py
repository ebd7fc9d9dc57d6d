"""``hole_conv2d``, ``hole_max_pool2d``, ``gather_holes``; csrc/hole_windows/."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glance_ext import _library
from glance_ext.ops import reference
from glance_ext.ops._checks import (
    check_gather_holes,
    check_hole_conv2d,
    check_hole_max_pool2d,
    pair,
)
from glance_ext.ops._derivatives import forbid_second_backward, register_autograd
from glance_ext.ops._vmap import loop_over


def gather_holes(
    base: Tensor,
    windows: Tensor | None,
    extents: Tensor,
    origins: Tensor,
    tile_size: int | Sequence[int],
    fill: float = 0.0,
) -> Tensor:
    """Cuts tiles out of feature maps in which holes have changed a window.

    The map of hole p of image n is ``windows[n, p]`` inside the hole's extent and ``base[n]``
    elsewhere; outside of the map stands ``fill``. Differentiable once in ``base`` and ``windows``.

    Args:
        base: ``(N, C, H, W)``, the features without holes; float32, float64, float16 or bfloat16.
        windows: ``(N, P, C, h, w)``, the changed features, from each extent's first cell on; None
            where the extent is the hole itself, whose pixels are 0.
        extents: ``(P, 4)`` or ``(N, P, 4)`` int32: each window's first row and column in the map
            and its rows and columns, which may be fewer than h and w.
        origins: ``(P, 2)`` or ``(N, P, 2)`` int32: each tile's first row and column; may lie
            outside of the map.
        tile_size: th and tw, one int or (height, width).
        fill: The value outside of the map.

    Returns:
        Tiles ``(N, P, C, th, tw)``, channels last in memory.

    Raises:
        ValueError: Shapes, devices or extents do not fit.
        TypeError: A dtype is not supported.
    """
    arguments = (
        base,
        windows,
        extents,
        origins,
        pair("gather_holes", "tile_size", tile_size),
        float(fill),
    )
    if _library.is_loaded():
        return torch.ops.glance_ext.gather_holes(*arguments)
    _library.warn_reference("gather_holes")
    return reference.gather_holes(*arguments)


def hole_max_pool2d(
    base: Tensor,
    windows: Tensor | None,
    extents: Tensor,
    origins: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    window_size: int | Sequence[int],
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Max-pooling seen through many holes, computed only where the holes reach.

    Every cell of each hole's next window is the greatest value of the input's window there, read
    from the hole's own window inside its extent and from the base elsewhere. Outside of the map
    nothing counts, and a cell that sees nothing else is -infinity. As in torch, NaN is the greatest
    of all. Differentiable once in ``base`` and ``windows``.

    Args:
        base: ``(N, C, H, W)``, the layer's input without holes; float32, float64, float16 or
            bfloat16, best channels_last.
        windows: ``(N, P, C, h, w)``; see :func:`gather_holes`.
        extents: ``(P, 4)`` or ``(N, P, 4)`` int32; see :func:`gather_holes`.
        origins: ``(P, 2)`` or ``(N, P, 2)`` int32: first row and column of each hole's next window
            in the layer's output.
        kernel_size: In pixels, one int or (height, width).
        stride: The same.
        window_size: ho and wo, the next windows' size, one int or (height, width).
        padding: In pixels, on both sides.
        dilation: In pixels.

    Returns:
        The next windows ``(N, P, C, ho, wo)``, channels last in memory.

    Raises:
        ValueError: Shapes, devices or numbers do not fit.
        TypeError: A dtype is not supported.
    """
    op = "hole_max_pool2d"
    arguments = (
        base,
        windows,
        extents,
        origins,
        pair(op, "kernel_size", kernel_size),
        pair(op, "stride", stride),
        pair(op, "padding", padding),
        pair(op, "dilation", dilation),
        pair(op, "window_size", window_size),
    )
    if _library.is_loaded():
        return torch.ops.glance_ext.hole_max_pool2d(*arguments)
    _library.warn_reference(op)
    return reference.hole_max_pool2d(*arguments)


def hole_conv2d(
    base: Tensor,
    windows: Tensor | None,
    extents: Tensor,
    origins: Tensor,
    cells: Tensor,
    ratio: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    negative_slope: float = 1.0,
) -> Tensor:
    """One layer of a network seen through many holes, computed only where the holes reach.

    For each listed cell of each hole's next window, with X the input's window there (read from the
    hole's own window inside its extent, from the base elsewhere, 0 outside of the map)::

        output = act(ratio * weight * X + bias)

    and exactly 0 for all other cells. For a partial convolution ratio is ``sum(1) / sum(M)``; for a
    plain one it is 1. Fused: gather, convolution, ratio, bias and activation are one pass over
    memory. :class:`glance_ext.nn.HoleFeatures` plans the geometry and runs whole networks.
    Differentiable once in ``base``, ``windows``, ``weight`` and ``bias``.

    Args:
        base: ``(N, C, H, W)``, the layer's input without holes; float32, float64, float16 or
            bfloat16, best channels_last.
        windows: ``(N, P, C, h, w)``; see :func:`gather_holes`.
        extents: ``(P, 4)`` or ``(N, P, 4)`` int32; see :func:`gather_holes`.
        origins: ``(P, 2)`` or ``(N, P, 2)`` int32: first row and column of each hole's next window
            in the layer's output.
        cells: ``(M,)`` int32, ascending: the flat indices of the nonzero elements of ``ratio``.
        ratio: ``(P, ho, wo)`` or ``(N, P, ho, wo)`` float32 (float64 for float64): 0 for cells that
            are outside the hole's reach or invalid.
        weight: ``(K, C, kh, kw)``, of the base's dtype.
        bias: ``(K,)`` or None.
        stride: In pixels, one int or (height, width).
        padding: The same, on both sides.
        dilation: The same.
        negative_slope: Of LeakyReLU; 0 for ReLU, 1 for none.

    Returns:
        The next windows ``(N, P, K, ho, wo)``, channels last in memory.

    Raises:
        ValueError: Shapes, devices or numbers do not fit.
        TypeError: A dtype is not supported.
    """
    op = "hole_conv2d"
    arguments = (
        base,
        windows,
        extents,
        origins,
        cells,
        ratio,
        weight,
        bias,
        pair(op, "stride", stride),
        pair(op, "padding", padding),
        pair(op, "dilation", dilation),
        float(negative_slope),
    )
    if _library.is_loaded():
        return torch.ops.glance_ext.hole_conv2d(*arguments)
    _library.warn_reference(op)
    return reference.hole_conv2d(*arguments)


def _windows_like(base: Tensor, *size: int) -> Tensor:
    """An empty ``(N, P, C, h, w)``, channels last in memory."""
    n, p, c, h, w = size
    return base.new_empty((n, p, h, w, c)).permute(0, 1, 4, 2, 3)


def _base_like(base: Tensor) -> Tensor:
    return base.new_empty(base.shape).contiguous(memory_format=torch.channels_last)


def _fake_gather(
    base: Tensor,
    windows: Tensor | None,
    extents: Tensor,
    origins: Tensor,
    tile_size: Sequence[int],
    fill: float,
) -> Tensor:
    check_gather_holes(base, windows, extents, origins, tile_size)
    return _windows_like(base, base.shape[0], extents.shape[-2], base.shape[1], *tile_size)


def _fake_gather_backward(
    grad_tiles: Tensor,
    base: Tensor,
    windows: Tensor | None,
    extents: Tensor,
    origins: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    return _fake_scatter(base, windows, output_mask)


def _fake_scatter(
    base: Tensor, windows: Tensor | None, output_mask: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    return (
        _base_like(base) if output_mask[0] else base.new_empty(0),
        _windows_like(base, *windows.shape)
        if output_mask[1] and windows is not None
        else base.new_empty(0),
    )


def fake_pool(
    base: Tensor,
    windows: Tensor | None,
    extents: Tensor,
    origins: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    window_size: Sequence[int],
) -> Tensor:
    """``hole_max_pool2d``'s checks, and an empty result of its size."""
    check_hole_max_pool2d(
        base, windows, extents, origins, kernel_size, stride, padding, dilation, window_size
    )
    return _windows_like(base, base.shape[0], extents.shape[-2], base.shape[1], *window_size)


def _fake_pool_backward(
    grad_output: Tensor,
    base: Tensor,
    windows: Tensor | None,
    extents: Tensor,
    origins: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    return _fake_scatter(base, windows, output_mask)


def fake_conv(
    base: Tensor,
    windows: Tensor | None,
    extents: Tensor,
    origins: Tensor,
    cells: Tensor,
    ratio: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    negative_slope: float,
) -> Tensor:
    """``hole_conv2d``'s checks, and an empty result of its size."""
    check_hole_conv2d(
        base,
        windows,
        extents,
        origins,
        cells,
        ratio,
        weight,
        bias,
        stride,
        padding,
        dilation,
        negative_slope,
    )
    size = (base.shape[0], extents.shape[-2], weight.shape[0], ratio.shape[-2], ratio.shape[-1])
    return _windows_like(base, *size)


def _fake_conv_backward(
    grad_output: Tensor,
    output: Tensor,
    base: Tensor,
    windows: Tensor | None,
    extents: Tensor,
    origins: Tensor,
    ratio: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    negative_slope: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_weight = base.new_empty(0)
    if output_mask[2]:
        of_weight = weight.new_empty(weight.shape).to(
            memory_format=torch.channels_last
            if not weight.is_contiguous()
            and weight.is_contiguous(memory_format=torch.channels_last)
            else torch.contiguous_format
        )
    return (
        *_fake_scatter(base, windows, output_mask[:2]),
        of_weight,
        base.new_empty(weight.shape[0] if output_mask[3] else 0),
    )


def _setup_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _backward_gather(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needed = list(ctx.needs_input_grad[:2])
    grads = torch.ops.glance_ext.gather_holes_backward(grad, *ctx.saved_tensors, needed)
    chosen = [g if wanted else None for g, wanted in zip(grads, needed, strict=True)]
    return (*chosen, None, None, None, None)


def _setup_pool(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.settings = inputs[4:8]


def _backward_pool(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needed = list(ctx.needs_input_grad[:2])
    grads = torch.ops.glance_ext.hole_max_pool2d_backward(
        grad, *ctx.saved_tensors, *ctx.settings, needed
    )
    chosen = [g if wanted else None for g, wanted in zip(grads, needed, strict=True)]
    return (*chosen, *[None] * 7)


def _setup_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    base, windows, extents, origins, _, ratio, weight, _, *settings = inputs
    ctx.save_for_backward(output, base, windows, extents, origins, ratio, weight)
    ctx.settings = settings


def _backward_conv(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needed = [ctx.needs_input_grad[index] for index in (0, 1, 6, 7)]
    grads = torch.ops.glance_ext.hole_conv2d_backward(
        grad, *ctx.saved_tensors, *ctx.settings, needed
    )
    base, windows, weight, bias = (
        g if wanted else None for g, wanted in zip(grads, needed, strict=True)
    )
    return (base, windows, *[None] * 4, weight, bias, *[None] * 4)


def _fold_base(op: Any, info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    """Folds the mapped dimension of the base into its batch; loops where more is mapped."""
    rest = zip(args[1:], in_dims[1:], strict=True)
    only_base = all(dim is None for arg, dim in rest if isinstance(arg, Tensor))
    if in_dims[0] is None or not only_base or args[1] is not None or args[2].dim() != 2:
        return loop_over(op, info, in_dims, *args)
    folded = args[0].movedim(in_dims[0], 0).flatten(0, 1)
    return op(folded, *args[1:]).unflatten(0, (info.batch_size, -1)), 0


def _vmap_gather(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    return _fold_base(torch.ops.glance_ext.gather_holes, info, in_dims, *args)


def _vmap_gather_backward(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    return loop_over(torch.ops.glance_ext.gather_holes_backward, info, in_dims, *args)


def _vmap_pool(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    return _fold_base(torch.ops.glance_ext.hole_max_pool2d, info, in_dims, *args)


def _vmap_pool_backward(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    return loop_over(torch.ops.glance_ext.hole_max_pool2d_backward, info, in_dims, *args)


def _vmap_conv(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    return _fold_base(torch.ops.glance_ext.hole_conv2d, info, in_dims, *args)


def _vmap_conv_backward(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    return loop_over(torch.ops.glance_ext.hole_conv2d_backward, info, in_dims, *args)


if _library.is_loaded():
    for _op, _fake, _fake_back, _setup, _back, _vmap, _vmap_back in (
        (
            "gather_holes",
            _fake_gather,
            _fake_gather_backward,
            _setup_gather,
            _backward_gather,
            _vmap_gather,
            _vmap_gather_backward,
        ),
        (
            "hole_max_pool2d",
            fake_pool,
            _fake_pool_backward,
            _setup_pool,
            _backward_pool,
            _vmap_pool,
            _vmap_pool_backward,
        ),
        (
            "hole_conv2d",
            fake_conv,
            _fake_conv_backward,
            _setup_conv,
            _backward_conv,
            _vmap_conv,
            _vmap_conv_backward,
        ),
    ):
        torch.library.register_fake(f"glance_ext::{_op}", _fake)
        torch.library.register_fake(f"glance_ext::{_op}_backward", _fake_back)
        register_autograd(f"glance_ext::{_op}", _back, setup_context=_setup)
        forbid_second_backward(_op)
        torch.library.register_vmap(f"glance_ext::{_op}", _vmap)
        torch.library.register_vmap(f"glance_ext::{_op}_backward", _vmap_back)
