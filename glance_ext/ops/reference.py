"""The ops' specification: plain torch, another algorithm than the kernels, in float64 if asked.

Each function takes the arguments of the torch op of its name (csrc/library.cpp) and is
differentiable by torch's own autograd. Where the compiled library is missing these run instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from glance_ext.ops._checks import (
    check_aggregate,
    check_gather_holes,
    check_hole_conv2d,
    check_hole_max_pool2d,
    check_hole_sequence,
    check_partial_conv2d,
    check_winograd_conv2d,
    memory_format,
    require,
    side_by_side,
)

_CHUNK_ELEMENTS = 1 << 24


def activation(x: Tensor, negative_slope: float) -> Tensor:
    """``x if x > 0, else x * negative_slope``; ReLU, which stops infinity too, for a slope of 0."""
    if negative_slope == 1:
        return x
    return F.leaky_relu(x, negative_slope) if negative_slope != 0 else F.relu(x)


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
    """Partial convolution by writing out every window (csrc/partial_conv/partial_conv.h)."""
    out_h, out_w = check_partial_conv2d(
        input, mask, weight, bias, stride, padding, dilation, groups, negative_slope
    )
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    n, k = input.shape[0], weight.shape[0]
    valid = mask.reshape(
        mask.shape[0] if mask.dim() > 2 else 1,
        mask.shape[1] if mask.dim() > 3 else 1,
        *input.shape[2:],
    ).ne(0)
    mask_groups = 1 if valid.shape[1] == 1 else groups

    def windows(image: Tensor, image_groups: int) -> Tensor:
        columns = F.unfold(image, weight.shape[2:], tuple(dilation), tuple(padding), tuple(stride))
        return columns.unflatten(1, (image_groups, columns.shape[1] // image_groups))

    x = windows(torch.where(valid, input, 0).to(wide), groups)  # (N, G, C/G kh kw, Ho Wo)
    m = windows(valid.to(wide), mask_groups)
    w = weight.to(wide).reshape(groups, k // groups, -1)  # (G, K/G, C/G kh kw)
    count = m.sum(2)  # (1 or N, 1 or G, Ho Wo)
    ratio = torch.where(count > 0, m.shape[2] / count.clamp_min(1), 0)
    output = torch.einsum("gkc,ngcl->ngkl", w, x) * ratio[:, :, None]
    if bias is not None:
        output = output + bias.to(wide).reshape(groups, k // groups, 1)
    output = activation(output, negative_slope)
    output = torch.where(count[:, :, None] > 0, output, 0)
    mask_out = count > 0
    if valid.shape[1] != 1:
        mask_out = mask_out.repeat_interleave(k // groups, 1)
    layout = memory_format(input)
    return (
        output.reshape(n, k, out_h, out_w).to(input.dtype).contiguous(memory_format=layout),
        mask_out.reshape(*mask_out.shape[:2], out_h, out_w).to(mask.dtype),
    )


def aggregate_patch_scores(
    scores: Tensor,
    origins: Tensor | None,
    patch_size: Sequence[int],
    image_size: Sequence[int],
    stride: Sequence[int],
    mode: str,
    parameter: float,
) -> Tensor:
    """Aggregation by a dense matrix of weights (csrc/patch_scores/patch_scores.h)."""
    check_aggregate(scores, origins, patch_size, image_size, stride, mode, parameter)
    device = scores.device
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    if origins is None:
        rows = torch.arange(scores.shape[1], device=device) * stride[0]
        columns = torch.arange(scores.shape[2], device=device) * stride[1]
        origins = torch.cartesian_prod(rows, columns).reshape(-1, 2)
        scores = scores.flatten(1)
    origins = origins.to(device, torch.int64)
    _check_inside(origins, patch_size, image_size)
    flat = scores.to(wide)
    chunk = max(1, _CHUNK_ELEMENTS // (max(1, flat.numel()) * image_size[1]))
    parts = [
        _aggregate_rows(
            flat,
            origins,
            patch_size,
            torch.arange(start, min(start + chunk, image_size[0]), device=device),
            torch.arange(image_size[1], device=device),
            mode,
            parameter,
        )
        for start in range(0, image_size[0], chunk)
    ]
    return torch.cat(parts, 1).to(scores.dtype)


def gather_holes(
    base: Tensor,
    windows: Tensor | None,
    extents: Tensor,
    origins: Tensor,
    tile_size: Sequence[int],
    fill: float,
) -> Tensor:
    """Tiles by pasting every window into a whole map (csrc/hole_windows/hole_windows.h)."""
    check_gather_holes(base, windows, extents, origins, tile_size)
    height, width = tile_size
    margin = max(height, width)
    maps = F.pad(_paste(base, windows, extents), (margin,) * 4, value=fill)
    lowest = torch.tensor([-margin, -margin], device=base.device)
    highest = torch.tensor(base.shape[2:], device=base.device)
    # Beyond the margin there is only fill, wherever the tile stands.
    at = _for_each_window(origins, base).long().clamp(lowest, highest) + margin
    tiles = [
        maps[n, p, :, y : y + height, x : x + width]
        for n, rows in enumerate(at.tolist())
        for p, (y, x) in enumerate(rows)
    ]
    if not tiles:
        return base.new_empty((*maps.shape[:3], height, width))
    return torch.stack(tiles).unflatten(0, maps.shape[:2])


def hole_max_pool2d(
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
    """``hole_max_pool2d``: whole maps with their windows in place, cut, then pooled."""
    check_hole_max_pool2d(
        base, windows, extents, origins, kernel_size, stride, padding, dilation, window_size
    )
    steps = torch.tensor(list(stride), dtype=torch.int32, device=origins.device)
    margin = torch.tensor(list(padding), dtype=torch.int32, device=origins.device)
    size = [
        (window_size[i] - 1) * stride[i] + dilation[i] * (kernel_size[i] - 1) + 1 for i in range(2)
    ]
    tiles = gather_holes(base, windows, extents, origins * steps - margin, size, float("-inf"))
    pooled = F.max_pool2d(
        tiles.flatten(0, 1), tuple(kernel_size), tuple(stride), 0, tuple(dilation)
    )
    return pooled.unflatten(0, tiles.shape[:2])


def hole_conv2d(
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
    """One layer by convolving whole maps, one for each hole (csrc/hole_windows/hole_windows.h)."""
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
    maps = _paste(base, windows, extents).to(ratio.dtype)
    n, p = maps.shape[:2]
    k, (height, width) = weight.shape[0], ratio.shape[-2:]
    at = _for_each_window(origins, base).long()
    margins: list[int] = []  # as F.pad wants them, so that every window is inside
    for axis in (1, 0):
        first = min(0, int(at[..., axis].min())) if at.numel() else 0
        last = int(at[..., axis].max()) + ratio.shape[axis - 2] - 1 if at.numel() else 0
        reach = dilation[axis] * (weight.shape[2 + axis] - 1) + 1
        end = last * stride[axis] - padding[axis] + reach
        margins += [padding[axis] - first * stride[axis], max(0, end - base.shape[2 + axis])]
        at[..., axis] -= first
    whole = F.conv2d(
        F.pad(maps.flatten(0, 1), margins),
        weight.to(ratio.dtype),
        None,
        tuple(stride),
        0,
        tuple(dilation),
    ).unflatten(0, (n, p))
    output = whole.new_zeros((n, p, k, height, width))
    for i, rows in enumerate(at.tolist()):
        for j, (y, x) in enumerate(rows):
            output[i, j] = whole[i, j, :, y : y + height, x : x + width]
    scale = (ratio if ratio.dim() == 4 else ratio.expand(n, -1, -1, -1))[:, :, None]
    output = output * scale
    if bias is not None:
        output = output + bias.to(ratio.dtype)[:, None, None]
    output = activation(output, negative_slope)
    return torch.where(scale != 0, output, 0).to(base.dtype)


def hole_sequence(
    bases: Sequence[Tensor],
    extents: Sequence[Tensor],
    origins: Sequence[Tensor],
    cells: Sequence[Tensor],
    ratios: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    settings: Sequence[int],
    negative_slopes: Sequence[float],
    *,
    conv: Callable[..., Tensor] = hole_conv2d,
    pool: Callable[..., Tensor] = hole_max_pool2d,
) -> Tensor:
    """``hole_sequence``: layer by layer, by ``conv`` and ``pool``."""
    arguments = (bases, extents, origins, cells, ratios, weights, biases)
    check_hole_sequence(*arguments, settings, negative_slopes)
    windows: Tensor | None = None
    for i, (base, extent, origin, cell, ratio, weight, bias) in enumerate(
        zip(*arguments, strict=True)
    ):
        kernel, *geometry = (settings[8 * i + j : 8 * i + j + 2] for j in range(0, 8, 2))
        seen = (base, windows, extent, origin)
        if weight is None:
            windows = pool(*seen, kernel, *geometry, tuple(ratio.shape[-2:]))
        else:
            windows = conv(*seen, cell, ratio, weight, bias, *geometry, negative_slopes[i])
    assert windows is not None
    return windows


def winograd_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Plain convolution, the sum as it stands (csrc/winograd/winograd_conv.h)."""
    check_winograd_conv2d(input, weight, bias)
    return F.conv2d(input, weight, bias).contiguous(memory_format=side_by_side(input))


def _for_each_window(rows: Tensor, base: Tensor) -> Tensor:
    """Geometry ``(P, ...)`` or ``(N, P, ...)`` as ``(N, P, ...)``."""
    return rows if rows.dim() == 3 else rows.expand(base.shape[0], *rows.shape)


def _paste(base: Tensor, windows: Tensor | None, extents: Tensor) -> Tensor:
    """Whole maps ``(N, P, C, H, W)``: the base with each hole's window in its place."""
    maps = base[:, None].repeat(1, extents.shape[-2], 1, 1, 1)
    for n, rows in enumerate(_for_each_window(extents, base).tolist()):
        for p, (y, x, height, width) in enumerate(rows):
            window = 0 if windows is None else windows[n, p, :, :height, :width]
            maps[n, p, :, y : y + height, x : x + width] = window
    return maps


def _aggregate_rows(
    scores: Tensor,
    origins: Tensor,
    patch_size: Sequence[int],
    rows: Tensor,
    columns: Tensor,
    mode: str,
    parameter: float,
) -> Tensor:
    """Rows of the map ``(N, len(rows), W)`` from scores ``(N, P)``."""
    y = rows[:, None] - origins[:, 0]  # (h, P): the pixel's place in the patch
    x = columns[:, None] - origins[:, 1]  # (W, P)
    if mode == "idw":
        dy = y.to(scores.dtype) - (patch_size[0] - 1) / 2
        dx = x.to(scores.dtype) - (patch_size[1] - 1) / 2
        squared = dy[:, None].square() + dx.square()  # (h, W, P)
        nearest = squared.amin(-1, keepdim=True)
        # (d_min / d)^power; at a pixel on centres, one there and zero elsewhere
        weight = torch.where(squared == nearest, 1, (nearest / squared) ** (parameter / 2))
        has_part = (nearest > 0) | (squared == 0)
        return _weighted_mean(weight, has_part, scores)
    inside = ((y >= 0) & (y < patch_size[0]))[:, None] & ((x >= 0) & (x < patch_size[1]))
    covered = inside.any(-1)
    if not bool(covered.all()):
        at = (~covered).nonzero()[0].tolist()
        require(
            False,
            "aggregate_patch_scores",
            "every pixel to be covered by a patch, got none over "
            f"row {at[0] + int(rows[0])}, column {at[1]}",
        )
    if mode == "max":
        first_best = torch.where(inside, scores[:, None, None], -torch.inf).max(-1)
        return first_best.values
    weight = inside.to(scores.dtype)
    if mode == "gaussian":
        dy = (y.to(scores.dtype) - (patch_size[0] - 1) / 2) / (parameter * patch_size[0])
        dx = (x.to(scores.dtype) - (patch_size[1] - 1) / 2) / (parameter * patch_size[1])
        bell = torch.exp(-0.5 * (dy[:, None].square() + dx.square()))
        weight = torch.where(inside, bell, 0).to(scores.dtype)
    return _weighted_mean(weight, inside, scores)


def _weighted_mean(weight: Tensor, has_part: Tensor, scores: Tensor) -> Tensor:
    """``(N, h, W)`` of scores ``(N, P)`` by weights ``(h, W, P)``, of those with a part."""
    weight = weight / weight.sum(-1, keepdim=True)
    # A weight of zero must not touch its score, which may be NaN.
    return torch.where(has_part, weight * scores[:, None, None], 0).sum(-1)


def _check_inside(origins: Tensor, patch_size: Sequence[int], image_size: Sequence[int]) -> None:
    # A difference of sizes, since origins + patch_size may overflow.
    last = torch.tensor(list(image_size)) - torch.tensor(list(patch_size))
    bad = ((origins < 0) | (origins > last.to(origins.device))).any(1).nonzero()
    if bad.numel():
        index = int(bad[0])
        require(
            False,
            "aggregate_patch_scores",
            f"every patch inside the {image_size[0]}x{image_size[1]} image, got patch {index} of "
            f"{patch_size[0]}x{patch_size[1]} at row {int(origins[index, 0])}, "
            f"column {int(origins[index, 1])}",
        )
