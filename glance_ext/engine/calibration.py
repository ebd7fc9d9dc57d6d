"""From raw head scores to comparable ones, and from held-out normal images to a threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from glance_ext.models.glance import HeadScores


@dataclass(frozen=True)
class HeadScale:
    """Mean and standard deviation of one head's score over held-out normal patches."""

    mean: float
    std: float


@dataclass(frozen=True)
class Calibration:
    """Everything that turns head scores into a score and a verdict.

    Attributes:
        lambda_s: Share of the inconsistency score.
        standardise: Whether heads are standardised before mixing.
        aggregation: How patches become a map.
        grid: The grid that the held-out scores were taken on.
        inconsistency: Scale of ``s_IAD``.
        log_odds: Scale of the distortion head's log-odds.
        held_out_scores: Image scores of the held-out normal images.
        pixel_range: Of their maps' medians and 99th percentiles the median each, for the colours of
            heatmaps; one odd image among them does not move these.
        optimistic: Whether the held-out images were trained on too, for want of others.
        image_score: What of its map an image's score is; see :func:`image_score`.
        tile: Whether they were scored in windows at their own resolution, or else at 256x256.
    """

    lambda_s: float
    standardise: bool
    aggregation: str
    grid: str
    inconsistency: HeadScale
    log_odds: HeadScale
    held_out_scores: tuple[float, ...]
    pixel_range: tuple[float, float]
    optimistic: bool
    tile: bool = False
    image_score: str = "max"

    def mix(self, scores: HeadScores) -> Tensor:
        """``s = lambda_s s_IAD + (1 - lambda_s) s_DAD`` (paper, equation 8).

        Standardised, the distortion head speaks through its log-odds: its probability saturates
        near 0 on normal patches, where a standard deviation would say nothing.
        """
        if not self.standardise:
            return self.lambda_s * scores.inconsistency + (1 - self.lambda_s) * scores.distortion
        inconsistent = (scores.inconsistency - self.inconsistency.mean) / self.inconsistency.std
        distorted = (scores.log_odds - self.log_odds.mean) / self.log_odds.std
        return self.lambda_s * inconsistent + (1 - self.lambda_s) * distorted

    def threshold(self, false_positive_rate: float) -> float:
        """The least threshold that flags at most this share of the held-out normal images.

        An image is flagged when its score is greater than the threshold. With n held-out images a
        rate below 1/n cannot be told from 0; the threshold is then the greatest held-out score.
        """
        scores = np.sort(np.asarray(self.held_out_scores, np.float64))
        allowed = int(np.floor(false_positive_rate * len(scores) + 1e-9))
        return float(scores[max(0, len(scores) - 1 - allowed)])

    def to_json(self) -> dict[str, Any]:
        """All values as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Calibration:
        """The inverse of :meth:`to_json`."""
        return cls(
            **{
                **value,
                "inconsistency": HeadScale(**value["inconsistency"]),
                "log_odds": HeadScale(**value["log_odds"]),
                "held_out_scores": tuple(value["held_out_scores"]),
                "pixel_range": tuple(value["pixel_range"]),
            }
        )


def image_score(anomaly_map: Tensor, kind: str) -> float:
    """An image's score from its map ``(h, w)``.

    Args:
        anomaly_map: At the resolution at which patches were scored.
        kind: ``"max"`` for the greatest value; ``"contrast"`` for the greatest value above the
            median, so that what changes a whole image (light, focus, grain) does not count;
            ``"mean"`` where an anomaly is the whole image, not a spot.
    """
    if kind == "mean":
        return float(anomaly_map.mean())
    highest = float(anomaly_map.max())
    return highest - float(anomaly_map.median()) if kind == "contrast" else highest


def head_scale(scores: Sequence[Tensor]) -> HeadScale:
    """Mean and standard deviation over all patches of all images; the latter never 0."""
    values = np.concatenate([score.double().cpu().numpy().ravel() for score in scores])
    return HeadScale(float(values.mean()), max(float(values.std()), 1e-12))
