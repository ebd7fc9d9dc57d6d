import math

import pytest
import torch

from glance_ext.models.heads import (
    DistortionHead,
    ResidualScale,
    distortion,
    distortion_loss,
    inconsistency,
)


def test_inconsistency_is_the_mean_square_difference() -> None:
    local = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    around = torch.tensor([[1.0, 0.0, 3.0, 1.0], [0.0, 0.0, 0.0, 2.0]])
    assert inconsistency(local, around).tolist() == [(4 + 9) / 4, 1.0]


def test_the_head_is_the_formula_of_the_paper() -> None:
    torch.manual_seed(0)
    head = DistortionHead(3, 4).double()
    local, around = torch.randn(2, 5, 3, dtype=torch.float64)
    both = torch.cat((local, around), 1)
    hidden = both @ head.hidden.weight.T + head.hidden.bias
    hidden = torch.where(hidden > 0, hidden, 0.01 * hidden)
    expected = (hidden @ head.output.weight.T + head.output.bias)[:, 0]
    log_odds = head(local, around)
    assert log_odds.shape == (5,)
    torch.testing.assert_close(log_odds, expected)
    assert not torch.allclose(head(around, local), expected)


def test_distortion_is_one_minus_the_probability_of_being_undistorted() -> None:
    log_odds = torch.tensor([0.0, 2.0, -2.0, 200.0, -200.0])
    expected = [1 - 1 / (1 + math.exp(-x)) for x in (0.0, 2.0, -2.0)] + [0.0, 1.0]
    assert distortion(log_odds).tolist() == pytest.approx(expected, abs=1e-6)


def test_distortion_loss_is_cross_entropy() -> None:
    log_odds, labels = torch.tensor([1.5, -0.5, 3.0]), torch.tensor([1.0, 0.0, 0.0])
    p = [1 / (1 + math.exp(-x)) for x in log_odds.tolist()]
    expected = -(math.log(p[0]) + math.log(1 - p[1]) + math.log(1 - p[2])) / 3
    assert float(distortion_loss(log_odds, labels)) == pytest.approx(expected, rel=1e-6)
    assert torch.isfinite(distortion_loss(torch.tensor([1e4]), torch.tensor([0.0])))


def fitted(residuals: torch.Tensor, shrinkage: float = 0.0, over: str = "patch") -> ResidualScale:
    scale = ResidualScale(residuals.shape[1], over).double()
    wide = residuals.double()
    scale.fit(len(wide), wide.sum(0), wide.T @ wide, shrinkage)
    return scale


def test_the_residual_scale_is_the_mahalanobis_distance_by_the_number_of_features() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    residuals = torch.randn(500, 3, generator=generator, dtype=torch.float64) @ mixing + 2
    scale = fitted(residuals)
    local, around = torch.randn(2, 7, 3, generator=generator, dtype=torch.float64)
    off = local - around - residuals.mean(0)
    inverse = torch.linalg.inv(torch.cov(residuals.T, correction=0))
    expected = torch.einsum("bi,ij,bj->b", off, inverse, off) / 3
    torch.testing.assert_close(scale(local, around), expected)
    # Over the patches that it was fitted to, the mean is 1.
    assert float(scale(residuals, torch.zeros_like(residuals)).mean()) == pytest.approx(1)


def test_over_images_patches_share_the_distance_of_their_mean() -> None:
    generator = torch.Generator().manual_seed(3)
    means = torch.randn(300, 3, generator=generator, dtype=torch.float64) * torch.arange(1, 4) + 1
    scale = fitted(means, over="image")
    local, around = torch.randn(2, 5, 4, 3, generator=generator, dtype=torch.float64)
    shares = scale(local, around)
    assert shares.shape == (5, 4)
    alone = fitted(means)  # of one patch, the mean difference
    expected = alone((local - around).mean(1), torch.zeros(5, 3).double())
    torch.testing.assert_close(shares.mean(1), expected)
    # A patch that disagrees the other way takes away from it.
    local, around = torch.zeros(2, 1, 3, 3, dtype=torch.float64) + scale.mean
    local[0, :, 0] += torch.tensor([4.0, 4.0, -1.0])
    (shares,) = scale(local, torch.zeros_like(around))
    assert shares[0] == shares[1] > 0 > shares[2]


def test_an_unfitted_residual_scale_is_the_plain_inconsistency() -> None:
    local, around = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ResidualScale(4)(local, around), inconsistency(local, around))


def test_what_normal_patches_disagree_about_counts_less() -> None:
    generator = torch.Generator().manual_seed(2)
    residuals = torch.randn(400, 2, generator=generator) * torch.tensor([10.0, 0.1])
    scale, zero = fitted(residuals, 0.0001), torch.zeros(1, 2, dtype=torch.float64)
    usual, odd = torch.tensor([[[5.0, 0.0]], [[0.0, 5.0]]], dtype=torch.float64)
    assert float(scale(odd, zero)) > 50 * float(scale(usual, zero))


@pytest.mark.parametrize("rows", [1, 3])
def test_few_or_equal_patches_still_give_finite_scores(rows: int) -> None:
    scale = fitted(torch.ones(rows, 4), 0.01)
    scores = scale(torch.randn(6, 4, dtype=torch.float64), torch.zeros(6, 4, dtype=torch.float64))
    assert scores.isfinite().all()


def test_no_patch_is_an_error() -> None:
    with pytest.raises(ValueError, match="ResidualScale: expected at least one patch, got 0"):
        ResidualScale(2).fit(0, torch.zeros(2), torch.zeros(2, 2))
