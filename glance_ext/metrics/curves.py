"""Helpers for drawing curves that have one point per distinct score."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def thin(
    curve_x: ArrayLike, curve_y: ArrayLike, points: int = 1000
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Picks points of a long curve so that it still looks the same.

    The points are spread evenly along the curve's length, each axis measured by its own extent,
    so that the steep rise of a good ROC curve keeps as many as its flat rest. Around every place
    picked both neighbours stay, so that a corner before a long straight segment is not cut. What
    is left out lies within ``2 / (points // 2 - 1)`` of the axes' extents from the new line, for
    a monotone curve.

    Args:
        curve_x: ``(K,)`` finite abscissae.
        curve_y: ``(K,)`` finite ordinates.
        points: How many points to keep at most; at least 2.

    Returns:
        Two float64 arrays ``(M,)``, ``M <= points``: points of the curve in their order, with
        its first and its last. A curve that is short enough comes back whole.

    Raises:
        ValueError: ``points`` is below 2, the curve is not two 1-D arrays of one length, or it
            is not finite.
    """
    x = np.asarray(curve_x, dtype=np.float64)
    y = np.asarray(curve_y, dtype=np.float64)
    if points < 2:
        raise ValueError(f"thin: expected points >= 2, got {points}")
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(
            f"thin: expected curve_x and curve_y of one shape (K,), got {x.shape} and {y.shape}"
        )
    if x.size <= points:
        return x.copy(), y.copy()
    length = _travelled(x)
    length += _travelled(y)
    if not np.isfinite(length[-1]):
        raise ValueError("thin: expected a finite curve, got infinite or NaN coordinates")
    after = np.searchsorted(length, np.linspace(0.0, length[-1], points // 2))
    before = np.maximum(after - 1, 0)
    keep = np.unique(np.concatenate([before, after, [x.size - 1]]))
    return x[keep], y[keep]


def _travelled(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance travelled along one axis up to each point, in units of the whole, ``(K,)``."""
    way = np.zeros(values.size, dtype=np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        np.cumsum(np.abs(np.diff(values)), out=way[1:])
        if way[-1] > 0:
            way /= way[-1]
    return way
