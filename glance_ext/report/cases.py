"""Pictures of an evaluation: its curves, and its extreme cases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from glance_ext.data.images import load_image
from glance_ext.engine.detector import Detector
from glance_ext.engine.evaluate import PRO_LIMIT, Evaluation, ImageResult, Scored, score_each
from glance_ext.metrics import thin
from glance_ext.report.curves import plot_roc_pro
from glance_ext.report.heatmap import overlay
from glance_ext.report.sheet import Tile, contact_sheet


def colour_range(detector: Detector) -> tuple[float, float]:
    """The scores at which a model's heatmaps begin to colour, and at which they are saturated.

    Above the median of a usual held-out normal map, from half to three times the distance to its
    99th percentile. The same for every image of a model, so that its heatmaps can be compared, and
    independent of the threshold, so that what stays below it can be seen too.
    """
    median, high = detector.calibration.pixel_range
    spread = max(high - median, 1e-12)
    return median + 0.5 * spread, median + 3.0 * spread


def write_curves(path: Path, evaluation: Evaluation, title: str) -> bool:
    """Draws ROC and PRO curves, if any is defined; returns whether there is a picture."""
    roc, pro = [], []
    if evaluation.image_roc is not None:
        label = f"image, AUROC {evaluation.metrics['image_AUROC']:.3f}"
        roc.append((label, *evaluation.image_roc))
    if evaluation.pixel is not None:
        pixel = evaluation.pixel
        label = f"pixel, AUROC {pixel.pixel_AUROC:.3f}"
        roc.append((label, *thin(pixel.roc.fpr, pixel.roc.tpr)))
        label = f"AUPRO {pixel.pixel_AUPRO:.3f}"
        pro.append((label, *thin(pixel.pro.fpr, pixel.pro.pro)))
    if not roc and not pro:
        return False
    plot_roc_pro(path, roc, pro, limit=PRO_LIMIT, title=title)
    return True


def write_cases(
    path: Path, detector: Detector, images: Sequence[ImageResult], most: int = 6
) -> None:
    """Draws the worst and best located defects and the good images of the highest scores.

    Args:
        path: The picture to write.
        detector: Detects once more in the images shown, whose maps are not kept.
        images: Of an evaluation with ``locate``.
        most: The most images of a kind.
    """
    contact_sheet(path, _tiles(detector, images, most))


def _tiles(detector: Detector, images: Sequence[ImageResult], most: int) -> Iterator[Tile]:
    located = sorted(
        (i for i in images if i.located is not None), key=lambda image: image.located or 0.0
    )
    good = sorted((i for i in images if not i.sample.anomalous), key=lambda i: -i.score)
    worst = located[: min(most, (len(located) + 1) // 2)]
    best = located[::-1][: min(most, len(located) - len(worst))]
    for heading, group in (
        ("Worst located defects", worst),
        ("Best located defects", best),
        ("Good images with the highest scores", good[:most]),
    ):
        samples = [image.sample for image in group]
        for result in score_each(detector, samples, lambda error: None):
            yield case_tile(detector, result, heading)


def case_tile(detector: Detector, result: Scored, heading: str = "") -> Tile:
    """One result as image, heatmap and ground truth, with score and verdict below."""
    image = load_image(result.sample.path)
    picture = overlay(image, result.map, *colour_range(detector), threshold=detector.threshold)
    verdict = "anomalous" if result.score > detector.threshold else "good"
    name = f"{result.sample.defect}/{result.sample.path.name}"
    return Tile(image, picture, result.mask, f"{name}  {result.score:.2f}: {verdict}", heading)
