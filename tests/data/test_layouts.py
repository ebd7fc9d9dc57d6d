"""Each loader on a small tree in the exact layout in which the data set is handed out."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glance_ext.data.images import load_mask
from glance_ext.data.layouts import LAYOUTS, chosen
from glance_ext.errors import GlanceError, InputError
from tests.data.trees import btad, draw, mask, mvtec, mvtec_ad_2, visa

Tree = Callable[[Path], Path]


def names(paths: tuple[Path, ...], root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in paths]


def test_mvtec(tmp_path: Path) -> None:
    root = mvtec(tmp_path)
    layout = LAYOUTS["mvtec"]
    assert layout.categories(root) == ["bottle", "metal_nut"]  # not license.txt, not notes/
    found = layout.read(root, "metal_nut")
    assert names(found.normal, root) == [f"metal_nut/train/good/00{i}.png" for i in range(3)]
    assert found.validation == ()
    assert [(s.defect, s.path.name, s.mask_path and s.mask_path.name) for s in found.samples] == [
        ("bent", "000.png", "000_mask.png"),
        ("bent", "001.png", "001_mask.png"),
        ("good", "000.png", None),
    ]
    assert found.problems == ()


def test_visa(tmp_path: Path) -> None:
    root = visa(tmp_path)
    layout = LAYOUTS["visa"]
    assert layout.categories(root) == ["candle", "pcb1"]
    found = layout.read(root, "candle")
    assert names(found.normal, root) == [f"candle/Data/Images/Normal/000{i}.JPG" for i in range(3)]
    assert [(s.defect, s.path.name, s.relative.as_posix()) for s in found.samples] == [
        ("good", "0003.JPG", "good/0003"),
        ("anomaly", "000.JPG", "anomaly/000"),
    ]
    marked = found.samples[1].mask_path
    assert marked == root / "candle/Data/Masks/Anomaly/000.png"
    assert load_mask(marked).sum() == 12  # drawn with the value 1: the kinds of defect are numbered
    assert found.problems == ()


def test_btad(tmp_path: Path) -> None:
    root = btad(tmp_path)
    layout = LAYOUTS["btad"]
    assert layout.categories(root) == ["01", "03"]
    found = layout.read(root, "01")
    assert names(found.normal, root) == [f"01/train/ok/000{i}.bmp" for i in range(3)]
    assert [(s.defect, s.path.name, s.mask_path and s.mask_path.name) for s in found.samples] == [
        ("ko", "0000.bmp", "0000.png"),
        ("ko", "0001.bmp", "0001.png"),
        ("good", "0000.bmp", None),
    ]
    bmp = layout.read(root, "03").samples[0]
    assert bmp.mask_path == root / "03/ground_truth/ko/0000.bmp"


def test_mvtec_ad_2(tmp_path: Path) -> None:
    root = mvtec_ad_2(tmp_path)
    layout = LAYOUTS["mvtec-ad-2"]
    assert layout.categories(root) == ["can"]
    assert layout.pro_limit == 0.05
    found = layout.read(root, "can")
    assert names(found.normal, root) == [f"can/train/good/00{i}_regular.png" for i in range(3)]
    assert names(found.validation, root) == ["can/validation/good/000_regular.png"]
    # neither the masks inside of test_public nor the private images are samples
    assert [(s.defect, s.path.name, s.mask_path and s.mask_path.name) for s in found.samples] == [
        ("bad", "000_overexposed.png", "000_overexposed_mask.png"),
        ("bad", "000_regular.png", "000_regular_mask.png"),
        ("good", "000_regular.png", None),
    ]
    assert found.problems == ()


@pytest.mark.parametrize(
    ("tree", "name", "category", "gone", "image"),
    [
        (mvtec, "mvtec", "bottle", "ground_truth/bent/000_mask.png", "test/bent/000.png"),
        (visa, "visa", "candle", "Data/Masks/Anomaly/000.png", "Data/Images/Anomaly/000.JPG"),
        (btad, "btad", "01", "ground_truth/ko/0001.png", "test/ko/0001.bmp"),
        (
            mvtec_ad_2,
            "mvtec-ad-2",
            "can",
            "test_public/ground_truth/bad/000_regular_mask.png",
            "test_public/bad/000_regular.png",
        ),
    ],
)
def test_a_missing_mask_concerns_its_image_alone(
    tree: Tree, name: str, category: str, gone: str, image: str, tmp_path: Path
) -> None:
    root = tree(tmp_path)
    before = LAYOUTS[name].read(root, category)
    (root / category / gone).unlink()
    found = LAYOUTS[name].read(root, category)
    assert [problem.path for problem in found.problems] == [str(root / category / image)]
    assert "expected its mask" in str(found.problems[0])
    assert found.samples == tuple(s for s in before.samples if s.path != root / category / image)


@pytest.mark.parametrize(
    ("tree", "name", "category", "good"),
    [
        (mvtec, "mvtec", "bottle", "test/good"),
        (btad, "btad", "01", "test/ok"),
        (mvtec_ad_2, "mvtec-ad-2", "can", "test_public/good"),
    ],
)
def test_good_test_images_may_be_absent(
    tree: Tree, name: str, category: str, good: str, tmp_path: Path
) -> None:
    root = tree(tmp_path)
    for path in (root / category / good).iterdir():
        path.unlink()
    assert all(sample.anomalous for sample in LAYOUTS[name].read(root, category).samples)


def test_an_image_in_no_defect_folder_is_a_problem(tmp_path: Path) -> None:
    root = btad(tmp_path)
    draw(root / "01" / "test" / "loose.bmp")
    (problem,) = LAYOUTS["btad"].read(root, "01").problems
    assert "expected test/<defect or ok>/<image>" in str(problem)


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_a_root_without_categories_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    with pytest.raises(InputError, match=r"expected .*, found no"):
        LAYOUTS[name].categories(tmp_path)
    with pytest.raises(InputError, match="found no such folder"):
        LAYOUTS[name].categories(tmp_path / "missing")


def test_a_missing_part_of_a_category_is_named(tmp_path: Path) -> None:
    root = mvtec_ad_2(tmp_path)
    (root / "can" / "validation" / "good" / "000_regular.png").unlink()
    with pytest.raises(InputError, match=r"validation/good: expected a folder of normal images"):
        LAYOUTS["mvtec-ad-2"].read(root, "can")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("object,split,image\n", "expected the columns object, split, label, image, mask"),
        (
            "object,split,label,image,mask\ncandle,train,anomaly,a.JPG,\n",
            "line 2: expected .* found candle, train, anomaly, a.JPG",
        ),
        ("object,split,label,image,mask\ncandle,test\n", "line 2: expected"),
        ("\udcff", "cannot read it"),
    ],
)
def test_a_damaged_split_of_visa_is_named(text: str, message: str, tmp_path: Path) -> None:
    root = visa(tmp_path)
    (root / "split_csv" / "1cls.csv").write_text(text, errors="surrogateescape")
    with pytest.raises(InputError, match=rf"1cls\.csv: .*{message}"):
        LAYOUTS["visa"].categories(root)


def test_visa_without_a_mask_in_its_row(tmp_path: Path) -> None:
    root = visa(tmp_path)
    path = root / "split_csv" / "1cls.csv"
    path.write_text(path.read_text().replace(",candle/Data/Masks/Anomaly/000.png", ","))
    (problem,) = LAYOUTS["visa"].read(root, "candle").problems
    assert "expected its mask in split_csv/1cls.csv, found none" in str(problem)
    path.write_text("object,split,label,image,mask\ncandle,test,normal,a.JPG,\n")
    with pytest.raises(InputError, match="expected images of split train for candle"):
        LAYOUTS["visa"].read(root, "candle")


def test_categories_are_chosen_by_name(tmp_path: Path) -> None:
    assert chosen(["a", "b"], (), tmp_path) == ["a", "b"]
    assert chosen(["a", "b"], ("b", "b"), tmp_path) == ["b"]
    with pytest.raises(GlanceError, match=r"expected one of a, b .*, got 'c'"):
        chosen(["a", "b"], ("c",), tmp_path)


def test_the_trees_are_images(tmp_path: Path) -> None:
    mask(tmp_path / "m.png")
    assert np.asarray(Image.open(tmp_path / "m.png")).sum() == 12 * 255
