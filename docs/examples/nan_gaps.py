"""Smooths and fills a gridded field with gaps, NaN as they come, without cleaning it first.

    python docs/examples/nan_gaps.py --output nan_gaps.png

The field is a made-up sea surface temperature: a gradient, a few eddies, noise. Clouds
hide parts of it, and land has no value at all. A partial convolution with the weights of a Gaussian
is a weighted mean of whatever is known under its window (a normalised convolution), and its mask
says where anything was. Applied again to what is still unknown, it fills the gaps from their edges.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from skimage.filters import gaussian
from torch import Tensor

from glance_ext.ops import partial_conv2d

HEIGHT, WIDTH = 120, 180


def temperature(rng: np.random.Generator) -> Tensor:
    """The true field ``(1, 1, H, W)`` in degrees Celsius."""
    latitude = np.linspace(-1, 1, HEIGHT)[:, None]
    eddies = gaussian(rng.normal(size=(HEIGHT, WIDTH)), 6)
    field = 28 - 18 * latitude**2 + 3 * eddies / eddies.std()
    return torch.from_numpy(field)[None, None].float()


def gaps(rng: np.random.Generator, share: float) -> Tensor:
    """Where clouds or land hide the field, ``(1, 1, H, W)`` bool."""
    noise = gaussian(rng.normal(size=(HEIGHT, WIDTH)), 4)
    clouds = noise > np.quantile(noise, 1 - share)
    clouds[40:100, :25] = True
    return torch.from_numpy(clouds)[None, None]


def bell(sigma: float) -> Tensor:
    """The weights of a Gaussian, ``(1, 1, k, k)``, summing to 1."""
    radius = int(3 * sigma)
    line = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    weight = line[:, None] * line
    return (weight / weight.sum())[None, None]


def smoothed(field: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted mean of the values under each window that are not NaN, and where there are any.

    A partial convolution scales by the share of pixels that are known; a mean by weights needs the
    share of weight, which is the same sum over ones.
    """
    known = ~field.isnan()
    padding = weight.shape[-1] // 2
    total, seen = partial_conv2d(field, known, weight, padding=padding)
    share, _ = partial_conv2d(torch.ones_like(field), known, weight, padding=padding)
    return torch.where(seen, total / share, torch.nan), seen


def filled(field: Tensor, weight: Tensor) -> Tensor:
    """The field with its gaps filled from their edges inwards."""
    while field.isnan().any():
        mean, _ = smoothed(field, weight)
        field = torch.where(field.isnan(), mean, field)
    return field


def usual(field: Tensor, weight: Tensor) -> Tensor:
    """What plain convolution makes of gaps set to the field's mean."""
    known = torch.where(field.isnan(), field.nanmean(), field)
    padding = weight.shape[-1] // 2
    mean = F.conv2d(F.pad(known, [padding] * 4, mode="replicate"), weight)
    return torch.where(field.isnan(), mean, field)


def draw(path: Path, fields: dict[str, Tensor]) -> None:
    """The fields side by side, on one scale."""
    figure = Figure(figsize=(3.4 * len(fields), 2.9), layout="constrained")
    FigureCanvasAgg(figure)
    truth = fields["truth"]
    for axes, (title, field) in zip(figure.subplots(1, len(fields)), fields.items(), strict=True):
        shown = axes.imshow(field[0, 0], vmin=truth.min(), vmax=truth.max(), cmap="turbo")
        axes.set_title(title, fontsize=10)
        axes.axis("off")
    figure.colorbar(shown, ax=figure.axes, shrink=0.8, label="°C")
    figure.savefig(path, dpi=80)


@click.command()
@click.option("--share", default=0.4, help="Of the field that clouds hide.")
@click.option("--seed", default=0, help="Of field, noise and clouds.")
@click.option("--output", type=click.Path(path_type=Path), default="nan_gaps.png")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Where figures go.")
def main(share: float, seed: int, output: Path, json_file: Path | None) -> None:
    """Fills the gaps, prints the error in them and draws the fields."""
    rng = np.random.default_rng(seed)
    truth = temperature(rng)
    noise = torch.from_numpy(rng.normal(0, 0.3, truth.shape)).float()
    hidden = gaps(rng, share)
    field = torch.where(hidden, torch.nan, truth + noise)
    weight = bell(2.0)
    results = {
        "gaps set to the mean": usual(field, weight),
        "partial convolution": filled(field, weight),
    }
    errors = {name: float((one - truth)[hidden].abs().mean()) for name, one in results.items()}
    for name, error in errors.items():
        click.echo(f"{name}: mean absolute error {error:.2f} °C in the gaps")
    draw(output, {"with gaps": field, **results, "truth": truth})
    if json_file:
        figures = {"hidden": float(hidden.float().mean()), "gap_error": errors}
        json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
