"""Cases of ``partial_conv2d``: Global-Net's layers and shapes as inpainting networks have them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from glance_ext import _library
from glance_ext.bench.cases import Case, Outputs, Variant
from glance_ext.bench.limits import Work
from glance_ext.ops import partial_conv2d, reference
from glance_ext.testing import partial_conv_path

# Rows of windows at a time through the float64 reference, which writes out every window.
_WINDOW_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Shape:
    """One layer on one input; the mask has a square hole of side ``hole`` in every image.

    ``where`` says in whose network it stands and is the first part of the case's name. Shapes of
    networks are not timed as the slow reference, but by each of our two paths and under
    ``torch.compile``.
    """

    batch: int
    channels: int
    side: int
    out_channels: int
    kernel: int
    stride: int = 1
    padding: int = 0
    hole: int = 0
    channels_last: bool = False
    groups: int = 1
    input_grad: bool = True  # False for a first layer, whose input is the image
    where: str = ""

    @property
    def name(self) -> str:
        """As in the results' case names."""
        layout = "_nhwc" if self.channels_last else ""
        layout += f"_g{self.groups}" if self.groups > 1 else ""
        return (
            f"{self.channels}-{self.out_channels}_k{self.kernel}s{self.stride}p{self.padding}_"
            f"{self.side}x{self.side}_n{self.batch}{layout}"
        )


# Holes as a masked 33x33 patch leaves them: 6 pixels in front of the second layer, then none.
SHAPES = (
    Shape(64, 3, 256, 16, 7, stride=2, hole=33, input_grad=False),
    Shape(64, 16, 62, 32, 3, stride=2, hole=6),
    Shape(64, 16, 62, 32, 3, stride=2, hole=6, channels_last=True),
    Shape(64, 64, 13, 64, 3),
    Shape(64, 128, 5, 128, 3),
    Shape(4, 64, 64, 128, 3, padding=1, hole=32),
    Shape(4, 64, 64, 128, 3, padding=1, hole=32, channels_last=True),
)
QUICK_SHAPES = (
    Shape(2, 3, 24, 4, 7, stride=2, hole=11, input_grad=False),
    Shape(2, 4, 9, 6, 3, padding=1, hole=4, channels_last=True),
)


def cases(
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    quick: bool,
    shapes: Sequence[Shape] | None = None,
) -> Iterator[Case]:
    """Forward, and forward + backward, of every shape; without any, of this module's."""
    for index, shape in enumerate(shapes or (QUICK_SHAPES if quick else SHAPES)):
        generator = torch.Generator().manual_seed(seed + index)
        inputs = _Inputs(shape, dtype, device, generator)
        yield inputs.case(backward=False)
        yield inputs.case(backward=True)


@cache
def can_compile() -> bool:
    """Whether ``torch.compile`` works here: on a CPU it needs a C++ compiler."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1))
    except Exception:  # whatever a compiler, or the lack of one, says
        return False
    return True


def nvidia_layer(
    input: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    stride: int,
    padding: int,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """What NVIDIA's ``PartialConv2d`` computes for a new mask, in plain PyTorch of our own.

    Its layer divides by ``count + 1e-8``, which is zero in float16; ``clamp_min(1)`` costs the same
    and is right in every dtype. Its cache of the last mask's ratio is left out: it is wrong as soon
    as the mask changes.

    Args:
        input: ``(N, C, H, W)``.
        mask: ``(N, 1, H, W)`` of the input's dtype.
        weight: ``(K, C / groups, kh, kw)``.
        bias: ``(K,)``.
        ones: ``(1, 1, kh, kw)`` of ones, a buffer of the layer.
        stride: In pixels.
        padding: In pixels.
        groups: Of the convolution.

    Returns:
        Output ``(N, K, Ho, Wo)`` and the next mask ``(N, 1, Ho, Wo)``.
    """
    with torch.no_grad():
        count = F.conv2d(mask, ones, stride=stride, padding=padding)
        valid = count.clamp(0, 1)
        ratio = ones.numel() / count.clamp_min(1) * valid
    raw = F.conv2d(input * mask, weight, bias, stride, padding, groups=groups)
    shift = bias.view(1, -1, 1, 1)
    return ((raw - shift) * ratio + shift) * valid, valid


class _Inputs:
    """One shape's tensors, its variants, and what they should give."""

    def __init__(
        self, shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> None:
        s = self.shape = shape
        layout = torch.channels_last if s.channels_last else torch.contiguous_format

        def draw(*size: int, scale: float = 1.0) -> Tensor:
            values = (torch.randn(size, generator=generator) * scale).to(device, dtype)
            return values.to(memory_format=layout) if len(size) == 4 else values

        out_side = (s.side + 2 * s.padding - s.kernel) // s.stride + 1
        channels = s.channels // s.groups
        taps = channels * s.kernel**2
        self.input = draw(s.batch, s.channels, s.side, s.side).requires_grad_(s.input_grad)
        weight = draw(s.out_channels, channels, s.kernel, s.kernel, scale=taps**-0.5)
        self.weight = weight.requires_grad_()
        self.bias = draw(s.out_channels).requires_grad_()
        self.grad_output = draw(s.batch, s.out_channels, out_side, out_side)
        self.mask = _holes(s, generator).to(device)
        self.float_mask = self.mask.to(dtype)
        self.ones = torch.ones(1, 1, s.kernel, s.kernel, device=device, dtype=dtype)

    def case(self, *, backward: bool) -> Case:
        direction = "forward_backward" if backward else "forward"
        layers: dict[str, Callable[[], tuple[Tensor, Tensor | None]]] = {
            "reference": self._reference,
            "ours": self._ours,
            "conv2d": self._conv2d,
            "nvidia": self._nvidia,
        }
        if self.shape.where:
            del layers["reference"]
            if can_compile():
                layers["nvidia-compiled"] = self._nvidia_compiled
        variants = {
            name: Variant(
                partial(self._run, layer, backward),
                partial(self._expected, name == "conv2d", backward),
            )
            for name, layer in layers.items()
        }
        if self.shape.where and _library.is_loaded():  # what the rule between them comes from
            for path in ("fused", "library"):
                variants[f"ours-{path}"] = Variant(
                    partial(self._run_on_path, path, backward),
                    partial(self._expected, False, backward),
                )
        return Case(
            f"{self.shape.where or 'partial_conv2d'}/{direction}/{self.shape.name}",
            {
                "input": list(self.input.shape),
                "weight": list(self.weight.shape),
                "mask": list(self.mask.shape),
                "stride": self.shape.stride,
                "padding": self.shape.padding,
                "groups": self.shape.groups,
                "hole": self.shape.hole,
                "layout": "channels_last" if self.shape.channels_last else "contiguous",
                "gradients": [name for name, _ in self._leaves()] if backward else [],
            },
            self._work(backward),
            variants,
            terms=self.grad_output[:, 0].numel() if backward else self.weight[0].numel(),
            yardstick="conv2d",
            seconds=0.25 if self.shape.where else 0.5,
        )

    def _leaves(self) -> list[tuple[str, Tensor]]:
        named = [("input", self.input), ("weight", self.weight), ("bias", self.bias)]
        return [(name, tensor) for name, tensor in named if tensor.requires_grad]

    def _run(self, layer: Callable[[], tuple[Tensor, Tensor | None]], backward: bool) -> Outputs:
        if not backward:
            with torch.no_grad():
                output, mask_out = layer()
            return {"output": output} | ({} if mask_out is None else {"mask_out": mask_out})
        output, _ = layer()
        leaves = self._leaves()
        grads = torch.autograd.grad(output, [leaf for _, leaf in leaves], self.grad_output)
        return {"output": output} | {
            f"grad_{name}": grad for (name, _), grad in zip(leaves, grads, strict=True)
        }

    def _run_on_path(self, path: str, backward: bool) -> Outputs:
        with partial_conv_path(path):
            return self._run(self._ours, backward)

    def _reference(self) -> tuple[Tensor, Tensor]:
        s = self.shape
        stride, padding = [s.stride] * 2, [s.padding] * 2
        return reference.partial_conv2d(
            self.input, self.mask, self.weight, self.bias, stride, padding, [1, 1], s.groups
        )

    def _ours(self) -> tuple[Tensor, Tensor]:
        s = self.shape
        return partial_conv2d(
            self.input, self.mask, self.weight, self.bias, s.stride, s.padding, groups=s.groups
        )

    def _conv2d(self) -> tuple[Tensor, None]:
        s = self.shape
        return F.conv2d(
            self.input, self.weight, self.bias, s.stride, s.padding, groups=s.groups
        ), None

    @cached_property
    def _compiled(self) -> Callable[..., tuple[Tensor, Tensor]]:
        torch.compiler.reset()  # every shape is compiled for itself, and torch limits how many
        return torch.compile(nvidia_layer, fullgraph=True, dynamic=False)

    def _nvidia_compiled(self) -> tuple[Tensor, Tensor]:
        return self._nvidia(self._compiled)

    def _nvidia(
        self, layer: Callable[..., tuple[Tensor, Tensor]] = nvidia_layer
    ) -> tuple[Tensor, Tensor]:
        return layer(
            self.input,
            self.float_mask,
            self.weight,
            self.bias,
            self.ones,
            self.shape.stride,
            self.shape.padding,
            self.shape.groups,
        )

    def _expected(self, plain: bool, backward: bool) -> Outputs:
        found = self._plain if plain else self._partial
        if backward:
            return {name: value for name, value in found.items() if name != "mask_out"}
        return {name: value for name, value in found.items() if not name.startswith("grad_")}

    @cached_property
    def _plain(self) -> Outputs:
        return self._in_float64(plain=True)

    @cached_property
    def _partial(self) -> Outputs:
        return self._in_float64(plain=False)

    def _in_float64(self, *, plain: bool) -> Outputs:
        """The specification's results and gradients, a band of an image at a time."""
        s = self.shape
        taps = self.weight[0].numel()
        out_side = self.grad_output.shape[2]
        rows = max(1, _WINDOW_BYTES // (8 * taps * out_side))
        images = max(1, rows // out_side)
        pads = [s.padding] * 4
        weight = self.weight.detach().double().requires_grad_()
        bias = self.bias.detach().double().requires_grad_()
        leaves = (weight, bias)
        grads = [torch.zeros_like(leaf) for leaf in leaves]
        expected = {
            "output": torch.empty(self.grad_output.shape, dtype=torch.float64),
            "mask_out": torch.empty((s.batch, 1, out_side, out_side), dtype=torch.float64),
        }
        of_input = F.pad(torch.zeros(self.input.shape, dtype=torch.float64), pads)
        expected = {name: tensor.to(self.input.device) for name, tensor in expected.items()}
        of_input = of_input.to(self.input.device)
        for start in range(0, s.batch, images):
            part = slice(start, start + images)
            image = F.pad(self.input[part].detach().double(), pads)
            mask = F.pad(self.mask[part], pads)  # padding counts as missing
            for top in range(0, out_side, rows):
                bottom = min(out_side, top + rows)
                band = slice(top * s.stride, (bottom - 1) * s.stride + s.kernel)
                x = image[:, :, band].requires_grad_()
                if plain:
                    output = F.conv2d(x, weight, bias, s.stride, groups=s.groups)
                else:
                    output, mask_out = reference.partial_conv2d(
                        x,
                        mask[:, :, band],
                        weight,
                        bias,
                        [s.stride] * 2,
                        [0, 0],
                        [1, 1],
                        s.groups,
                    )
                    expected["mask_out"][part, :, top:bottom] = mask_out.double()
                expected["output"][part, :, top:bottom] = output.detach()
                grad = self.grad_output[part, :, top:bottom].double()
                of_x, *of_leaves = torch.autograd.grad(output, [x, *leaves], grad)
                of_input[part, :, band] += of_x
                for total, share in zip(grads, of_leaves, strict=True):
                    total += share
        if plain:
            del expected["mask_out"]
        if s.input_grad:
            end = s.padding + s.side
            expected["grad_input"] = of_input[:, :, s.padding : end, s.padding : end]
        return expected | {"grad_weight": grads[0], "grad_bias": grads[1]}

    def _work(self, backward: bool) -> Work:
        """The least work: only valid pixels are read and multiplied."""
        s = self.shape
        item = self.input.element_size()
        ones = torch.ones(1, 1, s.kernel, s.kernel, device=self.mask.device)
        windows = F.conv2d(self.mask.float(), ones, stride=s.stride, padding=s.padding)
        product = 2.0 * float(windows.double().sum()) * s.channels * s.out_channels / s.groups
        valid = int(self.mask.sum()) * s.channels * item
        output = self.grad_output.numel() * item
        parameters = (self.weight.numel() + self.bias.numel()) * item
        masks = self.mask.numel() * self.mask.element_size()
        next_mask = windows.numel() * self.mask.element_size()
        work = Work(product, valid + parameters + output + masks + next_mask)
        if not backward:
            return work
        # grad_weight from input and grad_output; grad_input from weight and grad_output
        work += Work(product, valid + output + parameters + masks)
        if s.input_grad:
            work += Work(product, self.weight.numel() * item + self.input.numel() * item)
        return work


def _holes(shape: Shape, generator: torch.Generator) -> Tensor:
    """``(N, 1, H, W)`` bool, 0 on a square hole somewhere in each image."""
    last = shape.side - shape.hole
    origins = torch.randint(0, last + 1, (shape.batch, 2), generator=generator)
    pixels = torch.arange(shape.side)
    inside = (pixels >= origins[..., None]) & (pixels < origins[..., None] + shape.hole)
    return ~(inside[:, 0, :, None] & inside[:, 1, None, :])[:, None]
