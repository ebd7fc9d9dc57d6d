"""Which patches of an image are scored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PatchGrid:
    """Rows and columns at which the scored patches begin.

    Attributes:
        name: ``"paper"`` or the stride, as on the command line.
        starts: First rows of the patches, which are the first columns too; ascending.
        patch_size: Side of a patch in pixels.
        image_size: Side of the square image in pixels.
    """

    name: str
    starts: tuple[int, ...]
    patch_size: int
    image_size: int

    @property
    def origins(self) -> Tensor:
        """``(P, 2)`` int64, row and column of each patch's first pixel, row by row."""
        starts = torch.tensor(self.starts)
        return torch.cartesian_prod(starts, starts).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.starts) ** 2


def patch_grid(name: str | int, patch_size: int = 33, image_size: int = 256) -> PatchGrid:
    """The grid of a stride, or the paper's.

    A stride's last row and column of patches stand flush with the border, so that every pixel is
    covered whatever the stride. The paper's 20x20 patches begin at ``int(j * 223 / 19)``.

    Args:
        name: ``"paper"``, or the stride in pixels, 1 to ``patch_size``.
        patch_size: Side of a patch in pixels.
        image_size: Side of the square image in pixels.

    Raises:
        ValueError: The name is neither, or the stride would leave gaps.
    """
    last = image_size - patch_size
    if last < 0:
        raise ValueError(f"expected an image of at least {patch_size} pixels, got {image_size}")
    if name == "paper":
        return PatchGrid("paper", tuple(j * last // 19 for j in range(20)), patch_size, image_size)
    try:
        stride = int(name)
    except ValueError:
        stride = 0
    if not 1 <= stride <= patch_size:
        raise ValueError(
            f"grid: expected 'paper' or a stride of 1 to {patch_size} pixels, got {name!r}"
        )
    starts = list(range(0, last + 1, stride))
    if starts[-1] != last:
        starts.append(last)
    return PatchGrid(str(stride), tuple(starts), patch_size, image_size)
