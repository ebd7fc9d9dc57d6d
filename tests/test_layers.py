"""The layers of docs/architecture.md: each part imports only what stands below it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "glance_ext"

BASE = {"__init__", "_library", "errors", "files"}
OPS = BASE | {"ops"}
NN = OPS | {"nn"}
DATA = OPS | {"data"}
MODELS = NN | {"models", "data"}  # data.patches, for the crop that the model scores
ENGINE = MODELS | {"metrics", "engine"}
REPORT = ENGINE | {"report"}  # report.cases shows what an evaluation found

ALLOWED = {
    "__init__": set(),
    "errors": {"errors"},
    "files": {"errors", "files"},
    "_library": {"__init__", "_library"},
    "ops": OPS,
    "metrics": {"errors", "metrics"},
    "testing": OPS | {"testing"},
    "nn": NN,
    "data": DATA,
    "models": MODELS,
    "engine": ENGINE,
    "report": REPORT,
    # beside the command line: what its largest commands do
    "bench": REPORT | {"bench", "testing"},
    "demo": REPORT | {"demo"},
    "doctor": REPORT | {"doctor", "testing"},
    "cli": REPORT | {"bench", "demo", "doctor", "cli"},
    "__main__": {"cli"},
}
REPORT_MODULES_THAT_KNOW_THE_ENGINE = {"cases"}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The parts of the package that a module imports, at its top or inside a function."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            if node.module == "glance_ext":
                names += [f"glance_ext.{alias.name}" for alias in node.names]
            else:
                names.append(node.module or "")
    parts = {n.split(".")[1] for n in names if n.startswith("glance_ext.") and "._C" not in n}
    return {"__init__" if part == "__version__" else part for part in parts}


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_what_stands_below_it(path: Path) -> None:
    part = part_of(path)
    assert part in ALLOWED, f"{part} has no place among the layers yet"
    assert imported(path) <= ALLOWED[part] | {part}
    if part == "report" and path.stem not in REPORT_MODULES_THAT_KNOW_THE_ENGINE:
        assert imported(path) <= {"report", "files", "errors"}


def test_the_check_sees_imports_of_every_form(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import glance_ext.cli.train\nfrom glance_ext import _library, __version__\n"
        "def f():\n    from glance_ext.engine.loop import Trainer\n"
    )
    assert imported(path) == {"cli", "_library", "__init__", "engine"}


def modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sorted(m for m in sys.modules if '.' not in m))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    return set(done.stdout.split())


def test_help_loads_nothing_heavy() -> None:
    loaded = modules_after(
        "from glance_ext.cli import main\nfrom click.testing import CliRunner\n"
        "for command in ('train', 'detect', 'evaluate', 'distill', 'demo', 'doctor', 'bench',"
        " 'reproduce'):\n"
        "    assert CliRunner().invoke(main, [command, '--help']).exit_code == 0"
    )
    assert "glance_ext" in loaded
    assert not loaded & {"torch", "numpy", "timm", "matplotlib", "skimage", "scipy", "PIL"}


def test_ops_load_torch_and_nothing_else_heavy() -> None:
    loaded = modules_after("import glance_ext.ops, glance_ext.nn")
    assert "torch" in loaded
    bare = modules_after("import torch")
    heavy = {"timm", "matplotlib", "skimage", "scipy", "PIL", "tifffile", "tqdm", "click"}
    assert not (loaded - bare) & heavy


def test_detection_needs_no_teacher_and_no_plots() -> None:
    loaded = modules_after("import glance_ext.engine.detector")
    assert not loaded & {"timm", "matplotlib", "skimage", "pandas"}
