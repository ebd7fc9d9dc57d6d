"""Images larger than the network sees, as overlapping windows whose maps blend without a seam.

The windows begin at multiples of :data:`TILE_STRIDE` from the image's first pixel, and a last row
and column of them stand flush with the border, so that no pixel is without one. In a pixel's value
a window weighs by the pixel's place in that window alone: fully in its middle, and less and less
towards its border, over the overlap of two neighbours. Hence a scene that moves by a multiple of
the stride takes its map along, but for what the flush windows reach: the last 256 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from glance_ext.data.decode import MAX_PIXELS
from glance_ext.models.glance import IMAGE_SIZE

T = TypeVar("T")

TILE_STRIDE = 192
"""Pixels from one window to the next; what is left of 256 is their overlap."""


def tiled_size(height: int, width: int) -> tuple[int, int]:
    """The size at which an image is cut into windows: its own, unless a side is too short.

    Args:
        height: In pixels.
        width: In pixels.

    Returns:
        The size, enlarged in proportion until the shorter side is 256 pixels.

    Raises:
        MemoryError: So narrow an image would become larger than any that is read.
    """
    scale = max(
        1.0, *(least / side for least, side in zip(IMAGE_SIZE, (height, width), strict=True))
    )
    size = max(IMAGE_SIZE[0], round(height * scale)), max(IMAGE_SIZE[1], round(width * scale))
    if scale > 1 and math.prod(size) > MAX_PIXELS:
        raise MemoryError(f"tile: a {height}x{width} image would become {size[0]}x{size[1]}")
    return size


class Canvas:
    """A map of an image of any size from 256x256 on, put together from its windows' maps.

    Args:
        size: Height and width of the image in pixels.

    Attributes:
        map: ``(H, W)`` float32, complete once every window of :attr:`windows` was added.
        windows: First row and column of every window, row by row.
    """

    def __init__(self, size: Sequence[int]) -> None:
        starts = [_starts(length, window) for length, window in zip(size, IMAGE_SIZE, strict=True)]
        self.windows = [(row, column) for row in starts[0] for column in starts[1]]
        self.map = torch.zeros(tuple(size))
        self._weights = [
            _weights(axis, length, window)
            for axis, length, window in zip(starts, size, IMAGE_SIZE, strict=True)
        ]

    def cut(self, planes: Tensor, window: tuple[int, int]) -> Tensor:
        """A window ``(3, 256, 256)`` of the image ``(3, H, W)``."""
        return planes[(slice(None), *_place(window))]

    def add(self, window: tuple[int, int], anomaly_map: Tensor) -> None:
        """Adds the map ``(256, 256)`` of a window, weighted so that all windows make the whole."""
        rows, columns = (weights[i] for weights, i in zip(self._weights, window, strict=True))
        self.map[_place(window)] += anomaly_map * rows[:, None] * columns


def windows_of(canvases: Sequence[Canvas]) -> Iterator[tuple[int, tuple[int, int]]]:
    """The windows of several images, one after another, as (image, first row and column)."""
    for index, canvas in enumerate(canvases):
        for window in canvas.windows:
            yield index, window


def in_batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Items in lists of ``size``, the last one with what is left."""
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some


def random_windows(planes: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Cuts windows out of an image at random places, to train on.

    Args:
        planes: ``(3, H, W)``, at least 256x256.
        most: The most windows; a smaller image gives as many as it takes to tile it.
        generator: Draws the places.

    Returns:
        ``(n, 3, 256, 256)``, n at least 1.
    """
    count = max(1, min(most, len(Canvas(planes.shape[-2:]).windows)))
    places = [
        torch.randint(length - window + 1, (count,), generator=generator).tolist()
        for length, window in zip(planes.shape[-2:], IMAGE_SIZE, strict=True)
    ]
    return torch.stack(
        [planes[(slice(None), *_place(place))] for place in zip(*places, strict=True)]
    )


def _place(window: tuple[int, int]) -> tuple[slice, slice]:
    rows, columns = (slice(i, i + n) for i, n in zip(window, IMAGE_SIZE, strict=True))
    return rows, columns


def _starts(length: int, window: int) -> list[int]:
    if length < window:
        raise ValueError(f"tile: expected a side of at least {window} pixels, got {length}")
    starts = list(range(0, length - window + 1, TILE_STRIDE))
    if starts[-1] != length - window:
        starts.append(length - window)
    return starts


def _weights(starts: Sequence[int], length: int, window: int) -> dict[int, Tensor]:
    """For each window of one axis the weights of its pixels; at every pixel they add up to 1.

    What a window weighs before that is a trapezium: it rises over the overlap, is 1 in the middle,
    and falls. All windows make a product of rows and columns, so their weights do too.
    """
    pixels = np.arange(window) + 0.5
    ramp = np.minimum(np.minimum(pixels, window - pixels) / (window - TILE_STRIDE), 1.0)
    total = np.zeros(length)
    for start in starts:
        total[start : start + window] += ramp
    return {
        start: torch.from_numpy((ramp / total[start : start + window]).astype(np.float32))
        for start in starts
    }
