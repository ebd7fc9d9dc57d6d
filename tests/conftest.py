"""What all tests share: the device they run on, and the seed."""

import importlib.util
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Last, so that an installed package is tested rather than the checkout; `tests` is found here.
sys.path.append(str(Path(__file__).resolve().parents[1]))

# A shell starts its background jobs with SIGINT ignored, and what is ignored stays so by design.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Test runs side by side share the cores, and so do the processes that they start.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // WORKERS))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# How long an example may take depends on what else the machine does.
if importlib.util.find_spec("hypothesis"):
    import hypothesis

    hypothesis.settings.register_profile("patient", deadline=None)
    hypothesis.settings.load_profile("patient")

DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.cuda))  # type: ignore[arg-type]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """A device to run on; of several GPUs any, on a stream that is not the default."""
    if request.param == "cpu":
        yield "cpu"
        return
    name = f"cuda:{random.randrange(torch.cuda.device_count())}"
    flags = torch.backends.cudnn.flags(allow_tf32=False, deterministic=True)
    with flags, torch.cuda.stream(torch.cuda.Stream(name)):
        yield name
        torch.cuda.synchronize(name)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
