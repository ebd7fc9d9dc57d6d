import random
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glance_ext.data import datasets
from glance_ext.data.datasets import Sample, normal_images, split_held_out
from glance_ext.errors import InputError

DATA = Path("../shared/data")


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


# ---------------------------------------------------------------- normal images


def test_normal_images_of_a_data_set_are_those_in_train_good(tmp_path: Path) -> None:
    touch(tmp_path, "train/good/001.png", "train/good/000.JPG", "train/good/notes.txt")
    touch(tmp_path, "train/bad/000.png", "test/good/000.png")
    good = tmp_path / "train" / "good"
    assert normal_images(tmp_path, None) == [good / "000.JPG", good / "001.png"]


def test_normal_images_of_a_folder_are_all_below_it(tmp_path: Path) -> None:
    touch(tmp_path, "b/1.png", "a 猫.tif")
    assert normal_images(None, tmp_path) == [tmp_path / "a 猫.tif", tmp_path / "b/1.png"]


@pytest.mark.parametrize("both", [True, False])
def test_exactly_one_of_dataset_and_normal_is_wanted(tmp_path: Path, both: bool) -> None:
    touch(tmp_path, "train/good/000.png")
    given_ = tmp_path if both else None
    with pytest.raises(ValueError, match="exactly one of dataset and normal"):
        normal_images(given_, given_)


def test_a_data_set_without_train_good_is_described(tmp_path: Path) -> None:
    touch(tmp_path, "training/000.png", "readme.md")
    with pytest.raises(InputError) as caught:
        normal_images(tmp_path, None)
    assert caught.value.path == str(tmp_path / "train" / "good")
    assert caught.value.reason == (
        "expected normal images in DATASET/train/good (MVTec layout), found no such folder; "
        f"{tmp_path} holds readme.md, training/"
    )
    with pytest.raises(InputError, match="no is no folder"):
        normal_images(tmp_path / "no", None)


def test_an_empty_train_good_is_described(tmp_path: Path) -> None:
    touch(tmp_path, *(f"train/good/{i}.npy" for i in range(11)))
    with pytest.raises(InputError, match=r"\.png .* found none; .*10\.npy.* and 3 more$"):
        normal_images(tmp_path, None)


def test_a_wrong_folder_of_normal_images_is_described(tmp_path: Path) -> None:
    touch(tmp_path, "set/train/good/000.png", "a.png", "empty/.keep")
    for name, found in (
        ("no", "found no such folder"),
        ("a.png", "found a file"),
        ("empty", "found none; .* holds .keep"),
        ("set", "found a data set in MVTec layout"),
    ):
        with pytest.raises(InputError, match=found) as caught:
            normal_images(None, tmp_path / name)
        assert caught.value.path == str(tmp_path / name)


# ---------------------------------------------------------------- the held-out share


@given(
    st.integers(2, 60),
    st.floats(0, 1, exclude_min=True, exclude_max=True),
    st.integers(0, 2**32),
    st.randoms(),
)
def test_a_split_is_a_partition_independent_of_order(
    count: int, share: float, seed: int, shuffler: random.Random
) -> None:
    paths = [Path(f"folder/{i:03d}.png") for i in range(count)]
    train, held_out = split_held_out(paths, share, seed)
    assert sorted(train + held_out) == paths
    assert len(train) >= 1
    assert len(held_out) >= 1
    assert abs(len(held_out) - share * count) <= 1
    assert train == sorted(train)
    assert held_out == sorted(held_out)
    shuffled = list(paths)
    shuffler.shuffle(shuffled)
    assert split_held_out(shuffled, share, seed) == (train, held_out)


def test_a_split_depends_on_the_seed_and_is_the_same_everywhere() -> None:
    paths = [Path(f"{i:02d}.png") for i in range(20)]
    parts = {tuple(split_held_out(paths, 0.2, seed)[1]) for seed in range(30)}
    assert len(parts) > 25
    assert len({path for part in parts for path in part}) == 20
    assert [path.stem for path in split_held_out(paths, 0.2, 0)[1]] == PINNED


PINNED = ["01", "08", "12", "13"]


def test_a_single_image_is_in_both_parts() -> None:
    train, held_out = split_held_out([Path("a.png")], 0.1, 0)
    assert train == held_out == [Path("a.png")]
    assert train is not held_out


def test_a_split_of_nothing_or_by_a_wrong_share_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one path"):
        split_held_out([], 0.1, 0)
    for share in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="share between 0 and 1"):
            split_held_out([Path("a"), Path("b")], share, 0)


# ---------------------------------------------------------------- test samples


def test_test_samples_come_with_their_masks_in_order(tmp_path: Path) -> None:
    touch(tmp_path, "test/good/000.png", "test/cut/001.png", "test/cut/000.png")
    touch(tmp_path, "ground_truth/cut/000_mask.png", "ground_truth/cut/001_mask.png")
    samples, problems = datasets.test_samples(tmp_path)
    test, truth = tmp_path / "test", tmp_path / "ground_truth"
    assert samples == [
        Sample(test / "cut/000.png", "cut", truth / "cut/000_mask.png", PurePosixPath("cut/000")),
        Sample(test / "cut/001.png", "cut", truth / "cut/001_mask.png", PurePosixPath("cut/001")),
        Sample(test / "good/000.png", "good", None, PurePosixPath("good/000")),
    ]
    assert [sample.anomalous for sample in samples] == [True, True, False]
    assert problems == []


@pytest.mark.parametrize("mask", ["a b_mask.TIF", "a b.png", "a b.jpg", "a b_mask.bmp"])
def test_masks_may_have_any_image_suffix_and_the_plain_stem(tmp_path: Path, mask: str) -> None:
    touch(tmp_path, "test/ü/a b.jpg", f"ground_truth/ü/{mask}", "ground_truth/ü/a b_mask.txt")
    (sample,), problems = datasets.test_samples(tmp_path)
    assert sample.mask_path == tmp_path / "ground_truth" / "ü" / mask
    assert problems == []


def test_the_name_ending_in_mask_and_png_come_first(tmp_path: Path) -> None:
    touch(tmp_path, "test/cut/0.png")
    for better in ("0.tif", "0.png", "0_mask.tif", "0_mask.png"):
        touch(tmp_path, f"ground_truth/cut/{better}")
        (sample,), _ = datasets.test_samples(tmp_path)
        assert sample.mask_path is not None
        assert sample.mask_path.name == better


def test_a_mask_of_another_defect_or_deeper_is_not_taken(tmp_path: Path) -> None:
    touch(tmp_path, "test/cut/0.png", "ground_truth/hole/0_mask.png")
    touch(tmp_path, "ground_truth/cut/deeper/0_mask.png", "ground_truth/cut/10_mask.png")
    samples, problems = datasets.test_samples(tmp_path)
    assert samples == []
    assert len(problems) == 1


def test_an_anomalous_image_without_mask_is_a_problem_and_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "test/cut/0.png", "test/cut/1.png", "ground_truth/cut/1_mask.png")
    touch(tmp_path, "test/stray.png")
    samples, problems = datasets.test_samples(tmp_path)
    assert [sample.path.name for sample in samples] == ["1.png"]
    assert [str(problem) for problem in problems] == [
        f"{tmp_path}/test/cut/0.png: expected its mask at "
        f"{tmp_path}/ground_truth/cut/0_mask.png, found none",
        f"{tmp_path}/test/stray.png: expected test/<defect or good>/<image>, "
        "found no defect folder",
    ]
    assert all(isinstance(problem, InputError) for problem in problems)


def test_images_in_deeper_folders_and_of_equal_stem_keep_apart(tmp_path: Path) -> None:
    touch(tmp_path, "test/cut/left/0.png", "test/cut/0.png", "test/cut/0.jpg")
    touch(tmp_path, "ground_truth/cut/left/0_mask.png", "ground_truth/cut/0_mask.png")
    samples, problems = datasets.test_samples(tmp_path)
    assert [str(sample.relative) for sample in samples] == ["cut/0.jpg", "cut/0.png", "cut/left/0"]
    assert {sample.defect for sample in samples} == {"cut"}
    assert samples[2].mask_path == tmp_path / "ground_truth/cut/left/0_mask.png"
    assert problems == []


def test_a_missing_or_empty_test_folder_is_described(tmp_path: Path) -> None:
    touch(tmp_path, "train/good/0.png")
    with pytest.raises(InputError, match=r"test: expected .* no such folder; .* holds train/$"):
        datasets.test_samples(tmp_path)
    touch(tmp_path, "test/good/.keep")
    with pytest.raises(InputError, match=r"test: expected .* found none; .* holds good/$"):
        datasets.test_samples(tmp_path)


@pytest.mark.parametrize(
    ("name", "train", "good", "anomalous"),
    [("mvtec_ad_256/screw", 320, 41, 119), ("cookies", 31, 14, 32)],
)
def test_the_real_sets_are_complete(name: str, train: int, good: int, anomalous: int) -> None:
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is not there")
    assert len(normal_images(DATA / name, None)) == train
    samples, problems = datasets.test_samples(DATA / name)
    assert problems == []
    assert sum(sample.anomalous for sample in samples) == anomalous
    assert sum(not sample.anomalous for sample in samples) == good
    assert all(sample.anomalous == (sample.mask_path is not None) for sample in samples)
    assert len({sample.relative for sample in samples}) == good + anomalous
