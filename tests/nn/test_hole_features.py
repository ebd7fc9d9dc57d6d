"""HoleFeatures: equal to one pass a hole, for any network that it plans; its plan; its messages."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from glance_ext.nn import HoleFeatures, MaskedMaxPool2d, PartialConv2d, hole_plan, masked_max_pool2d
from glance_ext.ops import partial_conv2d

property_test = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def hole_by_hole(
    layers: list[nn.Module], images: Tensor, origins: Tensor, hole: tuple[int, int]
) -> Tensor:
    """The specification: one whole pass for each image and hole, with its mask."""
    rows = []
    for n, image in enumerate(images):
        row = []
        for y, x in (origins[n] if origins.dim() == 3 else origins).tolist():
            mask = torch.ones(1, 1, *images.shape[-2:], dtype=torch.bool, device=images.device)
            mask[..., y : y + hole[0], x : x + hole[1]] = False
            features = torch.where(mask, image[None], 0)
            for layer in layers:
                features, mask = one_layer(layer, features, mask)
            row.append(features[0])
        rows.append(torch.stack(row))
    return torch.stack(rows)


def one_layer(layer: nn.Module, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(layer, PartialConv2d):
        geometry: Any = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return partial_conv2d(features, mask, layer.weight, layer.bias, *geometry)
    if isinstance(layer, nn.Conv2d):
        features = layer(features)
        return features, torch.ones_like(features[:, :1], dtype=torch.bool)
    if isinstance(layer, (nn.MaxPool2d, MaskedMaxPool2d)):
        return masked_max_pool2d(
            features,
            mask,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.ceil_mode,
        )
    return layer(features), mask


def randomise(layers: list[nn.Module], seed: int = 0) -> None:
    random = torch.Generator().manual_seed(seed)
    for layer in layers:
        for name, value in layer.named_parameters():
            scale = 0.3 if name.endswith("bias") else (2 / value[0].numel()) ** 0.5
            value.data = torch.randn(value.shape, generator=random) * scale


def assert_equal_to_hole_by_hole(
    layers: list[nn.Module],
    images: Tensor,
    origins: Tensor,
    hole: tuple[int, int],
    tolerance: float = 1e-5,
) -> None:
    shared = HoleFeatures(layers)
    size = (images.shape[-2], images.shape[-1])
    with torch.no_grad():
        plan = shared.plan(size, hole, origins, device=images.device, dtype=images.dtype)
        expected = hole_by_hole(layers, images, origins, hole)
    scale = expected.abs().max().clamp_min(1e-3)
    for gradients in (False, True):  # in one call, and layer by layer
        with torch.set_grad_enabled(gradients):
            got = shared(images, plan).detach()
        assert got.shape == expected.shape
        assert float((got - expected).abs().max() / scale) <= tolerance


@st.composite
def networks(draw: Any) -> tuple[list[nn.Module], int]:
    """One to five layers and a seed for their weights."""

    def of(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    def pair(low: int, high: int) -> tuple[int, int]:
        return of(low, high), of(low, high)

    layers: list[nn.Module] = []
    channels = 3
    for _ in range(of(1, 5)):
        kernel = pair(1, 4)
        kind = draw(st.sampled_from(["partial", "partial", "conv", "pool", "masked pool", "act"]))
        if kind == "act":
            layers.append(draw(st.sampled_from([nn.ReLU(), nn.LeakyReLU(0.1)])))
            continue
        if "pool" in kind:
            padding = (of(0, kernel[0] // 2), of(0, kernel[1] // 2))
            make = nn.MaxPool2d if kind == "pool" else MaskedMaxPool2d
            layers.append(make(kernel, pair(1, 3), padding, ceil_mode=draw(st.booleans())))
            continue
        out = draw(st.sampled_from([2, 4, 6]))
        groups = draw(st.sampled_from([1, 1, 2])) if channels % 2 == 0 else 1
        padding = (of(0, kernel[0] - 1), of(0, kernel[1] - 1))
        make_conv = PartialConv2d if kind == "partial" else nn.Conv2d
        layers.append(
            make_conv(
                channels,
                out,
                kernel,
                pair(1, 3),
                padding,
                pair(1, 2),
                groups,
                bias=draw(st.booleans()),
            )
        )
        channels = out
    if all(isinstance(layer, (nn.ReLU, nn.LeakyReLU)) for layer in layers):
        layers.append(nn.Conv2d(channels, 2, 2))
    return layers, of(0, 1 << 20)


@property_test
@given(network=networks(), data=st.data())
def test_any_network_equals_hole_by_hole(
    network: tuple[list[nn.Module], int], data: st.DataObject, device: str
) -> None:
    layers, seed = network
    randomise(layers, seed)
    size = (data.draw(st.integers(12, 30)), data.draw(st.integers(12, 30)))
    hole = (data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12)))
    random = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 3, *size, generator=random)
    last = torch.tensor(size) - torch.tensor(hole)
    shape = data.draw(st.sampled_from([(5,), (2, 3)]))
    origins = (torch.rand(*shape, 2, generator=random) * (last + 1)).long()
    origins.view(-1, 2)[0] = 0
    origins.view(-1, 2)[1] = last
    shared = HoleFeatures(layers)
    message = ""
    try:
        shared.plan(size, hole, origins)
    except ValueError as error:  # a map has become smaller than a window
        message = str(error)
    if message:
        assert "expected an input of at least" in message or "nothing but padding" in message
        return
    layers = [layer.to(device) for layer in layers]
    assert_equal_to_hole_by_hole(layers, images.to(device), origins.to(device), hole)


def small_global_net(padding: int = 0) -> list[nn.Module]:
    layers: list[nn.Module] = [
        PartialConv2d(3, 8, 5, stride=2, padding=padding),
        nn.ReLU(),
        MaskedMaxPool2d(3, 2, padding=min(padding, 1)),
        PartialConv2d(8, 12, 3, padding=padding),
        nn.LeakyReLU(0.1),
        PartialConv2d(12, 6, 3, stride=2, padding=padding),
    ]
    randomise(layers)
    return layers


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("hole", [(1, 1), (9, 9), (4, 13), (31, 2), (41, 38)])
def test_holes_at_every_place(padding: int, hole: tuple[int, int], device: str) -> None:
    """All borders, all corners, every alignment to the strides."""
    size = (41, 38)
    starts = [range(0, size[i] - hole[i] + 1, 1 + (size[i] - hole[i]) // 11) for i in range(2)]
    places = [*itertools.product(*starts), (size[0] - hole[0], size[1] - hole[1])]
    images = torch.randn(1, 3, *size, device=device)
    layers = [layer.to(device) for layer in small_global_net(padding)]
    assert_equal_to_hole_by_hole(layers, images, torch.tensor(places, device=device), hole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_dtype(dtype: torch.dtype, device: str) -> None:
    layers = [layer.to(device, dtype) for layer in small_global_net()]
    images = torch.randn(2, 3, 41, 38, device=device, dtype=dtype)
    origins = torch.tensor([[0, 0], [13, 9], [32, 29]], device=device)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert_equal_to_hole_by_hole(layers, images, origins, (9, 9), tolerance)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=str
)
def test_gradients_equal_hole_by_hole(dtype: torch.dtype, tolerance: float, device: str) -> None:
    layers = [layer.to(device, dtype) for layer in small_global_net(1)]
    origins = torch.tensor([[[0, 0], [13, 9]], [[20, 3], [32, 29]]], device=device)
    images = torch.randn(2, 3, 41, 38, device=device, dtype=dtype, requires_grad=True)
    leaves = [images, *(value for layer in layers for value in layer.parameters())]
    shared = HoleFeatures(layers)
    got = shared(images, shared.plan((41, 38), 9, origins, device=device, dtype=dtype))
    expected = hole_by_hole(layers, images, origins, (9, 9))
    grad = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(got, leaves, grad),
        torch.autograd.grad(expected, leaves, grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_gradients_of_the_base_maps_stay_channels_last(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [PartialConv2d(3, 8, 3), nn.LeakyReLU(0.1), MaskedMaxPool2d(2), nn.Conv2d(8, 8, 3)]
    layout: list[bool] = []
    real = HoleFeatures._base_pass

    def watched(self: HoleFeatures, images: Tensor) -> list[Tensor]:
        bases = real(self, images)
        for base in bases[1:-1]:
            base.register_hook(
                lambda grad: layout.append(grad.is_contiguous(memory_format=torch.channels_last))
            )
        return bases

    monkeypatch.setattr(HoleFeatures, "_base_pass", watched)
    shared = HoleFeatures([layer.to(device) for layer in layers])
    origins = torch.tensor([[2, 3], [10, 8]])
    images = torch.rand(2, 3, 24, 24, device=device)
    for own in (origins, origins.expand(2, -1, -1)):
        layout.clear()
        plan = shared.plan(24, 5, own, device=device)
        shared(images, plan).square().sum().backward()
        assert layout == [True, True]  # torch's other ops are slow where the layouts differ


def test_what_a_hole_hides_does_not_leak(device: str) -> None:
    layers = [layer.to(device) for layer in small_global_net()]
    images = torch.randn(1, 3, 41, 38, device=device)
    images[0, :, 16, 12] = float("nan")
    origins = torch.tensor([[10, 5], [0, 0]])
    shared = HoleFeatures(layers)
    with torch.no_grad():
        hidden, seen = shared(images, shared.plan((41, 38), 9, origins, device=device))[0]
    assert hidden.isfinite().all()
    assert seen.isnan().any()


def test_channels_last_and_strided_images_change_nothing(device: str) -> None:
    shared = HoleFeatures([layer.to(device) for layer in small_global_net()])
    images = torch.randn(2, 3, 41, 38, device=device)
    plan = shared.plan((41, 38), 9, torch.tensor([[3, 4], [20, 20]]), device=device)
    wide = torch.full((2, 3, 82, 38), float("nan"), device=device)
    wide[:, :, ::2] = images
    with torch.no_grad():
        expected = shared(images, plan)
        for same in (images.to(memory_format=torch.channels_last), wide[:, :, ::2]):
            torch.testing.assert_close(shared(same, plan), expected, rtol=0, atol=0)


def test_no_images_and_no_holes(device: str) -> None:
    shared = HoleFeatures([layer.to(device) for layer in small_global_net()])
    origins = torch.tensor([[3, 4], [20, 20]])
    images = torch.randn(2, 3, 41, 38, device=device)
    with torch.no_grad():
        some = shared(images, shared.plan((41, 38), 9, origins, device=device))
        none = shared(images[:0], shared.plan((41, 38), 9, origins, device=device))
        no_holes = shared(images, shared.plan((41, 38), 9, origins[:0], device=device))
    assert none.shape == (0, *some.shape[1:])
    assert no_holes.shape == (2, 0, *some.shape[2:])


def test_chunks_change_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = HoleFeatures([layer.to(device) for layer in small_global_net()])
    origins = torch.cartesian_prod(torch.arange(0, 32, 6), torch.arange(0, 29, 6))
    images = torch.randn(3, 3, 41, 38, device=device)
    with torch.no_grad():
        whole_plan = shared.plan((41, 38), 9, origins, device=device)
        whole = shared(images, whole_plan)
        for name in ("_CPU_BYTES", "_GPU_BYTES"):
            monkeypatch.setattr(f"glance_ext.nn.hole_features.{name}", 9_000)
        plan = shared.plan((41, 38), 9, origins, device=device)
        assert len(whole_plan.chunks) == 1
        assert len(plan.chunks) > 2
        torch.testing.assert_close(shared(images, plan), whole, rtol=0, atol=0)
    assert plan.multiply_adds == whole_plan.multiply_adds


class CountConvolutions(TorchDispatchMode):
    """Multiply-adds of the plain convolutions that run, and the fused steps."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = 0
        self.steps = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        if name.startswith("aten.convolution."):
            self.plain += result.numel() * args[1][0].numel()
        if name.startswith("glance_ext.hole_conv2d."):
            images = 1 if args[5].dim() == 4 else args[0].shape[0]
            self.steps += images * args[4].numel() * args[6].numel()
        if name.startswith("glance_ext.hole_sequence."):
            for base, cells, ratio, weight in zip(args[0], *args[3:6], strict=True):
                images = 1 if ratio.dim() == 4 else base.shape[0]
                self.steps += images * cells.numel() * (0 if weight is None else weight.numel())
        return result


def test_only_what_the_holes_reach_is_computed() -> None:
    layers = small_global_net()
    shared = HoleFeatures(layers)
    images = torch.randn(2, 3, 41, 38)
    origins = torch.tensor([[0, 0], [13, 9], [32, 29]])
    plan = shared.plan((41, 38), 9, origins)
    with torch.no_grad(), CountConvolutions() as whole:
        shared.base_pass(images)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients), CountConvolutions() as count:
            shared(images, plan)
        assert count.plain == whole.plain  # one pass without holes for each image
        assert count.steps == 2 * plan.multiply_adds
    # By brute force: the cells of each layer's output that change or would be counted anew.
    expected = changed_cells_work(layers, (41, 38), (9, 9), origins)
    assert plan.multiply_adds == expected


def changed_cells_work(
    layers: list[nn.Module], size: tuple[int, int], hole: tuple[int, int], origins: Tensor
) -> int:
    """Multiply-adds of the valid cells whose receptive field meets the hole."""
    work = 0
    for y, x in origins.tolist():
        mask = torch.ones(1, 1, *size)
        mask[..., y : y + hole[0], x : x + hole[1]] = 0
        reached = 1 - mask
        for layer in layers:
            if isinstance(layer, nn.ReLU | nn.LeakyReLU):
                continue
            kernel: Any = layer.kernel_size
            geometry = (kernel, layer.stride, layer.padding)
            reached = F.max_pool2d(reached, *geometry)
            mask = F.max_pool2d(mask, *geometry)
            if isinstance(layer, nn.Conv2d):
                work += int((reached * mask).sum()) * layer.weight.numel()
    return work


def test_masks_are_full_from_some_layer_on() -> None:
    shared = HoleFeatures(small_global_net())
    assert shared.plan((41, 38), 9, torch.tensor([[13, 9]])).full_from == 2  # the stem's and pool's
    assert shared.plan((41, 38), 2, torch.tensor([[13, 9]])).full_from == 1
    assert shared.plan((41, 38), 30, torch.tensor([[3, 4]])).full_from == 4


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)], "got layer 1 (BatchNorm2d)"),
        ([nn.Conv2d(3, 4, 3, padding_mode="reflect", padding=1)],
         "expected layer 0 (Conv2d) to have padding_mode='zeros', got 'reflect'"),
        ([nn.Sequential(nn.ReLU(), PartialConv2d(3, 4, 3, multi_channel=True))],
         "expected layer 1 (PartialConv2d) to have multi_channel=False, got True"),
        ([nn.Conv2d(3, 4, 2, padding="same")],
         "expected layer 0 (Conv2d) to have as much padding on either side, got"),
        ([nn.MaxPool2d(2, return_indices=True)], "to have return_indices=False, got True"),
        ([nn.LeakyReLU(-0.1)], "got layer 0 (LeakyReLU)"),
        ([nn.ReLU()], "expected at least one convolution or pooling, got none"),
    ],
)  # fmt: skip
def test_layers_that_cannot_be_planned_are_named(layers: list[nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=r"^HoleFeatures: expected") as caught:
        HoleFeatures(layers)
    assert message in str(caught.value)


def test_wrong_sizes_and_places_are_named() -> None:
    shared = HoleFeatures([nn.Conv2d(3, 4, 5), nn.MaxPool2d(3)])
    plan = shared.plan((20, 20), 3, torch.tensor([[[0, 0]], [[1, 1]]]))
    with pytest.raises(
        ValueError, match="expected images of 20x20 pixels like the plan, got 20x21"
    ):
        shared(torch.zeros(2, 3, 20, 21), plan)
    with pytest.raises(ValueError, match="expected 2 images like the plan, got 3"):
        shared(torch.zeros(3, 3, 20, 20), plan)
    outside = r"inside the 20x20 image, got hole 1 of 3x3 at row 18, column 0"
    with pytest.raises(ValueError, match=outside):
        shared.plan((20, 20), 3, torch.tensor([[0, 0], [18, 0]]))
    with pytest.raises(ValueError, match=r"integer origins of shape .* got torch.float32"):
        shared.plan((20, 20), 3, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="holes of at least one pixel"):
        shared.plan((20, 20), 0, torch.tensor([[0, 0]]))
    with pytest.raises(ValueError, match=r"layer 0 \(Conv2d\): expected an input of at least 5"):
        shared.plan((4, 20), 3, torch.tensor([[0, 0]]))
    deep = HoleFeatures([PartialConv2d(3, 4, 1, padding=1)])
    with pytest.raises(ValueError, match=r"layer 0 \(PartialConv2d\): expected every window to"):
        deep.plan((4, 20), 3, torch.tensor([[0, 0]]))


def test_a_plan_does_not_depend_on_what_was_planned_before() -> None:
    layers = small_global_net(1)
    random = torch.Generator().manual_seed(0)
    places = torch.cartesian_prod(torch.arange(33), torch.arange(30))
    sets = [places[torch.randperm(len(places), generator=random)[:7]] for _ in range(12)]
    sets += [torch.stack(sets[:3]), places[:0]]
    grown = [HoleFeatures(layers).plan((41, 38), 9, origins) for origins in sets]
    for origins, plan in zip(sets, grown, strict=True):
        hole_plan._axis_table.cache_clear()
        fresh = HoleFeatures(layers).plan((41, 38), 9, origins)
        assert plan.full_from == fresh.full_from
        assert plan.multiply_adds == fresh.multiply_adds
        for one, other in zip(plan.chunks, fresh.chunks, strict=True):
            assert torch.equal(one.extents, other.extents)
            for a, b in zip(one.steps, other.steps, strict=True):
                assert a.size == b.size
                for name in ("extents", "origins", "ratio", "cells"):
                    assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_what_has_been_planned_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    hole_plan._axis_table.cache_clear()
    worked_out: list[int] = []
    real = hole_plan._AxisTable._work_out

    def spy(table: Any, starts: Tensor) -> Any:
        worked_out.append(len(starts))
        return real(table, starts)

    monkeypatch.setattr(hole_plan._AxisTable, "_work_out", spy)
    for columns in ([1, 2, 1], [2, 1, 5], [5, 5, 5]):
        origins = torch.tensor([[3, column] for column in columns])
        HoleFeatures(small_global_net()).plan((41, 38), 9, origins)
    assert worked_out == [1, 2, 1]  # row 3; columns 1 and 2; 5 when it comes


@pytest.mark.parametrize("relu_first", [True, False])
def test_relu_makes_zero_of_minus_infinity_as_torchs_does(relu_first: bool) -> None:
    conv = nn.Conv2d(1, 2, 1)
    nn.init.ones_(conv.weight)
    layers = [nn.ReLU(), conv] if relu_first else [conv, nn.ReLU()]
    shared = HoleFeatures(layers)
    image = torch.rand(1, 1, 8, 8)
    image[..., 0, 0] = -torch.inf
    with torch.no_grad():
        expected = nn.Sequential(*layers)(image)
        found = shared(image, shared.plan(8, 2, torch.tensor([[4, 4]])))
    assert expected.isfinite().all()
    torch.testing.assert_close(found[0, 0, :, :4], expected[0, :, :4])
