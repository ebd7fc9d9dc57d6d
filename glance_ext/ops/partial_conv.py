"""``partial_conv2d``: docstring, fake, autograd and vmap; kernels in csrc/partial_conv/."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glance_ext import _library
from glance_ext.ops import reference
from glance_ext.ops._checks import check_partial_conv2d, memory_format, pair
from glance_ext.ops._derivatives import forbid_second_backward, register_autograd
from glance_ext.ops._vmap import loop_over
from glance_ext.ops.decompositions import partial_conv2d as decomposed


def partial_conv2d(
    input: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    negative_slope: float = 1.0,
) -> tuple[Tensor, Tensor]:
    r"""Convolves the valid pixels of each window and rescales by how many there are.

    With the window's input X, its mask M and the full window 1 (Wang et al., CVPR 2021, section
    3.3; Liu et al., ECCV 2018)::

        output = act(weight * where(M, X, 0) * sum(1) / sum(M) + bias)    if sum(M) > 0, else 0
        mask_out = sum(M) > 0
        act(x) = x if x > 0, else x * negative_slope

    Counts are integers, the ratio and all accumulation are in float32 or wider, there is no
    epsilon. What stands behind the mask, NaN and infinity included, does not matter. Padding
    counts as missing. Differentiable once in ``input``, ``weight`` and ``bias``; works with
    autocast, ``torch.func.vmap``, ``torch.compile(fullgraph=True)`` and ``torch.export``.

    Args:
        input: ``(N, C, H, W)``, float32, float64, float16 or bfloat16. A channels_last input gives
            a channels_last output.
        mask: ``(H, W)``, ``(N, H, W)``, ``(1 or N, 1, H, W)`` or ``(1 or N, C, H, W)``; bool, uint8
            or the input's dtype; nonzero = valid. With C channels the window of an output channel
            is that of its own group: ``kh * kw * C / groups`` values.
        weight: ``(K, C / groups, kh, kw)``.
        bias: ``(K,)`` or None.
        stride: In pixels, one int or (height, width).
        padding: The same, on both sides.
        dilation: The same.
        groups: Divides C and K.
        negative_slope: Of a LeakyReLU that is applied on the way; 0 for ReLU, 1 for none.

    Returns:
        The output ``(N, K, Ho, Wo)`` and the next layer's mask, of ``mask``'s dtype: ``(1 or N, 1,
        Ho, Wo)``, or ``(1 or N, K, Ho, Wo)`` for a mask of C channels.

    Raises:
        ValueError: Shapes, devices or numbers do not fit, or the mask requires a gradient.
        TypeError: A dtype is not supported.
    """
    op = "partial_conv2d"
    if mask.requires_grad:
        raise ValueError(f"{op}: expected a mask that requires no gradient, got one that does")
    arguments = (
        input,
        mask,
        weight,
        bias,
        pair(op, "stride", stride),
        pair(op, "padding", padding),
        pair(op, "dilation", dilation),
        groups,
        float(negative_slope),
    )
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        return decomposed(*arguments)
    if _library.is_loaded():
        return torch.ops.glance_ext.partial_conv2d(*arguments)
    _library.warn_reference(op)
    return _reference(*arguments)


def _reference(
    input: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any
) -> tuple[Tensor, Tensor]:
    """The reference under autocast's rule: features in the low precision, the mask in its own."""
    device = input.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return reference.partial_conv2d(input, mask, weight, bias, *geometry)

    def lower(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(torch.get_autocast_dtype(device))

    valid = mask.ne(0) if mask.is_floating_point() else mask
    low_bias = None if bias is None else lower(bias)
    with torch.autocast(device, enabled=False):
        output, mask_out = reference.partial_conv2d(
            lower(input), valid, lower(weight), low_bias, *geometry
        )
    return output, mask_out.to(mask.dtype)


def _fake(
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
    size = check_partial_conv2d(
        input, mask, weight, bias, stride, padding, dilation, groups, negative_slope
    )
    n, k = input.shape[0], weight.shape[0]
    output = input.new_empty((n, k, *size)).to(memory_format=memory_format(input))
    mask_batch = mask.shape[0] if mask.dim() > 2 else 1
    many = mask.dim() > 3 and mask.shape[1] != 1
    return output, mask.new_empty((mask_batch, k if many else 1, *size))


def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    mask: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
    output: Tensor | None = None,
    negative_slope: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    def like(tensor: Tensor, wanted: bool) -> Tensor:
        if not wanted:
            return tensor.new_empty(0)
        return tensor.new_empty(tensor.shape).to(memory_format=memory_format(tensor))

    return (
        like(input, output_mask[0]),
        like(weight, output_mask[1]),
        input.new_empty(weight.shape[0] if output_mask[2] else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, mask, weight, _, *geometry, negative_slope = inputs
    if ctx.needs_input_grad[1]:
        raise ValueError(
            "partial_conv2d: expected a mask that requires no gradient, got one that does"
        )
    ctx.mark_non_differentiable(output[1])
    activated = negative_slope != 1
    ctx.save_for_backward(input, mask, weight, output[0] if activated else None)
    ctx.geometry = geometry
    ctx.negative_slope = negative_slope


def _backward(ctx: Any, grad_output: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    nothing = (None,) * 9
    if grad_output is None:
        return nothing
    input, mask, weight, output = ctx.saved_tensors
    needed = [ctx.needs_input_grad[index] for index in (0, 2, 3)]
    grads = torch.ops.glance_ext.partial_conv2d_backward(
        grad_output,
        input,
        mask,
        weight,
        *ctx.geometry,
        needed,
        output,
        ctx.negative_slope,
    )
    of_input, of_weight, of_bias = (
        grad if wanted else None for grad, wanted in zip(grads, needed, strict=True)
    )
    return of_input, None, of_weight, of_bias, None, None, None, None, None


def _vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    """Folds the mapped dimension of the input into its batch; loops where more is mapped."""
    input, mask = args[:2]
    only_input = in_dims[0] is not None and all(dim is None for dim in in_dims[1:4])
    one_mask = mask.dim() == 2 or mask.shape[0] == 1
    if not (only_input and one_mask):
        return loop_over(torch.ops.glance_ext.partial_conv2d, info, in_dims, *args)
    folded = input.movedim(in_dims[0], 0).flatten(0, 1)
    output, mask_out = torch.ops.glance_ext.partial_conv2d(folded, *args[1:])
    return (output.unflatten(0, (info.batch_size, -1)), mask_out), (0, None)


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    return loop_over(torch.ops.glance_ext.partial_conv2d_backward, info, in_dims, *args)


if _library.is_loaded():
    torch.library.register_fake("glance_ext::partial_conv2d", _fake)
    torch.library.register_fake("glance_ext::partial_conv2d_backward", _fake_backward)
    register_autograd("glance_ext::partial_conv2d", _backward, setup_context=_setup_context)
    forbid_second_backward("partial_conv2d")
    torch.library.register_vmap("glance_ext::partial_conv2d", _vmap)
    torch.library.register_vmap("glance_ext::partial_conv2d_backward", _vmap_backward)
