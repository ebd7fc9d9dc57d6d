"""AUROC, ROC curve and F1Max against their definitions, in exact fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from glance_ext.errors import GlanceError
from glance_ext.metrics import UndefinedMetricError, auroc, f1_max, image_metrics, roc_curve

SCALES = (1.0, 1e-30, 1e30, -1e-30)
FUNCTIONS = (auroc, roc_curve, f1_max, image_metrics)


@st.composite
def labelled_scores(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Scores with many ties or any finite scores, with at least one sample of each class."""
    size = draw(st.integers(2, 24))
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    if draw(st.booleans()):
        ranks = draw(hnp.arrays(np.int64, size, elements=st.integers(-3, 3)))
        scores = (ranks * draw(st.sampled_from(SCALES))).astype(np.float64)
    else:
        width = np.dtype(dtype).itemsize * 8
        finite = st.floats(allow_nan=False, allow_infinity=False, width=width)
        scores = draw(hnp.arrays(dtype, size, elements=finite))
    labels = draw(hnp.arrays(np.bool_, size))
    first, second = draw(st.permutations(range(size)))[:2]
    labels[first], labels[second] = True, False
    return scores, labels


def auroc_by_pairs(scores: np.ndarray, labels: np.ndarray) -> Fraction:
    wins = Fraction(0)
    for high in scores[labels]:
        for low in scores[~labels]:
            wins += Fraction(1) if high > low else Fraction(1, 2) if high == low else 0
    return wins / (int(labels.sum()) * int((~labels).sum()))


def counts_at(scores: np.ndarray, labels: np.ndarray, threshold: float) -> tuple[int, int]:
    predicted = [float(score) >= threshold for score in scores]
    hits = sum(p and bool(label) for p, label in zip(predicted, labels, strict=True))
    return hits, sum(predicted) - hits


def thresholds_of(scores: np.ndarray) -> list[float]:
    return [float("inf"), *sorted({float(score) for score in scores}, reverse=True)]


@given(labelled_scores())
def test_auroc_is_the_share_of_pairs_ranked_rightly_with_ties_as_halves(data) -> None:
    scores, labels = data
    assert auroc(scores, labels) == float(auroc_by_pairs(scores, labels))


@given(labelled_scores())
def test_roc_curve_has_the_rates_at_every_distinct_score(data) -> None:
    scores, labels = data
    curve = roc_curve(scores, labels)
    expected = thresholds_of(scores)
    assert curve.thresholds.tolist() == expected
    assert {curve.fpr.dtype, curve.tpr.dtype, curve.thresholds.dtype} == {np.dtype(np.float64)}
    counts = [counts_at(scores, labels, threshold) for threshold in expected]
    assert curve.tpr.tolist() == [hits / int(labels.sum()) for hits, _ in counts]
    assert curve.fpr.tolist() == [alarms / int((~labels).sum()) for _, alarms in counts]
    assert (curve.fpr[0], curve.tpr[0], curve.fpr[-1], curve.tpr[-1]) == (0, 0, 1, 1)


@given(labelled_scores())
def test_f1_max_is_the_best_of_all_thresholds_and_the_highest_of_equals(data) -> None:
    scores, labels = data
    total = int(labels.sum())
    best, best_threshold, best_counts = Fraction(-1), 0.0, (0, 0)
    for threshold in thresholds_of(scores)[1:]:
        hits, alarms = counts_at(scores, labels, threshold)
        f1 = Fraction(2 * hits, hits + alarms + total)
        if f1 > best:
            best, best_threshold, best_counts = f1, threshold, (hits, alarms)
    result = f1_max(scores, labels)
    assert result.value == float(best)
    assert result.threshold == best_threshold
    assert result.precision == best_counts[0] / sum(best_counts)
    assert result.recall == best_counts[0] / total


def test_f1_max_takes_the_highest_threshold_of_equals() -> None:
    # F1 at 4: 2*1/(1+2) = 2/3; at 3, 2: lower; at 1: 2*2/(4+2) = 2/3 again.
    result = f1_max([4.0, 3.0, 2.0, 1.0], [1, 0, 0, 1])
    assert (result.value, result.threshold) == (2 / 3, 4.0)
    assert (result.precision, result.recall) == (1.0, 0.5)


@given(labelled_scores())
def test_image_metrics_agree_with_the_single_functions(data) -> None:
    scores, labels = data
    result = image_metrics(scores, labels)
    best = f1_max(scores, labels)
    assert result.image_AUROC == auroc(scores, labels)
    assert (result.image_F1Max, result.threshold) == (best.value, best.threshold)


@given(labelled_scores(), st.randoms(use_true_random=False))
def test_metrics_depend_on_neither_scale_nor_order(data, random) -> None:
    scores, labels = data
    ranks = np.unique(scores, return_inverse=True)[1]
    order = list(range(scores.size))
    random.shuffle(order)
    expected = auroc(scores, labels)
    best = f1_max(scores, labels)
    for other, truth in [
        (np.exp(ranks), labels),  # strictly increasing
        (ranks * 1e-30 - 5e-30, labels),
        (ranks * 1e300, labels),
        (scores[order], labels[order]),
    ]:
        assert auroc(other, truth) == expected
        assert f1_max(other, truth).value == best.value


@given(labelled_scores())
def test_inverted_scores_give_the_complementary_auroc(data) -> None:
    scores, labels = data
    assert Fraction(auroc(scores, labels)) + Fraction(auroc(-scores, labels)) == pytest.approx(1)


def test_constant_scores_give_one_half_exactly() -> None:
    labels = np.arange(1001) % 3 == 0
    scores = np.full(1001, 0.1, dtype=np.float32)
    assert auroc(scores, labels) == 0.5
    curve = roc_curve(scores, labels)
    assert curve.fpr.tolist() == curve.tpr.tolist() == [0.0, 1.0]
    assert curve.thresholds.tolist() == [np.inf, float(np.float32(0.1))]


def test_float64_scores_are_not_rounded_to_lower_precision() -> None:
    step = np.nextafter(1.0, 2.0)
    assert auroc([1.0, step], [False, True]) == 1.0
    assert f1_max([1.0, step], [False, True]).threshold == step


def test_scores_outside_zero_to_one_are_not_squashed() -> None:
    # A sigmoid in any precision makes all of these 1.
    scores = np.array([900.0, 1000.0, 1100.0, 1200.0])
    assert auroc(scores, [0, 1, 0, 1]) == 0.75


def test_heavy_tailed_scores_are_ranked_not_binned() -> None:
    labels = np.arange(1000) >= 900
    scores = np.arange(1000.0)
    scores[0] = 1e12  # one wild normal sample; the rest is perfect
    assert auroc(scores, labels) == 899 / 900
    edges = np.linspace(scores.min(), scores.max(), 200)
    binned = auroc(np.searchsorted(edges, scores, side="right"), labels)
    assert binned < 0.51  # what the example is there to catch
    best = f1_max(scores, labels)
    assert (best.value, best.threshold) == (200 / 201, 900.0)


def test_zero_and_minus_zero_are_one_score() -> None:
    for scores in ([0.0, -0.0], [-0.0, 0.0]):
        curve = roc_curve(scores, [1, 0])
        assert curve.fpr.tolist() == curve.tpr.tolist() == [0.0, 1.0]
        assert not np.signbit(curve.thresholds[-1])


def test_a_million_pairs_to_the_last_bit() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 50, 4001).astype(np.float32)
    labels = rng.random(4001) < 0.1
    high, low = scores[labels][:, None], scores[~labels][None, :]
    doubled = 2 * int((high > low).sum()) + int((high == low).sum())
    assert auroc(scores, labels) == doubled / (2 * high.size * low.size)


def test_any_shape_is_flattened_and_labels_may_be_integers() -> None:
    scores = np.array([[0.1, 0.4], [0.35, 0.8]])
    assert auroc(scores, np.array([[0, 0], [1, 1]])) == 0.75
    assert auroc([1, 2, 3], [False, False, True]) == 1.0
    assert auroc(np.array([1, 2, 3], dtype=np.uint8), np.array([0.0, 0.0, 1.0])) == 1.0


@pytest.mark.parametrize("function", FUNCTIONS)
def test_different_shapes_are_refused(function) -> None:
    with pytest.raises(ValueError, match=rf"{function.__name__}: .*\(3,\) and \(2,\)"):
        function([1.0, 2.0, 3.0], [0, 1])
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 2\)"):
        function(np.zeros((2, 3)), np.zeros((3, 2), dtype=bool))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_scores_are_counted_and_placed(function, bad) -> None:
    scores = np.array([0.0, 1.0, bad, 2.0, bad])
    message = rf"{function.__name__}: .* 2 non-finite of 5, the first at index 2 \({bad}\)"
    with pytest.raises(ValueError, match=message) as caught:
        function(scores, [0, 1, 0, 1, 0])
    assert not isinstance(caught.value, UndefinedMetricError)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_missing_anomalous_samples_are_named_and_counted(function) -> None:
    with pytest.raises(UndefinedMetricError, match=r"only normal ones \(3\)"):
        function([1.0, 2.0, 3.0], [0, 0, 0])


@pytest.mark.parametrize("function", [auroc, roc_curve, image_metrics])
def test_missing_normal_samples_are_named_and_counted(function) -> None:
    with pytest.raises(UndefinedMetricError, match=r"only anomalous ones \(2\)"):
        function([1.0, 2.0], [1, 1])


def test_f1_max_is_defined_without_normal_samples() -> None:
    result = f1_max([3.0, 1.0, 2.0], [1, 1, 1])
    assert (result.value, result.threshold, result.precision, result.recall) == (1, 1, 1, 1)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_scores_at_all_leave_the_metric_undefined(function) -> None:
    with pytest.raises(UndefinedMetricError, match="at least one score, got none"):
        function([], [])


def test_undefined_metric_error_is_a_glance_error_and_a_value_error() -> None:
    assert issubclass(UndefinedMetricError, GlanceError)
    assert issubclass(UndefinedMetricError, ValueError)


def test_labels_other_than_zero_and_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"auroc: labels: expected bool.* got the value 255"):
        auroc([1.0, 2.0, 3.0], [0, 255, 1])
    with pytest.raises(ValueError, match="got the value nan"):
        auroc([1.0, 2.0], [0.0, np.nan])
    with pytest.raises(TypeError, match="auroc: labels"):
        auroc([1.0, 2.0], ["good", "bad"])


def test_scores_that_float64_cannot_hold_are_refused() -> None:
    with pytest.raises(TypeError, match=r"auroc: scores: .*got complex128"):
        auroc(np.array([1j, 2]), [0, 1])
    with pytest.raises(ValueError, match=r"2\*\*53"):
        auroc(np.array([2**53, 2**53 + 1]), [0, 1])
    with pytest.raises(ValueError, match=r"2\*\*53"):
        auroc(np.array([-(2**53) - 1, 0]), [0, 1])


@pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="longdouble is float64 here")
def test_long_doubles_are_refused_instead_of_rounded() -> None:
    with pytest.raises(TypeError, match="auroc: scores"):
        auroc(np.array([1, 2], dtype=np.longdouble), [0, 1])
