"""The documents and the picture say what the committed results say."""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.scripts import script

plots = script("plots")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The committed results, and a copy in which we take twice as long."""
    slower = tmp_path_factory.mktemp("results")
    for path in plots.RESULTS.glob("*.json"):
        shutil.copy(path, slower)
    for path in slower.glob("*.json"):
        data = json.loads(path.read_text(encoding="utf-8"))
        for row in data["results"]:
            other_grid = "detect/" in row["case"] and "/stride4_n1" not in row["case"]
            if row["variant"] == "ours" and not other_grid:
                row["median_ms"] *= 2
        path.write_text(json.dumps(data), encoding="utf-8")
    return slower


@pytest.mark.parametrize("path", plots.DOCUMENTS, ids=lambda path: path.name)
def test_a_document_says_what_the_committed_results_say(path: Path, results: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert plots.rewrite(text, plots.regions()) == text
    assert plots.rewrite(text, plots.regions(results)) != text


def test_every_region_stands_in_a_document() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in plots.DOCUMENTS)
    assert sorted(re.findall(r"<!-- table: ([\w-]+) -->", text)) == sorted(plots.regions())


def test_the_tables_figures_are_the_files() -> None:
    (first, *_) = plots.load(plots.RESULTS, "detect")
    case = "detect/map/stride4_n1"
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in plots.regions()["detect-stages"].splitlines()
    ]
    row = next(row for row in rows if row[0] == f"{first.machine}, {first.dtype}, all")
    ours, floor = first.rows[case, "ours"]["median_ms"], first.rows[case, "limit"]["median_ms"]
    shown = dict(zip(rows[0], row, strict=True))
    assert float(shown["measured ms"]) == pytest.approx(ours, rel=5e-3)
    assert float(shown["floor ms"]) == pytest.approx(floor, rel=5e-3)
    assert float(shown["measured / floor"].removesuffix("x")) == pytest.approx(
        ours / floor, rel=5e-3
    )


def test_a_cuda_graph_has_a_line_of_its_own(tmp_path: Path) -> None:
    (file,) = plots.RESULTS.glob("detect--*avx2*--float32.json")
    data = json.loads(file.read_text(encoding="utf-8"))
    for row in [row for row in data["results"] if row["variant"] == "ours"]:
        half = {"variant": "ours-graph", "median_ms": row["median_ms"] / 2}
        data["results"].append(row | half)
    for errors in data["metadata"]["relative_errors"].values():
        errors["ours-graph"] = errors["ours"]
    (tmp_path / file.name).write_text(json.dumps(data), encoding="utf-8")
    (run,) = plots.load(tmp_path, "detect")
    plain, graph = plots.goal_table([run]).splitlines()[2:]
    assert (
        f"float32, CUDA graph | {plots.ms(run.get('detect/map/stride4_n1', 'ours') / 2)} |" in graph
    )
    assert "CUDA graph" not in plain
    ratios = [
        [float(cell.strip()[:-1]) for cell in line.split("|") if cell.strip().endswith("x")]
        for line in (plain, graph)
    ]
    assert ratios[1][0] == pytest.approx(2 * ratios[0][0], rel=0.01)


@pytest.mark.parametrize(
    ("suite", "op", "region"),
    [
        ("ops", "aggregate_patch_scores", "ops-aggregate"),
        ("partial-conv", "", "partial-conv-layers"),
    ],
)
def test_ratios_of_the_ops_have_a_row_for_each_case(suite: str, op: str, region: str) -> None:
    cases = {
        case
        for run in plots.load(plots.RESULTS, suite)
        for case, _ in run.rows
        if case.startswith(op)
    }
    shown = re.findall(r"^\| (?:.*, )?(\S+/\S+) \|", plots.regions()[region], re.MULTILINE)
    assert len(cases) > 5
    assert set(shown) == cases


def test_a_training_steps_row_has_its_patches_a_second(tmp_path: Path) -> None:
    (path, *_) = plots.RESULTS.glob("train--*.json")
    data = json.loads(path.read_text(encoding="utf-8"))
    case = next(iter(data["metadata"]["shapes"]))
    data["metadata"]["shapes"] = {
        case: {"patches": 32, "holes_per_image": 8, "positions": "4", "stain_uses": 8}
    }
    data["results"] = [
        {"case": case, "variant": variant, "median_ms": time}
        for variant, time in (("ours", 64), ("reference", 320), ("limit", 32))
    ]
    (tmp_path / path.name).write_text(json.dumps(data), encoding="utf-8")
    (*_, row) = plots.train_table(plots.load(tmp_path, "train")).splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:] == [
        "on a stride-4 grid", "8", "8", "320", "-", "-", "64.0", "500", "5.00x", "-", "2.00x",
    ]  # fmt: skip


def test_a_networks_row_has_the_mean_and_the_worst_of_its_layers(tmp_path: Path) -> None:
    (path, *_) = plots.RESULTS.glob("partial-conv--*.json")
    data = json.loads(path.read_text(encoding="utf-8"))
    data["results"] = [
        row | {"median_ms": time, "peak_mib": 1.0}
        for layer, (ours, plain, nvidia) in {"a": (2, 1, 3), "b": (8, 1, 4)}.items()
        for variant, time in (("ours", ours), ("conv2d", plain), ("nvidia", nvidia))
        for row in [{"case": f"net/forward/{layer}", "variant": variant}]
    ]
    (tmp_path / path.name).write_text(json.dumps(data), encoding="utf-8")
    (text,) = [
        line
        for line in plots.network_table(plots.load(tmp_path, "partial-conv")).splitlines()
        if ", net |" in line
    ]
    cells = [cell.strip() for cell in text.strip("|").split("|")]
    assert cells[1:] == [
        "forward", "2", "4.00x", "8.00x", "1.00x", "1.00x", "0.866x", "0.500x", "-", "-", "-",
    ]  # fmt: skip


def test_numbers_have_three_digits() -> None:
    values = (12345.6, 123.4, 12.34, 1.234, 0.1234)
    assert [plots.number(value) for value in values] == ["12,346", "123", "12.3", "1.23", "0.123"]
    assert plots.times(None) == plots.ms(None) == plots.mib(None) == "-"


def test_the_committed_picture_is_of_the_committed_results(results: Path, tmp_path: Path) -> None:
    """Fonts differ from machine to machine, so the picture says of which files it is."""
    with Image.open(plots.PICTURE) as committed:
        assert committed.text["Description"] == plots.digest()
        size = committed.size
    assert plots.digest(results) != plots.digest()
    plots.draw(tmp_path / "again.png")
    with Image.open(tmp_path / "again.png") as again:
        assert again.size == size
        assert again.text["Description"] == plots.digest()


def test_the_picture_shows_bars_as_high_as_the_results(results: Path, tmp_path: Path) -> None:
    def blue_pixels(path: Path) -> int:
        with Image.open(path) as image:
            return sum(pixel[:3] == (0, 114, 178) for pixel in image.convert("RGB").getdata())

    plots.draw(tmp_path / "committed.png")
    plots.draw(tmp_path / "slower.png", results)
    assert blue_pixels(tmp_path / "slower.png") > blue_pixels(tmp_path / "committed.png") * 1.02


def test_the_drawing_shows_the_windows_that_are_computed(tmp_path: Path) -> None:
    drawing = script("drawing")
    windows = drawing.hole_windows()
    sides = [side for side, *_ in windows]
    assert sides == [256, 125, 62, 30, 28, 13, 11, 5, 3, 1]
    assert windows[0] == (256, *drawing.HOLE, 33)
    assert [window for *_, window in windows][1:4] == [20, 11, 7]
    starts = [188, 192, 223]
    shared = drawing.places(starts)
    assert [step for _, step, _ in shared] == [1, 1, 2, 2, 4, 4, 4]
    assert shared[-1][2] == set(starts)
    assert max(shared[0][2]) == 223 + 31  # K = 5 does not see the last pixel of a patch
    drawing.draw(tmp_path / "drawing.png")
    with Image.open(tmp_path / "drawing.png") as drawn, Image.open(drawing.PICTURE) as committed:
        assert drawn.size == committed.size
