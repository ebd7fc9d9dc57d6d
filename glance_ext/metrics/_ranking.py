"""Integer counts at every distinct score: what AUROC, F1Max and PRO are all read from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Ranking:
    """How many samples of each class score at or above each threshold.

    Row 0 is the threshold +inf, which nothing reaches; then one row per distinct score, from the
    highest to the lowest. The last row counts every sample.

    Attributes:
        thresholds: ``(K,)`` float64, strictly decreasing.
        true_positives: ``(K,)`` int64, anomalous samples with score >= threshold.
        false_positives: ``(K,)`` int64, normal samples with score >= threshold.
    """

    thresholds: NDArray[np.float64]
    true_positives: NDArray[np.int64]
    false_positives: NDArray[np.int64]

    @property
    def num_anomalous(self) -> int:
        """Anomalous samples in all."""
        return int(self.true_positives[-1])

    @property
    def num_normal(self) -> int:
        """Normal samples in all."""
        return int(self.false_positives[-1])


def rank(normal: NDArray[np.floating], anomalous: NDArray[np.floating]) -> Ranking:
    """Ranks the scores of both classes together.

    Both inputs are sorted already, each on its own, and only merged here: a plain sort of the
    many normal pixels is several times cheaper than an argsort of all.

    Args:
        normal: ``(N,)`` ascending finite scores.
        anomalous: ``(P,)`` ascending finite scores.

    Returns:
        The counts; equal scores of both classes share one row.
    """
    total = normal.size + anomalous.size
    slots = np.searchsorted(normal, anomalous, side="right")
    slots += np.arange(anomalous.size)
    is_anomalous = np.zeros(total, dtype=np.bool_)
    is_anomalous[slots] = True
    del slots
    scores = np.empty(total, dtype=np.result_type(normal, anomalous))
    scores[is_anomalous] = anomalous
    scores[~is_anomalous] = normal

    scores, is_anomalous = scores[::-1], is_anomalous[::-1]
    is_last = np.ones(total, dtype=np.bool_)  # of its run of equal scores
    np.not_equal(scores[1:], scores[:-1], out=is_last[:-1])
    last = np.flatnonzero(is_last)

    thresholds = np.empty(last.size + 1, dtype=np.float64)
    thresholds[0] = np.inf
    thresholds[1:] = scores[last]
    thresholds += 0.0  # -0.0 equals 0.0 and may have come first: report one of them, always
    true_positives = np.zeros(last.size + 1, dtype=np.int64)
    true_positives[1:] = np.cumsum(is_anomalous, dtype=np.int64)[last]
    false_positives = np.zeros(last.size + 1, dtype=np.int64)
    np.add(last, 1, out=false_positives[1:])
    false_positives -= true_positives
    return Ranking(thresholds, true_positives, false_positives)
