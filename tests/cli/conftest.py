import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from glance_ext.cli import main
from glance_ext.engine import context_head
from glance_ext.engine.distill import DistilledNet, save_local_net
from glance_ext.models.local_net import Decoder, LocalNet

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., Result]


@pytest.fixture(autouse=True, scope="module")
def one_round_of_distortions() -> Iterator[None]:
    """The distortion head in context sees each of a test's few images distorted only once.

    Of a module's scope, so that what its tests share is trained like what they compare it with.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context_head, "_ROUNDS", 1)
        yield


@pytest.fixture(scope="session")
def run() -> Run:
    """Runs the command line in this process; whatever happens, no traceback may show."""

    def invoke(*arguments: object) -> Result:
        result = CliRunner().invoke(main, [os.fspath(str(a)) for a in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), (
            result.exception
        )
        assert "Traceback" not in result.output
        return result

    return invoke


def write_image(
    path: Path, seed: int, size: tuple[int, int] = (64, 64), spot: bool = False
) -> Path:
    rng = np.random.default_rng(seed)
    pixels = 0.5 + rng.normal(0, 0.05, (*size, 3))
    if spot:
        pixels[10:26, 30:50] = 0.95
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8)).save(path)
    return path


def write_mask(path: Path, size: tuple[int, int] = (64, 64)) -> Path:
    mask = np.zeros(size, np.uint8)
    mask[10:26, 30:50] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)
    return path


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of five images without a defect."""
    folder = tmp_path_factory.mktemp("good")
    for i in range(5):
        write_image(folder / f"{i}.png", i)
    return folder


@pytest.fixture(scope="session")
def local_net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Local-Net that has learnt nothing, which is quick to read and to write."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("net") / "net.safetensors"
    names = {"name": "tf_efficientnet_lite0", "layer": "blocks.0", "input_size": 33}
    net = DistilledNet(LocalNet(5, 8), Decoder(8, 16), names, torch.zeros(16), torch.ones(16))
    save_local_net(path, net)
    return path


@pytest.fixture(scope="session")
def short(local_net: Path) -> list[object]:
    """Options of a training that takes a second."""
    options = ["--steps", 2, "--batch-size", 4, "--head-steps", 0, "--context-steps", 0]
    return [*options, "--grid", 33, "--local-net", local_net]


@pytest.fixture(scope="session")
def model(
    run: Run, good: Path, short: list[object], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What ``glance-ext train`` wrote."""
    output = tmp_path_factory.mktemp("model")
    result = run("train", "--normal", good, "-o", output, *short, "--json", output / "train.json")
    assert result.exit_code == 0, result.output
    return output


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set in the MVTec layout, in a folder that is named as one of its categories."""
    root = tmp_path_factory.mktemp("sets") / "screw"
    for i in range(3):
        write_image(root / "train" / "good" / f"{i}.png", i)
        write_image(root / "test" / "good" / f"{i}.png", 10 + i)
        write_image(root / "test" / "cut" / f"{i}.png", 20 + i, spot=True)
        write_mask(root / "ground_truth" / "cut" / f"{i}_mask.png")
    return root


@pytest.fixture
def process() -> Callable[..., subprocess.Popen[str]]:
    """Starts the command line as a process of its own."""

    def start(
        *arguments: object, path: Path | None = None, **options: object
    ) -> subprocess.Popen[str]:
        search = os.pathsep.join(map(str, filter(None, (path, ROOT))))
        environment = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-m", "glance_ext", *map(str, arguments)],
            env=environment,
            text=True,
            # A shell starts its background jobs with SIGINT ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},  # type: ignore[call-overload]
        )

    return start
