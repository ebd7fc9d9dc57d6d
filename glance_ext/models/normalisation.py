"""The normalisation of pixels that all networks of the method share."""

from __future__ import annotations

import torch
from torch import Tensor

# Mean and standard deviation of ImageNet's RGB in [0, 1].
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


def normalise(images: Tensor) -> Tensor:
    """``(images - mean) / std`` for ``(N, 3, H, W)`` RGB in [0, 1]."""
    mean = torch.tensor(IMAGE_MEAN, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(IMAGE_STD, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
    return (images - mean) / std
