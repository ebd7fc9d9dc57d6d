"""``glance-ext detect``."""

from __future__ import annotations

import csv
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
    no_images,
    say,
    say_error,
    seed_option,
)

if TYPE_CHECKING:
    import torch

    from glance_ext.engine.batches import Found
    from glance_ext.engine.detector import Detector

CSV_COLUMNS = ("path", "score", "threshold", "anomalous", "error")


def detector_options(command: Any) -> Any:
    """Options that choose how a detector detects; shared with ``evaluate``."""
    for option in (
        click.option(
            "--grid",
            help="Which patches are scored: a stride in pixels, or 'paper' (20x20); without, as "
            "the model was calibrated.",
        ),
        click.option(
            "--tile/--no-tile",
            default=None,
            help="Score images in overlapping 256x256 windows at their own resolution, or resized "
            "to 256x256; without, as the model was calibrated.",
        ),
        click.option(
            "--precision",
            type=click.Choice(["float32", "bfloat16", "tf32", "float64"]),
            default="float32",
            show_default=True,
            help="What the networks compute in: bfloat16 is faster and rounds more, tf32 needs a "
            "GPU, float64 is for comparison.",
        ),
        click.option(
            "--batch-size",
            type=click.IntRange(1),
            help="Images, or windows of them, scored together; without, 1 on a CPU, 16 on a GPU.",
        ),
        click.option(
            "--false-positive-rate",
            type=click.FloatRange(0, 1, max_open=True),
            default=0.05,
            show_default=True,
            help="The share of good images that the threshold may flag.",
        ),
        click.option("--threshold", type=float, help="Instead of the calibrated threshold."),
    ):
        command = option(command)
    return command


def load_detector(
    model: Path,
    device: torch.device,
    *,
    false_positive_rate: float,
    threshold: float | None,
    **options: Any,
) -> Detector:
    """Reads the model and says what the user should know of its threshold."""
    from glance_ext.engine.detector import Detector
    from glance_ext.engine.settings import learnt

    detector = Detector.load(
        model,
        device=device,
        false_positive_rate=false_positive_rate,
        threshold=threshold,
        **options,
    )
    held_out = len(detector.calibration.held_out_scores)
    if threshold is None and detector.grid.name != detector.calibration.grid:
        say_error(
            f"note: the threshold was calibrated with --grid {detector.calibration.grid}, not "
            f"{detector.grid.name}"
        )
    positions = detector.settings.get("positions", "uniform")
    if not learnt(detector.grid.name, positions):
        say_error(
            f"note: the model was trained on patches at --positions {positions}, of which --grid "
            f"{detector.grid.name} has others; its maps may be worse"
        )
    if threshold is None and detector.tile != detector.calibration.tile:
        names = {True: "--tile", False: "--no-tile"}
        say_error(
            f"note: the threshold was calibrated with {names[detector.calibration.tile]}, not "
            f"{names[detector.tile]}"
        )
    if threshold is None and detector.calibration.optimistic:
        say_error("note: the threshold rests on training images and is too low; see --threshold")
    elif threshold is None and 0 < false_positive_rate < 1 / held_out:
        say_error(
            f"note: {held_out} held-out images cannot tell a rate of {false_positive_rate:g} from "
            "0; the threshold is the highest of their scores"
        )
    return detector


def how(detector: Detector) -> dict[str, Any]:
    """What a result file says of how a detector detected."""
    return {
        "grid": detector.grid.name,
        "tile": detector.tile,
        "precision": detector.precision,
        "device": str(detector.device),
    }


@click.command("detect")
@click.argument("model", type=PATH)
@click.argument("images", nargs=-1, required=True, type=PATH)
@click.option("--output", "-o", required=True, type=PATH, help="Folder for maps, heatmaps, scores.")
@detector_options
@seed_option
@device_option
@json_option
def command(
    model: Path,
    images: tuple[Path, ...],
    output: Path,
    seed: int,
    device: torch.device,
    json_file: Path | None,
    **options: Any,
) -> int:
    """Find anomalies in images.

    MODEL is what glance-ext train wrote. IMAGES are files and folders. For each image OUTPUT gets
    maps/NAME.npy (float32 scores at the image's own height and width), heatmaps/NAME.png and a line
    in scores.csv. Images are resized to 256x256 to be scored, or with --tile cut into windows of
    that size; an image with a side below 256 pixels is enlarged until it fits. An image that cannot
    be used is reported there too, and does not stop the others.
    """
    from tqdm import tqdm

    from glance_ext.data.images import expand_inputs
    from glance_ext.engine.batches import detect_files
    from glance_ext.errors import InputError
    from glance_ext.files import atomic_write, write_json

    detector = load_detector(model, device, **options)
    # the heatmaps of an earlier call, if they lie below a folder of images, are none
    earlier = os.path.realpath(output / "heatmaps") + os.sep
    inputs = [
        (path, name)
        for path, name in expand_inputs(images)
        if not os.path.realpath(path).startswith(earlier)
    ]
    if not inputs:
        raise no_images(images)
    rows: list[dict[str, Any]] = []
    with Failures() as failures:
        bar = tqdm(inputs, desc="detect", unit="image", dynamic_ncols=True)
        for (path, name), found in detect_files(detector, bar, lambda item: item[0]):
            row: dict[str, Any] = {**dict.fromkeys(CSV_COLUMNS), "path": str(path)}
            rows.append(row)
            try:
                if isinstance(found, InputError):
                    raise found
                _write_one(detector, path, found, output, str(name))
            except InputError as error:
                failures(error)
                row["error"] = error.reason
            else:
                row.update(
                    score=found.detection.score,
                    threshold=found.detection.threshold,
                    anomalous=found.detection.anomalous,
                )
        with atomic_write(output / "scores.csv", "w") as stream:
            writer = csv.DictWriter(stream, CSV_COLUMNS)
            writer.writeheader()
            writer.writerows({**row, "anomalous": _flag(row["anomalous"])} for row in rows)
        flagged = sum(bool(row["anomalous"]) for row in rows)
        scored = len(rows) - len(failures.errors)
        say(f"{flagged} of {scored} images are anomalous (score above {detector.threshold:.4f})")
        say(f"results: {output}")
        if json_file is not None:
            content = {
                "metadata": {**metadata(), "model": str(model), **how(detector)},
                "threshold": detector.threshold,
                "results": rows,
            }
            write_json(json_file, content)
    return failures.exit_code()


def _write_one(detector: Detector, path: Path, found: Found, output: Path, name: str) -> None:
    """Writes the map and the heatmap of a file.

    Raises:
        InputError: The file is too large for its heatmap, or its name not to be given to a result.
        OutputError: A result cannot be written.
    """
    import errno

    import numpy as np

    from glance_ext.errors import TOO_LARGE, InputError, OutputError
    from glance_ext.files import atomic_write
    from glance_ext.report import overlay, write_png
    from glance_ext.report.cases import colour_range

    try:
        low, high = colour_range(detector)
        anomaly_map, threshold = found.detection.map, found.detection.threshold
        picture = overlay(found.image, anomaly_map, low, high, threshold=threshold)
        with atomic_write(output / "maps" / f"{name}.npy") as stream:
            np.save(stream, anomaly_map)
        write_png(output / "heatmaps" / f"{name}.png", picture)
    except MemoryError as error:
        raise InputError(path, TOO_LARGE) from error
    except OutputError as error:
        if getattr(error.__cause__, "errno", None) != errno.ENAMETOOLONG:
            raise
        raise InputError(path, "expected a shorter name, to name its results after") from error


def _flag(value: bool | None) -> str:
    return "" if value is None else str(int(value))
