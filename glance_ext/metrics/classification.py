"""AUROC, ROC curve and F1Max of scores against binary labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from glance_ext.metrics._checks import check_binary, check_scores
from glance_ext.metrics._ranking import Ranking, rank
from glance_ext.metrics.exceptions import UndefinedMetricError


@dataclass(frozen=True, eq=False)
class RocCurve:
    """Receiver operating characteristic, one point per distinct score.

    Attributes:
        fpr: ``(K,)`` float64, false positive rate, from 0 to 1.
        tpr: ``(K,)`` float64, true positive rate, from 0 to 1.
        thresholds: ``(K,)`` float64, strictly decreasing from +inf.
    """

    fpr: NDArray[np.float64]
    tpr: NDArray[np.float64]
    thresholds: NDArray[np.float64]


@dataclass(frozen=True)
class F1Max:
    """The best F1 over all thresholds, and where it is.

    Attributes:
        value: F1 = 2 TP / (2 TP + FP + FN), in (0, 1].
        threshold: The highest score at which F1 has this value; predict ``score >= threshold``.
        precision: TP / (TP + FP) there.
        recall: TP / (TP + FN) there.
    """

    value: float
    threshold: float
    precision: float
    recall: float


@dataclass(frozen=True)
class ImageMetrics:
    """How well one score per image tells anomalous images from normal ones.

    Attributes:
        image_AUROC: Area under the ROC curve, in [0, 1].
        image_F1Max: The best F1 over all thresholds, in (0, 1].
        threshold: The score at which F1 is best.
    """

    image_AUROC: float
    image_F1Max: float
    threshold: float


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve: the share of (anomalous, normal) pairs ranked rightly.

    A pair with equal scores counts one half (mid-ranks). The pairs are counted in integers, so
    the result is the correctly rounded quotient.

    Args:
        scores: ``(N,)`` finite scores, high means anomalous; other shapes are flattened.
        labels: Like ``scores``: True or 1 for anomalous, False or 0 for normal.

    Returns:
        A value in [0, 1].

    Raises:
        TypeError: The scores or labels are no real numbers.
        ValueError: The shapes differ, a score is not finite, or a label is neither 0 nor 1.
        UndefinedMetricError: Only one class is present, or there are no scores.
    """
    return auroc_of(_rank_labelled(scores, labels, "auroc"))


def roc_curve(scores: ArrayLike, labels: ArrayLike) -> RocCurve:
    """True against false positive rate at every distinct score, and at +inf.

    Args:
        scores: ``(N,)`` finite scores, high means anomalous; other shapes are flattened.
        labels: Like ``scores``: True or 1 for anomalous, False or 0 for normal.

    Returns:
        The curve from (0, 0) to (1, 1).

    Raises:
        TypeError: The scores or labels are no real numbers.
        ValueError: The shapes differ, a score is not finite, or a label is neither 0 nor 1.
        UndefinedMetricError: Only one class is present, or there are no scores.
    """
    return roc_of(_rank_labelled(scores, labels, "roc_curve"))


def f1_max(scores: ArrayLike, labels: ArrayLike) -> F1Max:
    """The best F1 of ``score >= threshold`` over every distinct score as the threshold.

    Args:
        scores: ``(N,)`` finite scores, high means anomalous; other shapes are flattened.
        labels: Like ``scores``: True or 1 for anomalous, False or 0 for normal.

    Returns:
        The best F1; of several thresholds with it, the highest.

    Raises:
        TypeError: The scores or labels are no real numbers.
        ValueError: The shapes differ, a score is not finite, or a label is neither 0 nor 1.
        UndefinedMetricError: Nothing is anomalous, so that recall has no value. Without normal
            samples F1 is defined (and 1).
    """
    return f1_max_of(_rank_labelled(scores, labels, "f1_max", need_normal=False))


def image_metrics(scores: ArrayLike, labels: ArrayLike) -> ImageMetrics:
    """AUROC and F1Max of one score per image.

    Args:
        scores: ``(N,)`` finite image scores, high means anomalous.
        labels: ``(N,)``: True or 1 for anomalous, False or 0 for normal.

    Raises:
        TypeError: The scores or labels are no real numbers.
        ValueError: The shapes differ, a score is not finite, or a label is neither 0 nor 1.
        UndefinedMetricError: Only one class is present, or there are no scores.
    """
    ranking = _rank_labelled(scores, labels, "image_metrics")
    best = f1_max_of(ranking)
    return ImageMetrics(auroc_of(ranking), best.value, best.threshold)


def auroc_of(ranking: Ranking) -> float:
    """Area under the ROC curve of a ranking with both classes."""
    fp, tp = ranking.false_positives, ranking.true_positives
    heights = tp[1:] + tp[:-1]
    heights *= np.diff(fp)
    return int(heights.sum()) / (2 * ranking.num_normal * ranking.num_anomalous)


def roc_of(ranking: Ranking) -> RocCurve:
    """ROC curve of a ranking with both classes; it shares the ranking's thresholds."""
    return RocCurve(
        fpr=ranking.false_positives / ranking.num_normal,
        tpr=ranking.true_positives / ranking.num_anomalous,
        thresholds=ranking.thresholds,
    )


def f1_max_of(ranking: Ranking) -> F1Max:
    """Best F1 of a ranking with anomalous samples."""
    tp, fp = ranking.true_positives[1:], ranking.false_positives[1:]
    f1 = 2.0 * tp
    f1 /= tp + fp + ranking.num_anomalous
    best = int(np.argmax(f1))  # the first of equals, and thresholds fall
    hits, false_alarms = int(tp[best]), int(fp[best])
    return F1Max(
        value=float(f1[best]),
        threshold=float(ranking.thresholds[best + 1]),
        precision=hits / (hits + false_alarms),
        recall=hits / ranking.num_anomalous,
    )


def _rank_labelled(
    scores: ArrayLike, labels: ArrayLike, name: str, *, need_normal: bool = True
) -> Ranking:
    """Checks the input of the metric ``name`` and ranks it."""
    score_array = check_scores(scores, f"{name}: scores")
    label_array = check_binary(labels, f"{name}: labels")
    if score_array.shape != label_array.shape:
        raise ValueError(
            f"{name}: expected scores and labels of one shape, "
            f"got {score_array.shape} and {label_array.shape}"
        )
    if score_array.size == 0:
        raise UndefinedMetricError(f"{name}: expected at least one score, got none")
    anomalous = np.sort(score_array[label_array])
    normal = np.sort(score_array[~label_array])
    if anomalous.size == 0:
        raise UndefinedMetricError(
            f"{name}: expected anomalous samples, got only normal ones ({normal.size})"
        )
    if need_normal and normal.size == 0:
        raise UndefinedMetricError(
            f"{name}: expected normal samples, got only anomalous ones ({anomalous.size})"
        )
    return rank(normal, anomalous)
