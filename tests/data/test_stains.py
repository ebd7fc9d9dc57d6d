import pytest
import torch

from glance_ext.data.stains import STAINS, StainSettings, paste_pieces, stain, stain_images, turn


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kinds(count: int) -> dict[str, torch.Tensor]:
    g = generator(1)
    steps = torch.rand((count, 3, 1, 1), generator=g)
    return {
        "flat": steps.expand(-1, -1, 33, 33).clone(),
        "noise": torch.rand((count, 3, 33, 33), generator=g),
        "black": torch.zeros(count, 3, 33, 33),
        "white": torch.ones(count, 3, 33, 33),
        "stripes": (torch.arange(33) % 2).float().expand(count, 3, 33, 33).clone(),
    }


@pytest.mark.parametrize("kind", ["flat", "noise", "black", "white", "stripes"])
def test_every_stain_shows_and_stays_small(kind: str) -> None:
    patches = kinds(400)[kind]
    before = patches.clone()
    stained = stain(patches, generator())
    assert torch.equal(patches, before)
    assert stained.shape == patches.shape
    assert stained.dtype == patches.dtype
    assert stained.min() >= 0
    assert stained.max() <= 1
    change = (stained - patches).abs().amax(1)
    assert change.amax((1, 2)).min() > 0.03
    share = (change > 0.02).float().mean((1, 2))
    assert share.max() < 0.35
    assert share.mean() < 0.08
    assert share.min() > 0


@pytest.mark.parametrize(("height", "width", "cells"), [(256, 256, 16), (36, 70, 1), (33, 33, 1)])
def test_stains_all_over_an_image_leave_most_of_it(height: int, width: int, cells: int) -> None:
    from scipy.ndimage import label

    images = torch.rand((20, 3, height, width), generator=generator(2)) * 0.1 + 0.45
    before = images.clone()
    stained = stain_images(images, 33, generator())
    assert torch.equal(images, before)
    assert torch.equal(stained, stain_images(images, 33, generator()))
    changed = (stained - images).abs().amax(1) > 0.02
    blobs = [label(of_image.numpy())[1] for of_image in changed]
    assert 0.7 * cells <= sum(blobs) / 20 <= 1.5 * cells  # two may touch, one may be in two
    assert changed.float().mean((1, 2)).min() > 0
    assert changed.float().mean((1, 2)).max() < 0.35
    assert changed.any(0).float().mean() > 5 * changed.float().mean()  # others in each image


def test_pieces_are_of_the_image_or_of_the_other_one() -> None:
    images, others = torch.full((30, 3, 64, 64), 0.2), torch.full((30, 3, 64, 64), 0.8)
    images[..., :32] = 0.5
    before = images.clone()
    pasted = paste_pieces(images, others, generator(), 1)
    assert torch.equal(images, before)
    assert torch.equal(pasted, paste_pieces(images, others, generator(), 1))
    assert not torch.equal(pasted, paste_pieces(images, others, generator(1), 1))
    of_other = (pasted > 0.7).any(1).flatten(1).any(1)  # what the image itself never shows
    assert 8 < of_other.sum() < 22
    own = pasted[~of_other]
    assert own.min() >= 0.2
    assert own.max() <= 0.5
    assert (own != images[~of_other]).any()
    assert torch.equal(paste_pieces(images, others, generator(), 0), images)


def test_pieces_are_turned_and_moved() -> None:
    own = torch.rand((1, 3, 32, 32), generator=generator())
    seen = set()
    for seed in range(12):
        piece = paste_pieces(own, own, generator(seed), 1)[0]
        found = [
            (quarters, row, column)
            for quarters in range(4)
            for row in range(32)
            for column in range(32)
            if _same(piece, own[0].rot90(quarters, (1, 2)).roll((row, column), (1, 2)), own[0])
        ]
        assert len(found) <= 1, seed
        seen.update(found)
    assert len(seen) > 8  # some are small and lie in a corner
    assert {quarters for quarters, _, _ in seen} == {0, 1, 2, 3}
    assert len({row for _, row, _ in seen}) > 7
    assert len({column for _, _, column in seen}) > 7


def _same(piece: torch.Tensor, source: torch.Tensor, image: torch.Tensor) -> bool:
    """Whether so many changed pixels are the source's as no chance makes."""
    inside = ((piece - source).abs() < 0.02) & ((piece - image).abs() > 0.02)
    return int(inside.all(0).sum()) > 12


def test_pieces_lie_anywhere_and_differ_in_size() -> None:
    shape = (500, 3, 96, 96)
    cover = paste_pieces(torch.zeros(shape), torch.ones(shape), generator(), 1)[:, 0] > 0.5
    sizes = cover.flatten(1).sum(1)
    sizes = sizes[sizes > 0]  # the others are of the image itself
    assert sizes.min() < 250
    assert sizes.max() > 3000
    assert cover.any(0).all()


def test_a_stain_is_one_blob() -> None:
    from scipy.ndimage import label

    change = stain(torch.full((200, 3, 33, 33), 0.5), generator()).sub(0.5).abs().amax(1)
    # half of its own greatest change: the blob without its soft edge
    regions = [label((c > c.max() / 2).numpy())[1] for c in change]
    assert sum(count == 1 for count in regions) > 190


def test_stains_lie_anywhere_but_at_the_border() -> None:
    change = stain(torch.full((600, 3, 33, 33), 0.5), generator()).sub(0.5).abs().amax(1)
    place = change.flatten(1).argmax(1)
    rows, columns = place // 33, place % 33
    for line in (rows, columns):
        assert line.min() < 8
        assert line.max() > 25
        assert 14 < line.float().mean() < 18


def test_half_of_the_stains_are_grey() -> None:
    change = stain(torch.full((600, 3, 33, 33), 0.5), generator()) - 0.5
    peak = change.flatten(2).abs().argmax(-1, keepdim=True)
    channels = change.flatten(2).gather(2, peak)[..., 0]
    grey = (channels - channels[:, :1]).abs().amax(1) < 1e-6
    assert 0.4 < grey.float().mean() < 0.6
    assert (channels[grey, 0] > 0).float().mean() == pytest.approx(0.5, abs=0.1)


def test_the_same_generator_gives_the_same_stains() -> None:
    patches = kinds(16)["noise"]
    assert torch.equal(stain(patches, generator(5)), stain(patches, generator(5)))
    assert not torch.equal(stain(patches, generator(5)), stain(patches, generator(6)))
    torch.manual_seed(1)
    first = stain(patches, generator(5))
    torch.manual_seed(2)
    assert torch.equal(stain(patches, generator(5)), first)


def test_settings_set_size_and_contrast() -> None:
    patches = torch.full((200, 3, 33, 33), 0.5)
    small = StainSettings(smallest=1, largest=1.5, contrast=(0.2, 0.2), irregularity=0)
    large = StainSettings(smallest=8, largest=9, contrast=(0.2, 0.2), irregularity=0)
    areas = []
    for settings in (small, large):
        change = (stain(patches, generator(), settings) - 0.5).abs().amax(1)
        assert change.max() == pytest.approx(0.2, abs=2e-3)
        areas.append((change > 0.1).float().sum((1, 2)).mean())
    assert areas[0] < 10
    assert 120 < areas[1] < 300


def test_half_precision_patches_keep_their_type() -> None:
    patches = torch.rand(4, 3, 33, 33).half()
    assert stain(patches, generator()).dtype == torch.float16


def test_wide_stains_reach_from_small_ones_to_whole_patches_and_are_fainter() -> None:
    patches = torch.full((600, 3, 33, 33), 0.5)
    shares, peaks = {}, {}
    for name, settings in STAINS.items():
        change = (stain(patches, generator(), settings) - 0.5).abs().amax(1)
        peaks[name] = change.amax((1, 2))
        shares[name] = (change > peaks[name][:, None, None] / 2).float().mean((1, 2))
    assert shares["small"].max() < 0.15
    assert shares["wide"].max() > 0.35
    assert shares["wide"].min() < 0.01
    assert peaks["small"].min() > 0.08
    assert 0.02 < peaks["wide"].min() < 0.08


def test_every_patch_is_turned_by_one_two_or_three_quarters() -> None:
    patches = torch.rand((300, 3, 9, 9), generator=generator(1))
    turned = turn(patches, generator())
    quarters = torch.stack([patches.rot90(k, (2, 3)) for k in range(4)])
    same = (quarters == turned).flatten(2).all(2)  # (4, 300)
    assert same.sum(0).eq(1).all()
    assert not same[0].any()
    assert same[1:].sum(1).min() > 70
    assert torch.equal(turned, turn(patches, generator()))
    assert not torch.equal(turned, turn(patches, generator(2)))
