"""Pictures of an evaluation: its curves, and its extreme cases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from glance_ext.data.images import load_image
from glance_ext.engine.detector import Detector
from glance_ext.engine.evaluate import PRO_LIMIT, Evaluation, Scored
from glance_ext.metrics import auroc, thin
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


def write_cases(path: Path, detector: Detector, results: Sequence[Scored], most: int = 6) -> None:
    """Draws the worst and best located defects and the good images of the highest scores."""
    contact_sheet(path, _tiles(detector, results, most))


def _tiles(detector: Detector, results: Sequence[Scored], most: int) -> Iterator[Tile]:
    anomalous = [r for r in results if r.sample.anomalous]
    # a defect that fills its image cannot be missed: it counts as well located
    located = sorted(anomalous, key=lambda r: 1.0 if r.mask.all() else auroc(r.map, r.mask))
    good = sorted((r for r in results if not r.sample.anomalous), key=lambda r: -r.score)
    worst = located[: min(most, (len(located) + 1) // 2)]
    best = located[::-1][: min(most, len(located) - len(worst))]
    for heading, group in (
        ("Worst located defects", worst),
        ("Best located defects", best),
        ("Good images with the highest scores", good[:most]),
    ):
        for result in group:
            yield case_tile(detector, result, heading)


def case_tile(detector: Detector, result: Scored, heading: str = "") -> Tile:
    """One result as image, heatmap and ground truth, with score and verdict below."""
    image = load_image(result.sample.path)
    picture = overlay(image, result.map, *colour_range(detector), threshold=detector.threshold)
    verdict = "anomalous" if result.score > detector.threshold else "good"
    name = f"{result.sample.defect}/{result.sample.path.name}"
    return Tile(image, picture, result.mask, f"{name}  {result.score:.2f}: {verdict}", heading)
