"""PartialConv1d, PartialConv3d, PartialConvTranspose2d: in the places of torch's modules."""

import copy
import io
import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glance_ext.nn import PartialConv1d, PartialConv2d, PartialConv3d, PartialConvTranspose2d
from glance_ext.ops import (
    partial_conv1d,
    partial_conv2d,
    partial_conv3d,
    partial_conv_transpose2d,
    soft_partial_conv2d,
)

PLAIN = {
    PartialConv1d: nn.Conv1d,
    PartialConv3d: nn.Conv3d,
    PartialConvTranspose2d: nn.ConvTranspose2d,
}
SIDES = {PartialConv1d: (9,), PartialConv3d: (5, 6, 7), PartialConvTranspose2d: (5, 6)}
GEOMETRIES: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"stride": 2, "padding": 1},
    {"padding": 2, "dilation": 2},
    {"groups": 2, "padding": 1, "stride": 2},
]
every_kind = pytest.mark.parametrize("kind", list(PLAIN), ids=lambda kind: kind.__name__)
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
every_mask = pytest.mark.parametrize("multi_channel", [False, True], ids=["single", "multi"])


def example(
    kind: type, channels: int, multi_channel: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """An input with NaN behind its mask, a third of which is a hole."""
    sides = SIDES[kind]
    mask = torch.rand(2, channels if multi_channel else 1, *sides) > 0.4
    mask[(..., *(slice(0, 4) for _ in sides))] = False
    return torch.where(mask, torch.randn(2, channels, *sides, dtype=dtype), torch.nan), mask


def by_hand(layer: Any, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The contract tap by tap in float64: every output, every tap, one after the other."""
    transposed = isinstance(layer, nn.ConvTranspose2d)
    weight = layer.weight.double()
    groups, k, c = layer.groups, layer.out_channels, layer.in_channels
    if transposed:  # (C, K / groups, ...) as (K, C / groups, ...)
        parts = weight.reshape(groups, c // groups, k // groups, *weight.shape[2:])
        weight = parts.transpose(1, 2).reshape(k, c // groups, *weight.shape[2:])
    sizes = (
        getattr(nn, type(layer).__name__.removeprefix("Partial"))
        .forward(layer, torch.zeros_like(image))
        .shape[2:]
    )
    output = torch.zeros(image.shape[0], k, *sizes, dtype=torch.float64)
    mask_out = torch.zeros(image.shape[0], k, *sizes, dtype=torch.bool)
    group = torch.arange(k) // (k // groups)
    own = group[:, None] * (c // groups) + torch.arange(c // groups)  # (K, C / groups)
    many = mask.shape[1] != 1
    valid = mask.expand(image.shape).double()
    shown = torch.where(mask, image.double(), 0)
    for at in itertools.product(*map(range, sizes)):
        total = torch.zeros(image.shape[0], k, dtype=torch.float64)
        count = torch.zeros(image.shape[0], k, dtype=torch.float64)
        full = 0
        for tap in itertools.product(*map(range, layer.kernel_size)):
            place = []
            for o, t, s, p, d in zip(
                at, tap, layer.stride, layer.padding, layer.dilation, strict=True
            ):
                if not transposed:
                    place.append(o * s - p + t * d)
                elif (o + p - t * d) % s == 0:
                    place.append((o + p - t * d) // s)
            if len(place) < len(at):
                continue  # between the strides: no tap of this output
            full += c // groups
            if not all(0 <= x < n for x, n in zip(place, image.shape[2:], strict=True)):
                continue
            index = (slice(None), slice(None), *place)
            total += (shown[index][:, own] * weight[(slice(None), slice(None), *tap)]).sum(-1)
            count += valid[index][:, own].sum(-1)
        seen = count > 0
        value = total * full / count.clamp_min(1)
        if layer.bias is not None:
            value = value + layer.bias.double()
        output[(..., *at)] = torch.where(seen, value, 0)
        mask_out[(..., *at)] = seen
    return output, mask_out if many else mask_out[:, :1]


@every_mask
@every_geometry
@every_kind
def test_matches_the_contract_tap_by_tap(
    kind: type, geometry: dict[str, Any], multi_channel: bool
) -> None:
    layer = kind(4, 6, 3, multi_channel=multi_channel, return_mask=True, **geometry).double()
    image, mask = example(kind, 4, multi_channel, torch.float64)
    output, mask_out = layer(image, mask)
    expected, expected_mask = by_hand(layer, image, mask)
    torch.testing.assert_close(output, expected)
    assert torch.equal(mask_out, expected_mask)
    assert not mask_out.all()
    layer.return_mask = False
    assert torch.equal(layer(image, mask), output)


def test_brute_force_agrees_with_partial_conv2d() -> None:
    """So that the two cannot share a misunderstanding of the contract."""
    for multi_channel in (False, True):
        layer = PartialConv2d(
            4, 6, 3, 2, 1, groups=2, multi_channel=multi_channel, return_mask=True
        ).double()
        image, mask = example(PartialConvTranspose2d, 4, multi_channel, torch.float64)
        for a, b in zip(layer(image, mask), by_hand(layer, image, mask), strict=True):
            torch.testing.assert_close(a, b)


@every_geometry
@every_kind
def test_state_dict_is_that_of_torchs_module(kind: type, geometry: dict[str, Any]) -> None:
    plain, layer = PLAIN[kind](4, 6, 3, **geometry), kind(4, 6, 3, **geometry)
    assert list(layer.state_dict()) == list(plain.state_dict())
    layer.load_state_dict(plain.state_dict())
    for key, value in layer.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key])
    plain.load_state_dict(kind(4, 6, 3, **geometry).state_dict())


@every_mask
@pytest.mark.parametrize("geometry", [{}, {"stride": 2}, {"dilation": 2}, {"groups": 2}], ids=str)
@every_kind
def test_all_valid_equals_torchs_module(
    kind: type, geometry: dict[str, Any], multi_channel: bool
) -> None:
    plain, layer = PLAIN[kind](4, 6, 3, **geometry), kind(4, 6, 3, **geometry)
    layer.multi_channel = multi_channel
    layer.load_state_dict(plain.state_dict())
    image = torch.randn(2, 4, *(2 * side for side in SIDES[kind]))
    expected, output = plain(image), layer(image)
    if kind is PartialConvTranspose2d:  # its borders are reached by less than the full window
        expected, output = expected[..., 4:-4, 4:-4], output[..., 4:-4, 4:-4]
        assert output.numel() > 0
    torch.testing.assert_close(output, expected)


@every_kind
def test_gradients_are_right_in_float64(kind: type) -> None:
    layer = kind(2, 2, 3, stride=2, padding=1, groups=2).double()
    image, mask = example(kind, 2, dtype=torch.float64)
    image = image.nan_to_num().requires_grad_()
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(image: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(
            layer, dict(zip(names, parameters, strict=True)), (image, mask)
        )

    assert torch.autograd.gradcheck(run, (image, *values), fast_mode=False)
    assert torch.autograd.gradgradcheck(run, (image, *values), fast_mode=True)


def test_soft_gradients_are_right_in_float64() -> None:
    image = torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 1, 5, 4, dtype=torch.float64) * (torch.rand(2, 1, 5, 4) > 0.4)

    def run(*tensors: Tensor) -> Tensor:
        return soft_partial_conv2d(tensors[0], mask, *tensors[1:], 2, 1)[0]

    assert torch.autograd.gradcheck(run, (image, weight, bias))


@every_kind
def test_nan_behind_the_mask_reaches_no_gradient(kind: type) -> None:
    layer = kind(4, 6, 3, padding=1)
    image, mask = example(kind, 4)
    image.requires_grad_()
    layer(image, mask).sum().backward()
    assert image.grad is not None
    assert image.grad.isfinite().all()
    assert not image.grad[~mask.expand_as(image)].any()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@every_kind
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("form", ["sides", "batch", "one", "full"])
def test_masks_come_in_the_forms_of_partial_conv2d(
    kind: type, dtype: torch.dtype, form: str
) -> None:
    layer = kind(4, 6, 3, padding=1, return_mask=True)
    image, mask = example(kind, 4)
    mask = mask[:1] if form in ("sides", "one") else mask
    given = {"sides": mask[0, 0], "batch": mask[:, 0]}.get(form, mask).to(dtype)
    output, mask_out = layer(image.nan_to_num(), given)
    expected, expected_mask = layer(image.nan_to_num(), mask)
    assert torch.equal(output, expected)
    assert mask_out.dtype == dtype
    assert mask_out.shape[:2] == (1 if form in ("sides", "one") else 2, 1)
    assert torch.equal(mask_out.bool(), expected_mask)


@pytest.mark.parametrize("kind", [PartialConv1d, PartialConv3d])
@pytest.mark.parametrize("mode", ["replicate", "circular", "reflect"])
def test_padding_mode_pads_the_mask_like_the_input(kind: type, mode: str) -> None:
    layer = kind(2, 3, 3, padding=1, padding_mode=mode, return_mask=True)
    image, mask = example(kind, 2)
    sides = [1, 1] * len(SIDES[kind])
    op = {PartialConv1d: partial_conv1d, PartialConv3d: partial_conv3d}[kind]
    padded = nn.functional.pad(mask.float(), sides, mode=mode)
    expected = op(
        nn.functional.pad(image, sides, mode=mode), padded.bool(), layer.weight, layer.bias
    )
    for a, b in zip(layer(image, mask), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("kind", [PartialConv1d, PartialConv3d])
@pytest.mark.parametrize("kernel", [3, 4])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name_is_torchs(kind: type, kernel: int, padding: str) -> None:
    layer = kind(2, 3, kernel, padding=padding, bias=False)
    plain = PLAIN[kind](2, 3, kernel, padding=padding, bias=False)
    plain.load_state_dict(layer.state_dict())
    image = torch.randn(2, 2, *SIDES[kind])
    ones = torch.ones_like(image[:, :1])
    counting = PLAIN[kind](1, 1, kernel, padding=padding, bias=False)
    nn.init.ones_(counting.weight)
    torch.testing.assert_close(
        layer(image), plain(image) * kernel ** image[0, 0].dim() / counting(ones)
    )


@pytest.mark.parametrize("stride", [1, 2, 3, (3, 2)], ids=str)
@pytest.mark.parametrize("dilation", [1, 2])
def test_output_padding_and_size_are_torchs(stride: int, dilation: int) -> None:
    pad = 1 if stride != 1 or dilation != 1 else 0
    settings: dict[str, Any] = {"stride": stride, "dilation": dilation, "padding": 1}
    plain = nn.ConvTranspose2d(2, 3, 3, output_padding=pad, **settings)
    layer = PartialConvTranspose2d(2, 3, 3, output_padding=pad, return_mask=True, **settings)
    image, mask = torch.randn(1, 2, 4, 5), torch.rand(4, 5) > 0.5
    output, mask_out = layer(image, mask)
    assert output.shape == plain(image).shape
    assert mask_out.shape[2:] == output.shape[2:]
    size = [
        s + 1 if step > 1 else s
        for s, step in zip(
            nn.ConvTranspose2d(2, 3, 3, **settings)(image).shape[2:], layer.stride, strict=True
        )
    ]
    assert layer(image, mask, size)[0].shape[2:] == tuple(size)
    expected = partial_conv_transpose2d(
        image, mask, layer.weight, layer.bias, stride, 1, pad, 1, dilation
    )
    assert torch.equal(output, expected[0])


def test_upsampling_by_a_kernel_below_the_stride_leaves_gaps_at_zero() -> None:
    layer = PartialConvTranspose2d(1, 1, 1, stride=2, return_mask=True)
    nn.init.ones_(layer.weight)
    nn.init.ones_(layer.bias)
    output, mask = layer(torch.tensor([[[[5.0, 6.0]]]]), torch.tensor([[True, False]]))
    assert output.tolist() == [[[[6.0, 0.0, 0.0]]]]
    assert mask.tolist() == [[[[True, False, False]]]]


@every_kind
def test_multi_channel_layers_chain_from_one_channel(kind: type) -> None:
    first = kind(1, 4, 3, padding=1, multi_channel=True, return_mask=True)
    second = kind(4, 2, 3, padding=1, multi_channel=True, return_mask=True)
    image, mask = example(kind, 1)
    output, mask = second(*first(image, mask))
    assert output.shape == mask.shape == (2, 2, *SIDES[kind])


@every_kind
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_and_half_precision(kind: type, low: torch.dtype) -> None:
    layer = kind(4, 6, 3, padding=1, return_mask=True)
    image, mask = example(kind, 4)
    expected, expected_mask = layer(image, mask)
    with torch.autocast("cpu", low):
        output, mask_out = layer(image, mask.float())
    half, half_mask = copy.deepcopy(layer).to(low)(image.to(low), mask)
    for got in (output, half):
        assert got.dtype == low
        torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.05)
    assert torch.equal(mask_out, expected_mask.float())
    assert torch.equal(half_mask, expected_mask)


@every_kind
def test_compiles_in_one_graph_and_exports(kind: type) -> None:
    torch._dynamo.reset()
    layer = kind(4, 6, 3, padding=1, return_mask=True)
    image, mask = example(kind, 4)
    image = image.nan_to_num()
    expected = layer(image, mask)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    exported = torch.export.export(layer, (image, mask)).module()
    for form in (compiled, exported):
        for a, b in zip(form(image, mask), expected, strict=True):
            torch.testing.assert_close(a, b)


@every_kind
def test_survives_deepcopy_and_pickle_and_names_its_settings(kind: type) -> None:
    layer = kind(4, 6, 3, multi_channel=True, return_mask=True)
    assert repr(layer).endswith("multi_channel=True, return_mask=True)")
    image, mask = example(kind, 4, multi_channel=True)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        for a, b in zip(other(image, mask), layer(image, mask), strict=True):
            assert torch.equal(a, b)


# Messages


@every_kind
def test_mask_that_does_not_suit_the_layer_is_an_error(kind: type) -> None:
    image, mask = example(kind, 4)
    name = kind.__name__
    expected = f"{name}: expected mask_in to have 4 channels (multi_channel=True), got 1"
    with pytest.raises(ValueError, match=re.escape(expected)):
        kind(4, 6, 3, multi_channel=True)(image, mask)
    expected = f"{name}: expected mask_in to have 1 channels (multi_channel=False), got 4"
    with pytest.raises(ValueError, match=re.escape(expected)):
        kind(4, 6, 3)(image, mask.expand_as(image))
    with pytest.raises(ValueError, match=f"{name}: expected a mask_in that requires no gradient"):
        kind(4, 6, 3)(image, mask.float().requires_grad_())


def good(op: Any) -> dict[str, Any]:
    sides = {partial_conv1d: 1, partial_conv3d: 3}.get(op, 2)
    weight = (4, 3) if op is partial_conv_transpose2d else (6, 2)
    return {
        "input": torch.ones(2, 4, *[5] * sides),
        "mask": torch.ones(2, 1, *[5] * sides),
        "weight": torch.ones(*weight, *[3] * sides),
        "bias": torch.ones(6),
        "groups": 2,
    }


BAD = [
    ("input", lambda x: x.long(), TypeError, "input to be float32, float64, float16 or bfloat16"),
    ("input", lambda x: x[0], ValueError, "input to have "),
    ("mask", lambda x: x.long(), TypeError, "mask to be "),
    ("mask", lambda x: x[..., 1:], ValueError, "mask to be of the input's size [5"),
    ("mask", lambda x: x.flatten()[0], ValueError, "mask to have "),
    ("mask", lambda x: x.expand(2, 2, *x.shape[2:]), ValueError, "mask to have 1 or 4 channels"),
    ("mask", lambda x: torch.cat([x, x]), ValueError, "mask to have a batch of 1 or 2, got 4"),
    ("mask", lambda x: x.to("meta"), ValueError, "mask on the input's device cpu, got meta"),
    ("mask", lambda x: x.requires_grad_(), ValueError, "a mask that requires no gradient"),
    ("weight", lambda x: x[0], ValueError, "weight to have "),
    ("weight", lambda x: x.double(), TypeError, "weight of the input's float32, got float64"),
    ("weight", lambda x: x.to("meta"), ValueError, "weight on the input's device cpu, got meta"),
    ("bias", lambda x: x.half(), TypeError, "bias of the input's float32, got float16"),
    ("bias", lambda x: x[:4], ValueError, "bias of shape (6,), got [4]"),
    ("groups", lambda x: 3, ValueError, "groups to divide the input's 4 channels"),
    ("groups", lambda x: 0, ValueError, "groups to divide the input's 4 channels"),
    ("groups", lambda x: 1, ValueError, ""),
]
OPS = [partial_conv1d, partial_conv3d, soft_partial_conv2d, partial_conv_transpose2d]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("case", range(len(BAD)), ids=lambda i: f"{BAD[i][0]}-{BAD[i][3][:30]}")
def test_bad_arguments_are_named(op: Any, case: int) -> None:
    name, change, error, text = BAD[case]
    arguments = good(op)
    arguments[name] = change(arguments[name])
    if not text:
        parts = "bias of shape (3,), got [6]"
        text = parts if op is partial_conv_transpose2d else "weight of shape (6, 4, ...), got [6, 2"
    with pytest.raises(error, match=re.escape(f"{op.__name__}: expected {text}")):
        op(**arguments)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("value", [1.5, "same", (1, 2, 3, 4), True], ids=str)
def test_geometry_is_one_int_or_one_a_side(op: Any, value: Any) -> None:
    sides = good(op)["input"].dim() - 2
    expected = f"{op.__name__}: expected stride to be one or {sides} ints, got {value!r}"
    with pytest.raises(TypeError, match=re.escape(expected)):
        op(**good(op), stride=value)


def test_flat_volume_is_the_image() -> None:
    """Two ops of different dimensions say the same of the same pixels."""
    image, mask = example(PartialConvTranspose2d, 4)
    weight, bias = torch.randn(6, 4, 3, 3), torch.randn(6)
    output, mask_out = partial_conv2d(image, mask, weight, bias, 2, 1)
    flat = partial_conv3d(
        image[:, :, None], mask[:, :, None], weight[:, :, None], bias, (1, 2, 2), (0, 1, 1)
    )
    torch.testing.assert_close(flat[0][:, :, 0], output)
    assert torch.equal(flat[1][:, :, 0], mask_out)
