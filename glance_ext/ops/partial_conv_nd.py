"""Partial convolutions composed of torch's own: 1-d, 3-d, transposed, and with soft masks.

The semantics are those of :func:`glance_ext.ops.partial_conv2d`; the kernels are the library's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from glance_ext.ops._checks import FLOAT_DTYPES, dtype_name, require

Ints = int | Sequence[int]


def compose(
    input: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    outputs: int,
    groups: int,
    convolve: Callable[[Tensor], Tensor],
    count: Callable[[Tensor, int], Tensor],
    full: int | Tensor,
    soft: bool = False,
) -> tuple[Tensor, Tensor]:
    """A partial convolution of two plain ones: of the valid input, and of the mask by ones.

    Rounds as the native op does: the convolution in the input's dtype, ratio and bias in float32 or
    wider. Counts are exact, since sums of ones are, below 2^24.

    Args:
        input: ``(N, C, *size)``.
        mask: ``(1 or N, 1 or C, *size)``, any dtype.
        bias: ``(K,)`` or None.
        outputs: K.
        groups: Divides C and K.
        convolve: The layer's convolution without its bias: ``(N, C, *size)`` to ``(N, K, *out)``.
        count: Sums of the windows of each group: ``(mask, groups)`` to ``(1 or N, groups, *out)``.
        full: What ``count`` gives for one channel where nothing is missing, broadcast over ``out``.
        soft: Whether the mask's values count, instead of whether they are 0.
    """
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    valid = mask if mask.dtype == torch.bool else mask != 0
    shown = (input * mask).to(input.dtype) if soft else input
    output = convolve(torch.where(valid, shown, 0))
    many = mask.shape[1] != 1
    with torch.no_grad(), torch.autocast(input.device.type, enabled=False):
        sums = count((mask if soft else valid).to(wide), groups if many else 1)
        if many and groups != 1:  # a group's count for each of its outputs
            sums = sums.repeat_interleave(outputs // groups, 1)
        seen = sums > 0
        share = sums.clamp_max(1)
        # Soft masks too: full / sums * share, which is finite for sums near 0.
        ratio = full * (input.shape[1] // groups if many else 1) / sums.clamp_min(1)
    dtype = output.dtype  # under autocast not the input's
    output = output.to(wide) * ratio
    if bias is not None:
        output = output + bias.to(wide).reshape(-1, *[1] * (input.dim() - 2))
        if soft:
            output = output * share
    output = torch.where(seen, output, 0).to(dtype)
    mask_out = share if soft else seen
    if many and groups == 1:
        mask_out = mask_out.expand(-1, outputs, *[-1] * (input.dim() - 2))
    return output, mask_out.to(mask.dtype)


def partial_conv1d(
    input: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """:func:`glance_ext.ops.partial_conv2d` in one dimension: signals and series with gaps.

    Args:
        input: ``(N, C, L)``, float32, float64, float16 or bfloat16.
        mask: ``(L,)``, ``(N, L)``, ``(1 or N, 1, L)`` or ``(1 or N, C, L)``; bool, uint8 or a
            floating dtype; nonzero = valid.
        weight: ``(K, C / groups, k)``.
        bias: ``(K,)`` or None.
        stride: In samples.
        padding: On both sides; counts as missing.
        dilation: In samples.
        groups: Divides C and K.

    Returns:
        The output ``(N, K, Lo)`` and the next mask, ``(1 or N, 1 or K, Lo)``, of ``mask``'s dtype.

    Raises:
        ValueError: Shapes or devices do not fit, or the mask requires a gradient.
        TypeError: A dtype is not supported.
    """
    return _convolved(
        "partial_conv1d", F.conv1d, input, mask, weight, bias, (stride, padding, dilation), groups
    )


def partial_conv3d(
    input: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """:func:`glance_ext.ops.partial_conv2d` in three dimensions: volumes, and images over time.

    Args:
        input: ``(N, C, D, H, W)``, float32, float64, float16 or bfloat16.
        mask: ``(D, H, W)``, ``(N, D, H, W)``, ``(1 or N, 1, D, H, W)`` or ``(1 or N, C, D, H, W)``;
            bool, uint8 or a floating dtype; nonzero = valid.
        weight: ``(K, C / groups, kd, kh, kw)``.
        bias: ``(K,)`` or None.
        stride: In voxels, one int or (depth, height, width).
        padding: The same, on both sides; counts as missing.
        dilation: The same.
        groups: Divides C and K.

    Returns:
        The output ``(N, K, Do, Ho, Wo)`` and the next mask, ``(1 or N, 1 or K, Do, Ho, Wo)``, of
        ``mask``'s dtype.

    Raises:
        ValueError: Shapes or devices do not fit, or the mask requires a gradient.
        TypeError: A dtype is not supported.
    """
    return _convolved(
        "partial_conv3d", F.conv3d, input, mask, weight, bias, (stride, padding, dilation), groups
    )


def soft_partial_conv2d(
    input: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """Partial convolution with a mask of weights from 0 to 1, by the rule of NVIDIA's layer.

    With ``s = sum(M)`` over the window::

        u = min(s, 1)
        output = weight * (M * X) * sum(1) / s * u             without a bias
        output = (weight * (M * X) * sum(1) / s * u + b) * u   with one
        mask_out = u

    and exactly 0 where ``s = 0``. For a mask of zeros and ones this is
    :func:`glance_ext.ops.partial_conv2d`. The mask carries no gradient.

    Args:
        input: ``(N, C, H, W)``, float32, float64, float16 or bfloat16. NaN where the mask is 0 does
            not matter.
        mask: ``(H, W)``, ``(N, H, W)``, ``(1 or N, 1, H, W)`` or ``(1 or N, C, H, W)``; bool or a
            floating dtype, from 0 to 1, which is not checked.
        weight: ``(K, C / groups, kh, kw)``.
        bias: ``(K,)`` or None.
        stride: In pixels, one int or (height, width).
        padding: The same, on both sides; counts as missing.
        dilation: The same.
        groups: Divides C and K.

    Returns:
        The output ``(N, K, Ho, Wo)`` and the next mask, ``(1 or N, 1 or K, Ho, Wo)``, of ``mask``'s
        dtype, from 0 to 1.

    Raises:
        ValueError: Shapes or devices do not fit, or the mask requires a gradient.
        TypeError: A dtype is not supported.
    """
    return _convolved(
        "soft_partial_conv2d",
        F.conv2d,
        input,
        mask,
        weight,
        bias,
        (stride, padding, dilation),
        groups,
        soft=True,
    )


def partial_conv_transpose2d(
    input: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
) -> tuple[Tensor, Tensor]:
    """The transposed partial convolution: upsampling of what is valid.

    An output pixel's window is the input pixels that reach it; of how many, ``sum(1)``, depends on
    its place between the strides. What would lie outside of the input counts as missing. So where
    nothing is missing the output is ``conv_transpose2d``'s, and a pixel that no valid input reaches
    is exactly 0.

    Args:
        input: ``(N, C, H, W)``, float32, float64, float16 or bfloat16.
        mask: ``(H, W)``, ``(N, H, W)``, ``(1 or N, 1, H, W)`` or ``(1 or N, C, H, W)``; bool, uint8
            or a floating dtype; nonzero = valid.
        weight: ``(C, K / groups, kh, kw)``.
        bias: ``(K,)`` or None.
        stride: In output pixels, one int or (height, width).
        padding: As ``F.conv_transpose2d``: what is cut from the output on both sides.
        output_padding: As ``F.conv_transpose2d``.
        groups: Divides C and K.
        dilation: In output pixels, one int or (height, width).

    Returns:
        The output ``(N, K, Ho, Wo)`` and the next mask, ``(1 or N, 1 or K, Ho, Wo)``, of ``mask``'s
        dtype.

    Raises:
        ValueError: Shapes or devices do not fit, or the mask requires a gradient.
        TypeError: A dtype is not supported.
    """
    op = "partial_conv_transpose2d"
    strides, pads, more, steps = (
        _ints(op, name, value, 2)
        for name, value in (
            ("stride", stride),
            ("padding", padding),
            ("output_padding", output_padding),
            ("dilation", dilation),
        )
    )
    mask = _checked_mask(op, input, mask, 2)
    require(weight.dim() == 4, op, f"weight to have 4 dimensions, got {list(weight.shape)}")
    outputs = weight.shape[1] * groups
    _check_parameters(op, input, weight, bias, outputs, groups, transposed=True)
    kernel = weight.shape[2:]

    def transposed(x: Tensor, w: Tensor, parts: int) -> Tensor:
        return F.conv_transpose2d(x, w, None, strides, pads, more, parts, steps)

    def count(x: Tensor, parts: int) -> Tensor:
        return transposed(x, x.new_ones(x.shape[1], 1, *kernel), parts)

    def reaching(axis: int) -> Tensor:
        """How many of the kernel's taps meet an input pixel, for each output pixel of an axis."""
        size = (input.shape[2 + axis] - 1) * strides[axis] - 2 * pads[axis] + more[axis]
        size = size + steps[axis] * (kernel[axis] - 1) + 1
        at = torch.arange(size, device=input.device)[:, None] + pads[axis]
        taps = steps[axis] * torch.arange(kernel[axis], device=input.device)
        return ((at - taps) % strides[axis] == 0).sum(1)

    return compose(
        input,
        mask,
        bias,
        outputs,
        groups,
        lambda x: transposed(x, weight, groups),
        count,
        reaching(0)[:, None] * reaching(1),
    )


def _convolved(
    op: str,
    library: Callable[..., Tensor],
    input: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: tuple[Ints, Ints, Ints],
    groups: int,
    soft: bool = False,
) -> tuple[Tensor, Tensor]:
    """A partial convolution by one of torch's."""
    sides = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}[library]
    names = ("stride", "padding", "dilation")
    sizes = [_ints(op, n, v, sides) for n, v in zip(names, geometry, strict=True)]
    mask = _checked_mask(op, input, mask, sides)
    if soft:
        require(
            mask.dtype == torch.bool or mask.is_floating_point(),
            op,
            f"mask to be bool or of a floating dtype, got {dtype_name(mask)}",
            TypeError,
        )
    require(
        weight.dim() == sides + 2,
        op,
        f"weight to have {sides + 2} dimensions, got {list(weight.shape)}",
    )
    outputs = weight.shape[0]
    _check_parameters(op, input, weight, bias, outputs, groups)
    kernel = weight.shape[2:]

    def count(x: Tensor, parts: int) -> Tensor:
        return library(x, x.new_ones(parts, x.shape[1] // parts, *kernel), None, *sizes, parts)

    return compose(
        input,
        mask,
        bias,
        outputs,
        groups,
        lambda x: library(x, weight, None, *sizes, groups),
        count,
        kernel.numel(),
        soft,
    )


def _ints(op: str, name: str, value: Ints, length: int) -> list[int]:
    """One int or ``length`` of them, as a list."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return [value] * length
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == length:
        return list(value)
    raise TypeError(f"{op}: expected {name} to be one or {length} ints, got {value!r}")


def _check_parameters(
    op: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    outputs: int,
    groups: int,
    transposed: bool = False,
) -> None:
    """What torch's convolutions would check with words of their own, or not at all."""
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            # Under autocast the convolution casts them.
            require(
                tensor.dtype == input.dtype or torch.is_autocast_enabled(input.device.type),
                op,
                f"{name} of the input's {dtype_name(input)}, got {dtype_name(tensor)}",
                TypeError,
            )
            require(
                tensor.device == input.device,
                op,
                f"{name} on the input's device {input.device}, got {tensor.device}",
            )
    channels = input.shape[1]
    require(
        groups > 0 and channels % groups == 0 and outputs % groups == 0,
        op,
        f"groups to divide the input's {channels} channels and the output's {outputs}, got "
        f"{groups}",
    )
    first, second = (channels, outputs) if transposed else (outputs, channels)
    require(
        weight.shape[0] == first and weight.shape[1] == second // groups,
        op,
        f"weight of shape ({first}, {second // groups}, ...), got {list(weight.shape)}",
    )
    require(
        bias is None or (bias.dim() == 1 and bias.shape[0] == outputs),
        op,
        f"bias of shape ({outputs},), got {[] if bias is None else list(bias.shape)}",
    )


def _checked_mask(op: str, input: Tensor, mask: Tensor, sides: int) -> Tensor:
    """The mask as ``(1 or N, 1 or C, *size)``."""
    require(
        input.dtype in FLOAT_DTYPES,
        op,
        f"input to be float32, float64, float16 or bfloat16, got {dtype_name(input)}",
        TypeError,
    )
    require(
        input.dim() == sides + 2,
        op,
        f"input to have {sides + 2} dimensions, got {list(input.shape)}",
    )
    require(not mask.requires_grad, op, "a mask that requires no gradient, got one that does")
    require(
        mask.dtype in (torch.bool, torch.uint8) or mask.is_floating_point(),
        op,
        f"mask to be bool, uint8 or of a floating dtype, got {dtype_name(mask)}",
        TypeError,
    )
    require(
        mask.device == input.device,
        op,
        f"mask on the input's device {input.device}, got {mask.device}",
    )
    require(
        sides <= mask.dim() <= sides + 2,
        op,
        f"mask to have {sides}, {sides + 1} or {sides + 2} dimensions, got {mask.dim()}",
    )
    require(
        mask.shape[mask.dim() - sides :] == input.shape[2:],
        op,
        f"mask to be of the input's size {list(input.shape[2:])}, "
        f"got {list(mask.shape[mask.dim() - sides :])}",
    )
    if mask.dim() == sides:
        mask = mask[None, None]
    elif mask.dim() == sides + 1:
        mask = mask[:, None]
    n, c = input.shape[:2]
    require(mask.shape[0] in (1, n), op, f"mask to have a batch of 1 or {n}, got {mask.shape[0]}")
    require(mask.shape[1] in (1, c), op, f"mask to have 1 or {c} channels, got {mask.shape[1]}")
    return mask
