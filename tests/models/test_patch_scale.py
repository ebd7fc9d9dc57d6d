"""Patches larger than 33 pixels, which Local-Net sees shrunk."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glance_ext.data.patches import Enlarged, crop_patches
from glance_ext.engine.detector import Detector
from glance_ext.engine.joint import joint_stage
from glance_ext.engine.settings import TrainSettings, preset
from glance_ext.errors import GlanceError
from glance_ext.models.glance import PATCH_SIZE, Glance
from glance_ext.models.local_net import LocalNet
from glance_ext.ops import aggregate_patch_scores
from tests.engine.test_residuals import RAW


def model(scale: int) -> Glance:
    torch.manual_seed(0)
    return Glance(LocalNet(5, 8), patch_scale=scale).eval()


def scene(count: int = 1) -> Tensor:
    return torch.rand((count, 3, 256, 256), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scale", [1, 2, 4, 6])
def test_the_shared_pass_equals_one_masked_pass_a_patch(scale: int) -> None:
    glance = model(scale)
    starts = sorted({0, 9, glance.view_size - PATCH_SIZE})
    origins = torch.cartesian_prod(torch.tensor(starts), torch.tensor(starts))
    found = glance.score_grid(scene(2), glance.plan(starts, starts))
    expected = glance.score_patches(scene(2), origins)
    for name in ("inconsistency", "distortion", "log_odds"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("scale", [2, 3, 4])
@torch.no_grad()
def test_both_networks_look_at_the_same_place(scale: int) -> None:
    glance, origin = model(scale), torch.tensor([[7, 20]])
    images, side = scene(), PATCH_SIZE * scale
    place = (..., slice(7 * scale, 7 * scale + side), slice(20 * scale, 20 * scale + side))
    seen: list[Tensor] = []
    glance.local_net.register_forward_hook(lambda _, args, result: seen.append(result))
    glance.global_net.register_forward_hook(lambda _, args, result: seen.append(result))
    glance(images, origin)
    inside, outside = images.clone(), torch.rand_like(images)
    inside[place] = 0.5
    outside[place] = images[place]
    glance(inside, origin)
    glance(outside, origin)
    local, around = seen[0::2], seen[1::2]
    assert torch.equal(around[0], around[1])  # the hole hides the patch and nothing else
    assert not torch.equal(around[0], around[2])
    assert torch.equal(local[0], local[2])  # Local-Net sees the patch and nothing else
    assert not torch.equal(local[0], local[1])


@pytest.mark.parametrize("uses", [1, 2])
def test_training_cuts_its_patches_from_the_shrunk_image(
    monkeypatch: pytest.MonkeyPatch, uses: int
) -> None:
    from glance_ext.engine import step_patches

    seen = []
    crop = step_patches.crop_from
    monkeypatch.setattr(step_patches, "crop_from", lambda *args: seen.append(args) or crop(*args))
    small = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    images = Enlarged(small, (256, 256))
    for positions in ("uniform", "8"):
        settings = TrainSettings(
            steps=3,
            batch_size=6,
            holes_per_image=3,
            positions=positions,
            patch_scale=4,
            stain_uses=uses,
        )
        stage = joint_stage(model(4), images, settings, torch.device("cpu"))
        losses = stage.step(torch.Generator().manual_seed(0))
        assert torch.isfinite(losses["loss"])
        view, _, origins, _ = seen.pop()
        assert view.shape == (2 if uses == 1 else 1, 3, 64, 64)
        assert origins.max() <= 64 - PATCH_SIZE


def test_enlarged_images_are_made_when_asked_for() -> None:
    small = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    images = Enlarged(small, (256, 256))
    assert (len(images), tuple(images.shape)) == (5, (5, 3, 256, 256))
    some = images[torch.tensor([4, 0])]
    assert tuple(some.shape) == (2, 3, 256, 256)
    assert torch.equal(some[0], images[4])
    assert torch.equal(images[:2][0], some[1])
    shrunk = F.avg_pool2d(some, 8) * 255
    assert (shrunk[0] - small[4]).abs().mean() < 30  # the same picture, smoothed
    assert torch.equal(Enlarged(small, (32, 32))[2], small[2] / 255)
    patch = crop_patches(some, torch.tensor([[0, 0], [3, 5]]), PATCH_SIZE)
    assert tuple(patch.shape) == (2, 3, 33, 33)


@pytest.mark.parametrize("scale", [0, 8])
def test_a_scale_at_which_no_patch_fits_is_refused(scale: int) -> None:
    with pytest.raises(GlanceError, match=f"patch scale: expected 1 to 7, got {scale}"):
        preset("default", patch_scale=scale)


@pytest.mark.parametrize("scale", [3, 4, 6])
def test_patches_keep_their_place_in_the_map(scale: int) -> None:
    side = 256 // scale
    grid = str(min(side - PATCH_SIZE, PATCH_SIZE))
    detector = Detector(model(scale), replace(RAW, grid=grid))
    scores = torch.rand((2, len(detector.grid)), generator=torch.Generator().manual_seed(3))
    maps = detector.aggregate(scores)
    assert maps.shape == (2, 256, 256)
    seen = aggregate_patch_scores(
        scores, PATCH_SIZE, (side, side), origins=detector.grid.origins, mode="mean"
    )
    inside = side * scale  # up to four pixels are left over
    expected = F.interpolate(seen[None], (inside, inside), mode="bilinear", align_corners=False)
    torch.testing.assert_close(maps[:, :inside, :inside], expected[0])
    assert maps[:, inside:].eq(maps[:, inside - 1 : inside]).all()
    assert maps[:, :, inside:].eq(maps[:, :, inside - 1 : inside]).all()
