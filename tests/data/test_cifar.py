"""CIFAR-10 in each of its forms."""

import os
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from glance_ext.data.cifar import CLASSES, Cifar10
from glance_ext.errors import InputError
from tests.data import trees

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "cifar10_images.zip"


def packed(root: Path) -> Path:
    """As the archive that is handed out."""
    path = root / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(root / "cifar-10-batches-py", "cifar-10-batches-py")
    shutil.rmtree(root / "cifar-10-batches-py")
    return path


def zipped(root: Path, prefix: str = "") -> Path:
    path = root / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*.png")):
            archive.write(file, prefix + file.relative_to(root).as_posix())
    return path


def root_of(form: str, folder: Path) -> Path:
    if form in ("folders", "zip", "zip in a folder"):
        trees.cifar_folders(folder)
        prefix = "cifar10/" if form == "zip in a folder" else ""
        return folder if form == "folders" else zipped(folder, prefix)
    trees.cifar_batches(folder)
    if form == "batches":
        return folder / "cifar-10-batches-py"
    if form == "above the batches":
        return folder
    return packed(folder) if form == "tar" else packed(folder).parent


FORMS = ["batches", "above the batches", "tar", "above the tar", "folders", "zip",
         "zip in a folder"]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images(form: str, tmp_path: Path) -> None:
    data = Cifar10(root_of(form, tmp_path))
    for split, count in (("train", 4), ("test", 2)):
        for label in (0, 7):
            images = data.load(split, CLASSES[label], pytest.fail)
            assert images.dtype == torch.uint8
            expected = trees.cifar_pixels(split, label, count)
            if split == "train" and form not in ("folders", "zip", "zip in a folder"):
                # shuffled over the batches
                key = [image.tobytes() for image in expected]
                assert sorted(image.numpy().tobytes() for image in images) == sorted(key)
            else:
                np.testing.assert_array_equal(images.numpy(), expected)


def test_the_classes_stand_in_the_official_order() -> None:
    assert CLASSES == trees.CLASSES


@pytest.mark.parametrize("form", ["folders", "zip"])
def test_a_bad_image_concerns_no_other(form: str, tmp_path: Path) -> None:
    trees.cifar_folders(tmp_path)
    folder = tmp_path / "test" / "cat"
    (folder / "0000.png").write_bytes(b"no image")
    Image.new("RGB", (20, 30)).save(folder / "0001.png")
    Image.new("RGB", (32, 32), (9, 8, 7)).save(folder / "0002.png")
    root = tmp_path if form == "folders" else zipped(tmp_path)
    errors: list[InputError] = []
    images = Cifar10(root).load("test", "cat", errors.append)
    assert images.shape == (1, 3, 32, 32)
    assert images[0, :, 0, 0].tolist() == [9, 8, 7]
    assert [Path(error.path).name for error in errors] == ["0000.png", "0001.png"]
    assert "begins with" in errors[0].reason
    assert errors[1].reason == "expected 32x32 pixels (HxW), found 30x20"


def test_a_member_that_the_archive_cannot_give_is_named(tmp_path: Path) -> None:
    trees.cifar_folders(tmp_path)
    path = zipped(tmp_path)
    content = bytearray(path.read_bytes())
    at = content.index(b"test/cat/0000.png") + len("test/cat/0000.png")
    content[at + 50] ^= 0xFF  # its checksum no longer fits
    path.write_bytes(content)
    errors: list[InputError] = []
    assert len(Cifar10(path).load("test", "cat", errors.append)) == 1
    assert errors[0].path == str(path / "test/cat/0000.png")
    assert "cannot be read" in errors[0].reason


@pytest.mark.parametrize("form", ["folders", "zip"])
def test_a_class_without_images_is_named(form: str, tmp_path: Path) -> None:
    trees.cifar_folders(tmp_path)
    for file in (tmp_path / "train" / "dog").iterdir():
        file.unlink()
    root = tmp_path if form == "folders" else zipped(tmp_path)
    with pytest.raises(InputError, match="expected images in train/dog, found none"):
        Cifar10(root).load("train", "dog", pytest.fail)


def test_a_foreign_root_is_named_with_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path, found in ((tmp_path / "file", "another file"), (tmp_path, "none of these"),
                        (tmp_path / "missing", "no such folder")):  # fmt: skip
        with pytest.raises(InputError, match=f"expected CIFAR-10: the folder .* found {found}"):
            Cifar10(path)


class Evil:
    def __reduce__(self):
        return os.system, ("touch should-not-exist",)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "cannot read it"),
        (lambda path: path.write_text("html"), "cannot read it"),
        (lambda path: path.unlink(), "No such file"),
        (lambda path: trees.write_pickle(path, {b"data": 3}), "cannot read it"),
        (lambda path: trees.write_pickle(path, Evil()), r"system, which is no array"),
        (
            lambda path: trees.write_pickle(
                path, {b"data": np.zeros((2, 3072), np.float32), b"labels": [0, 1]}
            ),
            "expected uint8 images with a label each, found float32",
        ),
        (
            lambda path: trees.write_pickle(
                path, {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}
            ),
            "expected uint8 images with a label each",
        ),
    ],
)
def test_a_damaged_batch_is_named(write, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    trees.cifar_batches(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    write(path)
    with pytest.raises(InputError, match=f"data_batch_3: .*{message}"):
        Cifar10(tmp_path).load("train", "cat", pytest.fail)
    assert not (tmp_path / "should-not-exist").exists()


def test_a_cut_archive_is_named(tmp_path: Path) -> None:
    path = packed(trees.cifar_batches(tmp_path))
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(InputError, match="expected"):
        Cifar10(path).load("train", "cat", pytest.fail)


def test_newer_pickles_of_arrays_are_read_too(tmp_path: Path) -> None:
    trees.cifar_batches(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    content = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(content, protocol=4))
    assert len(Cifar10(tmp_path).load("test", "cat", pytest.fail)) == 2


@pytest.mark.skipif(not REAL.exists(), reason="needs ../shared/data/cifar10_images.zip")
def test_the_real_archive_has_a_thousand_test_images_a_class() -> None:
    images = Cifar10(REAL).load("test", "frog", pytest.fail)
    assert images.shape == (1000, 3, 32, 32)
    assert 60 < images.float().mean() < 180
