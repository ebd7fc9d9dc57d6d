"""CIFAR-10 (Krizhevsky, 2009): the official python batches, or images in folders of classes.

The batches are pickles. They are read by an unpickler that knows arrays and nothing else, so that
a file from anywhere can run no code.
"""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from glance_ext.data.decode import MAX_PIXELS, UnusableError, decode, quiet
from glance_ext.data.images import IMAGE_SUFFIXES, list_images, load_image
from glance_ext.errors import InputError

CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
"""In the order of the official labels."""

SIZE = 32
_FOLDER, _ARCHIVE = "cifar-10-batches-py", "cifar-10-python.tar.gz"
_BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
_EXPECTED = (
    f"expected CIFAR-10: the folder {_FOLDER} or {_ARCHIVE}, or images in train/CLASS and "
    "test/CLASS, in a folder or a zip archive"
)
OnError = Callable[[InputError], None]


class Cifar10:
    """Images of CIFAR-10 by split and class.

    Args:
        root: The folder ``cifar-10-batches-py``, its ``.tar.gz``, a folder that holds one of the
            two, a folder with ``train/CLASS`` and ``test/CLASS``, or a zip archive of such.

    Raises:
        InputError: It is none of these.
    """

    def __init__(self, root: Path) -> None:
        self._archive: Path | None = None
        self._arrays: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        if root.is_file():
            if zipfile.is_zipfile(root):
                self._kind, self._root = "zip", root
            elif _is_tar(root):
                self._kind, self._root = "tar", root
            else:
                raise InputError(root, f"{_EXPECTED}; found another file")
        elif (root / _BATCHES["test"][0]).is_file():
            self._kind, self._root = "batches", root
        elif (root / _FOLDER).is_dir():
            self._kind, self._root = "batches", root / _FOLDER
        elif (root / _ARCHIVE).is_file():
            self._kind, self._root = "tar", root / _ARCHIVE
        elif (root / "train").is_dir() and (root / "test").is_dir():
            self._kind, self._root = "folders", root
        else:
            found = "no such folder" if not root.exists() else "none of these"
            raise InputError(root, f"{_EXPECTED}; found {found}")

    def load(self, split: str, name: str, on_error: OnError) -> Tensor:
        """The images of one class.

        Args:
            split: ``"train"`` or ``"test"``.
            name: One of :data:`CLASSES`.
            on_error: Called for each image that cannot be used; the others are loaded.

        Returns:
            ``(N, 3, 32, 32)`` uint8, in the order of the files.

        Raises:
            InputError: There is none, or a batch cannot be read.
        """
        if self._kind in ("batches", "tar"):
            images, labels = self._batches(split)
            chosen = images[labels == CLASSES.index(name)]
        else:
            listed = self._zipped if self._kind == "zip" else self._in_folder
            usable = []
            for path, image in listed(split, name):
                if isinstance(image, InputError):
                    on_error(image)
                elif image.shape != (SIZE, SIZE, 3):
                    size = "x".join(map(str, image.shape[:2]))
                    on_error(InputError(path, f"expected 32x32 pixels (HxW), found {size}"))
                else:
                    usable.append(np.round(image * 255).astype(np.uint8).transpose(2, 0, 1))
            chosen = np.stack(usable) if usable else np.empty((0, 3, SIZE, SIZE), np.uint8)
        if not len(chosen):
            raise InputError(self._root, f"expected images in {split}/{name}, found none")
        return torch.from_numpy(np.ascontiguousarray(chosen))

    def _in_folder(self, split: str, name: str) -> Iterator[tuple[Path, np.ndarray | InputError]]:
        folder = self._root / split / name
        for path in list_images(folder):
            try:
                yield path, load_image(path)
            except InputError as error:
                yield path, error

    def _zipped(self, split: str, name: str) -> Iterator[tuple[Path, np.ndarray | InputError]]:
        try:
            with zipfile.ZipFile(self._root) as archive:
                for entry in sorted(archive.namelist()):
                    path = PurePosixPath(entry)
                    if path.parts[-3:-1] != (split, name) or path.name.startswith("."):
                        continue
                    if path.suffix.lower() in IMAGE_SUFFIXES:
                        shown = self._root / entry
                        yield shown, _decoded(archive, entry, shown)
        except (OSError, zipfile.BadZipFile) as error:
            raise InputError(self._root, f"expected a whole zip archive: {error}") from error

    def _batches(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Images ``(N, 3, 32, 32)`` and labels ``(N,)`` of the official batches, read once."""
        if split not in self._arrays:
            parts = [self._batch(name) for name in _BATCHES[split]]
            images, labels = zip(*parts, strict=True)
            self._arrays[split] = np.concatenate(images), np.concatenate(labels)
        return self._arrays[split]

    def _batch(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        path = self._root / name if self._kind == "batches" else self._root / _FOLDER / name
        try:
            if self._kind == "batches":
                with path.open("rb") as stream:
                    content = _Arrays(stream, encoding="bytes").load()
            else:
                with tarfile.open(self._root) as archive:
                    member = archive.extractfile(f"{_FOLDER}/{name}")
                    if member is None:
                        raise KeyError("it is no file")
                    with member:
                        content = _Arrays(member, encoding="bytes").load()
            images = np.asarray(content[b"data"]).reshape(-1, 3, SIZE, SIZE)
            labels = np.asarray(content[b"labels"])
        except Exception as error:  # a damaged pickle raises nearly anything
            if isinstance(error, MemoryError):
                raise
            reason = str(error) or type(error).__name__
            raise InputError(path, f"expected a batch of CIFAR-10, cannot read it: {reason}") from (
                error
            )
        if images.dtype != np.uint8 or labels.shape != (len(images),):
            raise InputError(
                path,
                f"expected uint8 images with a label each, found {images.dtype} images "
                f"{images.shape} and labels {labels.shape}",
            )
        return images, labels


class _Arrays(pickle.Unpickler):
    """Reads arrays, numbers, strings and containers of them, and refuses everything else."""

    _MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if module in self._MODULES and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]
        if (module, name) == ("_codecs", "encode"):  # bytes, as Python 3 writes them in protocol 2
            return lambda text, encoding: text.encode(encoding)
        raise pickle.UnpicklingError(f"found {module}.{name}, which is no array")


def _decoded(archive: zipfile.ZipFile, entry: str, path: Path) -> np.ndarray | InputError:
    try:
        stream: IO[bytes] = io.BytesIO(archive.read(entry))
        with quiet:
            return decode(stream, MAX_PIXELS)  # type: ignore[arg-type]
    except UnusableError as error:
        return InputError(path, str(error))
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        return InputError(path, f"cannot be read: {error}")


def _is_tar(path: Path) -> bool:
    try:
        return tarfile.is_tarfile(path)
    except OSError:
        return False
