"""``aggregate_patch_scores``: docstring, fake, autograd and vmap; kernels in csrc/patch_scores/."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glance_ext import _library
from glance_ext.ops import reference
from glance_ext.ops._checks import check_aggregate, pair
from glance_ext.ops._derivatives import forbid_second_backward, register_autograd
from glance_ext.ops._vmap import loop_over


def aggregate_patch_scores(
    scores: Tensor,
    patch_size: int | Sequence[int],
    image_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] | None = None,
    origins: Tensor | None = None,
    mode: str = "mean",
    sigma: float = 0.25,
    power: float = 5.0,
) -> Tensor:
    """Turns the scores of overlapping patches into a score for every pixel.

    Each pixel gathers from the patches over it, in a fixed order: there are no atomics and the
    result does not depend on threads. Differentiable once in ``scores``. What depends on the
    patches alone is kept for the next call; with ``origins`` on the CPU a later call on CUDA copies
    nothing and can be captured in a graph.

    Args:
        scores: ``(N, gh, gw)`` on a regular grid of ``stride``, whose patch (i, j) begins at
            ``(i * stride, j * stride)``; or ``(N, P)`` with ``origins``. float32, float64, float16
            or bfloat16; sums are in float32 or wider.
        patch_size: In pixels, one int or (height, width).
        image_size: Of the map, one int or (height, width).
        stride: In pixels, one int or (height, width). Exactly one of stride and origins is given.
        origins: ``(P, 2)`` int64 or int32, row and column of each patch's first pixel. Fastest
            where they are every pair of ascending rows and ascending columns, row by row. Best kept
            on the CPU, where they are checked: on a CUDA device that costs a copy back.
        mode: ``"mean"`` of the patches over the pixel; ``"gaussian"``, their mean weighted by a
            bell around each patch's centre; ``"max"``; ``"idw"``, the mean of all patches weighted
            by the inverse distance to their centres (the map of Wang et al., CVPR 2021, as its one
            public re-implementation has it).
        sigma: Of ``"gaussian"``, as a share of the patch's height and width; at least 0.1.
        power: Of the distance in ``"idw"``, positive.

    Returns:
        The map ``(N, H, W)``, of the scores' dtype and device.

    Raises:
        ValueError: Shapes or numbers do not fit; a patch lies outside the image; a pixel is under
            no patch (the message names the first; ``"idw"`` covers all).
        TypeError: A dtype is not supported.
    """
    op = "aggregate_patch_scores"
    if (stride is None) == (origins is None):
        both = "neither" if stride is None else "both"
        raise ValueError(f"{op}: expected exactly one of stride and origins, got {both}")
    arguments = (
        scores,
        origins,
        pair(op, "patch_size", patch_size),
        pair(op, "image_size", image_size),
        pair(op, "stride", 1 if stride is None else stride),
        mode,
        {"gaussian": float(sigma), "idw": float(power)}.get(mode, 0.0),
    )
    if _library.is_loaded():
        return torch.ops.glance_ext.aggregate_patch_scores(*arguments)
    _library.warn_reference(op)
    return reference.aggregate_patch_scores(*arguments)


def _fake(
    scores: Tensor,
    origins: Tensor | None,
    patch_size: Sequence[int],
    image_size: Sequence[int],
    stride: Sequence[int],
    mode: str,
    parameter: float,
) -> Tensor:
    check_aggregate(scores, origins, patch_size, image_size, stride, mode, parameter)
    return scores.new_empty((scores.shape[0], *image_size))


def _fake_backward(
    grad_map: Tensor,
    scores: Tensor,
    origins: Tensor | None,
    patch_size: Sequence[int],
    stride: Sequence[int],
    mode: str,
    parameter: float,
) -> Tensor:
    return scores.new_empty(scores.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    scores, origins, patch_size, _, stride, mode, parameter = inputs
    ctx.save_for_backward(scores, origins)
    ctx.geometry = (patch_size, stride, mode, parameter)


def _backward(ctx: Any, grad_map: Tensor) -> tuple[Any, ...]:
    scores, origins = ctx.saved_tensors
    grad = torch.ops.glance_ext.aggregate_patch_scores_backward(
        grad_map, scores, origins, *ctx.geometry
    )
    return grad, None, None, None, None, None, None


def _vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    """Folds the mapped dimension of the scores into their batch; loops where origins are mapped."""
    if in_dims[0] is None or in_dims[1] is not None:
        return loop_over(torch.ops.glance_ext.aggregate_patch_scores, info, in_dims, *args)
    folded = args[0].movedim(in_dims[0], 0).flatten(0, 1)
    result = torch.ops.glance_ext.aggregate_patch_scores(folded, *args[1:])
    return result.unflatten(0, (info.batch_size, -1)), 0


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    return loop_over(torch.ops.glance_ext.aggregate_patch_scores_backward, info, in_dims, *args)


if _library.is_loaded():
    torch.library.register_fake("glance_ext::aggregate_patch_scores", _fake)
    torch.library.register_fake("glance_ext::aggregate_patch_scores_backward", _fake_backward)
    register_autograd("glance_ext::aggregate_patch_scores", _backward, setup_context=_setup_context)
    forbid_second_backward("aggregate_patch_scores")
    torch.library.register_vmap("glance_ext::aggregate_patch_scores", _vmap)
    torch.library.register_vmap("glance_ext::aggregate_patch_scores_backward", _vmap_backward)
