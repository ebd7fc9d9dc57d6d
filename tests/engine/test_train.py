import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glance_ext.data.datasets import split_held_out
from glance_ext.engine import distill as distill_module
from glance_ext.engine import joint as joint_module
from glance_ext.engine import train as module
from glance_ext.engine.checkpoint import load_checkpoint, prefixed
from glance_ext.engine.detector import MODEL_FILE, MODEL_KIND, Detector
from glance_ext.engine.distill import load_local_net
from glance_ext.engine.settings import TrainSettings
from glance_ext.engine.train import STATE_FILE, TrainResult, train
from glance_ext.errors import (
    CheckpointError,
    GlanceError,
    InputError,
    Interrupted,
    NoUsableInputError,
    OutputError,
)
from glance_ext.models.glance import Glance

SETTINGS = TrainSettings(steps=5, batch_size=3, grid="33", turns=False)
FINE_TUNE = replace(SETTINGS, steps=2, fine_tune_steps=5, fine_tune_batch_size=4)


def fit(
    paths: list[Path], output: Path, net: Path, settings: TrainSettings = SETTINGS, **options: Any
) -> TrainResult:
    return train(paths, settings, output=output, local_net=net, show_progress=False, **options)


def content(output: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_checkpoint(output / MODEL_FILE, MODEL_KIND)


def same(a: Path, b: Path) -> bool:
    (one, first), (two, second) = content(a), content(b)
    return first == second and all(torch.equal(one[k], two[k]) for k in one | two)


@pytest.fixture(scope="module")
def trained(
    pictures: list[Path], local_net_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("trained")
    fit(pictures, output, local_net_file)
    return output


# ---------------------------------------------------------------- a whole run


def test_a_run_leaves_a_model_and_no_state(trained: Path, pictures: list[Path]) -> None:
    assert {p.name for p in trained.iterdir()} == {MODEL_FILE}
    detector = Detector.load(trained)
    assert detector.calibration.grid == "33"
    assert len(detector.calibration.held_out_scores) == 1  # one in five of six
    assert not detector.calibration.optimistic
    assert detector.settings["steps"] == 5
    assert detector.settings["teacher"]["name"] == "tiny"
    assert detector.detect(pictures[0]).map.shape == (64, 64)


@pytest.mark.parametrize("refit", [False, True])
def test_the_threshold_is_the_score_of_the_image_that_was_kept_from_training(
    tmp_path: Path, pictures: list[Path], local_net_file: Path, refit: bool
) -> None:
    """And stays that, where the memory then comes to know this image, whose score falls."""
    settings = replace(SETTINGS, refit=refit)
    detector = fit(pictures, tmp_path, local_net_file, settings).detector
    _, (held_out,) = split_held_out(pictures, settings.held_out_share, settings.seed)
    score = detector.detect(held_out).score
    if refit:
        assert score < detector.threshold - 0.1
    else:
        assert score == pytest.approx(detector.threshold, abs=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_seed_gives_the_same_model_and_another_another(
    trained: Path, pictures: list[Path], local_net_file: Path, tmp_path: Path, seed: int
) -> None:
    torch.manual_seed(99)
    fit(pictures, tmp_path, local_net_file, replace(SETTINGS, seed=seed))
    assert same(trained, tmp_path) == (seed == 0)


def test_the_order_of_the_paths_does_not_matter(
    trained: Path, pictures: list[Path], local_net_file: Path, tmp_path: Path
) -> None:
    fit(pictures[::-1], tmp_path, local_net_file)
    assert same(trained, tmp_path)


# ---------------------------------------------------------------- interruption


@pytest.mark.parametrize("call", [1, 3, 5])
def test_an_interrupted_run_ends_with_the_same_bits(
    trained: Path,
    pictures: list[Path],
    local_net_file: Path,
    tmp_path: Path,
    interrupt_at: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    call: int,
) -> None:
    interrupt_at(joint_module, "distortion_loss", call)
    with pytest.raises(Interrupted, match=f"step {call} of 5 of stage 'joint'.*{STATE_FILE}"):
        fit(pictures, tmp_path, local_net_file)
    assert {p.name for p in tmp_path.iterdir()} == {STATE_FILE}
    monkeypatch.undo()
    fit(pictures, tmp_path, local_net_file, resume=True)
    assert same(trained, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {MODEL_FILE}


@pytest.mark.usefixtures("with_teacher")
@pytest.mark.parametrize(
    ("where", "name", "call"),
    [
        (distill_module, "distillation_losses", 2),
        (distill_module, "distillation_losses", 5),
        (joint_module, "distortion_loss", 1),
    ],
)
def test_a_run_with_fine_tuning_resumes_in_either_stage(
    pictures: list[Path],
    local_net_file: Path,
    tmp_path: Path,
    interrupt_at: Callable[..., None],
    where: object,
    name: str,
    call: int,
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = fit(pictures, whole, local_net_file, FINE_TUNE)
    assert list(result.history) == [
        *(f"finetune/{loss}" for loss in ("loss", "knowledge", "compactness")),
        *(f"joint/{loss}" for loss in ("loss", "inconsistency", "distortion")),
    ]
    interrupt_at(where, name, call)
    with pytest.raises(Interrupted):
        fit(pictures, parts, local_net_file, FINE_TUNE)
    again = fit(pictures, parts, local_net_file, FINE_TUNE, resume=True)
    assert same(whole, parts)
    assert again.history == result.history


@pytest.mark.usefixtures("with_teacher")
def test_fine_tuning_changes_local_net_and_not_the_decoder(
    pictures: list[Path], local_net_file: Path, tmp_path: Path
) -> None:
    fit(pictures, tmp_path, local_net_file, FINE_TUNE)
    before = load_local_net(local_net_file)
    after = Detector.load(tmp_path).model.local_net
    changed = [
        not torch.equal(a, b)
        for a, b in zip(before.local_net.parameters(), after.parameters(), strict=True)
    ]
    assert all(changed)


def test_resuming_with_anything_else_is_refused_by_name(
    pictures: list[Path],
    local_net_file: Path,
    tmp_path: Path,
    interrupt_at: Callable[..., None],
) -> None:
    paths = [Path(shutil.copy(path, tmp_path)) for path in pictures]
    output = tmp_path / "out"
    interrupt_at(joint_module, "distortion_loss", 2)
    with pytest.raises(Interrupted):
        fit(paths, output, local_net_file)
    state = (output / STATE_FILE).read_bytes()
    with pytest.raises(GlanceError, match=r"holds the state of an interrupted run.*--resume"):
        fit(paths, output, local_net_file)
    for change in (
        {"batch_size": 4},
        {"holes_per_image": 2},
        {"positions": "8"},
        {"lambda_t": 0.5},
        {"seed": 8},
        {"grid": "8"},
    ):
        settings = replace(SETTINGS, **change)
        with pytest.raises(CheckpointError, match=f"cannot resume: .*{next(iter(change))}|images"):
            fit(paths, output, local_net_file, settings, resume=True)
    shutil.copy(paths[0], paths[1])
    with pytest.raises(CheckpointError, match=r"cannot resume: .*images = '5 \(sha256"):
        fit(paths, output, local_net_file, resume=True)
    assert (output / STATE_FILE).read_bytes() == state


# ---------------------------------------------------------------- images that fail, or are few


def test_bad_images_are_reported_and_the_others_trained_on(
    pictures: list[Path], local_net_file: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "a bad one.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\n")
    errors: list[InputError] = []
    result = fit([*pictures, bad], tmp_path / "out", local_net_file, on_error=errors.append)
    assert [error.path for error in errors] == [str(bad)]
    assert result.failed == tuple(errors)
    assert result.images + result.held_out == 6


@pytest.mark.parametrize("good", [0, 1])
def test_of_two_images_either_may_fail(
    pictures: list[Path], local_net_file: Path, tmp_path: Path, good: int
) -> None:
    paths = [tmp_path / "0.png", tmp_path / "1.png"]
    shutil.copy(pictures[0], paths[good])
    paths[1 - good].write_text("no image")
    result = fit(paths, tmp_path / "out", local_net_file)
    assert (result.images, result.held_out, len(result.failed)) == (1, 0, 1)
    assert result.detector.calibration.optimistic


def test_one_image_is_trained_and_calibrated_on(
    pictures: list[Path], local_net_file: Path, tmp_path: Path
) -> None:
    result = fit(pictures[:1], tmp_path, local_net_file)
    assert (result.images, result.held_out) == (1, 0)
    assert Detector.load(tmp_path).calibration.optimistic


def test_no_usable_image_is_an_error_of_its_own(local_net_file: Path, tmp_path: Path) -> None:
    bad = [tmp_path / f"{i}.png" for i in range(3)]
    for path in bad:
        path.write_text("no image")
    errors: list[InputError] = []
    with pytest.raises(NoUsableInputError, match="at least one usable normal image, got 0 of 3"):
        fit(bad, tmp_path / "out", local_net_file, on_error=errors.append)
    assert sorted(error.path for error in errors) == [str(path) for path in bad]
    with pytest.raises(GlanceError, match="at least one normal image, got none"):
        fit([], tmp_path / "out", local_net_file)


def test_a_finished_model_is_not_overwritten(
    trained: Path, pictures: list[Path], local_net_file: Path
) -> None:
    before = (trained / MODEL_FILE).read_bytes()
    for resume in (False, True):
        with pytest.raises(GlanceError, match="already holds a finished model"):
            fit(pictures, trained, local_net_file, resume=resume)
    assert (trained / MODEL_FILE).read_bytes() == before


def test_an_output_that_cannot_be_written_is_found_before_training(
    pictures: list[Path],
    local_net_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(module, "joint_stage", lambda *_: pytest.fail("trained in vain"))
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="cannot write to this folder"):
            fit(pictures, output, local_net_file)


def test_a_local_net_that_is_none_is_refused(
    trained: Path, pictures: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="kind 'local_net', got 'model'"):
        fit(pictures, tmp_path, trained / MODEL_FILE)
    with pytest.raises(CheckpointError, match="no such file"):
        fit(pictures, tmp_path, tmp_path / "none")


def test_local_net_stays_as_it_is_and_the_others_learn(trained: Path, local_net_file: Path) -> None:
    tensors, _ = content(trained)
    before = prefixed(load_local_net(local_net_file).local_net, "model.local_net")
    assert all(torch.equal(tensors[name], value) for name, value in before.items())
    torch.manual_seed(SETTINGS.seed)
    fresh = Glance(load_local_net(local_net_file).local_net)
    for name, value in prefixed(fresh, "model").items():
        if "local_net" not in name:
            assert not torch.equal(tensors[name], value), name
