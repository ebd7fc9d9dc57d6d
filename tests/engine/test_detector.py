import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from glance_ext.data.images import load_image, resize
from glance_ext.engine import detector as module
from glance_ext.engine.calibration import Calibration, HeadScale
from glance_ext.engine.checkpoint import load_checkpoint, save_checkpoint
from glance_ext.engine.detector import MODEL_FILE, MODEL_KIND, Detector, calibrate, resize_map
from glance_ext.errors import CheckpointError, GlanceError, InputError
from glance_ext.models.glance import Glance, GridPlan, HeadScores
from glance_ext.models.local_net import LocalNet
from glance_ext.ops import aggregate_patch_scores

RAW = Calibration(
    lambda_s=1.0,
    standardise=False,
    aggregation="mean",
    grid="8",
    inconsistency=HeadScale(0.0, 1.0),
    log_odds=HeadScale(0.0, 1.0),
    held_out_scores=(0.1, 0.2, 0.3, 0.4),
    pixel_range=(0.0, 0.4),
    optimistic=False,
)


class Brightness(Glance):
    """A model whose heads say how bright the middle of a patch is."""

    def __init__(self) -> None:
        super().__init__(LocalNet(5, 2))

    def score_grid(self, images: Tensor, plan: GridPlan) -> HeadScores:
        places = list(itertools.product(plan.local.row_starts, plan.local.column_starts))
        rows = [[image[:, r + 12 : r + 21, c + 12 : c + 21].mean() for r, c in places]
                for image in images]  # fmt: skip
        scores = torch.tensor(rows)
        return HeadScores(scores, torch.zeros_like(scores), torch.zeros_like(scores))


@pytest.fixture(scope="module")
def bright() -> Detector:
    return Detector(Brightness(), RAW)


@pytest.fixture(scope="module")
def real() -> Detector:
    torch.manual_seed(0)
    return Detector(Glance(LocalNet(5, 4)), RAW, {"steps": 3}, grid="33")


# ---------------------------------------------------------------- maps


@pytest.mark.parametrize(
    ("height", "width", "row", "column"),
    [(200, 600, 150, 100), (600, 200, 100, 150), (256, 256, 40, 200), (300, 300, 270, 30)],
)
def test_a_defect_is_found_where_it_is(
    bright: Detector, height: int, width: int, row: int, column: int
) -> None:
    image = np.full((height, width, 3), 0.2, np.float32)
    tall, wide = height // 16, width // 16
    image[row - tall // 2 : row + tall // 2, column - wide // 2 : column + wide // 2] = 1
    found = bright.detect(image)
    assert found.map.shape == (height, width)
    peak = np.unravel_index(found.map.argmax(), found.map.shape)
    assert abs(peak[0] - row) < height / 12
    assert abs(peak[1] - column) < width / 12
    far = found.map[height - 1 - row, width - 1 - column]
    assert far - 0.2 < 0.01 * (found.map.max() - 0.2)


@pytest.mark.parametrize("size", [(1, 1), (5, 300), (700, 40), (256, 256), (33, 34)])
def test_the_map_has_the_images_own_size(real: Detector, size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).random((*size, 3), np.float32)
    found = real.detect(image)
    assert found.map.shape == size
    assert found.map.dtype == np.float32
    assert np.isfinite(found.map).all()


def test_the_score_is_the_greatest_of_the_map_at_the_networks_resolution(real: Detector) -> None:
    image = np.random.default_rng(1).random((90, 400, 3), np.float32)
    found = real.detect(image)
    maps = real.score_maps(resize(image, (256, 256))[None])
    assert maps.shape == (1, 256, 256)
    assert found.score == float(maps.max())
    np.testing.assert_array_equal(found.map, resize_map(maps[0], (90, 400)))


def test_maps_of_a_batch_are_those_of_each_image(real: Detector) -> None:
    images = torch.rand(2, 3, 256, 256)
    together = real.score_maps(images)
    alone = torch.cat([real.score_maps(image[None]) for image in images])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("mode", ["mean", "gaussian", "max", "idw"])
def test_patches_are_aggregated_as_the_calibration_says(mode: str) -> None:
    detector = Detector(Brightness(), Calibration(**{**vars(RAW), "aggregation": mode}), grid="33")
    scores = torch.rand(1, len(detector.grid))
    found = detector.aggregate(scores)
    expected = aggregate_patch_scores(
        scores, 33, (256, 256), origins=detector.grid.origins, mode=mode
    )
    assert torch.equal(found, expected)


def test_a_map_is_resized_by_interpolation() -> None:
    ramp = torch.arange(256.0).expand(256, 256) / 255
    larger = resize_map(ramp, (100, 1024))
    assert larger.shape == (100, 1024)
    assert (np.diff(larger, axis=1) >= 0).all()  # smooth, not blocks
    assert np.unique(larger[0]).size > 900
    assert np.abs(larger - larger[:1]).max() < 1e-6
    np.testing.assert_array_equal(resize_map(ramp, (256, 256)), ramp.numpy())


# ---------------------------------------------------------------- inputs


def test_a_file_and_its_pixels_score_alike(real: Detector, tmp_path: Path) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (40, 70, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    by_path = real.detect(tmp_path / "a.png")
    assert by_path.score == real.detect(str(tmp_path / "a.png")).score
    by_array = real.detect(pixels.astype(np.float32) / np.float32(255))
    assert by_path.score == by_array.score
    np.testing.assert_array_equal(by_path.map, by_array.map)


def test_grey_and_16_bit_images_score_as_their_colours(real: Detector, tmp_path: Path) -> None:
    grey = np.random.default_rng(3).integers(0, 256, (50, 60), np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(np.repeat(grey[..., None], 3, 2)).save(tmp_path / "rgb.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    scores = {p.name: real.detect(p).score for p in tmp_path.iterdir()}
    assert len(set(scores.values())) == 1, scores


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.float32),
        np.zeros((4, 4, 4), np.float32),
        np.zeros((0, 4, 3), np.float32),
        np.full((4, 4, 3), 200, np.uint8),
        np.full((4, 4, 3), 1.5, np.float32),
        np.full((4, 4, 3), -0.1, np.float32),
        np.full((4, 4, 3), np.nan, np.float32),
    ],
)
def test_an_array_of_another_form_is_refused(real: Detector, image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="detect: expected"):
        real.detect(image)


def test_a_bad_file_is_an_input_error(real: Detector, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("none")
    for path in (tmp_path / "a.png", tmp_path / "missing.png", tmp_path):
        with pytest.raises(InputError):
            real.detect(path)


def test_a_cpu_without_memory_is_a_memory_error(
    real: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Tensor:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(module, "resize", full)
    with pytest.raises(MemoryError):
        real.detect(np.zeros((4, 4, 3), np.float32))


# ---------------------------------------------------------------- thresholds and grids


def test_the_threshold_comes_from_the_rate_or_from_the_caller() -> None:
    model = Brightness()
    assert Detector(model, RAW).threshold == 0.4
    assert Detector(model, RAW, false_positive_rate=0.5).threshold == 0.2
    assert Detector(model, RAW, threshold=-7.5).threshold == -7.5
    image = np.full((20, 20, 3), 0.3, np.float32)
    assert Detector(model, RAW, threshold=0.25).detect(image).anomalous
    assert not Detector(model, RAW, threshold=0.35).detect(image).anomalous
    score = Detector(model, RAW).detect(image).score
    assert not Detector(model, RAW, threshold=score).detect(image).anomalous


@pytest.mark.parametrize("threshold", [math.nan, math.inf, -math.inf])
def test_a_threshold_must_be_finite(threshold: float) -> None:
    with pytest.raises(GlanceError, match="threshold: expected a finite number"):
        Detector(Brightness(), RAW, threshold=threshold)


@pytest.mark.parametrize("rate", [-0.1, 1.0, math.nan])
def test_a_rate_must_be_a_share(rate: float) -> None:
    with pytest.raises(GlanceError, match="false_positive_rate"):
        Detector(Brightness(), RAW, false_positive_rate=rate)


def test_the_grid_is_the_calibrated_one_unless_named() -> None:
    assert Detector(Brightness(), RAW).grid.name == "8"
    assert len(Detector(Brightness(), RAW, grid="paper").grid) == 400
    with pytest.raises(GlanceError, match="expected 'paper' or a stride"):
        Detector(Brightness(), RAW, grid="0")


# ---------------------------------------------------------------- calibration


def test_calibration_scores_held_out_images_as_detection_does() -> None:
    torch.manual_seed(0)
    model = Glance(LocalNet(5, 4))
    images = list(torch.rand(3, 3, 256, 256))
    found = calibrate(
        model,
        images,
        lambda_s=0.3,
        standardise=True,
        aggregation="mean",
        grid="033",
        tile=False,
        optimistic=False,
        device="cpu",
    )
    assert found.grid == "33"
    detector = Detector(model, found)
    maps = detector.score_maps(torch.stack(images))
    assert found.held_out_scores == pytest.approx(maps.flatten(1).amax(1).tolist(), rel=1e-5)
    each = [np.quantile(one.numpy(), (0.5, 0.99)) for one in maps]
    assert found.pixel_range == pytest.approx(tuple(np.median(each, axis=0)), abs=1e-4)
    scores = model.score_patches(torch.stack(images), detector.grid.origins)
    mixed = found.mix(scores)
    assert float(mixed.mean()) == pytest.approx(0, abs=1e-4)  # both heads are standardised
    assert found.inconsistency.std == pytest.approx(float(scores.inconsistency.std()), rel=0.01)


# ---------------------------------------------------------------- files


def test_a_saved_detector_detects_the_same(real: Detector, tmp_path: Path) -> None:
    real.save(tmp_path / MODEL_FILE)
    image = np.random.default_rng(4).random((30, 30, 3), np.float32)
    expected = real.detect(image)
    for path in (tmp_path, tmp_path / MODEL_FILE, str(tmp_path)):
        again = Detector.load(path, grid="33")
        assert again.calibration == real.calibration
        assert again.settings == real.settings
        found = again.detect(image)
        assert found.score == expected.score
        np.testing.assert_array_equal(found.map, expected.map)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path / MODEL_FILE}: .*no such file"):
        Detector.load(tmp_path)


@pytest.mark.parametrize("drop", ["kernel_size", "features", "calibration", "settings"])
def test_an_incomplete_model_is_refused(real: Detector, tmp_path: Path, drop: str) -> None:
    real.save(tmp_path / "a")
    tensors, metadata = load_checkpoint(tmp_path / "a", MODEL_KIND)
    del metadata[drop]
    save_checkpoint(tmp_path / "a", MODEL_KIND, tensors, metadata)
    with pytest.raises(CheckpointError, match=f"metadata is incomplete: '{drop}'"):
        Detector.load(tmp_path / "a")


def test_a_model_of_another_shape_is_refused(real: Detector, tmp_path: Path) -> None:
    real.save(tmp_path / "a")
    tensors, metadata = load_checkpoint(tmp_path / "a", MODEL_KIND)
    save_checkpoint(tmp_path / "a", MODEL_KIND, tensors, {**metadata, "features": 5})
    with pytest.raises(CheckpointError, match="the tensors of 'model' do not fit"):
        Detector.load(tmp_path / "a")
    tensors.popitem()
    save_checkpoint(tmp_path / "a", MODEL_KIND, tensors, metadata)
    with pytest.raises(CheckpointError, match="do not fit"):
        Detector.load(tmp_path / "a")


def test_images_are_read_at_full_range(tmp_path: Path, bright: Detector) -> None:
    Image.fromarray(np.full((64, 64), 65535, np.uint16)).save(tmp_path / "white.png")
    assert load_image(tmp_path / "white.png").max() == 1
    assert bright.detect(tmp_path / "white.png").score == pytest.approx(1)
