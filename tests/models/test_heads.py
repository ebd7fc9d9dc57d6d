import math

import pytest
import torch

from glance_ext.models.heads import DistortionHead, distortion, distortion_loss, inconsistency


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
