"""Detection by what patches share, against the patch-by-patch specification and in every dtype."""

import contextlib

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from glance_ext.engine.calibration import Calibration, HeadScale
from glance_ext.engine.detector import Detector
from glance_ext.engine.graph import GraphedFunction
from glance_ext.engine.precision import rounding
from glance_ext.errors import GlanceError
from glance_ext.models.glance import Glance, HeadScores
from glance_ext.models.local_net import LocalNet
from glance_ext.ops import aggregate_patch_scores

STANDARDISED = Calibration(
    lambda_s=0.5,
    standardise=True,
    aggregation="mean",
    grid="33",
    inconsistency=HeadScale(2.0, 1.0),
    log_odds=HeadScale(0.0, 0.3),
    held_out_scores=(0.1,),
    pixel_range=(0.0, 0.4),
    optimistic=False,
)


@pytest.fixture(scope="module")
def model() -> Glance:
    torch.manual_seed(0)
    return Glance(LocalNet(5, 16)).eval()


@pytest.fixture(scope="module")
def scene() -> Tensor:
    """Two images with structure at every scale."""
    noise = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    waves = torch.sin(torch.arange(256) / 9)[:, None] * torch.cos(torch.arange(256) / 23)
    return (0.5 + 0.2 * waves + 0.3 * (noise - 0.5)).clamp(0, 1)


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference as a share of the expected map's range."""
    return float((found - expected).abs().max() / (expected.max() - expected.min()))


# ---------------------------------------------------------------- the specification


@pytest.mark.parametrize("grid", [pytest.param("paper", marks=pytest.mark.slow), "32"])
def test_the_shared_map_is_that_of_patches_one_by_one(
    model: Glance, scene: Tensor, grid: str
) -> None:
    detector = Detector(model, STANDARDISED, grid=grid)
    images = scene[:1]
    origins = detector.grid.origins
    mixed = STANDARDISED.mix(model.score_patches(images, origins))
    expected = aggregate_patch_scores(mixed, 33, 256, origins=origins)
    assert difference(detector.score_maps(images), expected) < 1e-4


@pytest.mark.parametrize("grid", ["4", "8", "paper"])
def test_no_pixel_is_blind(model: Glance, scene: Tensor, grid: str) -> None:
    detector = Detector(model, STANDARDISED, grid=grid)
    image = scene[:1]
    before = detector.score_maps(image)[0]
    for rows in (slice(0, 8), slice(248, 256)):
        for columns in (slice(0, 8), slice(248, 256)):
            defect = image.clone()
            defect[..., rows, columns] = torch.tensor([1.0, 0, 0])[:, None, None]
            change = (detector.score_maps(defect)[0] - before).abs()
            spread = before.max() - before.min()
            assert float(change[rows, columns].min()) > 1e-4 * float(spread)


# ---------------------------------------------------------------- batches


def test_the_grid_is_planned_once(
    model: Glance, scene: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = []
    real = Glance.plan

    def plan(self: Glance, *arguments: object, **options: object) -> object:
        plans.append(arguments)
        return real(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Glance, "plan", plan)
    detector = Detector(model, STANDARDISED)
    assert not plans  # a detector that only tells its threshold plans nothing
    for _ in range(3):
        detector.score_maps(scene)
    assert len(plans) == 1


@pytest.mark.parametrize("batch_size", [2, 3, 5])
def test_images_in_batches_score_as_each_does_alone(model: Glance, batch_size: int) -> None:
    rng = np.random.default_rng(0)
    sizes = [(256, 256), (40, 90), (300, 256), (33, 33), (256, 256)]
    images = [rng.random((*size, 3), np.float32) for size in sizes]
    together = Detector(model, STANDARDISED, batch_size=batch_size).detect_batch(images)
    alone = Detector(model, STANDARDISED)
    for image, found in zip(images, together, strict=True):
        expected = alone.detect(image)
        assert found.map.shape == image.shape[:2]
        assert found.score == pytest.approx(expected.score, rel=1e-5)
        np.testing.assert_allclose(found.map, expected.map, rtol=1e-4, atol=1e-4)


def test_no_more_images_than_the_batch_size_are_scored_together(
    model: Glance, scene: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    real = Glance.score_grid

    def score_grid(self: Glance, images: Tensor, plan: object) -> HeadScores:
        sizes.append(len(images))
        return real(self, images, plan)  # type: ignore[arg-type]

    monkeypatch.setattr(Glance, "score_grid", score_grid)
    detector = Detector(model, STANDARDISED, batch_size=2)
    assert detector.score_maps(scene.repeat(3, 1, 1, 1)[:5]).shape == (5, 256, 256)
    assert sizes == [2, 2, 1]
    with pytest.raises(GlanceError, match="batch_size: expected at least 1, got 0"):
        Detector(model, STANDARDISED, batch_size=0)


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize(("precision", "bound"), [("float32", 1e-4), ("bfloat16", 3e-2)])
def test_a_precision_is_as_near_to_float64_as_is_said(
    model: Glance, scene: Tensor, precision: str, bound: float
) -> None:
    exact = Detector(model, STANDARDISED, precision="float64").score_maps(scene)
    assert exact.dtype == torch.float64
    found = Detector(model, STANDARDISED, precision=precision).score_maps(scene)
    assert found.dtype == torch.float32
    off = difference(found, exact)
    assert off < bound
    if precision == "bfloat16":
        assert off > 1e-4  # the networks do compute in it


def test_heads_stay_in_float32_where_the_networks_are_bfloat16(
    model: Glance, scene: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = Glance.compare

    def compare(self: Glance, local: Tensor, around: Tensor, *context: object) -> HeadScores:
        parameters = {p.dtype for p in self.distortion_head.parameters()}
        networks = {p.dtype for p in [*self.local_net.parameters(), *self.global_net.parameters()]}
        seen.append((local.dtype, around.dtype, parameters, networks))
        return real(self, local, around, *context)

    monkeypatch.setattr(Glance, "compare", compare)
    scores = Detector(model, STANDARDISED, precision="bfloat16").score_patches(scene)
    wide, narrow = torch.float32, torch.bfloat16
    assert seen == [(wide, wide, {wide}, {narrow})]
    assert scores.inconsistency.dtype == scores.log_odds.dtype == wide
    assert {p.dtype for p in model.parameters()} == {wide}  # the caller's model is left as it was


def test_a_precision_that_cannot_be_had_is_named(model: Glance) -> None:
    with pytest.raises(GlanceError, match="expected float32 or bfloat16 on a CPU, got tf32"):
        Detector(model, STANDARDISED, precision="tf32")
    with pytest.raises(GlanceError, match=r"precision: expected one of float32, .* got 'half'"):
        Detector(model, STANDARDISED, precision="half")


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_products_are_rounded_to_tf32_only_where_asked(precision: str) -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    with rounding(precision):
        assert cudnn.allow_tf32 == matmul.allow_tf32 == (precision == "tf32")
    assert (cudnn.allow_tf32, matmul.allow_tf32) == before


# ---------------------------------------------------------------- CUDA graphs


class NothingFromTheHost(TorchDispatchMode):
    """Fails at what a CUDA graph cannot hold: values read back, tensors of Python's numbers."""

    FORBIDDEN = ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.name().split("::")[1]
        assert not name.startswith(self.FORBIDDEN), name
        return func(*args, **(kwargs or {}))


@pytest.fixture
def guarded() -> NothingFromTheHost:
    with pytest.raises(AssertionError), NothingFromTheHost():
        torch.ones(2).max().item()  # the guard itself works
    with pytest.raises(AssertionError), NothingFromTheHost():
        torch.tensor([1.0, 2.0])
    return NothingFromTheHost()


@pytest.mark.parametrize("grid", ["33", "paper"])
def test_scoring_can_be_part_of_a_cuda_graph(
    model: Glance, scene: Tensor, grid: str, guarded: NothingFromTheHost
) -> None:
    detector = Detector(model, STANDARDISED, grid=grid)
    expected = detector.score_patches(scene)  # plans, as the calls before a capture do
    with guarded:
        found = detector.score_patches(scene)
    assert torch.equal(found.inconsistency, expected.inconsistency)


def test_a_batch_of_another_size_runs_without_a_graph() -> None:
    calls = []

    def function(images: Tensor) -> HeadScores:
        calls.append(len(images))
        return HeadScores(images, images, images)

    graphed = GraphedFunction(function, torch.zeros(4, 3))
    for size in (1, 3, 5):
        assert graphed(torch.ones(size, 3)).log_odds.shape == (size, 3)
    assert graphed(torch.ones(4, 3, dtype=torch.float64)).log_odds.dtype == torch.float64
    assert calls == [1, 3, 5, 4]


class Recorded(GraphedFunction):
    """Captures a graph that is played back by hand: it doubles what is in its images."""

    def _capture(self, size: int) -> None:
        images = self._example[:size]
        output = HeadScores(*(torch.zeros(size, 3) for _ in range(3)))

        class Graph:
            def replay(self) -> None:
                for score in (output.inconsistency, output.distortion, output.log_odds):
                    score.copy_(2 * images)

        self._graphs[size] = Graph(), output  # type: ignore[assignment]


def test_each_size_has_a_graph_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    calls = []

    def function(images: Tensor) -> HeadScores:
        calls.append(len(images))
        return HeadScores(2 * images, images, images)

    graphed = Recorded(function, torch.zeros(4, 3), (1, 4))
    given = {size: torch.full((size, 3), float(size)) for size in (4, 1, 2)}
    found = {size: graphed(images).inconsistency for size, images in given.items()}
    assert all(torch.equal(found[size], 2 * given[size]) for size in given)
    assert graphed.captured == {1, 4}
    assert calls == [2]
    graphed(torch.ones(4, 3))
    assert torch.equal(found[4], 2 * given[4])  # later replays do not write over it


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("grid", ["33", "paper"])
def test_a_graph_scores_as_kernels_do_one_by_one(
    model: Glance, scene: Tensor, precision: str, grid: str
) -> None:
    options = {"device": "cuda", "precision": precision, "grid": grid}
    graphed = Detector(model, STANDARDISED, batch_size=2, **options)  # type: ignore[arg-type]
    eager = Detector(model, STANDARDISED, batch_size=4, **options)  # type: ignore[arg-type]
    first = graphed.score_patches(scene)
    kept = first.inconsistency.clone()
    for images in (scene, scene.flip(0), 1 - scene):
        found, expected = graphed.score_patches(images), eager.score_patches(images)
        for name in ("inconsistency", "distortion", "log_odds"):
            torch.testing.assert_close(
                getattr(found, name), getattr(expected, name), rtol=2e-3, atol=2e-3
            )
    assert torch.equal(first.inconsistency, kept)  # later replays do not write over it
    alone = graphed.score_patches(scene[1:]).inconsistency
    expected = eager.score_patches(scene)
    torch.testing.assert_close(alone, expected.inconsistency[1:], rtol=2e-3, atol=2e-3)
    assert graphed._score.captured == {1, 2}  # type: ignore[union-attr]
    model.cpu()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_scoring_that_cannot_be_captured_warns_and_goes_on() -> None:
    def function(images: Tensor) -> HeadScores:
        total = images + float(images.sum())  # reads back
        return HeadScores(total, total, total)

    graphed = GraphedFunction(function, torch.zeros(4, device="cuda"))
    with pytest.warns(RuntimeWarning, match="no CUDA graph of the scoring"):
        found = graphed(torch.ones(4, device="cuda"))
    assert found.log_odds.tolist() == [5.0] * 4


@pytest.mark.parametrize(
    ("size", "tile"),
    [
        ((256, 256), False),
        ((256, 256), True),
        ((300, 500), False),
        ((300, 500), True),
        ((40, 3000), False),
    ],
)
def test_a_gpu_finds_in_images_of_any_size_what_a_cpu_finds(
    model: Glance, device: str, size: tuple[int, int], tile: bool
) -> None:
    image = np.random.default_rng(0).random((*size, 3), np.float32)
    options = {"grid": "33", "tile": tile}
    expected = Detector(model.cpu(), STANDARDISED, **options).detect(image)  # type: ignore[arg-type]
    detector = Detector(model, STANDARDISED, device=device, **options)  # type: ignore[arg-type]
    together = detector.detect_batch([image, 1 - image])
    for found in (detector.detect(image), together[0]):
        assert found.map.shape == size
        span = float(np.ptp(expected.map))
        np.testing.assert_allclose(found.map, expected.map, atol=1e-3 * span)
        assert found.score == pytest.approx(expected.score, abs=1e-3 * span)
    model.cpu()
