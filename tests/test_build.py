"""The build: what is in it, what it decides, what it says, and the C++ tests."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from glance_ext import _library

ROOT = Path(__file__).resolve().parents[1]
LISTS = ("KERNEL_SOURCES", "CUDA_SOURCES", "OP_SOURCES")
# What may know torch; everything else in csrc compiles without it.
TORCH_FILES = re.compile(
    r"(_op|_ops|_paths)\.(cpp|h)$|/library\.cpp$|/bindings\.cpp$|/tensor_check\.h$"
)
ONE_COMMAND = (
    "pip install 'setuptools>=77' ninja 'torch>=2.10' && pip install --no-build-isolation ."
)


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, with none of its settings made."""
    for name in ("GLANCE_EXT_CUDA", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("glance_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tool(name: str) -> str | None:
    """A program on PATH or in this environment's scripts."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def pyproject() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def sources() -> list[Path]:
    return sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())


def copy_checkout(target: Path) -> Path:
    """The working tree without what was built in it."""
    ignore = shutil.ignore_patterns(
        ".*", "build", "dist", "runs", "demo-report", "*.so", "*.egg-info", "__pycache__"
    )
    shutil.copytree(ROOT, target, ignore=ignore)
    (target / "glance_ext" / "build_info.json").unlink(missing_ok=True)
    return target


def run_setup(*arguments: str, block: str | None = None, **env: str) -> subprocess.CompletedProcess:
    """Runs setup.py, with the import of one package blocked."""
    blocker = f"sys.modules[{block!r}] = None; " if block else ""
    script = (
        f"import runpy, sys; {blocker}sys.argv = ['setup.py', *{list(arguments)!r}]; "
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


# --- the lists -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LISTS)
def test_setup_and_cmake_build_the_same_files(build: ModuleType, name: str) -> None:
    text = (ROOT / "CMakeLists.txt").read_text()
    found = re.search(rf"set\({name}\s+([^)]*)\)", text)
    assert found is not None
    assert found.group(1).split() == getattr(build, name)


def test_every_file_in_csrc_is_built_or_a_header(build: ModuleType) -> None:
    listed = [path for name in (*LISTS, "BINDING_SOURCES") for path in getattr(build, name)]
    assert len(listed) == len(set(listed))
    assert sorted([*listed, *build.HEADERS]) == [
        path.relative_to(ROOT).as_posix() for path in sources()
    ]


def test_kernels_include_no_torch() -> None:
    kernels = [path for path in sources() if not TORCH_FILES.search(path.as_posix())]
    assert len(kernels) >= 8
    for path in kernels:
        found = re.search(r'#include\s*[<"](torch|ATen|c10|pybind11)/', path.read_text())
        assert found is None, f"{path.relative_to(ROOT)}: {found.group(0)}"


def test_setup_leaves_the_language_standard_to_torch() -> None:
    assert "-std" not in (ROOT / "setup.py").read_text()


def test_torch_is_no_build_requirement() -> None:
    """An isolated build would fetch another torch; it is to end with setup.py's message."""
    requires = pyproject()["build-system"]["requires"]
    assert not [name for name in requires if name.startswith("torch")]


def test_every_requirement_is_pinned() -> None:
    pins = dict(
        line.lower().split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    project = pyproject()["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["teacher"], *extras["test"], *extras["lint"]]
    names = {re.split(r"[^\w.-]", requirement)[0].lower() for requirement in wanted}
    assert names - pins.keys() == set()
    assert pins["torch"] == "2.14.1"
    assert pins["torchvision"] == "0.29.1"


def test_ci_runs_the_readmes_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    script = (ROOT / ".ci" / "run").read_text()
    for command in ("demo", "test"):
        assert f"make {command}" in readme
        assert re.search(rf"^{command}: setup$", makefile, re.MULTILINE)
        assert re.search(rf"^step make {command}\b", script, re.MULTILINE)
    assert BUILT_STRICTLY in script  # for which a test below leaves the CUDA sources to the build


# --- decisions -----------------------------------------------------------------------------------


def test_cuda_is_built_where_torch_and_toolkit_have_it(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "cuda_home", lambda: "/opt/cuda")
    monkeypatch.setattr(build, "nvcc_release", lambda home: "13.1")
    home, reason = build.decide_cuda("2.14.1+cu130", "13.0")
    assert home == "/opt/cuda"
    assert reason == "torch 2.14.1+cu130 is built for CUDA 13.0, nvcc is in /opt/cuda"


@pytest.mark.parametrize(
    ("torch_cuda", "toolkit", "release", "reason"),
    [
        (None, "/opt/cuda", "13.0", "torch 2.14.1 is a build without CUDA"),
        ("13.0", None, None, "no CUDA toolkit .* was found on PATH or in CUDA_HOME"),
        ("13.0", "/opt/cuda", "12.8", "is of CUDA 12.8, but torch is built for CUDA 13.0"),
    ],
)
def test_cuda_is_left_out_with_a_reason_or_demanded_in_vain(
    build: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    torch_cuda: str | None,
    toolkit: str | None,
    release: str | None,
    reason: str,
) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build, "cuda_home", lambda: toolkit)
    monkeypatch.setattr(build, "nvcc_release", lambda home: release)
    home, text = build.decide_cuda("2.14.1", torch_cuda)
    assert home is None
    assert re.search(reason, text)
    monkeypatch.setenv("GLANCE_EXT_CUDA", "1")
    with pytest.raises(
        SystemExit, match=f"GLANCE_EXT_CUDA=1 demands the CUDA build, but .*{reason}"
    ):
        build.decide_cuda("2.14.1", torch_cuda)


def test_cuda_can_be_left_out(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "cuda_home", lambda: "/opt/cuda")
    monkeypatch.setenv("GLANCE_EXT_CUDA", "0")
    assert build.decide_cuda("2.14.1", "13.0") == (None, "GLANCE_EXT_CUDA=0")
    monkeypatch.setenv("GLANCE_EXT_CUDA", "yes")
    with pytest.raises(SystemExit, match="GLANCE_EXT_CUDA: expected 0 or 1, got 'yes'"):
        build.decide_cuda("2.14.1", "13.0")


def test_toolkit_is_found_behind_a_wrapper_script(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    toolkit = tmp_path / "cuda-13.0"
    for file in ("bin/nvcc", "include/cuda_runtime_api.h"):
        (toolkit / file).parent.mkdir(parents=True, exist_ok=True)
        (toolkit / file).touch()
    wrapper = tmp_path / "local" / "bin" / "nvcc"
    wrapper.parent.mkdir(parents=True)
    wrapper.write_text(f"#!/bin/sh\necho '#$ TOP={toolkit}' >&2\n")
    wrapper.chmod(0o755)
    from torch.utils import cpp_extension

    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path / "local"))
    assert build.cuda_home() == str(toolkit)
    wrapper.unlink()
    assert build.cuda_home() is None


@pytest.mark.parametrize(
    ("torch_archs", "nvcc_archs", "expected"),
    [
        ("sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120", "", "7.5;8.0;9.0;10.0;12.0+PTX"),
        ("sm_80 sm_90 sm_100 sm_120", "compute_80\ncompute_90\n", "8.0;9.0+PTX"),
        ("sm_50 sm_60 sm_70 sm_80", "", "8.0+PTX"),
        ("", "", "8.0;9.0+PTX"),
    ],
)
def test_architectures_are_torchs_own_one_a_generation(
    build: ModuleType, torch_archs: str, nvcc_archs: str, expected: str
) -> None:
    assert build.default_arch_list(torch_archs, nvcc_archs) == expected


def test_architectures_are_recorded_as_torch_understands_them(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils import cpp_extension

    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Ampere 9.0a 12.0+PTX")
    flags = cpp_extension._get_cuda_arch_flags()
    assert build.arch_list_of(flags) == "8.0;8.6+PTX;9.0a;12.0+PTX"


def test_jobs_fit_cores_and_memory(build: ModuleType) -> None:
    gib = 2**30
    assert build.jobs(64, 16 * gib) == 8
    assert build.jobs(2, 24 * gib) == 2
    assert build.jobs(4, gib) == 1
    assert build.jobs(4, None) == 4
    assert build.available_cores() >= 1
    assert build.available_memory() is None or build.available_memory() > gib // 4


# --- messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["dist_info", "bdist_wheel", "editable_wheel", "build_ext"])
def test_without_torch_setup_says_the_one_command(command: str) -> None:
    result = run_setup(command, block="torch")
    assert result.returncode == 1
    assert ONE_COMMAND in result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_old_setuptools_is_told_so(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.setuptools, "__version__", "65.5.0")
    with pytest.raises(SystemExit, match=r"needs setuptools 77 or newer, this is 65\.5\.0"):
        build.check_environment()


def test_demanded_cuda_build_without_toolkit_fails_before_compiling(tmp_path: Path) -> None:
    result = run_setup("build_ext", GLANCE_EXT_CUDA="1", CUDA_HOME=str(tmp_path), MAX_JOBS="1")
    assert result.returncode == 1
    assert "GLANCE_EXT_CUDA=1 demands the CUDA build, but " in result.stderr
    assert "Traceback" not in result.stderr


def test_source_distribution_needs_no_torch_and_holds_all_sources(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    script = (
        "import runpy, sys; sys.modules['torch'] = None; "
        f"sys.argv = ['setup.py', '-q', 'sdist', '-d', {str(tmp_path)!r}]; "
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    subprocess.run([sys.executable, "-c", script], cwd=checkout, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    wanted = {path.relative_to(ROOT).as_posix() for path in sources()}
    wanted |= {
        path.relative_to(checkout).as_posix()
        for pattern in ("weights/*.safetensors", "data/*.csv", "py.typed", "**/*.py")
        for path in (checkout / "glance_ext").glob(pattern)
    }
    wanted |= {
        "CMakeLists.txt",
        "cmake/find_libtorch.cmake",
        "Makefile",
        "constraints.txt",
        "LICENSE",
        "tests/cpp/check.h",
    }
    assert wanted - held == set()
    assert not [name for name in held if name.endswith((".so", "build_info.json"))]


# --- compilers -----------------------------------------------------------------------------------


def test_sources_are_formatted() -> None:
    clang_format = tool("clang-format")
    if clang_format is None:
        pytest.skip("clang-format is not installed")
    files = [
        *sources(),
        *(ROOT / "tests" / "cpp").glob("*.cpp"),
        *(ROOT / "tests" / "cpp").glob("*.h"),
    ]
    result = subprocess.run(
        [clang_format, "--dry-run", "-Werror", *map(str, files)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("source", sorted(path.name for path in (ROOT / "csrc").rglob("*.cu")))
def test_cuda_sources_compile_without_torch_or_gpu_and_spill_no_register(
    source: str, tmp_path: Path
) -> None:
    nvcc = tool("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    built_for = _library.build_info().get("arch_list", "").split(";")
    if BUILT_STRICTLY in os.environ.get("NVCC_APPEND_FLAGS", "") and {"8.0", "9.0+PTX"} <= {
        *built_for
    }:
        pytest.skip("the extension was built for both, and would not have been with a spill")
    (path,) = (ROOT / "csrc").rglob(source)
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90)]
    options = ["-O3", "-Xptxas", "-v", "-I", "csrc", *archs]
    command = [nvcc, *options, "-fatbin", str(path), "-o", str(tmp_path / "kernel.fatbin")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    said = result.stdout + result.stderr
    assert "warning" not in said
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert spilled
    assert set(spilled) == {("0", "0")}


BUILT_STRICTLY = "--warn-on-spills,--warning-as-error"  # as .ci/run builds

# These builds are for what is in them, not for speed.
QUICKLY = "-DCMAKE_CXX_FLAGS_RELEASE=-O0"
SOON = "-DCMAKE_CXX_FLAGS_RELEASE=-O1"  # tests that run for seconds


def run(program: object, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [tool(str(program)) or str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def succeeded(result: subprocess.CompletedProcess[str]) -> str:
    said = result.stdout + result.stderr
    assert result.returncode == 0, said
    assert "warning:" not in said.lower(), said
    return result.stdout


def configure(source: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    return run("cmake", *ninja, "-DCMAKE_BUILD_TYPE=Release", "-S", source, "-B", folder, *options)


def cmake_build(folder: Path, *options: str, targets: Sequence[str] = ("all",)) -> None:
    """Configures and builds some targets without CUDA."""
    if tool("cmake") is None or tool("ctest") is None:
        pytest.skip("cmake is not installed")
    succeeded(configure(ROOT, folder, "-DGLANCE_EXT_CUDA=OFF", *options))
    succeeded(run("cmake", "--build", folder, "--parallel", "2", "--target", *targets))


@pytest.fixture(scope="module")
def op_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build folder of the op library for C++ and of its test program."""
    folder = tmp_path_factory.mktemp("op_library")
    options = ["-DGLANCE_EXT_TORCH=ON", f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"]
    targets = ("glance_kernels", "glance_ops", "op_library_test")
    cmake_build(folder, *options, QUICKLY, targets=targets)
    return folder


@pytest.mark.slow
def test_kernels_build_and_pass_their_tests_without_torch(tmp_path: Path) -> None:
    cmake_build(tmp_path, SOON)
    said = succeeded(run("ctest", "--test-dir", tmp_path, "--output-on-failure"))
    assert "100% tests passed, 0 tests failed out of 8" in said


@pytest.mark.slow
def test_ops_build_and_run_in_a_program_without_python(op_library: Path) -> None:
    said = succeeded(run("ctest", "--test-dir", op_library, "--output-on-failure", "-R", "op_lib"))
    assert "100% tests passed, 0 tests failed out of 1" in said


@pytest.mark.slow
def test_installed_package_serves_programs_of_other_projects(
    op_library: Path, tmp_path: Path
) -> None:
    prefix, torch_prefix = tmp_path / "prefix", torch.utils.cmake_prefix_path
    succeeded(run("cmake", "--install", op_library, "--prefix", prefix))
    for file in prefix.rglob("*.cmake"):
        text = file.read_text()
        assert not [path for path in (ROOT, op_library, torch_prefix) if str(path) in text]

    away = op_library.rename(tmp_path / "library")  # nothing of it may be needed any more
    try:
        program, paths = ROOT / "tests" / "cpp" / "installed", "-DCMAKE_PREFIX_PATH="
        built = tmp_path / "program"
        succeeded(configure(program, built, f"{paths}{prefix};{torch_prefix}", QUICKLY))
        succeeded(run("cmake", "--build", built, "--parallel", "2"))
        assert succeeded(run(built / "ops_program")) == "right\n"
        assert succeeded(run(built / "kernels_program")) == "1.33333\n"
        alone = configure(program, tmp_path / "alone", f"{paths}{prefix}")
    finally:
        away.rename(op_library)
    assert alone.returncode != 0
    version = torch.__version__.partition("+")[0]
    message = " ".join(alone.stderr.split())
    assert f"glance_ext::ops was built with libtorch {version}" in message
    assert "missing: 'torch/library.h;torch;torch_cpu;c10'" in message


def test_openmp_is_used_where_torch_uses_it(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """at::parallel_for is compiled into the extension: serial unless that has OpenMP too."""
    monkeypatch.setattr(build.sys, "platform", "linux")
    assert build.openmp_flags("ATen parallel backend: OpenMP\n") == ["-fopenmp"]
    assert build.openmp_flags("ATen parallel backend: native thread pool\n") == []


def test_library_runs_on_as_many_threads_as_torch() -> None:
    if not _library.is_loaded():
        pytest.skip("the native library is not built")
    openmp = "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()
    if not openmp or sys.platform == "darwin":
        pytest.skip("this torch does not use OpenMP")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert _library.module.parallel_threads() == 2
        torch.set_num_threads(1)
        assert _library.module.parallel_threads() == 1
    finally:
        torch.set_num_threads(threads)
