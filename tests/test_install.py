"""A wheel, built and installed as a user does, works from anywhere and brings its data along."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

USE = """
import glance_ext, torch
from glance_ext import _library, ops
from pathlib import Path
folder = Path(glance_ext.__file__).resolve().parent
assert _library.is_loaded(), _library.why_not_loaded()
output, mask = ops.partial_conv2d(torch.ones(1, 1, 4, 4), torch.ones(4, 4), torch.ones(1, 1, 2, 2))
assert output.tolist() == torch.full((1, 1, 3, 3), 4.0).tolist()
map = ops.aggregate_patch_scores(torch.ones(1, 2, 2), 4, 8, stride=4)
assert map.tolist() == torch.ones(1, 8, 8).tolist()
print(folder)
print(_library.module.__file__)
"""


def pip(*arguments: str, cwd: Path, **env: str) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    result = subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.mark.slow
def test_wheel_works_from_another_folder(tmp_path: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        pytest.skip("pip is not installed")
    checkout, wheels, target = tmp_path / "checkout", tmp_path / "wheels", tmp_path / "target"
    ignore = shutil.ignore_patterns(
        ".*", "build", "dist", "runs", "demo-report", "*.so", "*.egg-info", "__pycache__"
    )
    shutil.copytree(ROOT, checkout, ignore=ignore)
    setup = checkout / "setup.py"
    optimised = setup.read_text()
    assert optimised.count('"-O3", "-g0"') == 1
    setup.write_text(optimised.replace('"-O3", "-g0"', '"-O0", "-g0"'))  # it need not be fast
    offline = ("--no-build-isolation", "--no-deps", "--no-index")
    printed = pip(
        "wheel", "-v", *offline, "-w", str(wheels), ".", cwd=checkout, GLANCE_EXT_CUDA="0"
    )
    assert "glance-ext: building WITHOUT CUDA: GLANCE_EXT_CUDA=0" in printed

    (wheel,) = wheels.glob("glance_ext-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    source = ROOT / "glance_ext"
    data = [
        path.relative_to(ROOT).as_posix()
        for pattern in ("weights/*.safetensors", "data/*.csv", "py.typed", "**/*.py")
        for path in source.glob(pattern)
    ]
    assert set(data) - held == set()
    assert {"glance_ext/weights/local_net_fine.safetensors", "glance_ext/py.typed"} <= held
    assert not [name for name in held if not name.startswith(("glance_ext/", "glance_ext-"))]

    pip("install", "--no-deps", "--no-index", "--target", str(target), str(wheel), cwd=tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    env = {**os.environ, "PYTHONPATH": str(target)}
    result = subprocess.run(
        [sys.executable, "-c", USE], cwd=elsewhere, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    folder, library = result.stdout.splitlines()
    assert Path(folder) == target / "glance_ext"
    assert Path(library).parent == target / "glance_ext"

    info = json.loads((target / "glance_ext" / "build_info.json").read_text())
    assert info["torch"] == torch.__version__
    assert info["cuda"] == info["arch_list"] == ""
    assert info.keys() >= {"torch", "cuda", "arch_list", "python", "compiler"}
