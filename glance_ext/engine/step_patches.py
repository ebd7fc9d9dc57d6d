"""What a step of joint training sees: patches, and their Local-Net features, clean and stained.

:class:`FreshPatches` draws and stains each step's patches anew, as the paper does.
:class:`KeptPatches` stains a patch once and uses its features in several steps: Local-Net is
frozen, and staining and describing patches is most of what a step costs once holes share their
pass through Global-Net.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from glance_ext.data.grid import PatchGrid, patch_grid
from glance_ext.data.patches import Images, crop_from, sample_positions
from glance_ext.data.stains import STAINS, stain, turn
from glance_ext.engine.distributed import World
from glance_ext.engine.loop import step_generator
from glance_ext.engine.settings import TrainSettings
from glance_ext.models.glance import IMAGE_SIZE, PATCH_SIZE, Glance
from glance_ext.models.local_net import LocalNet
from glance_ext.models.local_plan import LocalPlan, pass_multiply_adds
from glance_ext.models.normalisation import normalise

# Features that are kept for all training images together may take as much memory as this.
_KEPT_BYTES = 2 << 30
_AT_ONCE = 256  # patches that Local-Net describes at a time


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


def dense_plan(model: Glance, grid: PatchGrid | None, patches: float) -> LocalPlan | None:
    """How Local-Net describes all patches of a grid, if that is less work than so many alone."""
    if grid is None:
        return None
    plan = model.local_net.plan(grid.starts)
    alone = pass_multiply_adds(model.local_net.layers, PATCH_SIZE, PATCH_SIZE)
    return plan if plan.multiply_adds < patches * alone else None


class Seen(NamedTuple):
    """What a process sees in a step.

    Attributes:
        draw: Its share of the step's patches.
        clean: ``(count, n)``, their Local-Net features.
        stained: ``(count, n)``, those of the same patches distorted.
    """

    draw: Draw
    clean: Tensor
    stained: Tensor


class _FrozenLocalNet:
    """A copy of Local-Net in another dtype, made at the first call.

    Not before: its weights may still be restored from a checkpoint.
    """

    def __init__(self, model: Glance, dtype: torch.dtype, device: torch.device) -> None:
        self._source, self._view = model.local_net, model.local_view
        self._dtype, self._device = dtype, device
        self._net: LocalNet | None = None

    @property
    def net(self) -> LocalNet:
        if self._net is None:
            net = copy.deepcopy(self._source).requires_grad_(False).eval()
            self._net = net.to(self._dtype).to(memory_format=torch.channels_last)
        return self._net

    @torch.no_grad()
    def of_patches(self, patches: Tensor) -> Tensor:
        """Features ``(B, n)`` float32 (float64) of patches with values in [0, 1]."""
        x = normalise(patches.to(self._device)).to(self._dtype)
        return torch.cat([self.net(some) for some in x.split(_AT_ONCE)]).to(wide(self._dtype))

    @torch.no_grad()
    def of_image(self, image: Tensor, plan: LocalPlan) -> Tensor:
        """Features ``(P, n)`` of all patches of a grid in one image ``(3, 256, 256)``."""
        view = self._view(image[None].to(self._device).to(wide(self._dtype)))
        return self.net.dense(normalise(view).to(self._dtype), plan)[0]


class StepPatches:
    """Draws a step's patches and describes them; what both ways to do it share.

    Args:
        model: Its Local-Net is frozen.
        images: ``(N, 3, 256, 256)``, RGB in [0, 1].
        settings: Those of :class:`TrainSettings` that say which patches and stains, and how many.
        device: Where to compute and keep features.
        dtype: In what.
        world: The processes that train together.
    """

    def __init__(
        self,
        model: Glance,
        images: Images,
        settings: TrainSettings,
        device: torch.device,
        dtype: torch.dtype,
        world: World,
    ) -> None:
        self._images, self._settings, self._device, self._world = images, settings, device, world
        self._dtype, self._wide = dtype, wide(dtype)
        self._side, self._view = model.view_size, model.local_view
        self._grid: PatchGrid | None = None
        if settings.positions != "uniform":
            self._grid = patch_grid(settings.positions, image_size=self._side)
        self._local_net = _FrozenLocalNet(model, dtype, device)
        self._feature_bytes = model.local_net.features * torch.finfo(dtype).bits // 8

    def __call__(self, generator: torch.Generator) -> Seen:
        """Draws the patches of a step."""
        raise NotImplementedError

    def _crop(self, images: Tensor, owners: Tensor, origins: Tensor) -> Tensor:
        """Patches ``(B, 3, 33, 33)`` of what Local-Net sees of images."""
        if self._side != IMAGE_SIZE[0]:
            images = self._view(images.to(self._wide))
        return crop_from(images, owners, origins, PATCH_SIZE).to(self._wide)


class FreshPatches(StepPatches):
    """Draws each step's patches anew; features of clean ones are kept where that is cheaper."""

    def __init__(
        self,
        model: Glance,
        images: Images,
        settings: TrainSettings,
        device: torch.device,
        dtype: torch.dtype,
        world: World,
    ) -> None:
        super().__init__(model, images, settings, device, dtype, world)
        draws = settings.steps * settings.batch_size / len(images) / world.size
        patches = 0 if self._grid is None else len(images) * len(self._grid)
        fits = patches * self._feature_bytes <= _KEPT_BYTES
        self._plan = dense_plan(model, self._grid, draws) if fits else None
        self._kept: dict[int, Tensor] = {}

    def __call__(self, generator: torch.Generator) -> Seen:
        """Draws the patches of a step."""
        whole = draw_patches(
            self._settings.batch_size,
            self._settings.holes_per_image,
            len(self._images),
            self._grid,
            generator,
            (self._side, self._side),
        )
        drawn = self._images[whole.picks]
        rows = torch.arange(len(drawn)).repeat_interleave(whole.origins.shape[1])[: whole.count]
        patches = self._crop(drawn, rows, whole.flat_origins)
        stained = distorted(patches, self._settings, generator)
        draw, mine = whole.share(self._world.rank, self._world.size)
        if self._plan is None:
            both = self._local_net.of_patches(torch.cat((patches[mine], stained[mine])))
            return Seen(draw, *both.chunk(2))
        assert draw.places is not None
        places = draw.places.to(self._device)
        clean = torch.cat(
            [self._of_image(i)[p] for i, p in zip(draw.picks.tolist(), places, strict=True)]
        )
        return Seen(
            draw, clean[: draw.count].to(self._wide), self._local_net.of_patches(stained[mine])
        )

    def _of_image(self, index: int) -> Tensor:
        if index not in self._kept:
            assert self._plan is not None
            self._kept[index] = self._local_net.of_image(self._images[index], self._plan)
        return self._kept[index]


class KeptPatches(StepPatches):
    """Draws from a pool of patches, as many of each image, whose features are computed once.

    What an image's pool holds depends on the seed and the image's index alone, so an interrupted
    training goes on with the same, and each of several processes has the same. Features of an
    image's pool are computed when it is first drawn.

    Attributes:
        size: Patches of each image: so many that each is drawn ``stain_uses`` times on average, or
            as many as memory allows.
    """

    def __init__(
        self,
        model: Glance,
        images: Images,
        settings: TrainSettings,
        device: torch.device,
        dtype: torch.dtype,
        world: World,
    ) -> None:
        super().__init__(model, images, settings, device, dtype, world)
        draws = settings.steps * settings.batch_size
        size = -(-draws // (settings.stain_uses * len(images)))
        most = _KEPT_BYTES // (2 * self._feature_bytes * len(images))
        self.size = max(1, min(size, most))
        self._plan = dense_plan(model, self._grid, self.size)
        self._kept: dict[int, Tensor] = {}

    def __call__(self, generator: torch.Generator) -> Seen:
        """Draws the patches of a step."""
        whole = self.draw(generator)
        draw, _ = whole.share(self._world.rank, self._world.size)
        assert draw.places is not None
        places = draw.places.to(self._device)
        pairs = [self._of_image(i)[:, p] for i, p in zip(draw.picks.tolist(), places, strict=True)]
        clean, stained = torch.cat(pairs, 1)[:, : draw.count].to(self._wide)
        return Seen(draw, clean, stained)

    def draw(self, generator: torch.Generator) -> Draw:
        """Which patches a step sees; their places are those in their images' pools."""
        n = images_a_step(self._settings.batch_size, self._settings.holes_per_image)
        k = -(-self._settings.batch_size // n)
        picks = torch.randint(len(self._images), (n,), generator=generator)
        places = torch.randint(self.size, (n, k), generator=generator)
        pools = [self._pool(i)[0] for i in picks.tolist()]
        origins = torch.stack([pool[some] for pool, some in zip(pools, places, strict=True)])
        return Draw(picks, origins, places, self._settings.batch_size)

    def patches(self, index: int) -> tuple[Tensor, Tensor]:
        """An image's pool ``(size, 3, 33, 33)``, its patches as they are and distorted."""
        origins, _, generator = self._pool(index)
        owners = torch.zeros(len(origins), dtype=torch.int64)
        clean = self._crop(self._images[index : index + 1], owners, origins)
        return clean, distorted(clean, self._settings, generator)

    def forget(self, index: int) -> None:
        """Drops an image's features, which come back the same."""
        self._kept.pop(index, None)

    def _pool(self, index: int) -> tuple[Tensor, Tensor | None, torch.Generator]:
        """Origins of an image's pool, their places in the grid, and the generator of its stains."""
        generator = step_generator(self._settings.seed, "stains", index)
        if self._grid is None:
            view = (self._side, self._side)
            return sample_positions(self.size, view, PATCH_SIZE, generator), None, generator
        places = torch.randint(len(self._grid), (self.size,), generator=generator)
        return self._grid.origins[places], places, generator

    def _of_image(self, index: int) -> Tensor:
        """Features ``(2, size, n)`` of an image's pool, clean and stained."""
        if index not in self._kept:
            patches, stained = self.patches(index)
            if self._plan is None:
                both = self._local_net.of_patches(torch.cat((patches, stained)))
                clean, dirty = both.chunk(2)
            else:
                _, places, _ = self._pool(index)
                assert places is not None
                dirty = self._local_net.of_patches(stained)
                every = self._local_net.of_image(self._images[index], self._plan)
                clean = every[places.to(self._device)].to(dirty)
            self._kept[index] = torch.stack((clean, dirty)).to(self._dtype)
        return self._kept[index]


def wide(dtype: torch.dtype) -> torch.dtype:
    """In which losses are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32
