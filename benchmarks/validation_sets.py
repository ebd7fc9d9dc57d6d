"""Writes data sets to choose settings by: good images set aside, and drawn defects in them.

No test image is read. From each category's ``train/good`` a share is set aside; these are the new
``test/good``, and each of them comes back with drawn defects. The rest is the new ``train/good``.
The defects are of other kinds than the stains that the distortion head is trained with
(``glance_ext/data/stains.py``); the pieces that the head in context learns from are most like
"misplaced" and "broken". Beside the categories stand scikit-image's photographed textures,
as they are and as dark tiles of varying brightness, contrast, light and grain: what varies there
from one good tile to the next is no defect.

The result has the MVTec layout, so choosing takes no more than the usual commands::

    python benchmarks/validation_sets.py DATA/screw DATA/cookies --output SETS
    glance-ext train SETS/screw --output runs/screw && glance-ext evaluate runs/screw SETS/screw
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates, zoom

from glance_ext.data.datasets import normal_images, split_held_out
from glance_ext.data.images import load_image, resize
from glance_ext.data.textures import CROP, TEXTURES, texture

SIDE = 256
SHARE = 0.3  # of the good images, set aside
MOST = 48  # of them; with each kind of defect once, hundreds of images are enough
TEXTURE_TRAIN, TEXTURE_TEST = 40, 12
TRAIN_COLUMNS = 300  # of a texture's 512: training and test tiles share no pixel

Rng = np.random.Generator
Damaged = tuple[np.ndarray, np.ndarray]


def smooth_noise(rng: Rng, cells: int) -> np.ndarray:
    """Noise of mean 0 and variance 1 with about so many waves a side, ``(SIDE, SIDE)``."""
    coarse = rng.normal(size=(cells + 3, cells + 3))
    fine = zoom(coarse, SIDE / cells, order=3)
    row, column = rng.integers(0, fine.shape[0] - SIDE + 1, 2)
    field = fine[row : row + SIDE, column : column + SIDE]
    return (field - field.mean()) / max(float(field.std()), 1e-6)


def blob(rng: Rng, centre: np.ndarray, size: float) -> np.ndarray:
    """A soft ragged spot in [0, 1], about ``size`` pixels across."""
    y, x = np.mgrid[:SIDE, :SIDE] - centre[:, None, None]
    angle, ratio = rng.uniform(0, math.pi), rng.uniform(0.5, 1.0)
    along = x * math.cos(angle) + y * math.sin(angle)
    across = (y * math.cos(angle) - x * math.sin(angle)) / ratio
    inside = size / 2 * (1 + 0.25 * smooth_noise(rng, 12)) - np.hypot(along, across)
    return np.clip(inside / 2 + 0.5, 0, 1)


def size_of(rng: Rng) -> float:
    """Pixels across a defect: small ones are as frequent as large ones."""
    return math.exp(rng.uniform(math.log(14), math.log(64)))


def shade(rng: Rng, image: np.ndarray, cover: np.ndarray) -> np.ndarray:
    """A colour that differs from the covered pixels' mean by 0.15 to 0.5, as the image allows."""
    mean = (image * cover[..., None]).sum((0, 1)) / cover.sum()
    change = rng.uniform(0.15, 0.5) * rng.choice([-1, 1])
    if not 0 <= mean.mean() + change <= 1:
        change = -change
    return np.clip(mean + change * rng.uniform(0.7, 1.0, 3), 0, 1)


def blend(image: np.ndarray, other: np.ndarray, cover: np.ndarray) -> np.ndarray:
    return image + cover[..., None] * (other - image)


def dent(image: np.ndarray, centre: np.ndarray, rng: Rng) -> Damaged:
    """A place that is pushed aside."""
    size = size_of(rng)
    cover = gaussian_filter(blob(rng, centre, size), 2)
    angle, length = rng.uniform(0, 2 * math.pi), size / 4
    grid = np.mgrid[:SIDE, :SIDE].astype(np.float64)
    grid[0] += cover * length * math.sin(angle)
    grid[1] += cover * length * math.cos(angle)
    moved = [map_coordinates(image[..., c], grid, order=1, mode="nearest") for c in range(3)]
    return np.stack(moved, -1), cover > 0.3


def scratch(image: np.ndarray, centre: np.ndarray, rng: Rng) -> Damaged:
    """A thin bent line."""
    count, length, width = 60, rng.uniform(20, 90), rng.uniform(0.7, 2.5)
    angle = rng.uniform(0, 2 * math.pi) + np.cumsum(rng.normal(0, 0.06, count))
    steps = np.stack((np.sin(angle), np.cos(angle)), 1) * length / count
    path = centre + np.cumsum(steps, 0) - steps.sum(0) / 2
    grid = np.mgrid[:SIDE, :SIDE].reshape(2, -1).T
    distance = np.sqrt(((grid[:, None] - path[None]) ** 2).sum(-1).min(1)).reshape(SIDE, SIDE)
    cover = np.clip(width + 0.5 - distance, 0, 1)
    return blend(image, shade(rng, image, cover), cover), distance < width + 0.5


def cloud(image: np.ndarray, centre: np.ndarray, rng: Rng) -> Damaged:
    """A frayed patch of dirt, where noise of several scales passes a level."""
    noise = smooth_noise(rng, 16) + 0.5 * smooth_noise(rng, 32) + 0.25 * smooth_noise(rng, 64)
    y, x = np.mgrid[:SIDE, :SIDE] - centre[:, None, None]
    size = size_of(rng)
    cover = np.clip((noise + 1.5 - 2 * np.hypot(y, x) / size) * 2, 0, 1)
    cover = np.maximum(cover, blob(rng, centre, 5))
    return blend(image, shade(rng, image, cover), 0.8 * cover), cover > 0.3


def missing(image: np.ndarray, centre: np.ndarray, rng: Rng) -> Damaged:
    """A piece that is gone: in its place what lies around it flows together."""
    cover = blob(rng, centre, size_of(rng))
    known = (cover < 0.05).astype(np.float64)
    filled = np.zeros_like(image)
    weight = np.zeros((SIDE, SIDE))
    for sigma in (3, 6, 12, 24):  # the nearest that reaches counts
        reach = gaussian_filter(known, sigma)
        layer = np.stack([gaussian_filter(image[..., c] * known, sigma) for c in range(3)], -1)
        some = np.clip(reach * 20, 0, 1) * (1 - weight)
        filled += some[..., None] * layer / np.maximum(reach, 1e-9)[..., None]
        weight += some
    return blend(image, filled / np.maximum(weight, 1e-9)[..., None], cover), cover > 0.3


def misplaced(image: np.ndarray, centre: np.ndarray, rng: Rng) -> Damaged:
    """A piece of the same image from another place, turned."""
    turned = np.rot90(image, rng.integers(1, 4))
    turned = np.roll(turned, rng.integers(40, SIDE - 40, 2), (0, 1))
    cover = blob(rng, centre, size_of(rng))
    return blend(image, turned, cover), cover > 0.3


def smear(image: np.ndarray, centre: np.ndarray, rng: Rng) -> Damaged:
    """A place where all detail is wiped away."""
    cover = blob(rng, centre, size_of(rng))
    return blend(image, gaussian_filter(image, (4, 4, 0)), cover), cover > 0.3


def broken(image: np.ndarray, centre: np.ndarray, rng: Rng) -> Damaged:
    """A piece that is broken off, up to 100 pixels across: what lies behind the object shows.

    It is there whatever stands out least of the same image, turned and moved.
    """
    background = np.median(image, (0, 1))
    interest = gaussian_filter(np.abs(image - background).mean(-1), 2)
    cover = blob(rng, centre, math.exp(rng.uniform(math.log(28), math.log(100))))
    places = [(rng.integers(4), rng.integers(0, SIDE, 2)) for _ in range(200)]
    plain = min(places, key=lambda place: float((elsewhere(interest, *place) * cover).sum()))
    return blend(image, elsewhere(image, *plain), cover), cover > 0.3


def elsewhere(image: np.ndarray, quarters: int, shift: np.ndarray) -> np.ndarray:
    return np.roll(np.rot90(image, quarters), shift, (0, 1))


DEFECTS: dict[str, Callable[[np.ndarray, np.ndarray, Rng], Damaged]] = {
    "cloud": cloud,
    "dent": dent,
    "misplaced": misplaced,
    "missing": missing,
    "scratch": scratch,
    "smear": smear,
}
LATER = {"broken": broken}  # drawn behind the others, so that those stay what they were
LEAST_CHANGE = 0.06  # of a pixel's value, that some pixels of a defect must show


def damage(image: np.ndarray, kind: str, rng: Rng) -> Damaged:
    """Draws a defect where the image has something, and where the defect changes it visibly.

    Where none of fifty does, the one that changes most: light that varies over a dark tile is no
    texture that a smear could wipe away.

    Args:
        image: ``(SIDE, SIDE, 3)`` in [0, 1].
        kind: One of :data:`DEFECTS` or :data:`LATER`.
        rng: Of everything random.

    Returns:
        The damaged image and the defect's mask ``(SIDE, SIDE)``.

    Raises:
        ValueError: The image is the same everywhere.
    """
    background = np.median(image, (0, 1))
    interest = gaussian_filter(np.abs(image - background).mean(-1), 4) ** 2
    interest[:20] = interest[-20:] = interest[:, :20] = interest[:, -20:] = 0
    if not interest.any():
        raise ValueError(f"{kind}: expected an image with something in it, got one colour")
    chances = (interest / interest.sum()).ravel()
    most, best = -1.0, None
    for _ in range(50):
        centre = np.array(divmod(int(rng.choice(chances.size, p=chances)), SIDE), np.float64)
        damaged, mask = {**DEFECTS, **LATER}[kind](image, centre, rng)
        damaged = np.clip(damaged, 0, 1)
        if not mask.any():
            continue
        change = float(np.quantile(np.abs(damaged - image).mean(-1)[mask], 0.8))
        if change > most:
            most, best = change, (damaged, mask)
        if change >= LEAST_CHANGE * min(1, image.std() * 8):
            break
    assert best is not None
    return best


def tile_of(picture: np.ndarray, rng: Rng) -> np.ndarray:
    row = rng.integers(picture.shape[0] - CROP + 1)
    column = rng.integers(picture.shape[1] - CROP + 1)
    crop = picture[row : row + CROP, column : column + CROP]
    return resize(crop.astype(np.float32), (SIDE, SIDE)).numpy().transpose(1, 2, 0).clip(0, 1)


def darkened(tile: np.ndarray, rng: Rng) -> np.ndarray:
    """A tile in poor light: dark, of any contrast, brighter on one side than on the other."""
    contrast, level = rng.uniform(0.25, 0.8), rng.uniform(0.15, 0.45)
    light = 1 + rng.uniform(0, 0.3) * smooth_noise(rng, 2)[..., None]
    return np.clip((level + contrast * level * 2 * (tile - tile.mean())) * light, 0, 1)


def grained(tile: np.ndarray, rng: Rng) -> np.ndarray:
    """Grain of varying strength and size, the same in all channels."""
    grain = gaussian_filter(rng.normal(size=(SIDE, SIDE)), rng.uniform(0.3, 1.2))
    return np.clip(tile + rng.uniform(0.01, 0.05) * (grain / grain.std())[..., None], 0, 1)


def unchanged(tile: np.ndarray, rng: Rng) -> np.ndarray:
    return tile


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.round(image * 255).astype(np.uint8)).save(path)


def write_set(
    folder: Path,
    train: list[np.ndarray],
    good: list[np.ndarray],
    rng: Rng,
    later: Rng,
    finish: Callable[[np.ndarray, Rng], np.ndarray] = unchanged,
) -> None:
    """Writes a data set; ``finish`` is what comes over an image after its defect, such as grain.

    A generator for what is drawn at first, and one for what is drawn later.
    """
    for index, image in enumerate(train):
        write(folder / "train" / "good" / f"{index:03}.png", finish(image, rng))
    for index, image in enumerate(good):
        write(folder / "test" / "good" / f"{index:03}.png", finish(image, rng))
        for kind in DEFECTS:
            damaged, mask = damage(image, kind, rng)
            write(folder / "test" / kind / f"{index:03}.png", finish(damaged, rng))
            write(folder / "ground_truth" / kind / f"{index:03}_mask.png", mask)
    for kind in LATER:
        for path in sorted((folder / "test" / "good").iterdir()):
            damaged, mask = damage(read(path).astype(np.float64), kind, later)
            write(folder / "test" / kind / path.name, damaged)
            write(folder / "ground_truth" / kind / f"{path.stem}_mask.png", mask)


def read(path: Path) -> np.ndarray:
    return resize(load_image(path), (SIDE, SIDE)).numpy().transpose(1, 2, 0).clip(0, 1)


def later_rng(seed: int) -> Rng:
    return np.random.default_rng(77 + seed)


def write_category(folder: Path, category: Path, seed: int) -> None:
    """Writes what comes of a category's good training images."""
    paths = normal_images(category, None)
    share = min(SHARE, MOST / len(paths))
    train, good = (list(map(read, part)) for part in split_held_out(paths, share, seed))
    write_set(folder, train, good, np.random.default_rng([seed, 1]), later_rng(seed))


def write_texture(folder: Path, name: str, dark: bool, seed: int) -> None:
    """Writes tiles of a texture, its left part to learn from and its right part to judge by."""
    rng = np.random.default_rng([seed, 2, TEXTURES.index(name), dark])
    picture = texture(name)
    left, right = picture[:, :TRAIN_COLUMNS], picture[:, TRAIN_COLUMNS:]
    adapt, finish = (darkened, grained) if dark else (unchanged, unchanged)
    train = [adapt(tile_of(left, rng), rng) for _ in range(TEXTURE_TRAIN)]
    good = [adapt(tile_of(right, rng), rng) for _ in range(TEXTURE_TEST)]
    write_set(folder, train, good, rng, later_rng(seed), finish)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("categories", type=Path, nargs="*", help="folders in the MVTec layout")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for category in options.categories:
        write_category(options.output / category.name, category, options.seed)
    for name in TEXTURES:
        write_texture(options.output / name, name, False, options.seed)
        write_texture(options.output / f"{name}-dark", name, True, options.seed)


if __name__ == "__main__":
    main()
