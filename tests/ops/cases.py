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
    """

    op: str
    name: str
    make: Callable[[str, torch.dtype, int, int], list[Any]]
    differentiable: tuple[int, ...] = ()
    batched: tuple[int, ...] = ()
    lowered: tuple[int, ...] = ()
    summed_by_torch: tuple[int, ...] = ()

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
        result = self.overload()(*arguments)
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


def _without_bias(
    make: Callable[[str, torch.dtype, int, int], list[Any]],
) -> Callable[[str, torch.dtype, int, int], list[Any]]:
    def changed(*key: Any) -> list[Any]:
        arguments = make(*key)
        arguments[3] = None
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


_IMAGE_MASK = _partial_conv("image", padding=[1, 1])
_IMAGES_MASK = _partial_conv("images", stride=[2, 1], padding=[1, 0])
_CHANNELS_MASK = _partial_conv("channels", groups=2, padding=[1, 2], dilation=[1, 2])
_SHARED_CHANNELS_MASK = _without_bias(_partial_conv("one of channels"))
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
