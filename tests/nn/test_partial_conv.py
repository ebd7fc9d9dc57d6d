"""PartialConv2d: Conv2d's and NVIDIA's place, without hidden state."""

import copy
import io
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glance_ext.nn import PartialConv2d, convert_torch_pconv_state
from glance_ext.ops import partial_conv2d

GEOMETRIES: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"stride": 2, "padding": 1},
    {"padding": (2, 1), "dilation": (2, 1)},
    {"groups": 2, "padding": 1},
]
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)


def holes(*shape: int) -> Tensor:
    return (torch.rand(shape) > 0.5).float()


@every_geometry
def test_state_dict_is_that_of_conv2d(geometry: dict[str, Any]) -> None:
    conv, layer = nn.Conv2d(4, 6, 3, **geometry), PartialConv2d(4, 6, 3, **geometry)
    assert list(layer.state_dict()) == list(conv.state_dict())
    layer.load_state_dict(conv.state_dict())
    for key, value in conv.state_dict().items():
        assert torch.equal(layer.state_dict()[key], value)
    conv.load_state_dict(PartialConv2d(4, 6, 3, **geometry).state_dict())


@pytest.mark.parametrize("multi_channel", [False, True])
@pytest.mark.parametrize(
    "geometry", [g for g in GEOMETRIES if "padding" not in g] + [{"padding": "valid"}], ids=str
)
def test_all_valid_equals_conv2d(geometry: dict[str, Any], multi_channel: bool) -> None:
    conv = nn.Conv2d(4, 6, 3, **geometry)
    layer = PartialConv2d(4, 6, 3, multi_channel=multi_channel, **geometry)
    layer.load_state_dict(conv.state_dict())
    image = torch.randn(2, 4, 8, 7)
    mask = torch.ones(2, 4 if multi_channel else 1, 8, 7)
    torch.testing.assert_close(layer(image, mask), conv(image))
    assert torch.equal(layer(image), layer(image, mask))


@pytest.mark.parametrize("multi_channel", [False, True])
def test_without_a_mask_only_padding_is_missing(multi_channel: bool) -> None:
    layer = PartialConv2d(3, 5, 3, padding=1, multi_channel=multi_channel, return_mask=True)
    image = torch.randn(2, 3, 6, 6)
    ones = torch.ones(1, 3, 6, 6)
    share = F.conv2d(F.pad(ones, (1, 1, 1, 1)), torch.ones(1, 3, 3, 3)) / 27
    plain = F.conv2d(image, layer.weight, padding=1)
    output, mask = layer(image)
    torch.testing.assert_close(output, plain / share + layer.bias[:, None, None])
    assert mask.shape == (1, 5 if multi_channel else 1, 6, 6)
    assert mask.all()


def test_no_call_remembers_the_mask_of_the_one_before() -> None:
    """NVIDIA's layer keeps the ratio of the last mask and uses it again for the same shape."""
    layer = PartialConv2d(2, 3, 3, padding=1)
    image = torch.randn(1, 2, 8, 8)
    masks = [holes(1, 1, 8, 8), None, holes(1, 1, 8, 8), None]
    for mask in masks:
        fresh = PartialConv2d(2, 3, 3, padding=1)
        fresh.load_state_dict(layer.state_dict())
        assert torch.equal(layer(image, mask), fresh(image, mask))
    assert not torch.allclose(layer(image, masks[0]), layer(image))
    assert set(vars(layer)) == set(vars(PartialConv2d(2, 3, 3)))


def test_multi_channel_counts_each_group_for_itself() -> None:
    layer = PartialConv2d(4, 6, 3, groups=2, multi_channel=True, return_mask=True)
    image, mask = torch.randn(2, 4, 7, 7), holes(2, 4, 7, 7)
    mask[:, 2:, :4, :4] = 0
    output, mask_out = layer(image, mask)
    for g in range(2):
        half = PartialConv2d(2, 3, 3, multi_channel=True, return_mask=True)
        half.load_state_dict({k: v[3 * g : 3 * g + 3] for k, v in layer.state_dict().items()})
        own = slice(2 * g, 2 * g + 2)
        expected, expected_mask = half(image[:, own], mask[:, own])
        torch.testing.assert_close(output[:, 3 * g : 3 * g + 3], expected)
        assert torch.equal(mask_out[:, 3 * g : 3 * g + 3], expected_mask)


def test_multi_channel_layers_chain_from_one_channel() -> None:
    first = PartialConv2d(1, 4, 3, padding=1, multi_channel=True, return_mask=True)
    second = PartialConv2d(4, 2, 3, padding=1, multi_channel=True, return_mask=True)
    image, mask = torch.randn(2, 1, 6, 6), holes(2, 1, 6, 6)
    hidden, hidden_mask = first(image, mask)
    assert hidden_mask.shape == (2, 4, 6, 6)
    assert torch.equal(hidden_mask, F.max_pool2d(mask, 3, 1, 1).expand(2, 4, 6, 6))
    output, output_mask = second(hidden, hidden_mask)
    assert output.shape == output_mask.shape == (2, 2, 6, 6)


MASK_SHAPES = [(6, 7), (2, 6, 7), (2, 1, 6, 7), (1, 1, 6, 7), (2, 3, 6, 7), (1, 3, 6, 7)]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_mode_pads_the_mask_like_the_image(
    mode: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    multi_channel = len(shape) == 4 and shape[1] == 3
    layer = PartialConv2d(
        3, 4, 3, padding=(2, 1), padding_mode=mode, multi_channel=multi_channel, return_mask=True
    )
    image, mask = torch.randn(2, 3, 6, 7), holes(*shape).to(dtype)
    output, mask_out = layer(image, mask)
    four = mask if mask.dim() == 4 else mask.reshape(-1, 1, 6, 7)
    sides = (1, 1, 2, 2)
    expected, expected_mask = partial_conv2d(
        F.pad(image, sides, mode=mode),
        F.pad(four.float(), sides, mode=mode),
        layer.weight,
        layer.bias,
    )
    torch.testing.assert_close(output, expected)
    assert torch.equal(mask_out, expected_mask.to(dtype))
    assert mask_out.dtype == dtype


def test_padding_mode_by_hand() -> None:
    """A reflected pixel is as valid as the one that it copies."""
    layer = PartialConv2d(
        1, 1, (1, 3), padding=(0, 1), padding_mode="reflect", bias=False, return_mask=True
    )
    nn.init.ones_(layer.weight)
    image = torch.tensor([[[[1.0, 2.0, 4.0, 8.0]]]])
    output, mask = layer(image, torch.tensor([[0, 1, 0, 0]]).bool())
    # windows 2 1 2, 1 2 4, 2 4 8, 4 8 4, of which only the 2s are valid
    assert output.tolist() == [[[[6.0, 6.0, 6.0, 0.0]]]]
    assert mask.tolist() == [[[[True, True, True, False]]]]


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("shape", [(0, 1, 6, 7), (0, 6, 7), (6, 7)], ids=str)
def test_padding_mode_takes_an_empty_batch(mode: str, shape: tuple[int, ...]) -> None:
    layer = PartialConv2d(3, 4, 3, padding=1, padding_mode=mode)
    assert layer(torch.zeros(0, 3, 6, 7), torch.ones(shape)).shape == (0, 4, 6, 7)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("kernel", [1, 2, 3, 4, (2, 3), (3, 4)], ids=str)
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32], ids=str)
def test_same_padding_pads_as_conv2d_and_counts_it_as_missing(
    kernel: int | tuple[int, int], dilation: int, dtype: torch.dtype
) -> None:
    settings: dict[str, Any] = {"padding": "same", "dilation": dilation}
    layer = PartialConv2d(2, 3, kernel, return_mask=True, **settings)
    conv = nn.Conv2d(2, 3, kernel, **settings)
    conv.load_state_dict(layer.state_dict())
    image, mask = torch.randn(2, 2, 6, 7), holes(2, 1, 6, 7)
    output, mask_out = layer(image, mask.to(dtype))
    assert output.shape == conv(image).shape
    counting = torch.ones(1, 1, *layer.kernel_size)
    count = F.conv2d(mask, counting, padding="same", dilation=dilation)
    assert torch.equal(mask_out, (count > 0).to(dtype))
    plain = F.conv2d(image * mask, layer.weight, **settings)
    expected = plain * counting.numel() / count.clamp_min(1) + layer.bias[:, None, None]
    torch.testing.assert_close(output, torch.where(count > 0, expected, 0))


@pytest.mark.parametrize("mode", ["reflect", "circular"])
def test_same_padding_with_a_padding_mode(mode: str) -> None:
    conv = nn.Conv2d(2, 3, 4, padding="same", padding_mode=mode)
    layer = PartialConv2d(2, 3, 4, padding="same", padding_mode=mode)
    layer.load_state_dict(conv.state_dict())
    image = torch.randn(2, 2, 6, 7)
    torch.testing.assert_close(layer(image), conv(image))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32], ids=str)
def test_return_mask_gives_the_next_layers_mask(dtype: torch.dtype) -> None:
    layer = PartialConv2d(2, 3, 3, stride=2, return_mask=True)
    image, mask = torch.randn(2, 2, 9, 9), holes(2, 1, 9, 9)
    mask[:, :, :5, :5] = 0
    output, mask_out = layer(image, mask.to(dtype))
    assert torch.equal(mask_out, F.max_pool2d(mask, 3, 2).to(dtype))
    assert not output[:, :, 0, 0].any()
    layer.return_mask = False
    assert torch.equal(layer(image, mask.to(dtype)), output)


@pytest.mark.parametrize(
    ("multi_channel", "shape", "text"),
    [
        (False, (2, 3, 5, 5), "to have 1 channels (multi_channel=False), got 3"),
        (True, (2, 1, 5, 5), "to have 3 channels (multi_channel=True), got 1"),
        (True, (5, 5), "to have 3 channels (multi_channel=True), got 1"),
        (True, (2, 2, 5, 5), "to have 3 channels (multi_channel=True), got 2"),
    ],
)
def test_mask_that_does_not_suit_the_layer_is_an_error(
    multi_channel: bool, shape: tuple[int, ...], text: str
) -> None:
    layer = PartialConv2d(3, 4, 3, multi_channel=multi_channel)
    with pytest.raises(ValueError, match=re.escape(f"PartialConv2d: expected mask_in {text}")):
        layer(torch.ones(2, 3, 5, 5), torch.ones(shape))


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_mask_that_requires_a_gradient_is_an_error(mode: str) -> None:
    layer = PartialConv2d(3, 4, 3, padding=1, padding_mode=mode)
    mask = torch.ones(5, 5, requires_grad=True)
    with pytest.raises(ValueError, match="expected a mask_in that requires no gradient, got one"):
        layer(torch.ones(2, 3, 5, 5), mask)


def test_repr_is_that_of_conv2d_and_names_the_settings() -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    layer = PartialConv2d(3, 4, 3, padding=1, bias=False)
    assert layer.extra_repr() == conv.extra_repr()
    layer = PartialConv2d(3, 4, 3, padding=1, bias=False, multi_channel=True, return_mask=True)
    assert layer.extra_repr() == f"{conv.extra_repr()}, multi_channel=True, return_mask=True"


def test_layer_survives_deepcopy_and_pickle() -> None:
    layer = PartialConv2d(3, 4, 3, padding=1, multi_channel=True, return_mask=True)
    image, mask = torch.randn(1, 3, 5, 5), holes(1, 3, 5, 5)
    expected = layer(image, mask)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        for a, b in zip(other(image, mask), expected, strict=True):
            assert torch.equal(a, b)


def test_layer_works_in_channels_last_and_half_precision() -> None:
    layer = PartialConv2d(3, 4, 3, padding=1).to(torch.bfloat16, memory_format=torch.channels_last)
    image = torch.randn(2, 3, 6, 6).bfloat16().to(memory_format=torch.channels_last)
    output = layer(image, torch.zeros(6, 6, dtype=torch.bool))
    assert output.dtype == torch.bfloat16
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert not output.any()


# torch_pconv


def torch_pconv_state(prefix: str, bias: bool = True) -> dict[str, Tensor]:
    state = {
        f"{prefix}regular_conv.weight": torch.randn(4, 2, 3, 3),
        f"{prefix}mask_conv.weight": torch.ones(4, 2, 3, 3),
    }
    if bias:
        state[f"{prefix}bias"] = torch.randn(1, 4, 1, 1)
    return state


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "conv.", "encoder.0.conv."])
def test_torch_pconv_state_loads_into_the_layer(prefix: str, bias: bool) -> None:
    state = torch_pconv_state(prefix, bias)
    converted = convert_torch_pconv_state(state)
    layer = PartialConv2d(2, 4, 3, bias=bias)
    layer.load_state_dict({key.removeprefix(prefix): value for key, value in converted.items()})
    assert torch.equal(layer.weight, state[f"{prefix}regular_conv.weight"])
    if bias:
        assert torch.equal(layer.bias, state[f"{prefix}bias"].flatten())


def test_other_tensors_of_a_torch_pconv_network_pass_unchanged() -> None:
    others = {
        "norm.weight": torch.randn(4),
        "norm.bias": torch.randn(4),
        "head.bias": torch.randn(1, 4, 1, 1),
        "my_regular_conv.weight": torch.randn(1),
        "lone.mask_conv.weight": torch.zeros(2),
        "conv.regular_conv.scale": torch.randn(1),
    }
    state = {**torch_pconv_state("conv."), **others}
    converted = convert_torch_pconv_state(state)
    assert set(converted) == {"conv.weight", "conv.bias", *others}
    for key, value in others.items():
        assert converted[key] is value


def test_mask_convolution_that_is_not_all_ones_is_an_error() -> None:
    state = torch_pconv_state("conv.")
    state["conv.mask_conv.weight"][1, 1, 0, 2] = 0.5
    expected = "convert_torch_pconv_state: expected conv.mask_conv.weight to be all ones"
    with pytest.raises(ValueError, match=expected):
        convert_torch_pconv_state(state)
