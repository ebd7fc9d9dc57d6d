"""What is kept of normal patches for the novelty score."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from glance_ext.data.grid import patch_grid
from glance_ext.engine.loop import step_generator
from glance_ext.models.glance import PATCH_SIZE, Glance
from glance_ext.models.normalisation import normalise

_CANDIDATES = 40_000  # patches that the coreset is chosen from


@torch.no_grad()
def fit_memory(
    model: Glance,
    images: Iterable[Tensor],
    *,
    count: int,
    grid: str,
    seed: int,
    device: torch.device,
) -> None:
    """Fills the model's ``memory`` with features of normal images, as many patches of each.

    Args:
        model: With a ``memory``.
        images: Normal images, ``(3, 256, 256)`` each; gone through once.
        count: How many images there are.
        grid: Which patches of an image may be kept.
        seed: Of the patches drawn, and of the coreset's projection.
        device: Where to compute.
    """
    assert model.memory is not None
    starts = patch_grid(grid, image_size=model.view_size).starts
    model.to(device).eval()
    plan = model.local_net.plan(starts, starts, PATCH_SIZE)
    share = max(1, _CANDIDATES // count)
    candidates = []
    for index, image in enumerate(images):
        view = model.local_view(normalise(image[None].float().to(device)))
        features = model.local_net.dense(view, plan)[0]
        drawn = torch.randperm(len(features), generator=step_generator(seed, "memory", index))
        candidates.append(features[drawn[:share].to(device)])
    model.memory.fit(torch.cat(candidates), step_generator(seed, "coreset", 0))
