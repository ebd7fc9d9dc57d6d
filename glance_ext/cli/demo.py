"""``glance-ext demo``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from glance_ext.cli.common import PATH, device_option, json_option, metadata, say, seed_option

if TYPE_CHECKING:
    import torch


@click.command("demo")
@click.option(
    "--output", "-o", type=PATH, default=Path("demo-report"), show_default=True, help="Folder."
)
@click.option("--steps", type=click.IntRange(1), help="Steps of training; the quick preset's else.")
@click.option("--overwrite", is_flag=True, help="Replace the report of an earlier demo.")
@seed_option
@device_option
@json_option
def command(
    output: Path,
    steps: int | None,
    overwrite: bool,
    seed: int,
    device: torch.device,
    json_file: Path | None,
) -> None:
    """Train and detect on photographed textures, and write a report.

    Brick, grass and gravel come with scikit-image. A model is trained for each on crops of its left
    part; defects of several kinds are put into crops of its right part, and found again. Nothing is
    downloaded.
    """
    from glance_ext.demo import run_demo
    from glance_ext.errors import GlanceError
    from glance_ext.files import write_json

    report = output / "report.html"
    if report.exists() and not overwrite:
        raise GlanceError(f"{report}: already there; give --overwrite or another --output")
    figures = run_demo(output, steps=steps, seed=seed, device=device, say=say)
    say(f"report: {report}")
    if json_file is not None:
        write_json(json_file, {"metadata": metadata(), **figures})
