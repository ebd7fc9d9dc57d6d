"""Runs over all categories of a data set.

Each is trained and measured once, and what is done is kept, so that the same call goes on where an
earlier one stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from glance_ext.data.datasets import Sample
from glance_ext.data.layouts import Category
from glance_ext.engine.detector import MODEL_FILE, Detector
from glance_ext.engine.evaluate import evaluate, score_each
from glance_ext.engine.paper import paper_table, row_key
from glance_ext.engine.settings import TrainSettings
from glance_ext.engine.train import STATE_FILE, TrainResult, train
from glance_ext.errors import GlanceError, InputError, Interrupted, OutputError
from glance_ext.files import write_json

RESULT_FILE = "result.json"
SUMMARY_FILE = "results.json"

T = TypeVar("T")
Figures = dict[str, Any]
OnError = Callable[[InputError], None]
Progress = Callable[[Sequence[T]], Iterable[T]]


@dataclass(frozen=True)
class Plan:
    """What is done for every category.

    Attributes:
        dataset: The data set's name, ``"mvtec"`` say.
        settings: Of training.
        output: Folder for a folder for each category, and for the summary.
        local_net: A distilled Local-Net; None for the packaged one that settings name.
        teacher_weights: For fine-tuning.
        device: Where to compute.
        protocol: What else a result depends on, as JSON values.
        metadata: Of the software, for the files.
    """

    dataset: str
    settings: TrainSettings
    output: Path
    local_net: Path | None
    teacher_weights: Path | None
    device: torch.device
    protocol: dict[str, Any]
    metadata: dict[str, Any]

    def identity(self) -> dict[str, Any]:
        """Two results with the same of this are of the same run."""
        return {
            "dataset": self.dataset,
            **self.protocol,
            **self.settings.to_json(),
            "local_net": str(self.local_net or self.settings.local_net),
        }


def run_all(
    plan: Plan,
    names: Sequence[str],
    run: Callable[[str], Figures],
    *,
    on_start: Callable[[str, bool], None],
    on_failure: Callable[[str, GlanceError], None],
) -> dict[str, Figures]:
    """Runs the categories that have no result yet, and writes the summary after each.

    Args:
        plan: What is done for each.
        names: The categories.
        run: Trains and measures one; returns its figures.
        on_start: Called with each category and whether its result is there already.
        on_failure: Called for a category that cannot be run; the others are.

    Returns:
        The figures of every category that has some, in order of ``names``.

    Raises:
        Interrupted: Ctrl-C; the same call goes on.
        OutputError: A result cannot be written.
    """
    results: dict[str, Figures] = {}
    for name in names:
        try:
            found = _kept_result(plan, name)
            on_start(name, found is not None)
            if found is None:
                found = {"metadata": {**plan.metadata, **plan.identity()}, **run(name)}
                write_json(plan.output / name / RESULT_FILE, found)
        except (Interrupted, OutputError):
            raise
        except GlanceError as error:
            on_failure(name, error)
            continue
        results[name] = found
        write_json(plan.output / SUMMARY_FILE, summary(plan, results))
    return results


def _kept_result(plan: Plan, name: str) -> Figures | None:
    """The result of an earlier run, if there is one.

    Raises:
        GlanceError: It is of other settings, or damaged.
    """
    path = plan.output / name / RESULT_FILE
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        theirs, _ = found["metadata"], found["metrics"]
        differ = _difference(plan.identity(), theirs)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise GlanceError(f"{path}: expected a result, cannot read it: {error!r}") from error
    if differ:
        raise GlanceError(
            f"{path}: expected a result of the same settings, found {differ}; give another "
            "--output, or remove it first"
        )
    return dict(found)


def _difference(wanted: dict[str, Any], found: dict[str, Any]) -> str:
    """The first setting that differs, in words, or nothing."""
    for key, value in json.loads(json.dumps(wanted)).items():
        if found.get(key) != value:
            return f"{key} {found.get(key)} instead of {value}"
    return ""


def trained(
    plan: Plan, folder: Path, begin: Callable[[bool], TrainResult]
) -> tuple[Detector, float | None]:
    """The model in a folder, which is trained first if it is not there yet.

    Args:
        plan: Whose settings the model must have.
        folder: Of the category.
        begin: Trains; told whether an interrupted run is to go on.

    Returns:
        The detector, and the seconds that training took if it was all done now.

    Raises:
        GlanceError: The model there is of other settings.
    """
    if (folder / MODEL_FILE).exists():
        detector = Detector.load(folder, device=plan.device)
        differ = _difference(plan.settings.to_json(), detector.settings)
        if differ:
            raise GlanceError(
                f"{folder / MODEL_FILE}: expected a model of the same settings, found {differ}; "
                "give another --output, or remove it first"
            )
        return detector, None
    resume = (folder / STATE_FILE).exists()
    start = time.perf_counter()
    result = begin(resume)
    seconds = time.perf_counter() - start
    return result.detector, None if resume else round(seconds, 1)


def run_category(
    plan: Plan,
    category: Category,
    *,
    pro_limit: float,
    on_error: OnError,
    progress: Progress[Sample] = lambda items: items,
) -> Figures:
    """Trains on a category's normal images and measures on its test images.

    Args:
        plan: What is done for each category.
        category: Its files.
        pro_limit: False-positive rate to which PRO is integrated.
        on_error: Called for each file that cannot be used.
        progress: Shows progress over the test images.
    """
    failed = [str(problem) for problem in category.problems]
    for problem in category.problems:
        on_error(problem)

    def note(error: InputError) -> None:
        failed.append(str(error))
        on_error(error)

    folder = plan.output / category.name
    detector, train_seconds = trained(
        plan,
        folder,
        lambda resume: train(
            category.normal,
            plan.settings,
            output=folder,
            local_net=plan.local_net,
            teacher_weights=plan.teacher_weights,
            device=plan.device,
            resume=resume,
            on_error=note,
            validation=category.validation,
        ),
    )
    start = time.perf_counter()
    evaluation = evaluate(
        score_each(detector, progress(category.samples), note), folder=folder, limit=pro_limit
    )
    seconds = {"train": train_seconds, "evaluate": round(time.perf_counter() - start, 1)}
    return {
        "metrics": evaluation.metrics,
        "per_defect": evaluation.per_defect,
        "images": len(evaluation.images),
        "failed": failed,
        "seconds": seconds,
    }


def summary(plan: Plan, results: dict[str, Figures]) -> Figures:
    """Every category's metrics, their means, and the paper's figures of the same categories."""
    metrics = {name: found["metrics"] for name, found in results.items()}
    published = {name: row for name in results if (row := paper_row_of(plan.dataset, name))}
    content: Figures = {
        "metadata": {**plan.metadata, **plan.identity()},
        "results": metrics,
        "mean": mean_of(list(metrics.values())),
    }
    if published:
        content["paper"] = published
        content["paper_mean"] = mean_of(list(published.values()))
    return content


def paper_row_of(dataset: str, name: str) -> dict[str, float]:
    """The paper's figures of a category, by method; empty if it has none."""
    return paper_table(dataset).get(row_key(name), {})


def mean_of(rows: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Of every figure its mean over the rows, None where a row has none."""
    means: dict[str, float | None] = {}
    for key in rows[0] if rows else ():
        values = [row[key] for row in rows]
        known = [value for value in values if value is not None]
        means[key] = math.fsum(known) / len(known) if len(known) == len(values) else None
    return means
