"""Anomaly maps painted over their images."""

from __future__ import annotations

import functools
import io
import math
import os

import numpy as np
from PIL import Image

from glance_ext.files import atomic_write

NON_FINITE_COLOUR = (255, 0, 255)
CONTOUR_INSIDE = (255, 255, 255)
CONTOUR_OUTSIDE = (0, 0, 0)


def overlay(
    image: np.ndarray,
    anomaly_map: np.ndarray,
    low: float,
    high: float,
    *,
    threshold: float | None = None,
) -> np.ndarray:
    """Paints ``anomaly_map`` over ``image``, the more opaque the more anomalous.

    Opacity and colour (matplotlib's "turbo", blue to red) rise linearly from ``low``, where the
    image shows unchanged, to ``high``, where only the colour shows; scores beyond are clipped. If
    ``low == high`` the scale is a step: nothing up to there, full colour above. NaN and infinities
    are painted magenta, which the colour map does not contain, on top of all else.

    Args:
        image: The image, float ``(H, W, 3)`` in [0, 1].
        anomaly_map: The scores as the detector gave them, float ``(H, W)``.
        low: The score at which colour begins.
        high: The score at which colour is opaque.
        threshold: Where given, the region ``anomaly_map >= threshold`` is outlined: its outermost
            pixels white, the pixels just outside black, so that the boundary lies exactly between
            and is seen on any background. The line widens with the image. None is drawn along the
            image's own border.

    Returns:
        The picture, uint8 ``(H, W, 3)``.

    Raises:
        ValueError: Shapes do not agree, ``low > high``, or a bound is not a number.
    """
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"overlay: expected image to have shape (H, W, 3), got {image.shape}")
    if anomaly_map.shape != image.shape[:2]:
        raise ValueError(
            f"overlay: expected anomaly_map to have the image's size {image.shape[:2]}, "
            f"got {anomaly_map.shape}"
        )
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"overlay: expected finite low <= high, got low={low}, high={high}")
    if threshold is not None and math.isnan(threshold):
        raise ValueError("overlay: expected threshold to be a number or None, got nan")

    picture = to_uint8(image)
    finite = np.isfinite(anomaly_map)
    strength = _strength(np.where(finite, anomaly_map, low), low, high)
    painted = strength > 0
    alpha = strength[painted, None]
    colour = _colour_table()[np.rint(strength[painted] * 255).astype(np.intp)]
    picture[painted] = np.rint(picture[painted] * (1 - alpha) + colour * alpha).astype(np.uint8)

    if threshold is not None:
        with np.errstate(invalid="ignore"):
            region = anomaly_map >= threshold
        inside, outside = outline(region, line_width(*region.shape))
        picture[outside] = CONTOUR_OUTSIDE
        picture[inside] = CONTOUR_INSIDE
    picture[~finite] = NON_FINITE_COLOUR
    return picture


def write_png(path: str | os.PathLike[str], pixels: np.ndarray) -> None:
    """Writes ``pixels`` as a PNG file, whole or not at all.

    Args:
        path: Where the picture belongs; its folder is created if missing.
        pixels: uint8 ``(H, W, 3)`` or grey ``(H, W)``.

    Raises:
        OutputError: The file cannot be written.
        ValueError: ``pixels`` has another shape or dtype.
    """
    data = encode_png(pixels)
    with atomic_write(path) as stream:
        stream.write(data)


def encode_png(pixels: np.ndarray) -> bytes:
    """Returns uint8 ``pixels``, ``(H, W, 3)`` or ``(H, W)``, as the bytes of a PNG file."""
    is_picture = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)
    if pixels.dtype != np.uint8 or not is_picture or pixels.size == 0:
        raise ValueError(
            "encode_png: expected pixels to be uint8 of shape (H, W, 3) or (H, W) and not empty, "
            f"got {pixels.dtype} of shape {pixels.shape}"
        )
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG")
    return buffer.getvalue()


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Returns a float image in [0, 1] as uint8, rounded to nearest, in new memory."""
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def line_width(height: int, width: int) -> int:
    """Returns the width in pixels of one side of an outline that is seen on such a picture."""
    return max(1, round(min(height, width) / 256))


def outline(region: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the bands along the boundary of ``region``: inside it and outside it.

    Args:
        region: bool ``(H, W)``.
        width: The width of each band in pixels. With 1, the inner band is the region's pixels that
            have one of their four neighbours outside, and the outer band the reverse.

    Returns:
        Two bool ``(H, W)``, the first part of the region and the second disjoint from it. Beyond
        the picture the region goes on as at its border, so none runs along that.
    """
    return region & _grow(~region, width), ~region & _grow(region, width)


def _grow(region: np.ndarray, steps: int) -> np.ndarray:
    """Dilates by ``steps`` pixels: crosses and squares by turns, whose product is near a disc."""
    for step in range(steps):
        rows = region.copy()
        rows[1:] |= region[:-1]
        rows[:-1] |= region[1:]
        across = rows if step % 2 else region
        rows = rows.copy()
        rows[:, 1:] |= across[:, :-1]
        rows[:, :-1] |= across[:, 1:]
        region = rows
    return region


def _strength(scores: np.ndarray, low: float, high: float) -> np.ndarray:
    """Maps finite scores linearly from [low, high] to [0, 1], clipped; a step if they coincide."""
    if low == high:
        return (scores > low).astype(np.float32)
    # In double: the difference of two float32 numbers may exceed float32.
    scaled = (np.clip(scores.astype(np.float64), low, high) - low) / (high - low)
    return scaled.astype(np.float32)


@functools.cache
def _colour_table() -> np.ndarray:
    """Returns "turbo" as float32 ``(256, 3)`` in [0, 255], without its two near-black ends.

    At full length the worst pixels would be the dullest ones, and sink into a dark image.
    """
    from matplotlib import colormaps

    colours = colormaps["turbo"](np.linspace(0.08, 0.92, 256))
    return np.asarray(colours[:, :3] * 255, dtype=np.float32)
