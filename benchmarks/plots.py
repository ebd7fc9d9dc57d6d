"""Writes the figures of the committed results into the documents, and draws them.

    python benchmarks/plots.py

reads benchmarks/results/*.json, rewrites every region between ``<!-- table: NAME -->`` and
``<!-- end -->`` in README.md, docs/ops.md and docs/performance.md, and draws
docs/images/detect-speed.png. No figure there is typed by hand; tests/bench/test_plots.py holds the
documents to the files.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import statistics
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "ops.md", ROOT / "docs" / "performance.md")
PICTURE = ROOT / "docs" / "images" / "detect-speed.png"

STAGES = {
    "map": "all",
    "local": "Local-Net",
    "global": "Global-Net",
    "scores": "scores",
    "aggregate": "map of scores",
}
GRIDS = {
    "paper_n1": "paper",
    "stride16_n1": "stride 16",
    "stride8_n1": "stride 8",
    "stride4_n1": "stride 4",
    "stride2_n1": "stride 2",
}
BATCHES = (1, 2, 4, 8, 16)
SIDES = (256, 512, 1024)
DTYPES = ("float32", "bfloat16", "float16")

_GREY, _DARK, _LIGHT = "#8c8c8c", "#0072b2", "#56b4e9"
_REGION = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Run:
    """One result file."""

    file: str
    metadata: Mapping[str, Any]
    rows: Mapping[tuple[str, str], Mapping[str, Any]]

    def get(self, case: str, variant: str, key: str = "median_ms") -> float | None:
        """A figure, or None if it was not measured."""
        value = self.rows.get((case, variant), {}).get(key)
        return None if value is None else float(value)

    def ratio(self, case: str, above: str, below: str, key: str = "median_ms") -> float | None:
        """How many times the median, or another figure, of one variant is that of another."""
        numerator, denominator = self.get(case, above, key), self.get(case, below, key)
        return numerator / denominator if numerator and denominator else None

    @property
    def machine(self) -> str:
        """The GPU, or the CPU and its cores."""
        m = self.metadata
        return m["gpu"] or f"{m['cpu']}, {m['cores']} cores"

    @property
    def dtype(self) -> str:
        """Of the networks; float32 that may round its factors is TF32."""
        tf32 = self.metadata.get("tf32")
        return "tf32" if tf32 and self.metadata["dtype"] == "float32" else self.metadata["dtype"]


def load(folder: Path, suite: str) -> list[Run]:
    """The committed runs of a suite: CPUs before GPUs, float32 first."""
    runs = []
    for path in sorted(folder.glob(f"{suite}--*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        rows = {(row["case"], row["variant"]): row for row in results["results"]}
        runs.append(Run(path.name, results["metadata"], rows))
    return sorted(
        runs, key=lambda r: (r.metadata["gpu"] or "", r.machine, DTYPES.index(r.metadata["dtype"]))
    )


def regions(folder: Path = RESULTS) -> dict[str, str]:
    """The text of every region by name."""
    detect, ops = load(folder, "detect"), load(folder, "ops")
    convolutions, training = load(folder, "partial-conv"), load(folder, "train")
    return {
        "detect-sentence": sentence(detect[0]),
        "detect-goal": goal_table(detect),
        "detect-stages": stage_table(detect),
        "detect-grids": grid_table(detect),
        "detect-batches": batch_table(detect),
        "detect-sizes": size_table(detect),
        "detect-files": files(detect),
        "train-files": files(training),
        "train-steps": train_table(training),
        "ops-files": files(ops),
        "partial-conv-files": files(convolutions),
        "partial-conv-summary": network_table(convolutions, ("all",)),
        "partial-conv-networks": network_table(convolutions),
        "partial-conv-layers": layer_table(convolutions),
        "ops-aggregate": ops_table(
            ops,
            "aggregate_patch_scores",
            ("reference/ours", "fold/ours", "ours/copy", "ours/limit"),
        ),
    }


def rewrite(text: str, of_region: Mapping[str, str]) -> str:
    """A document with its regions filled in."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}{of_region[match[2]]}\n{match[3]}"

    return _REGION.sub(fill, text)


def sentence(run: Run) -> str:
    """What README.md says of the speed."""
    case, alone = "detect/map/stride4_n1", "detect/alone/stride4_n1"
    patches = run.metadata["shapes"][case]["patches"]
    return (
        f"A dense anomaly map, {patches:,} overlapping patches of a 256x256 image, takes "
        f"{ms(run.get(case, 'ours'))} ms on {run.machine} ({run.dtype}), "
        f"{times(run.ratio(case, 'reference', 'ours'))} faster than the same map in plain PyTorch "
        f"({times(run.ratio(alone, 'reference', 'ours'))} with a fresh process each) "
        f"and {times(run.ratio(case, 'ours', 'limit'))} what that machine's best matrix product "
        "needs for the multiplications of the convolutions as sums."
    )


def files(runs: Iterable[Run]) -> str:
    """Which files the figures are of, and where and with what those were measured."""
    lines = []
    for run in runs:
        m, rates = run.metadata, run.metadata["rates"]
        by = f" ({rates['matrix_by']})" if "matrix_by" in rates else ""
        lines.append(
            f"- [benchmarks/results/{run.file}](../benchmarks/results/{run.file}): {run.machine}, "
            f"{m['threads']} threads, torch {m['torch']}, {m['date']}; "
            f"{rates['matrix_tflops'] * 1e3 / 2:.0f} billion multiply-adds a second{by}, "
            f"{rates['copy_gb_s']:.0f} GB/s copied"
        )
    return "\n".join(lines)


def goal_table(runs: Iterable[Run]) -> str:
    """Latency of one image, throughput of 16, against reference and limit; a CUDA graph's too."""
    one, many = "detect/map/stride4_n1", "detect/map/stride4_n16"
    alone = "detect/alone/stride4_n1"
    head = (
        "machine, dtype", "P50 ms", "P95 ms", "reference ms", "reference / ours",
        "each alone: reference ms", "reference / ours",
        "patch by patch / ours", "ours / limit", "peak MiB", "16 images: images a second",
        "ours / limit", "peak MiB", "largest error, relative",
    )  # fmt: skip
    body = []
    ways = (("ours", ""), ("ours-graph", ", CUDA graph"))
    for run, (ours, how) in itertools.product(runs, ways):
        if run.get(one, ours) is None:
            continue
        batch = run.get(many, ours)
        error = run.metadata["relative_errors"][one][ours]
        body.append(
            [
                f"{run.machine}, {run.dtype}{how}",
                ms(run.get(one, ours)),
                ms(run.get(one, ours, "p95_ms")),
                ms(run.get(one, "reference")),
                times(run.ratio(one, "reference", ours)),
                ms(run.get(alone, "reference")),
                times(run.ratio(alone, "reference", ours)),
                times(run.ratio(one, "patches", ours)),
                times(run.ratio(one, ours, "limit")),
                mib(run.get(one, ours, "peak_mib")),
                "-" if batch is None else number(16e3 / batch),
                times(run.ratio(many, ours, "limit")),
                mib(run.get(many, ours, "peak_mib")),
                f"{error:.1e}",
            ]
        )
    return table(head, body)


def stage_table(runs: Iterable[Run]) -> str:
    """The floor first, then the measured time, then what is between them."""
    head = (
        "machine, dtype, stage", "billion multiply-adds", "floor ms", "measured ms",
        "difference ms", "measured / floor", "reference ms", "reference / ours", "peak MiB",
        "reference's peak MiB",
    )  # fmt: skip
    body = []
    for run in runs:
        for stage, title in STAGES.items():
            case = f"detect/{stage}/stride4_n1"
            floor, ours = run.get(case, "limit"), run.get(case, "ours")
            if floor is None or ours is None:
                continue
            body.append(
                [
                    f"{run.machine}, {run.dtype}, {title}",
                    number(run.metadata["shapes"][case]["least_gflop"] / 2),
                    ms(floor),
                    ms(ours),
                    ms(ours - floor),
                    times(ours / floor),
                    ms(run.get(case, "reference")),
                    times(run.ratio(case, "reference", "ours")),
                    mib(run.get(case, "ours", "peak_mib")),
                    mib(run.get(case, "reference", "peak_mib")),
                ]
            )
    return table(head, body)


def grid_table(runs: Iterable[Run]) -> str:
    """How time grows with the density of the grid."""
    head = (
        "machine, dtype, grid", "patches", "ours ms", "µs a patch", "limit ms", "ours / limit",
        "reference ms", "reference / ours", "peak MiB",
    )  # fmt: skip
    body = []
    for run in runs:
        for grid, title in GRIDS.items():
            case = f"detect/map/{grid}"
            ours = run.get(case, "ours")
            if ours is None:
                continue
            patches = run.metadata["shapes"][case]["patches"]
            body.append(
                [
                    f"{run.machine}, {run.dtype}, {title}",
                    f"{patches:,}",
                    ms(ours),
                    number(1e3 * ours / patches),
                    ms(run.get(case, "limit")),
                    times(run.ratio(case, "ours", "limit")),
                    ms(run.get(case, "reference")),
                    times(run.ratio(case, "reference", "ours")),
                    mib(run.get(case, "ours", "peak_mib")),
                ]
            )
    return table(head, body)


def batch_table(runs: Iterable[Run]) -> str:
    """How time grows with the number of images."""
    head = ("machine, dtype, images", "ours ms", "ms an image", "images a second", "ours / limit",
            "peak MiB")  # fmt: skip
    body = []
    for run in runs:
        for count in BATCHES:
            case = f"detect/map/stride4_n{count}"
            ours = run.get(case, "ours")
            if ours is not None:
                body.append(
                    [
                        f"{run.machine}, {run.dtype}, {count}",
                        ms(ours),
                        ms(ours / count),
                        number(1e3 * count / ours),
                        times(run.ratio(case, "ours", "limit")),
                        mib(run.get(case, "ours", "peak_mib")),
                    ]
                )
    return table(head, body)


def size_table(runs: Iterable[Run]) -> str:
    """How time grows with the size of the image."""
    head = ("machine, dtype, image", "windows", "ours ms", "ms a window", "ours / limit",
            "peak MiB")  # fmt: skip
    body = []
    for run in runs:
        for side in SIDES:
            case = f"detect/windows/stride8_{side}px"
            ours = run.get(case, "ours")
            if ours is not None:
                windows = run.metadata["shapes"][case]["windows"]
                body.append(
                    [
                        f"{run.machine}, {run.dtype}, {side}x{side}",
                        str(windows),
                        ms(ours),
                        ms(ours / windows),
                        times(run.ratio(case, "ours", "limit")),
                        mib(run.get(case, "ours", "peak_mib")),
                    ]
                )
    return table(head, body)


def ops_table(runs: Iterable[Run], op: str, ratios: Iterable[str]) -> str:
    """Ratios of medians, a row for each case."""
    pairs = [ratio.split("/") for ratio in ratios]
    body = []
    for run in runs:
        for case in dict.fromkeys(case for case, _ in run.rows if case.startswith(f"{op}/")):
            found = [run.ratio(case, above, below) for above, below in pairs]
            body.append([case, *("-" if value is None else f"{value:.2f}" for value in found)])
    return table(("case", *(f"{above} / {below}" for above, below in pairs)), body)


def network_table(runs: Iterable[Run], networks: Container[str] | None = None) -> str:
    """``partial_conv2d`` by network: geometric means over its layers, and the worst of them."""
    head = (
        "machine, dtype, layers of", "", "layers", "time ours / conv2d", "at the most",
        "memory ours / conv2d", "at the most", "nvidia / ours", "at the least",
        "nvidia compiled / ours", "at the least", "library / fused",
    )  # fmt: skip
    body = []
    for run in runs:
        groups: dict[tuple[str, str], list[str]] = {}
        overall: dict[tuple[str, str], list[str]] = {}
        for case in dict.fromkeys(case for case, _ in run.rows):
            network, direction, _ = case.split("/")
            groups.setdefault((network, direction), []).append(case)
            overall.setdefault(("all", direction), []).append(case)
        groups |= overall
        for (network, direction), cases in groups.items():
            if networks is not None and network not in networks:
                continue
            found = partial(_mean_and_worst, run, cases)
            body.append(
                [
                    f"{run.machine}, {run.dtype}, {network}",
                    direction.replace("_", " + "),
                    str(len(cases)),
                    *found("ours", "conv2d", max),
                    *found("ours", "conv2d", max, "peak_mib"),
                    *found("nvidia", "ours", min),
                    *found("nvidia-compiled", "ours", min),
                    found("ours-library", "ours-fused", min)[0],
                ]
            )
    return table(head, body)


def train_table(runs: Iterable[Run]) -> str:
    """Steps of joint training: patches a second, and how many times those of other ways."""
    head = (
        "machine, dtype", "patches lie", "patches an image", "uses of a stain", "reference ms",
        "patch by patch ms",
        "ours ms, stained anew", "ours ms", "ours: patches a second", "reference / ours",
        "patch by patch / ours", "ours / limit",
    )  # fmt: skip
    body = []
    for run in runs:
        for case in dict.fromkeys(case for case, _ in run.rows):
            shapes = run.metadata["shapes"][case]
            where = shapes["positions"]
            median = run.get(case, "ours")
            assert median is not None
            body.append(
                [
                    f"{run.machine}, {run.dtype}",
                    "anywhere" if where == "uniform" else f"on a stride-{where} grid",
                    str(shapes["holes_per_image"]),
                    str(shapes.get("stain_uses", 4)),  # which earlier files do not say
                    ms(run.get(case, "reference")),
                    ms(run.get(case, "patches")),
                    ms(run.get(case, "ours-anew")),
                    ms(median),
                    number(shapes["patches"] * 1e3 / median),
                    times(run.ratio(case, "reference", "ours")),
                    times(run.ratio(case, "patches", "ours")),
                    times(run.ratio(case, "ours", "limit")),
                ]
            )
    return table(head, body)


def _mean_and_worst(
    run: Run,
    cases: Iterable[str],
    above: str,
    below: str,
    worst: Callable[[list[float]], float],
    key: str = "median_ms",
) -> tuple[str, str]:
    """The geometric mean of a ratio over some cases, and its worst value."""
    found = [value for case in cases if (value := run.ratio(case, above, below, key))]
    if not found:
        return "-", "-"
    return times(statistics.geometric_mean(found)), times(worst(found))


def layer_table(runs: Iterable[Run]) -> str:
    """``partial_conv2d`` layer by layer."""
    head = (
        "machine, dtype, layer", "conv2d ms", "ours ms", "ours / conv2d", "memory ours / conv2d",
        "fused ms", "library ms", "nvidia / ours", "nvidia compiled / ours", "ours / limit",
    )  # fmt: skip
    body = []
    for run in runs:
        for case in dict.fromkeys(case for case, _ in run.rows):
            body.append(
                [
                    f"{run.machine}, {run.dtype}, {case}",
                    ms(run.get(case, "conv2d")),
                    ms(run.get(case, "ours")),
                    times(run.ratio(case, "ours", "conv2d")),
                    times(run.ratio(case, "ours", "conv2d", "peak_mib")),
                    ms(run.get(case, "ours-fused")),
                    ms(run.get(case, "ours-library")),
                    times(run.ratio(case, "nvidia", "ours")),
                    times(run.ratio(case, "nvidia-compiled", "ours")),
                    times(run.ratio(case, "ours", "limit")),
                ]
            )
    return table(head, body)


def table(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    titles = list(head)
    lines = [titles, ["---"] * len(titles), *map(list, body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float) -> str:
    """Three digits."""
    if value < 0:
        return f"-{number(-value)}"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{1 if value >= 10 else 2 if value >= 1 else 3}f}"


def ms(value: float | None) -> str:
    """Milliseconds."""
    return "-" if value is None else number(value)


def mib(value: float | None) -> str:
    """MiB."""
    return "-" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def times(value: float | None) -> str:
    """A ratio."""
    return "-" if value is None else f"{number(value)}x"


def digest(folder: Path = RESULTS) -> str:
    """Of the files that the picture shows; it is written into the picture."""
    data = b"".join(path.read_bytes() for path in sorted(folder.glob("detect--*.json")))
    return hashlib.sha256(data).hexdigest()


def draw(path: Path, folder: Path = RESULTS) -> None:
    """One row of panels for each machine: stages, grids, batches."""
    machines: dict[str, list[Run]] = {}
    for run in load(folder, "detect"):
        machines.setdefault(run.machine, []).append(run)
    figure = Figure(figsize=(13, 4.1 * len(machines)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(machines), 3, squeeze=False, width_ratios=(1.5, 1, 1))
    for row, (machine, runs) in zip(panels, machines.items(), strict=True):
        _draw_stages(row[0], runs)
        _draw_grids(row[1], runs)
        _draw_batches(row[2], runs)
        row[0].set_title(f"{machine}: one image, stride 4", fontsize=10)
        row[1].set_title("denser grids, one image", fontsize=10)
        row[2].set_title("larger batches, stride 4", fontsize=10)
    figure.savefig(path, dpi=100, metadata={"Software": None, "Description": digest(folder)})


def _draw_stages(axes: Any, runs: list[Run]) -> None:
    first = runs[0]
    bars = [(first, "reference", f"plain PyTorch, {first.dtype}", _GREY)]
    bars += [
        (run, "ours", f"glance-ext, {run.dtype}", colour)
        for run, colour in zip(runs, (_DARK, _LIGHT, "#009e73"), strict=False)
    ]
    width = 0.8 / len(bars)
    for index, (run, variant, label, colour) in enumerate(bars):
        places, heights, limits = [], [], []
        for place, stage in enumerate(STAGES):
            case = f"detect/{stage}/stride4_n1"
            value = run.get(case, variant)
            if value is not None:
                places.append(place + (index - (len(bars) - 1) / 2) * width)
                heights.append(value)
                limits.append(run.get(case, "limit"))
        drawn = axes.bar(places, heights, width * 0.94, color=colour, label=label)
        axes.bar_label(drawn, [number(height) for height in heights], fontsize=7, padding=2)
        if variant == "ours":
            axes.hlines(
                limits,
                [place - width / 2 for place in places],
                [place + width / 2 for place in places],
                color="black",
                linewidth=1.6,
                label="limit of the machine" if run is first else None,
            )
    axes.set_yscale("log")
    axes.set_ylabel("milliseconds")
    axes.set_xticks(range(len(STAGES)), STAGES.values(), fontsize=8)
    axes.margins(y=0.14)
    axes.legend(fontsize=7, frameon=False)
    _tidy(axes)


def _draw_grids(axes: Any, runs: list[Run]) -> None:
    first = runs[0]
    lines = [(first, "reference", f"plain PyTorch, {first.dtype}", _GREY, "o-")]
    for run, colour in zip(runs, (_DARK, _LIGHT, "#009e73"), strict=False):
        lines.append((run, "ours", f"glance-ext, {run.dtype}", colour, "o-"))
        lines.append((run, "limit", None, colour, ":"))
    for run, variant, label, colour, style in lines:
        points = []
        for grid in GRIDS:
            case = f"detect/map/{grid}"
            value = run.get(case, variant)
            if value is not None and grid != "paper_n1":
                points.append((run.metadata["shapes"][case]["patches"], value))
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, style, color=colour, markersize=4, label=label)
    axes.plot([], [], ":", color="black", label="limit")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("patches (strides 16, 8, 4, 2)")
    axes.set_ylabel("milliseconds")
    axes.legend(fontsize=7, frameon=False)
    _tidy(axes)


def _draw_batches(axes: Any, runs: list[Run]) -> None:
    for run, colour in zip(runs, (_DARK, _LIGHT, "#009e73"), strict=False):
        for variant, style in (("ours", "o-"), ("limit", ":")):
            points = []
            for count in BATCHES:
                value = run.get(f"detect/map/stride4_n{count}", variant)
                if value is not None:
                    points.append((count, 1e3 * count / value))
            x, y = zip(*points, strict=True)
            label = f"glance-ext, {run.dtype}" if variant == "ours" else None
            axes.plot(x, y, style, color=colour, markersize=4, label=label)
    axes.plot([], [], ":", color="black", label="limit")
    axes.set_xscale("log", base=2)
    axes.set_xticks(BATCHES, map(str, BATCHES))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("images in a batch")
    axes.set_ylabel("images a second")
    axes.legend(fontsize=7, frameon=False)
    _tidy(axes)


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    axes.set_axisbelow(True)


def main() -> None:
    of_region = regions()
    for path in DOCUMENTS:
        path.write_text(rewrite(path.read_text(encoding="utf-8"), of_region), encoding="utf-8")
    draw(PICTURE)


if __name__ == "__main__":
    main()
