"""PartialConv2d in the place of NVIDIA's layer: weights both ways, binary masks, soft masks."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glance_ext.nn import HoleFeatures, PartialConv2d
from glance_ext.ops import partial_conv2d, soft_partial_conv2d
from tests.nn.nvidia import NvidiaPartialConv2d

GEOMETRIES: list[dict[str, Any]] = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": (2, 1), "dilation": (2, 1)},
    {"groups": 2, "padding": 1},
]
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
every_mask = pytest.mark.parametrize("multi_channel", [False, True], ids=["single", "multi"])
FLOAT32 = torch.finfo(torch.float32).eps


def layers(
    geometry: dict[str, Any], multi_channel: bool, bias: bool = True, **ours: Any
) -> tuple[PartialConv2d, NvidiaPartialConv2d]:
    """Both layers with the same weights."""
    if multi_channel and "groups" in geometry:
        geometry = {**geometry, "groups": 1}  # NVIDIA's counts all groups together
    settings = {**geometry, "multi_channel": multi_channel, "return_mask": True, "bias": bias}
    layer, theirs = (
        PartialConv2d(4, 6, 3, **settings, **ours),
        NvidiaPartialConv2d(4, 6, 3, **settings),
    )
    theirs.load_state_dict(layer.state_dict())
    return layer, theirs


def holes(multi_channel: bool) -> Tensor:
    mask = (torch.rand(2, 4 if multi_channel else 1, 11, 10) > 0.5).float()
    mask[..., :6, :6] = 0
    return mask


def soft(multi_channel: bool) -> Tensor:
    return holes(multi_channel) * torch.rand(2, 4 if multi_channel else 1, 11, 10) * 0.2


def gradients(output: Tensor, image: Tensor, layer: nn.Module) -> tuple[Tensor, ...]:
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return torch.autograd.grad(output, [image, *layer.parameters()], grad)


@pytest.mark.parametrize("with_mask", [True, False])
@every_mask
@every_geometry
def test_binary_float32_masks_give_nvidias_output(
    geometry: dict[str, Any], multi_channel: bool, with_mask: bool
) -> None:
    """Without a bias: bit for bit where the ratio is divided, and not multiplied by a rounded
    reciprocal, which NVIDIA's layer gets from torch; that costs it two roundings."""
    ours, theirs = layers(geometry, multi_channel, bias=False)
    image = torch.randn(2, 4, 11, 10)
    mask = holes(multi_channel) if with_mask else None
    (output, mask_out), (expected, expected_mask) = ours(image, mask), theirs(image, mask)
    assert ((output - expected).abs() <= 2 * FLOAT32 * expected.abs()).all()
    assert torch.equal(mask_out.float().expand_as(expected_mask), expected_mask)
    theirs.divides_exactly = True
    assert torch.equal(output, theirs(image, mask)[0])


@every_mask
@every_geometry
def test_with_a_bias_only_nvidias_own_rounding_differs(
    geometry: dict[str, Any], multi_channel: bool
) -> None:
    """It adds the bias in the convolution and takes it off again before the ratio; here it is added
    once. So its roundings are of numbers up to the ratio, at most the window's size, times them."""
    ours, theirs = layers(geometry, multi_channel)
    image, mask = torch.randn(2, 4, 11, 10), holes(multi_channel)
    (output, mask_out), (expected, expected_mask) = ours(image, mask), theirs(image, mask)
    window = 9 * (4 if multi_channel else 1)
    sizes = expected.abs() + 2 * ours.bias.abs().reshape(-1, 1, 1)
    assert ((output - expected).abs() <= 2 * FLOAT32 * window * sizes).all()
    assert torch.equal(output == 0, expected == 0)
    assert torch.equal(mask_out, expected_mask)


@every_mask
@every_geometry
def test_gradients_are_nvidias(geometry: dict[str, Any], multi_channel: bool) -> None:
    ours, theirs = layers(geometry, multi_channel)
    image, mask = torch.randn(2, 4, 11, 10, requires_grad=True), holes(multi_channel)
    got = gradients(ours(image, mask)[0], image, ours)
    expected = gradients(theirs(image, mask)[0], image, theirs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5 * float(b.abs().max()), rtol=0)


def test_state_dict_loads_both_ways_whole_networks_too() -> None:
    def network(layer: type[nn.Module]) -> nn.Module:
        stem = layer(3, 8, 7, stride=2, padding=3, bias=False, multi_channel=True)
        return nn.ModuleDict({"stem": stem, "norm": nn.BatchNorm2d(8), "head": layer(8, 3, 3)})

    for source, target in (
        (NvidiaPartialConv2d, PartialConv2d),
        (PartialConv2d, NvidiaPartialConv2d),
    ):
        state = network(source).state_dict()
        other = network(target)
        assert list(other.state_dict()) == list(state)
        other.load_state_dict(state)
        for key, value in other.state_dict().items():
            assert torch.equal(value, state[key])


# Soft masks


@pytest.mark.parametrize("bias", [True, False])
@every_mask
@every_geometry
def test_soft_masks_follow_nvidias_rule(
    geometry: dict[str, Any], multi_channel: bool, bias: bool
) -> None:
    """In float64 and without the epsilon, so that nothing but the rule is compared."""
    ours, theirs = layers(geometry, multi_channel, bias, soft_mask=True)
    ours, theirs = ours.double(), theirs.double()
    theirs.epsilon = 1e-300
    image = torch.randn(2, 4, 11, 10, dtype=torch.float64, requires_grad=True)
    mask = soft(multi_channel).double()
    (output, mask_out), (expected, expected_mask) = ours(image, mask), theirs(image, mask)
    assert ((mask_out > 0) & (mask_out < 1)).any()
    torch.testing.assert_close(mask_out, expected_mask)
    torch.testing.assert_close(output, expected)
    for a, b in zip(
        gradients(output, image, ours), gradients(expected, image, theirs), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_without_the_flag_each_nonzero_value_is_valid() -> None:
    image, mask = torch.randn(2, 4, 11, 10), soft(False)
    layer, _ = layers({}, False)
    output, mask_out = layer(image, mask)
    expected, expected_mask = layer(image, mask.ne(0).float())
    assert torch.equal(output, expected)
    assert torch.equal(mask_out, expected_mask)
    layer.soft_mask = True
    assert not torch.allclose(layer(image, mask)[0], output)


@every_mask
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool], ids=str)
def test_soft_rule_of_a_binary_mask_is_the_plain_one(
    dtype: torch.dtype, multi_channel: bool
) -> None:
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    image, weight, bias = (torch.randn(s).to(kind) for s in [(2, 4, 11, 10), (6, 4, 3, 3), (6,)])
    mask = holes(multi_channel).to(dtype)
    output, mask_out = soft_partial_conv2d(image, mask, weight, bias, 2, 1)
    expected, expected_mask = partial_conv2d(image, mask, weight, bias, 2, 1)
    torch.testing.assert_close(output, expected)
    assert torch.equal(mask_out, expected_mask)
    assert mask_out.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_nearly_empty_soft_windows_stay_finite(dtype: torch.dtype) -> None:
    """NVIDIA's float16 layer divides by count + 0 there."""
    layer = PartialConv2d(1, 1, 3, soft_mask=True, return_mask=True, dtype=dtype)
    mask = torch.zeros(1, 1, 3, 6, dtype=dtype)
    mask[..., 0, 3] = 2.0**-14
    image = torch.full((1, 1, 3, 6), math.nan, dtype=dtype)
    image[..., 0, 3] = 1
    output, mask_out = layer(image, mask)
    assert output[..., 0].item() == 0
    assert mask_out.flatten().tolist() == [0, 2.0**-14, 2.0**-14, 2.0**-14]
    u = 2.0**-14
    expected = (layer.weight.double()[0, 0, 0, 2] * u * 9 + layer.bias.double()) * u
    torch.testing.assert_close(output[0, 0, 0, 1].double(), expected[0], rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("mode", ["reflect", "circular"])
def test_soft_masks_are_padded_with_their_values(mode: str) -> None:
    layer = PartialConv2d(1, 2, 3, padding=1, padding_mode=mode, soft_mask=True, return_mask=True)
    mask = torch.rand(6, 7) * 0.1
    image = torch.randn(1, 1, 6, 7)
    output, mask_out = layer(image, mask)
    padded = [nn.functional.pad(x, (1, 1, 1, 1), mode=mode) for x in (image, mask[None, None])]
    expected, expected_mask = soft_partial_conv2d(*padded, layer.weight, layer.bias)
    assert torch.equal(output, expected)
    assert torch.equal(mask_out, expected_mask)


def test_integer_masks_are_not_soft() -> None:
    layer = PartialConv2d(1, 2, 3, soft_mask=True)
    with pytest.raises(TypeError, match="mask to be bool or of a floating dtype, got uint8"):
        layer(torch.ones(1, 1, 4, 4), torch.ones(4, 4, dtype=torch.uint8))


def test_holes_of_a_soft_layer_cannot_be_planned() -> None:
    with pytest.raises(ValueError, match=r"\(PartialConv2d\) to have soft_mask=False, got True"):
        HoleFeatures(nn.Sequential(PartialConv2d(1, 2, 3, soft_mask=True)))


def test_soft_mask_is_in_the_repr() -> None:
    assert "soft_mask=True" in repr(PartialConv2d(1, 2, 3, soft_mask=True))
    assert "soft_mask" not in repr(PartialConv2d(1, 2, 3))
