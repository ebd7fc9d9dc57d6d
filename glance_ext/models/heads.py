"""The two heads: inconsistency (IAD) and distortion (DAD)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glance_ext.models.normalisation import channel_spread


def inconsistency(local_features: Tensor, global_features: Tensor) -> Tensor:
    """``s_IAD = (1/n) ||Z_l - Z_g||_2^2`` (paper, equation 5); also the loss ``l_IAD``, averaged.

    Args:
        local_features: ``(B, n)``.
        global_features: ``(B, n)``.

    Returns:
        ``(B,)``.
    """
    return (local_features - global_features).square().mean(-1)


class ResidualScale(nn.Module):
    """Brings ``Z_l - Z_g`` to mean 0 and unit covariance over normal patches.

    Some directions of the feature say what the surroundings do not tell, such as grain or the exact
    tone. There normal patches disagree too, and in the plain mean square they drown the directions
    in which only defects disagree. Not in the paper.

    Over patches, each is whitened and scored alone. Over images, their mean difference is, since an
    image of another kind disagrees a little everywhere: too little for any one patch to tell.

    Args:
        features: n, the length of each feature.
        over: ``"patch"`` or ``"image"``.
    """

    mean: Tensor
    whitening: Tensor

    def __init__(self, features: int = 128, over: str = "patch") -> None:
        super().__init__()
        self.over = over
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("whitening", torch.eye(features))

    def forward(self, local_features: Tensor, global_features: Tensor) -> Tensor:
        """``s_IAD`` of patches, ``(N, P)`` from two ``(N, P, n)``.

        With ``r_p = W (Z_l - Z_g - m)``, over patches ``(1/n) ||r_p||_2^2``; over images
        ``(1/n) <r_p, mean r>``, each patch's share: their mean over an image's patches is
        ``(1/n) ||mean r||_2^2``.
        """
        whitened = (local_features - global_features - self.mean) @ self.whitening.T
        if self.over == "image":
            return (whitened * whitened.mean(-2, keepdim=True)).mean(-1)
        return whitened.square().mean(-1)

    @torch.no_grad()
    def fit(self, count: int, total: Tensor, products: Tensor, shrinkage: float = 0.01) -> None:
        """Takes mean and covariance from sums over normal patches, or images' means over them.

        Args:
            count: How many.
            total: ``(n,)`` float64, the sum of their residuals.
            products: ``(n, n)`` float64, the sum of the residuals' outer products.
            shrinkage: Share of the mean variance that is added to each, so that directions in which
                these patches happen not to vary do not decide everything.

        Raises:
            ValueError: There is no patch.
        """
        if count < 1:
            raise ValueError("ResidualScale: expected at least one patch, got 0")
        mean = total / count
        covariance = products / count - torch.outer(mean, mean)
        variance = covariance.diagonal().mean().clamp_min(1e-12)
        covariance.diagonal().add_(shrinkage * variance)
        self.mean.copy_(mean)
        self.whitening.copy_(torch.linalg.inv(torch.linalg.cholesky(covariance)))


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


class ContextHead(nn.Module):
    """A distortion head over what a patch's surroundings and the patch are to a pretrained network.

    The DAD head sees what Local-Net makes of a patch alone; a stain that looks like something
    normal elsewhere is one only where it is. Linear n -> 128, LeakyReLU 0.01, Linear -> 1, over
    channels at mean 0 and variance 1. Not in the paper.

    Args:
        features: n, the length of a :class:`~glance_ext.models.context_net.ContextNet`'s feature.
        hidden: Width of the hidden layer.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, features: int, hidden: int = 128) -> None:
        super().__init__()
        self.hidden = nn.Linear(features, hidden)
        self.output = nn.Linear(hidden, 1)
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("spread", torch.ones(features))

    def forward(self, features: Tensor) -> Tensor:
        """Log-odds ``(B,)`` of being undistorted from ``(B, n)``."""
        x = (features - self.mean) / self.spread
        return self.output(F.leaky_relu(self.hidden(x), 0.01)).squeeze(-1)

    @torch.no_grad()
    def fit_scale(self, features: Tensor) -> None:
        """Takes each channel's mean and spread over normal patches ``(M, n)``."""
        self.mean.copy_(features.mean(0))
        self.spread.copy_(channel_spread(features))


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
