"""``glance-ext bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from glance_ext.cli.common import PATH, device_option, say, seed_option

if TYPE_CHECKING:
    import torch


@click.command("bench")
@click.argument("suite")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
)
@click.option("--quick", is_flag=True, help="Fewer shapes and repeats: a smoke test, not a result.")
@click.option(
    "--without",
    metavar="VARIANT",
    multiple=True,
    help="Leave a variant out, such as nvidia-compiled, which takes minutes to compile; can be "
    "given again.",
)
@seed_option
@device_option
@click.option("--json", "json_file", type=PATH, help="Also write the results to this file.")
def command(
    suite: str,
    dtype: str,
    quick: bool,
    without: tuple[str, ...],
    seed: int,
    device: torch.device,
    json_file: Path | None,
) -> None:
    """Measure SUITE (ops, partial-conv, detect or train) against reference, limit and peers.

    ops: masked convolution and score aggregation alone. partial-conv: the layers of whole networks,
    forward and with backward, beside plain conv2d and NVIDIA's formulation; a quarter of an hour on
    two cores. detect: from images to maps, whole and by stage, and how its time grows with grid,
    batch and image size; about four minutes. train: a step of joint training by how many patches
    come from one image; about two minutes.

    Correctness comes first: a variant that gives a wrong answer is not timed, it ends the run.
    benchmarks/README.md states how everything is measured.
    """
    from glance_ext.bench.run import format_results, run_suite
    from glance_ext.cli.common import say_error
    from glance_ext.files import write_json

    results = run_suite(
        suite,
        device=device,
        dtype=dtype,
        seed=seed,
        quick=quick,
        without=without,
        progress=say_error,
    )
    say(format_results(results))
    if json_file is not None:
        write_json(json_file, results)
