"""From raw head scores to comparable ones, and from held-out normal images to a threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glance_ext.models.glance import HeadScores

_LEVELS = 64
_TAIL_SHARE, _TAIL_LEAST = 0.01, 50
_LEAST_TAIL = 0.05  # of the standard deviation: a tail that falls at once would say all or nothing


@dataclass(frozen=True)
class Surprisal:
    """Turns a score into ``-log`` of the share of held-out normal patches with a higher one.

    Heads differ in their tails more than in their spread: one that now and then is far from its
    mean on a normal patch would decide every greatest value of a map. In its surprisal it is not.
    Up to the highest hundredth of the held-out scores these are interpolated; beyond, they are
    taken to fall off exponentially.

    Attributes:
        values: Scores at equally spaced levels of the surprisal, from 0 to ``last``.
        last: The surprisal at which the tail begins, in nats.
        tail: Mean distance of the tail's scores from its beginning.
    """

    values: tuple[float, ...]
    last: float
    tail: float

    def __call__(self, scores: Tensor) -> Tensor:
        """The surprisal of scores of any shape, in nats; not negative."""
        values = torch.tensor(self.values, dtype=scores.dtype, device=scores.device)
        above = torch.searchsorted(values, scores.contiguous(), right=True)
        above = above.clamp(1, len(values) - 1)
        low, high = values[above - 1], values[above]
        tiny = torch.finfo(scores.dtype).tiny
        between = ((scores - low) / (high - low).clamp_min(tiny)).clamp(0, 1)
        steps = (above - 1).to(scores.dtype) + between
        beyond = (scores - values[-1]).clamp_min(0) / self.tail
        return steps * (self.last / (len(values) - 1)) + beyond

    @classmethod
    def of(cls, scores: np.ndarray) -> Surprisal:
        """From held-out scores of any shape."""
        count = scores.size
        in_tail = min(count, max(_TAIL_LEAST, int(count * _TAIL_SHARE)))
        last = float(np.log(count / in_tail))
        levels = np.linspace(0, last, _LEVELS + 1)
        values = np.quantile(scores, 1 - np.exp(-levels))
        excess = scores[scores > values[-1]] - values[-1]
        tail = float(excess.mean()) if excess.size else 0.0
        least = max(_LEAST_TAIL * float(scores.std()), 1e-12)
        return cls(tuple(values.tolist()), last, max(tail, least))


@dataclass(frozen=True)
class HeadScale:
    """What brings one head's score to the scale of the others, from held-out normal patches.

    Attributes:
        mean: Of the score.
        std: Its standard deviation.
        surprisal: Takes the place of both, or None.
    """

    mean: float
    std: float
    surprisal: Surprisal | None = None

    def __call__(self, scores: Tensor) -> Tensor:
        """Scores of any shape as surprisals, or else at mean 0 and variance 1."""
        if self.surprisal is not None:
            return self.surprisal(scores)
        return (scores - self.mean) / self.std

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> HeadScale:
        """The inverse of ``asdict``."""
        surprisal = value.get("surprisal")
        if surprisal is not None:
            surprisal = Surprisal(**{**surprisal, "values": tuple(surprisal["values"])})
        return cls(**{**value, "surprisal": surprisal})


@dataclass(frozen=True)
class Calibration:
    """Everything that turns head scores into a score and a verdict.

    Attributes:
        lambda_s: Share of the inconsistency score.
        standardise: Whether heads are brought to one scale before mixing.
        aggregation: How patches become a map.
        grid: The grid that the held-out scores were taken on.
        inconsistency: Scale of ``s_IAD``.
        log_odds: Scale of the distortion head's log-odds.
        novelty: Scale of the novelty, or None without it.
        memory_share: Share of the novelty in a patch's score, beside what both heads make.
        context_log_odds: Scale of those of the distortion head in context, or None without it.
        context_share: Its share in what both distortion heads say.
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
    novelty: HeadScale | None = None
    memory_share: float = 0.0
    context_log_odds: HeadScale | None = None
    context_share: float = 0.0

    def mix(self, scores: HeadScores) -> Tensor:
        """``s = lambda_s s_IAD + (1 - lambda_s) s_DAD`` (paper, equation 8).

        On one scale, the distortion head speaks through its log-odds: its probability saturates
        near 0 on normal patches, where a standard deviation would say nothing. Where there is a
        distortion head in context, both take their share. A model that has the novelty too takes
        its share of that, and the rest of the heads.
        """
        if not self.standardise:
            return self.lambda_s * scores.inconsistency + (1 - self.lambda_s) * scores.distortion
        inconsistent = self.inconsistency(scores.inconsistency)
        distorted = self.log_odds(scores.log_odds)
        if self.context_log_odds is not None and scores.context_log_odds is not None:
            in_context = self.context_log_odds(scores.context_log_odds)
            distorted = self.context_share * in_context + (1 - self.context_share) * distorted
        of_heads = self.lambda_s * inconsistent + (1 - self.lambda_s) * distorted
        if self.novelty is None or scores.novelty is None:
            return of_heads
        novel = self.novelty(scores.novelty)
        return self.memory_share * novel + (1 - self.memory_share) * of_heads

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
                "inconsistency": HeadScale.from_json(value["inconsistency"]),
                "log_odds": HeadScale.from_json(value["log_odds"]),
                **{
                    name: HeadScale.from_json(value[name]) if value.get(name) else None
                    for name in ("novelty", "context_log_odds")
                },
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


def head_scale(scores: Sequence[Tensor], surprisal: bool = False) -> HeadScale:
    """The scale over all patches of all images; the standard deviation is never 0.

    Args:
        scores: Of some images each.
        surprisal: Whether it is that, or else mean and standard deviation.
    """
    values = np.concatenate([score.double().cpu().numpy().ravel() for score in scores])
    return HeadScale(
        float(values.mean()),
        max(float(values.std()), 1e-12),
        Surprisal.of(values) if surprisal else None,
    )
