import csv
import errno
import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image

from glance_ext import files
from glance_ext.engine.checkpoint import FORMAT_VERSION
from glance_ext.engine.detector import Detector
from glance_ext.engine.precision import PRECISIONS
from tests.cli.conftest import Run, write_image

COLUMNS = ["path", "score", "threshold", "anomalous", "error"]


def rows(output: Path) -> list[dict[str, str]]:
    with (output / "scores.csv").open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        found = list(reader)
    assert reader.fieldnames == COLUMNS
    return found


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob(".*")]


def one_line(result: Result, exit_code: int) -> str:
    """The only line that a call which failed at once printed."""
    assert result.exit_code == exit_code, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("glance-ext: ")
    assert result.stdout == ""
    return lines[0]


# ---------------------------------------------------------------- results


def test_each_image_gets_a_map_a_heatmap_and_a_line(run: Run, model: Path, tmp_path: Path) -> None:
    images, output = tmp_path / "images", tmp_path / "out"
    sizes = {"a.png": (64, 64), "sub/b.png": (40, 90), "sub/deep/c.jpg": (70, 33)}
    for i, (name, size) in enumerate(sizes.items()):
        write_image(images / name, i, size)
    result = run("detect", model, images, "-o", output, "--json", tmp_path / "r.json")
    assert result.exit_code == 0
    assert f"results: {output}" in result.stdout
    detector = Detector.load(model)
    found = rows(output)
    assert [row["path"] for row in found] == [str(images / name) for name in sizes]
    for row, (name, size) in zip(found, sizes.items(), strict=True):
        expected = detector.detect(images / name)
        assert float(row["score"]) == expected.score
        assert float(row["threshold"]) == detector.threshold
        assert row["anomalous"] == str(int(expected.score > detector.threshold))
        assert row["error"] == ""
        stem = name.rpartition(".")[0]
        scores = np.load(output / "maps" / f"{stem}.npy")
        assert scores.dtype == np.float32
        assert scores.shape == size
        np.testing.assert_array_equal(scores, expected.map)
        with Image.open(output / "heatmaps" / f"{stem}.png") as heatmap:
            assert heatmap.size == size[::-1]
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["threshold"] == detector.threshold
    assert content["metadata"]["grid"] == "33"
    assert [r["score"] for r in content["results"]] == [float(row["score"]) for row in found]
    assert {p.suffix for p in output.rglob("*") if p.is_file()} == {".npy", ".png", ".csv"}
    assert not leftovers(output)


def test_a_defect_raises_the_score_in_its_place(run: Run, model: Path, tmp_path: Path) -> None:
    # even an almost untrained model looks up at a patch that its neighbours do not foretell
    write_image(tmp_path / "in" / "plain.png", 3)
    write_image(tmp_path / "in" / "spot.png", 3, spot=True)
    assert run("detect", model, tmp_path / "in", "-o", tmp_path / "out").exit_code == 0
    plain, spot = (np.load(tmp_path / "out" / "maps" / f"{n}.npy") for n in ("plain", "spot"))
    change = np.abs(spot - plain)
    assert change[6:30, 26:54].mean() > 2 * change[40:, :20].mean()


def test_threshold_and_grid_can_be_named(run: Run, model: Path, good: Path, tmp_path: Path) -> None:
    for threshold, anomalous in ((-1e9, "1"), (1e9, "0"), (1e30, "0")):
        result = run("detect", model, good / "0.png", "-o", tmp_path, "--threshold", threshold)
        assert result.exit_code == 0
        assert [row["anomalous"] for row in rows(tmp_path)] == [anomalous]
    result = run("detect", model, good / "0.png", "-o", tmp_path, "--grid", 32)
    assert "note: the threshold was calibrated with --grid 33, not 32" in result.stderr
    result = run("detect", model, good / "0.png", "-o", tmp_path, "--grid", 33)
    assert "calibrated with" not in result.stderr


def test_a_grid_with_patches_that_training_never_saw_is_noted(
    run: Run, good: Path, short: list[object], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    trained = run("train", "--normal", good, "-o", model, *short, "--grid", 16, "--positions", 16)
    assert trained.exit_code == 0, trained.output
    call = ("detect", model, good / "0.png", "-o", tmp_path / "out", "--grid")
    expected = "note: the model was trained on patches at --positions 16, of which --grid 30 has"
    assert expected in run(*call, 30).stderr
    assert "--positions" not in run(*call, 32).stderr


def test_the_heatmaps_of_an_earlier_call_are_no_images(
    run: Run, model: Path, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(good / "0.png", tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run("detect", model, ".", "-o", ".").exit_code == 0
        assert [row["path"] for row in rows(tmp_path)] == ["a.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "heatmaps", "maps", "scores.csv"]


def test_a_name_that_is_no_utf8_is_detected_and_listed(
    run: Run, model: Path, good: Path, tmp_path: Path
) -> None:
    name = os.fsdecode(b"caf\xe9 \n.png")
    (tmp_path / "in").mkdir()
    shutil.copy(good / "0.png", tmp_path / "in" / name)
    output = tmp_path / "out"
    result = run("detect", model, tmp_path / "in", "-o", output, "--json", tmp_path / "r.json")
    assert result.exit_code == 0
    assert "caf\\udce9" in rows(output)[0]["path"]
    content = json.loads((tmp_path / "r.json").read_text("utf-8"))
    assert content["results"][0]["path"].endswith(name)
    assert (output / "maps" / (name[:-4] + ".npy")).exists()


# ---------------------------------------------------------------- bad images among good ones


def png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13) + b"IHDR" + header
        + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    )  # fmt: skip


def bad_images(folder: Path) -> dict[str, str]:
    """Writes one bad image of every kind; gives names and what is said of them."""
    whole = write_image(folder / "z whole.png", 1).read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").touch()
    frames = [Image.new("RGB", (9, 9), (i * 99, 0, 0)) for i in range(2)]
    frames[0].save(folder / "animated.png", save_all=True, append_images=frames[1:])
    (folder / "text.png").write_text("no image at all")
    (folder / "absurdly large.png").write_bytes(png_header(1_000_000, 1_000_000))
    (folder / "gif.png").write_bytes(b"GIF89a" + b"\0" * 30)
    (folder / "to itself.png").symlink_to("to itself.png")
    (folder / "to nothing.tif").symlink_to("nothing")
    os.mkfifo(folder / "pipe.bmp")
    return {
        "truncated.png": "broken or truncated",
        "empty.jpg": "empty file",
        "animated.png": "animated",
        "text.png": "begins with",
        "absurdly large.png": "at most 178956970 pixels",
        "gif.png": "a GIF",
        "to itself.png": "symbolic links",
        "to nothing.tif": "no such file",
        "pipe.bmp": "a device, pipe or socket",
    }


def test_bad_images_are_named_counted_and_do_not_stop_the_others(
    run: Run, model: Path, tmp_path: Path
) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    expected = bad_images(folder)
    write_image(folder / "a first.png", 2)
    missing = tmp_path / "missing.png"
    result = run("detect", model, folder, missing, "-o", output, "--json", tmp_path / "r.json")
    assert result.exit_code == 1
    assert f"{len(expected) + 1} files could not be used" in result.stderr.splitlines()[-1]
    assert "of 2 images are anomalous" in result.stdout
    found = {Path(row["path"]).name: row for row in rows(output)}
    assert len(found) == len(expected) + 3
    for name, reason in {**expected, "missing.png": "no such file"}.items():
        assert reason in found[name]["error"], name
        assert found[name]["score"] == found[name]["anomalous"] == ""
        lines = [line for line in result.stderr.splitlines() if f"{name}: " in line]
        assert len(lines) == 1, name
        assert reason in lines[0]
    for name in ("a first.png", "z whole.png"):
        assert found[name]["error"] == ""
        assert found[name]["score"]
    maps = sorted(p.name for p in output.rglob("*.npy"))
    assert maps == ["a first.npy", "z whole.npy"]
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert sum(r["error"] is not None for r in results) == len(expected) + 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_image_that_may_not_be_read_is_named(run: Run, model: Path, tmp_path: Path) -> None:
    secret = write_image(tmp_path / "secret.png", 1)
    secret.chmod(0)
    result = run("detect", model, secret, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "secret.png: cannot be read: Permission denied" in result.stderr


def test_if_every_image_is_bad_the_scores_list_the_errors(
    run: Run, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").touch()
    result = run("detect", model, tmp_path / "in", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "0 of 0 images" in result.stdout
    assert "1 file could not be used" in result.stderr
    assert "empty file" in rows(tmp_path / "out")[0]["error"]


def test_an_image_whose_results_cannot_be_named_does_not_stop_the_others(
    run: Run, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    fits = "f" * 251 + ".png"
    write_image(folder / fits, 1)
    long = "n" * 251 + ".png"
    write_image(folder / long, 2)
    write_image(folder / ("n" * 250 + ".jpeg"), 2)
    # of one stem with another, so that its suffix is kept and .npy comes on top
    shutil.copy(folder / long, folder / ("n" * 251 + ".bmp"))
    result = run("detect", model, folder, "-o", tmp_path / "out")
    assert result.exit_code == 1
    found = {Path(row["path"]).name: row["error"] for row in rows(tmp_path / "out")}
    assert found.pop(long) == found.pop("n" * 251 + ".bmp") != ""
    assert found == {fits: "", "n" * 250 + ".jpeg": ""}


@pytest.mark.parametrize("options", [[], ["--batch-size", 2]])
def test_an_image_too_large_for_memory_does_not_stop_the_others(
    run: Run,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[object],
) -> None:
    write_image(tmp_path / "in" / "a.png", 1, (50, 50))
    write_image(tmp_path / "in" / "b.png", 1, (40, 40))
    real = Detector.detect_batch

    def detect(self: Detector, images: list[np.ndarray]) -> object:
        if any(image.shape[0] == 50 for image in images):
            raise MemoryError
        return real(self, images)

    monkeypatch.setattr(Detector, "detect_batch", detect)
    result = run("detect", model, tmp_path / "in", "-o", tmp_path / "out", *options)
    assert result.exit_code == 1
    assert "fits in memory" in rows(tmp_path / "out")[0]["error"]
    assert rows(tmp_path / "out")[1]["score"]


def test_a_folder_without_images_is_a_wrong_call(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").touch()
    result = run("detect", model, tmp_path / "in", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert f"expected images in {tmp_path / 'in'}, but found none" in result.stderr
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- models


def test_a_model_that_cannot_be_used_is_one_line(
    run: Run, model: Path, good: Path, local_net: Path, tmp_path: Path
) -> None:
    whole = (model / "model.safetensors").read_bytes()
    cut, foreign = tmp_path / "cut.safetensors", tmp_path / "foreign.pth"
    cut.write_bytes(whole[: len(whole) // 2])
    foreign.write_bytes(b"\x80\x02}q\x00.")
    newer = tmp_path / "newer.safetensors"
    version = rf"{{\"format_version\": {FORMAT_VERSION}".encode()
    assert version in whole
    newer.write_bytes(whole.replace(version, rb"{\"format_version\": 9"))
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(whole[:-8] + b"\0\1\2\3\4\5\6\7")
    (tmp_path / "folder").mkdir()
    for path, message in (
        (tmp_path / "missing", "no such file"),
        (tmp_path / "folder", "no such file"),
        (cut, "cut short"),
        (foreign, "of another kind"),
        (newer, "newer"),
        (damaged, "checksum"),
        (local_net, "expected a checkpoint of kind 'model', got 'local_net'"),
    ):
        line = one_line(run("detect", path, good, "-o", tmp_path / "out"), 2)
        assert message in line
        assert str(path) in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--threshold", "nan", "threshold: expected a finite number, got nan"),
        ("--threshold", "inf", "threshold: expected a finite number, got inf"),
        ("--false-positive-rate", "nan", "false_positive_rate"),
        ("--grid", "99", "grid: expected 'paper' or a stride of 1 to 33 pixels, got '99'"),
        ("--grid", "some", "grid: expected"),
    ],
)
def test_options_that_mean_nothing_are_one_line(
    run: Run, model: Path, good: Path, tmp_path: Path, option: str, value: str, message: str
) -> None:
    line = one_line(run("detect", model, good, "-o", tmp_path / "out", option, value), 2)
    assert message in line


# ---------------------------------------------------------------- outputs


def test_an_output_that_is_a_file_is_named(
    run: Run, model: Path, good: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("precious")
    result = run("detect", model, good, "-o", tmp_path / "file")
    assert result.exit_code == 1
    assert f"{tmp_path / 'file'}" in result.stderr.splitlines()[-1]
    assert "cannot write" in result.stderr.splitlines()[-1]
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("after", [0, 1, 3, 10])
def test_a_disk_that_fills_up_leaves_nothing_half_written(
    run: Run,
    model: Path,
    good: Path,
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
    result = run("detect", model, good, "-o", tmp_path)
    assert result.exit_code == 1
    assert "cannot write the file: No space left on device" in result.stderr.splitlines()[-1]
    left = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(left) == after
    for path in left:
        if path.suffix == ".npy":
            assert np.load(path).shape == (64, 64)
    assert not (tmp_path / "scores.csv").exists()


def test_results_that_cannot_be_printed_end_without_a_traceback(
    model: Path, good: Path, tmp_path: Path, process: object
) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        child = process("detect", model, good / "0.png", "-o", tmp_path, stdout=full)  # type: ignore[operator]
        errors = child.communicate(timeout=120)[1]
    assert child.returncode == 1
    assert "No space left on device" in errors
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors
    assert rows(tmp_path)[0]["score"]


# ---------------------------------------------------------------- how images are scored


def test_batches_change_nothing_but_the_speed(run: Run, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    expected = bad_images(folder)
    for i, size in enumerate([(64, 64), (300, 256), (40, 90)]):
        write_image(folder / f"{i}.png", i, size)
    found = {}
    for batch_size in (1, 4):
        output = tmp_path / str(batch_size)
        result = run("detect", model, folder, "-o", output, "--batch-size", batch_size)
        assert result.exit_code == 1
        found[batch_size] = rows(output)
    assert len(found[1]) == len(expected) + 4
    for alone, together in zip(found[1], found[4], strict=True):
        assert together["path"] == alone["path"]
        assert together["error"] == alone["error"]
        if not alone["error"]:
            assert float(together["score"]) == pytest.approx(float(alone["score"]), rel=1e-4)
            name = f"maps/{Path(alone['path']).stem}.npy"
            maps = [np.load(tmp_path / str(size) / name) for size in (1, 4)]
            np.testing.assert_allclose(*maps, rtol=1e-4, atol=1e-4)


def test_the_precision_can_be_chosen(run: Run, model: Path, good: Path, tmp_path: Path) -> None:
    scores = {}
    for precision in PRECISIONS:
        output = tmp_path / precision
        result = run("detect", model, good / "0.png", "-o", output, "--precision", precision,
                     "--device", "cpu", "--json", tmp_path / "r.json")  # fmt: skip
        if precision == "tf32":
            assert result.exit_code == 2
            assert "expected float32 or bfloat16 on a CPU, got tf32" in result.stderr
            continue
        assert result.exit_code == 0
        content = json.loads((tmp_path / "r.json").read_text())
        assert content["metadata"]["precision"] == precision
        scores[precision] = float(rows(output)[0]["score"])
        assert np.load(output / "maps" / "0.npy").dtype == np.float32
    assert scores["float32"] == pytest.approx(scores["float64"], rel=1e-4)
    assert scores["bfloat16"] != scores["float32"]
    assert scores["bfloat16"] == pytest.approx(scores["float64"], rel=0.2)


def test_tiles_keep_a_small_defect_that_resizing_loses_sight_of(
    run: Run, model: Path, tmp_path: Path
) -> None:
    path = write_image(tmp_path / "in" / "a.png", 3, (520, 300), spot=True)
    maps = {}
    for option in ("--tile", "--no-tile"):
        result = run("detect", model, path, "-o", tmp_path / option, option)
        assert result.exit_code == 0
        assert (
            "note: the threshold was calibrated with --no-tile, not --tile" in result.stderr
        ) == (option == "--tile")
        maps[option] = np.load(tmp_path / option / "maps" / "a.npy")
        assert maps[option].shape == (520, 300)
        assert float(rows(tmp_path / option)[0]["score"]) >= maps[option].max() - 1e-6
    expected = Detector.load(model, tile=True).detect(path)
    np.testing.assert_array_equal(maps["--tile"], expected.map)
    assert not np.allclose(maps["--tile"], maps["--no-tile"], atol=1e-3)
