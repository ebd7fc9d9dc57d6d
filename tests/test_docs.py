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


def _metrics(name: str) -> list[float]:
    text = (ROOT / "docs" / "results" / f"{name}.json").read_text()
    return [json.loads(text)["metrics"][metric] for metric in METRICS]


@pytest.mark.parametrize("name", ["screw", "cookies"])
def test_reproduce_shows_the_committed_figures(name: str) -> None:
    rows = _rows(ROOT / "docs" / "reproduce.md")
    seeds = np.array([_metrics(f"{name}-{seed}") for seed in range(3)])
    pairs = zip(seeds.mean(0), seeds.std(0, ddof=1), strict=True)
    assert [name, "glance-ext", *(f"{mean:.3f} ± {std:.3f}" for mean, std in pairs)] in rows
    settings = (
        ("before", "before"),
        ("with novelty of `deep`", "deep"),
        ("with novelty of `fine`", "fine"),
        ("a direction for each layer", "each"),
        ("and a memory of held-out images too", "memory"),
        ("and a head in context, taught stains", "spots"),
        ("and taught pieces too", "pieces"),
        ("today's default", "0"),
    )
    for setting, file in settings:
        assert [name, setting, *(f"{x:.3f}" for x in _metrics(f"{name}-{file}"))] in rows


def test_reproduce_shows_the_drawn_defects_that_chose() -> None:
    text = (ROOT / "docs" / "results" / "drawn_defects.json").read_text()
    shown = [row for row in _rows(ROOT / "docs" / "reproduce.md") if len(row) == 6]
    for found in json.loads(text)["results"]:
        words = [found[key] for key in ("set", "scores", "stains", "map")]
        figures = [f"{found[key]:.3f}" for key in ("image_AUROC", "pixel_AUPRO")]
        assert [*words, *figures] in shown


def test_reproduce_shows_what_further_steps_of_the_head_bring() -> None:
    text = (ROOT / "docs" / "results" / "head_steps.json").read_text()
    shown = _rows(ROOT / "docs" / "reproduce.md")
    for found in json.loads(text)["results"]:
        figures = [f"{found[key]:.3f}" for key in ("image_AUROC", "pixel_AUPRO")]
        assert [
            found["set"], f"{found['lambda_s']:g}", f"{found['head_steps']:,}", *figures
        ] in shown  # fmt: skip


def test_reproduce_shows_what_the_novelty_brings() -> None:
    text = (ROOT / "docs" / "results" / "novelty.json").read_text()
    shown = _rows(ROOT / "docs" / "reproduce.md")
    for found in json.loads(text)["results"]:
        settings = [f"{found['memory_share']:g}", found["scale"], f"{found['lambda_s']:g}"]
        figures = [f"{found[key]:.3f}" for key in ("image_AUROC", "pixel_AUPRO")]
        assert [found["set"], *settings, *figures] in shown


def test_reproduce_shows_what_each_local_net_brings() -> None:
    text = (ROOT / "docs" / "results" / "local_nets.json").read_text()
    shown = _rows(ROOT / "docs" / "reproduce.md")
    results = json.loads(text)["results"]
    assert len(results) == 4 * 2 * 2
    for found in results:
        words = [found["set"], f"`{found['local_net']}`", found["memory_of"]]
        figures = [f"{found[key]:.3f}" for key in ("image_AUROC", "pixel_AUPRO")]
        assert [*words, *figures] in shown


def test_reproduce_shows_what_context_and_turned_images_bring() -> None:
    found = json.loads((ROOT / "docs" / "results" / "context.json").read_text())
    shown = _rows(ROOT / "docs" / "reproduce.md")
    assert len(found["results"]) == 4 * 10
    for row in found["results"]:
        words = [row["set"], "yes" if row["turns"] else "no", row["directions"]]
        figures = [f"{row[key]:.3f}" for key in ("image_AUROC", "pixel_AUPRO")]
        assert [*words, f"{row['memory_share']:g}", *figures] in shown
    for row in found["layers"]:
        figures = [f"{row[key]:.3f}" for key in ("image_AUROC", "pixel_AUPRO")]
        assert [row["set"], f"`{row['layers']}`", *figures] in shown


def test_reproduce_shows_what_the_head_in_context_and_held_out_images_bring() -> None:
    found = json.loads((ROOT / "docs" / "results" / "context_head.json").read_text())["results"]
    shown = _rows(ROOT / "docs" / "reproduce.md")
    assert len(found) == 4 * 5
    for row in found:
        words = [row["set"], "yes" if row["memory_all"] else "no", f"{row['context_share']:g}"]
        figures = [f"{row[key]:.3f}" for key in ("image_AUROC", "pixel_AUPRO")]
        assert [*words, *figures] in shown


def test_reproduce_shows_what_pieces_teach_the_head_in_context() -> None:
    found = json.loads((ROOT / "docs" / "results" / "pieces.json").read_text())["results"]
    shown = _rows(ROOT / "docs" / "reproduce.md")
    assert len(found) == 4 * 7
    settings = ("distortions", "layers", "left_out", "memory_share", "context_share")
    means: dict[tuple[object, ...], list[tuple[float, float]]] = {}
    for row in found:
        pair = row["image_AUROC"], row["pixel_AUPRO"]
        key = tuple(row[name] for name in settings)
        words = [value if isinstance(value, str) else f"{value:g}" for value in key]
        assert [row["set"], *words, *(f"{x:.3f}" for x in pair)] in shown
        means.setdefault(key, []).append(pair)
    first, default = means["stains", 2, 0, 0.5, 0.5], means["stains and pieces", 3, 0.3, 0.4, 0.75]
    text = " ".join((ROOT / "docs" / "reproduce.md").read_text().split())
    (auroc, pro), (auroc_now, pro_now) = np.mean(first, 0), np.mean(default, 0)
    assert f"PRO rises from {pro:.3f} to {pro_now:.3f}" in text
    assert f"image AUROC from {auroc:.3f} to {auroc_now:.3f}" in text


def test_reproduce_shows_what_is_drawn_for_the_memory_and_what_grain_teaches() -> None:
    found = json.loads((ROOT / "docs" / "results" / "memory.json").read_text())["results"]
    shown = _rows(ROOT / "docs" / "reproduce.md")
    assert len(found) == 4 * 4
    means: dict[tuple[float, bool], list[tuple[float, float]]] = {}
    for row in found:
        words = [row["set"], f"{row['memory_drawn']:g}", "yes" if row["grain"] else "no"]
        pairs = [(of["image_AUROC"], of["pixel_AUPRO"]) for of in (row["novelty_alone"], row)]
        assert [*words, *(f"{x:.3f}" for pair in pairs for x in pair)] in shown
        means.setdefault((row["memory_drawn"], row["grain"]), []).append(pairs[1])
    text = " ".join((ROOT / "docs" / "reproduce.md").read_text().split())
    (auroc, pro), (auroc_now, pro_now) = (
        np.mean(means[key], 0) for key in ((0, False), (0.25, True))
    )
    assert f"PRO rises from {pro:.3f} to {pro_now:.3f}" in text
    assert f"image AUROC from {auroc:.3f} to {auroc_now:.3f}" in text


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
