"""AUPRO, PRO curve and the pixel metrics of anomaly maps against ground-truth masks.

PRO is the per-region overlap of Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV
2021, section 4.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from glance_ext.metrics._checks import check_limit
from glance_ext.metrics._pixels import PixelSet, collect_pixels
from glance_ext.metrics._ranking import Ranking, rank
from glance_ext.metrics.classification import RocCurve, auroc_of, f1_max_of, roc_of


@dataclass(frozen=True, eq=False)
class ProCurve:
    """Per-region overlap against false positive rate, one point per distinct score.

    Attributes:
        fpr: ``(K,)`` float64, share of the normal pixels at or above the threshold.
        pro: ``(K,)`` float64, mean over the regions of the share of a region's pixels at or
            above the threshold.
        thresholds: ``(K,)`` float64, strictly decreasing from +inf.
        num_regions: 8-connected ground-truth regions in the whole set.
    """

    fpr: NDArray[np.float64]
    pro: NDArray[np.float64]
    thresholds: NDArray[np.float64]
    num_regions: int


@dataclass(frozen=True, eq=False)
class PixelMetrics:
    """How well anomaly maps tell anomalous pixels from normal ones.

    Attributes:
        pixel_AUROC: Area under the ROC curve over all pixels, in [0, 1].
        pixel_AUPRO: Area under the PRO curve up to the limit, over the limit, in [0, 1].
        pixel_F1Max: The best F1 over all thresholds, in (0, 1].
        threshold: The score at which F1 is best.
        roc: The whole ROC curve; see :func:`glance_ext.metrics.thin` for drawing it.
        pro: The whole PRO curve. It shares ``fpr`` and ``thresholds`` with ``roc``.
    """

    pixel_AUROC: float
    pixel_AUPRO: float
    pixel_F1Max: float
    threshold: float
    roc: RocCurve
    pro: ProCurve


def pro_curve(anomaly_maps: Sequence[ArrayLike], masks: Sequence[ArrayLike]) -> ProCurve:
    """Per-region overlap against false positive rate at every distinct score, and at +inf.

    Args:
        anomaly_maps: Finite score maps ``(H, W)``, high means anomalous; sizes may differ from
            image to image.
        masks: One ``(H, W)`` mask per map, True or 1 for anomalous pixels.

    Returns:
        The curve from (0, 0) to (1, 1).

    Raises:
        TypeError: Scores or masks are no real numbers.
        ValueError: There are not as many masks as maps, a mask has not its map's shape, a score
            is not finite, or a mask value is neither 0 nor 1.
        UndefinedMetricError: There is no map, no anomalous pixel, or no normal pixel.
    """
    pixels = collect_pixels(anomaly_maps, masks, "pro_curve")
    ranking = rank(pixels.normal, pixels.anomalous)
    fpr = ranking.false_positives / ranking.num_normal
    return ProCurve(fpr, _pro(ranking, pixels), ranking.thresholds, pixels.num_regions)


def aupro(
    anomaly_maps: Sequence[ArrayLike], masks: Sequence[ArrayLike], limit: float = 0.3
) -> float:
    """Area under the PRO curve for false positive rates up to ``limit``, over ``limit``.

    The trapezoid rule over every distinct score, the last segment interpolated at ``limit``.

    Args:
        anomaly_maps: Finite score maps ``(H, W)``, high means anomalous; sizes may differ from
            image to image.
        masks: One ``(H, W)`` mask per map, True or 1 for anomalous pixels.
        limit: False positive rate at which the integral ends, in (0, 1].

    Returns:
        A value in [0, 1].

    Raises:
        TypeError: Scores or masks are no real numbers.
        ValueError: ``limit`` is out of range, there are not as many masks as maps, a mask has
            not its map's shape, a score is not finite, or a mask value is neither 0 nor 1.
        UndefinedMetricError: There is no map, no anomalous pixel, or no normal pixel.
    """
    check_limit(limit, "aupro")
    pixels = collect_pixels(anomaly_maps, masks, "aupro")
    ranking = rank(pixels.normal, pixels.anomalous)
    return _area(ranking.false_positives, _pro(ranking, pixels), limit)


def pixel_metrics(
    anomaly_maps: Sequence[ArrayLike], masks: Sequence[ArrayLike], limit: float = 0.3
) -> PixelMetrics:
    """AUROC, AUPRO, F1Max and their curves over all pixels, from one sort.

    It takes about 75 bytes of memory a pixel where every score is distinct; the curves in the
    result keep 32 of them.

    Args:
        anomaly_maps: Finite score maps ``(H, W)``, high means anomalous; sizes may differ from
            image to image.
        masks: One ``(H, W)`` mask per map, True or 1 for anomalous pixels.
        limit: False positive rate at which the AUPRO integral ends, in (0, 1].

    Raises:
        TypeError: Scores or masks are no real numbers.
        ValueError: ``limit`` is out of range, there are not as many masks as maps, a mask has
            not its map's shape, a score is not finite, or a mask value is neither 0 nor 1.
        UndefinedMetricError: There is no map, no anomalous pixel, or no normal pixel.
    """
    check_limit(limit, "pixel_metrics")
    pixels = collect_pixels(anomaly_maps, masks, "pixel_metrics")
    ranking = rank(pixels.normal, pixels.anomalous)
    best = f1_max_of(ranking)
    pro = _pro(ranking, pixels)
    roc = roc_of(ranking)
    return PixelMetrics(
        pixel_AUROC=auroc_of(ranking),
        pixel_AUPRO=_area(ranking.false_positives, pro, limit),
        pixel_F1Max=best.value,
        threshold=best.threshold,
        roc=roc,
        pro=ProCurve(roc.fpr, pro, ranking.thresholds, pixels.num_regions),
    )


def _pro(ranking: Ranking, pixels: PixelSet) -> NDArray[np.float64]:
    """PRO at every threshold of the ranking, ``(K,)``: a running sum of 1 / region size.

    A plain running sum of millions of equal small numbers drifts, since each step rounds the
    same way. So each weight is cut into a whole number of units, summed exactly, and a rest far
    below the rounding of the total.
    """
    weights = 1.0 / pixels.region_sizes[pixels.region[::-1]]
    unit = 2.0 ** (pixels.num_regions.bit_length() - 61)  # all weights together stay below 2**61
    weights /= unit
    whole = weights.astype(np.int64)
    weights -= whole
    running = np.zeros(whole.size + 1, dtype=np.float64)
    np.cumsum(weights, out=running[1:])
    running[1:] += np.cumsum(whole)
    running /= running[-1]
    return running[ranking.true_positives]


def _area(false_positives: NDArray[np.int64], pro: NDArray[np.float64], limit: float) -> float:
    """Mean of PRO for false positive rates in [0, limit].

    Integrates over the count of false positives, whose steps are exact, not over their share:
    a perfect ranking gives 1 and nothing gives more.
    """
    end = limit * int(false_positives[-1])
    inside = int(np.searchsorted(false_positives, end, side="right"))  # points with fp <= end
    steps = np.diff(false_positives[:inside])
    heights = pro[1:inside] + pro[: inside - 1]
    heights *= steps
    area = 0.5 * float(heights.sum())
    if inside < false_positives.size:
        fp0, fp1 = int(false_positives[inside - 1]), int(false_positives[inside])
        pro0, pro1 = float(pro[inside - 1]), float(pro[inside])
        width = end - fp0
        at_end = pro0 + (pro1 - pro0) * (width / (fp1 - fp0))
        area += 0.5 * (pro0 + at_end) * width
    return area / end
