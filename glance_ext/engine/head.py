"""Further training of the distortion head alone, with both networks frozen.

Where distortions are hard to tell, as turned patches are, the head needs more steps than Global-Net
can afford: features that are kept cost it nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from glance_ext.data.grid import patch_grid
from glance_ext.data.patches import Images, crop_from
from glance_ext.engine.loop import Stage, step_generator
from glance_ext.engine.settings import TrainSettings
from glance_ext.engine.step_patches import dense_plan, distorted
from glance_ext.models.glance import PATCH_SIZE, Glance
from glance_ext.models.heads import distortion_loss
from glance_ext.models.normalisation import normalise

_MOST_IMAGES = 1500
_MOST_PATCHES = 8192  # whose features are kept, where the grid has more
_LEAST_PATCHES = 32  # of an image, of which they share a pass through Global-Net
_GROUP = 4  # patches of one image that are then drawn together
_BATCH = 64  # such groups, or images with all patches of the grid


def head_stage(
    model: Glance,
    images: Images,
    settings: TrainSettings,
    device: torch.device,
    progress: Callable[[range], Iterable[int]] = iter,
) -> Stage:
    """``l_DAD`` alone, on patches of the grid that is scored, each once distorted.

    On all of them where they are few, else on some thousands, as many of each image.

    Args:
        model: Its distortion head is trained in place.
        images: ``(N, 3, 256, 256)`` normal images, RGB in [0, 1]; the first 1,500 are taken, or the
            first 256 where not all patches of so many are.
        settings: Head steps and learning rate, distortion, stains, grid and seed.
        device: Where to train.
        progress: Goes through the batches of images whose features are computed, before the first
            step.
    """
    head = model.distortion_head
    optimizer = torch.optim.Adam(head.parameters(), lr=settings.head_learning_rate)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def step(generator: torch.Generator) -> dict[str, Tensor]:
        if not kept:  # not before: the networks may still be restored from a checkpoint
            kept.append(_features(model, images, settings, device, progress))
        clean, other, around = kept[0]
        picks = torch.randint(len(clean), (_BATCH,), generator=generator)
        both = torch.stack((clean[picks], other[picks]))
        log_odds = head(both, around[picks].expand_as(both))
        undistorted = torch.zeros_like(log_odds)
        undistorted[0] = 1
        return {"loss": distortion_loss(log_odds, undistorted)}

    return Stage("head", settings.head_steps, step, optimizer, {"model": model})


@torch.no_grad()
def _features(
    model: Glance,
    images: Images,
    settings: TrainSettings,
    device: torch.device,
    progress: Callable[[range], Iterable[int]] = iter,
) -> tuple[Tensor, Tensor, Tensor]:
    """Local features of patches as they are and distorted, and global ones, ``(N, P, n)`` each.

    ``N`` images with all their patches, or groups of patches drawn from each image.
    """
    model.eval()
    grid = patch_grid(settings.grid, image_size=model.view_size)
    count = min(len(images), _MOST_IMAGES)
    if count * len(grid) > _MOST_PATCHES and len(grid) > _LEAST_PATCHES:
        count = min(count, _MOST_PATCHES // _LEAST_PATCHES)
    groups = max(1, _MOST_PATCHES // count // _GROUP)
    drawn = groups * _GROUP < len(grid)
    every = None if drawn else model.plan(grid.starts, grid.starts, device=device)
    dense = dense_plan(model, grid, groups * _GROUP)
    parts = []
    for first in progress(range(0, count, 8)):
        some = images[first : min(first + 8, count)].float().to(device)
        generator = step_generator(settings.seed, "features", first)
        places = torch.arange(len(grid)).expand(len(some), -1)
        if drawn:
            size = (len(some), groups * _GROUP)
            places = torch.randint(len(grid), size, generator=generator)
        owners = torch.arange(len(some)).repeat_interleave(places.shape[1])
        origins = grid.origins[places]
        patches = crop_from(
            model.local_view(some),
            owners.to(device),
            origins.flatten(0, 1).to(device),
            PATCH_SIZE,
        )
        changed = distorted(patches, settings, generator)
        other = model.local_net(normalise(changed)).unflatten(0, (len(some), -1))
        if every is not None:
            clean, around = model.grid_features(some, every)
        else:
            if dense is not None:
                rows = torch.arange(len(some))[:, None]
                view = normalise(model.local_view(some))
                clean = model.local_net.dense(view, dense)[rows, places]
            else:
                clean = model.local_net(normalise(patches)).unflatten(0, (len(some), -1))
            holes = model.plan_holes(origins, device=device)
            around = model.global_net.shared_features(normalise(some), holes)
        parts.append((clean, other.to(clean), around))
    clean, other, around = (torch.cat(features) for features in zip(*parts, strict=True))
    if drawn:
        clean, other, around = (
            features.reshape(-1, _GROUP, features.shape[-1]) for features in (clean, other, around)
        )
    return clean, other, around
