"""Small data sets, each in the exact layout of a published one."""

import pickle
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (40, 48)


def draw(path: Path, spot: bool = False) -> Path:
    rng = np.random.default_rng(zlib.crc32(path.as_posix().encode()))
    pixels = 0.5 + rng.normal(0, 0.05, (*SIZE, 3))
    if spot:
        pixels[8:11, 20:24] = 0.95
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8)).save(path)
    return path


def mask(path: Path, value: int = 255) -> Path:
    marked = np.zeros(SIZE, np.uint8)
    marked[8:11, 20:24] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(marked).save(path)
    return path


def mvtec(root: Path) -> Path:
    for name in ("bottle", "metal_nut"):
        folder = root / name
        for i in range(3):
            draw(folder / "train" / "good" / f"{i:03}.png")
        draw(folder / "test" / "good" / "000.png")
        for i in range(2):
            draw(folder / "test" / "bent" / f"{i:03}.png", spot=True)
            mask(folder / "ground_truth" / "bent" / f"{i:03}_mask.png")
        (folder / "license.txt").write_text("CC BY-NC-SA 4.0")
    (root / "readme.txt").write_text("MVTec AD")
    (root / "notes").mkdir()
    return root


def visa(root: Path) -> Path:
    rows = ["object,split,label,image,mask"]
    for name in ("candle", "pcb1"):
        images, masks = f"{name}/Data/Images", f"{name}/Data/Masks/Anomaly"
        for i in range(4):
            draw(root / images / "Normal" / f"{i:04}.JPG")
            split = "test" if i == 3 else "train"
            rows.append(f"{name},{split},normal,{images}/Normal/{i:04}.JPG,")
        draw(root / images / "Anomaly" / "000.JPG", spot=True)
        mask(root / masks / "000.png", value=1)
        rows.append(f"{name},test,anomaly,{images}/Anomaly/000.JPG,{masks}/000.png")
        (root / name / "image_anno.csv").write_text("image,label,mask\n")
    (root / "split_csv").mkdir()
    (root / "split_csv" / "1cls.csv").write_text("\n".join(rows) + "\n")
    (root / "split_csv" / "2cls_fewshot.csv").write_text(rows[0] + "\n")
    return root


def btad(root: Path) -> Path:
    for name, mask_suffix in (("01", "png"), ("03", "bmp")):
        folder = root / name
        for i in range(3):
            draw(folder / "train" / "ok" / f"{i:04}.bmp")
        draw(folder / "test" / "ok" / "0000.bmp")
        for i in range(2):
            draw(folder / "test" / "ko" / f"{i:04}.bmp", spot=True)
            mask(folder / "ground_truth" / "ko" / f"{i:04}.{mask_suffix}")
    return root


def mvtec_ad_2(root: Path) -> Path:
    folder = root / "can"
    for i in range(3):
        draw(folder / "train" / "good" / f"{i:03}_regular.png")
    draw(folder / "validation" / "good" / "000_regular.png")
    public = folder / "test_public"
    draw(public / "good" / "000_regular.png")
    for light in ("regular", "overexposed"):
        draw(public / "bad" / f"000_{light}.png", spot=True)
        mask(public / "ground_truth" / "bad" / f"000_{light}_mask.png")
    draw(folder / "test_private" / "000_regular.png")
    draw(folder / "test_private_mixed" / "000_mixed.png")
    return root


CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


def cifar_pixels(split: str, label: int, count: int) -> np.ndarray:
    """Images ``(count, 3, 32, 32)`` uint8; each class has its own grey and stripes."""
    rng = np.random.default_rng([label, len(split)])
    x = np.arange(32)
    stripes = 20 * np.sin(x * (label + 1) / 3)[None, None, None]
    values = 60 + 12 * label + stripes + rng.normal(0, 4, (count, 3, 32, 32))
    return values.clip(0, 255).astype(np.uint8)


def cifar_batches(root: Path, train: int = 4, test: int = 2) -> Path:
    """The official layout: five training batches and one of test images, pickled by Python 2."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    sets = {
        split: (
            np.concatenate([cifar_pixels(split, label, count) for label in range(10)]),
            [label for label in range(10) for _ in range(count)],
        )
        for split, count in (("train", train), ("test", test))
    }
    order = np.random.default_rng(0).permutation(10 * train)
    for i, part in enumerate(np.array_split(order, 5), 1):
        images, labels = sets["train"]
        write_batch(folder / f"data_batch_{i}", images[part], [labels[j] for j in part])
    write_batch(folder / "test_batch", *sets["test"])
    write_pickle(folder / "batches.meta", {b"label_names": [name.encode() for name in CLASSES]})
    (folder / "readme.html").write_text("CIFAR-10")
    return root


def write_batch(path: Path, images: np.ndarray, labels: list[int]) -> None:
    names = [f"{i}.png".encode() for i in range(len(labels))]
    data = images.reshape(len(images), -1)
    write_pickle(path, {b"batch_label": b"a batch", b"labels": labels, b"data": data,
                        b"filenames": names})  # fmt: skip


def write_pickle(path: Path, value: object) -> None:
    path.write_bytes(pickle.dumps(value, protocol=2))


def cifar_folders(root: Path, train: int = 4, test: int = 2) -> Path:
    """``train/CLASS/NNNN.png`` and ``test/CLASS/NNNN.png``."""
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(CLASSES):
            for i, pixels in enumerate(cifar_pixels(split, label, count)):
                path = root / split / name / f"{i:04}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.transpose(1, 2, 0)).save(path)
    return root
