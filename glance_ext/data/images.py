"""Reading images and masks from files, finding them in folders, and resizing them.

An image comes as its pixels are displayed (EXIF and TIFF orientation applied), as float32 RGB,
scaled by the full range of its sample type: 255 for 8 bits, 65535 for 16. Nothing is clipped,
stretched to its own minimum and maximum, or cut to 8 bits on the way. What cannot be read so is
refused with an :class:`~glance_ext.errors.InputError` that says why; data/decode.py decodes.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from glance_ext.data.decode import MAX_PIXELS, UnusableError, decode, open_regular, quiet
from glance_ext.errors import TOO_LARGE, InputError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
"""Suffixes, in lower case, of the files that are taken from a folder; matched in any case."""


def load_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Reads one image as RGB.

    Grey becomes three equal channels; a palette and CMYK are turned into RGB; an alpha channel and
    a transparent palette entry are dropped, the colours beneath them stay as they are stored
    (premultiplied ones too).
    Unsigned integers are divided by the largest value of their type, signed ones too if none is
    negative; floating-point TIFFs must lie in [0, 1]. Of a JPEG that carries further pictures
    (MPO) the first is read, as viewers do; thumbnails and masks beside a TIFF's image are ignored.

    Args:
        path: A PNG, JPEG, BMP or TIFF file of one image, under whatever name.
        max_pixels: Refuse larger images by their header, before any pixel is decoded. A value
            above :data:`MAX_PIXELS` lifts the limit for TIFF alone.

    Returns:
        float32 ``(H, W, 3)`` in [0, 1], contiguous.

    Raises:
        InputError: The file is missing, no regular file, empty, truncated or broken, no image, of
            an unsupported kind, of several frames, too large, or may not be read.
    """
    try:
        with quiet, open_regular(path) as stream:
            return decode(stream, max_pixels)
    except UnusableError as error:
        raise InputError(path, str(error)) from error.__cause__
    except FileNotFoundError as error:
        raise InputError(path, "expected an image file, found no such file") from error
    except MemoryError as error:
        raise InputError(path, TOO_LARGE) from error
    except OSError as error:
        raise InputError(path, f"cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a null byte in the path
        raise InputError(path, f"expected the path of a file, found {error}") from error


def load_mask(
    path: str | os.PathLike[str], expected_size: tuple[int, int] | None = None
) -> np.ndarray:
    """Reads a defect mask: every pixel with a value above 0 in any colour channel is defect.

    Args:
        path: An image file that :func:`load_image` reads. Alpha is ignored.
        expected_size: ``(H, W)`` that the mask must have, or None for any.

    Returns:
        bool ``(H, W)``, True where the image is defective.

    Raises:
        InputError: The file cannot be read, or has another size.
    """
    mask: np.ndarray = np.any(load_image(path) > 0, axis=-1)
    if expected_size is not None and mask.shape != tuple(expected_size):
        expected = "x".join(str(length) for length in expected_size)
        found = "x".join(str(length) for length in mask.shape)
        raise InputError(path, f"expected a mask of {expected} pixels (HxW), found {found}")
    return mask


def resize(
    image: np.ndarray, size: tuple[int, int], device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Resizes an image bilinearly, with antialiasing where it shrinks.

    Args:
        image: ``(H, W, 3)``, values as :func:`load_image` gives them.
        size: ``(h, w)`` to reach. An image that has it already is returned bit by bit.
        device: Where to. It is resized there too, or on the CPU if the device cannot.

    Returns:
        float32 ``(3, h, w)`` that shares no memory with ``image``.

    Raises:
        ValueError: Wrong shape of ``image``, or a length below 1.
    """
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"resize: expected image to be (H, W, 3), got {image.shape}")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"resize: expected size to be (h, w) of at least 1, got {size}")
    if torch.device(device).type != "cpu":
        with contextlib.suppress(torch.OutOfMemoryError):  # there may be room for the result
            pixels = torch.from_numpy(np.array(image, np.float32, order="C")).to(device)
            return resize_planes(pixels.permute(2, 0, 1).contiguous(), size).to(device)
    planes = torch.from_numpy(np.array(image.transpose(2, 0, 1), np.float32, order="C"))
    return resize_planes(planes, size).to(device)


def resize_planes(planes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resizes ``(C, H, W)`` to ``(C, h, w)`` as :func:`resize` does.

    Where a GPU cannot (its memory is full, or an image shrinks by more than its kernel's own memory
    holds weights for) the result is on the CPU.
    """
    if planes.shape[1:] == tuple(size):
        return planes
    try:
        return _interpolated(planes, size)
    except RuntimeError:
        if planes.is_cpu:
            raise
        return _interpolated(planes.cpu(), size)


def _interpolated(planes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    # To a width of 1, torch's CPU kernel picks the nearest row instead of weighting rows (2.14);
    # a height of 1 is right, so such an image is resized lying on its side.
    narrow = size[1] == 1
    height, width = (size[1], size[0]) if narrow else size
    resized = torch.nn.functional.interpolate(
        (planes.transpose(1, 2).contiguous() if narrow else planes)[None],
        size=(height, width),
        mode="bilinear",
        align_corners=False,
        antialias=True,
    )[0]
    return resized.transpose(1, 2).contiguous() if narrow else resized


def list_images(folder: str | os.PathLike[str]) -> list[Path]:
    """Finds the image files below a folder.

    Hidden files and folders (a leading dot) are left out. Every folder is read once, however many
    symbolic links lead to it, so that links cannot make a loop or double an image.

    Args:
        folder: Where to look.

    Returns:
        Paths that begin with ``folder``, sorted by their POSIX path relative to it; may be empty.

    Raises:
        InputError: ``folder`` is missing or no folder, or one below it cannot be listed.
    """
    root = Path(folder)
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    real, linked = [root], list[Path]()
    while real or linked:
        # Links wait until the last real folder is read: a folder keeps its real name if it can.
        current = real.pop() if real else linked.pop(0)
        try:
            status = current.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(current), key=lambda entry: entry.name)
        except FileNotFoundError as error:
            raise InputError(current, "expected a folder, found no such folder") from error
        except NotADirectoryError as error:
            raise InputError(current, "expected a folder, found a file") from error
        except OSError as error:
            raise InputError(current, f"cannot list the folder: {error.strerror}") from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = current / entry.name
            try:
                is_folder = entry.is_dir()
            except OSError:  # a link to itself, say; reading it as a file will report it
                is_folder = False
            if is_folder:
                (linked if entry.is_symlink() else real).append(path)
            elif path.suffix.lower() in IMAGE_SUFFIXES:
                found.append(path)
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def expand_inputs(
    inputs: Sequence[str | os.PathLike[str]],
) -> list[tuple[Path, PurePosixPath]]:
    """Turns files and folders named by the user into files, each with a name for its results.

    The name is a relative path without suffix, unique among all, to which a writer appends (never
    ``with_suffix``, which would cut ``a.v2`` to ``a``): of a folder's file its path inside that
    folder, of a file named by itself its name. Where names collide, all of them go on to the next
    of: suffix kept (``a.png`` and ``a.jpg``), folder put before (``left/a`` and ``right/a``),
    both. What still collides gets ``-2``, ``-3``, ... in order of ``inputs``.

    Args:
        inputs: Files, which are kept whatever their suffix and even if missing, so that reading
            them reports it, and folders, of which :func:`list_images` gives the files.

    Returns:
        (file, name for its results) in order of ``inputs``; a file named twice comes once.

    Raises:
        InputError: A folder cannot be listed.
    """
    files: dict[str, tuple[Path, list[PurePosixPath]]] = {}
    for given in map(Path, inputs):
        is_folder = given.is_dir()
        origin = Path(os.path.abspath(given if is_folder else given.parent)).name
        for path in list_images(given) if is_folder else [given]:
            inside = PurePosixPath(path.relative_to(given).as_posix() if is_folder else path.name)
            bare = inside.with_name(inside.stem)
            names = [bare, inside, origin / bare, origin / inside]
            files.setdefault(os.path.abspath(path), (path, names))
    entries = list(files.values())
    level = [0] * len(entries)
    while True:
        chosen = [names[i] for (_, names), i in zip(entries, level, strict=True)]
        count = Counter(chosen)
        stuck = [i for i, name in enumerate(chosen) if count[name] > 1 and level[i] < 3]
        if not stuck:
            break
        for i in stuck:
            level[i] += 1
    taken: set[PurePosixPath] = set()
    results = []
    for (path, _), name in zip(entries, chosen, strict=True):
        unique, number = name, 2
        while unique in taken or (unique != name and unique in count):
            unique, number = name.with_name(f"{name.name}-{number}"), number + 1
        taken.add(unique)
        results.append((path, unique))
    return results
