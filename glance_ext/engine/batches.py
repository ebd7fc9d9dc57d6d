"""Detection in many files: scored in batches, and no file at the mercy of another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from glance_ext.data.images import load_image
from glance_ext.engine.detector import Detection, Detector
from glance_ext.errors import TOO_LARGE, InputError

T = TypeVar("T")

# Pixels of the images of one batch, 192 MiB as they are read; one image alone may have more.
_BATCH_PIXELS = 2**24


@dataclass(frozen=True)
class Found:
    """A file's image and what was found in it.

    Attributes:
        image: ``(H, W, 3)`` float32 RGB in [0, 1].
        detection: Its score and map.
    """

    image: np.ndarray
    detection: Detection


def detect_files(
    detector: Detector, items: Iterable[T], path: Callable[[T], Path]
) -> Iterator[tuple[T, Found | InputError]]:
    """Detects in files, as many together as the detector's batch size says.

    A batch ends early where its images become large, so that memory stays bounded. If a batch does
    not fit in memory, its images are tried one by one.

    Args:
        detector: The detector.
        items: What stands for the files; may be an iterator that shows progress.
        path: Gives an item's file.

    Yields:
        Every item in its order, with what was found or why its file cannot be used.
    """
    batch: list[tuple[T, np.ndarray | InputError]] = []
    count = pixels = 0
    for item in items:
        try:
            image = load_image(path(item))
        except InputError as error:
            batch.append((item, error))
        else:
            batch.append((item, image))
            count += 1
            pixels += image.shape[0] * image.shape[1]
            del image  # else one image more than the batch would stay in memory
        if count >= detector.batch_size or pixels >= _BATCH_PIXELS or not count:
            yield from _detected(detector, batch, path)
            batch = []
            count = pixels = 0
    yield from _detected(detector, batch, path)


def _detected(
    detector: Detector,
    batch: list[tuple[T, np.ndarray | InputError]],
    path: Callable[[T], Path],
) -> Iterator[tuple[T, Found | InputError]]:
    images = [image for _, image in batch if isinstance(image, np.ndarray)]
    found = iter(_detections(detector, images))
    for item, image in batch:
        if isinstance(image, InputError):
            yield item, image
            continue
        detection = next(found)
        if detection is None:
            yield item, InputError(path(item), TOO_LARGE)
        else:
            yield item, Found(image, detection)


def _detections(detector: Detector, images: list[np.ndarray]) -> list[Detection | None]:
    """A detection for each image, None for one that does not fit in memory."""
    if not images:
        return []
    try:
        return [*detector.detect_batch(images)]
    except MemoryError:
        if len(images) == 1:
            return [None]
    return [_detections(detector, [image])[0] for image in images]
