"""``glance_ext.doctor`` tells what works and what does not, and never raises."""

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from glance_ext import _library, doctor
from glance_ext.ops import reference

ROOT = Path(__file__).resolve().parents[1]
CPU_LIBRARY = doctor.Library(True, {"cuda": "", "arch_list": ""}, None, "REBUILD")
CUDA_LIBRARY = doctor.Library(True, {"cuda": "13.0", "arch_list": "8.0;9.0"}, None, "REBUILD")


def examine_without(module: str) -> tuple[int, str]:
    """Exit code and text of the doctor in a Python where one module cannot be imported."""
    script = (
        f"import sys; sys.modules[{module!r}] = None; from glance_ext import doctor; "
        "report = doctor.examine(); print(doctor.format_report(report)); sys.exit(not report.ok)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT
    )
    assert "Traceback" not in result.stderr, result.stderr
    return result.returncode, result.stdout


@pytest.mark.parametrize(
    ("arch_list", "capability", "entry"),
    [
        ("8.0;9.0+PTX", (8, 0), "8.0"),
        ("8.0;9.0+PTX", (8, 6), "8.0"),  # a later minor version of the same generation
        ("8.6", (8, 0), None),  # not an earlier one
        ("8.0;9.0+PTX", (9, 0), "9.0"),
        ("8.0;9.0+PTX", (12, 0), "9.0+PTX"),
        ("8.0 9.0+PTX", (10, 3), "9.0+PTX"),  # spaces, as torch takes them too
        ("8.0;9.0", (12, 0), None),
        ("8.0;9.0+PTX", (7, 5), None),
        ("9.0a+PTX", (9, 0), "9.0a"),
        ("9.0a+PTX", (10, 0), None),  # "a" is for that architecture alone
        ("10.0f", (10, 3), "10.0f"),
        ("7.5;12.0+PTX", (12, 1), "12.0"),
        ("", (8, 0), None),
        ("nonsense", (8, 0), None),
    ],
)
def test_covers(arch_list: str, capability: tuple[int, int], entry: str | None) -> None:
    assert doctor.covers(arch_list, capability) == entry


@pytest.fixture(scope="module")
def report() -> doctor.Report:
    return doctor.examine()


def test_all_is_well_here(report: doctor.Report) -> None:
    text = doctor.format_report(report)
    assert report.ok, text
    assert text.endswith("Everything that is needed works.")
    assert re.search(rf"built for torch +{re.escape(torch.__version__)}", text)
    assert re.search(r"ok +partial_conv2d_backward on cpu +error \d", text)
    assert re.search(r"ok +numpy +\d", text)
    if not torch.cuda.is_available():
        assert "no CUDA device" in text


def test_every_op_of_the_library_is_tried(report: doctor.Report) -> None:
    names = [name for name in torch._C._dispatch_get_all_op_names() if "glance_ext::" in name]
    ops = {name.partition("::")[2] for name in names}
    assert {check.op for check in report.ops} == ops
    assert {check.device for check in report.ops} == {device.name for device in report.devices}


def test_json_has_everything_that_the_text_has(report: doctor.Report) -> None:
    data = json.loads(json.dumps(doctor.to_json(report)))
    assert data["ok"] is True
    assert data["library"]["built"] == _library.build_info()
    assert {package["name"] for package in data["packages"]} >= {"torch", "timm"}
    assert data["problems"] == []


def test_packages_are_those_of_the_project() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[^\w.-]", requirement)[0] for requirement in requirements}

    extras = project["optional-dependencies"]
    optional = {
        name for extra in extras if extra not in ("test", "lint") for name in names(extras[extra])
    }
    assert {name for name, _, purpose in doctor._PACKAGES if not purpose} == names(
        project["dependencies"]
    )
    assert {name for name, _, purpose in doctor._PACKAGES if purpose} == optional


def test_missing_library_is_explained_with_the_rebuild_command() -> None:
    code, text = examine_without("glance_ext._C")
    assert code == 1
    assert "compiled ops: NOT LOADED" in text
    assert _library.REBUILD in text.partition("Problems:")[2]
    assert "none ran" in text


@pytest.mark.slow
def test_missing_torch_is_a_problem_and_not_a_crash() -> None:
    code, text = examine_without("torch")
    assert code == 1
    assert "compiled ops: NOT LOADED" in text
    assert re.search(r"!! +torch +not installed \(needed\); get it with: pip install", text)


def test_missing_optional_package_comes_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(doctor, "_PACKAGES", [p for p in doctor._PACKAGES if p[0] == "timm"])
    report = doctor.examine()
    assert report.ok
    assert re.search(
        r"- +timm +not installed \(optional, for .*\); get it with: pip install timm\n",
        doctor.format_report(report),
    )


def test_missing_needed_package_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    report = doctor.examine()
    assert not report.ok
    assert len(report.problems) == 1
    assert report.problems[0].startswith("tqdm: not installed. Run: pip install")


def test_broken_package_is_told_from_a_missing_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torn.py").write_text("raise OSError('libtorn.so: undefined symbol: tear')")
    (tmp_path / "needy.py").write_text("import no_such_module")
    monkeypatch.syspath_prepend(tmp_path)
    package = doctor._package("torn", "torn", None)
    assert package.error == "installed but broken: OSError: libtorn.so: undefined symbol: tear"
    needy = doctor._package("needy", "needy", None)
    assert needy.error == "ModuleNotFoundError: No module named 'no_such_module'"


def test_wrong_results_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.aggregate_patch_scores
    monkeypatch.setattr(reference, "aggregate_patch_scores", lambda *args: 1.1 * right(*args))
    report = doctor.examine()
    assert not report.ok
    assert re.fullmatch(
        r"aggregate_patch_scores on cpu: differs from its reference by \S+, expected at most 5e-03",
        report.problems[0],
    )
    assert any(check.error is None for check in report.ops)


def test_op_that_raises_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    (arguments, places) = doctor.op_cases()["partial_conv2d"]
    bad = (*arguments[:-1], 3)  # groups that do not divide the channels
    monkeypatch.setattr(doctor, "op_cases", lambda: {"partial_conv2d": (bad, places)})
    report = doctor.examine()
    assert (
        "partial_conv2d on cpu: ValueError: partial_conv2d: expected groups" in report.problems[0]
    )


@pytest.mark.parametrize(
    ("library", "capability", "covered_by", "error"),
    [
        (CUDA_LIBRARY, (9, 0), "9.0", None),
        (
            CUDA_LIBRARY,
            (12, 0),
            None,
            "built for 8.0;9.0. Rebuild it: TORCH_CUDA_ARCH_LIST=12.0 REBUILD",
        ),
        (CPU_LIBRARY, (9, 0), None, "built without CUDA. .*: GLANCE_EXT_CUDA=1 REBUILD"),
    ],
)
def test_cuda_device_is_compared_with_the_build(
    monkeypatch: pytest.MonkeyPatch,
    library: doctor.Library,
    capability: tuple[int, int],
    covered_by: str | None,
    error: str | None,
) -> None:
    properties = SimpleNamespace(name="A GPU", major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda name: properties)
    (_, device), note = doctor._devices(library)
    assert note is None
    assert (device.name, device.model, device.covered_by) == ("cuda:0", "A GPU", covered_by)
    if error is None:
        assert device.error is None
        assert "runs the build for 9.0" in doctor._device_row(device)[2]
    else:
        assert re.search(error, str(device.error))
        assert any("cuda:0" in line for line in doctor._problems(library, [device], [], []))


def test_device_that_does_not_answer_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise RuntimeError("CUDA error: device is lost\nmore")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", refuse)
    (_, device), _ = doctor._devices(CUDA_LIBRARY)
    assert device.error == "RuntimeError: CUDA error: device is lost"
