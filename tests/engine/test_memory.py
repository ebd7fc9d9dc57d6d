"""Filling the memory from normal images, and its score from training to detection."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from glance_ext.data.datasets import split_held_out
from glance_ext.data.grid import patch_grid
from glance_ext.data.images import load_image
from glance_ext.engine.checkpoint import load_checkpoint
from glance_ext.engine.detector import MODEL_FILE, Detector
from glance_ext.engine.distill import load_local_net
from glance_ext.engine.memory import fit_memory, load_context_net, packaged_context_net
from glance_ext.engine.settings import TrainSettings, preset
from glance_ext.engine.train import train
from glance_ext.errors import GlanceError
from glance_ext.models.context_net import ContextNet
from glance_ext.models.glance import Glance
from glance_ext.models.local_net import LocalNet
from glance_ext.models.memory import FeatureMemory
from glance_ext.models.normalisation import normalise
from tests.engine import test_detector

RAW = replace(test_detector.RAW, grid="33")


@pytest.fixture(
    scope="module", params=[(4, False), (200, False), (4, True)], ids=["local", "wide", "context"]
)
def filled(request: pytest.FixtureRequest) -> tuple[Glance, list[torch.Tensor]]:
    """Wide features are longer than what two layers of the context net give."""
    torch.manual_seed(0)
    features, context = request.param
    model = Glance(LocalNet(5, features), memory_size=500, memory_context=context)
    if context:
        load_context_net(model.context_net)
    images = [torch.rand(3, 256, 256) for _ in range(3)]
    fit_memory(model, iter(images), count=3, grid="33", seed=0, device=torch.device("cpu"))
    return model, images


def test_patches_that_were_seen_are_not_new(filled: tuple[Glance, list[torch.Tensor]]) -> None:
    model, images = filled
    starts = patch_grid("33").starts
    assert len(model.memory) == 3 * len(starts) ** 2  # fewer than there is room for: all
    plan = model.plan(starts, starts)
    assert float(model.score_grid(torch.stack(images), plan).novelty.max()) < 2e-3
    assert float(model.score_grid(torch.rand(1, 3, 256, 256), plan).novelty.max()) > 0.01


def test_every_path_gives_the_novelty(filled: tuple[Glance, list[torch.Tensor]]) -> None:
    model, _ = filled
    image = torch.rand(1, 3, 256, 256)
    detector = Detector(model, RAW)
    shared = detector.score_patches(image).novelty
    each = model.score_patches(image, detector.grid.origins).novelty
    one = model(image, detector.grid.origins[:1]).novelty
    torch.testing.assert_close(shared, each, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(one, each[:, 0], atol=1e-3, rtol=1e-3)
    low = Detector(model, RAW, precision="bfloat16").score_patches(image).novelty
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, shared, atol=0.05, rtol=0.1)


def test_memory_is_the_same_for_a_seed_and_differs_between_seeds() -> None:
    torch.manual_seed(1)
    net = LocalNet(5, 4)
    images = [torch.rand(3, 256, 256) for _ in range(3)]
    kept = []
    for seed in (0, 0, 1):
        model = Glance(net, memory_size=20)
        fit_memory(model, iter(images), count=3, grid="33", seed=seed, device=torch.device("cpu"))
        kept.append(model.memory.kept)
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])


@pytest.mark.parametrize("of", ["context", "teacher", "local"])
def test_training_fills_it_and_the_detector_keeps_it(
    tmp_path: Path, pictures: list[Path], local_net_file: Path, of: str
) -> None:
    settings = TrainSettings(
        steps=2,
        batch_size=4,
        grid="33",
        memory_size=30,
        memory_share=0.75,
        memory_of=of,
        lambda_s=0.5,
    )
    result = train(
        pictures,
        settings,
        output=tmp_path / "run",
        local_net=local_net_file,
        show_progress=False,
    )
    detector = Detector.load(tmp_path / "run" / MODEL_FILE)
    assert torch.equal(detector.model.memory.kept, result.detector.model.memory.kept)
    assert len(detector.model.memory) == 30
    net = load_local_net(local_net_file)
    if of == "teacher":
        taught = net.decoder.linear.weight * net.teacher_std[:, None]
        torch.testing.assert_close(detector.model.memory.decoder.weight, taught)
        assert detector.model.memory.kept.shape[1] == len(net.teacher_mean)
    elif of == "context":
        packaged, _ = load_checkpoint(packaged_context_net(), "context_net")
        for name, tensor in detector.model.context_net.state_dict().items():
            assert torch.equal(tensor, packaged[f"context_net.{name}"])
        assert detector.model.memory.kept.shape[1] == sum(ContextNet.LAYERS[:2])
    else:
        assert detector.model.context_net is None
        assert detector.model.memory.decoder is None
        assert detector.model.memory.kept.shape[1] == net.local_net.features
    assert float(detector.model.memory.kept.norm(dim=1).min()) == pytest.approx(1, abs=1e-5)
    calibration = detector.calibration
    assert calibration.memory_share == 0.75
    image = np.random.default_rng(0).random((256, 256, 3), dtype=np.float32)
    scores = detector.score_patches(detector.prepare(image)[None])
    novel = calibration.novelty(scores.novelty)
    without = replace(calibration, novelty=None).mix(scores)
    torch.testing.assert_close(calibration.mix(scores), 0.75 * novel + 0.25 * without)
    assert not torch.allclose(calibration.mix(scores), without)


@pytest.mark.parametrize("tile", [False, True])
def test_held_out_images_are_kept_too_once_it_is_calibrated(
    tmp_path: Path, pictures: list[Path], local_net_file: Path, tile: bool
) -> None:
    settings = TrainSettings(
        steps=1,
        batch_size=4,
        grid="33",
        positions="33",
        turns=False,
        tile=tile,
        memory_size=1000,
        held_out_share=0.34,
    )
    both = {}
    for everything in (True, False):
        result = train(
            pictures,
            replace(settings, refit=everything),
            output=tmp_path / f"{tile}-{everything}",
            local_net=local_net_file,
            show_progress=False,
        )
        both[everything] = result.detector
    assert result.held_out == 2
    assert both[True].calibration == both[False].calibration  # by images new to the memory
    _, held_out = split_held_out(pictures, 0.34, settings.seed)
    novelty = {
        everything: [
            float(detector.score_patches(detector.prepare(load_image(path))[None]).novelty.max())
            for path in held_out
        ]
        for everything, detector in both.items()
    }
    assert max(novelty[True]) < 0.01 < min(novelty[False])


def test_a_memory_that_was_not_full_takes_more_the_next_time() -> None:
    memory = FeatureMemory(5, 3)
    generator = torch.Generator().manual_seed(0)
    for count, expected in ((2, 2), (9, 5), (4, 4)):
        memory.fit(torch.rand(count, 3), generator)
        assert len(memory) == expected


@pytest.mark.parametrize("patch_scale", [1, 6])
def test_context_is_that_of_the_view_that_local_net_has(patch_scale: int) -> None:
    net = LocalNet(5, 4)
    model = Glance(net, patch_scale=patch_scale, memory_size=3, memory_context=True)
    load_context_net(model.context_net)
    image, origins = torch.rand(1, 3, 256, 256), torch.tensor([[0, 0], [9, 4]])
    view = normalise(F.avg_pool2d(image, patch_scale))
    expected = model.context_net.patch_features(view, origins)
    torch.testing.assert_close(
        model.context_features(image, origins), expected, atol=1e-4, rtol=1e-4
    )


def test_a_turned_image_is_as_known_as_the_image(
    tmp_path: Path, pictures: list[Path], local_net_file: Path
) -> None:
    """Their own waves are longer down than across: turned, they are new to a memory of them."""
    found = {}
    for turns in (True, False):
        settings = TrainSettings(steps=1, batch_size=4, grid="33", turns=turns, positions="33")
        detector = train(
            pictures,
            settings,
            output=tmp_path / str(turns),
            local_net=local_net_file,
            show_progress=False,
        ).detector
        image = detector.prepare(load_image(pictures[0]))
        found[turns] = [
            float(detector.score_patches(view[None]).novelty.mean())
            for view in (image, image.rot90(1, (1, 2)))
        ]
    straight, turned = found[True]
    assert turned < 1.2 * straight
    straight, turned = found[False]
    assert turned > 1.5 * straight


def test_a_raw_mix_takes_no_memory() -> None:
    with pytest.raises(GlanceError, match="memory size: expected 0 with a raw mix"):
        preset("paper", memory_size=100)
