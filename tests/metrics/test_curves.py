"""Thinned curves look like the whole ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glance_ext.metrics import thin


def distances_to_line(x: np.ndarray, y: np.ndarray, line_x, line_y) -> np.ndarray:
    """Distance of each point to the polyline, each axis in units of its extent."""
    scale_x, scale_y = np.ptp(x) or 1.0, np.ptp(y) or 1.0
    points = np.stack([x / scale_x, y / scale_y], axis=1)[:, None]
    line = np.stack([line_x / scale_x, line_y / scale_y], axis=1)
    start, step = line[:-1], np.diff(line, axis=0)
    squared = np.maximum((step**2).sum(1), 1e-300)
    along = np.clip(((points - start) * step).sum(2) / squared, 0, 1)
    return np.linalg.norm(points - start - along[..., None] * step, axis=2).min(1)


@st.composite
def rising_curves(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Long monotone curves with steep parts, flat parts and jumps."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = draw(st.integers(60, 400))
    power = draw(st.integers(1, 30))
    steps = rng.random((2, size)) ** power
    steps[:, rng.random(size) < 0.3] = 0
    x, y = np.cumsum(steps, axis=1)
    return x * draw(st.sampled_from([1e-30, 1.0, 1e30])), y


@given(rising_curves(), st.integers(4, 60))
def test_thinned_curve_keeps_ends_order_and_looks(curve, points) -> None:
    x, y = curve
    thin_x, thin_y = thin(x, y, points)
    assert thin_x.size == thin_y.size <= points
    ends = (thin_x[0], thin_y[0], thin_x[-1], thin_y[-1])
    assert ends == (x[0], y[0], x[-1], y[-1])
    assert set(zip(thin_x, thin_y, strict=True)) <= set(zip(x, y, strict=True))
    assert (np.diff(thin_x) >= 0).all()
    assert (np.diff(thin_y) >= 0).all()
    bound = 2 / (points // 2 - 1) if points > 5 else np.inf
    assert distances_to_line(x, y, thin_x, thin_y).max() <= bound


def test_steep_rise_and_sharp_corner_survive() -> None:
    # A near-perfect ROC curve: a million points, the rise within the first thousandth.
    x = np.concatenate([np.linspace(0, 1e-3, 1000), np.linspace(1e-3, 1, 1_000_000)])
    y = np.concatenate([np.linspace(0, 0.99, 1000), np.linspace(0.99, 1, 1_000_000)])
    thin_x, thin_y = thin(x, y)
    assert 900 < thin_x.size <= 1000
    assert np.abs(np.interp(x, thin_x, thin_y) - y).max() < 2e-3


def test_each_axis_is_measured_by_its_own_extent() -> None:
    x = np.linspace(0, 1, 1000) ** 9
    y = 1 - np.linspace(1, 0, 1000) ** 9
    thin_x, thin_y = thin(x, y, points=50)
    wide_x, wide_y = thin(2.0**40 * x, 2.0**-40 * y, points=50)
    np.testing.assert_array_equal(wide_x, 2.0**40 * thin_x)
    np.testing.assert_array_equal(wide_y, 2.0**-40 * thin_y)


def test_both_ends_of_a_long_straight_segment_stay() -> None:
    steps = np.linspace(0, 0.01, 5000)
    x = np.concatenate([steps, 0.99 + steps])
    thin_x, _ = thin(x, x, points=10)
    assert {0.01, 0.99} <= set(thin_x)


def test_short_curves_come_back_whole_as_copies() -> None:
    x, y = np.array([0.0, 0.5, 1.0]), np.array([0.0, 1.0, 1.0])
    thin_x, thin_y = thin(x, y, points=3)
    np.testing.assert_array_equal(thin_x, x)
    np.testing.assert_array_equal(thin_y, y)
    thin_x[0] = 9
    assert x[0] == 0


@pytest.mark.parametrize("points", [2, 3, 4, 5])
def test_few_points_are_still_the_ends(points) -> None:
    x = np.linspace(0, 1, 100)
    thin_x, _ = thin(x, x**2, points)
    assert thin_x.size <= points
    assert (thin_x[0], thin_x[-1]) == (0, 1)


def test_a_curve_that_stands_still_keeps_its_ends() -> None:
    thin_x, thin_y = thin(np.ones(50), np.zeros(50), points=10)
    assert thin_x.tolist() == [1, 1]
    assert thin_y.tolist() == [0, 0]


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match="thin: expected points >= 2, got 1"):
        thin([0, 1], [0, 1], points=1)
    with pytest.raises(ValueError, match=r"thin: .* got \(2,\) and \(3,\)"):
        thin([0, 1], [0, 1, 2])
    with pytest.raises(ValueError, match=r"thin: .* got \(1, 2\) and \(1, 2\)"):
        thin([[0, 1]], [[0, 1]])
    for bad in (np.inf, np.nan):
        with pytest.raises(ValueError, match="thin: expected a finite curve"):
            thin([0.0, 1.0, bad], [0.0, 0.5, 1.0], points=2)
