"""Stage 3: sharing and keeping change none of a step's losses and gradients."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glance_ext.data.grid import patch_grid
from glance_ext.data.patches import crop_patches
from glance_ext.data.stains import STAINS, stain
from glance_ext.engine import joint as module
from glance_ext.engine import step_patches
from glance_ext.engine.distributed import World
from glance_ext.engine.joint import joint_stage
from glance_ext.engine.settings import TrainSettings
from glance_ext.engine.step_patches import Draw, KeptPatches, draw_patches
from glance_ext.errors import GlanceError
from glance_ext.models.glance import Glance
from glance_ext.models.global_net import hole_masks
from glance_ext.models.heads import distortion_loss, inconsistency
from glance_ext.models.normalisation import normalise

CPU = torch.device("cpu")
SETTINGS = TrainSettings(
    steps=5, batch_size=6, holes_per_image=3, positions="uniform", stain_uses=1
)


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(model: Glance, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    losses["loss"].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def drawn(
    model: Glance, images: Tensor, settings: TrainSettings, dtype: torch.dtype
) -> tuple[Draw, Tensor, Tensor]:
    """A step's draw, its patches, and the same stained."""
    if settings.stain_uses == 1:
        grid = None if settings.positions == "uniform" else patch_grid(settings.positions)
        count, holes = settings.batch_size, settings.holes_per_image
        generator = random()
        draw = draw_patches(count, holes, len(images), grid, generator)
        patches = crop_patches(images[draw.owners].to(dtype), draw.flat_origins, 33)
        return draw, patches, stain(patches, generator, STAINS[settings.stains])
    kept = KeptPatches(model, images, settings, CPU, dtype, World())
    draw = kept.draw(random())
    patches = crop_patches(images[draw.owners].to(dtype), draw.flat_origins, 33)
    assert draw.places is not None
    pools = [kept.patches(pick)[1] for pick in draw.picks.tolist()]
    rows = [pool[some] for pool, some in zip(pools, draw.places, strict=True)]
    return draw, patches, torch.cat(rows)[: draw.count]


def one_pass_a_patch(
    model: Glance, images: Tensor, settings: TrainSettings, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The specification of a step: each patch has its own masked image."""
    draw, patches, stained = drawn(model, images, settings, dtype)
    whole = images[draw.owners].to(dtype)
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
        {"holes_per_image": 4, "stain_uses": 2, "batch_size": 7},
        {"holes_per_image": 1, "stain_uses": 3},
        {"holes_per_image": 8, "stain_uses": 2, "positions": "33", "steps": 300},  # kept densely
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


@pytest.mark.parametrize(
    ("positions", "uses", "steps"),
    [("uniform", 1, 10_000), ("33", 1, 10_000), ("uniform", 2, 20), ("33", 2, 500)],
)
def test_bfloat16_rounds_the_networks_and_nothing_else(
    model: Glance, images: Tensor, positions: str, uses: int, steps: int
) -> None:
    settings = replace(SETTINGS, lambda_t=0.5, positions=positions, steps=steps, stain_uses=uses)
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
    monkeypatch.setattr(
        step_patches, "turn", lambda patches, random: seen.append(patches) or patches
    )
    heads: list[Any] = []
    model.distortion_head.register_forward_hook(lambda _, args, __: heads.append(args[0]))
    joint_stage(model, images, replace(SETTINGS, distortion="turn", turns=False), CPU).step(
        random()
    )
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

    def spy(name: str, module: Any) -> None:
        real = getattr(module, name)

        def wrapped(*args: Any) -> Any:
            result = real(*args)
            seen.setdefault(name, []).append((args, result))
            return result

        monkeypatch.setattr(module, name, wrapped)

    for name in ("inconsistency", "distortion_loss"):
        spy(name, module)
    for name in ("crop_from", "stain"):
        spy(name, step_patches)
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


@pytest.mark.parametrize("uses", [1, 2])
@pytest.mark.parametrize("positions", ["uniform", "33"])
def test_the_processes_losses_and_gradients_add_up_to_those_of_one(
    model: Glance, images: Tensor, positions: str, uses: int
) -> None:
    settings = replace(
        SETTINGS, batch_size=8, lambda_t=0.5, positions=positions, stain_uses=uses
    )  # 3 + 3 + 2 patches
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
