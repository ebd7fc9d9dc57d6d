"""Local-Net: the feature of a patch, seen alone; and the decoder that distils a teacher into it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glance_ext.models.initialisation import initialise
from glance_ext.models.local_plan import LocalPlan, run_layers

LEAKY_SLOPE = 0.005


class LocalNet(nn.Module):
    """Local-Net ``L``: ``Z_l = L(p)`` (paper, section 3.1).

    Conv KxK-128, max-pool 2, conv 5x5-256, max-pool 2, conv 2x2-256, conv 4x4-``features``, no
    padding, LeakyReLU 0.005 after all convolutions but the last; it stands behind the pooling,
    where it gives the same in a quarter of the work. A patch of 33x33 pixels gives one feature; a
    larger input gives a map of features of stride 4.

    Args:
        kernel_size: K, the size of the first convolution, 3 or 5. With 3 the pooling's floor leaves
            the network blind to the last three rows and columns of a patch, with 5 to one.
        features: n, the length of the feature.
    """

    def __init__(self, kernel_size: int = 5, features: int = 128) -> None:
        super().__init__()
        if kernel_size not in (3, 5):
            raise ValueError(f"LocalNet: expected kernel_size 3 or 5, got {kernel_size}")
        self.kernel_size = kernel_size
        self.features = features
        self.layers = nn.Sequential(
            nn.Conv2d(3, 128, kernel_size),
            nn.MaxPool2d(2),
            nn.LeakyReLU(LEAKY_SLOPE),
            nn.Conv2d(128, 256, 5),
            nn.MaxPool2d(2),
            nn.LeakyReLU(LEAKY_SLOPE),
            nn.Conv2d(256, 256, 2),
            nn.LeakyReLU(LEAKY_SLOPE),
            nn.Conv2d(256, features, 4),
        )
        initialise(self.layers, LEAKY_SLOPE)

    def forward(self, patches: Tensor) -> Tensor:
        """Describes patches.

        Args:
            patches: ``(B, 3, 33, 33)``, normalised.

        Returns:
            Local features ``(B, n)``.

        Raises:
            ValueError: The patches do not shrink to one feature each.
        """
        if patches.is_cpu:  # pooling is three times as fast, convolutions no slower
            patches = patches.contiguous(memory_format=torch.channels_last)
        features = run_layers(self.layers, patches)
        if features.shape[-2:] != (1, 1):
            raise ValueError(
                "LocalNet: expected patches of 33x33 pixels, got "
                f"{patches.shape[-2]}x{patches.shape[-1]}"
            )
        return features.flatten(1)

    def plan(
        self,
        row_starts: Sequence[int],
        column_starts: Sequence[int] | None = None,
        patch_size: int = 33,
    ) -> LocalPlan:
        """Plans how :meth:`dense` describes the patches of a grid; good for every image.

        Args:
            row_starts: First rows of the patches, ascending.
            column_starts: First columns of the patches, ascending; the same without.
            patch_size: Side of a patch in pixels.

        Raises:
            ValueError: The starts are not ascending, or patches do not shrink to one feature each.
        """
        columns = row_starts if column_starts is None else column_starts
        return LocalPlan(self.layers, row_starts, columns, patch_size)

    def dense(
        self, images: Tensor, plan: LocalPlan | tuple[Sequence[int], Sequence[int]]
    ) -> Tensor:
        """Describes every patch of a grid; neighbours share their convolutions.

        Args:
            images: ``(N, 3, H, W)``, normalised, of any size that holds the patches.
            plan: The grid, from :meth:`plan`, or its row and column starts.

        Returns:
            Local features ``(N, P, n)`` of the patches row by row: those that the patches alone
            would have, but for rounding.

        Raises:
            ValueError: A patch lies outside of the images, or the plan is for another network.
        """
        if not isinstance(plan, LocalPlan):
            plan = self.plan(*plan)
        return plan(self.layers, images)

    @torch.no_grad()
    def standardise(self, mean: Tensor, std: Tensor, decoder: Decoder | None = None) -> None:
        """Folds ``z -> (z - mean) / std`` into the last convolution, its inverse into the decoder.

        Afterwards each feature channel has mean 0 and variance 1 over the patches that ``mean`` and
        ``std`` come from, so that the IAD score starts at the same scale whatever the teacher.

        Args:
            mean: ``(n,)``.
            std: ``(n,)``, positive.
            decoder: Its output stays the same.
        """
        last = self.layers[-1]
        last.get_parameter("weight").div_(std.view(-1, 1, 1, 1))
        last.get_parameter("bias").sub_(mean).div_(std)
        if decoder is not None:
            decoder.linear.bias.add_(decoder.linear.weight @ mean)
            decoder.linear.weight.mul_(std)


class Decoder(nn.Module):
    """The linear decoder ``D`` from Local-Net's feature to the teacher's (paper, equation 1).

    Args:
        features: n, the length of Local-Net's feature.
        teacher_features: The length of the teacher's.
    """

    def __init__(self, features: int, teacher_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, teacher_features)

    def forward(self, local_features: Tensor) -> Tensor:
        """Maps ``(B, n)`` to ``(B, teacher_features)``."""
        return self.linear(local_features)


def knowledge_loss(decoded: Tensor, taught: Tensor) -> Tensor:
    """``l_k = ||D(L(p)) - R(p)||^2``, averaged over batch and channels (paper, equation 1).

    Args:
        decoded: ``(B, t)``, the decoder's output.
        taught: ``(B, t)``, the teacher's feature, standardised by channel.
    """
    return (decoded - taught).square().mean()


def compactness_loss(features: Tensor) -> Tensor:
    """``l_c``: the mean absolute correlation of different feature channels (paper, equation 2).

    The paper prints the signed sum over ``i != j``. A signed sum is the variance of the summed
    channels, which one direction can satisfy; the absolute value asks every pair to be
    uncorrelated, and the mean keeps the loss independent of n.

    Args:
        features: ``(B, n)``, B at least 2.
    """
    if features.shape[0] < 2:
        raise ValueError(
            f"compactness_loss: expected a batch of at least 2 features, got {features.shape[0]}"
        )
    centred = features - features.mean(0)
    unit = centred / centred.norm(dim=0).clamp_min(torch.finfo(features.dtype).tiny ** 0.5)
    correlation = unit.T @ unit
    n = correlation.shape[0]
    return (correlation.abs().sum() - correlation.diagonal().abs().sum()) / (n * (n - 1))
