"""Evaluation of a detector on a labelled data set in the MVTec layout."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glance_ext.data.datasets import Sample
from glance_ext.data.images import load_mask
from glance_ext.engine.batches import detect_files
from glance_ext.engine.detector import Detector
from glance_ext.errors import TOO_LARGE, GlanceError, InputError, NoUsableInputError
from glance_ext.metrics import (
    ImageMetrics,
    PixelMetrics,
    UndefinedMetricError,
    aupro,
    auroc,
    image_metrics,
    pixel_metrics,
    roc_curve,
)

PRO_LIMIT = 0.3
METRIC_NAMES = ("image_AUROC", "pixel_AUROC", "pixel_AUPRO", "image_F1Max", "pixel_F1Max")
PAPER_TABLE = Path(__file__).resolve().parent.parent / "data" / "table1_mvtec_pro.csv"


@dataclass(frozen=True)
class Scored:
    """One test image with its result and its ground truth.

    Attributes:
        sample: The file and its label.
        score: The image's score.
        map: ``(H, W)`` float32.
        mask: ``(H, W)`` bool, True on defects.
    """

    sample: Sample
    score: float
    map: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class Evaluation:
    """All figures of an evaluation.

    Attributes:
        metrics: By the names of :data:`METRIC_NAMES`; None where a class is missing.
        per_defect: For each kind of defect its number of images, and its image AUROC and AUPRO
            against all good images.
        image: Image-level metrics with their F1 threshold, or None.
        pixel: Pixel-level metrics with both curves, or None.
        image_roc: False- and true-positive rates of the images, or None.
    """

    metrics: dict[str, float | None]
    per_defect: dict[str, dict[str, float | int | None]]
    image: ImageMetrics | None
    pixel: PixelMetrics | None
    image_roc: tuple[np.ndarray, np.ndarray] | None


def score_samples(
    detector: Detector,
    samples: Iterable[Sample],
    on_error: Callable[[InputError], None],
) -> list[Scored]:
    """Detects in every sample and reads its ground truth; a sample that cannot be used is left out.

    Args:
        detector: The detector.
        samples: May be an iterator that shows progress.
        on_error: Called for each sample that cannot be used.
    """
    results = []
    for sample, found in detect_files(detector, samples, lambda sample: sample.path):
        if isinstance(found, InputError):
            on_error(found)
            continue
        try:
            mask = _mask(sample, found.detection.map.shape)
        except InputError as error:
            on_error(error)
        except MemoryError:
            on_error(InputError(sample.path, TOO_LARGE))
        else:
            results.append(Scored(sample, found.detection.score, found.detection.map, mask))
    return results


def _mask(sample: Sample, size: tuple[int, ...]) -> np.ndarray:
    if sample.mask_path is None:
        return np.zeros(size, bool)
    mask = load_mask(sample.mask_path, (size[0], size[1]))
    if not mask.any():
        raise InputError(sample.mask_path, "expected a mask that marks a defect, got an empty one")
    return mask


def evaluate(results: Sequence[Scored]) -> Evaluation:
    """Exact figures at the ground truth's resolution.

    Raises:
        NoUsableInputError: There is no result at all.
    """
    if not results:
        raise NoUsableInputError("evaluate: expected at least one usable test image, got none")
    scores = np.array([result.score for result in results], np.float64)
    labels = np.array([result.sample.anomalous for result in results])
    image = _defined(lambda: image_metrics(scores, labels))
    pixel = _defined(
        lambda: pixel_metrics([r.map for r in results], [r.mask for r in results], PRO_LIMIT)
    )
    curve = _defined(lambda: roc_curve(scores, labels))
    return Evaluation(
        metrics={
            "image_AUROC": image and image.image_AUROC,
            "pixel_AUROC": pixel and pixel.pixel_AUROC,
            "pixel_AUPRO": pixel and pixel.pixel_AUPRO,
            "image_F1Max": image and image.image_F1Max,
            "pixel_F1Max": pixel and pixel.pixel_F1Max,
        },
        per_defect=_per_defect(results),
        image=image,
        pixel=pixel,
        image_roc=None if curve is None else (curve.fpr, curve.tpr),
    )


def _per_defect(results: Sequence[Scored]) -> dict[str, dict[str, float | int | None]]:
    good = [result for result in results if not result.sample.anomalous]
    figures: dict[str, dict[str, float | int | None]] = {}
    for defect in sorted({r.sample.defect for r in results if r.sample.anomalous}):
        bad = [result for result in results if result.sample.defect == defect]
        both = [*good, *bad]
        scores = [result.score for result in both]
        labels = [result.sample.anomalous for result in both]
        figures[defect] = {
            "images": len(bad),
            "image_AUROC": _defined(lambda s=scores, y=labels: auroc(s, y)),  # type: ignore[misc]
            "pixel_AUPRO": _defined(
                lambda b=both: aupro([r.map for r in b], [r.mask for r in b], PRO_LIMIT)  # type: ignore[misc]
            ),
        }
    return figures


def _defined(compute: Callable[[], Any]) -> Any:
    """The metric, or None where a class is missing."""
    try:
        return compute()
    except UndefinedMetricError:
        return None


def paper_row(category: str) -> dict[str, float]:
    """The paper's PRO of every method on one MVTec AD category (its Table 1).

    Args:
        category: As MVTec names its folders (``metal_nut``) or as the table does.

    Raises:
        GlanceError: The table has no such category; the message names all.
    """
    wanted = category.replace("_", " ").casefold()
    with PAPER_TABLE.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        if row["category"].casefold() == wanted:
            return {k: float(v) for k, v in row.items() if k not in ("group", "category")}
    known = ", ".join(row["category"].lower().replace(" ", "_") for row in rows[:-1])
    raise GlanceError(
        f"--paper: expected the data set's folder to be named as one of MVTec AD's categories "
        f"({known}), got {category!r}"
    )
