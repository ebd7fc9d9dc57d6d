"""Measures a setting for one-class CIFAR-10 without its test images: how docs/reproduce.md chose.

Of the training images of one class, 300 are kept apart as normal. Anomalies are made from another
120 (cut in quarters that change places, turned, flipped, with channels exchanged, halves or blends
of two) and from pictures of other things: scikit-image's photographs, cookies and screws. No image
of another class and no test image is read.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from torch import Tensor

from glance_ext.data.cifar import SIZE, Cifar10
from glance_ext.data.images import list_images, load_image
from glance_ext.engine.cifar import SCHEDULE, SETTING, normal_images, scores
from glance_ext.engine.settings import preset
from glance_ext.engine.train import train_loaded
from glance_ext.files import write_json
from glance_ext.metrics import auroc

NORMAL, SOURCES = 300, 120
# No animals: two of scikit-image's pictures show a cat and a horse.
PHOTOGRAPHS = (
    "astronaut",
    "brick",
    "camera",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "immunohistochemistry",
    "moon",
    "page",
    "rocket",
    "text",
)
VARIANTS: dict[str, dict[str, object]] = {
    "chosen": {},
    "half an image": {"patch_scale": 4, "grid": "16", "positions": "16"},
    "stains": {"distortion": "stain"},
    "whitened by patch": {"whiten_over": "patch"},
    "before": {
        "patch_scale": 4,
        "grid": "8",
        "positions": "8",
        "whiten_over": "patch",
        "distortion": "stain",
        "head_steps": 0,
        "held_out_most": 32,
    },
}
HEADS = {"both heads": None, "inconsistency": 1.0, "distortion": 0.0}
"""Their share ``lambda_s``; None for the variant's own."""


def crops(pictures: list[Tensor], count: int, random: torch.Generator) -> Tensor:
    """Squares of random size and place, ``(count, 3, 32, 32)`` uint8."""
    found = []
    for i in range(count):
        picture = pictures[i % len(pictures)]
        height, width = picture.shape[-2:]
        u, v, w = torch.rand(3, generator=random).tolist()
        side = int(48 + u * (min(height, width) - 48))
        row, column = int(v * (height - side + 1)), int(w * (width - side + 1))
        crop = picture[None, :, row : row + side, column : column + side]
        found.append(F.interpolate(crop, (SIZE, SIZE), mode="bilinear", antialias=True)[0])
    return (torch.stack(found) * 255).round().clamp(0, 255).byte()


def photographs() -> list[Tensor]:
    pictures = []
    for name in PHOTOGRAPHS:
        image = np.asarray(getattr(skimage.data, name)()).astype(np.float32) / 255
        image = np.repeat(image[..., None], 3, 2) if image.ndim == 2 else image[..., :3]
        pictures.append(torch.from_numpy(image.transpose(2, 0, 1).copy()))
    return pictures


def things(data: Path) -> list[Tensor]:
    paths = list_images(data / "cookies" / "train" / "good")[:12]
    paths += list_images(data / "mvtec_ad_256" / "screw" / "train" / "good")[:6]
    return [torch.from_numpy(load_image(path).transpose(2, 0, 1).copy()) for path in paths]


def anomalies(images: Tensor, data: Path, random: torch.Generator) -> dict[str, Tensor]:
    """Anomalies of each kind from ``(N, 3, 32, 32)`` uint8."""
    count, half = len(images), SIZE // 2
    others = images[torch.randperm(count, generator=random)]
    left = torch.arange(SIZE) < half
    return {
        "quarters": images.roll(half, 2).roll(half, 3),
        "turned": images.rot90(1, (2, 3)),
        "flipped": images.flip(2),
        "channels": images[:, [2, 0, 1]],
        "halves": torch.where(left, images, others),
        "blends": ((images.int() + others.int()) // 2).byte(),
        "photographs": crops(photographs(), count, random),
        "things": crops(things(data), count, random),
    }


def measure(images: Tensor, data: Path, changes: dict[str, object]) -> dict[str, dict[str, float]]:
    """Image AUROC by head and kind of anomaly, of a model that is trained for it."""
    random = torch.Generator().manual_seed(1)
    order = torch.randperm(len(images), generator=random)
    normal, sources, rest = images[order].split([NORMAL, SOURCES, len(images) - NORMAL - SOURCES])
    chosen = {**SETTING, **SCHEDULE, "positions": SETTING["grid"], **changes}
    settings = preset("default", **chosen)
    with tempfile.TemporaryDirectory() as folder:
        found = train_loaded(
            normal_images(rest, settings), settings, output=Path(folder), show_progress=False
        )
    detector, calibration = found.detector, found.detector.calibration
    labels = np.arange(NORMAL + SOURCES) >= NORMAL
    made = anomalies(sources, data, random)
    results = {}
    for head, share in HEADS.items():
        detector.calibration = replace(
            calibration, lambda_s=settings.lambda_s if share is None else share
        )
        ours = scores(detector, normal).numpy()
        by_kind = {
            kind: auroc(np.concatenate((ours, scores(detector, some).numpy())), labels)
            for kind, some in made.items()
        }
        results[head] = {**by_kind, "mean": sum(by_kind.values()) / len(by_kind)}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with cifar10_images.zip, cookies, screw")
    parser.add_argument("--class", dest="classes", action="append", required=True)
    parser.add_argument("--variant", action="append", choices=list(VARIANTS))
    parser.add_argument("--json", type=Path, required=True, help="read first, so that it goes on")
    options = parser.parse_args()
    found = json.loads(options.json.read_text()) if options.json.exists() else {}
    for name in options.classes:
        images = Cifar10(options.data / "cifar10_images.zip").load("train", name, print)
        for variant in options.variant or VARIANTS:
            if name not in found.setdefault(variant, {}):
                start = time.perf_counter()
                found[variant][name] = measure(images, options.data, VARIANTS[variant])
                seconds = time.perf_counter() - start
                write_json(options.json, found)
                print(f"{name}, {variant}: {seconds:.0f} s", file=sys.stderr)
            for head, by_kind in found[variant][name].items():
                print(name, variant, head, {k: round(v, 3) for k, v in by_kind.items()})


if __name__ == "__main__":
    main()
