"""What fakes and references check; the native ops check the same, with the same words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MODES = ("mean", "gaussian", "max", "idw")


def require(condition: bool, op: str, expected: str, error: type[Exception] = ValueError) -> None:
    """Raises ``error`` with ``op: expected ...`` unless the condition holds."""
    if not condition:
        raise error(f"{op}: expected {expected}")


def pair(op: str, name: str, value: int | Sequence[int]) -> list[int]:
    """One or two ints as ``[height, width]``.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return [value, value]
    is_pair = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2
    if not is_pair or not all(isinstance(v, (int, torch.SymInt)) for v in value):  # type: ignore[union-attr]
        raise TypeError(f"{op}: expected {name} to be one or two ints, got {value!r}")
    return list(value)  # type: ignore[arg-type]


def dtype_name(tensor: Tensor) -> str:
    """The dtype without ``torch.``."""
    return str(tensor.dtype).removeprefix("torch.")


def memory_format(tensor: Tensor) -> torch.memory_format:
    """The layout that outputs take from an input: channels_last only where it is unambiguous."""
    if not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def side_by_side(input: Tensor) -> torch.memory_format:
    """channels_last for an input whose channels stand side by side in memory, cropped or not."""
    if input.stride(1) == 1 and not input.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def _require_pair(op: str, name: str, value: Sequence[int]) -> None:
    require(len(value) == 2, op, f"{name} to be (height, width), got {list(value)}")


def _check_like(op: str, name: str, tensor: Tensor, other: str, like: Tensor) -> None:
    """Checks that a tensor has the dtype and the device of another argument."""
    require(
        tensor.dtype == like.dtype,
        op,
        f"{name} of the {other}'s {dtype_name(like)}, got {dtype_name(tensor)}",
        TypeError,
    )
    require(
        tensor.device == like.device,
        op,
        f"{name} on the {other}'s device {like.device}, got {tensor.device}",
    )


def check_partial_conv2d(
    input: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    negative_slope: float = 1.0,
) -> tuple[int, int]:
    """Checks the arguments of ``partial_conv2d`` and gives the output's height and width."""
    op = "partial_conv2d"
    require(
        input.dtype in FLOAT_DTYPES,
        op,
        f"input to be float32, float64, float16 or bfloat16, got {dtype_name(input)}",
        TypeError,
    )
    require(input.dim() == 4, op, f"input of shape (N, C, H, W), got {list(input.shape)}")
    h, w = input.shape[2:]
    require(h > 0 and w > 0, op, f"input to have at least one pixel, got {h}x{w}")
    require(
        weight.dim() == 4, op, f"weight of shape (K, C / groups, kh, kw), got {list(weight.shape)}"
    )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            _check_like(op, name, tensor, "input", input)
    n, c = input.shape[:2]
    k = weight.shape[0]
    require(
        groups > 0 and c % groups == 0 and k % groups == 0,
        op,
        f"groups to divide the input's {c} channels and the output's {k}, got {groups}",
    )
    require(
        weight.shape[1] == c // groups,
        op,
        f"weight to have {c // groups} input channels (C / groups), got {weight.shape[1]}",
    )
    require(
        all(size > 0 for size in weight.shape),
        op,
        f"weight of a positive size, got {list(weight.shape)}",
    )
    if bias is not None:
        require(
            bias.dim() == 1 and bias.shape[0] == k,
            op,
            f"bias of shape ({k},), got {list(bias.shape)}",
        )
    require(
        mask.dtype in (torch.bool, torch.uint8, input.dtype),
        op,
        f"mask to be bool, uint8 or the input's {dtype_name(input)}, got {dtype_name(mask)}",
        TypeError,
    )
    require(
        mask.device == input.device,
        op,
        f"mask on the input's device {input.device}, got {mask.device}",
    )
    require(mask.dim() in (2, 3, 4), op, f"mask to have 2, 3 or 4 dimensions, got {mask.dim()}")
    require(
        mask.shape[-2] == h and mask.shape[-1] == w,
        op,
        f"mask to be {h}x{w} like the input, got {mask.shape[-2]}x{mask.shape[-1]}",
    )
    mask_batch = mask.shape[0] if mask.dim() > 2 else 1
    mask_channels = mask.shape[1] if mask.dim() > 3 else 1
    require(mask_batch in (1, n), op, f"mask to have a batch of 1 or {n}, got {mask_batch}")
    require(mask_channels in (1, c), op, f"mask to have 1 or {c} channels, got {mask_channels}")
    for name, value in (("stride", stride), ("padding", padding), ("dilation", dilation)):
        _require_pair(op, name, value)
    out = []
    for axis, side in enumerate(("height", "width")):
        require(stride[axis] > 0, op, f"stride to be positive, got {stride[axis]}")
        require(padding[axis] >= 0, op, f"padding not to be negative, got {padding[axis]}")
        require(dilation[axis] > 0, op, f"dilation to be positive, got {dilation[axis]}")
        reach = dilation[axis] * (weight.shape[2 + axis] - 1) + 1
        padded = input.shape[2 + axis] + 2 * padding[axis]
        require(
            padded >= reach,
            op,
            f"the padded input to be at least the window's {reach} pixels along its {side}, "
            f"got {padded}",
        )
        out.append((padded - reach) // stride[axis] + 1)
    require(negative_slope >= 0, op, f"negative_slope not to be negative, got {negative_slope:g}")
    return out[0], out[1]


def check_aggregate(
    scores: Tensor,
    origins: Tensor | None,
    patch_size: Sequence[int],
    image_size: Sequence[int],
    stride: Sequence[int],
    mode: str,
    parameter: float,
) -> None:
    """Checks the arguments of ``aggregate_patch_scores``, all but the values of origins."""
    op = "aggregate_patch_scores"
    require(
        scores.dtype in FLOAT_DTYPES,
        op,
        f"scores to be float32, float64, float16 or bfloat16, got {dtype_name(scores)}",
        TypeError,
    )
    require(mode in MODES, op, f"mode to be 'mean', 'gaussian', 'max' or 'idw', got '{mode}'")
    if mode == "gaussian":
        require(
            0.1 <= parameter < float("inf"),
            op,
            f"sigma to be at least 0.1 of the patch, got {parameter:g}",
        )
    if mode == "idw":
        require(
            0 < parameter < float("inf"),
            op,
            f"power to be positive and finite, got {parameter:g}",
        )
    for name, size in (("patch_size", patch_size), ("image_size", image_size), ("stride", stride)):
        _require_pair(op, name, size)
    for name, size in (("patch_size", patch_size), ("image_size", image_size)):
        require(
            size[0] > 0 and size[1] > 0, op, f"{name} to be positive, got ({size[0]}, {size[1]})"
        )
    if origins is None:
        require(
            scores.dim() == 3,
            op,
            f"scores of shape (N, gh, gw) on a regular grid, got {list(scores.shape)}",
        )
        require(
            stride[0] > 0 and stride[1] > 0,
            op,
            f"stride to be positive, got ({stride[0]}, {stride[1]})",
        )
        patches = scores.shape[1] * scores.shape[2]
        require(mode != "idw" or patches > 0, op, "at least one patch, got 0")
        return
    require(scores.dim() == 2, op, f"scores of shape (N, P) with origins, got {list(scores.shape)}")
    require(
        origins.dtype in (torch.int64, torch.int32),
        op,
        f"origins to be int64 or int32, got {dtype_name(origins)}",
        TypeError,
    )
    require(
        origins.dim() == 2 and origins.shape[0] == scores.shape[1] and origins.shape[1] == 2,
        op,
        f"origins of shape ({scores.shape[1]}, 2), got {list(origins.shape)}",
    )
    require(mode != "idw" or scores.shape[1] > 0, op, "at least one patch, got 0")


def _check_index(op: str, name: str, index: Tensor, base: Tensor) -> None:
    require(
        index.dtype == torch.int32, op, f"{name} to be int32, got {dtype_name(index)}", TypeError
    )
    require(
        index.device == base.device,
        op,
        f"{name} on the base's device {base.device}, got {index.device}",
    )


def _check_windows(op: str, base: Tensor, windows: Tensor | None, extents: Tensor) -> None:
    require(
        base.dtype in FLOAT_DTYPES,
        op,
        f"base to be float32, float64, float16 or bfloat16, got {dtype_name(base)}",
        TypeError,
    )
    require(
        base.dim() == 4 and all(size > 0 for size in base.shape[1:]),
        op,
        f"base of shape (N, C, H, W) with at least one pixel, got {list(base.shape)}",
    )
    _check_index(op, "extents", extents, base)
    require(
        extents.dim() in (2, 3) and extents.shape[-1] == 4,
        op,
        f"extents of shape (P, 4) or (N, P, 4), got {list(extents.shape)}",
    )
    require(
        extents.dim() == 2 or extents.shape[0] == base.shape[0],
        op,
        f"extents for {base.shape[0]} images, got {extents.shape[0]}",
    )
    if windows is not None:
        n, p, c = base.shape[0], extents.shape[-2], base.shape[1]
        _check_like(op, "windows", windows, "base", base)
        require(
            windows.dim() == 5
            and windows.shape[0] == n
            and windows.shape[1] == p
            and windows.shape[2] == c,
            op,
            f"windows of shape ({n}, {p}, {c}, h, w), got {list(windows.shape)}",
        )


def _check_origins(op: str, origins: Tensor, extents: Tensor, base: Tensor) -> None:
    _check_index(op, "origins", origins, base)
    require(
        origins.dim() == extents.dim()
        and origins.shape[-1] == 2
        and origins.shape[:-1] == extents.shape[:-1],
        op,
        f"origins to have a row of 2 for each of the extents {list(extents.shape)}, got "
        f"{list(origins.shape)}",
    )


def check_gather_holes(
    base: Tensor,
    windows: Tensor | None,
    extents: Tensor,
    origins: Tensor,
    tile_size: Sequence[int],
) -> None:
    """Checks the arguments of ``gather_holes``, all but the values of the geometry."""
    op = "gather_holes"
    _check_windows(op, base, windows, extents)
    _require_pair(op, "tile_size", tile_size)
    require(
        tile_size[0] > 0 and tile_size[1] > 0,
        op,
        f"tile_size to be positive, got ({tile_size[0]}, {tile_size[1]})",
    )
    _check_origins(op, origins, extents, base)


def check_hole_max_pool2d(
    base: Tensor,
    windows: Tensor | None,
    extents: Tensor,
    origins: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    window_size: Sequence[int],
) -> None:
    """Checks the arguments of ``hole_max_pool2d``, all but the values of the geometry."""
    op = "hole_max_pool2d"
    _check_windows(op, base, windows, extents)
    for name, value in (
        ("window_size", window_size),
        ("kernel_size", kernel_size),
        ("stride", stride),
        ("dilation", dilation),
    ):
        _require_pair(op, name, value)
        require(
            value[0] > 0 and value[1] > 0,
            op,
            f"{name} to be positive, got ({value[0]}, {value[1]})",
        )
    _require_pair(op, "padding", padding)
    require(
        padding[0] >= 0 and padding[1] >= 0,
        op,
        f"padding not to be negative, got ({padding[0]}, {padding[1]})",
    )
    _check_origins(op, origins, extents, base)


def check_hole_conv2d(
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
) -> None:
    """Checks the arguments of ``hole_conv2d``, all but the values of the geometry."""
    op = "hole_conv2d"
    _check_windows(op, base, windows, extents)
    require(
        weight.dim() == 4 and all(size > 0 for size in weight.shape),
        op,
        f"weight of shape (K, C, kh, kw), got {list(weight.shape)}",
    )
    require(
        weight.shape[1] == base.shape[1],
        op,
        f"weight to have the base's {base.shape[1]} channels, got {weight.shape[1]}",
    )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            _check_like(op, name, tensor, "base", base)
    if bias is not None:
        k = weight.shape[0]
        require(
            bias.dim() == 1 and bias.shape[0] == k,
            op,
            f"bias of shape ({k},), got {list(bias.shape)}",
        )
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    require(
        ratio.dtype == wide,
        op,
        f"ratio to be {str(wide).removeprefix('torch.')}, got {dtype_name(ratio)}",
        TypeError,
    )
    require(
        ratio.device == base.device,
        op,
        f"ratio on the base's device {base.device}, got {ratio.device}",
    )
    require(
        ratio.dim() == extents.dim() + 1 and ratio.shape[:-2] == extents.shape[:-1],
        op,
        f"ratio of one window for each of the extents {list(extents.shape)}, got "
        f"{list(ratio.shape)}",
    )
    _check_index(op, "cells", cells, base)
    require(cells.dim() == 1, op, f"cells of shape (M,), got {list(cells.shape)}")
    for name, value in (("stride", stride), ("padding", padding), ("dilation", dilation)):
        _require_pair(op, name, value)
    for axis in range(2):
        require(stride[axis] > 0, op, f"stride to be positive, got {stride[axis]}")
        require(padding[axis] >= 0, op, f"padding not to be negative, got {padding[axis]}")
        require(dilation[axis] > 0, op, f"dilation to be positive, got {dilation[axis]}")
    require(negative_slope >= 0, op, f"negative_slope not to be negative, got {negative_slope:g}")
    _check_origins(op, origins, extents, base)


def check_hole_sequence(
    bases: Sequence[Tensor],
    extents: Sequence[Tensor],
    origins: Sequence[Tensor],
    cells: Sequence[Tensor],
    ratios: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    settings: Sequence[int],
    negative_slopes: Sequence[float],
) -> None:
    """Checks that ``hole_sequence`` has every argument once a layer."""
    op, count = "hole_sequence", len(bases)
    require(count > 0, op, "at least one layer, got 0 bases")
    for name, values, each in (
        ("extents", extents, 1),
        ("origins", origins, 1),
        ("cells", cells, 1),
        ("ratios", ratios, 1),
        ("weights", weights, 1),
        ("biases", biases, 1),
        ("settings", settings, 8),
        ("negative_slopes", negative_slopes, 1),
    ):
        size: int = len(values)
        require(size == each * count, op, f"{each * count} {name} for {count} layers, got {size}")
    for ratio in ratios:
        require(
            ratio.dim() >= 3,
            op,
            f"ratios of shape (P, ho, wo) or (N, P, ho, wo), got {list(ratio.shape)}",
        )


def check_winograd_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Checks the arguments of ``winograd_conv2d``."""
    op = "winograd_conv2d"
    require(
        input.dtype in FLOAT_DTYPES,
        op,
        f"input to be float32, float64, float16 or bfloat16, got {dtype_name(input)}",
        TypeError,
    )
    require(input.dim() == 4, op, f"input of shape (N, C, H, W), got {list(input.shape)}")
    require(
        weight.dim() == 4 and weight.numel() > 0,
        op,
        f"weight of shape (K, C, kh, kw), got {list(weight.shape)}",
    )
    _check_like(op, "weight", weight, "input", input)
    channels = input.shape[1]
    require(
        weight.shape[1] == channels,
        op,
        f"weight to have the input's {channels} channels, got {weight.shape[1]}",
    )
    (height, width), kernel = input.shape[2:], weight.shape[2:]
    require(
        height >= kernel[0] and width >= kernel[1],
        op,
        f"input of at least the kernel's {kernel[0]}x{kernel[1]} pixels, got {height}x{width}",
    )
    if bias is not None:
        _check_like(op, "bias", bias, "input", input)
        require(
            bias.dim() == 1 and bias.shape[0] == weight.shape[0],
            op,
            f"bias of shape ({weight.shape[0]},), got {list(bias.shape)}",
        )
