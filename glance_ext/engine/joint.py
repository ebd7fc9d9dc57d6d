"""Stage 3: Global-Net and the distortion head, with Local-Net frozen (paper, section 3.5)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from glance_ext.data.grid import PatchGrid, patch_grid
from glance_ext.data.patches import Enlarged, crop_from, sample_positions
from glance_ext.data.stains import STAINS, stain, turn
from glance_ext.engine.distributed import World
from glance_ext.engine.loop import Stage
from glance_ext.engine.settings import TrainSettings
from glance_ext.errors import GlanceError
from glance_ext.models.glance import IMAGE_SIZE, PATCH_SIZE, Glance
from glance_ext.models.global_net import hole_masks
from glance_ext.models.heads import distortion_loss, inconsistency
from glance_ext.models.local_net import LocalNet
from glance_ext.models.local_plan import LocalPlan, pass_multiply_adds
from glance_ext.models.normalisation import normalise

# Features that are kept for all training images together may take as much memory as this.
_KEPT_BYTES = 2 << 30


@dataclass(frozen=True)
class Draw:
    """The patches of one step: some images, and as many patches in each.

    Attributes:
        picks: ``(N,)`` int64, which images.
        origins: ``(N, K, 2)`` int64, row and column of each patch's first pixel.
        places: ``(N, K)`` int64, each patch's index in the grid; None for uniform positions.
        count: How many of the N K patches count, image by image: all but at most K - 1.
    """

    picks: Tensor
    origins: Tensor
    places: Tensor | None
    count: int

    @property
    def owners(self) -> Tensor:
        """``(count,)``, the image of each patch that counts."""
        return self.picks.repeat_interleave(self.origins.shape[1])[: self.count]

    @property
    def flat_origins(self) -> Tensor:
        """``(count, 2)``, the patches that count."""
        return self.origins.flatten(0, 1)[: self.count]

    def share(self, rank: int, size: int) -> tuple[Draw, slice]:
        """What process ``rank`` of ``size`` does: whole images, and its patches' place in all."""
        n, k = self.origins.shape[:2]
        first, last = rank * n // size, (rank + 1) * n // size
        patches = slice(first * k, min(last * k, self.count))
        places = None if self.places is None else self.places[first:last]
        part = Draw(
            self.picks[first:last],
            self.origins[first:last],
            places,
            patches.stop - patches.start,
        )
        return part, patches


def draw_patches(
    count: int,
    holes_per_image: int,
    images: int,
    grid: PatchGrid | None,
    generator: torch.Generator,
    image_size: tuple[int, int] = IMAGE_SIZE,
) -> Draw:
    """Draws the patches of one step.

    Args:
        count: Patches in all.
        holes_per_image: The most patches of one image; where they do not divide ``count``, each
            image has as equally many as possible.
        images: How many there are to draw from.
        grid: Where patches may lie; None for anywhere.
        generator: A CPU generator.
        image_size: Of the images that Local-Net sees.
    """
    n = images_a_step(count, holes_per_image)
    k = -(-count // n)
    picks = torch.randint(images, (n,), generator=generator)
    if grid is None:
        places = None
        origins = sample_positions(n * k, image_size, PATCH_SIZE, generator).unflatten(0, (n, k))
    else:
        places = torch.randint(len(grid), (n, k), generator=generator)
        origins = grid.origins[places]
    return Draw(picks, origins, places, count)


def images_a_step(count: int, holes_per_image: int) -> int:
    """How many images ``count`` patches come from."""
    return -(-count // holes_per_image)


def distorted(patches: Tensor, settings: TrainSettings, generator: torch.Generator) -> Tensor:
    """Patches as the distortion head's negatives, by ``distortion`` and ``stains``."""
    if settings.distortion == "turn":
        return turn(patches, generator)
    return stain(patches, generator, STAINS[settings.stains])


class _LocalFeatures:
    """The frozen Local-Net: of clean patches, kept where that is cheaper, and of stained ones."""

    def __init__(
        self,
        model: Glance,
        images: Tensor | Enlarged,
        grid: PatchGrid | None,
        draws: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._images, self._dtype, self._device = images, dtype, device
        # Its weights may still be restored from a checkpoint: they are copied at the first step.
        self._source = local_net = model.local_net
        self._view = model.local_view
        self._net: LocalNet | None = None
        self._plan: LocalPlan | None = None
        if grid is not None:
            plan = local_net.plan(grid.starts)
            alone = pass_multiply_adds(local_net.layers, PATCH_SIZE, PATCH_SIZE)
            size = len(images) * len(grid) * local_net.features * torch.finfo(dtype).bits // 8
            if plan.multiply_adds < draws * alone and size <= _KEPT_BYTES:
                self._plan = plan
        self._kept: dict[int, Tensor] = {}

    @property
    def keeps(self) -> bool:
        """Whether features of clean patches are computed densely, once an image."""
        return self._plan is not None

    @torch.no_grad()
    def __call__(self, draw: Draw, patches: Tensor, stained: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``(B, n)`` float32 (float64) of the patches of a draw, clean and stained."""
        if self._net is None:
            net = copy.deepcopy(self._source).requires_grad_(False).eval()
            self._net = net.to(self._dtype).to(memory_format=torch.channels_last)
        if self._plan is None:
            both = self._features(self._net, torch.cat((patches, stained)))
            clean, dirty = both.chunk(2)
            return clean, dirty
        assert draw.places is not None
        rows = torch.cat(
            [
                self._of_image(self._net, pick)[places]
                for pick, places in zip(
                    draw.picks.tolist(), draw.places.to(self._device), strict=True
                )
            ]
        )
        return rows[: draw.count].to(_wide(self._dtype)), self._features(self._net, stained)

    def _features(self, net: LocalNet, patches: Tensor) -> Tensor:
        x = normalise(patches.to(self._device)).to(self._dtype)
        return net(x).to(_wide(self._dtype))

    def _of_image(self, net: LocalNet, index: int) -> Tensor:
        """Features ``(P, n)`` of all patches of the grid in one image."""
        if index not in self._kept:
            assert self._plan is not None
            image = self._view(self._images[index][None].to(self._device).to(_wide(self._dtype)))
            image = normalise(image)
            self._kept[index] = net.dense(image.to(self._dtype), self._plan)[0]
        return self._kept[index]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def joint_stage(
    model: Glance,
    images: Tensor | Enlarged,
    settings: TrainSettings,
    device: torch.device,
    world: World | None = None,
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
    grid = (
        None
        if settings.positions == "uniform"
        else patch_grid(settings.positions, image_size=model.view_size)
    )
    draws = settings.steps * count / len(images) / world.size
    if images_a_step(count, settings.holes_per_image) < world.size:
        raise GlanceError(
            f"train: expected an image a step for each of {world.size} processes, got "
            f"{images_a_step(count, settings.holes_per_image)} (batch size {count} with "
            f"{settings.holes_per_image} holes an image)"
        )
    local_features = _LocalFeatures(model, images, grid, draws, dtype, device)
    # One hole an image has nothing to share: a masked pass costs less.
    alone = settings.holes_per_image == 1 and dtype == model.global_net.stem.weight.dtype

    side = model.view_size

    def step(generator: torch.Generator) -> dict[str, Tensor]:
        draw = draw_patches(
            count, settings.holes_per_image, len(images), grid, generator, (side, side)
        )
        drawn = images[draw.picks]
        rows = torch.arange(len(drawn)).repeat_interleave(draw.origins.shape[1])[: draw.count]
        view = drawn if side == IMAGE_SIZE[0] else model.local_view(drawn.to(_wide(dtype)))
        patches = crop_from(view, rows, draw.flat_origins, PATCH_SIZE).to(_wide(dtype))
        stained = distorted(patches, settings, generator)
        draw, mine = draw.share(world.rank, world.size)
        patches, stained = patches[mine], stained[mine]
        clean_features, stained_features = local_features(draw, patches, stained)
        whole = normalise(images[draw.picks].to(device).to(_wide(dtype))).to(dtype)
        if alone:
            holes = hole_masks(draw.flat_origins * model.patch_scale, model.hole_size, IMAGE_SIZE)
            global_features = model.global_net(whole, holes.to(device))
        else:
            plan = model.plan_holes(draw.origins, device=device, dtype=dtype)
            global_features = model.global_net.shared_features(whole, plan).flatten(0, 1)
        global_features = global_features[: draw.count].to(_wide(dtype))
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
