"""Where the time of a dense map goes on a GPU: kernel by kernel, of each stage.

    python benchmarks/gpu_profile.py --images 16 --dtype bfloat16
    python benchmarks/gpu_profile.py --once          # one map, for a profiler that reads counters

With ``--once`` nothing is printed, and cudaProfilerStart and -Stop stand around the one map: so
``ncu --profile-from-start off`` reads the counters of its kernels and of no others. On a machine
without a GPU it names torch's calls instead of kernels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import click
import torch
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from glance_ext.bench.detect import maps_of
from glance_ext.data.grid import patch_grid
from glance_ext.models.glance import IMAGE_SIZE, Glance
from glance_ext.models.local_net import LocalNet
from glance_ext.models.normalisation import normalise
from glance_ext.report.table import format_table

STAGES = ("normalise", "Local-Net", "Global-Net", "scores", "map of scores")
_CALLS = 3


def staged_map(
    model: Glance, images: torch.Tensor, grid: str, dtype: torch.dtype
) -> Callable[[], torch.Tensor]:
    """Computes dense maps stage by stage, each under its name in :data:`STAGES`."""
    patches = patch_grid(grid)
    plan = model.plan(patches.starts, patches.starts, device=images.device, dtype=dtype)

    @torch.inference_mode()
    def run() -> torch.Tensor:
        with record_function(STAGES[0]):
            normalised = normalise(images).to(dtype)
        with record_function(STAGES[1]):
            local = model.local_net.dense(normalised, plan.local)
        with record_function(STAGES[2]):
            around = model.global_net.shared_features(normalised, plan.holes)
        with record_function(STAGES[3]):
            scores = model.compare(local.float(), around.float())
        with record_function(STAGES[4]):
            return maps_of(scores, patches.origins)

    return run


def kernels(
    run: Callable[[], torch.Tensor], device: torch.device
) -> list[tuple[str, str, int, float]]:
    """What one call runs on the device.

    Returns:
        (stage, kernel, times it runs, microseconds together), by stage, the longest first.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as recorded:
        for _ in range(_CALLS):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    taken: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])

    def add(stage: str, name: str, microseconds: float) -> None:
        entry = taken[stage, name]
        entry[0] += 1
        entry[1] += microseconds

    def below(event: object, stage: str) -> None:
        for child in event.cpu_children:  # type: ignore[attr-defined]
            if device.type == "cuda":
                for kernel in child.kernels:
                    if kernel.name not in STAGES:  # the stage itself is on the device's record too
                        add(stage, kernel.name, kernel.duration)
                below(child, stage)
            else:
                add(stage, child.name, child.cpu_time_total)

    for event in recorded.events():
        if event.name in STAGES:
            below(event, event.name)
    rows = [
        (stage, name, round(count / _CALLS), total / _CALLS)
        for (stage, name), (count, total) in taken.items()
    ]
    return sorted(rows, key=lambda row: (STAGES.index(row[0]), -row[3]))


def summary(rows: list[tuple[str, str, int, float]]) -> list[tuple[str, str, int, float]]:
    """A line for each stage, and one for all."""
    lines = []
    for stage in STAGES:
        of_stage = [row for row in rows if row[0] == stage]
        lines.append((stage, "all", sum(r[2] for r in of_stage), sum(r[3] for r in of_stage)))
    return [*lines, ("all", "all", sum(r[2] for r in rows), sum(r[3] for r in rows))]


@click.command()
@click.option("--images", type=click.IntRange(1), default=1, show_default=True)
@click.option("--grid", default="4", show_default=True, help="A stride, or 'paper'.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="bfloat16",
    show_default=True,
)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--once", is_flag=True, help="One map between the profiler's start and stop.")
def main(images: int, grid: str, dtype: str, device: str, once: bool) -> None:
    """Print what a dense map of random images runs, by stage."""
    torch.manual_seed(0)
    where, number = torch.device(device), getattr(torch, dtype)
    model = Glance(LocalNet()).eval().requires_grad_(False).to(where)
    model.local_net.to(number)
    model.global_net.to(number)
    pictures = torch.rand(images, 3, *IMAGE_SIZE, device=where)
    run = staged_map(model, pictures, grid, number)
    for _ in range(2):
        run()
    if once:
        torch.cuda.synchronize(where)
        torch.cuda.profiler.start()
        run()
        torch.cuda.synchronize(where)
        torch.cuda.profiler.stop()
        return
    rows = kernels(run, where)
    lines = [*summary(rows), *rows]
    click.echo(f"{dtype}, {images} images, grid {grid}, {where}; times of one call")
    click.echo(
        format_table(
            ["stage", "kernel", "runs", "us"],
            [[stage, name[:90], str(count), f"{time:.1f}"] for stage, name, count, time in lines],
        )
    )


if __name__ == "__main__":
    main()
