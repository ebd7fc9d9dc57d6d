"""One or more calls of every op, for the contract test (test_contract.py) to try everything on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """A call of one op.

    Attributes:
        op: The op's name in ``torch.ops.glance_ext``.
        name: What is special about this call.
        make: Gives the op's arguments for a device, a dtype, a seed and a batch size.
        differentiable: Positions of the arguments that have a gradient; none for a backward op.
        batched: Positions of the arguments whose first dimension is the batch.
        lowered: Positions of the arguments that autocast casts; none if it leaves the op alone.
        summed_by_torch: Positions of the results that torch's convolution adds up in an order that
            depends on the number of threads.
        pack: Makes the op's arguments of ours, where it takes lists of tensors.
    """

    op: str
    name: str
    make: Callable[[str, torch.dtype, int, int], list[Any]]
    differentiable: tuple[int, ...] = ()
    batched: tuple[int, ...] = ()
    lowered: tuple[int, ...] = ()
    summed_by_torch: tuple[int, ...] = ()
    pack: Callable[[list[Any]], list[Any]] = list

    def __str__(self) -> str:
        return f"{self.op}-{self.name}".replace(" ", "_")

    def arguments(
        self, device: str, dtype: torch.dtype = torch.float64, seed: int = 0, batch: int = 2
    ) -> list[Any]:
        return self.make(device, dtype, seed, batch)

    def overload(self) -> Any:
        return getattr(torch.ops.glance_ext, self.op).default

    def call(self, arguments: list[Any]) -> tuple[Tensor, ...]:
        """The op's results, as a tuple even where there is one."""
        result = self.overload()(*self.pack(arguments))
        return result if isinstance(result, tuple) else (result,)


def _partial_conv(
    mask_form: str, *, channels: int = 4, out: int = 6, groups: int = 1, **geometry: list[int]
) -> Callable[[str, torch.dtype, int, int], list[Any]]:
    def make(device: str, dtype: torch.dtype, seed: int, batch: int) -> list[Any]:
        random = torch.Generator().manual_seed(seed)
        height, width = 6, 5
        shape, mask_dtype = {
            "image": ((height, width), torch.uint8),
            "images": ((batch, height, width), torch.bool),
            "channels": ((batch, channels, height, width), dtype),
            "one of channels": ((1, channels, height, width), torch.bool),
        }[mask_form]
        mask = torch.rand(shape, generator=random) > 0.4
        mask[..., :4, :3] = False  # a window of 3x3 with nothing in it
        tensors = [
            torch.randn(batch, channels, height, width, generator=random, dtype=torch.float64),
            mask,
            torch.randn(out, channels // groups, 3, 3, generator=random, dtype=torch.float64),
            torch.randn(out, generator=random, dtype=torch.float64),
        ]
        dtypes = [dtype, mask_dtype, dtype, dtype]
        return [
            *(t.to(device, d) for t, d in zip(tensors, dtypes, strict=True)),
            geometry.get("stride", [1, 1]),
            geometry.get("padding", [0, 0]),
            geometry.get("dilation", [1, 1]),
            groups,
        ]

    return make


def _without(
    position: int, make: Callable[[str, torch.dtype, int, int], list[Any]]
) -> Callable[[str, torch.dtype, int, int], list[Any]]:
    def changed(*key: Any) -> list[Any]:
        arguments = make(*key)
        arguments[position] = None
        return arguments

    return changed


def _partial_conv_backward(
    make: Callable[[str, torch.dtype, int, int], list[Any]], output_mask: list[bool]
) -> Callable[[str, torch.dtype, int, int], list[Any]]:
    def changed(device: str, dtype: torch.dtype, seed: int, batch: int) -> list[Any]:
        input, mask, weight, _, *geometry = make(device, dtype, seed, batch)
        output = torch.ops.glance_ext.partial_conv2d(input, mask, weight, None, *geometry)[0]
        random = torch.Generator().manual_seed(seed + 1000)
        grad = torch.randn(output.shape, generator=random, dtype=torch.float64)
        return [grad.to(device, dtype), input, mask, weight, *geometry, output_mask]

    return changed


PATCH, STRIDE, GRID, IMAGE = (4, 3), (2, 2), (5, 5), (12, 11)
PARAMETER = {"mean": 0.0, "gaussian": 0.25, "max": 0.0, "idw": 3.0}


def _patch_scores(
    mode: str, origins_dtype: torch.dtype | None = None
) -> Callable[[str, torch.dtype, int, int], list[Any]]:
    def make(device: str, dtype: torch.dtype, seed: int, batch: int) -> list[Any]:
        random = torch.Generator().manual_seed(seed)
        scores = torch.randn(batch, *GRID, generator=random, dtype=torch.float64)
        origins = None
        if origins_dtype is not None:
            rows, columns = (torch.arange(n) * s for n, s in zip(GRID, STRIDE, strict=True))
            order = torch.randperm(GRID[0] * GRID[1], generator=random)
            origins = torch.cartesian_prod(rows, columns)[order].to(device, origins_dtype)
            scores = scores.flatten(1)
        return [
            scores.to(device, dtype),
            origins,
            list(PATCH),
            list(IMAGE),
            list(STRIDE),
            mode,
            PARAMETER[mode],
        ]

    return make


def _patch_scores_backward(
    make: Callable[[str, torch.dtype, int, int], list[Any]],
) -> Callable[[str, torch.dtype, int, int], list[Any]]:
    def changed(device: str, dtype: torch.dtype, seed: int, batch: int) -> list[Any]:
        scores, origins, patch, image, *rest = make(device, dtype, seed, batch)
        random = torch.Generator().manual_seed(seed + 1000)
        grad = torch.randn(batch, *image, generator=random, dtype=torch.float64)
        return [grad.to(device, dtype), scores, origins, patch, *rest]

    return changed


def _holes(
    *, own: bool = False, with_windows: bool = True, seed: int = 0, batch: int = 2
) -> dict[str, Tensor | None]:
    """Three holes in maps of 9x8: at a corner, inside, and at the far corner, whose next windows
    overlap, stand over the map's end, and have cells that are not computed."""
    random = torch.Generator().manual_seed(seed)

    def each(rows: Tensor) -> Tensor:
        return rows.expand(batch, *rows.shape).contiguous() if own else rows

    extents = torch.tensor([[0, 0, 3, 2], [2, 3, 4, 3], [6, 4, 3, 4]], dtype=torch.int32)
    origins = torch.tensor([[0, 0], [1, 2], [3, 2]], dtype=torch.int32)
    ratio = each(torch.rand(3, 4, 3, generator=random, dtype=torch.float64) + 0.5)
    ratio = torch.where(torch.rand(ratio.shape, generator=random) < 0.7, ratio, 0)
    windows = torch.randn(batch, 3, 4, 4, 4, generator=random, dtype=torch.float64)
    return {
        "base": torch.randn(batch, 4, 9, 8, generator=random, dtype=torch.float64),
        "windows": windows if with_windows else None,
        "extents": each(extents),
        "origins": each(origins),
        "ratio": ratio,
        "cells": ratio.flatten().nonzero().flatten().to(torch.int32),
        "weight": torch.randn(5, 4, 3, 2, generator=random, dtype=torch.float64),
        "bias": torch.randn(5, generator=random, dtype=torch.float64),
    }


_HOLE_GEOMETRY = ([2, 1], [1, 1], [1, 2])


def _moved_holes(
    holes: dict[str, Tensor | None], names: str, device: str, dtype: torch.dtype
) -> list[Any]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    moved: list[Any] = []
    for name in names.split():
        tensor = holes[name]
        if tensor is not None:
            target = wide if name == "ratio" else dtype
            tensor = tensor.to(device, target if tensor.is_floating_point() else tensor.dtype)
        moved.append(tensor)
    return moved


def _gather_holes(
    **form: bool,
) -> Callable[[str, torch.dtype, int, int], list[Any]]:
    def make(device: str, dtype: torch.dtype, seed: int, batch: int) -> list[Any]:
        holes = _holes(seed=seed, batch=batch, **form)
        assert holes["origins"] is not None
        holes["origins"] = holes["origins"] * 3 - 2  # also outside of the map
        moved = _moved_holes(holes, "base windows extents origins", device, dtype)
        return [*moved, [5, 4], -1.5]

    return make


def _gather_holes_backward(
    make: Callable[[str, torch.dtype, int, int], list[Any]],
) -> Callable[[str, torch.dtype, int, int], list[Any]]:
    def changed(device: str, dtype: torch.dtype, seed: int, batch: int) -> list[Any]:
        base, windows, extents, origins, tile, _ = make(device, dtype, seed, batch)
        random = torch.Generator().manual_seed(seed + 1000)
        grad = torch.randn(batch, 3, 4, *tile, generator=random, dtype=torch.float64)
        return [grad.to(device, dtype), base, windows, extents, origins, [True, True]]

    return changed


def _hole_max_pool(**form: bool) -> Callable[[str, torch.dtype, int, int], list[Any]]:
    def make(device: str, dtype: torch.dtype, seed: int, batch: int) -> list[Any]:
        holes = _holes(seed=seed, batch=batch, **form)
        moved = _moved_holes(holes, "base windows extents origins", device, dtype)
        return [*moved, [3, 2], [2, 1], [1, 1], [1, 2], [2, 3]]

    return make


def _hole_max_pool_backward(
    make: Callable[[str, torch.dtype, int, int], list[Any]],
) -> Callable[[str, torch.dtype, int, int], list[Any]]:
    def changed(device: str, dtype: torch.dtype, seed: int, batch: int) -> list[Any]:
        base, windows, extents, origins, *settings, size = make(device, dtype, seed, batch)
        random = torch.Generator().manual_seed(seed + 1000)
        grad = torch.randn(
            batch, extents.shape[-2], base.shape[1], *size, generator=random, dtype=torch.float64
        )
        return [grad.to(device, dtype), base, windows, extents, origins, *settings, [True, True]]

    return changed


def _hole_conv(
    slope: float = 0.1, **form: bool
) -> Callable[[str, torch.dtype, int, int], list[Any]]:
    def make(device: str, dtype: torch.dtype, seed: int, batch: int) -> list[Any]:
        holes = _holes(seed=seed, batch=batch, **form)
        names = "base windows extents origins cells ratio weight bias"
        return [*_moved_holes(holes, names, device, dtype), *_HOLE_GEOMETRY, slope]

    return make


def _hole_conv_backward(
    make: Callable[[str, torch.dtype, int, int], list[Any]], output_mask: list[bool]
) -> Callable[[str, torch.dtype, int, int], list[Any]]:
    def changed(device: str, dtype: torch.dtype, seed: int, batch: int) -> list[Any]:
        base, windows, extents, origins, cells, ratio, weight, bias, *rest = make(
            device, dtype, seed, batch
        )
        output = torch.ops.glance_ext.hole_conv2d(
            base, windows, extents, origins, cells, ratio, weight, bias, *rest
        )
        random = torch.Generator().manual_seed(seed + 1000)
        grad = torch.randn(output.shape, generator=random, dtype=torch.float64).to(device, dtype)
        return [grad, output, base, windows, extents, origins, ratio, weight, *rest, output_mask]

    return changed


_IMAGE_MASK = _partial_conv("image", padding=[1, 1])
_IMAGES_MASK = _partial_conv("images", stride=[2, 1], padding=[1, 0])
_CHANNELS_MASK = _partial_conv("channels", groups=2, padding=[1, 2], dilation=[1, 2])
_SHARED_CHANNELS_MASK = _without(3, _partial_conv("one of channels"))
_CONV = {"differentiable": (0, 2, 3), "lowered": (0, 2, 3)}
_CONV_WITHOUT_BIAS = {"differentiable": (0, 2), "lowered": (0, 2)}

CASES = [
    Case("partial_conv2d", "one mask", _IMAGE_MASK, batched=(0,), **_CONV),
    Case("partial_conv2d", "masks strided", _IMAGES_MASK, batched=(0, 1), **_CONV),
    Case("partial_conv2d", "channel masks groups", _CHANNELS_MASK, batched=(0, 1), **_CONV),
    Case(
        "partial_conv2d",
        "one channel mask no bias",
        _SHARED_CHANNELS_MASK,
        batched=(0,),
        **_CONV_WITHOUT_BIAS,
    ),
    Case(
        "partial_conv2d_backward",
        "one mask",
        _partial_conv_backward(_IMAGE_MASK, [True, True, True]),
        batched=(0, 1),
        summed_by_torch=(1,),
    ),
    Case(
        "partial_conv2d_backward",
        "channel masks groups",
        _partial_conv_backward(_CHANNELS_MASK, [True, True, True]),
        batched=(0, 1, 2),
        summed_by_torch=(1,),
    ),
    Case(
        "partial_conv2d_backward",
        "input only",
        _partial_conv_backward(_IMAGES_MASK, [True, False, False]),
        batched=(0, 1, 2),
    ),
]
for _mode in PARAMETER:
    for _name, _dtype in {"grid": None, "origins": torch.int64}.items():
        _make = _patch_scores(_mode, _dtype)
        CASES += [
            Case("aggregate_patch_scores", f"{_mode} {_name}", _make, (0,), batched=(0,)),
            Case(
                "aggregate_patch_scores_backward",
                f"{_mode} {_name}",
                _patch_scores_backward(_make),
                batched=(0, 1),
            ),
        ]
CASES.append(
    Case(
        "aggregate_patch_scores",
        "mean int32 origins",
        _patch_scores("mean", torch.int32),
        (0,),
        batched=(0,),
    )
)

_SHARED_HOLES = {"with_windows": False}
_OWN_HOLES = {"own": True}
CASES += [
    Case("gather_holes", "holes", _gather_holes(**_SHARED_HOLES), (0,), batched=(0,)),
    Case("gather_holes", "windows", _gather_holes(), (0, 1), batched=(0, 1)),
    Case("gather_holes", "own", _gather_holes(**_OWN_HOLES), (0, 1), batched=(0, 1, 2, 3)),
    Case(
        "gather_holes_backward",
        "holes",
        _gather_holes_backward(_gather_holes(**_SHARED_HOLES)),
        batched=(0, 1),
    ),
    Case(
        "gather_holes_backward",
        "windows",
        _gather_holes_backward(_gather_holes()),
        batched=(0, 1, 2),
    ),
    Case("hole_max_pool2d", "holes", _hole_max_pool(**_SHARED_HOLES), (0,), batched=(0,)),
    Case("hole_max_pool2d", "windows", _hole_max_pool(), (0, 1), batched=(0, 1)),
    Case("hole_max_pool2d", "own", _hole_max_pool(**_OWN_HOLES), (0, 1), batched=(0, 1, 2, 3)),
    Case(
        "hole_max_pool2d_backward",
        "windows",
        _hole_max_pool_backward(_hole_max_pool()),
        batched=(0, 1, 2),
    ),
    Case("hole_conv2d", "holes", _hole_conv(**_SHARED_HOLES), (0, 6, 7), batched=(0,)),
    Case("hole_conv2d", "windows relu", _hole_conv(0.0), (0, 1, 6, 7), batched=(0, 1)),
    Case(
        "hole_conv2d",
        "windows no activation no bias",
        _without(7, _hole_conv(1.0)),
        (0, 1, 6),
        batched=(0, 1),
    ),
    Case(
        "hole_conv2d_backward",
        "windows",
        _hole_conv_backward(_hole_conv(), [True] * 4),
        batched=(0, 1, 2, 3),
        summed_by_torch=(2,),
    ),
    Case(
        "hole_conv2d_backward",
        "holes base only",
        _hole_conv_backward(_hole_conv(**_SHARED_HOLES), [True, False, False, False]),
        batched=(0, 1, 2),
    ),
]


def _hole_sequence(device: str, dtype: torch.dtype, seed: int, batch: int) -> list[Any]:
    """A convolution, a pooling and a convolution: for each its six tensors and its bias."""
    random = torch.Generator().manual_seed(seed + 1)
    layers = [_holes(with_windows=i > 0, seed=i, batch=batch) for i in range(3)]
    extents = torch.tensor([[0, 0, 3, 3], [2, 3, 4, 3], [6, 4, 3, 2]], dtype=torch.int32)
    for layer, channels in zip(layers, (4, 5, 5), strict=True):
        layer["base"] = torch.randn(batch, channels, 9, 8, generator=random, dtype=torch.float64)
        if channels == 5:
            layer["extents"] = extents
    layers[2]["weight"] = torch.randn(6, 5, 3, 2, generator=random, dtype=torch.float64)
    layers[2]["bias"] = None
    names = "base extents origins cells ratio weight bias"
    return [value for layer in layers for value in _moved_holes(layer, names, device, dtype)]


def _packed_sequence(arguments: list[Any]) -> list[Any]:
    layers = [list(arguments[i : i + 7]) for i in range(0, 21, 7)]
    layers[1][5:] = [None, None]  # the pooling
    conv, pool = [3, 2, *(n for pair in _HOLE_GEOMETRY for n in pair)], [3, 2, 1, 1, 0, 0, 1, 2]
    return [*map(list, zip(*layers, strict=True)), [*conv, *pool, *conv], [0.0, 1.0, 0.1]]


CASES.append(
    Case(
        "hole_sequence",
        "convolution pooling convolution",
        _hole_sequence,
        batched=(0, 7, 14),
        pack=_packed_sequence,
    )
)


def _winograd_conv(
    height: int, width: int, channels: int, out: int, kernel: tuple[int, int]
) -> Callable[[str, torch.dtype, int, int], list[Any]]:
    def make(device: str, dtype: torch.dtype, seed: int, batch: int) -> list[Any]:
        random = torch.Generator().manual_seed(seed)

        def values(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float64)

        image, weight = values(batch, channels, height, width), values(out, channels, *kernel)
        return [tensor.to(device, dtype) for tensor in (image, weight, values(out))]

    return make


CASES += [
    Case("winograd_conv2d", "in tiles", _winograd_conv(21, 18, 20, 24, (5, 5)), batched=(0,)),
    Case("winograd_conv2d", "the sum", _winograd_conv(6, 7, 3, 4, (3, 2)), batched=(0,)),
    Case(
        "winograd_conv2d",
        "no bias",
        _without(2, _winograd_conv(21, 18, 20, 24, (5, 5))),
        batched=(0,),
    ),
]
