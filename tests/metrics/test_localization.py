"""PRO, AUPRO and the pixel metrics against their definitions, in exact fractions."""

from __future__ import annotations

import tracemalloc
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from glance_ext.metrics import (
    UndefinedMetricError,
    aupro,
    auroc,
    f1_max,
    pixel_metrics,
    pro_curve,
    roc_curve,
)

FUNCTIONS = (pro_curve, aupro, pixel_metrics)
LIMITS = (0.05, 0.1, 0.3, 0.37, 1.0)
CLOSE = {"rel": 1e-14, "abs": 1e-15}


@st.composite
def image_sets(draw: st.DrawFn) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """One to three images of different sizes, with both classes, often with equal scores."""
    maps, masks = [], []
    tied = draw(st.booleans())
    scale = draw(st.sampled_from([1.0, 1e-30, 1e30]))
    for _ in range(draw(st.integers(1, 3))):
        shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 6)))
        dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
        if tied:
            ranks = draw(hnp.arrays(np.int64, shape, elements=st.integers(-3, 3)))
            maps.append((ranks * scale).astype(np.float64))
        else:
            width = np.dtype(dtype).itemsize * 8
            finite = st.floats(allow_nan=False, allow_infinity=False, width=width)
            maps.append(draw(hnp.arrays(dtype, shape, elements=finite)))
        masks.append(draw(hnp.arrays(np.bool_, shape)))
    maps.append(draw(hnp.arrays(np.float32, (1, 2), elements=st.integers(-3, 3))))
    masks.append(np.array([[True, False]]))
    return maps, masks


def regions_of(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """8-connected regions by flood fill."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    regions = []
    while left:
        todo = [left.pop()]
        region = []
        while todo:
            y, x = todo.pop()
            region.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            todo += near
        regions.append(region)
    return regions


def pro_by_definition(maps, masks) -> list[tuple[float, Fraction, Fraction]]:
    """(threshold, FPR, PRO) at +inf and every distinct score."""
    regions = [
        [float(anomaly_map[pixel]) for pixel in region]
        for anomaly_map, mask in zip(maps, masks, strict=True)
        for region in regions_of(mask)
    ]
    normal = [float(s) for m, mask in zip(maps, masks, strict=True) for s in m[~mask]]
    distinct = {float(s) for m in maps for s in m.ravel()}
    points = []
    for threshold in [float("inf"), *sorted(distinct, reverse=True)]:
        shares = [Fraction(sum(s >= threshold for s in r), len(r)) for r in regions]
        alarms = Fraction(sum(s >= threshold for s in normal), len(normal))
        points.append((threshold, alarms, sum(shares) / len(regions)))
    return points


def aupro_by_definition(maps, masks, limit: float) -> Fraction:
    """Trapezoids of the straight line through all points, cut at the limit."""
    end, area = Fraction(limit), Fraction(0)
    points = [(fpr, pro) for _, fpr, pro in pro_by_definition(maps, masks)]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 >= end or x0 == x1:
            continue
        stop = min(x1, end)
        y_stop = y0 + (y1 - y0) * (stop - x0) / (x1 - x0)
        area += (stop - x0) * (y0 + y_stop) / 2
    return area / end


@given(image_sets())
def test_pro_curve_is_the_mean_region_share_at_every_distinct_score(images) -> None:
    maps, masks = images
    curve = pro_curve(maps, masks)
    thresholds, fpr, pro = zip(*pro_by_definition(maps, masks), strict=True)
    assert curve.thresholds.tolist() == list(thresholds)
    assert curve.fpr.tolist() == [float(value) for value in fpr]
    assert curve.pro.tolist() == pytest.approx([float(value) for value in pro], **CLOSE)
    assert curve.num_regions == sum(len(regions_of(mask)) for mask in masks)
    assert (curve.fpr[0], curve.pro[0], curve.fpr[-1], curve.pro[-1]) == (0, 0, 1, 1)
    assert {curve.fpr.dtype, curve.pro.dtype, curve.thresholds.dtype} == {np.dtype(np.float64)}


@given(image_sets(), st.sampled_from(LIMITS) | st.floats(0.01, 1.0))
def test_aupro_is_the_integral_cut_at_the_limit(images, limit) -> None:
    maps, masks = images
    expected = float(aupro_by_definition(maps, masks, limit))
    assert aupro(maps, masks, limit) == pytest.approx(expected, **CLOSE)


@given(image_sets(), st.sampled_from(LIMITS))
def test_pixel_metrics_agree_with_the_single_functions(images, limit) -> None:
    maps, masks = images
    result = pixel_metrics(maps, masks, limit)
    scores = np.concatenate([anomaly_map.astype(np.float64).ravel() for anomaly_map in maps])
    labels = np.concatenate([mask.ravel() for mask in masks])
    best = f1_max(scores, labels)
    roc, pro = roc_curve(scores, labels), pro_curve(maps, masks)
    assert result.pixel_AUROC == auroc(scores, labels)
    assert (result.pixel_F1Max, result.threshold) == (best.value, best.threshold)
    assert result.pixel_AUPRO == aupro(maps, masks, limit)
    for mine, theirs in [
        (result.roc.fpr, roc.fpr),
        (result.roc.tpr, roc.tpr),
        (result.roc.thresholds, roc.thresholds),
        (result.pro.fpr, pro.fpr),
        (result.pro.pro, pro.pro),
        (result.pro.thresholds, pro.thresholds),
    ]:
        np.testing.assert_array_equal(mine, theirs)
    assert result.pro.num_regions == pro.num_regions


@given(image_sets(), st.randoms(use_true_random=False))
def test_metrics_depend_on_neither_scale_nor_image_order(images, random) -> None:
    maps, masks = images
    result = pixel_metrics(maps, masks)
    distinct = np.unique(np.concatenate([m.astype(np.float64).ravel() for m in maps]))
    ranks = [np.searchsorted(distinct, m.astype(np.float64)) for m in maps]
    order = list(range(len(maps)))
    random.shuffle(order)
    for other_maps, other_masks in [
        ([r**3 - 10.0 for r in ranks], masks),  # strictly increasing
        ([r * 1e-30 for r in ranks], masks),
        ([r * 1e300 for r in ranks], masks),
        ([maps[i] for i in order], [masks[i] for i in order]),
    ]:
        other = pixel_metrics(other_maps, other_masks)
        assert other.pixel_AUROC == result.pixel_AUROC
        assert other.pixel_F1Max == result.pixel_F1Max
        assert other.pixel_AUPRO == pytest.approx(result.pixel_AUPRO, **CLOSE)


def test_pixels_touching_only_diagonally_are_one_region() -> None:
    mask = np.zeros((5, 5), dtype=bool)
    mask[[0, 1, 2], [2, 1, 0]] = True  # an anti-diagonal
    mask[[3, 4], [3, 4]] = True  # a diagonal; (2, 0) and (3, 3) do not touch
    scores = np.zeros((5, 5))
    scores[3, 3] = 1.0
    curve = pro_curve([scores], [mask])
    assert curve.num_regions == 2
    assert curve.pro.tolist() == [0.0, 0.25, 1.0]


def test_regions_of_any_size_weigh_the_same() -> None:
    mask = np.zeros((10, 10), dtype=bool)
    mask[0, 0] = True  # one pixel
    mask[2:, 2:] = True  # 64 pixels
    curve = pro_curve([mask & (np.arange(10) < 1)], [mask])
    assert curve.pro.tolist() == [0.0, 0.5, 1.0]


def test_regions_are_not_joined_across_images() -> None:
    maps = [np.array([[1.0, 0.0]]), np.array([[0.0, 0.0]]), np.array([[1.0, 0.0]])]
    masks = [np.array([[True, False]])] * 3
    curve = pro_curve(maps, masks)
    assert curve.num_regions == 3
    assert curve.pro.tolist() == [0.0, 2 / 3, 1.0]


def test_constant_scores_give_one_straight_segment() -> None:
    mask = np.zeros((8, 8), dtype=bool)
    mask[2:4, 2:4] = True
    result = pixel_metrics([np.full((8, 8), -7.5, dtype=np.float32)], [mask], limit=0.25)
    assert result.pro.fpr.tolist() == result.pro.pro.tolist() == [0.0, 1.0]
    assert result.pro.thresholds.tolist() == [np.inf, -7.5]
    assert result.pixel_AUROC == 0.5
    assert result.pixel_AUPRO == 0.125  # the mean of y = x on [0, 0.25]


def test_aupro_is_interpolated_at_the_limit() -> None:
    # Normal pixels enter in steps of 1/4, the region's halves with the first two steps.
    mask = np.array([[True, True, False, False, False, False]])
    scores = np.array([[4.0, 3.0, 4.0, 3.0, 2.0, 1.0]])
    assert aupro([scores], [mask], limit=0.125) == pytest.approx(0.125)  # half of a step: PRO 1/4
    assert aupro([scores], [mask], limit=0.25) == pytest.approx(0.25)
    assert aupro([scores], [mask], limit=0.375) == pytest.approx(0.375)
    assert aupro([scores], [mask], limit=1.0) == pytest.approx(0.25 + 0.5)


@pytest.mark.parametrize("limit", [*LIMITS, 1e-6])
def test_perfect_maps_have_an_aupro_of_exactly_one(limit) -> None:
    rng = np.random.default_rng(1)
    masks = [rng.random((33, 41)) < 0.1 for _ in range(3)]
    maps = [rng.random(mask.shape) + 2.0 * mask for mask in masks]
    assert aupro(maps, masks, limit) == 1.0


def test_heavy_tailed_scores_are_ranked_not_binned() -> None:
    mask = np.zeros((100, 100), dtype=bool)
    mask[:10, :10] = True
    scores = np.random.default_rng(2).permutation(10_000).reshape(100, 100) * 1e-9
    scores[mask] += 1.0
    scores[50, 50] = 1e12  # one wild normal pixel; the rest is perfect
    end = 0.3 * 9900
    assert aupro([scores], [mask]) == pytest.approx((end - 1) / end, rel=1e-14)
    edges = np.linspace(scores.min(), scores.max(), 200)
    binned = aupro([np.searchsorted(edges, scores, side="right")], [mask])
    assert binned < 0.16  # what the example is there to catch


def test_pro_of_a_large_region_does_not_drift() -> None:
    large = np.zeros((500, 1001), dtype=bool)
    large[:, :-1] = True
    small = np.zeros((1, 7), dtype=bool)
    small[0, :3] = True
    below = np.arange(7.0).reshape(1, 7) - 7.0
    above = np.arange(large.size, dtype=np.float64).reshape(large.shape)
    curve = pro_curve([above, below], [large, small])
    shares = [np.cumsum(mask.ravel()[::-1]) / mask.sum() for mask in (large, small)]
    expected = np.concatenate([shares[0], 1.0 + shares[1]]) / 2
    assert np.abs(curve.pro[1:] - expected).max() <= 2.0**-52


def test_float64_maps_are_not_rounded_to_float32() -> None:
    mask = np.array([[True, False]])
    close = np.array([[np.nextafter(1.0, 2.0), 1.0]])
    assert pixel_metrics([close], [mask]).pixel_AUROC == 1.0
    lower = np.array([[-1.0, -2.0]], dtype=np.float32)  # another dtype in the same set
    assert pixel_metrics([lower, close], [mask, mask]).pixel_AUROC == 0.75


def test_a_stack_of_maps_and_integer_masks_are_accepted() -> None:
    maps = np.array([[[0.1, 0.4], [0.35, 0.8]]], dtype=np.float16)
    masks = np.array([[[0, 0], [1, 1]]], dtype=np.uint8)
    assert pixel_metrics(maps, masks).pixel_AUROC == 0.75


def test_inputs_are_left_alone() -> None:
    rng = np.random.default_rng(3)
    maps = [rng.random((6, 7), dtype=np.float32)]
    masks = [rng.random((6, 7)) < 0.3]
    before = maps[0].copy(), masks[0].copy()
    pixel_metrics(maps, masks)
    np.testing.assert_array_equal(maps[0], before[0])
    np.testing.assert_array_equal(masks[0], before[1])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_mask_of_another_shape_is_named_with_both_shapes(function) -> None:
    maps = [np.zeros((2, 2)), np.zeros((4, 6))]
    masks = [np.zeros((2, 2), dtype=bool), np.zeros((6, 4), dtype=bool)]
    message = rf"{function.__name__}: .*maps\[1\] and masks\[1\].* got \(4, 6\) and \(6, 4\)"
    with pytest.raises(ValueError, match=message):
        function(maps, masks)
    with pytest.raises(ValueError, match=r"maps\[0\].* got \(1, 4, 6\) and \(1, 4, 6\)"):
        function([np.zeros((1, 4, 6))], [np.zeros((1, 4, 6), dtype=bool)])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_missing_mask_is_counted(function) -> None:
    with pytest.raises(ValueError, match=rf"{function.__name__}: .*got 2 maps and 1 masks"):
        function([np.zeros((2, 2))] * 2, [np.zeros((2, 2), dtype=bool)])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_non_finite_scores_are_counted_and_placed(function) -> None:
    scores = np.zeros((3, 4), dtype=np.float32)
    scores[1, 2], scores[2, 0] = np.nan, np.inf
    mask = np.eye(3, 4, dtype=bool)
    message = r"maps\[1\]: .* got 2 non-finite of 12, the first at index \(1, 2\) \(nan\)"
    with pytest.raises(ValueError, match=message):
        function([np.zeros((3, 4)), scores], [mask, mask])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_mask_with_255_is_refused(function) -> None:
    mask = np.array([[0, 255]], dtype=np.uint8)
    with pytest.raises(ValueError, match=r"masks\[0\]: .* got the value 255"):
        function([np.zeros((1, 2))], [mask])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_sets_without_one_class_leave_the_metric_undefined(function) -> None:
    maps = [np.zeros((2, 3))] * 2
    with pytest.raises(UndefinedMetricError, match=r"only normal ones \(12 in 2 images\)"):
        function(maps, [np.zeros((2, 3), dtype=bool)] * 2)
    with pytest.raises(UndefinedMetricError, match=r"only anomalous ones \(12 in 2 images\)"):
        function(maps, [np.ones((2, 3), dtype=bool)] * 2)
    with pytest.raises(UndefinedMetricError, match="at least one anomaly map, got none"):
        function([], [])


@pytest.mark.parametrize("function", [aupro, pixel_metrics])
@pytest.mark.parametrize("limit", [0.0, -0.1, 1.0000001, float("nan")])
def test_a_limit_outside_its_range_is_refused(function, limit) -> None:
    mask = np.array([[True, False]])
    with pytest.raises(ValueError, match=rf"{function.__name__}: expected limit in \(0, 1\]"):
        function([np.zeros((1, 2))], [mask], limit)


def test_memory_stays_below_a_hundred_bytes_a_pixel() -> None:
    rng = np.random.default_rng(4)
    maps = [rng.standard_normal((256, 256), dtype=np.float32) for _ in range(8)]
    masks = [np.arange(65536).reshape(256, 256) % 256 < 40] * 8
    tracemalloc.start()
    try:
        pixel_metrics(maps, masks)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100 * 8 * 65536
