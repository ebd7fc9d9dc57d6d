"""hole_conv2d and its kin on a CUDA device: every tile of the kernel, graphs, slices, bad geometry.

What the ops compute is tested in test_hole_windows.py, also on CUDA; tests/cpp runs the kernel's
body on a CPU.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glance_ext.nn import HoleFeatures, MaskedMaxPool2d, PartialConv2d
from glance_ext.ops import gather_holes, hole_conv2d, hole_max_pool2d
from glance_ext.testing import assert_matches_reference
from tests.ops.test_hole_windows import cast

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def exact_float32() -> Any:
    with torch.backends.cudnn.flags(allow_tf32=False, deterministic=True):
        yield


def arguments_of(
    channels: int, out_channels: int, kernel: int = 3, holes: int = 40, windows: bool = True
) -> list[Any]:
    """Two images and many holes, more cells than one tile has rows; float64 on the CPU."""
    random = torch.Generator().manual_seed(channels * 1000 + out_channels)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, dtype=torch.float64)

    size, extent, out = 12 + kernel, 5, 4
    first = torch.randint(0, size - extent, (holes, 2), generator=random)
    extents = torch.cat((first, torch.randint(1, extent, (holes, 2), generator=random)), 1)
    ratio = torch.rand(holes, out, out, generator=random, dtype=torch.float64) + 0.5
    ratio[torch.rand(ratio.shape, generator=random) < 0.2] = 0
    return [
        randn(2, channels, size, size),
        randn(2, holes, channels, extent, extent) if windows else None,
        extents.to(torch.int32),
        torch.randint(-1, 6, (holes, 2), generator=random, dtype=torch.int32),
        ratio.flatten().nonzero().flatten().to(torch.int32),
        ratio,
        randn(out_channels, channels, kernel, kernel),
        randn(out_channels),
        (2, 1),
        (1, 1),
        (1, 1),
        0.1,
    ]


def assert_equal_to_cpu(arguments: list[Any], dtype: torch.dtype) -> None:
    rounded = cast(cast(arguments, dtype, "cpu"), torch.float64, "cpu")
    expected = hole_conv2d(*rounded)
    assert_matches_reference(
        hole_conv2d(*cast(arguments, dtype, "cuda")),
        expected,
        hole_conv2d(*cast(arguments, dtype, "cpu")),
        scale=float(expected.abs().max()),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_channels", [5, 16, 32, 64, 128, 130])
@pytest.mark.parametrize(
    ("channels", "windows"), [(3, False), (3, True), (4, True), (16, True), (40, True)]
)
def test_every_tile(channels: int, windows: bool, out_channels: int, dtype: torch.dtype) -> None:
    assert_equal_to_cpu(arguments_of(channels, out_channels, windows=windows), dtype)


@pytest.mark.parametrize("kernel", [1, 7, 31])
def test_small_and_large_kernels(kernel: int) -> None:
    """The table of 31 x 31 taps is larger than any shared memory: one thread an output."""
    assert_equal_to_cpu(arguments_of(3, 8, kernel, holes=5), torch.float32)
    assert_equal_to_cpu(arguments_of(3, 8, kernel, holes=5), torch.bfloat16)


@pytest.mark.parametrize("channels", [3, 32])
def test_tf32_is_used_where_torch_allows_it(channels: int) -> None:
    arguments = cast(arguments_of(channels, 64), torch.float32, "cuda")
    exact = hole_conv2d(*arguments)
    with torch.backends.cudnn.flags(allow_tf32=True):
        fast = hole_conv2d(*arguments)
    if torch.cuda.get_device_capability()[0] < 8:
        assert torch.equal(fast, exact)
        return
    scale = exact.abs().max()
    assert 0 < (fast - exact).abs().max() <= 2e-3 * scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    arguments = cast(arguments_of(16, 32), dtype, "cuda")
    leaves = [arguments[i].requires_grad_() for i in (0, 1, 6, 7)]
    runs = []
    for _ in range(2):
        output = hole_conv2d(*arguments)
        runs.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slices_that_begin_anywhere(dtype: torch.dtype) -> None:
    """16 bytes are copied at a time: only where they may be."""
    arguments = cast(arguments_of(16, 32), dtype, "cuda")
    size = (3, 3)
    expected = hole_conv2d(*arguments)
    tiles = gather_holes(*arguments[:4], size)
    pooled = hole_max_pool2d(*arguments[:4], 3, 1, 1, 1, size)
    for index, last in ((0, (0, 2, 3, 1)), (1, (0, 1, 3, 4, 2))):
        tensor = arguments[index].permute(last).contiguous()
        shifted = torch.empty(tensor.numel() + 1, device="cuda", dtype=dtype)[1:].view(tensor.shape)
        shifted.copy_(tensor)
        arguments[index] = shifted.permute([last.index(i) for i in range(len(last))])
        assert arguments[index].data_ptr() % 16 != 0
    assert torch.equal(hole_conv2d(*arguments), expected)
    assert torch.equal(gather_holes(*arguments[:4], size), tiles)
    assert torch.equal(hole_max_pool2d(*arguments[:4], 3, 1, 1, 1, size), pooled)


def test_geometry_of_any_numbers_reads_nothing_outside() -> None:
    """The op does not look at a device's numbers; the memory checker sees what the kernels do."""
    random = torch.Generator().manual_seed(0)
    wild = torch.tensor([-(2**31), -1000, -1, 0, 7, 1000, 2**31 - 1])
    arguments = cast(arguments_of(16, 32), torch.bfloat16, "cuda")
    for index in (2, 3, 4):
        some = torch.randint(0, len(wild), arguments[index].shape, generator=random)
        arguments[index] = wild[some].to("cuda", torch.int32)
    hole_conv2d(*arguments)
    gather_holes(*arguments[:4], (3, 3))
    hole_max_pool2d(*arguments[:4], 3, 1, 1, 1, (3, 3))
    torch.cuda.synchronize()


def test_a_whole_network_in_a_graph() -> None:
    """Nothing waits for the device or reads from it: a graph replays with new pixels."""
    layers = nn.Sequential(
        PartialConv2d(3, 16, 5, stride=2),
        nn.ReLU(),
        MaskedMaxPool2d(3, 2),
        PartialConv2d(16, 32, 3),
        nn.ReLU(),
        PartialConv2d(32, 64, 3),
        PartialConv2d(64, 64, 5),
    ).to("cuda", torch.bfloat16)
    origins = torch.cartesian_prod(torch.arange(0, 32, 8), torch.arange(0, 32, 8))
    shared = HoleFeatures(layers)
    plan = shared.plan(41, 9, origins, device="cuda", dtype=torch.bfloat16)
    images = torch.randn(2, 3, 41, 41, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.no_grad():
        with torch.cuda.stream(stream):
            shared(images, plan)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = shared(images, plan)
        for _ in range(2):
            images.copy_(torch.randn_like(images))
            graph.replay()
            torch.testing.assert_close(captured, shared(images, plan), rtol=0, atol=0)
