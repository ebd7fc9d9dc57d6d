"""How far a patch is from every normal patch that was kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glance_ext.models.local_net import Decoder
from glance_ext.models.normalisation import channel_spread

_CHUNK = 1 << 22  # distances that are held at a time
_PROJECTED = 32  # dimensions in which a coreset is chosen


class FeatureMemory(nn.Module):
    """Features of normal patches, and how far another one is from the nearest of them.

    The inconsistency tells a patch that does not fit its surroundings, the distortion head one
    that resembles its stains. A patch that resembles nothing seen in training is neither, if its
    surroundings foretell it no worse than the next one. Not in the paper; after PatchCore (Roth et
    al., CVPR 2022).

    Features are compared by their direction, each channel scaled by its spread over normal patches:
    their length says how strong a patch's texture is, which light and focus change. Where a feature
    is of several layers, each layer's part has its own direction, so that none counts for more
    because it is longer or varies more.

    Rather than ``Z_l`` itself it can compare the teacher's feature, as the decoder tells it from
    ``Z_l``: distillation makes the channels of ``Z_l`` alike in variance, and so lets what the
    teacher hardly speaks of count as much as what it speaks of most.

    Args:
        size: How many features are kept.
        features: n, the length of a feature.
        taught: t, the length of the teacher's feature; 0 to compare features as they come.
        layers: Lengths of the parts that layers have in what is compared; one part by default.
    """

    kept: Tensor
    spread: Tensor

    def __init__(
        self, size: int, features: int = 128, taught: int = 0, layers: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.size = size
        self.taught = taught
        self.layers = list(layers) or [taught or features]
        self.decoder = nn.Linear(features, taught).requires_grad_(False) if taught else None
        self.register_buffer("kept", torch.zeros(size, taught or features))
        self.register_buffer("spread", torch.ones(taught or features))

    def __len__(self) -> int:
        return len(self.kept)

    def forward(self, features: Tensor) -> Tensor:
        """Novelty ``min_m ||d(Z) - d(Z_m)||_2`` of patches, ``(N, P)`` from ``(N, P, n)``.

        ``d`` is the direction of a decoded and scaled feature, so that this is from 0 to 2.
        """
        directions = self.directions(self.decoded(features.flatten(0, -2)))
        chunk = max(1, _CHUNK // len(self.kept))
        alike = torch.cat([(some @ self.kept.T).amax(1) for some in directions.split(chunk)])
        return (2 - 2 * alike).clamp_min(0).sqrt().reshape(features.shape[:-1])

    @torch.no_grad()
    def learn_decoder(self, decoder: Decoder, mean: Tensor, std: Tensor) -> None:
        """Takes a Local-Net's decoder, and the scale of its teacher's features ``(t,)``."""
        assert self.decoder is not None
        linear = decoder.linear
        self.decoder.weight.copy_(std.to(linear.weight)[:, None] * linear.weight)
        self.decoder.bias.copy_(std.to(linear.bias) * linear.bias + mean.to(linear.bias))

    def decoded(self, features: Tensor) -> Tensor:
        """What is compared, from features ``(M, n)``."""
        return features if self.decoder is None else self.decoder(features)

    def directions(self, features: Tensor) -> Tensor:
        """Features ``(M, t)`` scaled to the spread of each channel, and then to unit length.

        Each layer's part to its share of it.
        """
        parts = (features / self.spread).split(self.layers, -1)
        return torch.cat([F.normalize(part, dim=-1) for part in parts], -1) / len(parts) ** 0.5

    @torch.no_grad()
    def fit(self, features: Tensor, generator: torch.Generator, drawn: float = 0.0) -> None:
        """Keeps the directions of a coreset of ``features``, or of all if they are fewer.

        A coreset has what is rare, and of what is common no more: so the common is far from it
        for a normal feature, too. Some drawn at random are dense where normal ones are.

        What was kept before is forgotten.

        Args:
            features: Of normal patches, ``(M, n)``.
            generator: Of the projection in which the coreset is chosen, and of what is drawn.
            drawn: Share of what is kept that is drawn at random from beside the coreset.

        Raises:
            ValueError: There is no feature, or no such share.
        """
        if not 0 <= drawn <= 1:
            raise ValueError(f"FeatureMemory: expected a share between 0 and 1, got drawn={drawn}")
        if len(features) < 1:
            raise ValueError("FeatureMemory: expected at least one feature, got 0")
        features = self.decoded(features.to(self.spread))
        self.spread.copy_(channel_spread(features))
        directions = self.directions(features)
        picks = coreset(directions, self.size - round(drawn * self.size), generator)
        beside = torch.ones(len(directions), dtype=torch.bool)
        beside[picks] = False
        others = beside.nonzero()[:, 0]
        some = others[torch.randperm(len(others), generator=generator)[: self.size - len(picks)]]
        self.kept = directions[torch.cat((picks, some)).to(features.device)]


def coreset(features: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Indices of features that leave none of the others far from all of them.

    Greedy: the first, then again and again the one that is farthest from those already chosen
    (Gonzalez, 1985), by distances in a random projection.

    Args:
        features: ``(M, n)``.
        size: How many to choose.
        generator: Of the projection.

    Returns:
        ``(min(size, M),)`` int64, on the CPU.
    """
    if size >= len(features):
        return torch.arange(len(features))
    if size < 1:
        return torch.arange(0)
    wide = features.shape[1]
    projected = features.float()
    if wide > _PROJECTED:
        projection = torch.randn(wide, _PROJECTED, generator=generator) / _PROJECTED**0.5
        projected = projected @ projection.to(features.device)
    # |x - c|^2 less |x|^2 + |c|^2, which one product of a matrix and a vector gives
    squares = projected.square().sum(1)
    chosen = [0]
    distance = squares.new_full((len(features),), torch.inf)
    while len(chosen) < size:
        last = chosen[-1]
        between = squares + squares[last] - 2 * (projected @ projected[last])
        distance = torch.minimum(distance, between)
        chosen.append(int(distance.argmax()))
    return torch.tensor(chosen)
