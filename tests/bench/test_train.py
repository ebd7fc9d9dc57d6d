from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from glance_ext.bench import run_suite
from glance_ext.bench import train as suite
from glance_ext.bench.cases import Outputs, Variant, WrongResultError, check
from glance_ext.errors import GlanceError
from glance_ext.models.local_net import LocalNet

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def setup() -> suite._Setup:
    return suite._Setup(torch.float32, CPU, 0)


def test_every_way_to_compute_a_step_gives_the_same_losses_and_gradients(setup) -> None:
    for shape in suite.QUICK_SHAPES:
        case = suite._Step(setup, shape).case()
        assert set(case.variants) == {"reference", "patches", "ours", "ours-anew"}
        errors = check(case, torch.float32)
        assert errors.keys() == case.variants.keys()
        assert all(0 < error.relative < 1e-3 for error in errors.values())
        results = case.variants["ours"].run()
        assert {"loss", "inconsistency", "distortion"} < results.keys()
        assert sum(name.startswith("grad_") for name in results) == 3


@pytest.mark.parametrize("uses", [2, 4])
def test_our_step_meets_a_share_of_its_patches_for_the_first_time(
    setup, monkeypatch, uses: int
) -> None:
    shape = suite.Shape(holes=4, positions="33", batch=8, stain_uses=uses)
    step = suite._Step(setup, shape)
    run = step.case().variants["ours"].run
    run()
    described = []
    real = LocalNet.forward
    monkeypatch.setattr(
        LocalNet,
        "forward",
        lambda net, patches: described.append(len(patches)) or real(net, patches),
    )
    for _ in range(3):
        described.clear()
        run()
        assert sum(described) == 2 * 8 / uses  # clean and stained


def test_a_wrong_step_is_noticed(setup, monkeypatch) -> None:
    real = suite.joint_stage
    monkeypatch.setattr(
        suite,
        "joint_stage",
        lambda model, images, settings, *others, **more: real(
            model, images, replace(settings, lambda_t=0.02), *others, **more
        ),
    )
    case = suite._Step(setup, suite.QUICK_SHAPES[1]).case()
    with pytest.raises(WrongResultError, match=r"variant ours-anew to be within .* in loss"):
        check(case, torch.float32)


@pytest.fixture(scope="module")
def low(one_thread: None) -> suite._Setup:
    return suite._Setup(torch.bfloat16, CPU, 0)


def test_a_step_in_bfloat16_is_right_by_the_norm_of_its_gradients(low) -> None:
    case = suite._Step(low, suite.QUICK_SHAPES[0]).case()
    errors = check(case, torch.bfloat16)
    assert set(errors) == {"reference", "patches", "ours-anew", "ours"}
    assert all(1e-4 < error.relative < 1 for error in errors.values())


def test_a_step_in_tf32_is_compared_likewise(monkeypatch) -> None:
    monkeypatch.setattr(suite, "uses_tf32", lambda device: device == CPU)
    case = suite._Step(suite._Setup(torch.float32, CPU, 0), suite.QUICK_SHAPES[0]).case()
    assert case.by_norm
    monkeypatch.undo()
    assert (
        not suite._Step(suite._Setup(torch.float32, CPU, 0), suite.QUICK_SHAPES[0]).case().by_norm
    )


@pytest.mark.parametrize("factor", [0.5, 0.0, -1.0, float("nan")])
def test_wrong_gradients_in_bfloat16_are_not_timed(low, factor: float) -> None:
    case = suite._Step(low, suite.QUICK_SHAPES[0]).case()
    right = case.variants["ours"]

    def wrong() -> Outputs:
        found = right.run()
        name = "grad_global_net.layers.4.weight"
        return found | {name: found[name] * factor}

    variants = {
        "reference": case.variants["reference"],
        "ours": Variant(wrong, right.expected),
    }
    with pytest.raises(WrongResultError, match=r"variant ours to be within .* in grad_global_net"):
        check(replace(case, variants=variants), torch.bfloat16)


def test_the_reference_calls_none_of_our_ops(setup) -> None:
    called = set()

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.add(func.namespace)
            return func(*args, **(kwargs or {}))

    variants = suite._Step(setup, suite.QUICK_SHAPES[1]).case().variants
    with Spy():
        variants["reference"].run()
    assert "aten" in called
    assert "glance_ext" not in called
    with Spy():
        variants["ours"].run()
    assert "glance_ext" in called


def test_the_least_work_falls_with_the_patches_that_share_an_image(setup) -> None:
    one, many = (suite._Step(setup, suite.Shape(holes)).case().work for holes in (1, 8))
    assert many.flops < 0.5 * one.flops  # what is left is Local-Net's, of the new patches
    assert many.bytes < one.bytes


def test_a_dtype_that_training_does_not_compute_in_is_refused() -> None:
    with pytest.raises(GlanceError, match=r"expected float32 or bfloat16, got torch\.float16"):
        run_suite("train", dtype="float16", quick=True)
