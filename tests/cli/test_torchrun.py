"""Training in two processes that ``torchrun`` starts is training in one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glance_ext.engine.checkpoint import load_checkpoint
from glance_ext.engine.detector import MODEL_FILE, MODEL_KIND
from tests.cli.conftest import ROOT

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch without distributed"
)

TRAIN = ["-m", "glance_ext.cli", "train", "--grid", "33", "--positions", "33", "--steps", "21"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def train(*arguments: object, start: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs the command line on one thread a process."""
    command = [sys.executable, *start, *TRAIN, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def test_two_processes_have_the_loss_curve_of_one(
    good: Path, local_net: Path, tmp_path: Path
) -> None:
    batch = ["--normal", good, "--local-net", local_net, "--batch-size", 6, "--holes-per-image", 2]
    batch += ["--head-steps", 21, "--context-steps", 21, "--no-turns"]
    curves, weights = [], []
    for name, start in (("one", []), ("two", TORCHRUN)):
        output = tmp_path / name
        done = train(*batch, "-o", output, "--json", output / "train.json", start=start)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("trained on 4 images") == 1
        curves.append(json.loads((output / "train.json").read_text())["losses"])
        weights.append(load_checkpoint(output / MODEL_FILE, MODEL_KIND)[0])
    one, two = curves
    assert one.keys() == two.keys()
    for loss, points in one.items():
        assert [step for step, _ in points] == [step for step, _ in two[loss]] == [0, 20]
        values = torch.tensor([value for _, value in points])
        others = torch.tensor([value for _, value in two[loss]])
        # Rounding, which Adam makes much of where gradients are nearly zero.
        torch.testing.assert_close(others, values, rtol=1e-3, atol=0)
        assert values[0] != values[-1]
    for key, value in weights[0].items():
        error = float((weights[1][key] - value).norm() / value.norm().clamp_min(1e-6))
        assert error < 3e-2, key


def test_a_step_that_cannot_be_shared_ends_all_processes(
    good: Path, local_net: Path, tmp_path: Path
) -> None:
    batch = ["--normal", good, "--local-net", local_net, "--batch-size", 4, "--holes-per-image", 4]
    done = train(*batch, "-o", tmp_path / "model", start=TORCHRUN)
    assert done.returncode != 0
    assert "expected an image a step for each of 2 processes, got 1" in done.stderr
    assert not (tmp_path / "model" / MODEL_FILE).exists()
