"""Cases of ``aggregate_patch_scores``: every mode on a dense grid and on the paper's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from operator import itemgetter

import torch
import torch.nn.functional as F
from torch import Tensor

from glance_ext.bench.cases import Case, Outputs, Variant
from glance_ext.bench.limits import Work
from glance_ext.data.grid import patch_grid
from glance_ext.ops import aggregate_patch_scores, reference

_PARAMETERS = {"mean": 0.0, "gaussian": 0.25, "max": 0.0, "idw": 5.0}
# The reference gives every patch a weight at every pixel: 27 million weights a map on the paper's
# grid, 213 million on a stride of 4. Beyond this many products a call it checks but is not timed.
_REFERENCE_PRODUCTS = 1e9


@dataclass(frozen=True)
class Shape:
    """Maps of one size from one grid; ``grid`` is ``regular``, ``flush`` or ``paper``.

    ``regular`` and ``flush`` have a stride of 4. ``regular`` is the largest regular grid, whose map
    ends where its last patch ends; ``flush`` adds a row and a column of patches at the border, so
    that the whole image is covered; ``paper`` is the 20x20 patches of the paper.
    """

    maps: int
    patch: int
    image: int
    grid: str
    mode: str

    @property
    def name(self) -> str:
        """As in the results' case names."""
        grid = self.grid if self.grid == "paper" else f"stride4-{self.grid}"
        return f"{self.mode}_{grid}_{self.side}x{self.side}_n{self.maps}"

    @property
    def starts(self) -> list[int]:
        """First rows, which are first columns too."""
        if self.grid == "paper":
            return list(patch_grid("paper", self.patch, self.image).starts)
        if self.grid == "flush":
            return list(patch_grid(4, self.patch, self.image).starts)
        return list(range(0, self.image - self.patch + 1, 4))

    @property
    def side(self) -> int:
        """Height and width of the map."""
        return self.starts[-1] + self.patch if self.grid == "regular" else self.image


SHAPES = (
    Shape(16, 33, 256, "regular", "mean"),
    *(Shape(16, 33, 256, "flush", mode) for mode in _PARAMETERS),
    *(Shape(16, 33, 256, "paper", mode) for mode in _PARAMETERS),
)
QUICK_SHAPES = (
    Shape(2, 9, 44, "regular", "mean"),
    Shape(2, 9, 44, "flush", "max"),
    *(Shape(2, 9, 44, "paper", mode) for mode in _PARAMETERS),
)


def cases(dtype: torch.dtype, device: torch.device, seed: int, quick: bool) -> Iterator[Case]:
    """Forward, and forward + backward, of every shape."""
    for index, shape in enumerate(QUICK_SHAPES if quick else SHAPES):
        generator = torch.Generator().manual_seed(seed + index)
        inputs = _Inputs(shape, dtype, device, generator)
        yield inputs.case(backward=False)
        yield inputs.case(backward=True)


def fold_mean(scores: Tensor, patch: int, side: int, stride: int) -> Tensor:
    """The usual way: fold of the scores spread over their patches, by fold of ones.

    Args:
        scores: ``(N, gh, gw)``; sums are in float32 at the least, since in bfloat16 fold's are off
            by a tenth.
        patch: Side of a patch in pixels.
        side: Of the map in pixels.
        stride: In pixels.

    Returns:
        ``(N, side, side)``.
    """
    wide = scores if scores.dtype == torch.float64 else scores.float()
    columns = wide.flatten(1)[:, None].expand(-1, patch * patch, -1)
    total = F.fold(columns, (side, side), patch, stride=stride)
    count = F.fold(torch.ones_like(columns[:1]), (side, side), patch, stride=stride)
    return (total / count)[:, 0].to(scores.dtype)


class _Inputs:
    """One shape's tensors, its variants, and what they should give."""

    def __init__(
        self, shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> None:
        self.shape = shape
        starts = torch.tensor(shape.starts)
        per_side = len(starts)
        patches = per_side**2
        self.regular = shape.grid == "regular"
        self.origins = None if self.regular else torch.cartesian_prod(starts, starts)
        size = (per_side, per_side) if self.regular else (patches,)
        drawn = _scores(shape, patches, dtype, generator)
        self.scores = drawn.reshape(shape.maps, *size).to(device).requires_grad_()
        grad = torch.randn(shape.maps, shape.side, shape.side, generator=generator)
        self.grad_map = grad.to(device, dtype)
        # Checked against float64 in the first and the last map.
        self.items = sorted({0, shape.maps - 1})

    def case(self, *, backward: bool) -> Case:
        shape = self.shape
        direction = "forward_backward" if backward else "forward"
        patches = self.scores[0].numel()
        runs: dict[str, Callable[[], Tensor]] = {"ours": self._ours}
        if float(shape.maps) * patches * shape.side**2 <= _REFERENCE_PRODUCTS:
            runs = {"reference": partial(self._reference, self.scores)} | runs
        if shape.mode == "mean" and self.regular:
            runs["fold"] = self._fold
        expected = partial(self._expected, backward)
        variants = {
            name: Variant(partial(self._run, run, backward), expected, itemgetter(self.items))
            for name, run in runs.items()
        }
        if not backward:
            variants["copy"] = Variant(self._copy, self._copied)
        return Case(
            f"aggregate_patch_scores/{direction}/{shape.name}",
            {
                "scores": list(self.scores.shape),
                "map": list(self.grad_map.shape),
                "patch": shape.patch,
                "grid": f"stride 4, {shape.grid}" if shape.grid != "paper" else "paper",
                "mode": shape.mode,
                "gradients": ["scores"] if backward else [],
            },
            self._work(backward),
            variants,
            terms=self._terms(backward),
            yardstick="reference",
        )

    def _run(self, aggregate: Callable[[], Tensor], backward: bool) -> Outputs:
        if not backward:
            with torch.no_grad():
                return {"map": aggregate()}
        result = aggregate()
        (grad,) = torch.autograd.grad(result, self.scores, self.grad_map)
        return {"map": result, "grad_scores": grad}

    def _reference(self, scores: Tensor) -> Tensor:
        shape = self.shape
        return reference.aggregate_patch_scores(
            scores,
            self.origins,
            [shape.patch] * 2,
            [shape.side] * 2,
            [4, 4],
            shape.mode,
            _PARAMETERS[shape.mode],
        )

    def _ours(self) -> Tensor:
        shape = self.shape
        return aggregate_patch_scores(
            self.scores,
            shape.patch,
            shape.side,
            stride=4 if self.regular else None,
            origins=self.origins,
            mode=shape.mode,
        )

    def _fold(self) -> Tensor:
        return fold_mean(self.scores, self.shape.patch, self.shape.side, 4)

    def _copy(self) -> Outputs:
        """Copies as much as the maps, into new memory as the ops do."""
        return {"copy": self.grad_map.clone()}

    def _copied(self) -> Outputs:
        return {"copy": self.grad_map.double()}

    def _expected(self, backward: bool) -> Outputs:
        output, grad = self._in_float64
        return {"map": output, "grad_scores": grad} if backward else {"map": output}

    @cached_property
    def _in_float64(self) -> tuple[Tensor, Tensor]:
        chosen = self.items
        scores = self.scores[chosen].detach().double().requires_grad_()
        output = self._reference(scores)
        (grad,) = torch.autograd.grad(output, scores, self.grad_map[chosen].double())
        return output.detach(), grad

    def _terms(self, backward: bool) -> int:
        """Patches a pixel adds up, or pixels a patch's gradient does."""
        if self.shape.mode == "idw":
            return max(self.scores[0].numel(), self.grad_map[0].numel() if backward else 0)
        return self.shape.patch**2

    def _work(self, backward: bool) -> Work:
        """The least work: window modes are separable, idw is a product with a full matrix."""
        shape = self.shape
        per_side = len(shape.starts)
        pixels = float(shape.side**2)
        if shape.mode == "idw":
            flops = 2.0 * shape.maps * per_side**2 * pixels
        else:
            # Columns first, then rows; a mean or maximum by running values, a bell by its weights.
            overlap = 1.0 if shape.mode in ("mean", "max") else per_side * shape.patch / shape.side
            flops = 2.0 * shape.maps * overlap * (per_side * shape.side + pixels)
        item = self.scores.element_size()
        read_and_written = float(self.scores.numel() + self.grad_map.numel()) * item
        work = Work(flops, read_and_written)
        if not backward:
            return work
        again = self.scores.numel() * item if shape.mode == "max" else 0
        return work + Work(flops, read_and_written + again)


def _scores(shape: Shape, patches: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """``(N, P)`` random scores; for max no two of a map are equal, so that its winner is one patch.

    The paper's scores are squared distances and probabilities: not negative.
    """
    if shape.mode != "max" or dtype in (torch.float32, torch.float64):
        return torch.rand(shape.maps, patches, generator=generator).to(dtype)
    # Neighbouring numbers of the dtype, around 1, in random order.
    codes = torch.stack([torch.randperm(patches, generator=generator) for _ in range(shape.maps)])
    middle = int(torch.ones((), dtype=dtype).view(torch.int16))
    return (codes - patches // 2 + middle).to(torch.int16).view(dtype)
