"""Further training of the distortion head, with both networks frozen."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glance_ext.data.grid import patch_grid
from glance_ext.data.patches import crop_from
from glance_ext.engine import head as module
from glance_ext.engine import step_patches
from glance_ext.engine.detector import MODEL_FILE, Detector
from glance_ext.engine.distill import load_local_net
from glance_ext.engine.head import head_stage
from glance_ext.engine.loop import Trainer, step_generator
from glance_ext.engine.settings import TrainSettings
from glance_ext.engine.train import train
from glance_ext.errors import Interrupted
from glance_ext.models.glance import PATCH_SIZE, Glance
from glance_ext.models.global_net import GlobalNet
from glance_ext.models.normalisation import normalise
from glance_ext.nn import HolePlan

CPU = torch.device("cpu")
SETTINGS = TrainSettings(
    steps=2,
    batch_size=4,
    positions="9",
    grid="9",
    patch_scale=6,
    turns=False,
    distortion="turn",
    head_steps=6,
)


@pytest.fixture
def images() -> Tensor:
    return torch.rand((10, 3, 256, 256), generator=torch.Generator().manual_seed(2)).half()


@pytest.fixture
def model(local_net_file: Path) -> Glance:
    torch.manual_seed(0)
    return Glance(load_local_net(local_net_file).local_net, patch_scale=6)


def test_the_head_learns_and_nothing_else_does(
    model: Glance, images: Tensor, tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = replace(SETTINGS, head_steps=60)
    trainer = Trainer(tmp_path / "state", {}, show_progress=False)
    trainer.run(head_stage(model, images, settings, CPU))
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed == {f"distortion_head.{name}" for name in model.distortion_head.state_dict()}
    losses = [value for _, value in trainer.history["head/loss"]]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["turn", "stain"])
def test_it_learns_from_all_patches_of_the_grid_each_once_distorted(
    model: Glance, images: Tensor, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(module, "_MOST_IMAGES", 9)
    real, seen = module.distorted, []

    def spy(patches: Tensor, given: TrainSettings, generator: torch.Generator) -> Tensor:
        seen.append((patches, given, real(patches, given, generator)))
        return seen[-1][-1]

    monkeypatch.setattr(module, "distorted", spy)
    settings = replace(SETTINGS, distortion=kind)
    clean, other, around = module._features(model, images, settings, CPU)
    assert clean.shape == other.shape == around.shape == (9, 4, 8)
    assert all(given is settings for _, given, _ in seen)
    grid = patch_grid("9", image_size=42)
    owners = torch.arange(9).repeat_interleave(4)
    view = model.local_view(images[:9].float())
    patches = crop_from(view, owners, grid.origins.repeat(9, 1), PATCH_SIZE)
    assert torch.equal(torch.cat([patch for patch, _, _ in seen]), patches)
    changed = torch.cat([result for _, _, result in seen])
    with torch.no_grad():
        for features, of in ((clean, patches), (other, changed)):
            expected = model.local_net(normalise(of)).reshape(9, 4, 8)
            torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)
        plan = model.plan(grid.starts, grid.starts)
        torch.testing.assert_close(around, model.grid_features(images[:9].float(), plan)[1])


@pytest.mark.parametrize("dense", [False, True])
def test_of_a_fine_grid_it_learns_from_some_patches_of_every_image(
    model: Glance, images: Tensor, monkeypatch: pytest.MonkeyPatch, dense: bool
) -> None:
    """Local-Net describes those alone, or all of the grid where that is less work."""
    real_plan = step_patches.dense_plan
    monkeypatch.setattr(
        module,
        "dense_plan",
        lambda model, grid, _: real_plan(model, grid, math.inf if dense else 0),
    )
    monkeypatch.setattr(module, "_MOST_IMAGES", 9)
    monkeypatch.setattr(module, "_MOST_PATCHES", 80)  # 8 of each image
    monkeypatch.setattr(module, "_LEAST_PATCHES", 8)
    real, seen = module.distorted, []

    def spy(patches: Tensor, given: TrainSettings, generator: torch.Generator) -> Tensor:
        seen.append(patches)
        return real(patches, given, generator)

    monkeypatch.setattr(module, "distorted", spy)
    settings = replace(SETTINGS, grid="2")
    assert len(patch_grid("2", image_size=42)) == 36
    clean, other, around = module._features(model, images, settings, CPU)
    assert clean.shape == other.shape == around.shape == (18, 4, 8)
    patches = torch.cat(seen)
    assert len(patches) == 72
    with torch.no_grad():
        expected = model.local_net(normalise(patches)).reshape(18, 4, 8)
    torch.testing.assert_close(clean, expected, rtol=1e-3, atol=1e-4)
    grid = patch_grid("2", image_size=42)
    every = model.grid_features(images[:9].float(), model.plan(grid.starts, grid.starts))[1]
    places = [
        torch.randint(36, (size, 8), generator=step_generator(settings.seed, "features", first))
        for first, size in ((0, 8), (8, 1))
    ]
    expected = every[torch.arange(9)[:, None], torch.cat(places)].reshape(18, 4, 8)
    torch.testing.assert_close(around, expected, rtol=1e-3, atol=1e-4)
    groups = {tuple(group) for group in patches.flatten(1)[:, 0].reshape(9, 8).tolist()}
    assert len(groups) == 9  # not the same places' pixels again


@pytest.mark.parametrize(("grid", "count"), [("2", 5), ("9", 9)])
def test_where_not_all_patches_are_kept_fewer_images_are_described(
    model: Glance, images: Tensor, monkeypatch: pytest.MonkeyPatch, grid: str, count: int
) -> None:
    """Of 36 patches of a fine grid at least 16; of four, all."""
    monkeypatch.setattr(module, "_MOST_IMAGES", 9)
    monkeypatch.setattr(module, "_MOST_PATCHES", 80)
    monkeypatch.setattr(module, "_LEAST_PATCHES", 16)
    real, seen = GlobalNet.shared_features, []

    def spy(self: GlobalNet, some: Tensor, plan: HolePlan) -> Tensor:
        seen.append((len(some), plan.origins.shape[-2]))
        return real(self, some, plan)

    monkeypatch.setattr(GlobalNet, "shared_features", spy)
    batches = []
    clean, _, _ = module._features(
        model,
        images,
        replace(SETTINGS, grid=grid),
        CPU,
        lambda firsts: batches.append(firsts) or firsts,
    )
    assert batches == [range(0, count, 8)]  # a bar can show how far it is
    assert sum(images for images, _ in seen) == count
    holes = 16 if grid == "2" else 4  # of the patches that are kept, no others
    assert all(found == holes for _, found in seen)
    assert clean.shape[:2] == ((5 * 4, 4) if grid == "2" else (9, 4))


def test_distorted_patches_are_the_negatives(
    model: Glance, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = torch.zeros(3, 4, 8), torch.ones(3, 4, 8), torch.full((3, 4, 8), 2.0)
    monkeypatch.setattr(module, "_features", lambda *args: features)
    losses, heads = [], []
    monkeypatch.setattr(
        module, "distortion_loss", lambda odds, labels: losses.append(labels) or odds.mean()
    )
    model.distortion_head.register_forward_hook(lambda _, args, __: heads.append(args))
    head_stage(model, images, SETTINGS, CPU).step(torch.Generator().manual_seed(0))
    ((local, around),) = heads
    assert torch.equal(local[..., 0], 1 - losses[0])
    assert around.eq(2).all()


@pytest.mark.parametrize("call", [1, 4])
def test_an_interrupted_run_ends_with_the_same_bits(
    pictures: list[Path],
    local_net_file: Path,
    tmp_path: Path,
    interrupt_at: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    call: int,
) -> None:
    def fit(output: Path, *, resume: bool = False) -> None:
        train(
            pictures,
            SETTINGS,
            output=output,
            local_net=local_net_file,
            resume=resume,
            show_progress=False,
        )

    fit(tmp_path / "whole")
    interrupt_at(module, "distortion_loss", call)
    with pytest.raises(Interrupted, match=f"step {call} of 6 of stage 'head'"):
        fit(tmp_path / "parts")
    monkeypatch.undo()
    fit(tmp_path / "parts", resume=True)
    whole, parts = (
        Detector.load(tmp_path / name / MODEL_FILE).model.state_dict()
        for name in ("whole", "parts")
    )
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
