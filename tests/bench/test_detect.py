import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from glance_ext.bench import detect, detect_truth, run_suite
from glance_ext.bench import detect_reference as plain
from glance_ext.bench.cases import Case, Variant, WrongResultError, check
from glance_ext.bench.limits import Work
from glance_ext.data.grid import patch_grid
from glance_ext.models.glance import Glance
from glance_ext.models.global_net import hole_masks
from glance_ext.models.local_net import LocalNet
from glance_ext.models.normalisation import normalise
from glance_ext.ops import aggregate_patch_scores

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")
FEW = [(0, 0), (3, 200), (223, 223), (100, 57)]


@pytest.fixture(scope="module")
def model() -> Glance:
    torch.manual_seed(0)
    model = Glance(LocalNet(5, 8)).eval().requires_grad_(False)
    for layer in (model.global_net.stem, *model.global_net.layers):
        layer.bias.uniform_(-0.5, 0.5)  # as trained ones are; new ones are 0
    return model


@pytest.fixture(scope="module")
def setup() -> detect._Setup:
    return detect._Setup(torch.float32, CPU, 0)


@pytest.fixture(scope="module")
def quick():
    told = []
    return run_suite("detect", seed=3, quick=True, progress=told.append), told


def test_the_references_features_are_those_of_each_patch_alone(model: Glance) -> None:
    images = normalise(torch.rand(2, 3, 256, 256))
    reference = plain.prepared(model)
    local = plain.local_features(reference, images, FEW)
    around = plain.global_features(reference, images, FEW)
    assert local.shape == around.shape == (2, 4, 8)
    masks = hole_masks(torch.tensor(FEW), 33, (256, 256))
    for i, image in enumerate(images):
        for j, (y, x) in enumerate(FEW):
            alone = model.local_net(image[None, :, y : y + 33, x : x + 33])[0]
            torch.testing.assert_close(local[i, j], alone, rtol=1e-4, atol=1e-4)
            alone = model.global_net(image[None], masks[j : j + 1])[0]
            torch.testing.assert_close(around[i, j], alone, rtol=1e-4, atol=1e-4)


def test_the_references_map_is_that_of_the_patch_by_patch_path(model: Glance) -> None:
    grid, images = 33, torch.rand(1, 3, 256, 256)
    origins = patch_grid(grid).origins
    scores = model.score_patches(images, origins)
    mixed = 0.8 * scores.inconsistency + 0.2 * scores.distortion
    expected = aggregate_patch_scores(mixed, 33, 256, origins=origins)
    found = plain.detect_maps(plain.prepared(model), images, patch_grid(grid).starts)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grid", ["4", "32", "paper"])
def test_folding_gives_the_mean_over_the_patches_on_every_grid(grid: str) -> None:
    starts = patch_grid(grid).starts
    scores = torch.rand(2, len(starts), len(starts))
    origins = patch_grid(grid).origins
    expected = aggregate_patch_scores(scores.flatten(1), 33, 256, origins=origins)
    torch.testing.assert_close(plain.fold_means(scores, starts), expected)


class OnlyTorch(TorchDispatchMode):
    """Fails for an op that is not torch's."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.namespace == "aten", func
        return func(*args, **(kwargs or {}))


def test_the_reference_calls_none_of_our_ops(model: Glance) -> None:
    reference, images = plain.prepared(model), torch.rand(1, 3, 256, 256)
    with OnlyTorch():
        plain.local_features(reference, images, FEW)
        plain.global_features(reference, images, FEW)
        plain.fold_means(torch.rand(1, 8, 8), patch_grid(33).starts)
    with OnlyTorch(), pytest.raises(AssertionError, match="glance_ext"):
        model.score_patches(images, torch.tensor(FEW))


def test_small_grids_are_known_whole_and_large_ones_at_corners_and_middle() -> None:
    (whole,) = detect_truth.blocks(patch_grid(16).starts)
    assert (whole.first, whole.last, len(whole.patches)) == (0, 256, 15)
    first, last, middle = detect_truth.blocks(patch_grid(4).starts)
    assert [patch_grid(4).starts[i] for i in first.patches] == [0, 4, 8]
    assert [patch_grid(4).starts[i] for i in last.patches] == [212, 216, 220, 223]
    assert (middle.first, middle.last, len(middle.patches)) == (126, 130, 9)


def test_a_blocks_pixels_are_the_means_of_the_patches_over_them() -> None:
    starts = patch_grid(4).starts
    scores = torch.rand(1, len(starts), len(starts), dtype=torch.float64)
    maps = plain.fold_means(scores, starts)
    for block in detect_truth.blocks(starts):
        of_block = block.patches_of(scores.flatten(1)[..., None])[0, :, 0]
        torch.testing.assert_close(block.means(of_block), block.pixels_of(maps)[0])
        assert block.origins[0] == (starts[block.patches[0]],) * 2


def test_the_truth_is_the_reference_in_float64(model: Glance) -> None:
    images = torch.rand(2, 3, 256, 256)
    truth = detect_truth.Truth(model, images)
    starts = patch_grid(33).starts
    found = truth(starts, 1)
    exact = plain.prepared(model).double()
    expected = plain.detect_maps(exact, images[1:].double(), starts)
    assert found["map"].dtype == torch.float64
    torch.testing.assert_close(found["map"], expected.flatten())


def test_the_base_pass_is_59_million_multiply_adds_an_image() -> None:
    assert detect.base_multiply_adds(Glance(LocalNet()).global_net) == 59_015_856


def test_windows_of_a_larger_image_lie_half_a_window_apart() -> None:
    image = torch.rand(1, 3, 512, 512)
    windows = detect.windows_of(image)
    assert windows.shape == (9, 3, 256, 256)
    assert torch.equal(windows[5], image[0, :, 128:384, 256:512])
    sides = [shape.side for shape in detect.SHAPES if shape.stage == "windows"]
    assert sides == [256, 512, 1024]
    assert detect.Shape("windows", 8, side=1024).windows == 49


def test_the_full_suite_has_the_grids_batches_and_sizes_it_promises() -> None:
    names = [shape.name.removeprefix("detect/") for shape in detect.SHAPES]
    assert len(set(names)) == len(names)
    growth = {f"map/stride4_n{n}" for n in (1, 2, 4, 8, 16)}
    growth |= {f"map/{grid}_n1" for grid in ("paper", "stride2", "stride8", "stride16")}
    growth |= {f"windows/stride8_{side}px" for side in (256, 512, 1024)}
    stages = ("local", "global", "scores", "aggregate")
    growth.add("alone/stride4_n1")
    assert set(names) == growth | {f"{s}/stride4_n{n}" for s in stages for n in (1, 16)}


def test_a_quick_run_measures_every_stage(quick) -> None:
    results, told = quick
    assert told == [shape.name for shape in detect.QUICK_SHAPES]
    variants: dict[str, set[str]] = {}
    for row in results["results"]:
        variants.setdefault(row["case"], set()).add(row["variant"])
    assert variants["detect/map/stride33_n1"] == {"reference", "ours", "patches", "limit"}
    assert variants["detect/alone/stride33_n1"] == {"reference", "ours", "limit"}
    assert variants["detect/map/stride33_n2"] == {"ours", "limit"}
    for stage in detect.STAGES:
        assert variants[f"detect/{stage}/stride33_n1"] == {"reference", "ours", "limit"}
    metadata = results["metadata"]
    for case, errors in metadata["relative_errors"].items():
        assert set(errors) == variants[case] - {"limit"}
        assert max(errors.values()) < 1e-5
    assert metadata["rates"]["matrix_by"].startswith(("matrix product", "convolution"))


def work_of(setup, stage: str, grid: str | int = 33, images: int = 1) -> Work:
    return detect._Inputs(setup, detect.Shape(stage, grid, images)).case().work


def test_the_least_work_of_detection_is_that_of_its_stages(setup) -> None:
    whole = work_of(setup, "map")
    parts = [work_of(setup, stage) for stage in detect.STAGES]
    assert whole.flops == sum(part.flops for part in parts)
    patches, n = 64, 128
    assert parts[2].flops == 2 * patches * ((2 * n + 1) * 128 + 129 + n)
    assert parts[3].bytes == 4 * (patches + 256 * 256)
    weights = sum(p.numel() for p in setup.model.parameters())
    assert whole.bytes == 4 * (3 * 256 * 256 + weights + 256 * 256)
    plan = setup.plan(33)
    assert parts[0].flops == 2 * plan.local.multiply_adds
    assert parts[1].flops == 2 * (plan.holes.multiply_adds + 59_015_856)
    assert work_of(setup, "map", images=2).flops == 2 * whole.flops


def broken(name: str, change):
    """Glance.score_grid with one of its scores changed."""
    right = Glance.score_grid

    def wrong(self, images, plan):
        scores = right(self, images, plan)
        change(getattr(scores, name))
        return scores

    return wrong


def add(*where):
    def change(scores):
        scores[where] += 0.1 * scores.abs().max()

    return change


@pytest.mark.parametrize("where", [(0, 0), (-1, -1)])
def test_a_wrong_score_of_the_first_or_last_image_is_noticed(setup, monkeypatch, where) -> None:
    monkeypatch.setattr(Glance, "score_grid", broken("inconsistency", add(*where)))
    case = detect._Inputs(setup, detect.Shape("map", 33, 2)).case()
    with pytest.raises(WrongResultError, match="expected variant ours to be within"):
        check(case, torch.float32)


def test_a_wrong_feature_is_noticed(setup, monkeypatch) -> None:
    right = LocalNet.dense

    def wrong(self, images, plan):
        return right(self, images, plan).roll(1, 1)

    monkeypatch.setattr(LocalNet, "dense", wrong)
    with pytest.raises(WrongResultError, match=r"ours .* in local"):
        check(detect._Inputs(setup, detect.Shape("local", 33)).case(), torch.float32)


def test_where_float64_says_nothing_the_reference_does() -> None:
    right, wrong = torch.ones(2), torch.tensor([1.0, 1.5])
    known = torch.ones(1, dtype=torch.float64)
    variants = {
        "reference": Variant(lambda: {"y": right}, lambda: {"y": known}, lambda y: y[:1]),
        "ours": Variant(lambda: {"y": wrong}, lambda: {"y": known}, lambda y: y[:1]),
    }
    case = Case("c", {}, Work(1, 1), variants, yardstick="reference", same_everywhere=True)
    with pytest.raises(WrongResultError, match=r"variant reference everywhere in y, got 0\.5"):
        check(case, torch.float32)
    wrong[1] = math.nan
    with pytest.raises(WrongResultError, match="got inf"):
        check(case, torch.float32)
    wrong[1] = 1
    assert check(case, torch.float32)["ours"].absolute == 0
