"""Curves of an evaluation and of a training, drawn with matplotlib into PNG files.

Figures are drawn without pyplot, on the Agg canvas and in matplotlib's default style, so neither a
display, nor the user's matplotlibrc, nor the figures of a surrounding program play a part.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from glance_ext.files import atomic_write
from glance_ext.report.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve: TypeAlias = tuple[str, np.ndarray, np.ndarray]
"""A label for the legend, the x values and the y values, both ``(N,)``."""

_DOTS_PER_INCH = 120
_PANEL_INCHES = 4.2
_MAX_POINTS = 4000
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f", "#000000")


def plot_roc_pro(
    path: str | os.PathLike[str],
    roc: Sequence[Curve],
    pro: Sequence[Curve],
    limit: float = 0.3,
    title: str = "",
) -> None:
    """Draws each ROC curve in a panel of its own, and the PRO curves in a last one, into a PNG.

    Args:
        path: Where the picture belongs.
        roc: ``(label, fpr, tpr)`` for each panel, usually image and pixel level; the label goes
            into the legend and carries the area if the caller wants it shown.
        pro: ``(label, fpr, pro)`` for each curve of the last panel. The area up to ``limit``, what
            AUPRO measures, is shaded.
        limit: The false positive rate up to which AUPRO is integrated, in (0, 1].
        title: The heading of the whole picture.

    Raises:
        OutputError: The file cannot be written.
        ValueError: There is no curve, x and y differ in length, or ``limit`` is out of range.
    """
    if not roc and not pro:
        raise ValueError("plot_roc_pro: expected at least one curve in roc or pro, got none")
    if not 0 < limit <= 1:
        raise ValueError(f"plot_roc_pro: expected limit in (0, 1], got {limit}")
    for label, x, y in (*roc, *pro):
        if np.ndim(x) != 1 or np.shape(x) != np.shape(y):
            raise ValueError(
                f"plot_roc_pro: expected x and y of {label!r} to be 1-d and of one length, "
                f"got {np.shape(x)} and {np.shape(y)}"
            )

    panels = len(roc) + bool(pro)

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, panels, squeeze=False)[0]
        for axis, (label, x, y) in zip(axes, roc, strict=False):
            axis.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle=":")
            axis.plot(*_thin(x, y), color=_COLOURS[0], linewidth=2, label=_label(label))
            _finish_rates(axis, "ROC", "true positive rate")
        if pro:
            _draw_pro(axes[-1], pro, limit)
        if title:
            figure.suptitle(_label(title), fontsize=14)

    _write(path, (_PANEL_INCHES * panels, _PANEL_INCHES + 0.4 * bool(title)), draw)


def plot_losses(
    path: str | os.PathLike[str], history: Mapping[str, Sequence[tuple[int, float]]]
) -> None:
    """Draws the losses of a training over its steps into a PNG.

    The axis is logarithmic if every finite value is above zero. Values that are not finite leave
    a gap in the line.

    Args:
        path: Where the picture belongs.
        history: For each loss by name, its ``(step, value)`` pairs.

    Raises:
        OutputError: The file cannot be written.
    """
    values = [value for series in history.values() for _, value in series if math.isfinite(value)]

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        for index, (name, series) in enumerate(history.items()):
            points = np.asarray(series, dtype=np.float64).reshape(-1, 2)
            points[~np.isfinite(points[:, 1]), 1] = np.nan
            axis.plot(
                points[:, 0],
                points[:, 1],
                color=_COLOURS[index % len(_COLOURS)],
                linestyle=("-", "--", ":")[index // len(_COLOURS) % 3],
                linewidth=1.6,
                # A lone point draws no line; in short series marks show where the values are.
                marker="o" if len(points) <= 30 else None,
                markersize=4,
                label=_label(name),
            )
        if values and min(values) > 0:
            axis.set_yscale("log")
        if not values:
            axis.text(0.5, 0.5, "no finite value recorded", ha="center", transform=axis.transAxes)
        axis.set_xlabel("step")
        axis.set_ylabel("loss")
        axis.grid(True, which="both", color="0.9")
        axis.set_axisbelow(True)
        _legend(axis, "upper right")

    _write(path, (8, 4.5), draw)


def _draw_pro(axis: Axes, pro: Sequence[Curve], limit: float) -> None:
    for index, (label, x, y) in enumerate(pro):
        colour = _COLOURS[(index + 1) % len(_COLOURS)]
        x, y = _thin(x, y)
        axis.plot(x, y, color=colour, linewidth=2, label=_label(label))
        if x.size:
            below = x <= limit
            at_limit = np.interp(limit, x, y)
            axis.fill_between(
                np.append(x[below], limit),
                np.append(y[below], at_limit),
                color=colour,
                alpha=0.25,
                linewidth=0,
            )
    axis.axvline(limit, color="0.4", linewidth=1, linestyle="--")
    axis.text(limit, 1.015, f"limit {limit:g}", ha="center", fontsize=8, color="0.3")
    _finish_rates(axis, "PRO", "per-region overlap")


def _finish_rates(axis: Axes, title: str, y_label: str) -> None:
    axis.set_title(title, pad=14)
    axis.set_xlabel("false positive rate")
    axis.set_ylabel(y_label)
    # A little room, so that a perfect curve is not hidden by the frame.
    axis.set_xlim(-0.01, 1.01)
    axis.set_ylim(-0.01, 1.01)
    axis.set_aspect("equal")
    axis.grid(True, color="0.9")
    axis.set_axisbelow(True)
    _legend(axis, "lower right")


def _legend(axis: Axes, place: Literal["upper right", "lower right"]) -> None:
    # Curves without a label need none, and matplotlib warns of an empty one.
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc=place)


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drops points that are not finite, and of millions keeps some, even along the curve."""
    x = np.asarray(x, dtype=np.float64)
    y = np.asarray(y, dtype=np.float64)
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if x.size > _MAX_POINTS:
        way = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))])
        keep = np.searchsorted(way, np.linspace(0, way[-1], _MAX_POINTS))
        keep = np.unique(np.append(keep.clip(max=x.size - 1), [0, x.size - 1]))
        x, y = x[keep], y[keep]
    return x, y


def _label(text: str) -> str:
    """Keeps matplotlib from reading ``$`` as mathematics or hiding what begins with ``_``."""
    text = printable(text).replace("$", r"\$")
    return "\u200b" + text if text.startswith("_") else text


def _write(
    path: str | os.PathLike[str], inches: tuple[float, float], draw: Callable[[Figure], None]
) -> None:
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    with matplotlib.style.context("default"), warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes, not reported.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=inches, dpi=_DOTS_PER_INCH, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        figure.savefig(buffer, format="png")
    with atomic_write(path) as stream:
        stream.write(buffer.getvalue())
