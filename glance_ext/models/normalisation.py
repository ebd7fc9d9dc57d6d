"""The normalisation of pixels that all networks share, and the scale of features."""

from __future__ import annotations

import torch
from torch import Tensor

# Mean and standard deviation of ImageNet's RGB in [0, 1].
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


def normalise(images: Tensor) -> Tensor:
    """``(images - mean) / std`` for ``(N, 3, H, W)`` RGB in [0, 1]."""
    # by numbers, not by tensors of them: a copy to a GPU could not be part of a CUDA graph
    channels = zip(images.unbind(1), IMAGE_MEAN, IMAGE_STD, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], 1)


def channel_spread(features: Tensor) -> Tensor:
    """How far each channel is spread over features ``(M, n)``: ``(n,)``, safe to divide by.

    The standard deviation, but at least a thousandth of the greatest one: a channel that hardly
    varies over normal patches says nothing, however far it is off.
    """
    spread = features.std(0, correction=0)
    return spread.clamp_min(1e-3 * float(spread.max()) + 1e-12)
