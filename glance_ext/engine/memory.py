"""What is kept of normal patches for the novelty score."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from glance_ext.data.grid import patch_grid
from glance_ext.engine.checkpoint import load_checkpoint, load_module
from glance_ext.engine.loop import step_generator
from glance_ext.models.context_net import ContextNet
from glance_ext.models.glance import PATCH_SIZE, Glance
from glance_ext.models.normalisation import normalise

CONTEXT_NET_KIND = "context_net"
_CANDIDATES = 40_000  # patches that the coreset is chosen from


def packaged_context_net() -> Path:
    """The pretrained weights in the package; ``benchmarks/make_context_net.py`` made them."""
    return Path(__file__).resolve().parent.parent / "weights" / "context_net.safetensors"


def load_context_net(net: ContextNet) -> None:
    """Loads the packaged weights of as many layers as it has.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    path = packaged_context_net()
    tensors, _ = load_checkpoint(path, CONTEXT_NET_KIND)
    beyond = tuple(
        f"context_net.layer{index + 1}." for index in range(len(net.widths), len(net.LAYERS))
    )
    needed = {name: value for name, value in tensors.items() if not name.startswith(beyond)}
    load_module(net, needed, "context_net", path)


@torch.no_grad()
def fit_memory(
    model: Glance,
    images: Iterable[Tensor],
    *,
    count: int,
    grid: str,
    seed: int,
    device: torch.device,
    drawn: float = 0.0,
) -> None:
    """Fills the model's ``memory`` with features of normal images, as many patches of each.

    Args:
        model: With a ``memory``.
        images: Normal images, ``(3, 256, 256)`` each; gone through once.
        count: How many images there are.
        grid: Which patches of an image may be kept.
        seed: Of the patches drawn, and of the coreset's projection.
        device: Where to compute.
        drawn: Share of the memory that is drawn at random, the rest being a coreset.
    """
    assert model.memory is not None
    patches = patch_grid(grid, image_size=model.view_size)
    model.to(device).eval()
    plan = model.local_net.plan(patches.starts, patches.starts, PATCH_SIZE)
    share = max(1, _CANDIDATES // count)
    candidates = []
    for index, image in enumerate(images):
        whole = image[None].float().to(device)
        features = model.context_features(whole, patches.origins)
        if features is None:
            features = model.local_net.dense(model.local_view(normalise(whole)), plan)
        features = model.remembered(features)[0]
        order = torch.randperm(len(features), generator=step_generator(seed, "memory", index))
        candidates.append(features[order[:share].to(device)])
    model.memory.fit(torch.cat(candidates), step_generator(seed, "coreset", 0), drawn)
