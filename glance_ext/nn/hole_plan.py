"""Which cells of a network's features a hole reaches: geometry, the same for every image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock

import torch
import torch.nn.functional as F
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
        reaches_all: Whether each of these windows is the whole output.
        full_from: The first layer whose input has no missing cell any more, for any hole; the
            number of layers if there is none.
    """

    steps: tuple[HoleStep, ...]
    extents: Tensor
    output_size: tuple[int, int]
    reaches_all: bool
    full_from: int


class _AxisTable:
    """What holes change and hide along one axis, layer by layer, by where they begin.

    A hole is a rectangle, and so is everything that follows from it: rows and columns can be told
    apart until their counts are multiplied. Along one axis there are few different holes, in every
    step of a training the same ones; so what has been worked out for one is kept.

    Args:
        layers: From the image on.
        axis: 0 for rows, 1 for columns.
        length: Of the image.
        hole: The holes' length.
    """

    def __init__(self, layers: Sequence[LayerShape], axis: int, length: int, hole: int) -> None:
        self._layers, self._axis, self._hole = layers, axis, hole
        self._lengths = [length]  # of each layer's input, and of the output
        for layer in layers:
            self._lengths.append(layer.output_length(self._lengths[-1], axis))
        self._taps = [self._windows_of(index) for index in range(len(layers))]
        self._lock = Lock()
        self._lines = _Lines(
            torch.full((length - hole + 1,), -1),
            torch.empty((0, len(layers) + 1), dtype=torch.long),
            torch.empty((0, len(layers) + 1), dtype=torch.long),
            torch.empty((0, len(layers) + 1), dtype=torch.bool),
            [torch.empty((0, 1)) for _ in layers],
            [torch.empty((0, 1)) for _ in layers],
        )

    @property
    def output_length(self) -> int:
        """Of the last layer's output."""
        return self._lengths[-1]

    def lines(self, starts: Tensor) -> _Lines:
        """What is known of holes, each ``(holes, ...)``, at the starts ``(holes,)``."""
        with self._lock:
            unknown = starts[self._lines.row[starts] < 0].unique()
            if unknown.numel():
                self._lines = self._lines.with_more(unknown, self._work_out(unknown))
            known = self._lines
        return known.of(known.row[starts])

    def _windows_of(self, index: int) -> tuple[Tensor, Tensor]:
        """For each cell of a layer's output its window's cells, and which are inside the map."""
        layer, axis, length = self._layers[index], self._axis, self._lengths[index]
        taps = (
            torch.arange(self._lengths[index + 1])[:, None] * layer.stride[axis]
            - layer.padding[axis]
            + torch.arange(layer.kernel[axis]) * layer.dilation[axis]
        )
        inside = (taps >= 0) & (taps < length)
        if not bool(inside.any(1).all()):
            raise ValueError(
                f"{layer.name}: expected every window to meet the input, got one that holds "
                "nothing but padding"
            )
        return taps.clamp(0, length - 1), inside

    def _work_out(self, starts: Tensor) -> _Lines:
        cells = torch.arange(self._lengths[0])
        first, count = starts, torch.full_like(starts, self._hole)
        hidden = (cells >= first[:, None]) & (cells < (first + count)[:, None])
        firsts, counts, hides = [first], [count], [hidden.any(1)]
        present, missing = [], []
        for layer, (at, inside), length in zip(
            self._layers, self._taps, self._lengths[1:], strict=True
        ):
            all_missing = (hidden[:, at] & inside).sum(2)
            offset = at - first[:, None, None]
            reached = ((offset >= 0) & (offset < count[:, None, None]) & inside).any(2)
            cells = torch.arange(length)
            first = torch.where(reached, cells, length).amin(1)
            count = (torch.where(reached, cells, -1).amax(1) - first + 1).clamp_min(0)
            first = torch.where(count > 0, first, 0)
            hidden = all_missing == inside.sum(1)
            if not layer.keeps_mask:
                hidden = torch.zeros_like(hidden)
            firsts.append(first)
            counts.append(count)
            hides.append(hidden.any(1))
            # the hole's own window, at least one cell long, so that no tensor is empty
            offsets = torch.arange(max(1, int(count.max())))
            cell = (first[:, None] + offsets).clamp_max(length - 1)
            within = offsets < count[:, None]
            present.append((inside.sum(1)[cell] * within).float())
            missing.append((all_missing.gather(1, cell) * within).float())
        return _Lines(
            torch.arange(len(starts)),
            torch.stack(firsts, 1),
            torch.stack(counts, 1),
            torch.stack(hides, 1),
            present,
            missing,
        )


@dataclass(frozen=True)
class _Lines:
    """Holes along one axis.

    Attributes:
        row: ``(starts,)``, where a hole that begins there stands below; -1 for nowhere.
        first: ``(U, layers + 1)``, the first cell of each layer's input that the hole reaches, and
            of the output.
        count: ``(U, layers + 1)``, how many it reaches, from the first to the last.
        hides: ``(U, layers + 1)`` bool, whether any cell is missing.
        present: For each layer ``(U, w)``: how many cells of its window are inside the map, for
            each output cell that the hole reaches; 0 behind these.
        missing: For each layer ``(U, w)``: how many of them are missing.
    """

    row: Tensor
    first: Tensor
    count: Tensor
    hides: Tensor
    present: list[Tensor]
    missing: list[Tensor]

    def with_more(self, starts: Tensor, more: _Lines) -> _Lines:
        row = self.row.clone()
        row[starts] = len(self.first) + more.row
        return _Lines(
            row,
            torch.cat((self.first, more.first)),
            torch.cat((self.count, more.count)),
            torch.cat((self.hides, more.hides)),
            [_stacked(a, b) for a, b in zip(self.present, more.present, strict=True)],
            [_stacked(a, b) for a, b in zip(self.missing, more.missing, strict=True)],
        )

    def of(self, rows: Tensor) -> _Lines:
        return _Lines(
            rows,
            self.first[rows],
            self.count[rows],
            self.hides[rows],
            [table[rows] for table in self.present],
            [table[rows] for table in self.missing],
        )


def _stacked(a: Tensor, b: Tensor) -> Tensor:
    """Two tables of windows below each other, the shorter windows filled up with zeros."""
    width = max(a.shape[1], b.shape[1])
    return torch.cat([F.pad(t, (0, width - t.shape[1])) for t in (a, b)])


@lru_cache(maxsize=32)
def _axis_table(layers: tuple[LayerShape, ...], axis: int, length: int, hole: int) -> _AxisTable:
    return _AxisTable(layers, axis, length, hole)


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
    tables = [_axis_table(tuple(layers), i, image_size[i], hole_size[i]) for i in range(2)]
    rows, columns = (table.lines(flat[:, i]) for i, table in enumerate(tables))
    # (layers + 1, ..., 4): first row and column, rows and columns
    extents = torch.stack((rows.first, columns.first, rows.count, columns.count), -1).int()
    extents = extents.transpose(0, 1).contiguous().unflatten(1, shape)
    origin = extents[..., :2].contiguous()
    longest = extents.flatten(1, -2)[..., 2:]
    sizes = longest.amax(1).clamp_min(1).tolist() if len(flat) else [[1, 1]] * len(longest)
    hidden = (rows.hides | columns.hides).any(0).tolist()
    steps = []
    for index, layer in enumerate(layers):
        size = (sizes[index + 1][0], sizes[index + 1][1])
        valid = _outer(rows.present[index], columns.present[index], size)
        window = layer.kernel[0] * layer.kernel[1]
        if hidden[index] and layer.partial:
            valid = valid - _outer(rows.missing[index], columns.missing[index], size)
        if layer.partial:
            ratio = torch.where(valid > 0, window / valid.to(dtype), 0)
        else:
            ratio = (valid > 0).to(dtype)
        cells = ratio.flatten().nonzero().flatten().int()
        steps.append(
            HoleStep(
                extents[index],
                origin[index + 1],
                size,
                ratio.unflatten(0, shape),
                cells,
                len(cells) * window,
            )
        )
    output = (tables[0].output_length, tables[1].output_length)
    # Asked here, on the CPU, so that no pass has to wait for a device that knows the answer.
    whole = tuple(sizes[-1]) == output and bool(
        (extents[-1][..., 2:] == torch.tensor(output)).all()
    )
    return HoleGeometry(
        tuple(steps),
        extents[-1],
        output,
        whole,
        max((i + 1 for i, hides in enumerate(hidden[:-1]) if hides), default=0),
    )


def _outer(rows: Tensor, columns: Tensor, size: tuple[int, int]) -> Tensor:
    """Products of counts ``(holes, rows)`` and ``(holes, columns)``, ``(holes, *size)``."""
    return rows[:, : size[0], None] * columns[:, None, : size[1]]
