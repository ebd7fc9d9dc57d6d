"""Makes the Local-Nets that ship with the package: glance_ext/weights/local_net_*.safetensors.

Distils a teacher that was trained on ImageNet into Local-Net, on CIFAR-10's training images, the
pictures that scikit-image's wheel carries, and the training images of data sets in the MVTec
layout. No test image is read. ``fine`` learns the first layers of ResNet-18 in context, ``deep``
the layer blocks.4 of tf_efficientnet_lite0 for a patch alone. docs/method.md records the figures of
the runs that were shipped.
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
from glance_ext.engine.settings import LOCAL_NETS
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
CIFAR_PER_CLASS = {"deep": 150, "fine": 2}
SCREWS = {"deep": 1, "fine": 16}  # of how many training images one is taken
TILE = {"deep": (160, 160), "fine": (256, 128)}  # side and step in pixels


def tiles(image: np.ndarray, folder: Path, name: str, kind: str) -> None:
    """Cuts a picture into tiles, so that every picture counts by its area."""
    side, step = TILE[kind]
    pixels = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    height, width = pixels.shape[:2]
    for row in range(0, max(1, height - side // 2), step):
        for column in range(0, max(1, width - side // 2), step):
            tile = Image.fromarray(pixels[row : row + side, column : column + side])
            tile.save(folder / f"{name}-{row}-{column}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with cifar10_images.zip and MVTec sets")
    parser.add_argument("--kind", choices=LOCAL_NETS, default="fine")
    parser.add_argument("--teacher-weights", type=Path, help="of ResNet-18, else from a cache")
    parser.add_argument(
        "--steps", type=int, help="the shipped ones' are 3,006 (deep), 4,000 (fine)"
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    kind: str = options.kind
    if kind == "deep":
        teacher = load_teacher("tf_efficientnet_lite0", layer="blocks.4", input_size=96)
        settings = DistillSettings(steps=options.steps or 3006, learning_rate=1e-3, bfloat16=True)
    else:
        teacher = load_teacher(
            "resnet18",
            layer="layer1+layer2",
            weights=options.teacher_weights,
            input_size=129,
            context=True,
        )
        settings = DistillSettings(
            steps=options.steps or 4000,
            batch_size=4,
            learning_rate=1e-3,
            decay=0.3,
            lambda_c=0.1,
            bfloat16=True,
        )

    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with zipfile.ZipFile(options.data / "cifar10_images.zip") as archive:
            names = sorted(n for n in archive.namelist() if "train/" in n and n.endswith(".jpg"))
            classes = sorted({Path(name).parent.name for name in names})
            for label in classes:
                members = [name for name in names if Path(name).parent.name == label]
                archive.extractall(root / "cifar", random.sample(members, CIFAR_PER_CLASS[kind]))
        (root / "pictures").mkdir()
        for name in PICTURES:
            try:
                picture = getattr(skimage.data, name)()
            except Exception as error:  # not in the wheel: would need a download
                print(f"left out {name}: {type(error).__name__}", file=sys.stderr)
                continue
            image = picture.astype(np.float32) / 255
            image = image[..., None].repeat(3, 2) if image.ndim == 2 else image[..., :3]
            tiles(image, root / "pictures", name, kind)
        cookies = list_images(options.data / "cookies" / "train" / "good")
        if kind == "deep":
            for path in cookies:
                tiles(load_image(path), root / "pictures", path.stem, kind)
            cookies = []
        screws = list_images(options.data / "mvtec_ad_256" / "screw" / "train" / "good")
        paths = list_images(root) + cookies + screws[:: SCREWS[kind]]
        print(f"{len(paths)} images", file=sys.stderr)
        distill(
            paths,
            teacher,
            settings,
            output=options.output or packaged_local_net(kind),
            device=torch.device("cpu"),
            resume=options.resume,
            on_error=lambda error: print(error, file=sys.stderr),
        )


if __name__ == "__main__":
    main()
