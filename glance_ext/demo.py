"""The demonstration: from good images to a report, on textures that need no download."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from glance_ext.data.datasets import normal_images, test_samples
from glance_ext.data.textures import TEXTURES, write_texture_set
from glance_ext.engine.detector import Detector
from glance_ext.engine.evaluate import Evaluation, Scored, evaluate, score_samples
from glance_ext.engine.settings import preset
from glance_ext.engine.train import train
from glance_ext.errors import GlanceError, InputError, Interrupted
from glance_ext.report import (
    Paragraph,
    Picture,
    Section,
    Table,
    contact_sheet,
    format_table,
    plot_losses,
    write_report,
)
from glance_ext.report.cases import case_tile, write_curves


@dataclass(frozen=True)
class _TextureResult:
    detector: Detector
    results: list[Scored]
    evaluation: Evaluation
    seconds: dict[str, float]


def run_demo(
    output: Path,
    *,
    steps: int | None,
    seed: int,
    device: torch.device,
    say: Callable[[str], None],
    textures: tuple[str, ...] = TEXTURES,
) -> dict[str, Any]:
    """Makes data, trains, detects and evaluates for each texture, and writes ``report.html``.

    Args:
        output: Folder for data, models, pictures and the report.
        steps: Steps of training; None for the quick preset's.
        seed: Of everything random.
        device: Where to compute.
        say: Prints a line for the user.
        textures: Which textures.

    Returns:
        Metrics and seconds for each texture, as JSON values.
    """
    settings = preset("quick", steps=steps, seed=seed)
    figures: dict[str, Any] = {}
    sections = []
    for name in textures:
        say(f"{name}:")
        result = _run_texture(output, name, settings, device)
        metrics = result.evaluation.metrics
        figures[name] = {"metrics": metrics, "seconds": result.seconds}
        rows = [[metric, _show(value)] for metric, value in metrics.items()]
        say(format_table(["metric", "value"], rows))
        sections.append(_section(output / name, name, result, rows))
    write_report(output / "report.html", "glance-ext on photographed textures", _page(sections))
    return {"settings": settings.to_json(), "textures": figures}


def _run_texture(output: Path, name: str, settings: Any, device: torch.device) -> _TextureResult:
    def unusable(error: InputError) -> None:
        raise GlanceError(f"the demo's own data cannot be read: {error}")

    data, folder = output / "data" / name, output / name
    write_texture_set(data, name, seed=settings.seed)
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "training.safetensors").unlink(missing_ok=True)
    start = time.perf_counter()
    try:
        trained = train(
            normal_images(data, None),
            settings,
            output=folder,
            device=device,
            on_error=unusable,
            validation=normal_images(None, data / "validation" / "good"),
        )
    except Interrupted:  # its message speaks of --resume; a demo begins anew
        raise KeyboardInterrupt from None
    train_seconds = time.perf_counter() - start
    plot_losses(folder / "losses.png", trained.history)
    samples, _ = test_samples(data)
    start = time.perf_counter()
    bar = tqdm(samples, desc="detect", unit="image", dynamic_ncols=True)
    results = score_samples(trained.detector, bar, unusable)
    seconds = {
        "train": round(train_seconds, 1),
        "detect_each": round((time.perf_counter() - start) / len(samples), 2),
    }
    return _TextureResult(trained.detector, results, evaluate(results), seconds)


def _section(folder: Path, name: str, result: _TextureResult, rows: list[list[str]]) -> Section:
    shown = []
    for defect in sorted({scored.sample.defect for scored in result.results}):
        shown += [r for r in result.results if r.sample.defect == defect][:2]
    contact_sheet(folder / "cases.png", (case_tile(result.detector, r) for r in shown))
    write_curves(folder / "curves.png", result.evaluation, name)
    rows = [*rows, ["seconds of training", f"{result.seconds['train']:.0f}"]]
    rows.append(["seconds an image", f"{result.seconds['detect_each']:.2f}"])
    per_defect = [
        [defect, str(f["images"]), _show(f["image_AUROC"]), _show(f["pixel_AUPRO"])]
        for defect, f in result.evaluation.per_defect.items()
    ]
    return Section(
        name.capitalize(),
        [
            Picture(
                folder / "cases.png",
                "Two test crops of every kind: image, heatmap, ground truth. The white line is "
                "where the score passes the threshold.",
                f"Detections on {name}",
            ),
            Table(["figure", "value"], rows),
            Table(["defect", "images", "image AUROC", "AUPRO"], per_defect),
            Picture(folder / "curves.png", "ROC and PRO curves.", f"Curves of {name}"),
            Picture(folder / "losses.png", "Losses of joint training.", f"Losses of {name}"),
        ],
    )


def _page(sections: list[Section]) -> list[Section]:
    introduction = Section(
        "What this shows",
        [
            Paragraph(
                "For each texture a model was trained on 40 crops of the left part of a photograph "
                "(brick, grass and gravel, as scikit-image ships them). Into crops of the lower "
                "right part, which share no pixel with the first, defects were drawn: blots, "
                "scratches, pieces of another texture, and smears. The model saw no such defect in "
                "training."
            ),
            Paragraph(
                "Training was of the quick preset, minutes on a CPU. The threshold comes from good "
                "crops of the upper right part, which share no pixel with the others."
            ),
        ],
    )
    return [introduction, *sections]


def _show(value: float | int | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"
