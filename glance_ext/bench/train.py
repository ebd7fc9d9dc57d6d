"""Cases of joint training: a step's losses and gradients, against one masked pass a patch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from glance_ext.bench import detect_reference as plain
from glance_ext.bench.cases import Case, Outputs, Variant
from glance_ext.bench.detect import base_multiply_adds
from glance_ext.bench.limits import Work
from glance_ext.data.grid import patch_grid
from glance_ext.data.patches import crop_patches
from glance_ext.engine.joint import distorted, draw_patches, images_a_step, joint_stage
from glance_ext.engine.loop import step_generator
from glance_ext.engine.settings import TrainSettings, preset
from glance_ext.errors import GlanceError
from glance_ext.models.glance import IMAGE_SIZE, PATCH_SIZE, Glance
from glance_ext.models.global_net import hole_masks
from glance_ext.models.heads import distortion_loss, inconsistency
from glance_ext.models.local_net import LocalNet
from glance_ext.models.local_plan import pass_multiply_adds
from glance_ext.models.normalisation import normalise

_IMAGES = 16
# So many that keeping the features of clean patches is cheaper, and so few that it is not.
_MANY_STEPS, _ONE_STEP = 1_000_000, 1
_WATCHED = ("global_net.stem.weight", "global_net.layers.4.weight", "distortion_head.hidden.weight")


@dataclass(frozen=True)
class Shape:
    """One step.

    Attributes:
        holes: Patches an image.
        positions: As in :class:`~glance_ext.engine.settings.TrainSettings`.
        batch: Patches in all.
    """

    holes: int
    positions: str = "4"
    batch: int = 32

    @property
    def name(self) -> str:
        """As in the results' case names."""
        where = self.positions if self.positions == "uniform" else f"stride{self.positions}"
        return f"train/joint/{where}_holes{self.holes}_b{self.batch}"


SHAPES = (
    Shape(1, "uniform"),  # as the paper draws
    Shape(8, "uniform"),
    *(Shape(holes) for holes in (1, 4, 8, 16)),  # 8 is the default preset's
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
            precision="bfloat16" if setup.dtype == torch.bfloat16 else "float32",
        )

    def case(self) -> Case:
        shape = self.shape
        steps: dict[str, Callable[[], Outputs]] = {
            "reference": partial(self._one_pass_a_patch, self.setup.reference, plain_features),
            "patches": partial(self._one_pass_a_patch, self.setup.low, op_features),
            "ours-unkept": self._shared(_ONE_STEP),
        }
        if shape.positions != "uniform":
            steps["ours"] = self._shared(_MANY_STEPS)
        else:
            steps["ours"] = steps.pop("ours-unkept")  # nothing can be kept: no patch comes twice
        return Case(
            shape.name,
            {
                "patches": shape.batch,
                "images": images_a_step(shape.batch, shape.holes),
                "holes_per_image": shape.holes,
                "positions": shape.positions,
                "checked_gradients": list(_WATCHED),
            },
            self._work(),
            {name: Variant(run, lambda: self._exact) for name, run in steps.items()},
            terms=shape.batch * 125**2,  # of the stem's gradient
            yardstick="reference",
            seconds=1.0,
        )

    def _shared(self, steps: int) -> Callable[[], Outputs]:
        """Our step, of a training of so many."""
        setup = self.setup
        model = copy.deepcopy(setup.model)
        stage = joint_stage(model, setup.images, replace(self.settings, steps=steps), setup.device)
        return lambda: _results(model, stage.step(self._generator()))

    @cached_property
    def _exact(self) -> Outputs:
        return self._one_pass_a_patch(self.setup.exact, op_features)

    def _generator(self) -> torch.Generator:
        return step_generator(self.setup.seed, "joint", 0)

    def _one_pass_a_patch(
        self, model: Glance, features: Callable[[Glance, Tensor, Tensor, Tensor], _Features]
    ) -> Outputs:
        setup, settings, count = self.setup, self.settings, self.shape.batch
        wide = model.distortion_head.hidden.weight.dtype
        grid = None if settings.positions == "uniform" else patch_grid(settings.positions)
        generator = self._generator()
        draw = draw_patches(count, settings.holes_per_image, len(setup.images), grid, generator)
        whole = setup.images[draw.owners].to(wide)
        patches = crop_patches(whole, draw.flat_origins, PATCH_SIZE)
        stained = distorted(patches, settings, generator)
        masks = hole_masks(draw.flat_origins, PATCH_SIZE, IMAGE_SIZE)
        both = normalise(torch.cat((patches, stained)).to(setup.device))
        local, around = features(model, both, normalise(whole.to(setup.device)), masks)
        clean, other = local.to(wide).chunk(2)
        around = around.to(wide)
        iad = inconsistency(clean, around).mean()
        log_odds = model.distortion_head(torch.cat((clean, other)), around.repeat(2, 1))
        undistorted = torch.zeros_like(log_odds)
        undistorted[:count] = 1
        dad = distortion_loss(log_odds, undistorted)
        loss = iad + settings.lambda_t * dad
        return _results(model, {"loss": loss, "inconsistency": iad, "distortion": dad})

    def _work(self) -> Work:
        """Global-Net's shared pass, three times for its gradients, and the stained patches."""
        setup, shape = self.setup, self.shape
        network = setup.model.global_net
        images = images_a_step(shape.batch, shape.holes)
        grid = patch_grid("33")  # how much a hole costs depends little on where it is
        holes = setup.model.plan_holes(grid.origins[: shape.holes]).multiply_adds
        shared = images * (base_multiply_adds(network) + holes)
        stem = images * 125**2 * network.stem.weight.numel()  # whose input needs no gradient
        local = shape.batch * pass_multiply_adds(setup.model.local_net.layers, *[PATCH_SIZE] * 2)
        pixels = images * 3 * IMAGE_SIZE[0] * IMAGE_SIZE[1]
        weights = sum(p.numel() for p in network.parameters())
        size = torch.finfo(setup.dtype).bits // 8
        return Work(2 * (3 * shared - stem + local), size * (pixels + 3 * weights))


_Features = tuple[Tensor, Tensor]


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
