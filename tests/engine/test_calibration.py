import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from glance_ext.engine.calibration import (
    Calibration,
    HeadScale,
    Surprisal,
    head_scale,
    image_score,
)
from glance_ext.models.glance import HeadScores


def calibration(**changes: object) -> Calibration:
    values = {
        "lambda_s": 0.8,
        "standardise": True,
        "aggregation": "mean",
        "grid": "8",
        "inconsistency": HeadScale(2.0, 0.5),
        "log_odds": HeadScale(-3.0, 2.0),
        "held_out_scores": (3.0, 1.0, 2.0, 5.0, 4.0),
        "pixel_range": (0.25, 5.0),
        "optimistic": False,
    }
    return Calibration(**{**values, **changes})  # type: ignore[arg-type]


LATER = {"tile", "image_score", "novelty", "memory_share", "context_log_odds", "context_share"}
SCORES = HeadScores(
    inconsistency=torch.tensor([[2.0, 3.0]]),
    distortion=torch.tensor([[0.0, 0.5]]),
    log_odds=torch.tensor([[-5.0, 1.0]]),
)


def test_raw_scores_mix_as_in_the_paper() -> None:
    mixed = calibration(standardise=False).mix(SCORES)
    assert mixed.tolist() == [pytest.approx([0.8 * 2, 0.8 * 3 + 0.2 * 0.5])]


def test_standardised_scores_mix_by_their_own_scales() -> None:
    mixed = calibration().mix(SCORES)
    expected = [0.8 * 0 + 0.2 * (-2 / 2), 0.8 * (1 / 0.5) + 0.2 * (4 / 2)]
    assert mixed.tolist() == [pytest.approx(expected)]


@pytest.mark.parametrize(
    ("rate", "threshold"),
    [(0.0, 5.0), (0.19, 5.0), (0.2, 4.0), (0.39, 4.0), (0.4, 3.0), (0.6, 2.0), (0.99, 1.0)],
)
def test_the_threshold_flags_at_most_the_rate(rate: float, threshold: float) -> None:
    found = calibration().threshold(rate)
    assert found == threshold
    flagged = sum(score > found for score in calibration().held_out_scores)
    assert flagged <= rate * 5 + 1e-9
    lower = [score for score in calibration().held_out_scores if score < found]
    if lower:  # the next lower one would flag too many
        assert sum(score > max(lower) for score in calibration().held_out_scores) > rate * 5


def test_rates_that_are_whole_shares_do_not_fall_victim_to_rounding() -> None:
    many = calibration(held_out_scores=tuple(float(i) for i in range(100)))
    for percent in range(100):
        assert many.threshold(percent / 100) == 99 - percent


def test_the_threshold_falls_as_the_rate_rises() -> None:
    scores = torch.randn(37, generator=torch.Generator().manual_seed(0)).double().tolist()
    many = calibration(held_out_scores=tuple(scores))
    thresholds = [many.threshold(rate / 200) for rate in range(200)]
    assert thresholds == sorted(thresholds, reverse=True)


def test_one_held_out_image_gives_its_own_score() -> None:
    assert calibration(held_out_scores=(1.5,)).threshold(0.05) == 1.5


def test_json_gives_back_the_same_calibration() -> None:
    original = calibration(lambda_s=0.1 + 0.2, held_out_scores=(1 / 3, 2 / 3), optimistic=True)
    assert Calibration.from_json(json.loads(json.dumps(original.to_json()))) == original


def test_novelty_takes_its_share_by_its_own_scale() -> None:
    novel = calibration(novelty=HeadScale(0.5, 0.25), memory_share=0.75)
    scores = replace(SCORES, novelty=torch.tensor([[0.5, 1.5]]))
    heads = calibration().mix(SCORES)[0]
    expected = [0.25 * float(heads[0]), 0.75 * 4 + 0.25 * float(heads[1])]
    assert novel.mix(scores).tolist() == [pytest.approx(expected)]
    again = Calibration.from_json(json.loads(json.dumps(novel.to_json())))
    assert again == novel


def test_surprisal_is_minus_log_of_the_share_that_is_higher() -> None:
    """Of an exponential distribution that is the score itself, in the extrapolated tail too."""
    normal = np.random.default_rng(0).exponential(size=200_000)
    scores = torch.tensor([[0.1, 1.0, 2.5], [4.0, 7.0, 14.0]], dtype=torch.float64)
    found = Surprisal.of(normal)(scores)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, scores, rtol=0.05, atol=0.02)
    higher = (torch.from_numpy(normal)[:, None, None] > scores[:1]).double().mean(0)
    torch.testing.assert_close(found[:1], -higher.log(), rtol=0, atol=0.01)


def test_two_heads_of_any_scale_and_shape_are_alike_in_their_surprisals() -> None:
    normal = np.random.default_rng(0).normal(size=(8, 5000))
    one, other = Surprisal.of(normal), Surprisal.of(np.exp(3 * normal) * 100 - 7)
    asked = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    torch.testing.assert_close(one(asked), other((3 * asked).exp() * 100 - 7), rtol=0.02, atol=0.01)


def test_surprisal_never_falls_and_is_finite() -> None:
    for normal in (np.r_[np.zeros(500), np.ones(500)], np.full(100, 3.0), np.array([2.0])):
        scale = Surprisal.of(normal)
        found = scale(torch.linspace(-5, 5, 400))
        assert bool(found.isfinite().all())
        assert float(found[0]) == 0
        assert bool((found.diff() >= 0).all())
        assert float(found[-1]) > 1  # far above every normal one
        assert scale(torch.zeros(0, 3)).shape == (0, 3)
        assert bool(scale(torch.from_numpy(normal)).isfinite().all())  # among equal ones too


def test_surprisal_takes_the_place_of_mean_and_deviation() -> None:
    scores = [torch.randn(2, 400), torch.randn(1, 400)]
    scale = head_scale(scores, surprisal=True)
    assert scale.mean == head_scale(scores).mean
    assert torch.equal(scale(scores[0]), scale.surprisal(scores[0]))
    assert not torch.allclose(scale(scores[0]), head_scale(scores)(scores[0]))
    original = calibration(inconsistency=scale, novelty=scale, context_log_odds=scale)
    assert Calibration.from_json(json.loads(json.dumps(original.to_json()))) == original


def test_incomplete_json_is_refused() -> None:
    value = calibration().to_json()
    for key in value.keys() - LATER:
        with pytest.raises((KeyError, TypeError)):
            Calibration.from_json({k: v for k, v in value.items() if k != key})


def test_models_from_before_tiles_image_scores_memory_and_context_have_none() -> None:
    value = {name: of for name, of in calibration().to_json().items() if name not in LATER}
    assert Calibration.from_json(value) == calibration(tile=False, image_score="max")


def test_an_images_score_is_its_greatest_value_that_above_the_median_or_the_mean() -> None:
    anomaly_map = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 16.0], [7.0, 8.0, 9.0]])
    assert image_score(anomaly_map, "max") == 16
    assert image_score(anomaly_map, "contrast") == 16 - 5
    assert image_score(anomaly_map + 100, "contrast") == 16 - 5
    assert image_score(anomaly_map, "mean") == pytest.approx(55 / 9)


def test_scales_are_taken_over_all_patches_of_all_images() -> None:
    scale = head_scale([torch.tensor([[1.0, 2.0]]), torch.tensor([[6.0, 7.0, 9.0]])])
    assert scale.mean == pytest.approx(5)
    assert scale.std == pytest.approx(math.sqrt((16 + 9 + 1 + 4 + 16) / 5))
    assert head_scale([torch.full((1, 4), 3.0)]).std > 0
