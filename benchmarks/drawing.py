"""Draws how detection shares its work: docs/images/shared-computation.png.

    python benchmarks/drawing.py

Windows and places are those that the package's own plans compute for the hole and the patches of
the picture.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from glance_ext.data.grid import patch_grid
from glance_ext.models.global_net import GlobalNet
from glance_ext.models.local_net import LocalNet

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "shared-computation.png"
HOLE = (72, 140)  # row and column
PATCH = 33
_BASE, _WINDOW, _HOLE, _OTHER, _BOTH = "#e3e3e3", "#56b4e9", "#404040", "#d55e00", "#0072b2"


def hole_windows() -> list[tuple[int, int, int, int]]:
    """For the image and each layer's output: its side, and the window's row, column and side."""
    network = GlobalNet()
    plan = network.plan(torch.tensor([HOLE]), PATCH, (256, 256))
    (geometry,) = plan.chunks
    extents = [step.extents[0].tolist() for step in geometry.steps]
    extents.append(geometry.extents[0].tolist())
    layers = network.through_holes()._layers
    sides = [256]
    for layer in layers:
        sides.append(layer.shape.output_length(sides[-1], 0))
    return [
        (side, row, column, rows)
        for side, (row, column, rows, _) in zip(sides, extents, strict=True)
    ]


def places(starts: list[int]) -> list[tuple[str, int, set[int]]]:
    """For the image and each layer's output: name, step, and the places that patches need.

    The unit of places is the pixel at which an activation's view of the image begins.
    """
    layers = LocalNet().layers
    windows = [
        (int(layer.kernel_size if isinstance(layer.kernel_size, int) else layer.kernel_size[0]),
         int(layer.stride if isinstance(layer.stride, int) else layer.stride[0]))
        for layer in layers if hasattr(layer, "kernel_size")
    ]  # fmt: skip
    strides = [1]
    for _, stride in windows:
        strides.append(strides[-1] * stride)
    needed = [set(starts)]
    for (kernel, _), step in zip(reversed(windows), reversed(strides[:-1]), strict=True):
        needed.insert(0, {place + i * step for place in needed[0] for i in range(kernel)})
    names = ("image", "5x5", "pool", "5x5", "pool", "2x2", "4x4: feature")
    return list(zip(names, strides, needed, strict=True))


def draw(path: Path) -> None:
    """Both halves of the picture."""
    figure = Figure(figsize=(13, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, height_ratios=(1.15, 1))
    _draw_global(above)
    _draw_local(below)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _draw_global(axes: Any) -> None:
    x, names = 0.0, ("image", "7x7 /2", "pool /2", "3x3 /2", "3x3", "3x3 /2", "3x3", "3x3 /2",
                     "3x3", "3x3")  # fmt: skip
    for (side, row, column, window), name in zip(hole_windows(), names, strict=True):
        size = 4.0 * (side / 256) ** 0.5  # roots, so that the small maps can be seen
        unit = size / side
        y = 2.2 - size / 2
        axes.add_patch(Rectangle((x, y), size, size, facecolor=_BASE, edgecolor="#9a9a9a"))
        colour = _HOLE if side == 256 else _WINDOW
        axes.add_patch(
            Rectangle(
                (x + column * unit, y + row * unit), window * unit, window * unit, facecolor=colour
            )
        )
        axes.text(x + size / 2, -0.18, name, ha="center", va="bottom", fontsize=9)
        share = f"{100 * window**2 / side**2:.0f} %" if side > 1 else "all"
        told = "hole 33x33" if side == 256 else f"{window}x{window} of {side}x{side}\n{share}"
        axes.text(x + size / 2, 4.35, told, ha="center", va="top", fontsize=8)
        x += max(size, 1.15) + 0.45
    axes.set_title(
        "Global-Net: one pass without holes (grey), and for each hole only the window that it "
        "reaches (blue), reading the rest from the grey maps",
        fontsize=10,
        loc="left",
    )
    axes.set_xlim(-0.2, x)
    axes.set_ylim(4.5, -0.6)
    axes.set_aspect("equal")
    axes.axis("off")


def _draw_local(axes: Any) -> None:
    last = 256 - PATCH
    starts = [start for start in patch_grid(4).starts if start > 184]
    regular = places([start for start in starts if start != last])
    flush = places([last])
    alone = [places([start]) for start in starts]
    for line, ((name, step, a), (_, _, b)) in enumerate(zip(regular, flush, strict=True)):
        for where, colour in ((a - b, _WINDOW), (a & b, _BOTH), (b - a, _OTHER)):
            height = [line] * len(where)
            axes.scatter(sorted(where), height, s=22, c=colour, marker="s", linewidths=0)
        axes.text(185.5, line, f"{name}  (step {step})", ha="right", va="center", fontsize=9)
        told = f"{len(a | b)} places"
        if line:
            told += f" instead of {sum(len(of_patch[line][2]) for of_patch in alone)}"
        axes.text(257, line, told, va="center", fontsize=8)
    labels = (
        (_WINDOW, f"patches that begin at {starts[0]}, {starts[1]}, ... {starts[-2]}"),
        (_OTHER, f"the last patch, flush with the border, at {last}"),
        (_BOTH, "both"),
    )
    for colour, label in labels:
        axes.scatter([], [], s=30, c=colour, marker="s", label=label)
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=3)
    axes.set_title(
        "Local-Net, one row of patches at the right border: every place (the pixel at which its "
        "view begins) is computed once.\nA pool keeps every other place, and which ones depends on "
        "where the patch begins: behind it, only patches of equal remainder share.",
        fontsize=10,
        loc="left",
    )
    axes.set_xlim(172, 272)
    axes.set_ylim(6.5, -0.6)
    axes.axis("off")


if __name__ == "__main__":
    draw(PICTURE)
