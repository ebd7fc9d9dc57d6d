"""The convolutions of whole networks as cases of ``partial_conv2d``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from glance_ext.bench import partial_conv
from glance_ext.bench.cases import Case
from glance_ext.bench.partial_conv import Shape


def inpainting_unet(side: int) -> tuple[Shape, ...]:
    """The U-Net of Liu et al. (ECCV 2018, appendix) on one image with a square hole.

    The hole covers a quarter of the image; further down it is what the layers before have left of
    it. The decoder sees a map twice as large as the one below, beside the encoder's.
    """
    where = f"unet{side}"
    shapes = []
    at, hole, channels = side, side // 2, 3
    skips = []
    for level, (out, kernel) in enumerate(((64, 7), (128, 5), (256, 5), (512, 3), (512, 3))):
        skips.append((at, hole, channels))
        shapes.append(
            Shape(
                1,
                channels,
                at,
                out,
                kernel,
                2,
                kernel // 2,
                hole,
                input_grad=level > 0,
                where=where,
            )
        )
        at, channels = at // 2, out
        hole = max(0, (hole - kernel) // 2 + 1)
    for at, hole, skip in reversed(skips):
        out = max(skip, 3)
        shapes.append(Shape(1, channels + skip, at, out, 3, 1, 1, hole, where=where))
        channels = out
    return tuple(shapes)


# The 3x3 and 7x7 convolutions, which are the padded ones: the mask is all ones, and partial
# convolution makes up for the padding (Liu et al., 2018, "Partial convolution based padding").
RESNET50 = tuple(
    Shape(4, c, side, k, kernel, stride, kernel // 2, input_grad=c > 3, where="resnet50-padding")
    for c, k, side, kernel, stride in (
        (3, 64, 224, 7, 2),
        (64, 64, 56, 3, 1),
        (128, 128, 56, 3, 2),
        (128, 128, 28, 3, 1),
        (256, 256, 28, 3, 2),
        (256, 256, 14, 3, 1),
        (512, 512, 14, 3, 2),
        (512, 512, 7, 3, 1),
    )
)
# At batch 16, with the hole that a masked patch leaves at each depth.
GLOBAL_NET = tuple(
    Shape(16, c, side, k, kernel, stride, 0, hole, last, input_grad=c > 3, where="global-net")
    for c, k, side, kernel, stride, hole in (
        (3, 16, 256, 7, 2, 33),
        (16, 32, 62, 3, 2, 6),
        (32, 64, 15, 3, 1, 0),
        (64, 64, 13, 3, 1, 0),
        (64, 128, 6, 3, 1, 0),
        (128, 128, 5, 3, 1, 0),
    )
    for last in (False, True)
)
# Groups of few channels, as in MobileNet (one each) and ResNeXt, with a hole of a quarter.
GROUPED = tuple(
    Shape(4, c, side, c, 3, 1, 1, side // 2, last, groups=groups, where="grouped")
    for c, side, groups in ((32, 112, 32), (192, 28, 192), (128, 56, 32), (256, 28, 8))
    for last in ((False, True) if groups == c else (False,))
)
SHAPES = inpainting_unet(256) + inpainting_unet(512) + GLOBAL_NET + RESNET50 + GROUPED
QUICK_SHAPES = (
    Shape(1, 3, 24, 8, 7, 2, 3, 12, input_grad=False, where="unet24"),
    Shape(2, 4, 9, 6, 3, 1, 1, where="resnet-padding"),
    Shape(2, 4, 9, 4, 3, 1, 1, 4, groups=2, where="grouped"),
)


def cases(dtype: torch.dtype, device: torch.device, seed: int, quick: bool) -> Iterator[Case]:
    """Forward, and forward + backward, of every layer.

    On CUDA, whose fused kernel is for channels_last, every layer stands there in both layouts.
    """
    shapes = QUICK_SHAPES if quick else SHAPES
    if device.type == "cuda":
        both = (replace(shape, channels_last=last) for shape in shapes for last in (False, True))
        shapes = tuple(dict.fromkeys(both))
    yield from partial_conv.cases(dtype, device, seed, quick, shapes)
