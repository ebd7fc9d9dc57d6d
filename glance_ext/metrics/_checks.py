"""Input checks shared by the metrics: each message names the function and the argument."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_EXACT_INT = 2**53  # every integer up to here is a float64


def check_scores(scores: ArrayLike, what: str) -> NDArray[np.floating]:
    """Returns finite scores as float32 or float64, value for value.

    float16 is widened to float32 (exact, and faster to sort); integers and booleans become
    float64.

    Args:
        scores: Scores of any shape.
        what: Function and argument, for messages: ``"auroc: scores"``.

    Returns:
        An array of the same shape; the input itself where nothing had to change.

    Raises:
        TypeError: The dtype is none of float16, float32, float64, integer, boolean.
        ValueError: A score is NaN or infinite, or an integer that float64 cannot hold.
    """
    array = np.asarray(scores)
    if array.dtype.kind in "biu":
        if array.dtype.itemsize == 8 and array.size:
            low, high = int(array.min()), int(array.max())
            if low < -_EXACT_INT or high > _EXACT_INT:
                raise ValueError(
                    f"{what}: expected integers within +-2**53, which float64 holds exactly, "
                    f"got values from {low} to {high}"
                )
        return array.astype(np.float64)
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise TypeError(
            f"{what}: expected float16, float32, float64 or integer scores, got {array.dtype}"
        )
    finite = np.isfinite(array)
    if not finite.all():
        count = int(array.size - np.count_nonzero(finite))
        flat = int(np.argmin(finite))
        place = tuple(int(i) for i in np.unravel_index(flat, array.shape))
        shown = place[0] if len(place) == 1 else place
        raise ValueError(
            f"{what}: expected finite scores, got {count} non-finite of {array.size}, "
            f"the first at index {shown} ({array[place]})"
        )
    wide = np.float64 if array.dtype.itemsize == 8 else np.float32
    return array.astype(wide, copy=False)


def check_binary(values: ArrayLike, what: str) -> NDArray[np.bool_]:
    """Returns labels or a mask as booleans.

    Args:
        values: Booleans, or numbers that are all 0 or 1, of any shape.
        what: Function and argument, for messages: ``"auroc: labels"``.

    Raises:
        TypeError: The values are no numbers.
        ValueError: A value is neither 0 nor 1 (a mask read from a file with 0 and 255 counts).
    """
    array = np.asarray(values)
    if array.dtype == np.bool_:
        return array
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{what}: expected bool, or numbers 0 and 1, got {array.dtype}")
    wrong = (array != 0) & (array != 1)
    if wrong.any():
        raise ValueError(
            f"{what}: expected bool, or numbers 0 and 1, got the value "
            f"{array.reshape(-1)[int(np.argmax(wrong))]}"
        )
    return array.astype(np.bool_)


def check_limit(limit: float, name: str) -> None:
    """Checks the false positive rate at which an integral ends.

    Raises:
        ValueError: ``limit`` is outside (0, 1].
    """
    if not 0.0 < limit <= 1.0:
        raise ValueError(f"{name}: expected limit in (0, 1], got {limit}")
