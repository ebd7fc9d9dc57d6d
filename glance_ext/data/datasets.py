"""Which files are what: normal images, a held-out share of them, and labelled test images.

The layout is MVTec AD's (Bergmann et al., CVPR 2019)::

    DATASET/train/good/*                     images without a defect
    DATASET/test/good/*                      more of them (may be absent)
    DATASET/test/<defect>/*                  images with a defect
    DATASET/ground_truth/<defect>/*_mask.*   their masks, named after the images
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from glance_ext.data.images import IMAGE_SUFFIXES, expand_inputs, list_images
from glance_ext.errors import InputError

GOOD = "good"
"""The name of the folders that hold images without a defect."""


@dataclass(frozen=True)
class Sample:
    """One test image with its ground truth.

    Attributes:
        path: The image.
        defect: Name of its folder below ``test``: the kind of defect, or ``good``.
        mask_path: Its defect mask; None if and only if the image is good.
        relative: Where its results belong, without suffix, unique in the set (``broken/000``); see
            :func:`~glance_ext.data.images.expand_inputs`.
    """

    path: Path
    defect: str
    mask_path: Path | None
    relative: PurePosixPath

    @property
    def anomalous(self) -> bool:
        """Whether the image has a defect."""
        return self.defect != GOOD


def normal_images(dataset: Path | None, normal: Path | None) -> list[Path]:
    """Lists the images to learn from: all without a defect.

    Args:
        dataset: Root of a data set in MVTec layout; its ``train/good`` is taken.
        normal: Any folder of normal images, searched recursively. Exactly one of the two is given.

    Returns:
        At least one path, in the order of :func:`~glance_ext.data.images.list_images`.

    Raises:
        ValueError: Both or none of the two are given.
        InputError: The folder is missing, holds no images, or is a whole data set.
    """
    if (dataset is None) == (normal is None):
        raise ValueError(
            "normal_images: expected exactly one of dataset and normal, "
            f"got dataset={dataset} and normal={normal}"
        )
    if dataset is not None:
        folder = dataset / "train" / GOOD
        expected = "expected normal images in DATASET/train/good (MVTec layout)"
        if not folder.is_dir():
            raise InputError(folder, f"{expected}, found no such folder; {_contents(dataset)}")
    else:
        assert normal is not None
        folder = normal
        expected = "expected a folder of normal images"
        if not folder.is_dir():
            raise InputError(
                folder, f"{expected}, found " + ("a file" if folder.exists() else "no such folder")
            )
        if (folder / "train" / GOOD).is_dir():
            # recursion would teach the model the defects below test/ as normal
            raise InputError(
                folder, f"{expected}, found a data set in MVTec layout (it has train/good)"
            )
    images = list_images(folder)
    if not images:
        suffixes = " ".join(IMAGE_SUFFIXES)
        raise InputError(folder, f"{expected} ({suffixes}), found none; {_contents(folder)}")
    return images


def split_held_out(paths: Sequence[Path], share: float, seed: int) -> tuple[list[Path], list[Path]]:
    """Sets a random share of the normal images aside, to calibrate on what training has not seen.

    The split depends on the set of paths, the share and the seed, not on the order of ``paths``.
    Both parts have at least one image. With one image in all, both parts are that image: what is
    calibrated on it is then optimistic, which the caller should say.

    Args:
        paths: At least one image.
        share: Fraction to hold out, above 0 and below 1; rounded to whole images.
        seed: Another seed, another split.

    Returns:
        (train, held out), each sorted by path.

    Raises:
        ValueError: No paths, or a share that is not between 0 and 1.
    """
    if not paths:
        raise ValueError("split_held_out: expected at least one path, got none")
    if not 0 < share < 1:
        raise ValueError(f"split_held_out: expected share between 0 and 1, got {share}")
    ordered = sorted(paths, key=Path.as_posix)
    if len(ordered) == 1:
        return ordered, list(ordered)
    count = min(max(round(share * len(ordered)), 1), len(ordered) - 1)
    held_out = set(random.Random(seed).sample(range(len(ordered)), count))
    return (
        [path for i, path in enumerate(ordered) if i not in held_out],
        [path for i, path in enumerate(ordered) if i in held_out],
    )


def test_samples(dataset: Path) -> tuple[list[Sample], list[InputError]]:
    """Lists the test images of a data set in MVTec layout with their masks.

    The mask of ``test/<defect>/<stem>.png`` is ``ground_truth/<defect>/<stem>_mask.png``, or else
    ``<stem>.png`` there; either may have any of the image suffixes. If several are there, the
    first of this order is taken.

    Args:
        dataset: Root of the data set. ``test/good`` may be absent.

    Returns:
        The usable samples, sorted by their path below ``test``, and a problem for each image that
        had to be left out: an anomalous one without mask, one in no defect folder.

    Raises:
        InputError: ``test`` is missing or holds no image.
    """
    return labelled_images(
        dataset / "test",
        dataset / "ground_truth",
        "expected test images in DATASET/test/<defect or good> (MVTec layout)",
    )


def labelled_images(
    root: Path, masks_root: Path, expected: str, *, good: str = GOOD
) -> tuple[list[Sample], list[InputError]]:
    """Lists images in folders named after their defect, with the masks in folders beside them.

    Args:
        root: Has a folder for each defect, and one of good images.
        masks_root: Has folders of the same names with the masks; may be inside ``root``.
        expected: How a message about ``root`` begins.
        good: Name of the folder of good images.

    Returns:
        As :func:`test_samples`; a good image's ``defect`` is :data:`GOOD` whatever the folder.

    Raises:
        InputError: ``root`` is missing or holds no image.
    """
    if not root.is_dir():
        raise InputError(root, f"{expected}, found no such folder; {_contents(root.parent)}")
    samples: list[Sample] = []
    problems: list[InputError] = []
    masks: dict[Path, dict[str, Path]] = {}
    for path, relative in expand_inputs([root]):
        inside = path.relative_to(root)
        if masks_root in path.parents:
            continue
        if len(inside.parts) < 2:
            problems.append(
                InputError(
                    path,
                    f"expected {root.name}/<defect or {good}>/<image>, found no defect folder",
                )
            )
            continue
        defect, mask = inside.parts[0], None
        if defect != good:
            folder = masks_root / inside.parent
            if folder not in masks:
                masks[folder] = _by_lower_suffix(folder)
            mask = _find_mask(masks[folder], path.stem)
            if mask is None:
                wanted = f"{folder / path.stem}_mask.png"
                problems.append(InputError(path, f"expected its mask at {wanted}, found none"))
                continue
        samples.append(Sample(path, GOOD if defect == good else defect, mask, relative))
    if not samples and not problems:
        raise InputError(root, f"{expected}, found none; {_contents(root)}")
    return samples, problems


test_samples.__test__ = False  # type: ignore[attr-defined]  # pytest must not take it for a test


def _by_lower_suffix(folder: Path) -> dict[str, Path]:
    """Maps names with their suffix in lower case to the files directly in a folder, if any."""
    if not folder.is_dir():
        return {}
    return {
        path.stem + path.suffix.lower(): path
        for path in sorted(list_images(folder), reverse=True)
        if path.parent == folder
    }


def _find_mask(files: dict[str, Path], stem: str) -> Path | None:
    """The mask for an image named ``stem`` among the files of its ground-truth folder."""
    for name in (f"{stem}_mask", stem):
        for suffix in IMAGE_SUFFIXES:
            if name + suffix in files:
                return files[name + suffix]
    return None


def _contents(folder: Path, most: int = 8) -> str:
    """Says what is in a folder, to show where the layout differs from the expected one."""
    if not folder.is_dir():
        return f"{folder} is no folder"
    try:
        names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    except OSError as error:
        return f"{folder} cannot be listed: {error.strerror}"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{folder} holds " + (", ".join(names[:most]) + more if names else "nothing")
