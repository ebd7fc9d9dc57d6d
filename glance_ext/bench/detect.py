"""Cases of detection: from images to maps, each of its stages alone, and how its time grows."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter

import torch
from torch import Tensor

from glance_ext.bench import detect_reference as plain
from glance_ext.bench.alone import Alone
from glance_ext.bench.cases import Case, Outputs, Variant
from glance_ext.bench.detect_truth import Block, Truth, blocks
from glance_ext.bench.limits import Work
from glance_ext.data.grid import patch_grid
from glance_ext.engine.graph import GraphedFunction
from glance_ext.models.glance import IMAGE_SIZE, PATCH_SIZE, Glance, GridPlan, HeadScores
from glance_ext.models.global_net import GlobalNet
from glance_ext.models.local_net import LocalNet
from glance_ext.models.normalisation import normalise
from glance_ext.ops import aggregate_patch_scores

_SIDE = IMAGE_SIZE[0]
_WINDOW_STRIDE = _SIDE // 2
# The reference takes a third of a second for 100 patches of one image on two cores.
_REFERENCE_PATCHES = 4000
# Enough calls for a 95th percentile where a call is quick, a single one where it takes 6 seconds.
_SECONDS = 0.3
_LATENCY_CALLS = 20


@dataclass(frozen=True)
class Shape:
    """One case.

    Attributes:
        stage: ``map`` (all of detection), ``local``, ``global``, ``scores``, ``aggregate``;
            ``alone``, all of it in a process of its own for each variant, on a CPU; or ``windows``:
            the maps of overlapping windows of a larger image, half a window apart.
        grid: ``paper`` or a stride, in each image or window.
        images: How many.
        side: Of the image in pixels.
    """

    stage: str
    grid: str | int = 4
    images: int = 1
    side: int = _SIDE

    @property
    def name(self) -> str:
        """As in the results' case names."""
        grid = self.grid if self.grid == "paper" else f"stride{self.grid}"
        size = f"{self.side}px" if self.stage == "windows" else f"n{self.images}"
        return f"detect/{self.stage}/{grid}_{size}"

    @property
    def windows(self) -> int:
        """How many 256x256 images go through the networks."""
        return self.images * ((self.side - _SIDE) // _WINDOW_STRIDE + 1) ** 2


STAGES = ("local", "global", "scores", "aggregate")
SHAPES = (
    *(Shape("map", 4, images) for images in (1, 2, 4, 8, 16)),
    *(Shape(stage, 4, images) for stage in STAGES for images in (1, 16)),
    *(Shape("map", grid) for grid in ("paper", 16, 8, 2)),
    *(Shape("windows", 8, side=side) for side in (256, 512, 1024)),
    Shape("alone", 4),
)
_PATCH_BY_PATCH = ("detect/map/stride4_n1", "detect/map/paper_n1", "detect/map/stride33_n1")
QUICK_SHAPES = (
    Shape("map", 33, 1),
    Shape("alone", 33),
    Shape("map", 33, 2),
    *(Shape(stage, 33) for stage in STAGES),
    Shape("windows", 33, side=512),  # the first and the last window do not overlap,
)


def cases(dtype: torch.dtype, device: torch.device, seed: int, quick: bool) -> Iterator[Case]:
    """The whole, its stages, and larger and smaller grids, batches and images."""
    setup = _Setup(dtype, device, seed)
    for shape in QUICK_SHAPES if quick else SHAPES:
        if shape.stage != "alone" or device.type == "cpu":
            yield _Inputs(setup, shape).case()


def paper_score(scores: HeadScores) -> Tensor:
    """``s = lambda_s s_IAD + (1 - lambda_s) s_DAD`` (paper, equation 8)."""
    return plain.LAMBDA_S * scores.inconsistency + (1 - plain.LAMBDA_S) * scores.distortion


def base_multiply_adds(network: GlobalNet) -> int:
    """Multiply-adds of Global-Net's pass without a hole, for one image."""
    side, total = _SIDE, 0
    for layer in (network.stem, *network.layers):
        kernel, stride = layer.kernel_size[0], layer.stride[0]
        side = (side - kernel) // stride + 1
        total += side**2 * layer.weight.numel()
        if layer is network.stem:
            side = (side - 3) // 2 + 1  # the pooling
    return total


def windows_of(image: Tensor) -> Tensor:
    """``(N, 3, S, S)`` as overlapping windows ``(N * k, 3, 256, 256)``, half a window apart."""
    views = image.unfold(2, _SIDE, _WINDOW_STRIDE).unfold(3, _SIDE, _WINDOW_STRIDE)
    return views.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


def maps_of(scores: HeadScores, origins: Tensor) -> Tensor:
    """The anomaly maps of the heads' scores on a grid."""
    return aggregate(paper_score(scores), origins)


def aggregate(scores: Tensor, origins: Tensor) -> Tensor:
    """The maps ``(N, 256, 256)`` of patch scores ``(N, P)`` on a grid."""
    return aggregate_patch_scores(scores, PATCH_SIZE, IMAGE_SIZE, origins=origins)


def reference_alone(model: Glance, images: Tensor, starts: Sequence[int]) -> Callable[[], Tensor]:
    """The reference as a script runs it, for :class:`~glance_ext.bench.alone.Alone`."""
    return partial(plain.detect_maps, model, images, starts)


def ours_alone(model: Glance, images: Tensor, grid: str | int) -> Callable[[], Tensor]:
    """Our detection as a script runs it, for :class:`~glance_ext.bench.alone.Alone`."""
    patches = patch_grid(grid)
    dtype = next(model.global_net.parameters()).dtype
    plan = model.plan(patches.starts, patches.starts, device=images.device, dtype=dtype)
    return lambda: maps_of(model.score_grid(images, plan), patches.origins)


class _Setup:
    """What the cases of a run share: the model in each form, two images, and the truth on them."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Glance(LocalNet()).eval().requires_grad_(False).to(device)
        # The first and the last image of every batch, on which the truth is known.
        self.known = torch.rand(2, 3, _SIDE, _SIDE, generator=self.generator).to(device)
        self.truth = Truth(model, self.known)
        self.model = copy.deepcopy(model)
        self.model.local_net.to(dtype)
        self.model.global_net.to(dtype)
        self.reference = plain.prepared(self.model)
        self._plans: dict[str | int, GridPlan] = {}

    def plan(self, grid: str | int) -> GridPlan:
        if grid not in self._plans:
            starts = patch_grid(grid).starts
            self._plans[grid] = self.model.plan(
                starts, starts, device=self.device, dtype=self.dtype
            )
        return self._plans[grid]

    def images(self, shape: Shape) -> Tensor:
        """Noise, of which the first and the last 256x256 pixels are the known images."""
        side = shape.side
        images = torch.rand(shape.images, 3, side, side, generator=self.generator).to(self.device)
        if shape.windows > 1:
            images[-1, :, -_SIDE:, -_SIDE:] = self.known[1]
        images[0, :, :_SIDE, :_SIDE] = self.known[0]
        return images


class _Inputs:
    """One shape's tensors and variants."""

    def __init__(self, setup: _Setup, shape: Shape) -> None:
        self.setup, self.shape = setup, shape
        self.grid = patch_grid(shape.grid)
        self.starts, self.origins = self.grid.starts, self.grid.origins
        self.pairs = [(int(row), int(column)) for row, column in self.origins]
        self.plan = setup.plan(shape.grid)
        self.blocks = blocks(self.starts)
        # The last known image is in batches of two or more.
        self.known = [0] if shape.windows == 1 else [0, shape.windows - 1]
        self.features = setup.model.local_net.features
        device, dtype, generator = setup.device, setup.dtype, setup.generator
        if shape.stage in ("map", "alone", "windows", "local", "global"):
            self.images = setup.images(shape)
            self.normalised = normalise(self.images).to(dtype)
        elif shape.stage == "scores":
            both = torch.randn(2, shape.images, len(self.grid), self.features, generator=generator)
            self.local, self.global_ = both.to(device, dtype)
        else:
            scores = torch.rand(shape.images, len(self.grid), generator=generator)
            self.scores = scores.to(device)

    def case(self) -> Case:
        shape = self.shape
        return Case(
            shape.name,
            {
                "images": [shape.images, 3, shape.side, shape.side],
                "windows": shape.windows,
                "patches": len(self.grid),
                "grid": str(shape.grid),
                "multiply_adds": {
                    "local": self.plan.local.multiply_adds,
                    "global": self.plan.holes.multiply_adds
                    + base_multiply_adds(self.setup.model.global_net),
                },
                "checked": [block.describe() for block in self.blocks],
                "checked_images": self.known,
            },
            self._work(),
            self._variants(),
            terms=self._terms(),
            yardstick="reference",
            same_everywhere=True,
            seconds=_SECONDS,
            min_repeats=_LATENCY_CALLS if shape.windows == 1 else 7,
        )

    def _variants(self) -> dict[str, Variant]:
        name = {"map": "map", "alone": "map", "windows": "maps"}.get(
            self.shape.stage, self.shape.stage
        )
        runs = getattr(self, f"_run_{self.shape.stage}")()
        expected, part = getattr(self, f"_expect_{self.shape.stage}")()
        return {
            variant: Variant(
                partial(_outputs, name, run),
                partial(_outputs, name, expected),
                part,
                elsewhere=isinstance(run, Alone),
            )
            for variant, run in runs.items()
        }

    def _with_reference(self) -> bool:
        """Whether the reference takes seconds, not minutes."""
        few = self.shape.windows == 1 or self.setup.device.type == "cuda"
        return few and len(self.grid) <= _REFERENCE_PATCHES

    # Each stage's variants.

    def _run_map(self) -> dict[str, Callable[[], Tensor]]:
        model = self.setup.model
        runs: dict[str, Callable[[], Tensor]] = {}
        if self._with_reference():
            runs["reference"] = partial(
                plain.detect_maps, self.setup.reference, self.images, self.starts
            )
        runs["ours"] = lambda: self._maps(model.score_grid(self.images, self.plan))
        if self.setup.device.type == "cuda":
            score = partial(model.score_grid, plan=self.plan)
            graphed = GraphedFunction(score, torch.zeros_like(self.images))
            runs["ours-graph"] = lambda: self._maps(graphed(self.images))
        # Each patch by a masked pass of its own, in the package's own ops: float32 alone.
        if self.shape.name in _PATCH_BY_PATCH and self.setup.dtype == torch.float32:
            runs["patches"] = lambda: self._maps(model.score_patches(self.images, self.origins))
        return runs

    def _run_alone(self) -> dict[str, Callable[[], Tensor]]:
        setup = self.setup
        return {
            "reference": Alone(reference_alone, setup.reference, self.images, self.starts),
            "ours": Alone(ours_alone, setup.model, self.images, self.shape.grid),
        }

    def _run_windows(self) -> dict[str, Callable[[], Tensor]]:
        model = self.setup.model
        return {
            "ours": lambda: self._maps(model.score_grid(windows_of(self.images), self.plan)),
        }

    def _run_local(self) -> dict[str, Callable[[], Tensor]]:
        network = self.setup.model.local_net
        runs: dict[str, Callable[[], Tensor]] = {}
        if self._with_reference():
            runs["reference"] = partial(
                plain.local_features, self.setup.reference, self.normalised, self.pairs
            )
        return runs | {"ours": lambda: network.dense(self.normalised, self.plan.local)}

    def _run_global(self) -> dict[str, Callable[[], Tensor]]:
        network = self.setup.model.global_net
        runs: dict[str, Callable[[], Tensor]] = {}
        if self._with_reference():
            runs["reference"] = partial(
                plain.global_features, self.setup.reference, self.normalised, self.pairs
            )
        return runs | {"ours": lambda: network.shared_features(self.normalised, self.plan.holes)}

    def _run_scores(self) -> dict[str, Callable[[], Tensor]]:
        model = self.setup.model
        return {
            "reference": partial(
                plain.patch_scores, self.setup.reference, self.local, self.global_
            ),
            "ours": lambda: paper_score(model.compare(self.local.float(), self.global_.float())),
        }

    def _run_aggregate(self) -> dict[str, Callable[[], Tensor]]:
        side = len(self.starts)
        return {
            "reference": lambda: plain.fold_means(
                self.scores.unflatten(1, (side, side)), self.starts
            ),
            "ours": lambda: aggregate(self.scores, self.origins),
        }

    def _maps(self, scores: HeadScores) -> Tensor:
        return maps_of(scores, self.origins)

    # What each stage should give, and of which part of its results that is known.

    def _expect_map(self) -> _Expected:
        return partial(self._truth, "map"), partial(_of_pixels, self.known, self.blocks)

    _expect_alone = _expect_windows = _expect_map

    def _expect_local(self) -> _Expected:
        return partial(self._truth, "local"), partial(_of_patches, self.known, self.blocks)

    def _expect_global(self) -> _Expected:
        return partial(self._truth, "global"), partial(_of_patches, self.known, self.blocks)

    def _truth(self, result: str) -> Tensor:
        known = range(len(self.known))
        return torch.stack([self.setup.truth(self.starts, which)[result] for which in known])

    def _expect_scores(self) -> _Expected:
        exact = self.setup.truth.model
        return lambda: plain.patch_scores(exact, self.local.double(), self.global_.double()), None

    def _expect_aggregate(self) -> _Expected:
        side = len(self.starts)
        return lambda: plain.fold_means(
            self.scores[self.known].double().unflatten(1, (side, side)), self.starts
        ), itemgetter(self.known)

    def _terms(self) -> int:
        if self.shape.stage == "aggregate":
            return PATCH_SIZE**2
        return max(layer.numel() // len(layer) for layer in self.setup.model.parameters())

    def _work(self) -> Work:
        """The least work: what the plans count; each input, weight and result once."""
        shape, model = self.shape, self.setup.model
        item = self.setup.dtype.itemsize
        patches = float(shape.windows * len(self.grid))
        features = patches * self.features * item
        pixels = float(shape.windows * math.prod(IMAGE_SIZE))
        head = sum(p.numel() for p in model.distortion_head.parameters())
        stages = {
            "local": Work(
                2.0 * shape.windows * self.plan.local.multiply_adds,
                3 * pixels * item + _bytes(model.local_net) + features,
            ),
            "global": Work(
                2.0
                * shape.windows
                * (self.plan.holes.multiply_adds + base_multiply_adds(model.global_net)),
                3 * pixels * item + _bytes(model.global_net) + features,
            ),
            "scores": Work(
                2.0 * patches * (head + self.features),
                2 * features + _bytes(model.distortion_head) + 4 * patches,
            ),
            # A mean by running sums, columns first, then rows.
            "aggregate": Work(
                2.0 * shape.windows * len(self.starts) * _SIDE + 2.0 * pixels,
                4 * (patches + pixels),
            ),
        }
        if shape.stage in stages:
            return stages[shape.stage]
        return Work(
            sum(work.flops for work in stages.values()),
            4.0 * self.images.numel() + _bytes(model) + 4 * pixels,
        )


_Expected = tuple[Callable[[], Tensor], Callable[[Tensor], Tensor] | None]


@torch.no_grad()
def _outputs(name: str, run: Callable[[], Tensor]) -> Outputs:
    return {name: run()}


def _of_pixels(images: list[int], where: list[Block], maps: Tensor) -> Tensor:
    """The known pixels ``(N, k)`` of maps."""
    return torch.cat([block.pixels_of(maps[images]) for block in where], 1)


def _of_patches(images: list[int], where: list[Block], features: Tensor) -> Tensor:
    """The known patches' features ``(N, k, n)``."""
    return torch.cat([block.patches_of(features[images]) for block in where], 1)


def _bytes(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
