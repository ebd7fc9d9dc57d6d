"""``glance-ext distill``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from glance_ext.cli.common import (
    PATH,
    Failures,
    device_option,
    json_option,
    metadata,
    no_images,
    say,
    seed_option,
)

if TYPE_CHECKING:
    import torch


@click.command("distill")
@click.argument("images", nargs=-1, required=True, type=PATH)
@click.option("--output", "-o", required=True, type=PATH, help="The Local-Net's file.")
@click.option(
    "--teacher", help="A timm model; default resnet18 if it can be had, else an offline one."
)
@click.option(
    "--teacher-layer",
    default="pooled",
    show_default=True,
    help="'pooled' for the last feature, or the name of one of the teacher's modules, or of "
    "several joined by '+'.",
)
@click.option("--teacher-weights", type=PATH, help="The teacher's weights, a file.")
@click.option(
    "--teacher-input-size",
    type=click.IntRange(33, 512),
    default=128,
    show_default=True,
    help="Patches are resized to this many pixels for the teacher; the paper's is 224.",
)
@click.option(
    "--teacher-context",
    is_flag=True,
    help="Show the teacher crops of --teacher-input-size pixels as they are (65, 69, ..., 129, "
    "...), and learn what its layers say at every patch in them; a step is then --batch-size "
    "crops. The paper's teacher sees a patch alone.",
)
@click.option("--steps", type=click.IntRange(1), default=50_000, show_default=True)
@click.option("--batch-size", type=click.IntRange(2), default=64, show_default=True)
@click.option(
    "--learning-rate", type=click.FloatRange(0, min_open=True), default=2e-4, show_default=True
)
@click.option(
    "--decay",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of the steps, the last ones, in which the learning rate falls to 0.",
)
@click.option(
    "--kernel-size",
    type=click.Choice(["3", "5"]),
    default="5",
    show_default=True,
    help="Local-Net's first convolution.",
)
@click.option("--bfloat16", is_flag=True, help="Compute in bfloat16 where that is safe; faster.")
@click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped.")
@seed_option
@device_option
@json_option
def command(
    images: tuple[Path, ...],
    output: Path,
    teacher: str | None,
    teacher_layer: str,
    teacher_weights: Path | None,
    teacher_input_size: int,
    teacher_context: bool,
    steps: int,
    batch_size: int,
    learning_rate: float,
    decay: float,
    kernel_size: str,
    bfloat16: bool,
    resume: bool,
    seed: int,
    device: torch.device,
    json_file: Path | None,
) -> int:
    """Distil a pretrained teacher into a new Local-Net.

    IMAGES are files and folders of any photographs; the more various, the better. The result serves
    every kind of product: glance-ext train --local-net FILE.
    """
    from glance_ext.data.images import expand_inputs
    from glance_ext.engine.distill import DistillSettings, distill
    from glance_ext.files import write_json
    from glance_ext.models.teacher import load_teacher

    paths = [path for path, _ in expand_inputs(images)]
    if not paths:
        raise no_images(images)
    settings = DistillSettings(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        decay=decay,
        kernel_size=int(kernel_size),
        bfloat16=bfloat16,
        seed=seed,
    )
    network = load_teacher(
        teacher,
        layer=teacher_layer,
        weights=teacher_weights,
        input_size=teacher_input_size,
        context=teacher_context,
    )
    with Failures() as failures:
        result = distill(
            paths,
            network,
            settings,
            output=output,
            device=device,
            resume=resume,
            on_error=failures,
        )
        last = {name: points[-1][1] for name, points in result.history.items()}
        say(f"distilled {network.name} ({network.layer}) into {output}")
        for name, value in last.items():
            say(f"  {name}: {value:.4f}")
        if json_file is not None:
            content = {"metadata": {**metadata(), **result.net.teacher}, "losses": result.history}
            write_json(json_file, content)
    return failures.exit_code()
