import copy
import json
import math

import pytest
import torch

from glance_ext import _library
from glance_ext.bench import (
    SUITES,
    format_results,
    partial_conv,
    partial_conv_networks,
    patch_scores,
    result_file_name,
    run_suite,
    validate_results,
)
from glance_ext.bench.cases import Case, Variant, WrongResultError, check
from glance_ext.bench.limits import Work
from glance_ext.errors import GlanceError
from glance_ext.files import write_json
from glance_ext.ops import partial_conv2d

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def quick():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    told = []
    try:
        results = run_suite("ops", device="cpu", seed=3, quick=True, progress=told.append)
    finally:
        torch.set_num_threads(threads)
    return results, told


def conv_cases(shapes=partial_conv.QUICK_SHAPES, dtype=torch.float32):
    for shape in shapes:
        inputs = partial_conv._Inputs(shape, dtype, CPU, torch.Generator().manual_seed(0))
        yield inputs.case(backward=False)
        yield inputs.case(backward=True)


def score_case(mode, grid="paper", dtype=torch.float32, backward=False):
    shape = patch_scores.Shape(2, 9, 44, grid, mode)
    inputs = patch_scores._Inputs(shape, dtype, CPU, torch.Generator().manual_seed(0))
    return inputs.case(backward=backward)


def test_a_quick_run_measures_every_variant_of_every_case(quick):
    results, told = quick
    variants = {}
    for row in results["results"]:
        variants.setdefault(row["case"], set()).add(row["variant"])
    assert list(variants) == told
    assert len(told) == 2 * (len(partial_conv.QUICK_SHAPES) + len(patch_scores.QUICK_SHAPES))
    for case, names in variants.items():
        assert {"reference", "ours", "limit"} <= names
        if case.startswith("partial_conv2d"):
            assert {"conv2d", "nvidia"} <= names
        if "mean_stride4-regular" in case:
            assert "fold" in names
        assert ("copy" in names) == case.startswith("aggregate_patch_scores/forward/")
    for mode in ("mean", "gaussian", "max", "idw"):
        for direction in ("forward", "forward_backward"):
            assert any(f"{direction}/{mode}" in case for case in variants)
    for row in results["results"]:
        assert row["median_ms"] > 0
        if row["variant"] != "limit":
            assert row["max_error"] < 1e-3


def test_a_quick_run_says_where_and_how_it_was_measured(quick, tmp_path):
    results, _ = quick
    metadata = results["metadata"]
    assert metadata["threads"] == 1
    assert metadata["torch"] == torch.__version__
    assert metadata["gpu"] is None
    assert metadata["seed"] == 3
    assert metadata["quick"] is True
    assert metadata["rates"]["matrix_tflops"] > 0
    assert "quick run" in metadata["method"]
    first = "partial_conv2d/forward/3-4_k7s2p0_24x24_n2"
    assert metadata["shapes"][first]["input"] == [2, 3, 24, 24]
    assert metadata["repeats"][first]["ours"] == 3
    path = tmp_path / result_file_name(results)
    write_json(path, results)
    validate_results(json.loads(path.read_text(encoding="utf-8")), path.name)


def test_the_full_suite_has_the_layers_and_the_grids_it_promises():
    names = [shape.name for shape in partial_conv.SHAPES]
    assert names[0] == "3-16_k7s2p0_256x256_n64"
    assert sum(shape.channels_last for shape in partial_conv.SHAPES) == 2
    assert not partial_conv.SHAPES[0].input_grad
    grids = {(shape.mode, shape.grid) for shape in patch_scores.SHAPES}
    assert grids == {("mean", "regular")} | {
        (mode, grid) for mode in ("mean", "gaussian", "max", "idw") for grid in ("flush", "paper")
    }
    assert patch_scores.SHAPES[0].side == 253
    assert len(patch_scores.SHAPES[1].starts) == 57


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_passes_its_own_check(dtype):
    for case in conv_cases(dtype=dtype):
        check(case, dtype)
    for mode in ("mean", "gaussian", "max", "idw"):
        check(score_case(mode, dtype=dtype, backward=True), dtype)


def test_scores_for_max_are_all_different_in_low_precision():
    shape = patch_scores.SHAPES[3]
    assert shape.mode == "max"
    for dtype in (torch.bfloat16, torch.float16):
        scores = patch_scores._scores(shape, 3249, dtype, torch.Generator().manual_seed(0))
        assert torch.isfinite(scores).all()
        assert all(len(row.unique()) == 3249 for row in scores)


def test_nvidias_layer_agrees_with_ours_where_windows_are_empty():
    torch.manual_seed(0)
    image, weight, bias = torch.randn(1, 2, 12, 12), torch.randn(3, 2, 3, 3), torch.randn(3)
    mask = torch.ones(1, 1, 12, 12)
    mask[..., 2:8, 3:9] = 0
    found = partial_conv.nvidia_layer(image, mask, weight, bias, torch.ones(1, 1, 3, 3), 1, 1)
    wanted = partial_conv.partial_conv2d(image, mask, weight, bias, 1, 1)
    assert not wanted[1].all()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_fold_mean_is_the_mean_over_the_patches_of_a_pixel():
    scores = torch.tensor([[[1.0, 2.0], [3.0, 6.0]]])
    result = patch_scores.fold_mean(scores, 3, 5, 2)
    assert result.shape == (1, 5, 5)
    assert result[0, 0].tolist() == [1, 1, 1.5, 2, 2]
    assert result[0, 2, 2] == 3


def wrong_forward(layer):
    def changed(*args, **kwargs):
        output, mask_out = layer(*args, **kwargs)
        return output + 1e-2, mask_out

    return changed


def wrong_gradient(layer):
    def changed(*args, **kwargs):
        output, mask_out = layer(*args, **kwargs)
        return output + 0.01 * (output - output.detach()), mask_out

    return changed


def wrong_mask(layer):
    def changed(*args, **kwargs):
        output, mask_out = layer(*args, **kwargs)
        return output, ~mask_out

    return changed


def one_nan(layer):
    def changed(*args, **kwargs):
        output, mask_out = layer(*args, **kwargs)
        output[0, 0, 0, 0] = math.nan
        return output, mask_out

    return changed


@pytest.mark.parametrize(
    ("break_it", "backward", "result"),
    [
        (wrong_forward, False, "output"),
        (wrong_gradient, True, "grad_"),
        (wrong_mask, False, "mask_out"),
        (one_nan, False, "output"),
    ],
)
def test_a_wrong_partial_convolution_is_never_timed(monkeypatch, break_it, backward, result):
    monkeypatch.setattr(partial_conv, "partial_conv2d", break_it(partial_conv.partial_conv2d))
    case = list(conv_cases())[int(backward)]
    with pytest.raises(WrongResultError, match=f"expected variant ours to be within .* {result}"):
        check(case, torch.float32)


def test_a_wrong_variant_ends_the_run(monkeypatch):
    monkeypatch.setattr(partial_conv, "partial_conv2d", wrong_forward(partial_conv.partial_conv2d))
    monkeypatch.setattr(
        "glance_ext.bench.run.measure_interleaved", lambda *_: pytest.fail("it was timed")
    )
    with pytest.raises(GlanceError, match="variant ours"):
        run_suite("ops", quick=True)


def test_a_wrong_last_map_is_noticed(monkeypatch):
    right = patch_scores.aggregate_patch_scores

    def changed(*args, **kwargs):
        result = right(*args, **kwargs)
        result[-1, 5, 5] += 1e-2
        return result

    monkeypatch.setattr(patch_scores, "aggregate_patch_scores", changed)
    with pytest.raises(WrongResultError, match="ours"):
        check(score_case("gaussian"), torch.float32)


def test_a_wrong_yardstick_does_not_excuse_the_others():
    right = torch.ones(4, dtype=torch.float64)
    off = {name: Variant(lambda: {"y": right.float() + 0.1}, lambda: {"y": right}) for name in "ab"}
    case = Case("c", {}, Work(1, 1), off, yardstick="a")
    with pytest.raises(WrongResultError, match="variant a"):
        check(case, torch.float32)


def test_a_variant_of_another_shape_is_wrong():
    variant = Variant(lambda: {"y": torch.ones(1)}, lambda: {"y": torch.ones(4).double()})
    with pytest.raises(WrongResultError, match=r"shape \[4\], got \[1\]"):
        check(Case("c", {}, Work(1, 1), {"ours": variant}), torch.float32)


def test_least_work_of_a_convolution_by_hand():
    shape = partial_conv.Shape(1, 2, 5, 3, 3, hole=3)
    inputs = partial_conv._Inputs(shape, torch.float32, CPU, torch.Generator().manual_seed(0))
    inputs.mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    inputs.mask[..., 1:4, 1:4] = False
    # valid pixels in the nine windows: four corners with 5, four edges with 3, the middle with 0
    forward = inputs.case(backward=False).work
    assert forward.flops == 2 * (4 * 5 + 4 * 3) * 2 * 3
    parameters = 3 * 2 * 9 + 3
    assert forward.bytes == 4 * (16 * 2 + parameters + 27) + 25 + 9
    both = inputs.case(backward=True).work
    assert both.flops == 3 * forward.flops
    backward = 4 * (16 * 2 + 27 + parameters + 54 + 50) + 25
    assert both.bytes == forward.bytes + backward


def test_least_work_of_an_aggregation_by_hand():
    pixels, patches = 44 * 44, 400
    assert score_case("idw").work == Work(2.0 * 2 * patches * pixels, 4.0 * 2 * (patches + pixels))
    mean = score_case("mean").work
    assert mean.flops == 2 * 2 * (20 * 44 + pixels)
    assert score_case("max", backward=True).work.bytes == 4.0 * 2 * (3 * patches + 2 * pixels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "nothing"}, f"one of {', '.join(sorted(SUITES))}, got 'nothing'"),
        ({"name": "ops", "dtype": "int8"}, "one of float32, bfloat16, float16, got 'int8'"),
        ({"name": "ops", "device": "meta"}, "a cpu or cuda device"),
        ({"name": "ops", "without": ["ours"]}, "variant to leave out, one of .*, got 'ours'"),
        ({"name": "ops", "device": "toaster"}, "expected a device, got 'toaster'"),
    ],
)
def test_a_wrong_call_gets_one_line(arguments, message):
    with pytest.raises(GlanceError, match=message):
        run_suite(**arguments)


def test_variants_can_be_left_out(monkeypatch):
    def never():
        raise AssertionError("left out")

    right = Variant(lambda: {"y": torch.ones(2)}, lambda: {"y": torch.ones(2).double()})
    wrong = Variant(never, never)

    def suite(*_):
        yield Case("c", {}, Work(1, 1), {"ours": right, "nvidia": right, "nvidia-compiled": wrong})

    monkeypatch.setitem(SUITES, "ops", suite)
    results = run_suite("ops", quick=True, without=["nvidia-compiled"])["results"]
    assert {row["variant"] for row in results} == {"ours", "nvidia", "limit"}


def test_without_the_native_ops_nothing_is_measured_in_their_name(monkeypatch):
    monkeypatch.setattr("glance_ext._library.module", None)
    with pytest.raises(GlanceError, match="native ops"):
        run_suite("ops", quick=True)


def row(case, variant, median, peak=1.0):
    limit = variant == "limit"
    return {
        "suite": "ops",
        "case": case,
        "variant": variant,
        "device": "cpu",
        "dtype": "float32",
        "median_ms": median,
        "iqr_ms": 0.0,
        "peak_mib": None if limit else peak,
        "max_error": None if limit else 0.0,
    }


def test_the_table_shows_ratios_and_their_geometric_means(quick):
    results = copy.deepcopy(quick[0])
    results["results"] = [
        row("partial_conv2d/forward/a", "reference", 8.0),
        row("partial_conv2d/forward/a", "ours", 2.0, peak=3.0),
        row("partial_conv2d/forward/a", "conv2d", 1.6, peak=2.0),
        row("partial_conv2d/forward/a", "limit", 0.5),
        row("partial_conv2d/forward/b", "reference", 9.0),
        row("partial_conv2d/forward/b", "ours", 1.0),
        row("partial_conv2d/forward/b", "nvidia", 0.5),
        row("other/c", "ours", 1234.5),
        row("other/c", "copy", 1.0),
    ]
    text = format_results(results)
    lines = [line.split() for line in text.splitlines()]
    header = next(line for line in lines if line[:1] == ["case"])
    assert header[1:6] == ["reference", "nvidia", "ours", "conv2d", "limit"]
    a = next(line for line in lines if line[:1] == ["forward/a"])
    b = next(line for line in lines if line[:1] == ["forward/b"])
    mean = next(line for line in lines if line[:2] == ["geometric", "mean"])
    assert a == ["forward/a", "8", "-", "2", "1.6", "0.5", "4x", "-", "1.25x", "4x", "1.5x"]
    assert b == ["forward/b", "9", "0.5", "1", "-", "-", "9x", "0.5x", "-", "-", "-"]
    assert mean == ["geometric", "mean", "6x", "0.5x", "1.25x", "4x", "1.5x"]
    assert any(line[:2] == ["c", "1234"] for line in lines)


def test_a_quick_runs_table_names_every_case(quick):
    text = format_results(quick[0])
    for case in quick[1]:
        assert case.split("/", 1)[1] in text
    for heading in ("reference/ours", "nvidia/ours", "ours/conv2d", "ours/limit", "fold/ours"):
        assert heading in text


@pytest.mark.skipif(not _library.is_loaded(), reason="the native ops are not built")
def test_where_both_paths_are_timed_each_is_taken_forward_and_backward(monkeypatch):
    taken = []

    def note(_=None):
        path = _library.module.partial_conv_path("rule")
        _library.module.partial_conv_path(path)
        taken.append(path)

    def op(*arguments, groups):
        note()
        output, mask_out = partial_conv2d(*arguments, groups=groups)
        if output.requires_grad:
            output.register_hook(note)
        return output, mask_out

    monkeypatch.setattr(partial_conv, "partial_conv2d", op)
    for case, calls in zip(
        conv_cases([partial_conv_networks.QUICK_SHAPES[1]]), (1, 2), strict=True
    ):
        errors = check(case, torch.float32)
        for path in ("fused", "library"):
            assert f"ours-{path}" in errors
            taken.clear()
            case.variants[f"ours-{path}"].run()
            assert taken == [path] * calls
