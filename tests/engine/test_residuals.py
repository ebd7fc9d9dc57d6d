"""Fitting the scale of the difference of both features."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from glance_ext.data.grid import patch_grid
from glance_ext.engine.detector import MODEL_FILE, Detector
from glance_ext.engine.residuals import fit_residual_scale
from glance_ext.engine.tiles import Canvas, windows_of
from glance_ext.models.glance import Glance
from glance_ext.models.local_net import LocalNet
from tests.engine import test_detector

RAW = replace(test_detector.RAW, grid="33")


@pytest.fixture(scope="module")
def fitted() -> tuple[Glance, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = Glance(LocalNet(5, 4), whiten=True)
    images = [torch.rand(3, 256, 256), torch.rand(3, 256, 300)]
    fit_residual_scale(model, iter(images), grid="33", device=torch.device("cpu"))
    return model, images


def test_the_scale_is_of_all_patches_of_all_windows(fitted) -> None:
    model, images = fitted
    starts = patch_grid("33").starts
    plan = model.plan(starts, starts)
    canvases = [Canvas(image.shape[-2:]) for image in images]
    windows = torch.stack([canvases[i].cut(images[i], at) for i, at in windows_of(canvases)])
    assert len(windows) >= 3
    local, around = model.grid_features(windows, plan)
    residuals = (local - around).flatten(0, 1).double()
    torch.testing.assert_close(
        model.residual_scale.mean.double(), residuals.mean(0), atol=1e-5, rtol=1e-5
    )
    whitening = model.residual_scale.whitening.double()
    covariance = torch.cov(residuals.T, correction=0)
    covariance += 0.01 * covariance.diagonal().mean() * torch.eye(4)
    torch.testing.assert_close(
        whitening @ covariance @ whitening.T, torch.eye(4).double(), atol=1e-3, rtol=0
    )


def test_scores_are_whitened_on_every_path(fitted) -> None:
    model, images = fitted
    detector = Detector(model, RAW)
    shared = detector.score_patches(images[0][None]).inconsistency
    each = model.score_patches(images[0][None], detector.grid.origins).inconsistency
    torch.testing.assert_close(shared, each, atol=1e-3, rtol=1e-3)
    plain = Glance(model.local_net, model.global_net, model.distortion_head)
    assert not torch.allclose(
        each, plain.score_patches(images[0][None], detector.grid.origins).inconsistency, rtol=0.1
    )


def test_over_images_the_scale_is_of_each_windows_mean(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Glance(LocalNet(5, 4), whiten=True, whiten_over="image")
    images = [torch.rand(3, 256, 256) for _ in range(3)] + [torch.rand(3, 256, 300)]
    fit_residual_scale(model, iter(images), grid="33", device=torch.device("cpu"))
    starts = patch_grid("33").starts
    plan = model.plan(starts, starts)
    canvases = [Canvas(image.shape[-2:]) for image in images]
    windows = torch.stack([canvases[i].cut(images[i], at) for i, at in windows_of(canvases)])
    local, around = model.grid_features(windows, plan)
    means = (local - around).double().mean(1)
    assert len(means) == 5
    scale = model.residual_scale
    torch.testing.assert_close(scale.mean.double(), means.mean(0), atol=1e-5, rtol=1e-5)
    covariance = torch.cov(means.T, correction=0)
    covariance += 0.01 * covariance.diagonal().mean() * torch.eye(4)
    whitening = scale.whitening.double()
    torch.testing.assert_close(
        whitening @ covariance @ whitening.T, torch.eye(4).double(), atol=1e-2, rtol=0
    )
    detector = Detector(model, RAW)
    shared = detector.score_patches(windows[:2]).inconsistency
    each = model.score_patches(windows[:2], detector.grid.origins).inconsistency
    torch.testing.assert_close(shared, each, atol=1e-2, rtol=1e-2)
    detector.save(tmp_path / MODEL_FILE)
    again = Detector.load(tmp_path)
    assert torch.equal(again.score_patches(windows[:2]).inconsistency, shared)


@pytest.mark.parametrize("precision", ["bfloat16", "float64"])
def test_the_scale_is_never_rounded_to_bfloat16(fitted, precision: str) -> None:
    model, images = fitted
    expected = Detector(model, RAW).score_patches(images[0][None]).inconsistency
    found = Detector(model, RAW, precision=precision).score_patches(images[0][None]).inconsistency
    assert found.dtype == (torch.float64 if precision == "float64" else torch.float32)
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error < (0.05 if precision == "bfloat16" else 1e-3)


def test_the_scale_is_saved_with_the_model(fitted, tmp_path: Path) -> None:
    model, images = fitted
    Detector(model, RAW).save(tmp_path / MODEL_FILE)
    again = Detector.load(tmp_path)
    assert torch.equal(again.model.residual_scale.whitening, model.residual_scale.whitening)
    expected = Detector(model, RAW).score_maps(images[0][None])
    assert torch.equal(again.score_maps(images[0][None]), expected)
