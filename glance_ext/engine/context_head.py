"""Training of the distortion head in context: distortions in whole images, and what is beside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glance_ext.data.grain import vary_grain
from glance_ext.data.grid import patch_grid
from glance_ext.data.patches import Images
from glance_ext.data.stains import STAINS, paste_pieces, stain_images
from glance_ext.engine.loop import Stage, step_generator
from glance_ext.engine.settings import TrainSettings
from glance_ext.errors import GlanceError
from glance_ext.models.glance import PATCH_SIZE, Glance
from glance_ext.models.heads import ContextHead, distortion_loss
from glance_ext.models.normalisation import normalise

CONTEXT_IMAGES = 256  # the most that are learnt
_CHANGED = 400  # images that are distorted in each way: each image at least once
_ROUNDS = 4  # and at the most so often
_DISTORTED, _CLEAN = 128, 64  # patches kept at the most of a distorted image
_BATCH = 256  # of either kind
_LEFT_OUT = 0.3  # share of a feature's channels that say nothing in a step
_CORE = 9  # pixels in a patch's middle that a distortion must cover


class _Visible(NamedTuple):
    """When a patch counts as distorted.

    Attributes:
        change: Least change of a pixel, in [0, 1].
        over: Side of the square of pixels that it is averaged over.
        share: Of the patch's middle, that must have changed.
    """

    change: float
    over: int
    share: float


# A piece shows here and there what was there before, which makes no hole in it; a patch at its edge
# is what stains teach.
_STAIN, _PIECE = _Visible(0.02, 1, 0.3), _Visible(0.06, 5, 0.6)


def context_stage(
    model: Glance,
    images: Images,
    settings: TrainSettings,
    device: torch.device,
    refitted: ContextHead | None = None,
    *,
    progress: Callable[[range], Iterable[int]] = iter,
) -> Stage:
    """``l_DAD`` of a :class:`~glance_ext.models.heads.ContextHead`. Not in the paper.

    Stains are put all over an image before the network sees it, or pieces where they do not belong:
    a hole's middle looks like any background, and only what is around it tells that it is none. A
    patch whose middle one covers is distorted; one that none touches, and any of the image as it
    was, is not, though it may see stains in its surroundings. What lies between is neither.

    Args:
        model: Its ``context_head`` is trained in place, or only describes patches for another head.
        images: ``(N, 3, 256, 256)`` normal images, RGB in [0, 1]; the first 256 are taken.
        settings: Context steps, the head's learning rate, stains, pieces, grain, grid and seed.
        device: Where to train.
        refitted: That other head, for the stage "refit" behind "context".
        progress: Goes through the batches of images whose features are computed, before the first
            step.
    """
    head = refitted or model.context_head
    assert head is not None
    optimizer = torch.optim.Adam(head.parameters(), lr=settings.head_learning_rate)
    kept: list[tuple[Tensor, Tensor]] = []

    def step(generator: torch.Generator) -> dict[str, Tensor]:
        if not kept:  # not before: an interrupted run goes on with the same
            kept.append(_features(model, images, settings, device, progress))
            head.fit_scale(kept[0][1])
        both = torch.cat(
            [
                features[torch.randint(len(features), (_BATCH,), generator=generator)]
                for features in kept[0]
            ]
        )
        # Few images and many channels: without, it would learn the images by heart.
        left_out = torch.rand(both.shape, generator=generator) < _LEFT_OUT
        log_odds = head(torch.where(left_out.to(device), head.mean, both))
        undistorted = torch.zeros_like(log_odds)
        undistorted[_BATCH:] = 1
        return {"loss": distortion_loss(log_odds, undistorted)}

    modules: dict[str, nn.Module] = {"model": model}
    if refitted is not None:
        modules["refitted_head"] = refitted
    name = "context" if refitted is None else "refit"
    return Stage(name, settings.context_steps, step, optimizer, modules)


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
    everywhere = torch.arange(len(origins), device=device)
    distorted, clean = [], []

    def describe(view: Tensor, places: Tensor) -> Tensor:
        return net.patch_features(normalise(view[None]), origins[places])[0]

    count = min(len(images), CONTEXT_IMAGES)
    rounds = min(max(1, _CHANGED // count), _ROUNDS)
    for first in progress(range(0, count, 8)):
        generator = step_generator(settings.seed, "spots", first)
        views = model.local_view(images[first : min(first + 8, count)].float()).cpu()
        for view in _as_another(views, settings, generator).to(device):
            clean.append(describe(view, _some(everywhere, rounds * _CLEAN, generator)))
        for before, after, visible in _distorted(model, views, images, rounds, settings, generator):
            for view, other in zip(before.to(device), after.to(device), strict=True):
                middle, anywhere = _covered(view, other, visible, origins)
                least = middle.max().clamp_max(visible.share)
                spots = ((middle > 0) & (middle >= least)).nonzero()[:, 0]
                beside = (~anywhere).nonzero()[:, 0]
                distorted.append(describe(other, _some(spots, _DISTORTED, generator)))
                clean.append(describe(other, _some(beside, _CLEAN, generator)))
    found = torch.cat(distorted)
    if not len(found):
        raise GlanceError(
            f"context steps: expected a stain in the middle of a patch of {count} images, found "
            "none; a finer grid has more patches"
        )
    return found, torch.cat(clean)


def _as_another(views: Tensor, settings: TrainSettings, generator: torch.Generator) -> Tensor:
    """Good images in the grain and focus of other ones, if that is wanted."""
    return vary_grain(views, generator) if settings.grain else views


def _distorted(
    model: Glance,
    views: Tensor,
    images: Images,
    rounds: int,
    settings: TrainSettings,
    generator: torch.Generator,
) -> Iterator[tuple[Tensor, Tensor, _Visible]]:
    """Some images without and with stains or pieces of any of all images, and when these show."""
    for _ in range(rounds):
        before = _as_another(views, settings, generator)
        stained = stain_images(before, PATCH_SIZE, generator, STAINS[settings.stains])
        yield before, stained, _STAIN
        if settings.pieces:
            before = _as_another(views, settings, generator)
            picks = torch.randint(len(images), (len(views),), generator=generator)
            others = model.local_view(images[picks].float()).cpu()
            yield before, paste_pieces(before, others, generator, settings.pieces), _PIECE


def _covered(
    view: Tensor, changed: Tensor, visible: _Visible, origins: Tensor
) -> tuple[Tensor, Tensor]:
    """The share ``(P,)`` of each patch's middle that has changed, and whether anything of it has.

    Args:
        view: ``(3, h, w)`` as it was.
        changed: ``(3, h, w)`` as it is.
        visible: What counts as change.
        origins: ``(P, 2)`` of the patches.
    """
    difference = (changed - view).abs().amax(0)[None]
    difference = F.avg_pool2d(difference, visible.over, 1, visible.over // 2)
    plane = (difference > visible.change).float()
    edge = (PATCH_SIZE - _CORE) // 2
    rows, columns = origins.unbind(1)
    middle = F.avg_pool2d(plane, _CORE, 1)[0, rows + edge, columns + edge]
    # the rows first, then the columns: one square of this size would take five times as long
    anywhere = F.max_pool2d(F.max_pool2d(plane, (PATCH_SIZE, 1), 1), (1, PATCH_SIZE), 1)
    return middle, anywhere[0, rows, columns] > 0


def _some(indices: Tensor, most: int, generator: torch.Generator) -> Tensor:
    order = torch.randperm(len(indices), generator=generator)
    return indices[order[:most].to(indices.device)]
