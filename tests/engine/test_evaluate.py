from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from glance_ext.data.datasets import Sample
from glance_ext.engine.evaluate import (
    METRIC_NAMES,
    Scored,
    evaluate,
    paper_row,
    score_samples,
)
from glance_ext.errors import GlanceError, InputError, NoUsableInputError
from glance_ext.metrics import aupro, auroc, f1_max, image_metrics, pixel_metrics

SIZES = [(20, 30), (31, 17), (25, 25)]


def scored(defect: str, number: int, rng: np.random.Generator) -> Scored:
    size = SIZES[number % 3]
    mask = np.zeros(size, bool)
    if defect != "good":
        mask[3:9, 4:12] = True
    anomaly_map = (rng.normal(0, 1, size) + 1.2 * mask).astype(np.float32)
    path = Path(f"test/{defect}/{number:03}.png")
    sample = Sample(path, defect, None, PurePosixPath(f"{defect}/{number:03}"))
    return Scored(sample, float(anomaly_map.max()), anomaly_map, mask)


@pytest.fixture
def results() -> list[Scored]:
    rng = np.random.default_rng(0)
    return [scored(defect, i, rng) for defect in ("cut", "good", "dent") for i in range(4)]


def test_figures_are_those_of_the_metrics_themselves(results: list[Scored]) -> None:
    found = evaluate(results)
    labels = [r.sample.anomalous for r in results]
    image = image_metrics([r.score for r in results], labels)
    pixel = pixel_metrics([r.map for r in results], [r.mask for r in results], 0.3)
    assert found.metrics == {
        "image_AUROC": image.image_AUROC,
        "pixel_AUROC": pixel.pixel_AUROC,
        "pixel_AUPRO": pixel.pixel_AUPRO,
        "image_F1Max": image.image_F1Max,
        "pixel_F1Max": pixel.pixel_F1Max,
    }
    assert tuple(found.metrics) == METRIC_NAMES
    assert found.metrics["image_AUROC"] == auroc([r.score for r in results], labels)
    flat = np.concatenate([r.map.ravel() for r in results])
    truth = np.concatenate([r.mask.ravel() for r in results])
    assert found.metrics["pixel_AUROC"] == pytest.approx(auroc(flat, truth))
    assert found.metrics["pixel_F1Max"] == pytest.approx(f1_max(flat, truth).value)
    assert found.image_roc is not None
    assert np.trapezoid(found.image_roc[1], found.image_roc[0]) == pytest.approx(image.image_AUROC)


def test_each_defect_stands_against_all_good_images(results: list[Scored]) -> None:
    found = evaluate(results)
    assert list(found.per_defect) == ["cut", "dent"]
    for defect, figures in found.per_defect.items():
        part = [r for r in results if r.sample.defect in (defect, "good")]
        assert figures == {
            "images": 4,
            "image_AUROC": auroc([r.score for r in part], [r.sample.anomalous for r in part]),
            "pixel_AUPRO": aupro([r.map for r in part], [r.mask for r in part], 0.3),
        }


def test_without_anomalous_images_nothing_is_defined(results: list[Scored]) -> None:
    found = evaluate([r for r in results if not r.sample.anomalous])
    assert found.metrics == dict.fromkeys(METRIC_NAMES)
    assert found.per_defect == {}
    assert (found.image, found.pixel, found.image_roc) == (None, None, None)


def test_without_good_images_the_pixel_figures_remain(results: list[Scored]) -> None:
    found = evaluate([r for r in results if r.sample.anomalous])
    assert found.metrics["image_AUROC"] is None
    assert found.metrics["image_F1Max"] is None
    assert found.metrics["pixel_AUROC"] is not None
    assert found.per_defect["cut"]["image_AUROC"] is None
    assert found.per_defect["cut"]["pixel_AUPRO"] is not None


def test_a_perfect_zero_is_a_figure_not_a_missing_one(results: list[Scored]) -> None:
    turned = [Scored(r.sample, -r.score if r.sample.anomalous else 99.0, r.map, r.mask)
              for r in results]  # fmt: skip
    assert evaluate(turned).metrics["image_AUROC"] == 0.0


def test_no_result_is_an_error_of_its_own() -> None:
    with pytest.raises(NoUsableInputError, match="at least one usable test image"):
        evaluate([])


# ---------------------------------------------------------------- samples


class FakeDetector:
    """Gives a map of the image's size; runs out of memory where asked to."""

    batch_size = 3

    def detect_batch(self, images: list[np.ndarray]) -> list[Any]:
        if any(image.shape[0] == 13 for image in images):
            raise MemoryError
        return [SimpleNamespace(score=float(i.mean()), map=i[..., 0]) for i in images]


def write(path: Path, *size: int, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size, value, np.uint8)).save(path)
    return path


def test_samples_that_cannot_be_used_are_reported_and_left_out(tmp_path: Path) -> None:
    good = write(tmp_path / "good.png", 8, 9, value=100)
    broken = tmp_path / "broken.png"
    broken.write_bytes(good.read_bytes()[:30])
    marked = write(tmp_path / "mask.png", 8, 9)
    Image.fromarray(np.eye(8, 9, dtype=np.uint8) * 255).save(marked)
    other = write(tmp_path / "mask of another size.png", 9, 8, value=255)
    empty = write(tmp_path / "empty mask.png", 8, 9)
    large = write(tmp_path / "large.png", 13, 9)
    cases = [
        (good, "good", None, None),
        (broken, "good", None, broken),
        (good, "cut", marked, None),
        (good, "cut", other, other),
        (good, "cut", empty, empty),
        (good, "cut", tmp_path / "missing.png", tmp_path / "missing.png"),
        (large, "good", None, large),
        (good, "good", None, None),
    ]
    samples = [Sample(p, d, m, PurePosixPath("x")) for p, d, m, _ in cases]
    errors: list[InputError] = []
    results = score_samples(FakeDetector(), samples, errors.append)  # type: ignore[arg-type]
    assert [error.path for error in errors] == [str(bad) for *_, bad in cases if bad]
    assert [r.sample for r in results] == [samples[i] for i in (0, 2, 7)]
    assert not results[0].mask.any()
    assert results[0].mask.shape == (8, 9)
    np.testing.assert_array_equal(results[1].mask, np.eye(8, 9, dtype=bool))


# ---------------------------------------------------------------- the paper


@pytest.mark.parametrize("name", ["metal_nut", "Metal Nut", "METAL_NUT", "screw", "carpet"])
def test_a_category_is_found_under_either_name(name: str) -> None:
    row = paper_row(name)
    assert "Glance" in row
    assert all(0 <= value <= 1 for value in row.values())
    assert "category" not in row


def test_the_papers_mean_is_what_it_says() -> None:
    assert paper_row("mean")["Glance"] == pytest.approx(0.961)


def test_an_unknown_category_names_the_known_ones() -> None:
    with pytest.raises(GlanceError, match=r"bottle.*metal_nut.*got 'cookies'") as caught:
        paper_row("cookies")
    assert "mean" not in str(caught.value)
