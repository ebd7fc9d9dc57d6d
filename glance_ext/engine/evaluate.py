"""Evaluation of a detector on a labelled data set in the MVTec layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glance_ext.data.datasets import GOOD, Sample
from glance_ext.data.images import load_mask
from glance_ext.engine.batches import detect_files
from glance_ext.engine.detector import Detector
from glance_ext.engine.paper import paper_table, row_key
from glance_ext.errors import TOO_LARGE, GlanceError, InputError, NoUsableInputError
from glance_ext.metrics import (
    ImageMetrics,
    PixelMetrics,
    PixelStore,
    UndefinedMetricError,
    auroc,
    image_metrics,
    roc_curve,
)

PRO_LIMIT = 0.3
METRIC_NAMES = ("image_AUROC", "pixel_AUROC", "pixel_AUPRO", "image_F1Max", "pixel_F1Max")


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
class ImageResult:
    """What stays of one test image once its pixels have been counted.

    Attributes:
        sample: The file and its label.
        score: The image's score.
        located: AUROC of the pixels of this anomalous image alone, 1 where the defect fills it;
            None for a good image, and where it was not asked for.
    """

    sample: Sample
    score: float
    located: float | None


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
        images: Every image, in the order of the results.
    """

    metrics: dict[str, float | None]
    per_defect: dict[str, dict[str, float | int | None]]
    image: ImageMetrics | None
    pixel: PixelMetrics | None
    image_roc: tuple[np.ndarray, np.ndarray] | None
    images: tuple[ImageResult, ...]


def score_each(
    detector: Detector,
    samples: Iterable[Sample],
    on_error: Callable[[InputError], None],
) -> Iterator[Scored]:
    """Detects in every sample and reads its ground truth; a sample that cannot be used is left out.

    Args:
        detector: The detector.
        samples: May be an iterator that shows progress.
        on_error: Called for each sample that cannot be used.

    Yields:
        Results one after the other, so that their maps need not be in memory together.
    """
    for sample, found in detect_files(detector, samples, lambda sample: sample.path):
        if isinstance(found, InputError):
            on_error(found)
            continue
        score, anomaly_map = found.detection.score, found.detection.map
        try:
            if not (np.isfinite(score) and np.isfinite(anomaly_map).all()):
                raise InputError(sample.path, "expected finite scores, got NaN or infinite ones")
            mask = _mask(sample, anomaly_map.shape)
        except InputError as error:
            on_error(error)
        except MemoryError:
            on_error(InputError(sample.path, TOO_LARGE))
        else:
            yield Scored(sample, score, anomaly_map, mask)


def score_samples(
    detector: Detector,
    samples: Iterable[Sample],
    on_error: Callable[[InputError], None],
) -> list[Scored]:
    """What :func:`score_each` yields, all in memory."""
    return list(score_each(detector, samples, on_error))


def _mask(sample: Sample, size: tuple[int, ...]) -> np.ndarray:
    if sample.mask_path is None:
        return np.zeros(size, bool)
    mask = load_mask(sample.mask_path, (size[0], size[1]))
    if not mask.any():
        raise InputError(sample.mask_path, "expected a mask that marks a defect, got an empty one")
    return mask


def evaluate(
    results: Iterable[Scored],
    *,
    folder: Path | None = None,
    limit: float = PRO_LIMIT,
    locate: bool = False,
) -> Evaluation:
    """Exact figures at the ground truth's resolution, in bounded memory.

    Args:
        results: Gone through once; may be :func:`score_each`'s.
        folder: Where the maps' pixels are kept meanwhile, in files without a name; None for the
            system's folder for temporary files.
        limit: False-positive rate at which the AUPRO integral ends.
        locate: Whether to measure each anomalous image alone too, for a sheet of cases.

    Raises:
        NoUsableInputError: There is no result at all.
        ValueError: A map or mask cannot be used; the message names the image.
        OutputError: The pixels cannot be kept in ``folder``.
    """
    images: list[ImageResult] = []
    with PixelStore(folder) as store:
        for result in results:
            sample = result.sample
            store.add(result.map, result.mask, group=sample.defect, name=str(sample.path))
            located = None
            if locate and sample.anomalous:
                # a defect that fills its image cannot be missed
                located = 1.0 if result.mask.all() else auroc(result.map, result.mask)
            images.append(ImageResult(sample, result.score, located))
        if not images:
            raise NoUsableInputError("evaluate: expected at least one usable test image, got none")
        scores = np.array([image.score for image in images], np.float64)
        labels = np.array([image.sample.anomalous for image in images])
        image = _defined(lambda: image_metrics(scores, labels))
        pixel = _defined(lambda: store.metrics(limit=limit))
        curve = _defined(lambda: roc_curve(scores, labels))
        return Evaluation(
            metrics={
                "image_AUROC": image and image.image_AUROC,
                "pixel_AUROC": pixel and pixel.pixel_AUROC,
                "pixel_AUPRO": pixel and pixel.pixel_AUPRO,
                "image_F1Max": image and image.image_F1Max,
                "pixel_F1Max": pixel and pixel.pixel_F1Max,
            },
            per_defect=_per_defect(images, store, limit),
            image=image,
            pixel=pixel,
            image_roc=None if curve is None else (curve.fpr, curve.tpr),
            images=tuple(images),
        )


def _per_defect(
    images: Sequence[ImageResult], store: PixelStore, limit: float
) -> dict[str, dict[str, float | int | None]]:
    good = [image for image in images if not image.sample.anomalous]
    figures: dict[str, dict[str, float | int | None]] = {}
    for defect in sorted({i.sample.defect for i in images if i.sample.anomalous}):
        bad = [image for image in images if image.sample.defect == defect]
        both = [*good, *bad]
        scores = [image.score for image in both]
        labels = [image.sample.anomalous for image in both]
        groups = {GOOD, defect}
        figures[defect] = {
            "images": len(bad),
            "image_AUROC": _defined(lambda s=scores, y=labels: auroc(s, y)),  # type: ignore[misc]
            "pixel_AUPRO": _defined(lambda g=groups: store.aupro(g, limit)),  # type: ignore[misc]
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
    table = paper_table("mvtec")
    if row_key(category) in table:
        return table[row_key(category)]
    known = ", ".join(list(table)[:-1])
    raise GlanceError(
        f"--paper: expected the data set's folder to be named as one of MVTec AD's categories "
        f"({known}), got {category!r}"
    )
