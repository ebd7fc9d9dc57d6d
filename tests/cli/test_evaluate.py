import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glance_ext.data.datasets import test_samples as list_samples
from glance_ext.engine.detector import Detector
from glance_ext.engine.evaluate import METRIC_NAMES, evaluate, paper_row, score_samples
from tests.cli.conftest import Run, write_image, write_mask


def last(text: str) -> str:
    return text.strip().splitlines()[-1]


def test_figures_are_printed_and_written(
    run: Run, model: Path, dataset: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    result = run("evaluate", model, dataset, "-o", output, "--json", tmp_path / "e.json")
    assert result.exit_code == 0, result.output
    detector = Detector.load(model)
    expected = evaluate(score_samples(detector, list_samples(dataset)[0], pytest.fail))
    content = json.loads((tmp_path / "e.json").read_text())
    assert set(content) == {"metadata", "metrics", "per_defect"}
    assert tuple(content["metrics"]) == METRIC_NAMES
    assert content["metrics"] == expected.metrics
    assert content["per_defect"] == expected.per_defect
    assert content["metadata"]["dataset"] == "screw"
    assert content["metadata"]["images"] == 6
    assert content["metadata"]["failed"] == []
    for name, value in expected.metrics.items():
        line = next(x for x in result.stdout.splitlines() if x.startswith(name))
        assert line.endswith(f"{value:.4f}")
    assert any(line.startswith("cut ") for line in result.stdout.splitlines())
    for name in ("curves.png", "cases.png"):
        with Image.open(output / name) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert min(pixels.shape[:2]) > 200
        assert pixels.std() > 10  # not an empty sheet


def test_the_papers_row_stands_beside(run: Run, model: Path, dataset: Path, tmp_path: Path) -> None:
    result = run("evaluate", model, dataset, "--paper", "--json", tmp_path / "e.json")
    assert result.exit_code == 0
    content = json.loads((tmp_path / "e.json").read_text())
    assert content["paper"] == paper_row("screw")
    line = next(x for x in result.stdout.splitlines() if x.startswith("glance-ext, measured here"))
    assert line.endswith(f"{content['metrics']['pixel_AUPRO']:.4f}")
    line = next(x for x in result.stdout.splitlines() if x.startswith("Glance, the paper's figure"))
    assert line.endswith(f"{paper_row('screw')['Glance']:.3f}")


def test_a_linked_data_set_has_the_name_of_the_link(
    run: Run, model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metal_nut").symlink_to(dataset)
    monkeypatch.chdir(tmp_path / "metal_nut")
    shutil.copytree(dataset, tmp_path / "cookies")
    assert run("evaluate", model, tmp_path / "metal_nut", "--paper").exit_code == 0
    result = run("evaluate", model, tmp_path / "cookies", "--paper")
    assert result.exit_code == 2
    assert "MVTec AD's categories" in last(result.stderr)
    assert "got 'cookies'" in last(result.stderr)


def test_bad_samples_are_named_and_counted(
    run: Run, model: Path, dataset: Path, tmp_path: Path
) -> None:
    root = tmp_path / "set"
    shutil.copytree(dataset, root)
    (root / "test" / "good" / "0.png").write_text("no image")
    write_mask(root / "ground_truth" / "cut" / "0_mask.png", (32, 32))
    (root / "ground_truth" / "cut" / "1_mask.png").unlink()
    write_image(root / "test" / "loose.png", 1)
    result = run("evaluate", model, root, "--json", tmp_path / "e.json")
    assert result.exit_code == 1
    for name, reason in (
        ("test/good/0.png", "begins with"),
        ("ground_truth/cut/0_mask.png", "expected a mask of 64x64 pixels (HxW), found 32x32"),
        ("test/cut/1.png", "expected its mask at"),
        ("test/loose.png", "found no defect folder"),
    ):
        lines = [x for x in result.stderr.splitlines() if f"{root / name}: " in x]
        assert len(lines) == 1, name
        assert reason in lines[0]
    assert last(result.stderr) == "glance-ext: 4 files could not be used (named above)"
    content = json.loads((tmp_path / "e.json").read_text())
    assert len(content["metadata"]["failed"]) == 4
    assert content["metadata"]["images"] == 3
    assert content["per_defect"]["cut"]["images"] == 1


def test_only_good_images_give_no_figures_but_no_error(
    run: Run, model: Path, dataset: Path, tmp_path: Path
) -> None:
    root, output = tmp_path / "set", tmp_path / "out"
    shutil.copytree(dataset / "test" / "good", root / "test" / "good")
    result = run("evaluate", model, root, "-o", output, "--json", tmp_path / "e.json")
    assert result.exit_code == 0
    assert "note: some metrics need both good and anomalous images" in result.stderr
    assert "note: there is no curve to draw" in result.stderr
    assert result.stdout.count("n/a") == len(METRIC_NAMES)
    content = json.loads((tmp_path / "e.json").read_text())
    assert content["metrics"] == dict.fromkeys(METRIC_NAMES)
    assert [p.name for p in output.iterdir()] == ["cases.png"]


@pytest.mark.parametrize("whole", [False, True])
def test_only_anomalous_images_give_the_pixel_figures(
    run: Run, model: Path, dataset: Path, tmp_path: Path, whole: bool
) -> None:
    root, output = tmp_path / "set", tmp_path / "out"
    shutil.copytree(dataset / "test" / "cut", root / "test" / "cut")
    shutil.copytree(dataset / "ground_truth", root / "ground_truth")
    if whole:  # the defects fill their images
        for path in (root / "ground_truth").rglob("*.png"):
            Image.new("L", (64, 64), 255).save(path)
    result = run("evaluate", model, root, "-o", output, "--json", tmp_path / "e.json")
    assert result.exit_code == 0
    metrics = json.loads((tmp_path / "e.json").read_text())["metrics"]
    assert metrics["image_AUROC"] is None
    assert (metrics["pixel_AUROC"] is None) == whole
    assert (output / "cases.png").exists()
    assert (output / "curves.png").exists() == (not whole)


def test_test_folders_without_samples_are_a_wrong_call(
    run: Run, model: Path, tmp_path: Path
) -> None:
    for folder in ("none", "empty"):
        (tmp_path / folder).mkdir()
    (tmp_path / "empty" / "test" / "good").mkdir(parents=True)
    for folder in ("none", "empty", "missing"):
        result = run("evaluate", model, tmp_path / folder)
        assert result.exit_code == 2
        assert "expected test images in DATASET/test" in last(result.stderr)


def test_samples_of_which_none_can_be_used_are_counted(
    run: Run, model: Path, dataset: Path, tmp_path: Path
) -> None:
    root = tmp_path / "set"
    shutil.copytree(dataset / "test" / "cut", root / "test" / "cut")  # without their masks
    result = run("evaluate", model, root)
    assert result.exit_code == 1
    assert "3 files could not be used" in result.stderr
    assert last(result.stderr).endswith("at least one usable test image, got none")


def test_a_model_that_cannot_be_used_is_one_line(run: Run, dataset: Path, tmp_path: Path) -> None:
    result = run("evaluate", tmp_path / "none", dataset)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "no such file" in result.stderr


def test_an_output_that_cannot_be_written_still_shows_the_figures(
    run: Run, model: Path, dataset: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("precious")
    for option, value in (("-o", "file"), ("--json", "file/e.json")):
        result = run("evaluate", model, dataset, option, tmp_path / value)
        assert result.exit_code == 1
        assert "image_AUROC" in result.stdout
        assert "cannot write the file" in last(result.stderr)
    assert (tmp_path / "file").read_text() == "precious"


def test_how_images_are_scored_can_be_chosen(
    run: Run, model: Path, dataset: Path, tmp_path: Path
) -> None:
    metrics = {}
    for options in (["--batch-size", 1], ["--batch-size", 4], ["--tile"],
                    ["--precision", "float64"]):  # fmt: skip
        result = run("evaluate", model, dataset, *options, "--json", tmp_path / "e.json")
        assert result.exit_code == 0, result.output
        content = json.loads((tmp_path / "e.json").read_text())
        assert content["metadata"]["tile"] == ("--tile" in options)
        assert content["metadata"]["grid"] == "33"
        precision = "float64" if "float64" in options else "float32"
        assert content["metadata"]["precision"] == precision
        metrics[str(options[-1])] = content["metrics"]["pixel_AUROC"]
    assert metrics["4"] == pytest.approx(metrics["1"], abs=1e-4)
    assert metrics["float64"] == pytest.approx(metrics["1"], abs=1e-4)


def test_tiles_change_the_figures_of_large_images(run: Run, model: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    for i in range(2):
        write_image(root / "test" / "good" / f"{i}.png", i, (300, 400))
        write_image(root / "test" / "cut" / f"{i}.png", 9 + i, (300, 400), spot=True)
        write_mask(root / "ground_truth" / "cut" / f"{i}_mask.png", (300, 400))
    found = {}
    for option in ("--tile", "--no-tile"):
        result = run("evaluate", model, root, option, "--json", tmp_path / "e.json")
        assert result.exit_code == 0, result.output
        found[option] = json.loads((tmp_path / "e.json").read_text())["metrics"]["pixel_AUROC"]
    assert found["--tile"] != found["--no-tile"]
