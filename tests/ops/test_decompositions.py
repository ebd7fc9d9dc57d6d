"""Ops taken apart into ATen's: the same numbers, and models that other runtimes can run."""

import io
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from glance_ext import _library, ops
from glance_ext.nn import PartialConv2d
from glance_ext.ops import reference
from glance_ext.ops.decompositions import partial_conv2d as decomposed
from glance_ext.testing import assert_matches_reference
from tests.ops.test_partial_conv import (
    DTYPES,
    Call,
    absolute,
    calls,
    native,
    property_test,
    with_gradients,
)


def every_tap_is_seen(call: Call) -> bool:
    stride, padding, dilation, _ = call.geometry
    for axis in (0, 1):
        size, taps = call.input.shape[2 + axis], call.weight.shape[2 + axis]
        reach = dilation[axis] * (taps - 1) + 1
        outputs = (size + 2 * padding[axis] - reach) // stride[axis] + 1
        for tap in range(taps):
            first = tap * dilation[axis] - padding[axis]
            if not any(0 <= first + out * stride[axis] < size for out in range(outputs)):
                return False
    return True


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@property_test
@given(data=st.data())
def test_decomposition_matches_the_reference_forward_and_backward(
    dtype: torch.dtype, data: st.DataObject
) -> None:
    call = data.draw(calls(dtype))
    # torch's own backward in bfloat16 and channels_last leaves the gradient of taps that see only
    # padding as it found the memory; ours zeroes it.
    assume(dtype != torch.bfloat16 or every_tap_is_seen(call))
    output, mask_out = native(*call.to(dtype))
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = with_gradients(decomposed, call.to(dtype), grad)
    exact = with_gradients(reference.partial_conv2d, call.to(torch.float64), grad)
    same = with_gradients(reference.partial_conv2d, call.to(dtype), grad)
    sizes = with_gradients(reference.partial_conv2d, absolute(call.to(torch.float64)), grad.abs())
    assert torch.equal(got[1], mask_out)
    assert got[1].dtype == mask_out.dtype
    for i in (0, *range(2, len(got))):
        largest = float(sizes[i].detach().abs().max()) if sizes[i].numel() else 1.0
        assert_matches_reference(got[i], exact[i], same[i], scale=max(1.0, largest))


@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
def test_decomposition_applies_the_activation(slope: float) -> None:
    image, mask = example(2, 9, 11, 3)
    weight, bias = torch.randn(4, 3, 3, 3), torch.randn(4)
    arguments = (image, mask, weight, bias, [2, 1], [1, 0], [1, 1], 1, slope)
    output, mask_out = decomposed(*arguments)
    expected, expected_mask = reference.partial_conv2d(*arguments)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(mask_out, expected_mask)


class Net(nn.Module):
    """Two layers, one with groups, and an activated convolution: one mask from end to end."""

    def __init__(self, multi_channel: bool = False) -> None:
        super().__init__()
        settings: dict[str, Any] = {"multi_channel": multi_channel, "return_mask": True}
        self.first = PartialConv2d(3, 8, 5, stride=2, padding=2, **settings)
        self.second = PartialConv2d(8, 4, 3, padding=1, groups=2, **settings)
        self.third = nn.Parameter(torch.randn(5, 4, 1, 1))

    def forward(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        hidden, mask = self.first(image, mask)
        hidden, mask = self.second(hidden.relu(), mask)
        return ops.partial_conv2d(hidden, mask, self.third, negative_slope=0.2)


def example(batch: int, height: int, width: int, channels: int) -> tuple[Tensor, Tensor]:
    mask = torch.rand(batch, channels, height, width) > 0.4
    mask[..., : height // 2, : width // 2] = False
    image = torch.randn(batch, 3, height, width)
    return torch.where(mask, image, torch.nan), mask


ANY_SIZE = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)


def export(net: nn.Module, channels: int = 1) -> torch.export.ExportedProgram:
    arguments = example(2, 16, 18, channels)
    return torch.export.export(net, arguments, dynamic_shapes=(ANY_SIZE, ANY_SIZE))


def operators(program: torch.export.ExportedProgram) -> set[str]:
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    return {target.namespace for target in calls if isinstance(target, torch._ops.OpOverload)}


@pytest.mark.parametrize("multi_channel", [False, True])
def test_exported_program_holds_the_op_until_it_is_taken_apart(multi_channel: bool) -> None:
    if not _library.is_loaded():
        pytest.skip("the native library is not built")
    net = Net(multi_channel)
    program = export(net, 3 if multi_channel else 1)
    assert "glance_ext" in operators(program)
    assert "glance_ext" in operators(program.run_decompositions())
    apart = program.run_decompositions(
        {**torch.export.default_decompositions(), **ops.decompositions()}
    )
    assert operators(apart) <= {"aten", "prims"}
    image, mask = example(3, 21, 20, 3 if multi_channel else 1)
    expected = net(image, mask)
    for module in (program.module(), apart.module()):
        output, mask_out = module(image, mask)
        torch.testing.assert_close(output, expected[0])
        assert torch.equal(mask_out, expected[1])


@pytest.mark.parametrize("multi_channel", [False, True])
@pytest.mark.filterwarnings("ignore")  # of the exporter about itself
def test_onnx_model_holds_standard_operators_and_gives_the_same_numbers(
    multi_channel: bool,
) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    net, channels = Net(multi_channel).eval(), 3 if multi_channel else 1
    program = torch.onnx.export(
        net,
        example(2, 16, 18, channels),
        dynamo=True,
        dynamic_shapes=(ANY_SIZE, ANY_SIZE),
        verbose=False,
    )
    assert program is not None
    file = io.BytesIO()
    program.save(file)
    model = onnx.load_from_string(file.getvalue())
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    assert "Conv" in {node.op_type for node in model.graph.node}

    image, mask = example(3, 21, 20, channels)
    names = [value.name for value in model.graph.input]
    inputs = dict(zip(names, (image.numpy(), mask.numpy()), strict=True))
    output, mask_out = ReferenceEvaluator(model).run(None, inputs)
    with torch.no_grad():
        expected, expected_mask = net(image, mask)
    torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.from_numpy(mask_out), expected_mask)
