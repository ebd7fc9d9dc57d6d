"""What the documents say is what the committed figures say, and every link leads somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from glance_ext.data.cifar import CLASSES

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
METRICS = ("image_AUROC", "pixel_AUROC", "pixel_AUPRO")


def _rows(page: Path) -> list[list[str]]:
    """The cells of every table row of a page."""
    lines = page.read_text(encoding="utf-8").splitlines()
    return [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [t.split("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text)]
    missing = [
        t for t in targets if t and "://" not in t and not (page.parent / t).resolve().exists()
    ]
    assert not missing


@pytest.mark.parametrize("name", ["screw", "cookies"])
def test_reproduce_shows_the_committed_figures(name: str) -> None:
    metrics = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())["metrics"]
    expected = [name, "glance-ext", *(f"{metrics[metric]:.3f}" for metric in METRICS)]
    found = [row[:5] for row in _rows(ROOT / "docs" / "reproduce.md") if row[:2] == expected[:2]]
    assert found == [expected]


def test_reproduce_shows_the_committed_classes_of_cifar10() -> None:
    found = json.loads((ROOT / "docs" / "results" / "cifar10.json").read_text())
    assert sorted(found["results"]) == sorted(CLASSES)
    columns = ("Glance", "GradCon", "OCGAN", "DSVDD", "LSA")
    rows = {
        name: [metrics["image_AUROC"], *(found["paper"][name][c] for c in columns)]
        for name, metrics in found["results"].items()
    }
    rows["mean"] = np.mean(list(rows.values()), axis=0).tolist()
    for name, figures in rows.items():
        expected = [name, *(f"{figure:.3f}" for figure in figures)]
        assert expected in _rows(ROOT / "docs" / "reproduce.md")


def test_nothing_speaks_of_the_machine_it_was_written_on() -> None:
    foreign = re.compile(r"(?<![\w.])/(work|tmp|root|home)/")
    assert not [page.name for page in PAGES if foreign.search(page.read_text(encoding="utf-8"))]
