"""A model that was trained on a GPU, on photographs, finds there what it finds on a CPU."""

from pathlib import Path

import numpy as np
import pytest
import torch

from glance_ext.data.images import load_image
from glance_ext.data.textures import write_texture_set
from glance_ext.engine.detector import Detection, Detector
from glance_ext.engine.settings import TrainSettings
from glance_ext.engine.train import train

# Every stage of the default preset, each cut short.
SETTINGS = TrainSettings(
    steps=40, head_steps=40, context_steps=20, memory_size=200, turns=False, grid="16"
)
LARGEST = {"float32": 1e-3, "tf32": 1e-2, "bfloat16": 0.1}  # of a map, by its range


def found_by(folder: Path, paths: list[Path], device: str, precision: str) -> list[Detection]:
    detector = Detector.load(folder, device=device, precision=precision)
    return detector.detect_batch([load_image(path) for path in paths])


def assert_a_gpu_agrees(device: str, folder: Path) -> None:
    data = folder / "brick"
    write_texture_set(data, "brick", seed=0, train=10)
    good = sorted((data / "train" / "good").iterdir())
    tested = sorted((data / "test").glob("*/000.png"))
    train(good, SETTINGS, output=folder / "model", device=device, show_progress=False)
    expected = found_by(folder / "model", tested, "cpu", "float32")
    assert np.ptp([found.score for found in expected]) > 0
    for precision, largest in LARGEST.items():
        if precision == "tf32" and device == "cpu":
            continue
        found = found_by(folder / "model", tested, device, precision)
        for one, other in zip(found, expected, strict=True):
            difference = float(np.abs(one.map - other.map).max())
            assert difference <= largest * np.ptp(other.map)
            assert abs(one.score - other.score) <= largest * np.ptp(other.map)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_short_training_on_photographs(tmp_path: Path) -> None:
    assert_a_gpu_agrees("cuda", tmp_path)
