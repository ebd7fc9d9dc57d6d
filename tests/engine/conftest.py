from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from glance_ext.data.images import load_image, resize
from glance_ext.engine import distill
from glance_ext.engine.distill import DistilledNet, load_local_net, save_local_net
from glance_ext.models.glance import Glance
from glance_ext.models.local_net import Decoder, LocalNet
from glance_ext.models.teacher import Teacher

TEACHER_FEATURES = 6


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six small pictures of one texture: smooth waves with a little noise."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    paths = []
    for i in range(6):
        y, x = np.mgrid[:64, :64] + rng.uniform(0, 20, 2)[:, None, None]
        wave = 0.5 + 0.3 * np.sin(x / 3) * np.sin(y / 5)
        pixels = wave[..., None] * [1, 0.8, 0.6] + rng.normal(0, 0.02, (64, 64, 3))
        paths.append(folder / f"{i}.png")
        Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8)).save(paths[-1])
    return paths


def tiny_teacher() -> Teacher:
    torch.manual_seed(5)
    network = nn.Sequential(nn.Conv2d(3, TEACHER_FEATURES, 8, stride=8), nn.Tanh())
    return Teacher(
        network, name="tiny", layer="all", input_size=32, mean=(0.5,) * 3, std=(0.2,) * 3
    )


@pytest.fixture
def teacher() -> Teacher:
    return tiny_teacher()


@pytest.fixture
def with_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Local-Net has been distilled from the tiny teacher."""
    monkeypatch.setattr(DistilledNet, "load_teacher", lambda self, weights=None: tiny_teacher())


@pytest.fixture
def few_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "_STATISTICS_BATCHES", 3)
    monkeypatch.setattr(distill, "_STATISTICS_BATCH", 32)
    monkeypatch.setattr(distill, "_STATISTICS_CROPS", 2)


@pytest.fixture(scope="session")
def local_net_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(11)
    path = tmp_path_factory.mktemp("net") / "local_net.safetensors"
    net = DistilledNet(
        LocalNet(5, 8),
        Decoder(8, TEACHER_FEATURES),
        {"name": "tiny", "layer": "all", "input_size": 32},
        torch.zeros(TEACHER_FEATURES),
        torch.ones(TEACHER_FEATURES),
    )
    save_local_net(path, net)
    return path


@pytest.fixture
def interrupt_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sends SIGINT when a function of a module is called for the nth time."""
    import os
    import signal

    def install(module: object, name: str, call: int, times: int = 1) -> None:
        real, calls = getattr(module, name), [0]

        def wrapped(*args: object, **kwargs: object) -> object:
            calls[0] += 1
            if call <= calls[0] < call + times:
                os.kill(os.getpid(), signal.SIGINT)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, wrapped)

    return install


@pytest.fixture
def images(pictures: list[Path]) -> torch.Tensor:
    return torch.stack([resize(load_image(path), (256, 256)) for path in pictures]).half()


@pytest.fixture
def model(local_net_file: Path) -> Glance:
    torch.manual_seed(0)
    return Glance(load_local_net(local_net_file).local_net)
