"""Data sets of many categories, each in the layout in which it is handed out.

==========  =====================================================================================
mvtec       ``CATEGORY/train/good``, ``CATEGORY/test/<defect or good>``,
            ``CATEGORY/ground_truth/<defect>/<image>_mask.png`` (Bergmann et al., CVPR 2019)
visa        ``split_csv/1cls.csv``, the official one-class split, whose rows name the images
            ``CATEGORY/Data/Images/...`` and masks ``CATEGORY/Data/Masks/...`` (Zou et al., ECCV
            2022)
btad        ``CATEGORY/train/ok``, ``CATEGORY/test/<ok or ko>``, and masks of the images' names, in
            the same format or another, ``CATEGORY/ground_truth/ko`` (Mishra et al., ISIE 2021)
mvtec-ad-2  ``CATEGORY/train/good``, ``CATEGORY/validation/good``, ``CATEGORY/test_public/<bad or
            good>``, ``CATEGORY/test_public/ground_truth/bad/<image>_mask.png`` (Heckler-Kram et
            al., 2025); the private test images have no published ground truth
==========  =====================================================================================
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from glance_ext.data.datasets import (
    GOOD,
    Sample,
    labelled_images,
    normal_images,
    test_samples,
)
from glance_ext.errors import GlanceError, InputError

_VISA_COLUMNS = ("object", "split", "label", "image", "mask")
_VISA_SPLIT = Path("split_csv") / "1cls.csv"


@dataclass(frozen=True)
class Category:
    """One category: what to learn from and what to measure on.

    Attributes:
        name: Its name.
        normal: Normal images to learn from.
        validation: Further normal images that the data set sets aside to calibrate on; most have
            none.
        samples: Test images with their ground truth.
        problems: One for each test image that had to be left out.
    """

    name: str
    normal: tuple[Path, ...]
    validation: tuple[Path, ...]
    samples: tuple[Sample, ...]
    problems: tuple[InputError, ...]


@dataclass(frozen=True)
class Layout:
    """How a data set is laid out.

    Attributes:
        name: As on the command line.
        title: As in print.
        expected: What its root holds, for messages.
        pro_limit: The false-positive rate to which its authors integrate PRO.
        list_names: The categories under a root; none if it is no such root.
        read: Reads one of them.
    """

    name: str
    title: str
    expected: str
    pro_limit: float
    list_names: Callable[[Path], list[str]]
    read: Callable[[Path, str], Category]

    def categories(self, root: Path) -> list[str]:
        """The categories under ``root``, sorted.

        Raises:
            InputError: There is none.
        """
        if not root.is_dir():
            raise InputError(root, f"expected {self.expected}, found no such folder")
        names = sorted(self.list_names(root))
        if not names:
            raise InputError(root, f"expected {self.expected}, found none")
        return names


def _folders_with(*inside: str) -> Callable[[Path], list[str]]:
    def names(root: Path) -> list[str]:
        return [entry.name for entry in root.iterdir() if entry.joinpath(*inside).is_dir()]

    return names


def _read_mvtec(root: Path, name: str) -> Category:
    samples, problems = test_samples(root / name)
    return Category(
        name, tuple(normal_images(root / name, None)), (), tuple(samples), tuple(problems)
    )


def _read_btad(root: Path, name: str) -> Category:
    folder = root / name
    samples, problems = labelled_images(
        folder / "test",
        folder / "ground_truth",
        "expected test images in CATEGORY/test/<ok or ko> (BTAD layout)",
        good="ok",
    )
    normal = normal_images(None, folder / "train" / "ok")
    return Category(name, tuple(normal), (), tuple(samples), tuple(problems))


def _read_mvtec_ad_2(root: Path, name: str) -> Category:
    folder = root / name
    public = folder / "test_public"
    samples, problems = labelled_images(
        public,
        public / "ground_truth",
        "expected test images in CATEGORY/test_public/<bad or good> (MVTec AD 2 layout)",
    )
    validation = normal_images(None, folder / "validation" / GOOD)
    return Category(
        name,
        tuple(normal_images(folder, None)),
        tuple(validation),
        tuple(samples),
        tuple(problems),
    )


def _visa_names(root: Path) -> list[str]:
    return sorted({row["object"] for row in _visa_rows(root)})


def _visa_rows(root: Path) -> list[dict[str, str]]:
    path = root / _VISA_SPLIT
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            rows = list(reader)
            found = reader.fieldnames or []
    except FileNotFoundError:
        raise InputError(path, "expected VisA's one-class split, found no such file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            path, f"expected VisA's one-class split, cannot read it: {error}"
        ) from error
    if not set(_VISA_COLUMNS) <= set(found):
        raise InputError(
            path, f"expected the columns {', '.join(_VISA_COLUMNS)}, found {', '.join(found)}"
        )
    for number, row in enumerate(rows, 2):
        if not (row["object"] and row["image"]) or (row["split"], row["label"]) not in (
            ("train", "normal"),
            ("test", "normal"),
            ("test", "anomaly"),
        ):
            raise InputError(
                path,
                f"line {number}: expected an image of split train or test and label normal or "
                f"anomaly (test alone), found {', '.join(str(row[c]) for c in _VISA_COLUMNS)}",
            )
    return rows


def _read_visa(root: Path, name: str) -> Category:
    rows = [row for row in _visa_rows(root) if row["object"] == name]
    normal = [root / row["image"] for row in rows if row["split"] == "train"]
    if not normal:
        raise InputError(
            root / _VISA_SPLIT, f"expected images of split train for {name}, found none"
        )
    samples: list[Sample] = []
    problems: list[InputError] = []
    for row in rows:
        if row["split"] == "train":
            continue
        path, mask = root / row["image"], None
        if row["label"] == "anomaly":
            mask = root / row["mask"] if row["mask"] else None
            if mask is None or not mask.is_file():
                where = f"at {mask}" if mask else f"in {_VISA_SPLIT}"
                problems.append(InputError(path, f"expected its mask {where}, found none"))
                continue
        defect = GOOD if mask is None else "anomaly"
        samples.append(Sample(path, defect, mask, PurePosixPath(defect, path.stem)))
    return Category(name, tuple(normal), (), tuple(samples), tuple(problems))


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            "mvtec",
            "MVTec AD",
            "folders with train/good (MVTec layout)",
            0.3,
            _folders_with("train", GOOD),
            _read_mvtec,
        ),
        Layout(
            "visa",
            "VisA",
            f"VisA with {_VISA_SPLIT}",
            0.3,
            _visa_names,
            _read_visa,
        ),
        Layout(
            "btad",
            "BTAD",
            "folders with train/ok (BTAD layout)",
            0.3,
            _folders_with("train", "ok"),
            _read_btad,
        ),
        Layout(
            "mvtec-ad-2",
            "MVTec AD 2",
            "folders with test_public (MVTec AD 2 layout)",
            0.05,
            _folders_with("test_public"),
            _read_mvtec_ad_2,
        ),
    )
}
"""By the names of the command line."""


def chosen(found: list[str], wanted: tuple[str, ...], root: Path) -> list[str]:
    """The wanted categories in their order, or all found if none is named.

    Raises:
        GlanceError: A wanted one is not there; the message names those that are.
    """
    for name in wanted:
        if name not in found:
            raise GlanceError(
                f"--category: expected one of {', '.join(found)} (in {root}), got {name!r}"
            )
    return list(dict.fromkeys(wanted)) or found
