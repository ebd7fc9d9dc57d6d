"""``glance-ext evaluate``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glance_ext.cli.common import (
    PATH,
    Failures,
    device_option,
    json_option,
    metadata,
    say,
    say_error,
    seed_option,
)
from glance_ext.cli.detect import detector_options, how, load_detector

if TYPE_CHECKING:
    import torch

    from glance_ext.engine.evaluate import Evaluation


@click.command("evaluate")
@click.argument("model", type=PATH)
@click.argument("dataset", type=PATH)
@click.option("--output", "-o", type=PATH, help="Folder for curves and a sheet of cases.")
@click.option("--paper", is_flag=True, help="Set the result beside the paper's row of its Table 1.")
@detector_options
@seed_option
@device_option
@json_option
def command(
    model: Path,
    dataset: Path,
    output: Path | None,
    paper: bool,
    seed: int,
    device: torch.device,
    json_file: Path | None,
    **options: Any,
) -> int:
    """Measure a model on a labelled data set.

    DATASET is a folder in the MVTec layout: test/good, test/DEFECT, ground_truth/DEFECT. Figures
    are exact (every threshold, 8-connected regions, PRO integrated to a false-positive rate of 30
    %), at the ground truth's resolution.
    """
    from tqdm import tqdm

    from glance_ext.data.datasets import test_samples
    from glance_ext.engine.evaluate import evaluate, paper_row, score_samples
    from glance_ext.files import write_json
    from glance_ext.report.cases import write_cases, write_curves

    name = Path(os.path.abspath(dataset)).name
    published = paper_row(name) if paper else None
    detector = load_detector(model, device, **options)
    samples, problems = test_samples(dataset)
    with Failures() as failures:
        for problem in problems:
            failures(problem)
        bar = tqdm(samples, desc="evaluate", unit="image", dynamic_ncols=True)
        results = score_samples(detector, bar, failures)
        evaluation = evaluate(results)

        _print_figures(evaluation, published)
        content: dict[str, Any] = {
            "metadata": {
                **metadata(),
                "model": str(model),
                "dataset": name,
                **how(detector),
                "images": len(results),
                "failed": [str(error) for error in failures.errors],
                "settings": detector.settings,
            },
            "metrics": evaluation.metrics,
            "per_defect": evaluation.per_defect,
        }
        if published is not None:
            content["paper"] = published
        if json_file is not None:
            write_json(json_file, content)
        if output is not None:
            if not write_curves(output / "curves.png", evaluation, name):
                say_error("note: there is no curve to draw")
            write_cases(output / "cases.png", detector, results)
            say(f"pictures: {output}")
    return failures.exit_code()


def _print_figures(evaluation: Evaluation, published: dict[str, float] | None) -> None:
    from glance_ext.report import format_table

    metrics = evaluation.metrics
    say(format_table(["metric", "value"], [[k, _show(v)] for k, v in metrics.items()]))
    if None in metrics.values():
        say_error("note: some metrics need both good and anomalous images, and one kind is missing")
    if evaluation.per_defect:
        rows = [
            [name, f["images"], _show(f["image_AUROC"]), _show(f["pixel_AUPRO"])]
            for name, f in evaluation.per_defect.items()
        ]
        say("\n" + format_table(["defect", "images", "image_AUROC", "pixel_AUPRO"], rows))
    if published is not None:
        rows = [["glance-ext, measured here", _show(metrics["pixel_AUPRO"])]]
        rows += [[_METHOD_NAMES.get(k, k), f"{v:.3f}"] for k, v in published.items()]
        say("\n" + format_table(["PRO to 30 %, as the paper's Table 1", "value"], rows))


_METHOD_NAMES = {"Glance": "Glance, the paper's figure", "TS": "TS (student-teacher)"}


def _show(value: float | int | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"
