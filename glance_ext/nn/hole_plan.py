"""Which cells of a network's features a hole reaches: geometry, the same for every image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerShape:
    """A sliding window, and what it makes of a mask.

    Attributes:
        name: For messages.
        kernel: Height and width.
        stride: Rows and columns.
        padding: Missing rows and columns on either side.
        dilation: Rows and columns.
        ceil_mode: Whether a last window may stand over the end, as in ``nn.MaxPool2d``.
        partial: Whether missing pixels are left out and counted (a partial convolution).
        keeps_mask: Whether a cell whose window is all missing is missing too; a plain convolution
            makes every cell valid.
    """

    name: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil_mode: bool
    partial: bool
    keeps_mask: bool

    def output_length(self, length: int, axis: int) -> int:
        """Rows (axis 0) or columns (axis 1) that come out of ``length``."""
        reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        room = length + 2 * self.padding[axis] - reach
        if room < 0:
            raise ValueError(
                f"{self.name}: expected an input of at least {reach - 2 * self.padding[axis]} "
                f"pixels along {('height', 'width')[axis]}, got {length}"
            )
        stride = self.stride[axis]
        if not self.ceil_mode:
            return room // stride + 1
        count = -(-room // stride) + 1
        # torch lets no window begin in the padding behind the end
        return count - 1 if (count - 1) * stride >= length + self.padding[axis] else count


@dataclass(frozen=True)
class HoleStep:
    """One layer's geometry for P holes, or for N images of P holes each.

    Attributes:
        extents: ``(..., P, 4)`` int32: first row and column of each hole's window in the layer's
            input, its rows and columns.
        origins: ``(..., P, 2)`` int32: first row and column of the window in the output.
        size: Rows and columns of the largest window in the output.
        ratio: ``(..., P, *size)``: ``sum(1) / sum(M)`` at the cells that the hole reaches, 0 at
            all others; for a plain convolution 1 and 0.
        cells: ``(M,)`` int32: where ratio is not 0.
        multiply_adds: Of one input channel and one output channel, for all holes together.
    """

    extents: Tensor
    origins: Tensor
    size: tuple[int, int]
    ratio: Tensor
    cells: Tensor
    multiply_adds: int


@dataclass(frozen=True)
class HoleGeometry:
    """All layers' geometry.

    Attributes:
        steps: One for each layer.
        extents: ``(..., P, 4)`` int32: each hole's window in the last layer's output.
        output_size: Height and width of the last layer's output.
        full_from: The first layer whose input has no missing cell any more, for any hole; the
            number of layers if there is none.
        all_of_it: Whether every hole reaches every cell of the last layer's output.
    """

    steps: tuple[HoleStep, ...]
    extents: Tensor
    output_size: tuple[int, int]
    full_from: int
    all_of_it: bool


@dataclass
class _Axis:
    """One axis of every hole: what it changes and what it hides at the current layer.

    A hole is a rectangle, and so is everything that follows from it: rows and columns can be told
    apart until their counts are multiplied.
    """

    which: Tensor  # (holes,): the row of the tables below; holes in one line share it
    first: Tensor  # (U,): the first cell that the hole reaches
    count: Tensor  # (U,): how many it reaches, from the first to the last
    hidden: Tensor  # (U, length) bool: cells that are missing
    length: int


def plan_geometry(
    layers: Sequence[LayerShape],
    image_size: tuple[int, int],
    hole_size: tuple[int, int],
    origins: Tensor,
    dtype: torch.dtype,
) -> HoleGeometry:
    """Follows holes through the layers.

    Args:
        layers: From the image on.
        image_size: Height and width in pixels.
        hole_size: Height and width of every hole in pixels.
        origins: ``(P, 2)`` or ``(N, P, 2)``, first row and column of each hole; inside the image.
        dtype: Of the ratios: float32 or float64.

    Raises:
        ValueError: A layer's window is larger than its input, or meets nothing but padding.
    """
    shape = origins.shape[:-1]
    flat = origins.reshape(-1, 2).long().cpu()
    axes = [_first_axis(flat[:, i], hole_size[i], image_size[i]) for i in range(2)]
    steps = []
    full_from = 0
    for index, layer in enumerate(layers):
        if any(bool(axis.hidden.any()) for axis in axes):
            full_from = index + 1
        extents = _stack(axes, shape, "first", "count")
        following, present, missing = zip(
            *(_next_axis(axis, layer, i) for i, axis in enumerate(axes)), strict=True
        )
        axes = list(following)
        size = (_most(axes[0]), _most(axes[1]))
        valid = _per_cell(present, missing, axes, size)
        window = layer.kernel[0] * layer.kernel[1]
        if not layer.partial:
            ratio = (valid >= 0).to(dtype)
        else:
            ratio = torch.where(valid > 0, window / valid.clamp_min(1).to(dtype), 0)
        cells = ratio.flatten().nonzero().flatten()
        steps.append(
            HoleStep(
                extents,
                _stack(axes, shape, "first"),
                size,
                ratio.reshape(*shape, *size),
                cells.to(torch.int32),
                len(cells) * window,
            )
        )
        if not layer.keeps_mask:
            for axis in axes:
                axis.hidden = torch.zeros_like(axis.hidden)
    return HoleGeometry(
        tuple(steps),
        _stack(axes, shape, "first", "count"),
        (axes[0].length, axes[1].length),
        full_from,
        all(bool((axis.count == axis.length).all()) for axis in axes),
    )


def _first_axis(starts: Tensor, hole: int, length: int) -> _Axis:
    first, which = starts.unique(return_inverse=True)
    cells = torch.arange(length)
    hidden = (cells >= first[:, None]) & (cells < first[:, None] + hole)
    return _Axis(which, first, torch.full_like(first, hole), hidden, length)


def _next_axis(axis: _Axis, layer: LayerShape, i: int) -> tuple[_Axis, Tensor, Tensor]:
    """The axis behind a layer, and for each of its cells how many of its window's rows are inside
    the map ``(length,)`` and how many of these are missing ``(U, length)``."""
    length = layer.output_length(axis.length, i)
    taps = (
        torch.arange(length)[:, None] * layer.stride[i]
        - layer.padding[i]
        + torch.arange(layer.kernel[i]) * layer.dilation[i]
    )
    inside = (taps >= 0) & (taps < axis.length)
    if not bool(inside.any(1).all()):
        raise ValueError(
            f"{layer.name}: expected every window to meet the input, got one that holds nothing "
            "but padding"
        )
    at = taps.clamp(0, axis.length - 1)
    present = inside.sum(1)
    missing = (axis.hidden[:, at] & inside).sum(2)
    offset = at - axis.first[:, None, None]
    reached = ((offset >= 0) & (offset < axis.count[:, None, None]) & inside).any(2)
    cells = torch.arange(length)
    first = torch.where(reached, cells, length).amin(1)
    last = torch.where(reached, cells, -1).amax(1)
    count = (last - first + 1).clamp_min(0)
    first = torch.where(count > 0, first, 0)
    return _Axis(axis.which, first, count, missing == present, length), present, missing


def _most(axis: _Axis) -> int:
    """The length of the longest window; at least 1, so that no tensor is empty."""
    return max(1, int(axis.count.max())) if axis.count.numel() else 1


def _stack(axes: Sequence[_Axis], shape: torch.Size, *names: str) -> Tensor:
    columns = [getattr(axis, name)[axis.which] for name in names for axis in axes]
    return torch.stack(columns, -1).reshape(*shape, len(columns)).to(torch.int32)


def _per_cell(
    present: Sequence[Tensor],
    missing: Sequence[Tensor],
    axes: Sequence[_Axis],
    size: tuple[int, int],
) -> Tensor:
    """Valid pixels in the window of each cell of each hole's window ``(holes, *size)``; -1 outside
    of the hole's reach."""
    parts = []
    for axis, inside, hidden, length in zip(axes, present, missing, size, strict=True):
        offset = torch.arange(length)
        cell = (axis.first[:, None] + offset).clamp_max(axis.length - 1)
        reached = offset < axis.count[:, None]
        parts.append(
            [values[axis.which] for values in (inside[cell], hidden.gather(1, cell), reached)]
        )
    (rows, no_rows, y), (columns, no_columns, x) = parts
    valid = rows[:, :, None] * columns[:, None] - no_rows[:, :, None] * no_columns[:, None]
    return torch.where(y[:, :, None] & x[:, None], valid, -1)
