"""The two native paths of partial_conv2d give the same answer, and either can be asked for."""

import contextlib
import threading
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glance_ext import _library
from glance_ext.ops import partial_conv2d, reference
from glance_ext.testing import assert_matches_reference, partial_conv_path

pytestmark = pytest.mark.skipif(not _library.is_loaded(), reason="the native ops are not built")

# channels, out, height, width, kernel, stride, padding, dilation, groups
SHAPES = {
    "image": (3, 16, 40, 37, 7, 2, 3, 1, 1),
    "narrow": (5, 3, 19, 23, 3, 1, 1, 1, 1),
    "wide": (48, 72, 9, 11, 3, 1, 0, 1, 1),
    "one pixel": (32, 16, 6, 5, 1, 1, 0, 1, 1),
    "dilated": (16, 24, 17, 14, 3, 1, 2, 2, 1),
    "strided": (24, 32, 15, 16, 5, 3, 2, 1, 1),
    "tiles": (4, 20, 30, 40, 3, 1, 0, 1, 1),  # some of them all valid and all inside
    "tiles strided": (3, 16, 75, 90, 7, 2, 0, 1, 1),
    "tiles dilated": (16, 8, 64, 50, 3, 2, 1, 3, 1),
    "groups": (24, 48, 10, 12, 3, 2, 1, 1, 3),
    "depthwise": (16, 16, 12, 9, 3, 1, 1, 1, 16),
    "depthwise strided": (19, 19, 13, 17, 3, 2, 1, 1, 19),
    "depthwise dilated": (24, 24, 16, 11, 3, 1, 2, 2, 24),
    "depthwise wide": (5, 5, 21, 30, 5, 3, 4, 2, 5),  # of 25 taps, more than a loop takes at once
    "depthwise padded": (3, 3, 6, 4, 2, 1, 5, 1, 3),  # windows and rows of nothing but padding
    "depthwise in bands": (8, 8, 90, 110, 3, 2, 1, 1, 8),
    "groups of 2": (16, 16, 12, 9, 3, 1, 1, 1, 8),
    "groups of 2 strided": (22, 22, 13, 17, 3, 2, 1, 1, 11),
    "groups of 4": (12, 12, 16, 11, 3, 1, 2, 2, 3),
    "groups of 4 wide": (20, 20, 21, 30, 5, 3, 4, 2, 5),
    "groups of 4 in bands": (16, 16, 68, 40, 3, 2, 1, 1, 4),
    "groups of 8": (24, 24, 12, 9, 2, 1, 1, 1, 3),
    "many groups": (40, 80, 11, 9, 3, 2, 1, 1, 10),  # of 4 and 8 channels
    "one row of cache": (512, 20, 6, 5, 3, 1, 1, 1, 1),  # pixels 2 KiB apart, which is avoided
    "one row of cache strided": (256, 20, 9, 7, 3, 2, 1, 1, 1),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def results(
    path: str, tensors: list[Tensor], grad: Tensor, geometry: list[int], slope: float
) -> dict[str, Tensor]:
    """Output, next mask and gradients by one path."""
    image, mask, weight, bias = tensors
    leaves = [t.detach().requires_grad_() for t in (image, weight, bias)]
    with partial_conv_path(path):
        output, mask_out = partial_conv2d(
            leaves[0], mask, *leaves[1:], *geometry, negative_slope=slope
        )
        grads = torch.autograd.grad(output, leaves, grad)
    names = ("grad_input", "grad_weight", "grad_bias")
    return {"output": output.detach(), "mask_out": mask_out} | dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "holes"),
    [(s, "scattered") for s in SHAPES if not s.startswith("tiles")]
    + [(s, "small") for s in SHAPES]
    + [(s, "by channel") for s in SHAPES if s.startswith(("depthwise", "groups of"))],
)
def test_both_paths_agree_with_the_specification(
    shape: str, holes: str, layout: str, dtype: torch.dtype
) -> None:
    channels, out, height, width, kernel, stride, padding, dilation, groups = SHAPES[shape]
    random = torch.Generator().manual_seed(list(SHAPES).index(shape))
    size = (2, channels, height, width)
    mask = torch.ones(2, channels if holes == "by channel" else 1, height, width, dtype=torch.bool)
    if holes == "small":  # in one image
        mask[1, :, height // 3 : height // 3 + 2, width // 4 : width // 4 + 2] = False
    else:
        mask &= torch.rand(mask.shape, generator=random) > 0.3
        mask[..., : height // 2 + kernel, : width // 2 + kernel] = False  # windows without a pixel
    image = torch.randn(size, generator=random).masked_fill(~mask, float("nan"))
    taps = channels // groups * kernel**2
    weight = torch.randn(out, channels // groups, kernel, kernel, generator=random) / taps**0.5
    tensors = [
        image.to(dtype, memory_format=LAYOUTS[layout]),
        mask,
        weight.to(dtype),
        torch.randn(out, generator=random).to(dtype),
    ]
    geometry = [stride, padding, dilation, groups]
    # 16-bit sums near 0 round to either side of the activation
    slope = 0.25 if dtype == torch.float32 else 1.0
    plain = reference.partial_conv2d(
        *tensors, *([n, n] for n in geometry[:3]), groups, negative_slope=slope
    )[0]
    grad = torch.randn(plain.shape, generator=random).to(dtype)
    paths = ("fused", "library", "rule")  # the last may take one for some gradients only
    by_path = {p: results(p, tensors, grad, geometry, slope) for p in paths}
    exact, same = (
        _reference([t if t is mask else t.to(d) for t in tensors], grad.to(d), geometry, slope)
        for d in (torch.float64, dtype)
    )
    for path, found in by_path.items():
        assert torch.equal(found.pop("mask_out"), exact["mask_out"].bool())
        for name, value in found.items():
            scale = max(1.0, float(exact[name].abs().max()))
            if shape == "one row of cache" and path != "fused":
                # torch's convolution there, on AVX2: 7.9e-6 off where 7.0e-6 was allowed
                scale *= 2
            assert_matches_reference(
                value, exact[name], same[name], name=f"{path} {name}", scale=scale
            )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [1, 5, 10, 20], ids=["one group", "4", "2", "depthwise"])
def test_results_are_the_same_for_any_number_of_threads(groups: int, layout: str) -> None:
    random = torch.Generator().manual_seed(3)
    image = torch.randn(2, 20, 90, 110, generator=random).to(memory_format=LAYOUTS[layout])
    mask = torch.rand(2, 1, 90, 110, generator=random) > 0.3
    weight = torch.randn(20, 20 // groups, 3, 3, generator=random)
    bias = torch.randn(20, generator=random)
    grad = torch.randn(image.shape, generator=random)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            tensors = [image, mask, weight, bias]
            found.append(results("fused", tensors, grad, [1, 1, 1, groups], slope=0.25))
    finally:
        torch.set_num_threads(threads)
    for name, value in found[0].items():
        assert all(torch.equal(other[name], value) for other in found[1:]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_relu_of_depthwise_layers_is_that_of_the_specification(layout: str) -> None:
    """Minus infinity becomes 0 and stops gradients; NaN stays."""
    image = torch.zeros(1, 9, 8, 8).contiguous(memory_format=LAYOUTS[layout])
    image[0, 0, 1, 1], image[0, 1, 1, 1] = float("-inf"), float("nan")
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    mask[..., 4:, 4:] = False
    tensors = [image, mask, torch.ones(9, 1, 3, 3), torch.zeros(9)]
    grad = torch.ones(1, 9, 6, 6)
    found = results("fused", tensors, grad, [1, 0, 1, 9], slope=0.0)
    expected = _reference(tensors, grad, [1, 0, 1, 9], slope=0.0)
    assert torch.equal(found["output"].isnan(), expected["output"].isnan())
    assert torch.equal(found["output"].nan_to_num(), expected["output"].nan_to_num())
    finite = [channel for channel in range(9) if channel != 1]
    assert torch.equal(found["grad_input"][:, finite], expected["grad_input"][:, finite])
    assert torch.equal(found["grad_bias"][finite], expected["grad_bias"][finite])


@pytest.mark.parametrize(
    ("groups", "out", "with_avx2", "with_avx512"),
    [
        (1, 32, True, True),
        (2, 32, True, True),
        (4, 32, True, False),
        (8, 32, True, True),
        (16, 32, True, True),
        (32, 32, True, True),
        (32, 64, False, False),
    ],
)
def test_rule_is_the_documented_one(
    groups: int, out: int, with_avx2: bool, with_avx512: bool
) -> None:
    image, mask = torch.rand(1, 32, 64, 64), torch.ones(64, 64, dtype=torch.bool)
    mask[3, 4] = False
    with torch.no_grad(), partial_conv_path("rule"), allocations() as sizes:
        partial_conv2d(image, mask, torch.rand(out, 32 // groups, 3, 3), groups=groups)
    capability = torch.backends.cpu.get_cpu_capability()
    fused = {"AVX2": with_avx2, "AVX512": with_avx512}.get(capability, False)
    assert (image.numel() * image.element_size() in sizes) is not fused


def _reference(
    tensors: list[Tensor], grad: Tensor, geometry: list[int], slope: float
) -> dict[str, Tensor]:
    image, mask, weight, bias = tensors
    leaves = [t.detach().requires_grad_() for t in (image, weight, bias)]
    stride, padding, dilation, groups = geometry
    output, mask_out = reference.partial_conv2d(
        leaves[0], mask, *leaves[1:], [stride] * 2, [padding] * 2, [dilation] * 2, groups,
        negative_slope=slope,
    )  # fmt: skip
    grads = torch.autograd.grad(output, leaves, grad)
    names = ("grad_input", "grad_weight", "grad_bias")
    return {"output": output.detach(), "mask_out": mask_out} | dict(zip(names, grads, strict=True))


@contextlib.contextmanager
def allocations() -> Iterator[list[int]]:
    """The sizes of what torch allocates meanwhile."""
    sizes: list[int] = []
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        yield sizes
    events = profile.kineto_results.events()
    sizes += [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]


def copies_its_input() -> bool:
    """Whether a call makes a masked copy, as the library's path does and the fused does not."""
    image = torch.rand(1, 16, 64, 64)
    mask = torch.ones(64, 64, dtype=torch.bool)
    mask[3, 4] = False
    with torch.no_grad(), allocations() as sizes:
        partial_conv2d(image, mask, torch.rand(8, 16, 3, 3))
    return image.numel() * image.element_size() in sizes


def test_path_asked_for_is_the_one_taken() -> None:
    with partial_conv_path("fused"):
        assert not copies_its_input()
        with partial_conv_path("library"):
            assert copies_its_input()
        assert not copies_its_input()


def test_rule_is_back_after_an_error() -> None:
    with pytest.raises(KeyError), partial_conv_path("library"):
        raise KeyError
    assert _library.module.partial_conv_path("rule") == "rule"


def test_path_holds_in_other_threads() -> None:
    found: list[bool] = []
    with partial_conv_path("library"):
        thread = threading.Thread(target=lambda: found.append(copies_its_input()))
        thread.start()
        thread.join()
    assert found == [True]


def test_float64_takes_the_librarys_path_whatever_is_asked_for() -> None:
    tensors = [
        torch.rand(1, 2, 5, 5).double(),
        torch.ones(5, 5).bool(),
        torch.rand(3, 2, 3, 3).double(),
    ]
    with partial_conv_path("fused"):
        fused = partial_conv2d(*tensors)[0]
    with partial_conv_path("library"):
        assert torch.equal(fused, partial_conv2d(*tensors)[0])


def test_unknown_path_is_an_error() -> None:
    with (
        pytest.raises(ValueError, match="expected one of rule, fused, library, got 'fast'"),
        partial_conv_path("fast"),
    ):
        pass


def test_without_the_library_the_error_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "module", None)
    with pytest.raises(RuntimeError, match="native ops"), partial_conv_path("fused"):
        pass


@pytest.mark.parametrize("slope", [1.0, 0.25, 0.0])
@pytest.mark.parametrize("mask_channels", [1, 8])
@pytest.mark.parametrize("groups", [1, 2])
def test_plain_convolution_where_every_window_is_whole(
    groups: int, mask_channels: int, slope: float
) -> None:
    random = torch.Generator().manual_seed(5)
    image = torch.randn(2, 8, 9, 7, generator=random)
    mask = torch.ones(1, mask_channels, 9, 7, dtype=torch.uint8)
    weight = torch.randn(4, 8 // groups, 3, 2, generator=random)
    leaves = [t.requires_grad_() for t in (image, weight, torch.randn(4, generator=random))]
    with partial_conv_path("library"):
        output, mask_out = partial_conv2d(
            leaves[0], mask, *leaves[1:], stride=2, groups=groups, negative_slope=slope
        )
    plain = F.conv2d(*leaves, stride=2, groups=groups)
    plain = F.relu(plain) if slope == 0 else F.leaky_relu(plain, slope)
    assert torch.equal(output, plain)
    assert mask_out.dtype == torch.uint8
    assert bool((mask_out == 1).all())
    grad = torch.randn(plain.shape, generator=random)
    with partial_conv_path("library"):
        grads = torch.autograd.grad(output, leaves, grad)
    for found, expected in zip(grads, torch.autograd.grad(plain, leaves, grad), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
