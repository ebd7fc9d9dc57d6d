"""Training images at their own resolution, as windows of 256x256."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from glance_ext.data.images import load_image, resize
from glance_ext.engine.tiles import random_windows, tiled_size
from glance_ext.errors import TOO_LARGE, InputError
from glance_ext.models.glance import IMAGE_SIZE

# Windows of all images together, 400 MB as float16; every image gives at least one.
_MOST_WINDOWS = 1024


def load_windows(
    paths: Sequence[Path], seed: int, on_error: Callable[[InputError], None]
) -> tuple[Tensor, int]:
    """Cuts windows out of images at random places, larger images giving more of them.

    Args:
        paths: The files.
        seed: Of the places; they do not depend on which other files can be used.
        on_error: Called for each file that cannot be used.

    Returns:
        Windows ``(n, 3, 256, 256)`` float16, RGB in [0, 1], and of how many images they are.
    """
    most = max(1, _MOST_WINDOWS // max(1, len(paths)))
    windows = []
    for index, path in enumerate(paths):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        try:
            windows.append(random_windows(native_planes(path), most, generator).half())
        except InputError as error:
            on_error(error)
    if not windows:
        return torch.empty((0, 3, *IMAGE_SIZE), dtype=torch.float16), 0
    return torch.cat(windows), len(windows)


def usable(paths: Sequence[Path], on_error: Callable[[InputError], None]) -> list[Path]:
    """Those of some files that can be read; large images are better read again than kept."""
    found = []
    for path in paths:
        try:
            native_planes(path)
        except InputError as error:
            on_error(error)
        else:
            found.append(path)
    return found


def read(images: Iterable[Tensor | Path]) -> Iterator[Tensor]:
    """Images as float32 ``(3, h, w)``, those that are files at their own resolution.

    Raises:
        InputError: A file cannot be used (any more).
    """
    for image in images:
        yield native_planes(image) if isinstance(image, Path) else image.float()


def native_planes(path: Path) -> Tensor:
    """An image ``(3, h, w)`` at its own resolution, enlarged if a side is below 256 pixels.

    Raises:
        InputError: The file cannot be used.
    """
    image = load_image(path)
    try:
        return resize(image, tiled_size(*image.shape[:2]))
    except MemoryError as error:
        raise InputError(path, TOO_LARGE) from error
