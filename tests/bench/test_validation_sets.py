"""Data sets to choose settings by: good images set aside, and what is drawn into them."""

from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from glance_ext.data.datasets import normal_images, test_samples
from glance_ext.data.images import load_image, load_mask
from tests.scripts import script

sets = script("validation_sets")


@pytest.fixture(scope="module")
def tile() -> np.ndarray:
    return sets.tile_of(sets.texture("gravel"), np.random.default_rng(0))


@pytest.mark.parametrize("kind", [*sets.DEFECTS, *sets.LATER])
def test_a_defect_shows_inside_its_mask_and_nowhere_else(kind: str, tile: np.ndarray) -> None:
    for seed in range(3):
        damaged, mask = sets.damage(tile, kind, np.random.default_rng(seed))
        change = np.abs(damaged - tile).mean(-1)
        assert 0 < mask.mean() < 0.15
        assert change[mask].mean() > 0.03
        beside = change[~binary_dilation(mask, iterations=12)]
        assert beside.mean() < 0.001
        assert beside.max() < 0.4 * change.max()
        assert 0 <= damaged.min() <= damaged.max() <= 1


def test_a_defect_lies_on_the_object() -> None:
    image = np.full((256, 256, 3), 0.8)
    image[150:200, 40:90] = 0.2
    for seed in range(5):
        _, mask = sets.damage(image, "cloud", np.random.default_rng(seed))
        assert mask[120:230, 10:120].sum() > 0.9 * mask.sum()


def test_where_a_piece_is_broken_off_what_lies_behind_the_object_shows() -> None:
    image = np.full((256, 256, 3), 0.8)
    image[60:200, 40:190] = 0.2
    for seed in range(5):
        damaged, mask = sets.damage(image, "broken", np.random.default_rng(seed))
        inside = mask & (image[..., 0] == 0.2)
        assert inside.sum() > 100
        assert np.median(damaged[inside]) > 0.75


def test_where_no_defect_shows_well_the_clearest_is_drawn() -> None:
    slope = np.broadcast_to(np.linspace(0, 1, 256)[:, None, None], (256, 256, 3)).copy()
    damaged, mask = sets.damage(slope, "smear", np.random.default_rng(0))
    assert mask.any()
    assert np.abs(damaged - slope)[mask].mean() < sets.LEAST_CHANGE
    with pytest.raises(ValueError, match="smear: expected an image with something in it"):
        sets.damage(np.full((256, 256, 3), 0.5), "smear", np.random.default_rng(0))


def test_a_set_has_the_mvtec_layout_and_every_good_image_comes_back_damaged(
    tmp_path: Path, tile: np.ndarray
) -> None:
    rng, later = np.random.default_rng(1), sets.later_rng(0)
    good = [tile.copy(), tile[::-1].copy()]
    sets.write_set(tmp_path, [tile, tile], good, rng, later, sets.grained)
    assert len(normal_images(tmp_path, None)) == 2
    samples, problems = test_samples(tmp_path)
    assert not problems
    kinds = {*sets.DEFECTS, *sets.LATER}
    assert len(samples) == 2 * (1 + len(kinds))
    assert {s.defect for s in samples if s.anomalous} == kinds
    for sample in samples:
        image = load_image(sample.path)
        if sample.mask_path is not None:
            assert load_mask(sample.mask_path, image.shape[:2]).any()
    # grain comes over an image after its defect, and anew each time
    good = [load_image(s.path) for s in samples if not s.anomalous]
    assert np.abs(good[0] - tile).std() > 0.003


def test_dark_tiles_are_dark_and_differ_in_brightness(tile: np.ndarray) -> None:
    tiles = [sets.darkened(tile, np.random.default_rng(seed)) for seed in range(20)]
    means = [t.mean() for t in tiles]
    assert max(means) < 0.5
    assert np.std(means) > 0.04
