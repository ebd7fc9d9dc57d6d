from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from glance_ext.data import textures
from glance_ext.data.datasets import normal_images, test_samples
from glance_ext.data.images import load_image, load_mask
from glance_ext.data.textures import CROP, DEFECTS, TEXTURES, texture, write_texture_set


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("brick")
    write_texture_set(root, "brick", seed=3, train=4, good=2, each=2)
    return root


def test_the_set_is_a_data_set_in_the_mvtec_layout(folder: Path) -> None:
    assert len(normal_images(folder, None)) == 4
    samples, problems = test_samples(folder)
    assert not problems
    assert sorted({s.defect for s in samples}) == sorted(["good", *DEFECTS])
    assert len(samples) == 2 + 2 * len(DEFECTS)
    for path in folder.rglob("*.png"):
        assert load_image(path).shape == (CROP, CROP, 3)


def test_masks_mark_what_was_changed() -> None:
    rng = np.random.default_rng(0)
    left = texture("brick")[:CROP, :CROP].copy()
    for kind, damage in DEFECTS.items():
        for _ in range(10):
            image, mask = damage(left, texture("grass"), rng)
            assert mask.dtype == bool
            assert 30 < mask.sum() < 0.15 * mask.size, kind
            assert image.shape == left.shape
            assert image.min() >= 0, kind
            assert image.max() <= 1 + 1e-6, kind
            change = np.abs(image - left).max(-1)
            assert change[mask].mean() > 8 * change[~mask].mean(), kind
            # only the soft edge reaches beyond the mask
            assert change[~binary_dilation(mask, iterations=6)].max() < 1e-6, kind


def test_training_held_out_and_test_crops_share_no_pixel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The picture's first two channels say where a pixel is."""
    places = np.stack([*np.mgrid[:512, :512], np.zeros((512, 512))], -1).astype(np.float32) / 511
    monkeypatch.setattr(textures, "texture", lambda name: places)
    write_texture_set(tmp_path, "grass", seed=0, train=12, held_out=12, good=12, each=1)
    corners = {}
    for part in ("train", "validation", "test/good"):
        found = [load_image(path)[..., :2] for path in (tmp_path / part).rglob("*.png")]
        assert len(found) == 12
        corners[part] = np.min(found, (0, 1, 2)), np.max(found, (0, 1, 2))
    assert corners["train"][1][1] < corners["validation"][0][1]
    assert corners["train"][1][1] < corners["test/good"][0][1]
    assert corners["validation"][1][0] < corners["test/good"][0][0]


def test_the_seed_decides(folder: Path, tmp_path: Path) -> None:
    for name, seed in (("same", 3), ("other", 4)):
        write_texture_set(tmp_path / name, "brick", seed=seed, train=4, good=2, each=2)
    files = sorted(p.relative_to(folder) for p in folder.rglob("*.png"))
    assert all((folder / f).read_bytes() == (tmp_path / "same" / f).read_bytes() for f in files)
    assert not any(
        (folder / f).read_bytes() == (tmp_path / "other" / f).read_bytes() for f in files
    )


@pytest.mark.parametrize("name", TEXTURES)
def test_textures_are_grey_photographs(name: str) -> None:
    picture = texture(name)
    assert picture.shape == (512, 512, 3)
    assert picture.dtype == np.float32
    assert 0 <= picture.min() < picture.max() <= 1
    assert picture.std() > 0.05


def test_masks_are_read_back_as_drawn(folder: Path) -> None:
    for sample in test_samples(folder)[0]:
        if sample.mask_path is not None:
            assert load_mask(sample.mask_path, (CROP, CROP)).any()
