"""``HoleFeatures``: what a network says of an image through each of many holes, computed shared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glance_ext.nn.hole_plan import HoleGeometry, HoleStep, LayerShape, plan_geometry
from glance_ext.nn.partial_conv import PartialConv2d
from glance_ext.nn.pooling import MaskedMaxPool2d
from glance_ext.ops import (
    HoleLayer,
    gather_holes,
    hole_conv2d,
    hole_max_pool2d,
    hole_sequence,
)

_KNOWN = "PartialConv2d, Conv2d, ReLU, LeakyReLU, MaxPool2d or MaskedMaxPool2d"
# Windows that are worked on together where each layer is a call of its own.
_CPU_BYTES, _GPU_BYTES = 32 << 20, 1 << 30
# So many are planned together in any case.
_FEW_HOLES = 256


@dataclass(frozen=True)
class _Layer:
    """A convolution or pooling, and the activation behind it."""

    module: nn.Module
    shape: LayerShape
    slope: float = 1.0  # of the activation that follows at once; 1 for none
    before: tuple[float, ...] = ()  # slopes of activations that stand alone in front

    @property
    def channels(self) -> tuple[int, int] | None:
        """In and out of a convolution; a pooling keeps what comes."""
        if isinstance(self.module, nn.Conv2d):
            return self.module.in_channels, self.module.out_channels
        return None


@dataclass(frozen=True)
class HolePlan:
    """The geometry of some holes, for any image of one size; see :meth:`HoleFeatures.plan`.

    Attributes:
        image_size: Height and width in pixels.
        hole_size: Height and width in pixels.
        origins: ``(P, 2)``, or ``(N, P, 2)`` where each image has holes of its own.
        chunks: The geometry of as many holes as are worked on together.
        multiply_adds: The least work of an image: all holes, without the base pass.
    """

    image_size: tuple[int, int]
    hole_size: tuple[int, int]
    origins: Tensor
    chunks: tuple[HoleGeometry, ...]
    multiply_adds: int

    @property
    def full_from(self) -> int:
        """The first convolution or pooling whose input has no missing cell, whatever the hole."""
        return max((chunk.full_from for chunk in self.chunks), default=0)


class HoleFeatures:
    """A network's output for an image with each of many rectangular holes in it.

    ``features[n, p]`` is ``layers(image n with hole p)``, equal to a pass of its own but for
    rounding. One pass without holes gives the base maps; for each hole and layer only the window
    that the hole reaches is computed, and the rest is read from the base. That is exact: cells that
    a hole does not reach have the same inputs with it as without.

    The pixels of a hole are missing for a :class:`PartialConv2d` and 0 for any other layer. So with
    plain layers these are the maps of an occlusion experiment, with partial convolutions Global-Net
    (Wang et al., CVPR 2021, section 3.3). Differentiable in the images and in the layers'
    parameters.

    Args:
        layers: Any sequence of PartialConv2d (single-channel masks), Conv2d, ReLU, LeakyReLU,
            MaxPool2d and MaskedMaxPool2d; nested ``nn.Sequential`` are taken apart. They are used,
            not copied: a later change of their weights counts.

    Raises:
        ValueError: A layer is of another kind, or has a setting that cannot be planned.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._layers: list[_Layer] = []
        self._after: tuple[float, ...] = ()  # activations behind the last layer that stand alone
        waiting: list[float] = []
        fusable = False
        for index, module in enumerate(_flattened(layers)):
            slope = _slope(module)
            if slope is None:
                shape = _shape(index, module)
                self._layers.append(_Layer(module, shape, before=tuple(waiting)))
                waiting, fusable = [], isinstance(module, nn.Conv2d)
            elif fusable:
                self._layers[-1] = replace(self._layers[-1], slope=slope)
                fusable = False
            else:
                waiting.append(slope)
        self._after = tuple(waiting)
        if not self._layers:
            raise ValueError("HoleFeatures: expected at least one convolution or pooling, got none")

    def plan(
        self,
        image_size: int | Sequence[int],
        hole_size: int | Sequence[int],
        origins: Tensor,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> HolePlan:
        """Works out the geometry of holes once, for every image of a size.

        Args:
            image_size: In pixels, one int or (height, width).
            hole_size: In pixels, one int or (height, width).
            origins: ``(P, 2)``, or ``(N, P, 2)`` for other holes in each of N images: row and
                column of each hole's first pixel; any integer dtype.
            device: Of the images to come.
            dtype: Of the images to come.

        Raises:
            ValueError: A hole lies outside of the image (the message names the first), or the image
                is too small for a layer.
        """
        image, hole = _pair(image_size), _pair(hole_size)
        _check_origins(origins, image, hole)
        origins = origins.cpu()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        shapes = [layer.shape for layer in self._layers]
        itemsize = torch.finfo(dtype).bits // 8
        budget = _CPU_BYTES if torch.device(device).type == "cpu" else _GPU_BYTES
        chunks: list[HoleGeometry] = []
        start, holes = 0, origins.shape[-2]
        # The size of a window is known once it is planned: the first hole's tells roughly, and of
        # few holes all are planned, which is most likely all that there is to do.
        few = origins.numel() <= 2 * _FEW_HOLES
        sample = plan_geometry(
            shapes, image, hole, origins if few else origins[..., :1, :].reshape(-1, 2), wide
        )
        per_hole = self._window_bytes(sample, itemsize) * (
            origins.shape[0] if origins.dim() == 3 else 1
        )
        if few and per_hole * holes <= budget:
            chunks.append(_moved(sample, torch.device(device)))
            start = holes
        at_once = max(1, budget // max(1, per_hole))
        while start < holes or not chunks:
            part = origins[..., start : start + at_once, :]
            geometry = plan_geometry(shapes, image, hole, part, wide)
            chunks.append(_moved(geometry, torch.device(device)))
            start += at_once
        work = sum(
            step.multiply_adds * layer.channels[0] * layer.channels[1] // _groups(layer.module)
            for chunk in chunks
            for step, layer in zip(chunk.steps, self._layers, strict=True)
            if layer.channels is not None
        )
        return HolePlan(image, hole, origins, tuple(chunks), work)

    def __call__(self, images: Tensor, plan: HolePlan) -> Tensor:
        """Describes every image through every hole.

        Args:
            images: ``(N, C, H, W)``, of the plan's size.
            plan: From :meth:`plan`, for the images' device.

        Returns:
            ``(N, P, K, h, w)``: the network's output for each image and hole.

        Raises:
            ValueError: The images have another size than the plan, or another number.
        """
        if tuple(images.shape[-2:]) != plan.image_size:
            raise ValueError(
                f"HoleFeatures: expected images of {plan.image_size[0]}x{plan.image_size[1]} "
                f"pixels like the plan, got {images.shape[-2]}x{images.shape[-1]}"
            )
        own_holes = plan.origins.dim() == 3
        if own_holes and plan.origins.shape[0] != images.shape[0]:
            raise ValueError(
                f"HoleFeatures: expected {plan.origins.shape[0]} images like the plan, got "
                f"{images.shape[0]}"
            )
        bases = self._base_pass(images)
        at_once = max(1, images.shape[0])
        if not own_holes:
            per_image = sum(
                self._window_bytes(chunk, images.element_size()) * chunk.extents.shape[-2]
                for chunk in plan.chunks[:1]
            )
            budget = _CPU_BYTES if images.device.type == "cpu" else _GPU_BYTES
            at_once = max(1, min(at_once, budget // max(1, per_image)))
        if at_once >= images.shape[0]:  # a slice of all would make contiguous gradients
            parts = [self._through_holes(bases, chunk) for chunk in plan.chunks]
            return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        rows = []
        for start in range(0, images.shape[0], at_once):
            some = [base[start : start + at_once] for base in bases]
            parts = [self._through_holes(some, chunk) for chunk in plan.chunks]
            rows.append(parts[0] if len(parts) == 1 else torch.cat(parts, 1))
        return torch.cat(rows)

    def base_pass(self, images: Tensor) -> Tensor:
        """The network's output without holes, ``(N, K, h, w)``."""
        return self._base_pass(images)[-1]

    def _base_pass(self, images: Tensor) -> list[Tensor]:
        """The input of each layer without holes, and the output."""
        x = images.contiguous(memory_format=torch.channels_last)
        bases = []
        for layer in self._layers:
            for slope in layer.before:
                x = _activated(x, slope)
            bases.append(x)
            x = _run(layer.module, x)
            if isinstance(layer.module, nn.Conv2d):  # nobody else holds its output
                x = _activated(x, layer.slope, inplace=True)
            x = x.contiguous(memory_format=torch.channels_last)
        for slope in self._after:
            x = _activated(x, slope)
        return [*bases, x]

    def _through_holes(self, bases: Sequence[Tensor], geometry: HoleGeometry) -> Tensor:
        windows: Tensor | None = None
        if self._in_one_call(bases):
            steps = zip(self._layers, geometry.steps, bases[:-1], strict=True)
            windows = hole_sequence([_hole_layer(*step) for step in steps])
        else:
            for layer, step, base in zip(self._layers, geometry.steps, bases[:-1], strict=True):
                if windows is not None:
                    for slope in layer.before:
                        windows = _activated(windows, slope)
                windows = _step(layer, step, base, windows)
        assert windows is not None
        for slope in self._after:
            windows = _activated(windows, slope)
        if geometry.reaches_all:
            return windows
        return gather_holes(
            bases[-1],
            windows,
            geometry.extents,
            torch.zeros_like(geometry.extents[..., :2]),
            geometry.output_size,
        )

    def _in_one_call(self, bases: Sequence[Tensor]) -> bool:
        """Whether ``hole_sequence`` can do it: no gradient is wanted and every layer is an op's."""
        if any(layer.before for layer in self._layers[1:]):
            return False
        if any(_groups(layer.module) > 1 for layer in self._layers):
            return False
        if not torch.is_grad_enabled():
            return True
        parameters = (p for layer in self._layers for p in layer.module.parameters())
        return not any(tensor.requires_grad for tensor in (*bases, *parameters))

    def _window_bytes(self, geometry: HoleGeometry, itemsize: int) -> int:
        """The most memory that one hole's windows take at any layer."""
        most, channels = 0, 3
        for layer, step in zip(self._layers, geometry.steps, strict=True):
            channels = layer.channels[1] if layer.channels is not None else channels
            most = max(most, step.size[0] * step.size[1] * channels * itemsize)
        return most


def _flattened(layers: Iterable[nn.Module]) -> Iterable[nn.Module]:
    for layer in layers:
        if isinstance(layer, nn.Sequential):
            yield from _flattened(layer)
        else:
            yield layer


def _slope(module: nn.Module) -> float | None:
    """The slope of an activation below 0; None for other layers."""
    if isinstance(module, nn.ReLU):
        return 0.0
    if isinstance(module, nn.LeakyReLU) and module.negative_slope >= 0:
        return float(module.negative_slope)
    return None


def _activated(x: Tensor, slope: float, *, inplace: bool = False) -> Tensor:
    if slope == 1:
        return x
    if slope == 0:  # not LeakyReLU's, which makes NaN of -infinity
        return F.relu(x, inplace)
    return F.leaky_relu(x, slope, inplace)


def _shape(index: int, module: nn.Module) -> LayerShape:
    name = f"layer {index} ({type(module).__name__})"
    if isinstance(module, nn.Conv2d):
        partial = isinstance(module, PartialConv2d)
        if module.padding_mode != "zeros":
            _cannot_plan(name, "padding_mode='zeros'", f"{module.padding_mode!r}")
        if partial and module.multi_channel:
            _cannot_plan(name, "multi_channel=False", "True")
        if partial and module.soft_mask:
            _cannot_plan(name, "soft_mask=False", "True")
        padding: tuple[int, ...] = (0, 0)
        if isinstance(module.padding, str):
            before_after = module._reversed_padding_repeated_twice
            if before_after[0] != before_after[1] or before_after[2] != before_after[3]:
                _cannot_plan(name, "as much padding on either side", f"{before_after}")
            padding = (before_after[2], before_after[0])
        else:
            padding = tuple(module.padding)
        return LayerShape(
            name,
            _pair(module.kernel_size),
            _pair(module.stride),
            _pair(padding),
            _pair(module.dilation),
            False,
            partial,
            partial,
        )
    if isinstance(module, (nn.MaxPool2d, MaskedMaxPool2d)):
        if isinstance(module, nn.MaxPool2d) and module.return_indices:
            _cannot_plan(name, "return_indices=False", "True")
        return LayerShape(
            name,
            _pair(module.kernel_size),
            _pair(module.stride),
            _pair(module.padding),
            _pair(module.dilation),
            module.ceil_mode,
            False,
            True,
        )
    raise ValueError(f"HoleFeatures: expected {_KNOWN}, got {name}")


def _cannot_plan(name: str, expected: str, got: str) -> None:
    raise ValueError(f"HoleFeatures: expected {name} to have {expected}, got {got}")


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    height, width = value
    return int(height), int(width)


def _groups(module: nn.Module) -> int:
    return module.groups if isinstance(module, nn.Conv2d) else 1


def _check_origins(origins: Tensor, image: tuple[int, int], hole: tuple[int, int]) -> None:
    if origins.dim() not in (2, 3) or origins.shape[-1] != 2 or origins.is_floating_point():
        raise ValueError(
            "HoleFeatures: expected integer origins of shape (P, 2) or (N, P, 2), got "
            f"{origins.dtype} of {list(origins.shape)}"
        )
    if min(hole) < 1:
        raise ValueError(f"HoleFeatures: expected holes of at least one pixel, got {hole}")
    flat = origins.reshape(-1, 2).cpu().long()
    last = torch.tensor(image) - torch.tensor(hole)
    bad = ((flat < 0) | (flat > last)).any(1).nonzero()
    if bad.numel():
        index = int(bad[0])
        raise ValueError(
            f"HoleFeatures: expected every hole inside the {image[0]}x{image[1]} image, got hole "
            f"{index} of {hole[0]}x{hole[1]} at row {int(flat[index, 0])}, column "
            f"{int(flat[index, 1])}"
        )


def _moved(geometry: HoleGeometry, device: torch.device) -> HoleGeometry:
    steps = tuple(
        replace(
            step,
            extents=step.extents.to(device),
            origins=step.origins.to(device),
            ratio=step.ratio.to(device),
            cells=step.cells.to(device),
        )
        for step in geometry.steps
    )
    return replace(geometry, steps=steps, extents=geometry.extents.to(device))


def _run(module: nn.Module, x: Tensor) -> Tensor:
    """A layer without holes."""
    if isinstance(module, PartialConv2d) and _shape(0, module).padding != (0, 0):
        result = module(x)  # what is in the padding is missing
        return result[0] if module.return_mask else result
    if isinstance(module, nn.Conv2d):
        weight, bias = _parameters(module, x.dtype)
        return module._conv_forward(x, weight, bias)
    assert isinstance(module, (nn.MaxPool2d, MaskedMaxPool2d))
    kernel, stride, padding, dilation = (
        _pair(value)
        for value in (module.kernel_size, module.stride, module.padding, module.dilation)
    )
    return F.max_pool2d(x, kernel, stride, padding, dilation, module.ceil_mode)


def _parameters(module: nn.Module, dtype: torch.dtype) -> tuple[Any, Tensor | None]:
    """A convolution's weight and bias; a pooling has neither."""
    if not isinstance(module, nn.Conv2d):
        return None, None
    return module.weight.to(dtype), None if module.bias is None else module.bias.to(dtype)


def _hole_layer(layer: _Layer, step: HoleStep, base: Tensor) -> HoleLayer:
    """One layer as ``hole_sequence`` takes it."""
    shape = layer.shape
    return HoleLayer(
        base,
        step.extents,
        step.origins,
        step.cells,
        step.ratio,
        *_parameters(layer.module, base.dtype),
        shape.kernel,
        shape.stride,
        shape.padding,
        shape.dilation,
        layer.slope,
    )


def _step(layer: _Layer, step: HoleStep, base: Tensor, windows: Tensor | None) -> Tensor:
    """One layer seen through the holes."""
    shape = layer.shape
    seen = (base, windows, step.extents, step.origins)
    weight, bias = _parameters(layer.module, base.dtype)
    if weight is None:
        return hole_max_pool2d(
            *seen, shape.kernel, shape.stride, step.size, shape.padding, shape.dilation
        )
    groups = _groups(layer.module)
    if groups == 1:
        geometry = (shape.stride, shape.padding, shape.dilation)
        return hole_conv2d(*seen, step.cells, step.ratio, weight, bias, *geometry, layer.slope)
    tiles = _tiles(layer, step, base, windows)
    x = F.conv2d(
        tiles.flatten(0, 1), weight, None, shape.stride, 0, shape.dilation, groups
    ).unflatten(0, tiles.shape[:2])
    scale = step.ratio.unsqueeze(-3).to(base.dtype)
    x = x * scale
    if bias is not None:
        x = x + bias[:, None, None]
    return torch.where(scale != 0, _activated(x, layer.slope), 0)


def _tiles(layer: _Layer, step: HoleStep, base: Tensor, windows: Tensor | None) -> Tensor:
    """The part of the input that each hole's next window depends on ``(N, P, C, th, tw)``."""
    shape = layer.shape
    size = [
        (step.size[i] - 1) * shape.stride[i] + shape.dilation[i] * (shape.kernel[i] - 1) + 1
        for i in range(2)
    ]
    # by numbers, not by tensors of them: a copy to a GPU could not be part of a CUDA graph
    origins = torch.stack(
        [step.origins[..., i] * shape.stride[i] - shape.padding[i] for i in range(2)], -1
    )
    return gather_holes(base, windows, step.extents, origins, size)
