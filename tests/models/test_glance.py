import pytest
import torch

from glance_ext.models.glance import Glance
from glance_ext.models.global_net import hole_masks
from glance_ext.models.local_net import LocalNet
from glance_ext.models.normalisation import normalise


@pytest.fixture(scope="module")
def model() -> Glance:
    torch.manual_seed(0)
    return Glance(LocalNet(5, 8)).eval()


ORIGINS = torch.tensor([[0, 0], [3, 200], [200, 3], [223, 223], [100, 50]])


def test_normalisation_is_by_channel() -> None:
    image = torch.rand(2, 3, 4, 5)
    for channel, (mean, std) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):
        expected = (image[:, channel] - mean) / std
        torch.testing.assert_close(normalise(image)[:, channel], expected)


def test_a_patch_is_scored_by_both_networks_at_its_own_place(model: Glance) -> None:
    image = torch.rand(1, 3, 256, 256)
    row, column = 3, 200
    with torch.no_grad():
        scores = model(image, torch.tensor([[row, column]]))
        x = normalise(image)
        local = model.local_net(x[:, :, row : row + 33, column : column + 33])
        mask = torch.ones(256, 256)
        mask[row : row + 33, column : column + 33] = 0
        around = model.global_net(x, mask)
        log_odds = model.distortion_head(local, around)
    torch.testing.assert_close(scores.inconsistency, (local - around).square().mean(1))
    torch.testing.assert_close(scores.distortion, 1 - torch.sigmoid(log_odds))
    torch.testing.assert_close(scores.log_odds, -log_odds)
    assert torch.equal(mask == 0, ~hole_masks(torch.tensor([[row, column]]), 33, (256, 256))[0, 0])


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_all_patches_of_all_images_score_as_each_does_alone(model: Glance, batch_size: int) -> None:
    images = torch.rand(2, 3, 256, 256)
    scores = model.score_patches(images, ORIGINS, batch_size)
    for name in ("inconsistency", "distortion", "log_odds"):
        expected = torch.stack(
            [
                torch.cat([getattr(model(image[None], o[None]), name) for o in ORIGINS])
                for image in images
            ]
        ).detach()
        found = getattr(scores, name)
        assert found.shape == (2, 5)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not scores.inconsistency.requires_grad


def test_higher_log_odds_mean_higher_distortion(model: Glance) -> None:
    scores = model.score_patches(torch.rand(1, 3, 256, 256), ORIGINS)
    torch.testing.assert_close(scores.distortion, torch.sigmoid(scores.log_odds))


@pytest.mark.parametrize("starts", [(0, 4, 8, 100, 223), (3, 17, 223), (50,)])
def test_a_grid_scores_as_its_patches_do_one_by_one(model: Glance, starts: tuple[int, ...]) -> None:
    images = torch.rand(2, 3, 256, 256)
    columns = (1, 90, 222)
    plan = model.plan(starts, columns)
    assert len(plan) == 3 * len(starts)
    origins = torch.cartesian_prod(torch.tensor(starts), torch.tensor(columns)).reshape(-1, 2)
    shared = model.score_grid(images, plan)
    alone = model.score_patches(images, origins)
    for name in ("inconsistency", "distortion", "log_odds"):
        torch.testing.assert_close(
            getattr(shared, name), getattr(alone, name), rtol=2e-5, atol=2e-5
        )
