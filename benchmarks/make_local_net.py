"""Makes the Local-Net that ships with the package: glance_ext/weights/local_net.safetensors.

Distils the offline teacher (tf_efficientnet_lite0, ImageNet) into Local-Net on CIFAR-10's training
images, the pictures that scikit-image's wheel carries, and the training images of data sets in the
MVTec layout. No test image is read. docs/method.md records the figures of the run that was shipped.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image

from glance_ext.data.images import list_images, load_image
from glance_ext.engine.distill import DistillSettings, distill, packaged_local_net
from glance_ext.models.teacher import load_teacher

# Pictures under CC0 or in the public domain, by scikit-image's own notes.
PICTURES = (
    "astronaut",
    "brick",
    "camera",
    "cat",  # the same picture as chelsea, which so counts twice
    "chelsea",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "text",
)
CIFAR_PER_CLASS = 150
TILE = 160


def tiles(image: np.ndarray, folder: Path, name: str) -> None:
    """Cuts a picture into tiles, so that every picture counts by its area."""
    pixels = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    height, width = pixels.shape[:2]
    for row in range(0, max(1, height - TILE // 2), TILE):
        for column in range(0, max(1, width - TILE // 2), TILE):
            tile = Image.fromarray(pixels[row : row + TILE, column : column + TILE])
            tile.save(folder / f"{name}-{row}-{column}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with cifar10_images.zip and MVTec sets")
    parser.add_argument("--steps", type=int, default=3006)
    parser.add_argument("--output", type=Path, default=packaged_local_net())
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()

    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with zipfile.ZipFile(options.data / "cifar10_images.zip") as archive:
            names = sorted(n for n in archive.namelist() if "train/" in n and n.endswith(".jpg"))
            classes = sorted({Path(name).parent.name for name in names})
            for label in classes:
                members = [name for name in names if Path(name).parent.name == label]
                archive.extractall(root / "cifar", random.sample(members, CIFAR_PER_CLASS))
        (root / "pictures").mkdir()
        for name in PICTURES:
            try:
                picture = getattr(skimage.data, name)()
            except Exception as error:  # not in the wheel: would need a download
                print(f"left out {name}: {type(error).__name__}", file=sys.stderr)
                continue
            image = picture.astype(np.float32) / 255
            image = image[..., None].repeat(3, 2) if image.ndim == 2 else image[..., :3]
            tiles(image, root / "pictures", name)
        for path in list_images(options.data / "cookies" / "train" / "good"):
            tiles(load_image(path), root / "pictures", path.stem)
        paths = list_images(root) + list_images(
            options.data / "mvtec_ad_256" / "screw" / "train" / "good"
        )
        print(f"{len(paths)} images", file=sys.stderr)
        distill(
            paths,
            load_teacher("tf_efficientnet_lite0", layer="blocks.4", input_size=96),
            DistillSettings(steps=options.steps, learning_rate=1e-3, bfloat16=True),
            output=options.output,
            device=torch.device("cpu"),
            resume=options.resume,
            on_error=lambda error: print(error, file=sys.stderr),
        )


if __name__ == "__main__":
    main()
