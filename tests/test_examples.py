"""The examples run, learn or fill what they say, and the page shows the figures of a real run."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

DOCS = Path(__file__).resolve().parents[1] / "docs"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(module: ModuleType, tmp_path: Path, *options: str) -> dict:
    """The figures of a run, whose picture is checked."""
    picture, figures = tmp_path / "picture.png", tmp_path / "figures.json"
    arguments = [*options, "--output", str(picture), "--json", str(figures)]
    result = CliRunner().invoke(module.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    with Image.open(picture) as image:
        assert image.width > 2 * image.height
    return json.loads(figures.read_text())


def test_inpainting_learns_within_a_few_steps(tmp_path: Path, monkeypatch) -> None:
    module = example("inpainting")
    monkeypatch.setattr(module, "BATCH", 4)
    _, losses = module.train(12, seed=0)
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    figures = run(module, tmp_path, "--steps", "2")
    assert set(figures["hole_error"]) == {"mean colour", "biharmonic", "partial convolutions"}


def test_what_is_in_a_hole_does_not_matter_to_the_network() -> None:
    module = example("inpainting")
    torch.manual_seed(0)
    network = module.PartialUNet().eval()
    image, mask = torch.rand(1, 3, 32, 48), torch.rand(1, 1, 32, 48) > 0.4
    with torch.no_grad():
        filled = network(torch.where(mask, image, torch.nan), mask)
        other = network(torch.where(mask, image, 7), mask)
    assert filled.isfinite().all()
    assert torch.equal(filled, other)


def test_a_smoothed_value_is_the_weighted_mean_of_what_is_known() -> None:
    module = example("nan_gaps")
    weight = module.bell(1.0)
    field = torch.rand(1, 1, 9, 9)
    field[..., 2:5, 3:] = torch.nan
    found, seen = module.smoothed(field, weight)
    window, known = field[0, 0, 1:8, 1:8], ~field[0, 0, 1:8, 1:8].isnan()
    expected = (weight[0, 0][known] * window[known]).sum() / weight[0, 0][known].sum()
    torch.testing.assert_close(found[0, 0, 4, 4], expected)
    assert seen.all()


def test_gaps_are_filled_better_than_with_the_mean(tmp_path: Path) -> None:
    figures = run(example("nan_gaps"), tmp_path)
    errors = figures["gap_error"]
    assert errors["partial convolution"] < 0.5 * errors["gaps set to the mean"]


@pytest.mark.parametrize("name", ["inpainting", "nan_gaps"])
def test_the_page_shows_the_committed_figures(name: str) -> None:
    text = (DOCS / "examples.md").read_text(encoding="utf-8")
    section = text.split(f"## `{name}.py`")[1].split("\n## ")[0]
    figures = json.loads((DOCS / "results" / f"{name}.json").read_text())
    (errors,) = (value for key, value in figures.items() if key.endswith("_error"))
    shown = dict(re.findall(r"^\| ([a-z ]+) \| ([\d.]+) \|", section, re.MULTILINE))
    assert shown == {method: f"{error:.3f}" for method, error in errors.items()}
