"""Photographed textures and synthetic defects: a data set that needs no download."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from glance_ext.files import atomic_write

TEXTURES = ("brick", "grass", "gravel")
CROP = 192
_TRAIN_COLUMNS = 300  # of 512: training crops share no pixel with the others
_HELD_OUT_ROWS = 212  # of the rest, of which test crops have none


def texture(name: str) -> np.ndarray:
    """One of scikit-image's textures as ``(512, 512, 3)`` float32 in [0, 1]."""
    import skimage.data

    grey = getattr(skimage.data, name)().astype(np.float32) / 255
    return np.repeat(grey[..., None], 3, 2)


def write_texture_set(
    folder: Path,
    name: str,
    *,
    seed: int,
    train: int = 40,
    held_out: int = 8,
    good: int = 5,
    each: int = 2,
) -> None:
    """Writes crops of a texture as a data set in the MVTec layout, with ``validation/good``.

    Crops of one part overlap, so that those held out for a threshold come from a part of their own:
    among training crops they would look more familiar than any crop to come.

    Args:
        folder: Where ``train``, ``validation``, ``test`` and ``ground_truth`` go.
        name: One of :data:`TEXTURES`.
        seed: Of crops and defects.
        train: How many training crops, from the left part.
        held_out: How many crops without defect for calibration, from the upper right part.
        good: How many test crops without defect, from the lower right part.
        each: How many test crops with each kind of defect, from there too.

    Raises:
        OutputError: A file cannot be written.
    """
    rng = np.random.default_rng([seed, TEXTURES.index(name)])
    picture = texture(name)
    left, right = picture[:, :_TRAIN_COLUMNS], picture[_HELD_OUT_ROWS:, _TRAIN_COLUMNS:]
    upper = picture[:_HELD_OUT_ROWS, _TRAIN_COLUMNS:]
    other = texture(TEXTURES[(TEXTURES.index(name) + 1) % len(TEXTURES)])
    for index in range(train):
        _write_image(folder / "train" / "good" / f"{index:03}.png", _crop(left, rng))
    for index in range(held_out):
        _write_image(folder / "validation" / "good" / f"{index:03}.png", _crop(upper, rng))
    for index in range(good):
        _write_image(folder / "test" / "good" / f"{index:03}.png", _crop(right, rng))
    for kind, damage in DEFECTS.items():
        for index in range(each):
            image, mask = damage(_crop(right, rng), other, rng)
            _write_image(folder / "test" / kind / f"{index:03}.png", image)
            _write_image(folder / "ground_truth" / kind / f"{index:03}_mask.png", mask)


def _crop(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    row = rng.integers(picture.shape[0] - CROP + 1)
    column = rng.integers(picture.shape[1] - CROP + 1)
    return picture[row : row + CROP, column : column + CROP].copy()


def _write_image(path: Path, image: np.ndarray) -> None:
    pixels = np.clip(np.round(image.astype(np.float32) * 255), 0, 255).astype(np.uint8)
    with atomic_write(path) as stream:
        Image.fromarray(pixels).save(stream, format="PNG")


Damaged = tuple[np.ndarray, np.ndarray]


def _ellipse(rng: np.random.Generator, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """A random ellipse's soft coverage in [0, 1] and its mask, ``(CROP, CROP)`` each."""
    semi = rng.uniform(low, high, 2)
    centre = rng.uniform(high + 4, CROP - high - 4, 2)
    angle = rng.uniform(0, math.pi)
    y, x = np.mgrid[:CROP, :CROP] - centre[:, None, None]
    along = (x * math.cos(angle) + y * math.sin(angle)) / semi[0]
    across = (y * math.cos(angle) - x * math.sin(angle)) / semi[1]
    inside = 1 - np.hypot(along, across)
    return np.clip(inside * 6 + 0.5, 0, 1)[..., None], inside > 0


def _blot(image: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> Damaged:
    """A dark or bright spot."""
    cover, mask = _ellipse(rng, 6, 14)
    tone = rng.choice([0.05, 0.95])
    return image * (1 - 0.8 * cover) + 0.8 * cover * tone, mask


def _scratch(image: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> Damaged:
    """A thin bright line."""
    start = rng.uniform(20, CROP - 20, 2)
    angle, length = rng.uniform(0, math.pi), rng.uniform(45, 90)
    direction = np.array([math.sin(angle), math.cos(angle)])
    offset = np.moveaxis(np.mgrid[:CROP, :CROP], 0, -1) - start
    along = np.clip(offset @ direction, -length / 2, length / 2)
    distance = np.linalg.norm(offset - along[..., None] * direction, axis=-1)
    cover = np.clip(2.0 - distance, 0, 1)[..., None]
    return image * (1 - cover) + cover * 0.95, distance < 2


def _foreign(image: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> Damaged:
    """A piece of another texture."""
    cover, mask = _ellipse(rng, 14, 26)
    return image * (1 - cover) + cover * _crop(other, rng), mask


def _smear(image: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> Damaged:
    """A place where the texture is wiped away."""
    from scipy.ndimage import gaussian_filter

    cover, mask = _ellipse(rng, 12, 24)
    return image * (1 - cover) + cover * gaussian_filter(image, (5, 5, 0)), mask


DEFECTS: dict[str, Callable[[np.ndarray, np.ndarray, np.random.Generator], Damaged]] = {
    "blot": _blot,
    "foreign": _foreign,
    "scratch": _scratch,
    "smear": _smear,
}
