"""Stage 3: Global-Net and the distortion head, with Local-Net frozen (paper, section 3.5)."""

from __future__ import annotations

import torch
from torch import Tensor

from glance_ext.data.patches import Images
from glance_ext.engine.distributed import World
from glance_ext.engine.loop import Stage
from glance_ext.engine.settings import TrainSettings
from glance_ext.engine.step_patches import (
    FreshPatches,
    KeptPatches,
    StepPatches,
    images_a_step,
    wide,
)
from glance_ext.errors import GlanceError
from glance_ext.models.glance import IMAGE_SIZE, Glance
from glance_ext.models.global_net import hole_masks
from glance_ext.models.heads import distortion_loss, inconsistency
from glance_ext.models.normalisation import normalise


def joint_stage(
    model: Glance,
    images: Images,
    settings: TrainSettings,
    device: torch.device,
    world: World | None = None,
    step_patches: StepPatches | None = None,
) -> Stage:
    """Stage 3: ``l_IAD + lambda_t * l_DAD``.

    A step's patches come from few images, each with ``holes_per_image`` patches, whose Global-Net
    features share one pass. The distortion head sees each patch as it is and distorted, with a
    stain if not otherwise set; the inconsistency loss never sees a distorted patch.

    Args:
        model: Trained in place.
        images: ``(N, 3, 256, 256)`` normal images, RGB in [0, 1].
        settings: Steps, batch size, holes an image, positions, precision, learning rates, stains
            and lambda_t.
        device: Where to train.
        world: The processes that train together: each has a share of a step's images.
        step_patches: What draws the patches and describes them; else by ``settings.stain_uses``.

    Raises:
        GlanceError: There are more processes than images a step.
    """
    world = world or World()
    dtype = model.global_net.stem.weight.dtype
    if settings.precision == "bfloat16":
        dtype = torch.bfloat16
    model.local_net.requires_grad_(False).eval()
    optimizer = torch.optim.Adam(
        [
            {"params": model.global_net.parameters(), "lr": settings.global_learning_rate},
            {"params": model.distortion_head.parameters(), "lr": settings.head_learning_rate},
        ],
        fused=True,
    )
    count = settings.batch_size
    if images_a_step(count, settings.holes_per_image) < world.size:
        raise GlanceError(
            f"train: expected an image a step for each of {world.size} processes, got "
            f"{images_a_step(count, settings.holes_per_image)} (batch size {count} with "
            f"{settings.holes_per_image} holes an image)"
        )
    if step_patches is None:
        kind = FreshPatches if settings.stain_uses == 1 else KeptPatches
        step_patches = kind(model, images, settings, device, dtype, world)
    # One hole an image has nothing to share: a masked pass costs less.
    alone = settings.holes_per_image == 1 and dtype == model.global_net.stem.weight.dtype

    def step(generator: torch.Generator) -> dict[str, Tensor]:
        draw, clean_features, stained_features = step_patches(generator)
        whole = normalise(images[draw.picks].to(device).to(wide(dtype))).to(dtype)
        if alone:
            holes = hole_masks(draw.flat_origins * model.patch_scale, model.hole_size, IMAGE_SIZE)
            global_features = model.global_net(whole, holes.to(device))
        else:
            plan = model.plan_holes(draw.origins, device=device, dtype=dtype)
            global_features = model.global_net.shared_features(whole, plan).flatten(0, 1)
        global_features = global_features[: draw.count].to(wide(dtype))
        share = draw.count / count
        iad = share * inconsistency(clean_features, global_features).mean()
        log_odds = model.distortion_head(
            torch.cat((clean_features, stained_features)), global_features.repeat(2, 1)
        )
        undistorted = torch.zeros_like(log_odds)
        undistorted[: draw.count] = 1
        dad = share * distortion_loss(log_odds, undistorted)
        return {
            "loss": iad + settings.lambda_t * dad,
            "inconsistency": iad,
            "distortion": dad,
        }

    return Stage("joint", settings.steps, step, optimizer, {"model": model}, replicated=False)
