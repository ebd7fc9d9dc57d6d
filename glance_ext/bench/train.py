"""Cases of joint training: a step's losses and gradients, against one masked pass a patch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from glance_ext.bench import detect_reference as plain
from glance_ext.bench.cases import Case, Outputs, Variant
from glance_ext.bench.detect import base_multiply_adds
from glance_ext.bench.limits import Work
from glance_ext.bench.machine import uses_tf32
from glance_ext.data.grid import patch_grid
from glance_ext.data.patches import crop_patches
from glance_ext.engine.distributed import World
from glance_ext.engine.joint import joint_stage
from glance_ext.engine.loop import step_generator
from glance_ext.engine.settings import TrainSettings, preset
from glance_ext.engine.step_patches import (
    Draw,
    KeptPatches,
    distorted,
    draw_patches,
    images_a_step,
)
from glance_ext.errors import GlanceError
from glance_ext.models.glance import IMAGE_SIZE, PATCH_SIZE, Glance
from glance_ext.models.global_net import hole_masks
from glance_ext.models.heads import distortion_loss, inconsistency
from glance_ext.models.local_net import LocalNet
from glance_ext.models.local_plan import pass_multiply_adds
from glance_ext.models.normalisation import normalise

_IMAGES = 16
# Where products are rounded to bfloat16, or to TF32, units near 0 are turned on or off. In bfloat16
# plain torch's gradients of a step of two patches are off by 23 % of their norm, of 16 by 13 %.
_COARSE_CEILING = 0.25
_MANY_STEPS = 1_000_000  # so many that keeping the features of clean patches is cheaper
_WATCHED = ("global_net.stem.weight", "global_net.layers.4.weight", "distortion_head.hidden.weight")


@dataclass(frozen=True)
class Shape:
    """One step.

    Attributes:
        holes: Patches an image.
        positions: As in :class:`~glance_ext.engine.settings.TrainSettings`.
        batch: Patches in all.
        stain_uses: As there; 4 is the default preset's.
    """

    holes: int
    positions: str = "4"
    batch: int = 32
    stain_uses: int = 4

    @property
    def name(self) -> str:
        """As in the results' case names."""
        where = self.positions if self.positions == "uniform" else f"stride{self.positions}"
        uses = "" if self.stain_uses == 4 else f"_uses{self.stain_uses}"
        return f"train/joint/{where}_holes{self.holes}{uses}_b{self.batch}"


SHAPES = (
    Shape(1, "uniform"),  # as the paper draws
    Shape(8, "uniform"),
    *(Shape(holes) for holes in (1, 4, 8, 16)),  # 8 is the default preset's
    Shape(16, stain_uses=8),
)
QUICK_SHAPES = (Shape(2, "33", batch=4), Shape(1, "uniform", batch=2))


def cases(dtype: torch.dtype, device: torch.device, seed: int, quick: bool) -> Iterator[Case]:
    """A step as the paper draws its patches, and with more and more of them in one image.

    Raises:
        GlanceError: The dtype is none that training computes in.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise GlanceError(f"bench train: expected float32 or bfloat16, got {dtype}")
    setup = _Setup(dtype, device, seed)
    for shape in QUICK_SHAPES if quick else SHAPES:
        yield _Step(setup, shape).case()


class _Setup:
    """What the cases of a run share."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.dtype, self.device, self.seed = dtype, device, seed
        self.coarse = dtype == torch.bfloat16 or uses_tf32(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = Glance(LocalNet()).eval().to(device)
        self.model.local_net.requires_grad_(False)
        self.exact = copy.deepcopy(self.model).double()
        self.low = copy.deepcopy(self.model)
        self.low.local_net.to(dtype)
        self.low.global_net.to(dtype)
        self.reference = plain.prepared(self.low)
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.rand(_IMAGES, 3, *IMAGE_SIZE, generator=generator)


class _Step:
    """One shape's draw and the ways to compute its losses and gradients."""

    def __init__(self, setup: _Setup, shape: Shape) -> None:
        self.setup, self.shape = setup, shape
        self.settings: TrainSettings = preset(
            "default",
            batch_size=shape.batch,
            holes_per_image=shape.holes,
            positions=shape.positions,
            stain_uses=shape.stain_uses,
            precision="bfloat16" if setup.dtype == torch.bfloat16 else "float32",
        )

    def case(self) -> Case:
        shape = self.shape
        setup, anew = self.setup, self._drawn_anew
        exact = partial(self._specified, setup.exact, op_features)
        of_anew = cache(partial(exact, anew))
        of_pools = partial(exact, partial(self._drawn_from, self._kept_patches(setup.exact)))
        variants = {
            "reference": Variant(
                partial(self._specified, setup.reference, plain_features, anew), of_anew
            ),
            "patches": Variant(partial(self._specified, setup.low, op_features, anew), of_anew),
            "ours-anew": Variant(self._ours_anew(), of_anew),
            "ours": Variant(self._ours(), of_pools),
        }
        return Case(
            shape.name,
            {
                "patches": shape.batch,
                "images": images_a_step(shape.batch, shape.holes),
                "holes_per_image": shape.holes,
                "positions": shape.positions,
                "stain_uses": shape.stain_uses,
                "checked_gradients": list(_WATCHED),
            },
            self._work(),
            variants,
            terms=shape.batch * 125**2,  # of the stem's gradient
            yardstick="reference",
            by_norm=setup.coarse,
            ceiling=_COARSE_CEILING if setup.coarse else None,
            seconds=1.0,
        )

    def _ours_anew(self) -> Callable[[], Outputs]:
        """Our step where each patch is stained anew; features of clean ones on a grid are kept."""
        setup = self.setup
        model = copy.deepcopy(setup.model)
        settings = replace(self.settings, steps=_MANY_STEPS, stain_uses=1)
        stage = joint_stage(model, setup.images, settings, setup.device)
        return lambda: _results(model, stage.step(self._generator()))

    def _ours(self) -> Callable[[], Outputs]:
        """Our step where a patch is used ``stain_uses`` times, and so many fewer are new to it."""
        setup = self.setup
        model = copy.deepcopy(setup.model)
        patches = self._kept_patches(model)
        stage = joint_stage(model, setup.images, self.settings, setup.device, step_patches=patches)
        (first, *_) = patches.draw(self._generator()).picks.tolist()

        def step() -> Outputs:
            patches.forget(first)  # its pool is what a step meets for the first time
            return _results(model, stage.step(self._generator()))

        return step

    def _kept_patches(self, model: Glance) -> KeptPatches:
        """Pools of as many patches an image as a step meets for the first time, on average."""
        setup, settings = self.setup, self.settings
        steps = len(setup.images)
        return KeptPatches(
            model, setup.images, replace(settings, steps=steps), setup.device, setup.dtype, World()
        )

    def _generator(self) -> torch.Generator:
        return step_generator(self.setup.seed, "joint", 0)

    def _drawn_anew(self) -> _Drawn:
        """A step's draw, its patches and the same stained."""
        setup, settings = self.setup, self.settings
        grid = None if settings.positions == "uniform" else patch_grid(settings.positions)
        generator = self._generator()
        draw = draw_patches(
            settings.batch_size, settings.holes_per_image, len(setup.images), grid, generator
        )
        patches = crop_patches(setup.images[draw.owners], draw.flat_origins, PATCH_SIZE)
        return draw, patches, distorted(patches, settings, generator)

    def _drawn_from(self, kept: KeptPatches) -> _Drawn:
        """The same, of pools."""
        draw = kept.draw(self._generator())
        assert draw.places is not None
        pools = [kept.patches(pick) for pick in draw.picks.tolist()]
        patches, stained = (
            torch.cat([pool[kind][some] for pool, some in zip(pools, draw.places, strict=True)])
            for kind in (0, 1)
        )
        return draw, patches[: draw.count], stained[: draw.count]

    def _specified(
        self,
        model: Glance,
        features: Callable[[Glance, Tensor, Tensor, Tensor], _Features],
        drawn: Callable[[], _Drawn],
    ) -> Outputs:
        """A step by one masked pass a patch."""
        setup, settings = self.setup, self.settings
        wide = model.distortion_head.hidden.weight.dtype
        draw, patches, stained = drawn()
        whole = setup.images[draw.owners].to(wide)
        masks = hole_masks(draw.flat_origins, PATCH_SIZE, IMAGE_SIZE)
        both = normalise(torch.cat((patches, stained)).to(wide).to(setup.device))
        local, around = features(model, both, normalise(whole.to(setup.device)), masks)
        clean, other = local.to(wide).chunk(2)
        around = around.to(wide)
        iad = inconsistency(clean, around).mean()
        log_odds = model.distortion_head(torch.cat((clean, other)), around.repeat(2, 1))
        undistorted = torch.zeros_like(log_odds)
        undistorted[: draw.count] = 1
        dad = distortion_loss(log_odds, undistorted)
        loss = iad + settings.lambda_t * dad
        return _results(model, {"loss": loss, "inconsistency": iad, "distortion": dad})

    def _work(self) -> Work:
        """Global-Net's shared pass, three times for its gradients, and a step's new patches."""
        setup, shape = self.setup, self.shape
        network = setup.model.global_net
        images = images_a_step(shape.batch, shape.holes)
        grid = patch_grid("33")  # how much a hole costs depends little on where it is
        holes = setup.model.plan_holes(grid.origins[: shape.holes]).multiply_adds
        shared = images * (base_multiply_adds(network) + holes)
        stem = images * 125**2 * network.stem.weight.numel()  # whose input needs no gradient
        new = 2 * shape.batch / self.settings.stain_uses  # clean and stained
        local = new * pass_multiply_adds(setup.model.local_net.layers, *[PATCH_SIZE] * 2)
        pixels = images * 3 * IMAGE_SIZE[0] * IMAGE_SIZE[1]
        weights = sum(p.numel() for p in network.parameters())
        size = torch.finfo(setup.dtype).bits // 8
        return Work(2 * (3 * shared - stem + local), size * (pixels + 3 * weights))


_Features = tuple[Tensor, Tensor]
_Drawn = tuple[Draw, Tensor, Tensor]


def plain_features(model: Glance, patches: Tensor, images: Tensor, masks: Tensor) -> _Features:
    """Local and global features ``(2B, n)`` and ``(B, n)`` in plain torch; B masked images."""
    network = model.global_net
    dtype = network.stem.weight.dtype
    with torch.no_grad():
        x = patches.to(dtype, memory_format=torch.channels_last)
        local = model.local_net.layers(x).flatten(1)
    whole = images.to(dtype, memory_format=torch.channels_last)
    return local, plain.masked_global_net(network, whole, masks.to(whole)).flatten(1)


def op_features(model: Glance, patches: Tensor, images: Tensor, masks: Tensor) -> _Features:
    """The same in the package's own ops."""
    dtype = model.global_net.stem.weight.dtype
    with torch.no_grad():
        local = model.local_net(patches.to(dtype))
    return local, model.global_net(images.to(dtype), masks.to(images.device))


def _results(model: Glance, losses: dict[str, Tensor]) -> Outputs:
    """The losses and the gradients of some parameters, all others being computed too."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(losses["loss"], list(parameters.values()))
    found = dict(zip(parameters, grads, strict=True))
    return {name: loss.detach() for name, loss in losses.items()} | {
        f"grad_{name}": found[name] for name in _WATCHED
    }
