from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from glance_ext.data.images import load_image, resize
from glance_ext.data.patches import (
    Enlarged,
    Turned,
    crop_patches,
    fingerprint,
    load_mixed_images,
    load_training_images,
    sample_positions,
    sample_scaled_patches,
    varied,
)
from glance_ext.errors import InputError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def write(path: Path, height: int, width: int, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


# ---------------------------------------------------------------- images in memory


def test_turned_images_are_every_image_in_every_view_once() -> None:
    images = torch.rand(3, 3, 6, 6, generator=generator())
    turned = Turned(images)
    assert (len(turned), turned.shape) == (24, (24, 3, 6, 6))
    views = {
        (i, k, flip): (image.flip(-2) if flip else image).rot90(k, (-2, -1))
        for i, image in enumerate(images)
        for k in range(4)
        for flip in (False, True)
    }
    found = [next(name for name, v in views.items() if torch.equal(v, one)) for one in turned]
    assert set(found) == set(views)
    for first in range(0, 24, 3):  # each image once before any comes again, in other views
        some = found[first : first + 3]
        assert [i for i, _, _ in some] == [0, 1, 2]
        assert len({(k, flip) for _, k, flip in some}) == 3


@pytest.mark.parametrize("kind", ["tensor", "enlarged"])
def test_turned_images_are_indexed_as_a_tensor_is(kind: str) -> None:
    small = torch.randint(0, 256, (3, 3, 6, 6), generator=generator()).to(torch.uint8)
    turned = Turned(Enlarged(small, (12, 12)) if kind == "enlarged" else small)
    whole = torch.stack(list(turned))
    assert torch.equal(turned[2:9], whole[2:9])
    assert torch.equal(turned[torch.tensor([23, 0, 7])], whole[[23, 0, 7]])
    assert torch.equal(turned[:], whole)
    with pytest.raises(IndexError, match="Turned: expected an index below 24, got 24"):
        turned[24]


def test_the_cache_is_finer_than_8_bits(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", 40, 24)
    images = load_training_images([path], (40, 24), on_error=pytest.fail)
    assert images.shape == (1, 3, 40, 24)
    assert images.dtype == torch.float16
    exact = torch.tensor(load_image(path)).permute(2, 0, 1)
    assert (images[0].float() - exact).abs().max() <= 2**-12  # half a step below 1
    assert torch.equal((images[0].float() * 255).round(), (exact * 255).round())


def test_images_are_resized_and_keep_their_order(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{i}.png", 20 + i, 50, i) for i in range(3)]
    images = load_training_images(paths, (16, 12), on_error=pytest.fail)
    for path, image in zip(paths, images, strict=True):
        assert torch.equal(image, resize(load_image(path), (16, 12)).half())


def test_unusable_images_are_reported_and_left_out(tmp_path: Path) -> None:
    good = write(tmp_path / "good.png", 9, 9)
    bad, missing = tmp_path / "bad.png", tmp_path / "missing.png"
    bad.write_text("no image")
    errors: list[InputError] = []
    images = load_training_images([bad, good, missing], (9, 9), on_error=errors.append)
    assert len(images) == 1
    assert [error.path for error in errors] == [str(bad), str(missing)]
    mixed = load_mixed_images([bad, good], longest_side=99, on_error=errors.append)
    assert len(mixed) == 1
    assert len(errors) == 3
    none = load_training_images([bad], (9, 7), on_error=errors.append)
    assert none.shape == (0, 3, 9, 7)


def test_mixed_images_shrink_to_a_longest_side_and_never_grow(tmp_path: Path) -> None:
    sizes = [(40, 100), (100, 40), (30, 20), (1, 400), (50, 50)]
    paths = [write(tmp_path / f"{i}.png", *size) for i, size in enumerate(sizes)]
    images = load_mixed_images(paths, longest_side=50, on_error=pytest.fail)
    assert [tuple(image.shape) for image in images] == [
        (3, 20, 50), (3, 50, 20), (3, 30, 20), (3, 1, 50), (3, 50, 50)
    ]  # fmt: skip


def test_a_fingerprint_tells_images_apart() -> None:
    images = torch.rand(3, 3, 8, 8).half()
    same = fingerprint(images)
    assert same == fingerprint(list(images.clone()))
    assert same.startswith("3 (")
    changed = images.clone()
    changed[2, 0, 7, 7] += 0.01
    swapped = images[[1, 0, 2]]
    others = {fingerprint(x) for x in (changed, swapped, images[:2], images.reshape(3, 3, 4, 16))}
    assert len({same, *others}) == 5


# ---------------------------------------------------------------- patches at places


def test_positions_are_uniform_over_every_place() -> None:
    positions = sample_positions(20_000, (40, 36), 33, generator())
    assert positions.shape == (20_000, 2)
    assert positions.dtype == torch.int64
    counts = torch.zeros(8, 4)
    for row, column in positions.tolist():
        counts[row, column] += 1  # an index outside fails
    assert counts.min() > 20_000 / 32 * 0.8
    assert counts.max() < 20_000 / 32 * 1.2


def test_an_image_of_patch_size_has_one_position() -> None:
    assert not sample_positions(9, (33, 33), 33, generator()).any()


def test_crops_are_slices_at_row_and_column() -> None:
    images = torch.rand(4, 3, 20, 50)
    origins = torch.tensor([[0, 0], [2, 40], [13, 1], [13, 43]])
    crops = crop_patches(images, origins, 7)
    assert crops.shape == (4, 3, 7, 7)
    for image, crop, (row, column) in zip(images, crops, origins.tolist(), strict=True):
        assert torch.equal(crop, image[:, row : row + 7, column : column + 7])


# ---------------------------------------------------------------- patches of any scale


def test_scaled_patches_come_from_images_of_any_size() -> None:
    g = generator(3)
    images = [torch.rand((3, h, w), generator=g).half() for h, w in ((32, 32), (1, 1), (24, 300))]
    patches = sample_scaled_patches(images, 200, 33, generator())
    assert patches.shape == (200, 3, 33, 33)
    assert patches.dtype == torch.float32
    assert patches.min() >= 0
    assert patches.max() <= 1
    assert torch.isfinite(patches).all()
    assert torch.equal(patches, sample_scaled_patches(images, 200, 33, generator()))


def test_scaled_patches_lie_within_their_image_and_reach_its_edges() -> None:
    # every pixel says where it is: red its row, green its column
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    image = torch.stack((rows / 31, columns / 31, torch.zeros(32, 32))).half()
    patches = sample_scaled_patches([image], 400, 33, generator(), smallest_side=24)
    heights = (patches[:, 0, -1] - patches[:, 0, 0]).mean(-1) * 31
    assert heights.min() > 20
    assert heights.max() <= 31
    assert patches[:, 0, 0].min() < 0.03
    assert patches[:, 0, -1].max() > 0.97
    flipped = patches[:, 1, :, 0].mean(-1) > patches[:, 1, :, -1].mean(-1)
    assert 0.4 < flipped.float().mean() < 0.6
    assert (patches[:, 0, 0].mean(-1) < patches[:, 0, -1].mean(-1)).all()  # never upside down


def test_sides_are_log_uniform_between_their_limits() -> None:
    ramp = torch.arange(200.0).expand(3, 200, 200) / 199
    patches = sample_scaled_patches(
        [ramp], 1000, 33, generator(), smallest_side=20, largest_side=80
    )
    slope = (patches[:, 0, 16, 30] - patches[:, 0, 16, 2]).abs() * 199 / 28  # pixels a pixel
    sides = slope * 33
    assert 19 < sides.min() < 22
    assert 76 < sides.max() < 82
    assert 36 < sides.median() < 44  # the geometric mean is 40, the arithmetic 50


def test_crops_are_varied_by_turns_light_and_grain() -> None:
    # brighter from row to row, and somewhat to the right, so that a turn shows
    rows, columns = torch.meshgrid(torch.arange(33.0), torch.arange(33.0), indexing="ij")
    ramp = 0.3 + 0.2 * rows / 32 + 0.1 * columns / 32
    crops = ramp.expand(400, 3, 33, 33)
    seen = varied(crops, generator())
    assert torch.equal(seen, varied(crops, generator()))
    assert seen.shape == crops.shape
    assert seen.min() >= 0
    assert seen.max() <= 1
    turns = [crops[0].rot90(k, (-2, -1)) for k in range(4)]
    same = torch.stack([(seen - turn).abs().amax((1, 2, 3)) < 1e-6 for turn in turns], 1)
    assert ((same.float().mean(0) > 0.05) & (same.float().mean(0) < 0.13)).all()  # 0.5 * 0.7 / 4
    colours = (seen - seen.mean(1, keepdim=True)).abs().amax()
    assert colours < 1e-6  # light and grain are the same in all channels
    means = seen.mean((1, 2, 3))
    assert means.min() < 0.15
    assert means.max() > 0.5
    rough = (seen[:, :, 1:] - seen[:, :, :-1]).std((1, 2, 3)) > 0.02
    assert 0.1 < rough.float().mean() < 0.35
