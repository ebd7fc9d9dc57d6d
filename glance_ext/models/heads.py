"""The two heads: inconsistency (IAD) and distortion (DAD)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def inconsistency(local_features: Tensor, global_features: Tensor) -> Tensor:
    """``s_IAD = (1/n) ||Z_l - Z_g||_2^2`` (paper, equation 5); also the loss ``l_IAD``, averaged.

    Args:
        local_features: ``(B, n)``.
        global_features: ``(B, n)``.

    Returns:
        ``(B,)``.
    """
    return (local_features - global_features).square().mean(-1)


class DistortionHead(nn.Module):
    """The DAD head ``C``: the log-odds that a patch is undistorted.

    concat(Z_l, Z_g), Linear 2n -> 128, LeakyReLU 0.01, Linear -> 1. One log-odds is the difference
    of the two classes' logits, so this is the two-class softmax with half the outputs.

    Args:
        features: n, the length of each feature.
        hidden: Width of the hidden layer.
    """

    def __init__(self, features: int = 128, hidden: int = 128) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * features, hidden)
        self.output = nn.Linear(hidden, 1)

    def forward(self, local_features: Tensor, global_features: Tensor) -> Tensor:
        """Log-odds ``(B,)`` of being undistorted from two ``(B, n)``."""
        x = torch.cat((local_features, global_features), -1)
        return self.output(F.leaky_relu(self.hidden(x), 0.01)).squeeze(-1)


def distortion(log_odds: Tensor) -> Tensor:
    """``s_DAD = 1 - C(Z_l, Z_g)`` (paper, equation 7) from the head's log-odds, ``(B,)``."""
    return torch.sigmoid(-log_odds)


def distortion_loss(log_odds: Tensor, undistorted: Tensor) -> Tensor:
    """``l_DAD``: binary cross-entropy, averaged (paper, equation 6).

    Args:
        log_odds: ``(B,)`` of being undistorted.
        undistorted: ``(B,)``, 1 for untouched patches, 0 for stained ones.
    """
    return F.binary_cross_entropy_with_logits(log_odds, undistorted)
