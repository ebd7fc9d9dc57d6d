"""A threshold promises a share of false alarms: it must hold on good images not seen before."""

from pathlib import Path

import numpy as np
import pytest
import torch

from glance_ext.data.textures import TEXTURES, texture
from glance_ext.engine import context_head
from glance_ext.engine.detector import Detector
from glance_ext.engine.settings import preset
from glance_ext.engine.train import NormalImages, train_loaded

RATE = 0.25
LEARNT, HELD_OUT, FRESH = 160, 40, 60  # one in five is held out, as by default


def tiles(name: str, count: int, rng: np.random.Generator) -> torch.Tensor:
    """Pieces of a texture whose brightness, contrast and grain vary, as those of good parts do."""
    picture = texture(name)
    images = []
    for row, column in rng.integers(0, 256, (count, 2)):
        tile = picture[row : row + 256, column : column + 256]
        tile = rng.uniform(0.2, 0.6) + rng.uniform(0.2, 0.6) * (tile - tile.mean())
        images.append(tile + rng.normal(0, rng.uniform(0.005, 0.03), (256, 256, 1)))
    planes = np.stack(images).clip(0, 1).transpose(0, 3, 1, 2)
    return torch.from_numpy(planes.astype(np.float32))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Detector, torch.Tensor]]:
    """For each texture a detector with few patches, and fresh good tiles."""
    # Four times 33 pixels a patch: nine patches an image, so that hundreds of images are enough.
    short = {"steps": 2, "batch_size": 8, "head_steps": 0, "context_steps": 100, "turns": False}
    settings = preset("default", **short, patch_scale=4, grid="16")
    found = []
    for index, name in enumerate(TEXTURES):
        rng = np.random.default_rng([7, index])
        learnt, held_out, fresh = (tiles(name, n, rng) for n in (LEARNT, HELD_OUT, FRESH))
        normal = NormalImages(learnt, len(learnt), list(held_out), name)
        folder: Path = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(context_head, "_ROUNDS", 1)
            result = train_loaded(normal, settings, output=folder, show_progress=False)
        found.append((result.detector, fresh))
    return found


def flagged(detector: Detector, images: torch.Tensor, rate: float) -> float:
    at_rate = Detector(detector.model, detector.calibration, false_positive_rate=rate)
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    return float(np.mean([at_rate.detect(image).anomalous for image in pixels]))


def test_fresh_normal_images_are_flagged_at_the_chosen_rate(trained) -> None:
    rates = [flagged(detector, fresh, RATE) for detector, fresh in trained]
    # With n held out, the (k + 1)th highest of them is exceeded by (k + 1) / (n + 1) of all good
    # images on average; the share of FRESH ones has this deviation around it.
    expected = (int(RATE * HELD_OUT) + 1) / (HELD_OUT + 1)
    deviation = (expected * (1 - expected) * (1 / (HELD_OUT + 2) + 1 / FRESH)) ** 0.5
    assert all(abs(rate - expected) < 3 * deviation for rate in rates), rates
    assert abs(np.mean(rates) - expected) < 3 * deviation / len(rates) ** 0.5, rates
