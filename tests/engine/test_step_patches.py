"""What a step of joint training draws, and what is kept from one step to another."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from glance_ext.data.grid import patch_grid
from glance_ext.data.patches import crop_patches
from glance_ext.engine import step_patches as module
from glance_ext.engine.distributed import World
from glance_ext.engine.joint import joint_stage
from glance_ext.engine.settings import TrainSettings
from glance_ext.engine.step_patches import KeptPatches, draw_patches
from glance_ext.models.glance import Glance
from glance_ext.models.normalisation import normalise

CPU = torch.device("cpu")
SETTINGS = TrainSettings(
    steps=5, batch_size=6, holes_per_image=3, positions="uniform", stain_uses=1
)


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- what is drawn


@pytest.mark.parametrize(
    ("count", "holes", "shape"),
    [(32, 8, (4, 8)), (6, 1, (6, 1)), (3, 8, (1, 3)), (20, 8, (3, 7)), (5, 2, (3, 2))],
)
def test_as_few_images_as_the_holes_allow_with_as_many_patches_each(
    count: int, holes: int, shape: tuple[int, int]
) -> None:
    draw = draw_patches(count, holes, 7, None, random())
    assert draw.picks.shape == shape[:1]
    assert draw.origins.shape == (*shape, 2)
    assert draw.owners.shape == (count,)
    assert draw.flat_origins.shape == (count, 2)
    for patch, (owner, origin) in enumerate(zip(draw.owners, draw.flat_origins, strict=True)):
        assert owner == draw.picks[patch // shape[1]]
        assert torch.equal(origin, draw.origins[patch // shape[1], patch % shape[1]])


def test_uniform_positions_lie_anywhere() -> None:
    draw = draw_patches(4000, 8, 3, None, random())
    assert draw.places is None
    assert draw.picks.unique().tolist() == [0, 1, 2]
    assert draw.origins.amin() == 0
    assert draw.origins.amax() == 223
    assert draw.origins.flatten(0, 1).unique(dim=0).shape[0] > 3500
    assert torch.equal(draw.origins, draw_patches(4000, 8, 3, None, random()).origins)


def test_positions_of_a_grid_are_its_patches_each_as_likely() -> None:
    grid = patch_grid("33")  # rows and columns 0, 33, ..., 198 and, flush with the border, 223
    draw = draw_patches(64_000, 8, 3, grid, random())
    assert draw.places is not None
    assert torch.equal(grid.origins[draw.places], draw.origins)
    times = torch.bincount(draw.places.flatten(), minlength=len(grid))
    assert times.min() > 800
    assert times.max() < 1200


@pytest.mark.parametrize(("count", "holes", "size"), [(32, 8, 2), (20, 8, 3), (5, 2, 3), (7, 7, 1)])
def test_the_processes_shares_are_the_whole(count: int, holes: int, size: int) -> None:
    draw = draw_patches(count, holes, 9, patch_grid("4"), random())
    shares = [draw.share(rank, size) for rank in range(size)]
    assert torch.equal(torch.cat([part.picks for part, _ in shares]), draw.picks)
    assert torch.equal(torch.cat([part.owners for part, _ in shares]), draw.owners)
    assert torch.equal(torch.cat([part.flat_origins for part, _ in shares]), draw.flat_origins)
    assert [i for _, at in shares for i in range(at.start, at.stop)] == list(range(count))
    for part, at in shares:
        assert part.count == at.stop - at.start > 0


# ---------------------------------------------------------------- what is kept


class CountPasses:
    """How many patches and dense grids go through a Local-Net."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patches, self.dense = 0, 0
        forward, dense = module.LocalNet.forward, module.LocalNet.dense

        def count_forward(net: Any, patches: Tensor) -> Tensor:
            self.patches += len(patches)
            return forward(net, patches)

        def count_dense(net: Any, images: Tensor, plan: Any) -> Tensor:
            self.dense += len(images)
            return dense(net, images, plan)

        monkeypatch.setattr(module.LocalNet, "forward", count_forward)
        monkeypatch.setattr(module.LocalNet, "dense", count_dense)


def take_steps(model: Glance, images: Tensor, settings: TrainSettings, steps: int) -> None:
    stage = joint_stage(model, images, settings, CPU)
    for step in range(steps):
        stage.step(random(step))


def test_clean_features_are_computed_once_an_image_where_that_is_less_work(
    model: Glance, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = CountPasses(monkeypatch)
    # 6 images; the stride-33 grid has 64 patches, which share nothing but half of the last row
    many = replace(SETTINGS, positions="33", steps=6 * 64 // 6 + 1)
    take_steps(model, images, many, 20)
    assert count.dense == 6
    assert count.patches == 20 * 6  # the stained ones


@pytest.mark.parametrize("changes", [{"positions": "33", "steps": 20}, {"steps": 10**6}], ids=str)
def test_clean_patches_go_through_local_net_where_that_is_less_work(
    model: Glance, images: Tensor, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    count = CountPasses(monkeypatch)
    take_steps(model, images, replace(SETTINGS, **changes), 2)
    assert count.dense == 0
    assert count.patches == 2 * 2 * 6


def test_no_more_is_kept_than_memory_allows(
    model: Glance, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, positions="33", steps=10**6)
    count = CountPasses(monkeypatch)
    size = len(images) * 64 * model.local_net.features * 4
    for limit, dense in ((size, 2), (size - 1, 0)):
        monkeypatch.setattr(module, "_KEPT_BYTES", limit)
        count.dense = 0
        joint_stage(model, images, settings, CPU).step(random())
        assert count.dense == dense


# ---------------------------------------------------------------- pools of patches


def pools(model: Glance, images: Tensor, **changes: Any) -> KeptPatches:
    settings = replace(SETTINGS, stain_uses=2, **changes)
    return KeptPatches(model, images, settings, CPU, torch.float32, World())


@pytest.mark.parametrize("positions", ["uniform", "33"])
def test_what_is_kept_are_the_features_of_the_patches_drawn(
    model: Glance, images: Tensor, positions: str
) -> None:
    kept = pools(model, images, positions=positions, steps=60)
    draw, clean, stained = kept(random())
    assert torch.equal(draw.origins, kept.draw(random()).origins)
    patches = crop_patches(images[draw.owners].float(), draw.flat_origins, 33)
    with torch.no_grad():
        wanted = model.local_net(normalise(patches))
    torch.testing.assert_close(clean, wanted, rtol=1e-4, atol=1e-5)
    assert draw.places is not None
    for index, (pick, place) in enumerate(
        zip(draw.owners.tolist(), draw.places.flatten().tolist(), strict=True)
    ):
        one = kept.patches(pick)[1][place : place + 1]
        assert not torch.equal(one[0], patches[index])
        with torch.no_grad():
            wanted = model.local_net(normalise(one))
        torch.testing.assert_close(stained[index : index + 1], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("uses", [2, 5])
def test_each_patch_is_drawn_as_often_as_set_on_average(
    model: Glance, images: Tensor, uses: int
) -> None:
    settings = replace(SETTINGS, stain_uses=uses, steps=1000)
    kept = KeptPatches(model, images, settings, CPU, torch.float32, World())
    assert kept.size == 6 * 1000 / len(images) / uses
    times: Counter[tuple[int, ...]] = Counter()
    for step in range(1000):
        draw = kept.draw(random(step))
        times.update(map(tuple, torch.cat((draw.owners[:, None], draw.flat_origins), 1).tolist()))
    assert sum(times.values()) == 6000
    assert abs(6000 / len(times) - uses) < 0.2 * uses  # a few are never drawn, or lie alike


def test_pools_depend_on_seed_and_image_alone(model: Glance, images: Tensor) -> None:
    kept, again = (pools(model, images) for _ in range(2))
    first = kept.patches(2)
    kept.patches(1)
    for one, other in zip(first, again.patches(2), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(kept._pool(1)[0], kept._pool(2)[0])  # other places in each image
    other = pools(model, images, seed=1)
    assert not torch.equal(other.patches(2)[1], first[1])


def test_features_are_computed_once_an_image_and_come_back_the_same(
    model: Glance, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = pools(model, images, steps=20)
    count = CountPasses(monkeypatch)
    _, clean, stained = kept(random())
    picks = kept.draw(random()).picks.unique().tolist()
    assert count.patches == 2 * kept.size * len(picks)
    again = kept(random())
    assert count.patches == 2 * kept.size * len(picks)
    kept.forget(picks[0])
    later = kept(random())
    assert count.patches == 2 * kept.size * (len(picks) + 1)
    for seen in (again, later):
        assert torch.equal(seen.clean, clean)
        assert torch.equal(seen.stained, stained)


def test_clean_features_of_a_large_pool_are_computed_densely(
    model: Glance, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = CountPasses(monkeypatch)
    for steps, dense in ((100, 0), (300, 1)):  # pools of 50 and 150; the grid has 64 patches
        count.dense = count.patches = 0
        kept = pools(model, images, positions="33", steps=steps, batch_size=6)
        kept._of_image(0)
        assert count.dense == dense
        assert count.patches == kept.size * (2 - dense)


def test_pools_are_no_larger_than_memory_allows(
    model: Glance, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch = 2 * model.local_net.features * 4 * len(images)
    monkeypatch.setattr(module, "_KEPT_BYTES", 7 * patch)
    assert pools(model, images, steps=10_000).size == 7
    monkeypatch.setattr(module, "_KEPT_BYTES", patch - 1)
    assert pools(model, images, steps=10_000).size == 1


def test_one_of_two_processes_describes_its_own_images_alone(
    model: Glance, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, stain_uses=2, steps=20)
    whole = pools(model, images, steps=20)(random())
    count = CountPasses(monkeypatch)
    parts = []
    for rank in range(2):
        count.patches = 0
        kept = KeptPatches(model, images, settings, CPU, torch.float32, World(rank, 2))
        parts.append(kept(random()))
        assert count.patches == 2 * kept.size
    assert torch.equal(torch.cat([part.stained for part in parts]), whole.stained)
    assert torch.equal(torch.cat([part.clean for part in parts]), whole.clean)
