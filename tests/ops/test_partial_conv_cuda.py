"""partial_conv2d's two paths on a CUDA device: every tile of the fused kernel, graphs, slices.

What the op computes is tested in test_partial_conv.py, also on CUDA; tests/cpp runs the kernel's
body on a CPU.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from glance_ext.ops import partial_conv2d, reference
from glance_ext.testing import assert_matches_reference, partial_conv_path

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

# channels, out, height, width, kernel, stride, padding, dilation, groups: a tile of 16, 32, 64 and
# 128 columns, channels that are padded to chunks of 8 and 16 bytes, and what the tiles do not serve
SHAPES = {
    "image": (3, 64, 41, 38, 7, 2, 3, 1, 1),
    "narrow": (16, 16, 40, 33, 3, 1, 1, 1, 1),
    "odd channels": (20, 30, 19, 23, 3, 1, 1, 1, 1),
    "wide": (64, 130, 18, 35, 3, 1, 1, 1, 1),
    "one pixel": (32, 64, 16, 25, 1, 1, 0, 1, 1),
    "dilated": (24, 32, 27, 24, 3, 1, 4, 4, 1),
    "strided": (64, 48, 25, 26, 5, 3, 2, 1, 1),
    "groups": (48, 96, 20, 22, 3, 2, 1, 1, 3),
    "groups of few": (12, 12, 20, 22, 3, 1, 1, 1, 4),
    "depthwise": (32, 32, 22, 19, 3, 1, 1, 1, 32),
    "depthwise odd": (13, 13, 22, 19, 5, 2, 2, 1, 13),
    "patches": (8, 8, 64, 64, 3, 1, 1, 1, 1),
}


@pytest.fixture(autouse=True)
def exact_float32() -> Any:
    with torch.backends.cudnn.flags(allow_tf32=False, deterministic=True):
        yield


def arguments_of(name: str, masks: int = 2) -> tuple[list[Tensor], list[int]]:
    """Image, mask, weight and bias in float64 on the CPU, and the geometry; NaN behind the mask."""
    channels, out, height, width, kernel, stride, padding, dilation, groups = SHAPES[name]
    random = torch.Generator().manual_seed(list(SHAPES).index(name))

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=random, dtype=torch.float64)

    mask = torch.rand(masks, 1, height, width, generator=random) > 0.3
    mask[..., : height // 2 + kernel, : width // 2 + kernel] = False  # windows with nothing in them
    taps = channels // groups * kernel**2
    tensors = [
        randn(2, channels, height, width).masked_fill(~mask, float("nan")),
        mask,
        randn(out, channels // groups, kernel, kernel) / taps**0.5,
        randn(out),
    ]
    return tensors, [stride, padding, dilation, groups]


def run(op: Any, tensors: list[Tensor], geometry: list[Any], slope: float) -> dict[str, Tensor]:
    """Output, next mask and gradients."""
    image, mask, weight, bias = tensors
    leaves = [t.detach().requires_grad_() for t in (image, weight, bias)]
    output, mask_out = op(leaves[0], mask, *leaves[1:], *geometry, negative_slope=slope)
    grad = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape)
    grads = torch.autograd.grad(output, leaves, grad.to(output))
    names = ("grad_input", "grad_weight", "grad_bias")
    return {"output": output.detach(), "mask_out": mask_out} | dict(zip(names, grads, strict=True))


def on_cuda(tensors: list[Tensor], dtype: torch.dtype, layout: torch.memory_format) -> list[Tensor]:
    image, mask, weight, bias = tensors
    return [
        image.to("cuda", dtype).contiguous(memory_format=layout),
        mask.cuda(),
        weight.to("cuda", dtype).contiguous(memory_format=layout),
        bias.to("cuda", dtype),
    ]


def assert_both_paths_are_right(
    tensors: list[Tensor], geometry: list[int], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    # 16-bit sums near 0 round to either side of the activation
    slope = 0.25 if dtype.itemsize > 2 else 1.0
    rounded = [t if t.dtype == torch.bool else t.to(dtype) for t in tensors]
    lists = [[n, n] for n in geometry[:3]] + [geometry[3]]
    exact, same = (
        run(
            reference.partial_conv2d,
            [t if t.dtype == torch.bool else t.to(d) for t in rounded],
            lists,
            slope,
        )
        for d in (torch.float64, dtype)
    )
    for path in ("fused", "library"):
        with partial_conv_path(path):
            found = run(partial_conv2d, on_cuda(tensors, dtype, layout), geometry, slope)
        assert found["output"].is_contiguous(memory_format=layout)
        assert torch.equal(found.pop("mask_out").cpu(), exact["mask_out"].bool())
        for name, value in found.items():
            assert_matches_reference(
                value.cpu(),
                exact[name],
                same[name],
                name=f"{path} {name}",
                scale=max(1.0, float(exact[name].abs().max())),
            )


@every_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_both_paths_agree_with_the_specification(shape: str, dtype: torch.dtype) -> None:
    assert_both_paths_are_right(*arguments_of(shape), dtype, torch.channels_last)


@pytest.mark.parametrize("shape", ["image", "groups", "depthwise"])
def test_fused_path_can_be_asked_for_contiguous_tensors(shape: str) -> None:
    assert_both_paths_are_right(*arguments_of(shape), torch.float16, torch.contiguous_format)


@pytest.mark.parametrize("shape", ["narrow", "depthwise"])
def test_one_mask_serves_all_images(shape: str) -> None:
    assert_both_paths_are_right(*arguments_of(shape, 1), torch.float32, torch.channels_last)


def test_tf32_rounds_no_more_than_its_factors() -> None:
    tensors, geometry = arguments_of("wide")
    exact = run(partial_conv2d, tensors, geometry, 1.0)
    with torch.backends.cudnn.flags(allow_tf32=True), partial_conv_path("fused"):
        found = run(
            partial_conv2d,
            on_cuda(tensors, torch.float32, torch.channels_last),
            geometry,
            1.0,
        )
    for name in ("output", "grad_input"):
        error = (found[name].cpu().double() - exact[name]).abs().max()
        size = exact[name].abs().max()
        assert 0 < error < size * 2e-3


def test_slices_that_begin_anywhere() -> None:
    """Pixels that begin at no multiple of 16 bytes are copied."""
    tensors, geometry = arguments_of("narrow")
    dense = on_cuda(tensors, torch.float16, torch.channels_last)
    storage = torch.empty(dense[0].numel() + 3, dtype=torch.float16, device="cuda")
    n, c, h, w = dense[0].shape
    shifted = storage[3:].view(n, h, w, c).permute(0, 3, 1, 2)
    shifted.copy_(dense[0])
    with partial_conv_path("fused"):
        expected = partial_conv2d(*dense, *geometry)[0]
        assert torch.equal(partial_conv2d(shifted, *dense[1:], *geometry)[0], expected)


def test_nothing_valid_is_zero_whatever_the_output_held_before() -> None:
    tensors, geometry = arguments_of("patches")
    image, mask, weight, bias = on_cuda(tensors, torch.bfloat16, torch.channels_last)
    image.fill_(float("nan"))
    with partial_conv_path("fused"):
        found = run(partial_conv2d, [image, torch.zeros_like(mask), weight, bias], geometry, 0.0)
    assert all(not value.any() for value in found.values())


@pytest.mark.parametrize("shape", ["wide", "depthwise"])
def test_graph_replays_with_another_mask(shape: str) -> None:
    tensors, geometry = arguments_of(shape)
    image, mask, weight, bias = on_cuda(tensors, torch.float16, torch.channels_last)
    image = image.nan_to_num()

    def step(mask: Tensor) -> tuple[Tensor, Tensor]:
        leaf = image.detach().requires_grad_()
        output, _ = partial_conv2d(leaf, mask, weight, bias, *geometry, negative_slope=0.0)
        return output, torch.autograd.grad(output.sum(), leaf)[0]

    held = mask.clone()
    with partial_conv_path("fused"):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step(held)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(held)
        for new in (mask, ~mask):
            held.copy_(new)
            graph.replay()
            for got, expected in zip(captured, step(new), strict=True):
                assert torch.equal(got, expected)


def test_two_runs_give_the_same_bits() -> None:
    tensors, geometry = arguments_of("strided")
    inputs = on_cuda(tensors, torch.bfloat16, torch.channels_last)
    with partial_conv_path("fused"):
        first, second = (run(partial_conv2d, inputs, geometry, 0.1) for _ in range(2))
    for name in ("output", "grad_input"):
        assert torch.equal(first[name], second[name])
