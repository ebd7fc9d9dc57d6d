"""What detection should give, in float64, on whole small grids or on parts of large ones."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glance_ext.bench import detect_reference as plain
from glance_ext.models.glance import IMAGE_SIZE, PATCH_SIZE, Glance
from glance_ext.models.normalisation import normalise

_SIDE = IMAGE_SIZE[0]
# float64 takes two seconds for 100 patches on two cores: larger grids are checked in parts.
_WHOLE_PATCHES = 256
_CORNER, _MIDDLE = 12, 4  # sides of those parts in pixels


@dataclass(frozen=True)
class Block:
    """A square of pixels, on the image's diagonal, and the patches over it.

    Attributes:
        first: First row, and first column.
        last: One behind the last.
        patches: Indices of the patch rows over it, which are those of the columns too.
        starts: First rows of all patches of the grid.
    """

    first: int
    last: int
    patches: tuple[int, ...]
    starts: tuple[int, ...]

    def describe(self) -> dict[str, Any]:
        """For the metadata."""
        return {"pixels": [self.first, self.last], "patches": len(self.patches) ** 2}

    @property
    def origins(self) -> list[tuple[int, int]]:
        """Row and column of each of the patches' first pixel, row by row."""
        chosen = [self.starts[index] for index in self.patches]
        return [(row, column) for row in chosen for column in chosen]

    def pixels_of(self, maps: Tensor) -> Tensor:
        """``(N, 256, 256)`` -> ``(N, k)``."""
        inside = slice(self.first, self.last)
        return maps[:, inside, inside].flatten(1)

    def patches_of(self, features: Tensor) -> Tensor:
        """``(N, P, n)`` of all patches -> ``(N, k, n)`` of those over the block."""
        side = len(self.starts)
        index = [row * side + column for row in self.patches for column in self.patches]
        return features[:, index]

    def means(self, scores: Tensor) -> Tensor:
        """The map ``(pixels,)`` of the block from the scores ``(k,)`` of its patches."""
        pixels = torch.arange(self.first, self.last, device=scores.device)[:, None]
        starts = torch.tensor([self.starts[i] for i in self.patches], device=scores.device)
        over = ((starts <= pixels) & (pixels < starts + PATCH_SIZE)).to(scores.dtype)
        side = len(self.patches)
        total = over @ scores.reshape(side, side) @ over.T
        count = over.sum(1)
        return (total / (count[:, None] * count)).flatten()


def blocks(starts: Sequence[int]) -> list[Block]:
    """The whole image, or for grids of many patches two opposite corners and the middle."""
    middle = (_SIDE - _MIDDLE) // 2
    ranges = [(0, _CORNER), (_SIDE - _CORNER, _SIDE), (middle, middle + _MIDDLE)]
    if len(starts) ** 2 <= _WHOLE_PATCHES:
        ranges = [(0, _SIDE)]
    return [
        Block(
            first,
            last,
            tuple(i for i, s in enumerate(starts) if s < last and s + PATCH_SIZE > first),
            tuple(starts),
        )
        for first, last in ranges
    ]


class Truth:
    """Features and maps of some images in float64, each grid computed once.

    Args:
        model: In float32.
        images: ``(N, 3, 256, 256)``, RGB in [0, 1].
    """

    def __init__(self, model: Glance, images: Tensor) -> None:
        self.model = plain.prepared(copy.deepcopy(model).double())
        self._images = normalise(images.double())
        self._known: dict[tuple[tuple[int, ...], int], dict[str, Tensor]] = {}

    def __call__(self, starts: Sequence[int], which: int) -> dict[str, Tensor]:
        """One image's ``local`` and ``global`` features ``(k, n)`` and ``map`` ``(k,)``.

        Args:
            starts: First rows of the grid's patches.
            which: The index of the image.
        """
        key = (tuple(starts), which)
        if key not in self._known:
            image = self._images[which : which + 1]
            parts: dict[str, list[Tensor]] = {"local": [], "global": [], "map": []}
            for block in blocks(starts):
                local = plain.local_features(self.model, image, block.origins)
                global_ = plain.global_features(self.model, image, block.origins)
                parts["local"].append(local[0])
                parts["global"].append(global_[0])
                parts["map"].append(block.means(plain.patch_scores(self.model, local, global_)[0]))
            self._known[key] = {name: torch.cat(values) for name, values in parts.items()}
        return self._known[key]
