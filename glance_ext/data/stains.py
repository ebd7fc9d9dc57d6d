"""Distorted patches: the distortion head's negatives (paper, section 3.4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Outline:
    """An ellipse of random size and angle with a wavy outline and a soft edge.

    Attributes:
        smallest: Least semi-axis of the ellipse in pixels.
        largest: Greatest semi-axis in pixels; both axes are log-uniform in between.
        irregularity: Greatest relative deviation of the outline from the ellipse.
        blur: Greatest width of the soft edge in pixels.
    """

    smallest: float = 1.0
    largest: float = 6.0
    irregularity: float = 0.3
    blur: float = 1.5


@dataclass(frozen=True)
class StainSettings(Outline):
    """How stains look; the paper says only that they are small and random.

    Attributes:
        contrast: Least and greatest change of the pixel values, in [0, 1].
    """

    contrast: tuple[float, float] = (0.1, 0.6)


STAINS = {"small": StainSettings(), "wide": StainSettings(largest=14.0, contrast=(0.05, 0.6))}
"""``wide`` ranges from small stains to such as fill a patch of 33 pixels, and to fainter ones."""

PIECES = Outline(smallest=6.0, largest=45.0, irregularity=0.45, blur=2.5)
"""Outlines of pasted pieces: from such as a patch holds to such as it lies in the middle of."""


def stain(
    patches: Tensor, generator: torch.Generator, settings: StainSettings | None = None
) -> Tensor:
    """Puts one stain on each patch.

    A stain is an ellipse of random place, size and angle with a wavy outline and a soft edge. Half
    of the stains darken or brighten, half shift each colour channel on its own.

    Args:
        patches: ``(B, 3, h, w)``, RGB in [0, 1].
        generator: A CPU generator; everything random comes from it.
        settings: See :class:`StainSettings`.

    Returns:
        Stained patches of the same shape; ``patches`` is not changed.
    """
    settings = settings or StainSettings()
    batch, _, height, width = patches.shape
    alpha = _blobs(batch, height, width, generator, settings, edge=0.1)[:, None]
    low, high = settings.contrast
    amount = low + (high - low) * torch.rand((batch, 1, 1, 1), generator=generator)
    signs = torch.where(torch.rand((batch, 3, 1, 1), generator=generator) < 0.5, -1.0, 1.0)
    grey = torch.rand((batch, 1, 1, 1), generator=generator) < 0.5
    signs = torch.where(grey, signs[:, :1], signs)
    strength = torch.where(grey, 1.0, torch.rand((batch, 3, 1, 1), generator=generator))
    strength = strength / strength.amax(1, keepdim=True)
    change = (amount * signs * strength).to(patches)
    # A change that saturates is turned round, so that every stain shows.
    brightness = (patches * alpha.to(patches)).sum((2, 3), keepdim=True) / alpha.to(patches).sum(
        (2, 3), keepdim=True
    )
    change = torch.where(((brightness + change) - 0.5).abs() > 0.5, -change, change)
    return (patches + alpha.to(patches) * change).clamp(0, 1)


def _blobs(
    count: int,
    height: int,
    width: int,
    generator: torch.Generator,
    outline: Outline,
    edge: float = 0.0,
) -> Tensor:
    """How much each of some blobs covers each pixel, ``(count, height, width)`` in [0, 1].

    No centre lies in the outer share ``edge`` of height and width.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand((count, *(shape or (1, 1))), generator=generator)

    angle = uniform(0, math.pi)
    semi_axes = torch.exp(uniform(math.log(outline.smallest), math.log(outline.largest), 2, 1, 1))
    y = torch.arange(height)[:, None] - uniform(edge, 1 - edge) * (height - 1)
    x = torch.arange(width) - uniform(edge, 1 - edge) * (width - 1)
    along = (x * angle.cos() + y * angle.sin()) / semi_axes[:, 0]
    across = (y * angle.cos() - x * angle.sin()) / semi_axes[:, 1]
    radius = (along.square() + across.square()).sqrt()
    direction = torch.atan2(across, along)
    reach = torch.ones_like(radius)
    for waves in (2, 3, 5):
        amplitude = uniform(0, outline.irregularity / 3)
        reach = reach + amplitude * torch.cos(waves * direction + uniform(0, 2 * math.pi))
    # Distance to the outline in pixels, positive inside, blurred over a random width.
    inside = (reach - radius) * semi_axes.amin(1)
    return torch.sigmoid(inside * 4 / uniform(0.3, outline.blur))


def stain_images(
    images: Tensor, side: int, generator: torch.Generator, settings: StainSettings | None = None
) -> Tensor:
    """Puts stains all over images, each on a cell of its own, and leaves most cells as they are.

    Args:
        images: ``(N, 3, h, w)``, RGB in [0, 1], no smaller than a cell.
        side: Of a square cell in pixels. A third of them, and at least one, get a stain; where the
            cells lie is random.
        generator: A CPU generator; everything random comes from it.
        settings: See :class:`StainSettings`.

    Returns:
        Stained images of the same shape; ``images`` is not changed.
    """
    changed = images.clone()
    rows, columns = (size // side for size in images.shape[-2:])
    for image in changed:
        top, left = (
            int(torch.randint(size % side + 1, (), generator=generator))
            for size in images.shape[-2:]
        )
        picks = torch.randperm(rows * columns, generator=generator)
        corners = [
            (top + pick // columns * side, left + pick % columns * side)
            for pick in picks[: max(1, rows * columns // 3)].tolist()
        ]
        cells = [image[:, y : y + side, x : x + side] for y, x in corners]
        stained = stain(torch.stack(cells), generator, settings)
        for cell, other in zip(cells, stained, strict=True):
            cell.copy_(other)
    return changed


def paste_pieces(images: Tensor, others: Tensor, generator: torch.Generator, count: int) -> Tensor:
    """Puts pieces of good images where they do not belong.

    Each piece is of the same image or of the other one, moved round its edges and turned by
    quarters. Where it shows what was there before, nothing changes: whether a pixel is distorted,
    only the difference can tell. Not in the paper; after CutPaste (Li et al., CVPR 2021).

    Args:
        images: ``(N, 3, h, h)``, RGB in [0, 1].
        others: Another one for each, of the same shape.
        generator: A CPU generator; everything random comes from it.
        count: Pieces of each image; they may overlap.

    Returns:
        Images of the same shape; those given are not changed.
    """
    side = images.shape[-1]
    pasted = images.clone()
    for image, own, other in zip(pasted, images, others, strict=True):
        for cover in _blobs(count, side, side, generator, PIECES).to(images):
            source = own if torch.randint(2, (), generator=generator) else other
            quarters = int(torch.randint(4, (), generator=generator))
            shift = torch.randint(side, (2,), generator=generator).tolist()
            moved = source.rot90(quarters, (1, 2)).roll(shift, (1, 2))
            image.lerp_(moved, cover.expand_as(moved))
    return pasted


def turn(patches: Tensor, generator: torch.Generator) -> Tensor:
    """Turns each patch by one, two or three quarters of a circle. Not in the paper.

    Where the anomaly is the whole image, a stain teaches nothing about it. To tell a patch from the
    same patch turned takes knowing what the normal class looks like.

    Args:
        patches: ``(B, 3, h, h)``.
        generator: A CPU generator.

    Returns:
        Turned patches of the same shape.
    """
    quarters = torch.randint(1, 4, (len(patches), 1, 1, 1), generator=generator)
    quarters = quarters.to(patches.device)
    turned = patches
    for count in (1, 2, 3):
        turned = torch.where(quarters == count, patches.rot90(count, (2, 3)), turned)
    return turned
