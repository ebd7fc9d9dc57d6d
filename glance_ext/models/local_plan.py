"""Local-Net on every patch of a grid, with nothing computed twice.

A network of convolutions and max-pools without padding describes a patch by activations, and each
of these belongs to a place of the image: the pixel at which its receptive field begins. Patches
that overlap share activations, but a pool of stride 2 keeps every other place only, and which ones
depends on where the patch begins. So two patches share a layer's activations exactly if their
starts agree modulo the product of the strides up to that layer: for Local-Net modulo 1 up to the
first convolution, modulo 2 up to the second and modulo 4 from there on. One fully convolutional
pass for each residue modulo 4 would be exact too, but repeat the earlier layers, on a stride-2 grid
four times.

The origins of a grid are a product of rows and columns, and so is every layer's set of places that
some patch needs. :class:`LocalPlan` works backwards from the starts to these sets, axis by axis,
and cuts each into runs: places of one residue without a gap. A run of rows and a run of columns are
one block, computed by one call of the layer. Thus each activation that a patch needs is computed
once, and none that no patch needs: with convolutions done directly, no plan has fewer
multiply-adds. What this count leaves out is the cost of a call and of copying, which counts where
blocks are small; therefore blocks of equal size go through a layer as one batch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glance_ext.ops import winograd_conv2d

# Blocks up to this many input elements are batched. Larger ones keep a processor busy alone, and
# copying them together would cost more than the calls that it saves.
_BATCHED_ELEMENTS = 2**20

# A convolution of the image and the pool behind it go band by band, each of which has about so many
# bytes between the two: few enough to stay in a cache.
_BAND_BYTES = 2**22

# Images go through the layers together as long as a layer's input and output stay below this.
_CPU_BYTES = 2**27
_DEVICE_BYTES = 2**32


@dataclass(frozen=True)
class _Step:
    """A layer that looks through windows, and the LeakyReLU that follow it."""

    layer: nn.Conv2d | nn.MaxPool2d
    slopes: tuple[float, ...]

    def __call__(self, windows: Tensor, stride: tuple[int, int]) -> Tensor:
        """Applies them.

        Args:
            windows: ``(..., h, w, C)``, strided as it may be.
            stride: Takes the place of the layer's own.

        Returns:
            ``(B, h', w', C')``, where B is the product of the leading sizes.
        """
        layer = self.layer
        if isinstance(layer, nn.MaxPool2d) and windows.is_cpu and not windows.requires_grad:
            x = _max_pool(windows, _pair(layer.kernel_size), stride)
        else:
            x = windows.flatten(0, -4).permute(0, 3, 1, 2)
            if isinstance(layer, nn.Conv2d) and stride == (1, 1) and layer.groups == 1:
                x = winograd_conv2d(x, layer.weight, layer.bias)
            elif isinstance(layer, nn.Conv2d):
                x = F.conv2d(x, layer.weight, layer.bias, stride, groups=layer.groups)
            else:
                x = F.max_pool2d(x, layer.kernel_size, stride)
            x = x.permute(0, 2, 3, 1)
        for slope in self.slopes:
            x = F.leaky_relu(x, slope, inplace=not x.requires_grad)
        return x


@dataclass(frozen=True)
class _Geometry:
    """What a plan has to know of a layer.

    Attributes:
        kernel: Rows and columns of a window.
        stride: Rows and columns between windows.
        channels: Channels of the output.
        multiply_adds: Of one place of the output, all channels.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    channels: int
    multiply_adds: int


@dataclass(frozen=True)
class _Comb:
    """Windows of equal size and spacing on one axis: of each of some equal runs, alike.

    Attributes:
        source: Which comb of the layer before holds the input; 0 for the image.
        first_run: The first run of that comb that is looked at.
        runs: How many runs are looked at, consecutively.
        offset: Where in each of them the first window begins, in elements.
        count: Windows in each of them.
        spacing: Elements from one window to the next.
        extent: Elements of a window.
        stride: Elements from one place of the output to the next within a window.
    """

    source: int
    first_run: int
    runs: int
    offset: int
    count: int
    spacing: int
    extent: int
    stride: int

    def __len__(self) -> int:
        return self.runs * self.count


class LocalPlan:
    """How to compute a network's feature of every patch of a grid from shared activations.

    Planned once and used for every image: a plan knows the layers' sizes, not their weights.

    Args:
        layers: Conv2d, MaxPool2d and LeakyReLU layers, without padding or dilation, in order.
        row_starts: First rows of the patches, ascending.
        column_starts: First columns of the patches, ascending.
        patch_size: Side of a patch in pixels.

    Attributes:
        row_starts: As given.
        column_starts: As given.
        patch_size: As given.
        multiply_adds: Of all convolutions for one image.

    Raises:
        TypeError: A layer is of another kind.
        ValueError: A layer has padding, say, a patch does not shrink to one feature, or the starts
            are not ascending.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        row_starts: Sequence[int],
        column_starts: Sequence[int],
        patch_size: int,
    ) -> None:
        self._geometry = tuple(_geometry(_steps(layers)))
        side = _output_size(self._geometry, (patch_size, patch_size))
        if side != (1, 1):
            raise ValueError(
                "LocalPlan: expected a patch_size that the layers shrink to 1x1, got "
                f"{patch_size}, which becomes {side[0]}x{side[1]}"
            )
        self.row_starts = _checked("row_starts", row_starts)
        self.column_starts = _checked("column_starts", column_starts)
        self.patch_size = patch_size
        rows, columns = (
            _Axis([(g.kernel[axis], g.stride[axis]) for g in self._geometry], starts)
            for axis, starts in enumerate((self.row_starts, self.column_starts))
        )
        self._combs = list(zip(rows.combs, columns.combs, strict=True))
        self._row_order, self._column_order = rows.order, columns.order
        self._indices: dict[tuple[int, torch.device], Tensor] = {}
        places = [r * c for r, c in zip(rows.places, columns.places, strict=True)]
        self.multiply_adds = sum(
            g.multiply_adds * n for g, n in zip(self._geometry, places, strict=True)
        )
        sizes = [g.channels * n for g, n in zip(self._geometry, places, strict=True)]
        # What one image needs at a time: the input and the output of one layer.
        self._elements = max(map(sum, zip(sizes, [0, *sizes], strict=False)))

    def __len__(self) -> int:
        return len(self.row_starts) * len(self.column_starts)

    def __call__(self, layers: Iterable[nn.Module], images: Tensor) -> Tensor:
        """Describes every patch of every image.

        Args:
            layers: Those that were planned for, or others of the same sizes.
            images: ``(N, C, H, W)``, of any size that holds the patches.

        Returns:
            Features ``(N, P, n)`` of the patches row by row, as each patch alone would have them.

        Raises:
            ValueError: The layers are others, or a patch lies outside of the images.
        """
        steps = _steps(layers)
        if tuple(_geometry(steps)) != self._geometry:
            raise ValueError("LocalPlan: expected the layers that were planned for, got others")
        self._check_images(images, steps)
        limit = _CPU_BYTES if images.device.type == "cpu" else _DEVICE_BYTES
        together = max(1, limit // (self._elements * images.element_size()))
        parts = [self._run(steps, part) for part in images.split(together)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _check_images(self, images: Tensor, steps: Sequence[_Step]) -> None:
        channels = next((s.layer.in_channels for s in steps if isinstance(s.layer, nn.Conv2d)), 0)
        if images.ndim != 4 or (channels and images.shape[1] != channels):
            raise ValueError(
                f"LocalPlan: expected images (N, {channels}, H, W), got {tuple(images.shape)}"
            )
        outside = [
            next((start for start in starts if start + self.patch_size > size), None)
            for starts, size in zip(
                (self.row_starts, self.column_starts), images.shape[-2:], strict=True
            )
        ]
        if outside != [None, None]:
            row, column = outside
            raise ValueError(
                f"LocalPlan: expected images that hold the {self.patch_size}x{self.patch_size} "
                f"patch at row {self.row_starts[0] if row is None else row}, column "
                f"{self.column_starts[0] if column is None else column}, got images of "
                f"{images.shape[-2]}x{images.shape[-1]} pixels"
            )

    def _run(self, steps: Sequence[_Step], images: Tensor) -> Tensor:
        """The features ``(N, P, n)`` of some images.

        What a layer gives is kept as blocks, by the combs of rows and columns that they come from:
        ``(rows' windows, columns' windows, N, h, w, C)``. Channels come last in memory, since that
        is how convolutions and pools are fastest.
        """
        number = len(images)
        blocks = {(0, 0): images.permute(0, 2, 3, 1).contiguous()[None, None]}
        layers = list(zip(steps, self._combs, strict=True))
        if in_bands := _pooled_in_bands(blocks[0, 0][0, 0], layers[:2]):
            blocks, layers = in_bands, layers[2:]
        for step, (rows, columns) in layers:
            # A pool takes longer to copy for than to do; only convolutions gain from batches.
            largest = _BATCHED_ELEMENTS if isinstance(step.layer, nn.Conv2d) else 0
            batches: dict[object, list[tuple[int, int]]] = defaultdict(list)
            views: dict[tuple[int, int], Tensor] = {}
            for i, row in enumerate(rows):
                for j, column in enumerate(columns):
                    views[i, j] = view = _windows(blocks[row.source, column.source], row, column)
                    alike = (view.shape[-3:], row.stride, column.stride)
                    small = view.shape[-3:].numel() <= largest
                    batches[alike if small else (i, j)].append((i, j))
            blocks = {}
            for keys in batches.values():
                stride = (rows[keys[0][0]].stride, columns[keys[0][1]].stride)
                parts = [views.pop(key) for key in keys]
                if len(parts) > 1:
                    parts = [part.flatten(0, -4) for part in parts]
                    output = step(torch.cat(parts), stride)
                else:
                    output = step(parts[0], stride)
                sizes = [len(rows[i]) * len(columns[j]) * number for i, j in keys]
                for (i, j), block in zip(keys, output.split(sizes), strict=True):
                    blocks[i, j] = block.unflatten(0, (len(rows[i]), len(columns[j]), number))
        return self._gather(blocks, *self._combs[-1])

    def _gather(
        self,
        blocks: dict[tuple[int, int], Tensor],
        rows: Sequence[_Comb],
        columns: Sequence[_Comb],
    ) -> Tensor:
        """The last layer's blocks as ``(N, P, n)``, in the order of the starts."""
        lines = []
        for i in range(len(rows)):
            # (rows' windows, columns' windows, N, h, w, n) -> (N, rows, columns, n)
            parts = [
                blocks[i, j].permute(2, 0, 3, 1, 4, 5).flatten(3, 4).flatten(1, 2)
                for j in range(len(columns))
            ]
            lines.append(parts[0] if len(parts) == 1 else torch.cat(parts, 2))
        features = lines[0] if len(lines) == 1 else torch.cat(lines, 1)
        for axis, order in ((1, self._row_order), (2, self._column_order)):
            if order != sorted(order):
                features = features.index_select(axis, self._index(axis, order, features.device))
        return features.flatten(1, 2)

    def _index(self, axis: int, order: list[int], device: torch.device) -> Tensor:
        """An axis's order as a tensor; kept, since copies to a GPU cannot be in a CUDA graph."""
        if (axis, device) not in self._indices:
            self._indices[axis, device] = torch.tensor(order, device=device)
        return self._indices[axis, device]


def run_layers(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """One pass over whole inputs, each layer computed as a plan computes it.

    Args:
        layers: As for :class:`LocalPlan`.
        x: ``(N, C, H, W)``.

    Returns:
        ``(N, n, H', W')``.
    """
    x = x.permute(0, 2, 3, 1)
    for step in _steps(layers):
        x = step(x, _pair(step.layer.stride))
    return x.permute(0, 3, 1, 2)


def pass_multiply_adds(layers: Iterable[nn.Module], height: int, width: int) -> int:
    """Counts the multiply-adds of one pass over an input of ``height`` by ``width`` pixels.

    Args:
        layers: As for :class:`LocalPlan`.
        height: Rows of the input.
        width: Columns of the input.
    """
    size, total = (height, width), 0
    for geometry in _geometry(_steps(layers)):
        size = _output_size([geometry], size)
        total += geometry.multiply_adds * math.prod(size)
    return total


class _Axis:
    """The plan of one axis.

    Args:
        windows: Kernel size and stride of each layer.
        starts: Where the patches begin.

    Attributes:
        combs: For each layer the combs that make its output, and thereby how its runs are ordered.
        places: How many places of each layer's output are computed.
        order: For each start the index of its place in the last layer's output.
    """

    def __init__(self, windows: Sequence[tuple[int, int]], starts: Sequence[int]) -> None:
        strides = [1]
        for _, stride in windows:
            strides.append(strides[-1] * stride)
        needed = [set(starts)]
        for (kernel, _), step in zip(reversed(windows[1:]), reversed(strides[1:-1]), strict=True):
            needed.insert(0, {p + i * step for p in needed[0] for i in range(kernel)})
        self.places = [len(places) for places in needed]
        self.combs: list[list[_Comb]] = []
        # Where the place at which a run begins is found: comb, run of that comb.
        runs, found = [range(1 << 62)], [(0, 0)]
        for (kernel, stride), step, places in zip(windows, strides, needed, strict=False):
            before, found_before = runs, found
            runs = _runs(places, step * stride)
            pieces = []
            for index, run in enumerate(runs):
                source = next(i for i, other in enumerate(before) if run[0] in other)
                offset = before[source].index(run[0])
                extent = (len(run) - 1) * stride + kernel
                pieces.append((*found_before[source], offset, extent, index))
            combs, indices = _combs(pieces, stride)
            runs = [runs[index] for index in indices]
            found = [(i, j) for i, comb in enumerate(combs) for j in range(len(comb))]
            self.combs.append(combs)
        # Nothing looks at the last layer's output: places further apart than its stride can be one
        # window of a larger stride, which saves copying the input of each.
        self.combs[-1] = [_strided(comb, windows[-1][0]) for comb in self.combs[-1]]
        at = {place: index for index, place in enumerate(p for run in runs for p in run)}
        self.order = [at[start] for start in starts]


def _runs(places: Iterable[int], stride: int) -> list[range]:
    """Cuts places into as few runs of step ``stride`` as possible."""
    runs: list[range] = []
    for place in sorted(places, key=lambda place: (place % stride, place)):
        if runs and place == runs[-1].stop:
            runs[-1] = range(runs[-1].start, place + stride, stride)
        else:
            runs.append(range(place, place + stride, stride))
    return runs


def _combs(
    pieces: Sequence[tuple[int, int, int, int, int]], stride: int
) -> tuple[list[_Comb], list[int]]:
    """Gathers windows into combs.

    Args:
        pieces: For each window the comb and the run that hold it, where it begins in that run, its
            extent, and its index.
        stride: That of the layer.

    Returns:
        The combs, and the indices in the order in which the combs hold them.
    """
    wanted: dict[tuple[int, int], dict[int, dict[int, int]]] = defaultdict(dict)
    for source, run, offset, extent, index in sorted(pieces):
        wanted[source, extent].setdefault(run, {})[offset] = index
    combs, indices = [], []
    for (source, extent), by_run in wanted.items():
        for members in _alike(by_run):
            for teeth in _progressions([*by_run[members[0]]]):
                spacing = teeth[1] - teeth[0] if len(teeth) > 1 else 1
                where = (members[0], len(members), teeth[0], len(teeth), spacing)
                combs.append(_Comb(source, *where, extent, stride))
                indices += [by_run[run][offset] for run in members for offset in teeth]
    return combs, indices


def _alike(by_run: Mapping[int, Iterable[int]]) -> list[list[int]]:
    """Gathers consecutive runs in which windows begin at the same offsets."""
    groups: list[list[int]] = []
    for run, offsets in by_run.items():
        last = groups[-1] if groups else []
        if last and run == last[-1] + 1 and [*by_run[last[-1]]] == [*offsets]:
            last.append(run)
        else:
            groups.append([run])
    return groups


def _strided(comb: _Comb, kernel: int) -> _Comb:
    """Makes one window of a run's windows, if each of them gives one place."""
    if comb.count == 1 or comb.extent != kernel:
        return comb
    extent = (comb.count - 1) * comb.spacing + kernel
    return replace(comb, count=1, spacing=1, extent=extent, stride=comb.spacing)


def _progressions(offsets: Sequence[int]) -> list[list[int]]:
    """Cuts ascending numbers into consecutive arithmetic progressions."""
    parts: list[list[int]] = []
    for offset in offsets:
        last = parts[-1] if parts else []
        if len(last) == 1 or (len(last) > 1 and offset - last[-1] == last[1] - last[0]):
            last.append(offset)
        else:
            parts.append([offset])
    return parts


def _windows(block: Tensor, row: _Comb, column: _Comb) -> Tensor:
    """A view of a block's windows.

    Args:
        block: ``(rows' runs, columns' runs, N, h, w, C)``.
        row: The windows' rows.
        column: The windows' columns.

    Returns:
        ``(rows' runs, rows' windows, columns' runs, columns' windows, N, row.extent,
        column.extent, C)``.
    """
    for axis, comb in ((0, row), (1, column)):
        block = block.narrow(axis, comb.first_run, comb.runs)
        length = (comb.count - 1) * comb.spacing + comb.extent
        block = block.narrow(axis + 3, comb.offset, length)
    windows = block.unfold(3, row.extent, row.spacing).unfold(4, column.extent, column.spacing)
    # Now (runs, runs, N, windows, windows, C, rows, columns).
    return windows.permute(0, 3, 1, 4, 2, 6, 7, 5)


_Combs = tuple[Sequence[_Comb], Sequence[_Comb]]


def _pooled_in_bands(
    images: Tensor, layers: Sequence[tuple[_Step, _Combs]]
) -> dict[tuple[int, int], Tensor] | None:
    """A first convolution and the pool behind it, without the whole of what lies between.

    Args:
        images: ``(N, H, W, C)``.
        layers: The first two, with their combs.

    Returns:
        The pool's blocks, as :meth:`LocalPlan._run` keeps them; None if the layers are others, if
        one of them has more windows than one in a run, or where bands are of no use.
    """
    if len(layers) < 2 or not images.is_cpu or torch.is_grad_enabled():
        return None
    (conv, conv_combs), (pool, pool_combs) = layers
    combs = [comb for pair in (*conv_combs, *pool_combs) for comb in pair]
    if (
        not isinstance(conv.layer, nn.Conv2d)
        or not isinstance(pool.layer, nn.MaxPool2d)
        or any(len(pair) > 1 for pair in conv_combs)
        or any(len(comb) > 1 for comb in combs)
    ):
        return None
    (row,), (column,) = conv_combs
    kernel, stride = _pair(conv.layer.kernel_size), (row.stride, column.stride)
    window = _pair(pool.layer.kernel_size)
    channels = conv.layer.out_channels
    blocks = {
        (i, j): images.new_empty(
            1,
            1,
            len(images),
            (rows.extent - window[0]) // rows.stride + 1,
            (columns.extent - window[1]) // columns.stride + 1,
            channels,
        )
        for i, rows in enumerate(pool_combs[0])
        for j, columns in enumerate(pool_combs[1])
    }
    lines = (row.extent - kernel[0]) // stride[0] + 1  # of the convolution
    seen = images.narrow(1, row.offset, row.extent).narrow(2, column.offset, column.extent)
    line_bytes = seen[:, 0, :, 0].numel() * channels * images.element_size()
    band = max(1, _BAND_BYTES // max(1, line_bytes))
    for first in range(0, lines, band):
        last = min(first + band + window[0] - 1, lines)  # what a pool begins in the band it ends
        extent = (last - first - 1) * stride[0] + kernel[0]
        between = conv(seen.narrow(1, first * stride[0], extent), stride)
        for (i, j), block in blocks.items():
            rows, columns = pool_combs[0][i], pool_combs[1][j]
            begin, end = (
                min(max(0, -((rows.offset - line) // rows.stride)), block.shape[3])
                for line in (first, first + band)
            )
            if begin == end:
                continue
            top = rows.offset + begin * rows.stride - first
            part = between.narrow(1, top, (end - begin - 1) * rows.stride + window[0])
            part = part.narrow(2, columns.offset, columns.extent)
            block[0, 0, :, begin:end] = pool(part, (rows.stride, columns.stride))
    return blocks


def _max_pool(windows: Tensor, kernel: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Max-pooling as the maximum of strided views.

    Torch's own pool would copy a strided input first, and write indices.

    Args:
        windows: ``(..., h, w, C)``.
        kernel: Rows and columns of a window of the pool.
        stride: Rows and columns between them.

    Returns:
        ``(B, h', w', C)``, B the product of the leading sizes.
    """
    views = windows.unfold(-3, kernel[0], stride[0]).unfold(-3, kernel[1], stride[1])
    first, *others = (view for line in views.unbind(-2) for view in line.unbind(-1))
    largest = torch.empty(first.shape, dtype=first.dtype, device=first.device)
    torch.maximum(first, others[0] if others else first, out=largest)
    for other in others[1:]:
        torch.maximum(largest, other, out=largest)
    return largest.flatten(0, -4)


def _steps(layers: Iterable[nn.Module]) -> list[_Step]:
    """Joins layers into steps, and moves each LeakyReLU behind the max-pool that follows it.

    LeakyReLU is monotonic: the largest value before it is the largest after it, so that the result
    has the same bits, with a quarter of the work behind a 2x2 pool.
    """
    steps: list[_Step] = []
    for layer in layers:
        if isinstance(layer, nn.LeakyReLU) and steps:
            last = steps.pop()
            steps.append(_Step(last.layer, (*last.slopes, layer.negative_slope)))
        elif isinstance(layer, nn.Conv2d):
            steps.append(_Step(layer, ()))
        elif isinstance(layer, nn.MaxPool2d):
            slopes: tuple[float, ...] = ()
            if steps and min(steps[-1].slopes, default=0.0) >= 0:
                last = steps.pop()
                slopes = last.slopes
                steps.append(_Step(last.layer, ()))
            steps.append(_Step(layer, slopes))
        else:
            raise TypeError(
                "LocalPlan: expected layers Conv2d, MaxPool2d and LeakyReLU behind them, got "
                f"{type(layer).__name__} as layer {len(steps)}"
            )
    if not steps:
        raise ValueError("LocalPlan: expected at least one layer, got none")
    return steps


def _geometry(steps: Iterable[_Step]) -> list[_Geometry]:
    """The sizes of layers."""
    found: list[_Geometry] = []
    for step in steps:
        layer = step.layer
        kernel, stride = _pair(layer.kernel_size), _pair(layer.stride)
        plain = layer.padding in (0, (0, 0), "valid") and _pair(layer.dilation) == (1, 1)
        if isinstance(layer, nn.MaxPool2d):
            plain = plain and not layer.ceil_mode and not layer.return_indices
            channels, multiply_adds = found[-1].channels if found else 0, 0
        else:
            channels = layer.out_channels
            multiply_adds = layer.weight.numel()
        if not plain or stride[0] > kernel[0] or stride[1] > kernel[1]:
            raise ValueError(
                "LocalPlan: expected layers without padding, dilation, ceil_mode or indices, with "
                f"strides up to the kernel size, got {layer}"
            )
        found.append(_Geometry(kernel, stride, channels, multiply_adds))
    return found


def _output_size(geometry: Iterable[_Geometry], size: tuple[int, int]) -> tuple[int, int]:
    """The rows and columns that layers make of ``size``; 0 where nothing is left."""
    rows, columns = size
    for g in geometry:
        rows = max(0, (rows - g.kernel[0]) // g.stride[0] + 1)
        columns = max(0, (columns - g.kernel[1]) // g.stride[1] + 1)
    return rows, columns


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _checked(name: str, starts: Sequence[int]) -> tuple[int, ...]:
    """The starts of one axis, if they are at least one, ascending, and none is negative."""
    checked = tuple(int(start) for start in starts)
    if not checked:
        raise ValueError(f"LocalPlan: expected {name} to have at least one start, got none")
    if checked[0] < 0:
        raise ValueError(f"LocalPlan: expected {name} of 0 or more, got {checked[0]}")
    for before, start in pairwise(checked):
        if start <= before:
            raise ValueError(f"LocalPlan: expected ascending {name}, got {start} behind {before}")
    return checked
