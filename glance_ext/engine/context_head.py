"""Training of the distortion head in context: stains in whole images, and what is beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from glance_ext.data.grid import patch_grid
from glance_ext.data.patches import Images
from glance_ext.data.stains import STAINS, stain_images
from glance_ext.engine.loop import Stage, step_generator
from glance_ext.engine.settings import TrainSettings
from glance_ext.errors import GlanceError
from glance_ext.models.glance import PATCH_SIZE, Glance
from glance_ext.models.heads import distortion_loss
from glance_ext.models.normalisation import normalise

_MOST_IMAGES = 256
_STAINED, _CLEAN = 128, 64  # patches kept of an image at the most; of the latter twice as many
_BATCH = 256  # of either kind
_CORE = 9  # pixels in a patch's middle, of which a stain must cover
_COVERED = 0.3  # at least so much
_VISIBLE = 0.02  # change of a pixel that counts


def context_stage(
    model: Glance,
    images: Images,
    settings: TrainSettings,
    device: torch.device,
    progress: Callable[[range], Iterable[int]] = iter,
) -> Stage:
    """``l_DAD`` of a :class:`~glance_ext.models.heads.ContextHead`. Not in the paper.

    Stains are put all over an image before the network sees it. A patch whose middle one covers is
    distorted; one that none touches, and any of the image as it was, is not, though it may see
    stains in its surroundings. What lies between is neither.

    Args:
        model: Its ``context_head`` is trained in place.
        images: ``(N, 3, 256, 256)`` normal images, RGB in [0, 1]; the first 256 are taken.
        settings: Context steps, the head's learning rate, stains, grid and seed.
        device: Where to train.
        progress: Goes through the batches of images whose features are computed, before the first
            step.
    """
    head = model.context_head
    assert head is not None
    optimizer = torch.optim.Adam(head.parameters(), lr=settings.head_learning_rate)
    kept: list[tuple[Tensor, Tensor]] = []

    def step(generator: torch.Generator) -> dict[str, Tensor]:
        if not kept:  # not before: an interrupted run goes on with the same
            kept.append(_features(model, images, settings, device, progress))
            head.fit_scale(kept[0][1])
        both = [
            features[torch.randint(len(features), (_BATCH,), generator=generator)]
            for features in kept[0]
        ]
        log_odds = head(torch.cat(both))
        undistorted = torch.zeros_like(log_odds)
        undistorted[_BATCH:] = 1
        return {"loss": distortion_loss(log_odds, undistorted)}

    return Stage("context", settings.context_steps, step, optimizer, {"model": model})


@torch.no_grad()
def _features(
    model: Glance,
    images: Images,
    settings: TrainSettings,
    device: torch.device,
    progress: Callable[[range], Iterable[int]] = iter,
) -> tuple[Tensor, Tensor]:
    """Context features ``(M, n)`` of distorted patches and of others."""
    model.to(device).eval()
    net = model.context_net
    assert net is not None
    origins = patch_grid(settings.grid, image_size=model.view_size).origins.to(device)
    distorted, clean = [], []
    count = min(len(images), _MOST_IMAGES)
    for first in progress(range(0, count, 8)):
        generator = step_generator(settings.seed, "spots", first)
        views = model.local_view(images[first : min(first + 8, count)].float().to(device))
        stained = stain_images(views.cpu(), PATCH_SIZE, generator, STAINS[settings.stains])
        stained = stained.to(views)
        for view, changed in zip(views, stained, strict=True):
            both = normalise(torch.stack((view, changed)))
            of_view, of_changed = net.patch_features(both, origins)
            middle, anywhere = _covered((changed - view).abs().amax(0) > _VISIBLE, origins)
            spots = ((middle > 0) & (middle >= middle.max().clamp_max(_COVERED))).nonzero()[:, 0]
            beside = (~anywhere).nonzero()[:, 0]
            everywhere = torch.arange(len(origins), device=device)
            distorted.append(of_changed[_some(spots, _STAINED, generator)])
            clean.append(of_changed[_some(beside, _CLEAN, generator)])
            clean.append(of_view[_some(everywhere, _CLEAN, generator)])
    found = torch.cat(distorted)
    if not len(found):
        raise GlanceError(
            f"context steps: expected a stain in the middle of a patch of {count} images, found "
            "none; a finer grid has more patches"
        )
    return found, torch.cat(clean)


def _covered(changed: Tensor, origins: Tensor) -> tuple[Tensor, Tensor]:
    """The share ``(P,)`` of each patch's middle that has changed, and whether anything of it has.

    Args:
        changed: ``(h, w)`` bool.
        origins: ``(P, 2)`` of the patches.
    """
    plane = changed.float()[None]
    edge = (PATCH_SIZE - _CORE) // 2
    rows, columns = origins.unbind(1)
    middle = F.avg_pool2d(plane, _CORE, 1)[0, rows + edge, columns + edge]
    anywhere = F.max_pool2d(plane, PATCH_SIZE, 1)[0, rows, columns]
    return middle, anywhere > 0


def _some(indices: Tensor, most: int, generator: torch.Generator) -> Tensor:
    order = torch.randperm(len(indices), generator=generator)
    return indices[order[:most].to(indices.device)]
