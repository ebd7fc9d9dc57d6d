"""How one image may differ from the next where nothing is wrong: in grain and in focus."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NOISY, UNSHARP = 0.3, 0.25  # shares of images; the rest stay as they are
_NOISE = 0.02  # greatest standard deviation, of values in [0, 1]
_BLUR = (0.3, 0.8)  # least and greatest standard deviation in pixels
_REACH = 2  # pixels to either side; beyond them are weights below 0.001 of the greatest


def vary_grain(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images with noise, less sharp, or as they are.

    Good images differ in that more than a small training set shows. Not in the paper.

    Args:
        images: ``(B, C, H, W)``, values in [0, 1], at least 3x3 pixels.
        generator: A CPU generator; everything random comes from it.

    Returns:
        The same shape, dtype and range.
    """
    which = torch.rand(len(images), generator=generator)
    strength = torch.rand(len(images), generator=generator)
    found = []
    for image, lot, much in zip(images, which.tolist(), strength.tolist(), strict=True):
        if lot < NOISY:
            noise = torch.randn(image.shape, generator=generator).to(image)
            image = (image + _NOISE * much * noise).clamp(0, 1)
        elif lot < NOISY + UNSHARP:
            image = _blurred(image, _BLUR[0] + (_BLUR[1] - _BLUR[0]) * much)
        found.append(image)
    return torch.stack(found)


def _blurred(image: Tensor, sigma: float) -> Tensor:
    places = torch.arange(-_REACH, _REACH + 1).to(image)
    weights = torch.exp(-(places**2) / (2 * sigma**2))
    weights = (weights / weights.sum())[None, None]
    padded = F.pad(image[:, None], (_REACH,) * 4, mode="reflect")  # channels as a batch
    rows = F.conv2d(padded, weights[..., None])
    return F.conv2d(rows, weights[:, :, None])[:, 0].clamp(0, 1)
