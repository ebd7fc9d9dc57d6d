"""The distortion head in context: what it is shown, what it learns, and its share of a score."""

import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glance_ext.data.grid import patch_grid
from glance_ext.engine import context_head as module
from glance_ext.engine import train as training
from glance_ext.engine.context_head import context_stage
from glance_ext.engine.detector import MODEL_FILE, Detector
from glance_ext.engine.distill import load_local_net
from glance_ext.engine.loop import Trainer
from glance_ext.engine.memory import load_context_net
from glance_ext.engine.settings import TrainSettings, preset
from glance_ext.engine.train import train
from glance_ext.errors import GlanceError, Interrupted
from glance_ext.models.glance import Glance
from glance_ext.models.normalisation import normalise

CPU = torch.device("cpu")
SETTINGS = TrainSettings(
    steps=1, batch_size=4, positions="33", grid="16", turns=False, memory_size=20, context_steps=60
)


@pytest.fixture(autouse=True)
def few_distorted_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as one round over a few images makes."""
    monkeypatch.setattr(module, "_ROUNDS", 1)


@pytest.fixture
def model(local_net_file: Path) -> Glance:
    torch.manual_seed(0)
    net = load_local_net(local_net_file).local_net
    model = Glance(net, memory_size=20, memory_context=True, context_head=True)
    load_context_net(model.context_net)
    return model


@pytest.mark.parametrize(("pieces", "grain"), [(0, False), (3, False), (3, True)])
def test_it_is_shown_distortions_in_their_image_and_what_none_touches(
    model: Glance, images: Tensor, monkeypatch: pytest.MonkeyPatch, pieces: int, grain: bool
) -> None:
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {"stain_images": [], "paste_pieces": []}

    def spy(name: str) -> None:
        real = getattr(module, name)

        def spied(views: Tensor, *args: object) -> Tensor:
            seen[name].append((views, real(views, *args)))
            return seen[name][-1][1]

        monkeypatch.setattr(module, name, spied)

    for name in seen:
        spy(name)
    monkeypatch.setattr(module, "CONTEXT_IMAGES", 2)
    monkeypatch.setattr(module, "_CHANGED", 5)  # of two images, each twice
    monkeypatch.setattr(module, "_ROUNDS", 3)
    monkeypatch.setattr(module, "_DISTORTED", 10_000)
    monkeypatch.setattr(module, "_CLEAN", 10_000)
    monkeypatch.setattr(module, "vary_grain", lambda views, _: views * 0.9)
    shown = images[:2].float() * 0.9 if grain else images[:2].float()
    settings = replace(SETTINGS, pieces=pieces, grain=grain)
    distorted, clean = module._features(model, images, settings, CPU)
    assert {name: len(calls) for name, calls in seen.items()} == {
        "stain_images": 2,
        "paste_pieces": 2 if pieces else 0,
    }
    origins = patch_grid("16").origins
    expected: dict[str, list[Tensor]] = {"distorted": [], "clean": []}

    def describe(view: Tensor) -> Tensor:
        return model.context_net.patch_features(normalise(view[None]), origins)[0]

    expected["clean"].extend(row for view in shown for row in describe(view))
    for name, share in (("stain_images", 0.3), ("paste_pieces", 0.6)):
        for views, changed in seen[name]:
            assert torch.equal(views, shown)
            for view, other in zip(views, changed, strict=True):
                mask = (other - view).abs().amax(0) > 0.02
                if name == "paste_pieces":
                    around = F.pad((other - view).abs().amax(0), (2, 2, 2, 2))
                    mask = around.unfold(0, 5, 1).unfold(1, 5, 1).mean((-1, -2)) > 0.06
                for (row, column), feature in zip(origins.tolist(), describe(other), strict=True):
                    middle = mask[row + 12 : row + 21, column + 12 : column + 21].float().mean()
                    if middle >= share:
                        expected["distorted"].append(feature)
                    elif not mask[row : row + 33, column : column + 33].any():
                        expected["clean"].append(feature)
    for got, of in ((distorted, expected["distorted"]), (clean, expected["clean"])):
        assert len(got) == len(of)
        between = torch.cdist(got.double(), torch.stack(of).double())
        for axis in (0, 1):  # the same ones, in any order
            assert between.amin(axis).max() < 1e-3


def test_it_learns_without_a_part_of_its_channels(
    model: Glance, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = torch.rand(40, 448) + 1, torch.rand(50, 448) + 3
    monkeypatch.setattr(module, "_features", lambda *_: features)
    seen: list[Tensor] = []
    monkeypatch.setattr(
        model.context_head,
        "forward",
        lambda x: seen.append(x) or model.context_head.hidden(x)[:, 0],
    )
    context_stage(model, images, SETTINGS, CPU).step(torch.Generator().manual_seed(0))
    (x,) = seen
    missing = x == model.context_head.mean
    assert abs(float(missing.float().mean()) - 0.3) < 0.01
    assert (missing.float().mean(0) < 0.45).all()
    assert (missing.float().mean(1) < 0.45).all()
    assert (x[:256][~missing[:256]] < 2).all()
    assert (x[256:][~missing[256:]] > 3).all()


def test_the_head_learns_and_nothing_else_does(
    model: Glance, images: Tensor, tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = Trainer(tmp_path / "state", {}, show_progress=False)
    trainer.run(context_stage(model, images, SETTINGS, CPU))
    losses = [value for _, value in trainer.history["context/loss"]]
    assert losses[-1] < 0.5 * losses[0]
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    names = ("hidden.weight", "hidden.bias", "output.weight", "output.bias", "mean", "spread")
    assert changed == {f"context_head.{name}" for name in names}


@pytest.mark.parametrize("call", [30, 90, None])
def test_an_interrupted_run_ends_with_the_same_bits(
    tmp_path: Path,
    pictures: list[Path],
    local_net_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: int | None,
) -> None:
    """In its own stage, in that in which it learns anew from held-out images too, and behind."""

    def run(name: str, resume: bool = False) -> dict[str, Tensor]:
        return train(
            pictures,
            SETTINGS,
            output=tmp_path / name,
            local_net=local_net_file,
            resume=resume,
            show_progress=False,
        ).detector.model.state_dict()

    whole = run("whole")
    real, calls = module.distortion_loss, []

    def interrupted(*args: Tensor) -> Tensor:
        calls.append(args)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)  # training stops behind this step
        return real(*args)

    def never(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "distortion_loss", interrupted)
        if call is None:
            patched.setattr(training, "calibrate", never)
        with pytest.raises((Interrupted, KeyboardInterrupt)):
            run("parts")
    assert len(calls) == (call or 120)
    for name, value in run("parts", resume=True).items():
        assert torch.equal(value, whole[name]), name


def test_it_learns_anew_from_held_out_images_too_and_is_calibrated_without(
    tmp_path: Path, pictures: list[Path], local_net_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, counts = module._features, []

    def spied(model: Glance, images: Tensor, *args: object) -> tuple[Tensor, Tensor]:
        counts.append(len(images))
        return real(model, images, *args)

    monkeypatch.setattr(module, "_features", spied)
    both = {}
    for refit in (False, True):
        both[refit] = train(
            pictures,
            replace(SETTINGS, refit=refit),
            output=tmp_path / str(refit),
            local_net=local_net_file,
            show_progress=False,
        ).detector
    assert counts == [5, 5, 6]  # one in five of six is held out
    assert both[True].calibration == both[False].calibration
    found = Detector.load(tmp_path / "True").model.context_head.state_dict()
    kept = Detector.load(tmp_path / "False").model.context_head.state_dict()
    assert not torch.equal(found["mean"], kept["mean"])
    assert not torch.equal(found["hidden.weight"], kept["hidden.weight"])


def test_its_share_of_a_score_is_calibrated_and_kept(
    tmp_path: Path, pictures: list[Path], local_net_file: Path
) -> None:
    settings = replace(SETTINGS, context_share=0.75, memory_share=0)
    train(
        pictures,
        settings,
        output=tmp_path,
        local_net=local_net_file,
        show_progress=False,
    )
    detector = Detector.load(tmp_path / MODEL_FILE)
    calibration = detector.calibration
    image = np.random.default_rng(0).random((256, 256, 3), dtype=np.float32)
    scores = detector.score_patches(detector.prepare(image)[None])
    expected = 0.75 * calibration.context_log_odds(scores.context_log_odds)
    expected = expected + 0.25 * calibration.log_odds(scores.log_odds)
    torch.testing.assert_close(calibration.mix(scores), expected)
    without = replace(calibration, context_log_odds=None)
    torch.testing.assert_close(without.mix(scores), calibration.log_odds(scores.log_odds))


def test_without_any_stain_in_a_patch_the_error_says_so(
    model: Glance, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("stain_images", "paste_pieces"):
        monkeypatch.setattr(module, name, lambda views, *_: views)
    with pytest.raises(GlanceError, match="expected a stain in the middle of a patch of 6 images"):
        module._features(model, images, SETTINGS, CPU)


@pytest.mark.parametrize(
    "changes", [{"memory_of": "teacher"}, {"memory_size": 0}, {"distortion": "turn"}]
)
def test_a_preset_goes_without_it_where_it_has_nothing_to_learn(changes: dict[str, object]) -> None:
    assert preset("default").context_steps > 0
    assert preset("default", **changes).context_steps == 0
    with pytest.raises(GlanceError, match="context steps: expected 0 without a memory of context"):
        preset("default", context_steps=5, **changes)
