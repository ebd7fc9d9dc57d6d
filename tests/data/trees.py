"""Small data sets, each in the exact layout of a published one."""

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
