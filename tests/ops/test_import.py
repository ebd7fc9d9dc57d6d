"""What importing the ops costs, and what they do without the compiled library."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from glance_ext.ops import partial_conv2d


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    root = Path(partial_conv2d.__code__.co_filename).parents[2]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_importing_the_ops_pulls_in_nothing_heavy() -> None:
    result = run_python(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import glance_ext.ops, glance_ext.nn\n"
        "print(*sorted({n.partition('.')[0] for n in set(sys.modules) - before}))\n"
        "print(*sorted(n for n in sys.modules if n.startswith('glance_ext.')))\n"
    )
    assert result.returncode == 0, result.stderr
    new, ours = (set(line.split()) for line in result.stdout.splitlines())
    heavy = {
        "numpy",
        "scipy",
        "skimage",
        "matplotlib",
        "timm",
        "torchvision",
        "click",
        "PIL",
        "tqdm",
    }
    assert not new & (heavy | {"safetensors"})
    layers = {name.split(".")[1] for name in ours}
    assert layers <= {"_C", "_library", "ops", "nn"}


FALLBACK = """
import sys, warnings
import torch
if HIDDEN:
    sys.modules["glance_ext._C"] = None
from glance_ext import _library
from glance_ext.ops import aggregate_patch_scores, partial_conv2d
assert _library.is_loaded() is not HIDDEN
torch.manual_seed(0)
image = torch.randn(2, 3, 6, 6, requires_grad=True)
mask = torch.rand(2, 1, 6, 6) > 0.4
weight = torch.randn(4, 3, 3, 3)
scores = torch.randn(2, 3, 3, requires_grad=True)
results = []
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        output, mask_out = partial_conv2d(image, mask, weight, padding=1)
        maps = [aggregate_patch_scores(scores, 4, 8, stride=2, mode=mode)
                for mode in ("mean", "gaussian", "max", "idw")]
        total = output.sum() + sum(m.square().sum() for m in maps)
        grads = torch.autograd.grad(total, (image, scores))
        results = [output, mask_out, *maps, *grads]
    with torch.autocast("cpu", torch.bfloat16):
        low, low_mask = partial_conv2d(image, mask.float(), weight)
        low_map = aggregate_patch_scores(scores, 4, 8, stride=2, mode="idw")
    results += [low, low_mask, low_map]
    partial_conv2d(image.to("meta"), mask.to("meta"), weight.to("meta"))
torch.save([r.detach() for r in results], PATH)
for warning in caught:
    print(warning.category.__name__, warning.filename, warning.message)
"""


def test_without_the_library_the_references_run_and_warn_once(tmp_path: Path) -> None:
    results, lines = [], []
    for hidden in (False, True):
        path = tmp_path / f"{hidden}.pt"
        run = run_python(f"HIDDEN, PATH = {hidden}, {str(path)!r}\n{FALLBACK}")
        assert run.returncode == 0, run.stderr
        results.append(torch.load(path))
        lines.append(run.stdout.splitlines())
    assert lines[0] == []
    assert len(lines[1]) == 2
    for line, op in zip(lines[1], ["partial_conv2d", "aggregate_patch_scores"], strict=True):
        assert line.startswith(f"RuntimeWarning <string> {op} runs its slow plain-torch reference")
        assert "--no-build-isolation" in line  # what to do
        assert "glance-ext doctor" in line
        assert torch.__version__ in line
    for native_result, fallback in zip(*results, strict=True):
        assert native_result.dtype == fallback.dtype
        tolerance = {"rtol": 0.02, "atol": 0.02} if native_result.dtype == torch.bfloat16 else {}
        torch.testing.assert_close(fallback, native_result, **tolerance)
