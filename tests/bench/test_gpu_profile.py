"""benchmarks/gpu_profile.py, on a CPU."""

import re

import pytest
import torch
from click.testing import CliRunner

from glance_ext.bench.detect import maps_of
from glance_ext.data.grid import patch_grid
from glance_ext.models.glance import Glance
from glance_ext.models.local_net import LocalNet
from tests.scripts import script

gpu_profile = script("gpu_profile")


def test_the_stages_together_make_the_map():
    torch.manual_seed(0)
    model = Glance(LocalNet(5, 16)).eval().requires_grad_(False)
    images = torch.rand(2, 3, 256, 256)
    found = gpu_profile.staged_map(model, images, "33", torch.float32)()
    grid = patch_grid("33")
    plan = model.plan(grid.starts, grid.starts)
    torch.testing.assert_close(found, maps_of(model.score_grid(images, plan), grid.origins))


def test_it_prints_what_each_stage_runs():
    options = ["--device", "cpu", "--dtype", "float32", "--grid", "33"]
    printed = CliRunner().invoke(gpu_profile.main, options, catch_exceptions=False).output
    lines = [re.split(r"  +", line) for line in printed.splitlines()]
    totals = {line[0]: float(line[-1]) for line in lines if line[1:2] == ["all"]}
    assert list(totals) == [*gpu_profile.STAGES, "all"]
    assert min(totals.values()) > 0
    assert totals.pop("all") == pytest.approx(sum(totals.values()), abs=0.5)
    called = {line[1] for line in lines if line[0] == "Global-Net"}
    assert "glance_ext::hole_sequence" in called
