"""Fills holes in photographs: a U-Net of partial convolutions, trained in minutes on two CPU cores.

    python docs/examples/inpainting.py --output inpainting.png

The network is that of Liu et al. (ECCV 2018) made small: every layer sees the image and a mask of
what is known of it, and hands on both. It learns from six of scikit-image's photographs, with
random strokes cut out, and is tried on a seventh that it never saw.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import click
import numpy as np
import skimage.data
import skimage.draw
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from skimage.restoration import inpaint_biharmonic
from torch import Tensor, nn
from tqdm import tqdm

from glance_ext.nn import PartialConv2d

TRAINED_ON = ("astronaut", "coffee", "camera", "grass", "gravel", "brick")
TRIED_ON = "chelsea"
CROP, BATCH = 64, 16


class PartialUNet(nn.Module):
    """Encoder and decoder of partial convolutions; what is known of a pixel travels beside it."""

    ENCODER = ((3, 32, 7), (32, 64, 5), (64, 128, 3), (128, 128, 3))
    DECODER = ((128 + 128, 128), (128 + 64, 64), (64 + 32, 32), (32 + 3, 3))

    def __init__(self) -> None:
        super().__init__()
        both = {"multi_channel": True, "return_mask": True}
        self.down = nn.ModuleList(
            PartialConv2d(c, k, size, stride=2, padding=size // 2, **both)
            for c, k, size in self.ENCODER
        )
        self.up = nn.ModuleList(PartialConv2d(c, k, 3, padding=1, **both) for c, k in self.DECODER)

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """Images ``(N, 3, H, W)`` and masks ``(N, 1, H, W)``, sides multiples of 16."""
        x, known = image, mask.expand_as(image)
        skips = []
        for layer in self.down:
            skips.append((x, known))
            x, known = layer(x, known)
            x = F.relu(x)
        for layer in self.up:
            skip, skip_known = skips.pop()
            x = torch.cat([F.interpolate(x, scale_factor=2), skip], 1)
            known = torch.cat([F.interpolate(known.float(), scale_factor=2).bool(), skip_known], 1)
            x, known = layer(x, known)
            x = F.leaky_relu(x, 0.2) if skips else x
        return x


def photograph(name: str) -> Tensor:
    """``(3, H, W)`` between 0 and 1."""
    picture = np.atleast_3d(getattr(skimage.data, name)()) / 255
    height, width = picture.shape[:2]
    return (
        torch.from_numpy(np.broadcast_to(picture, (height, width, 3)).copy()).float().movedim(2, 0)
    )


def strokes(height: int, width: int, rng: np.random.Generator, share: float = 0.2) -> Tensor:
    """A mask ``(1, height, width)``, False on thick strokes that cover ``share`` of it."""
    mask = np.ones((height, width), bool)
    while mask.mean() > 1 - share:
        row, column, angle = rng.uniform(0, (height, width, 2 * np.pi))
        radius = rng.uniform(2, 6)
        for _ in range(rng.integers(4, 12)):
            mask[skimage.draw.disk((row, column), radius, shape=mask.shape)] = False
            angle += rng.normal(0, 0.6)
            row, column = row + radius * np.sin(angle), column + radius * np.cos(angle)
    return torch.from_numpy(mask)[None]


def batch(pictures: list[Tensor], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Crops ``(N, 3, 64, 64)`` and their masks ``(N, 1, 64, 64)``."""
    crops = []
    for _ in range(BATCH):
        picture = pictures[rng.integers(len(pictures))]
        row, column = (rng.integers(side - CROP + 1) for side in picture.shape[1:])
        crop = picture[:, row : row + CROP, column : column + CROP]
        crops.append(crop.flip(2) if rng.random() < 0.5 else crop)
    return torch.stack(crops), torch.stack([strokes(CROP, CROP, rng) for _ in range(BATCH)])


def loss_of(filled: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error, six times as much of it in the holes."""
    error = (filled - image).abs()
    return torch.where(mask, error, 6 * error).mean()


def train(steps: int, seed: int) -> tuple[PartialUNet, list[float]]:
    """A trained network and the loss of every step."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    pictures = [photograph(name) for name in TRAINED_ON]
    network, losses = PartialUNet(), []
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in (progress := tqdm(range(steps), unit="step")):
        image, mask = batch(pictures, rng)
        loss = loss_of(network(image, mask), image, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{np.mean(losses[-50:]):.4f}")
    return network.eval(), losses


def fillings(network: PartialUNet, image: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The image's holes filled by the network and by what needs no training."""
    known = (image * mask).sum((1, 2)) / mask.sum()
    with torch.no_grad():
        filled = network(torch.where(mask, image, torch.nan)[None], mask[None])[0]
    smooth = inpaint_biharmonic(image.movedim(0, 2).numpy(), ~mask[0].numpy(), channel_axis=2)
    return {
        "mean colour": torch.where(mask, image, known[:, None, None]),
        "biharmonic": torch.from_numpy(smooth).movedim(2, 0).float(),
        "partial convolutions": torch.where(mask, image, filled.clamp(0, 1)),
    }


def draw(path: Path, pictures: dict[str, Tensor]) -> None:
    """The pictures side by side."""
    figure = Figure(figsize=(3.4 * len(pictures), 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, picture) in zip(
        figure.subplots(1, len(pictures)), pictures.items(), strict=True
    ):
        axes.imshow(picture.movedim(0, 2).clamp(0, 1))
        axes.set_title(title, fontsize=10)
        axes.axis("off")
    figure.savefig(path, dpi=80)


@click.command()
@click.option("--steps", default=1000, help="Of training, 16 crops each.")
@click.option("--seed", default=0, help="Of weights, crops and holes.")
@click.option("--output", type=click.Path(path_type=Path), default="inpainting.png")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Where figures go.")
def main(steps: int, seed: int, output: Path, json_file: Path | None) -> None:
    """Trains, fills a photograph's holes, prints the error in them and draws the pictures."""
    start = time.perf_counter()
    network, losses = train(steps, seed)
    image = photograph(TRIED_ON)[:, :288, :448]
    mask = strokes(288, 448, np.random.default_rng(99))
    filled = fillings(network, image, mask)
    hole = ~mask.expand_as(image)
    errors = {name: float((one - image)[hole].abs().mean()) for name, one in filled.items()}
    for name, error in errors.items():
        click.echo(f"{name}: mean absolute error {error:.4f} in the holes")
    draw(output, {"with holes": torch.where(mask, image, 1), **filled, "truth": image})
    if json_file:
        figures = {
            "steps": steps,
            "seconds": round(time.perf_counter() - start),
            "first_loss": float(np.mean(losses[:50])),
            "last_loss": float(np.mean(losses[-50:])),
            "hole_error": errors,
        }
        json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
