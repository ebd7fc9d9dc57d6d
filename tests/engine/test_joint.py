"""Stage 3: what a step draws, and that sharing changes none of its losses and gradients."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glance_ext.data.grid import patch_grid
from glance_ext.data.images import load_image, resize
from glance_ext.data.patches import crop_patches
from glance_ext.data.stains import STAINS, stain
from glance_ext.engine import joint as module
from glance_ext.engine.distill import load_local_net
from glance_ext.engine.distributed import World
from glance_ext.engine.joint import draw_patches, joint_stage
from glance_ext.engine.settings import TrainSettings
from glance_ext.errors import GlanceError
from glance_ext.models.glance import Glance
from glance_ext.models.global_net import hole_masks
from glance_ext.models.heads import distortion_loss, inconsistency
from glance_ext.models.normalisation import normalise

CPU = torch.device("cpu")
SETTINGS = TrainSettings(steps=5, batch_size=6, holes_per_image=3, positions="uniform")


@pytest.fixture
def images(pictures: list[Path]) -> Tensor:
    return torch.stack([resize(load_image(path), (256, 256)) for path in pictures]).half()


@pytest.fixture
def model(local_net_file: Path) -> Glance:
    torch.manual_seed(0)
    return Glance(load_local_net(local_net_file).local_net)


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(model: Glance, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    losses["loss"].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


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


# ---------------------------------------------------------------- what is learnt from it


def one_pass_a_patch(
    model: Glance, images: Tensor, settings: TrainSettings, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The specification of a step: each patch has its own masked image."""
    grid = None if settings.positions == "uniform" else patch_grid(settings.positions)
    generator = random()
    draw = draw_patches(settings.batch_size, settings.holes_per_image, len(images), grid, generator)
    whole = images[draw.owners].to(dtype)
    patches = crop_patches(whole, draw.flat_origins, 33)
    stained = stain(patches, generator, STAINS[settings.stains])
    with torch.no_grad():
        clean_features = model.local_net(normalise(patches))
        stained_features = model.local_net(normalise(stained))
    masks = hole_masks(draw.flat_origins, 33, (256, 256))
    global_features = model.global_net(normalise(whole), masks)
    iad = inconsistency(clean_features, global_features).mean()
    log_odds = torch.cat(
        [model.distortion_head(f, global_features) for f in (clean_features, stained_features)]
    )
    target = torch.tensor([1.0, 0.0], dtype=dtype).repeat_interleave(settings.batch_size)
    dad = distortion_loss(log_odds, target)
    return {"loss": iad + settings.lambda_t * dad, "inconsistency": iad, "distortion": dad}


@pytest.mark.parametrize(
    "changes",
    [
        {"holes_per_image": 1},
        {"holes_per_image": 3},
        {"holes_per_image": 4, "batch_size": 7},  # two images, and one patch fewer in the last
        {"holes_per_image": 8, "positions": "33"},
        {"holes_per_image": 3, "positions": "33", "steps": 10_000},  # so many that it is kept
    ],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_a_step_equals_one_masked_pass_a_patch(
    model: Glance, images: Tensor, changes: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    settings = replace(SETTINGS, lambda_t=0.5, **changes)
    model = model.to(dtype)
    expected = one_pass_a_patch(model, images, settings, dtype)
    wanted = gradients(model, expected)
    losses = joint_stage(model, images, settings, CPU).step(random())
    found = gradients(model, losses)
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=tolerance, atol=0)
    assert found.keys() == wanted.keys()
    assert all(name.startswith(("global_net.", "distortion_head.")) for name in found)
    for name, value in wanted.items():
        error = float((found[name] - value).norm() / value.norm())
        assert error <= tolerance, name


@pytest.mark.parametrize("positions", ["uniform", "33"])
def test_bfloat16_rounds_the_networks_and_nothing_else(
    model: Glance, images: Tensor, positions: str
) -> None:
    settings = replace(SETTINGS, lambda_t=0.5, positions=positions, steps=10_000)
    wanted_losses = joint_stage(model, images, settings, CPU).step(random())
    wanted = gradients(model, wanted_losses)
    stage = joint_stage(model, images, replace(settings, precision="bfloat16"), CPU)
    losses = stage.step(random())
    found = gradients(model, losses)
    for name, value in wanted_losses.items():
        assert losses[name].dtype == torch.float32
        assert losses[name] != value
        torch.testing.assert_close(losses[name], value, rtol=0.03, atol=0)
    assert all(grad.dtype == torch.float32 for grad in found.values())
    one, other = (torch.cat([g[name].flatten() for name in wanted]) for g in (found, wanted))
    assert float((one - other).norm() / other.norm()) < 0.1
    stage.optimizer.step()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    kept = stage.optimizer.state[model.global_net.stem.weight]["exp_avg"]
    assert kept.dtype == torch.float32


def test_the_distortion_may_be_a_turn(
    model: Glance, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(module, "turn", lambda patches, random: seen.append(patches) or patches)
    heads: list[Any] = []
    model.distortion_head.register_forward_hook(lambda _, args, __: heads.append(args[0]))
    joint_stage(model, images, replace(SETTINGS, distortion="turn"), CPU).step(random())
    assert len(seen) == 1
    clean, other = heads[0].chunk(2)
    assert torch.equal(clean, other)  # as the stub has turned nothing
    joint_stage(model, images, SETTINGS, CPU).step(random())
    assert len(seen) == 1
    clean, other = heads[1].chunk(2)
    assert not torch.equal(clean, other)


def test_the_inconsistency_loss_never_sees_a_stain(
    model: Glance, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[Any]] = {}

    def spy(name: str) -> None:
        real = getattr(module, name)

        def wrapped(*args: Any) -> Any:
            result = real(*args)
            seen.setdefault(name, []).append((args, result))
            return result

        monkeypatch.setattr(module, name, wrapped)

    for name in ("inconsistency", "crop_from", "stain", "distortion_loss"):
        spy(name)
    heads: list[Any] = []
    model.distortion_head.register_forward_hook(lambda _, args, __: heads.append(args))
    losses = joint_stage(model, images, SETTINGS, CPU).step(random())

    ((_, patches),) = seen["crop_from"]
    ((_, stained),) = seen["stain"]
    assert not torch.equal(patches, stained)
    with torch.no_grad():
        clean_features = model.local_net(normalise(patches.float()))
        stained_features = model.local_net(normalise(stained))
    (((local, around), _),) = seen["inconsistency"]
    torch.testing.assert_close(local, clean_features, rtol=1e-4, atol=1e-5)
    assert len(local) == SETTINGS.batch_size

    # the distortion head sees both, the stained ones as distorted
    ((head_local, head_global),) = heads
    torch.testing.assert_close(
        head_local, torch.cat((clean_features, stained_features)), rtol=1e-4, atol=1e-5
    )
    assert torch.equal(head_global, torch.cat((around, around)))
    (((_, undistorted), dad),) = seen["distortion_loss"]
    assert undistorted.tolist() == [1.0] * 6 + [0.0] * 6
    expected = losses["inconsistency"] + SETTINGS.lambda_t * dad
    torch.testing.assert_close(losses["loss"], expected)


@pytest.mark.parametrize("positions", ["uniform", "33"])
def test_the_processes_losses_and_gradients_add_up_to_those_of_one(
    model: Glance, images: Tensor, positions: str
) -> None:
    settings = replace(SETTINGS, batch_size=8, lambda_t=0.5, positions=positions)  # 3 + 3 + 2
    losses = joint_stage(model, images, settings, CPU).step(random())
    whole = gradients(model, losses)
    parts = []
    for rank in range(2):
        share = joint_stage(model, images, settings, CPU, World(rank, 2)).step(random())
        parts.append((share, gradients(model, share)))
    for name, value in losses.items():
        torch.testing.assert_close(sum(part[name] for part, _ in parts), value)
    for name, value in whole.items():
        total = sum(grads[name] for _, grads in parts)
        assert float((total - value).norm() / value.norm()) <= 1e-4, name


def test_more_processes_than_images_a_step_are_refused(model: Glance, images: Tensor) -> None:
    message = r"an image a step for each of 3 processes, got 2 \(batch size 6 with 3 holes"
    with pytest.raises(GlanceError, match=message):
        joint_stage(model, images, SETTINGS, CPU, World(0, 3))


def test_training_lowers_the_losses_on_a_simple_texture(model: Glance, images: Tensor) -> None:
    stage = joint_stage(model, images, SETTINGS, CPU)
    losses = []
    for step in range(30):
        stage.optimizer.zero_grad()
        found = stage.step(random(step))
        found["loss"].backward()
        stage.optimizer.step()
        losses.append(found["inconsistency"].item())
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


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
