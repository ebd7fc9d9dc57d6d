"""Builds glance_ext._C: CUDA kernels where torch is a CUDA build and nvcc is found, else CPU only.

Settings, all environment variables:
    GLANCE_EXT_CUDA       1 demands the CUDA build and fails without; 0 leaves it out.
    TORCH_CUDA_ARCH_LIST  Architectures, as everywhere in torch ("8.0;9.0+PTX"); by default those
                          of torch itself, one for each generation, and PTX of the newest.
    MAX_JOBS              Compilers at a time; by default by cores and memory.

No GPU is needed and nothing is downloaded. Beside the library lies build_info.json, which says what
it was built with even where it no longer loads.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent
INSTALL = "pip install 'setuptools>=77' ninja 'torch>=2.10' && pip install --no-build-isolation ."

# CMakeLists.txt names the same files; tests/test_build.py keeps the lists equal.
KERNEL_SOURCES = [
    "csrc/common/micro_kernel.cpp",
    "csrc/common/transpose.cpp",
    "csrc/hole_windows/hole_conv_cpu.cpp",
    "csrc/hole_windows/hole_grad_cpu.cpp",
    "csrc/hole_windows/hole_sequence_cpu.cpp",
    "csrc/hole_windows/hole_windows_cpu.cpp",
    "csrc/hole_windows/outer_kernel.cpp",
    "csrc/partial_conv/depthwise_cpu.cpp",
    "csrc/partial_conv/depthwise_loops.cpp",
    "csrc/partial_conv/fused_rule.cpp",
    "csrc/partial_conv/fused_sweep_cpu.cpp",
    "csrc/partial_conv/fused_weight_cpu.cpp",
    "csrc/partial_conv/partial_conv_cpu.cpp",
    "csrc/patch_scores/grid_geometry.cpp",
    "csrc/patch_scores/grid_passes.cpp",
    "csrc/patch_scores/idw_grid_cpu.cpp",
    "csrc/patch_scores/patch_grid_cpu.cpp",
    "csrc/patch_scores/patch_scores_cpu.cpp",
    "csrc/winograd/winograd_block.cpp",
    "csrc/winograd/winograd_conv_cpu.cpp",
]
CUDA_SOURCES = [
    "csrc/hole_windows/hole_conv.cu",
    "csrc/hole_windows/hole_windows.cu",
    "csrc/partial_conv/fused_conv.cu",
    "csrc/partial_conv/partial_conv.cu",
    "csrc/patch_scores/patch_grid.cu",
    "csrc/patch_scores/patch_scores.cu",
]
OP_SOURCES = [
    "csrc/library.cpp",
    "csrc/hole_windows/hole_conv_op.cpp",
    "csrc/hole_windows/hole_max_pool_op.cpp",
    "csrc/hole_windows/hole_sequence_op.cpp",
    "csrc/hole_windows/hole_windows_op.cpp",
    "csrc/partial_conv/partial_conv_op.cpp",
    "csrc/partial_conv/partial_conv_paths.cpp",
    "csrc/patch_scores/patch_scores_op.cpp",
    "csrc/winograd/winograd_conv_op.cpp",
]
BINDING_SOURCES = ["csrc/bindings.cpp"]
HEADERS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "csrc").rglob("*")
    if path.suffix in (".h", ".cuh")
)

# Commands that end in a library, so that they need torch. dist_info does not, but it is what pip
# asks first: failing there saves the download of everything that the package depends on.
BUILDS = {"build", "build_ext", "bdist_wheel", "develop", "dist_info", "editable_wheel", "install"}
OLDEST_ARCH = (7, 5)
GIB = 2**30


def fail(message: str) -> None:
    """Ends the build with one message instead of a traceback."""
    sys.exit(f"glance-ext: {message}")


def check_environment() -> None:
    """Fails with the one command to run if setuptools is too old or torch is not there."""
    if int(setuptools.__version__.split(".")[0]) < 77:
        fail(
            f"the build needs setuptools 77 or newer, this is {setuptools.__version__}. "
            f"Run: {INSTALL}"
        )
    if importlib.util.find_spec("torch") is None:
        fail(
            "the build needs torch in this very environment: it is not installed, or pip's build "
            f"isolation hides it. Run: {INSTALL}"
        )


def cuda_home() -> str | None:
    """The folder with bin/nvcc and include/cuda_runtime_api.h, or None.

    A wrapper script named nvcc may stand far from the toolkit; nvcc itself knows where it is.
    """
    from torch.utils.cpp_extension import CUDA_HOME

    candidates = [CUDA_HOME] if CUDA_HOME else []
    nvcc = os.path.join(CUDA_HOME, "bin", "nvcc") if CUDA_HOME else shutil.which("nvcc")
    if nvcc and os.path.exists(nvcc):
        dry = subprocess.run(
            [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True
        )
        for line in dry.stderr.splitlines():
            if line.startswith("#$ TOP="):
                candidates.insert(0, os.path.realpath(line.removeprefix("#$ TOP=").strip()))
    for folder in candidates:
        header = os.path.join(folder, "include", "cuda_runtime_api.h")
        if os.path.exists(header) and os.path.exists(os.path.join(folder, "bin", "nvcc")):
            return folder
    return None


def ask_nvcc(home: str, option: str) -> str:
    """What the toolkit's compiler prints, or "" if it does not run."""
    try:
        return subprocess.run(
            [os.path.join(home, "bin", "nvcc"), option], capture_output=True, text=True
        ).stdout
    except OSError:
        return ""


def nvcc_release(home: str) -> str | None:
    """The toolkit's version, such as "13.0", or None if it does not say."""
    found = re.search(r"release (\d+\.\d+)", ask_nvcc(home, "--version"))
    return found.group(1) if found else None


def decide_cuda(torch_version: str, torch_cuda: str | None) -> tuple[str | None, str]:
    """The toolkit to build the CUDA kernels with, or None, and the reason in words.

    Whether a GPU is present does not matter: builders seldom have one.
    """
    wish = os.environ.get("GLANCE_EXT_CUDA", "")
    if wish not in ("", "0", "1"):
        fail(f"GLANCE_EXT_CUDA: expected 0 or 1, got {wish!r}")
    if wish == "0":
        return None, "GLANCE_EXT_CUDA=0"
    home = None
    if torch_cuda is None:
        reason = f"torch {torch_version} is a build without CUDA"
    else:
        home = cuda_home()
        if home is None:
            asked = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
            where = f"in CUDA_HOME={asked}" if asked else "on PATH or in CUDA_HOME"
            reason = f"no CUDA toolkit (bin/nvcc and its headers) was found {where}"
        else:
            reason = f"torch {torch_version} is built for CUDA {torch_cuda}, nvcc is in {home}"
            release = nvcc_release(home)
            if release is not None and release.split(".")[0] != torch_cuda.split(".")[0]:
                reason = (
                    f"nvcc in {home} is of CUDA {release}, but torch is built for CUDA "
                    f"{torch_cuda}; the major versions must agree"
                )
                home = None
    if home is None and wish == "1":
        fail(f"GLANCE_EXT_CUDA=1 demands the CUDA build, but {reason}")
    return home, reason


def default_arch_list(torch_archs: str, nvcc_archs: str) -> str:
    """The architectures to build for where nobody says: one a generation, and PTX of the newest.

    A kernel compiled for the first architecture of a generation runs on the whole generation.

    Args:
        torch_archs: What torch is built for, such as "sm_80 sm_86 sm_90 compute_90".
        nvcc_archs: What the compiler can build for, such as "compute_80 compute_90"; "" if unknown.
    """
    known = {version(text) for text in re.findall(r"compute_(\d+)\b", nvcc_archs)}
    first: dict[int, tuple[int, int]] = {}
    for arch in sorted(version(text) for text in re.findall(r"sm_(\d+)", torch_archs)):
        if arch >= OLDEST_ARCH and (not known or arch in known):
            first.setdefault(arch[0], arch)
    archs = [f"{major}.{minor}" for major, minor in first.values()] or ["8.0", "9.0"]
    return ";".join(archs) + "+PTX"


def version(digits: str) -> tuple[int, int]:
    """Major and minor of an architecture: 86 is 8.6, 120 is 12.0."""
    return int(digits[:-1]), int(digits[-1])


def arch_list_of(flags: list[str]) -> str:
    """The architectures that nvcc's -gencode flags ask for, as TORCH_CUDA_ARCH_LIST writes them."""
    found = re.findall(r"code=(sm|compute)_(\d+)([af]?)", " ".join(flags))
    ptx = {(version(digits), suffix) for kind, digits, suffix in found if kind == "compute"}
    archs = sorted({(version(digits), suffix) for _, digits, suffix in found})
    return ";".join(
        f"{major}.{minor}{suffix}" + ("+PTX" if ((major, minor), suffix) in ptx else "")
        for (major, minor), suffix in archs
    )


def jobs(cores: int, memory: int | None) -> int:
    """Compilers at a time: one a core, and two GiB each, so that the build kills no machine."""
    return max(1, min(cores, cores if memory is None else memory // (2 * GIB)))


def available_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int | None:
    """Bytes of the machine or, if less, of this container; None where neither can be read."""
    sizes = []
    with contextlib.suppress(AttributeError, ValueError, OSError):
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(ValueError, OSError):
            sizes.append(int(Path("/sys/fs/cgroup", limit).read_text()))
    return min(sizes, default=None)


def pybind11_include(torch_include: list[str]) -> list[str]:
    """Where pybind11's headers are: with torch, unless its distributor has taken them out."""
    if any(os.path.isdir(os.path.join(folder, "pybind11")) for folder in torch_include):
        return []
    try:
        import pybind11
    except ImportError:
        fail(f"this torch comes without pybind11's headers. Run: pip install pybind11 && {INSTALL}")
    return [pybind11.get_include()]


def compiler_version() -> str:
    """The host compiler's first line about itself."""
    compiler = os.environ.get("CXX", "c++").split()
    try:
        answer = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return "unknown"
    return answer.partition("\n")[0] or "unknown"


def openmp_flags(parallel_info: str) -> list[str]:
    """What makes at::parallel_for use torch's threads: its loop is compiled into the extension.

    Without OpenMP that loop is serial, whatever torch itself was built with. The wheels for Linux
    and Windows bring the runtime that these flags link to; the one for macOS has no such header.

    Args:
        parallel_info: ``torch.__config__.parallel_info()``.
    """
    if "ATen parallel backend: OpenMP" not in parallel_info or sys.platform == "darwin":
        return []
    return ["/openmp"] if os.name == "nt" else ["-fopenmp"]


def build_command(base: type, info: dict[str, str]) -> type:
    """torch's build_ext, which also leaves build_info.json beside the library."""

    class BuildExtension(base):  # type: ignore[misc, valid-type]
        def finalize_options(self) -> None:
            super().finalize_options()
            if self.inplace:
                # pip's editable install builds in a new temporary folder each time; with one that
                # stays ninja compiles only what has changed.
                tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
                self.build_temp = str(ROOT / "build" / f"temp.{tag}")

        def run(self) -> None:
            super().run()
            package = ROOT / "glance_ext" if self.inplace else Path(self.build_lib, "glance_ext")
            text = json.dumps(info, indent=2) + "\n"
            (package / "build_info.json").write_text(text, encoding="utf-8")

    return BuildExtension


def build_settings() -> dict[str, object]:
    """The extension module and the command that builds it, as arguments of setup()."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        fail(f"torch is installed but cannot be imported: {error}. Run: {INSTALL}")
    scripts = sysconfig.get_path("scripts")  # ninja's place, also where no one activated the venv
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), scripts])
    os.environ.setdefault("MAX_JOBS", str(jobs(available_cores(), available_memory())))
    home, reason = decide_cuda(torch.__version__, torch.version.cuda)
    print(f"glance-ext: building {'with' if home else 'WITHOUT'} CUDA: {reason}", flush=True)

    info = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda if home else "",
        "arch_list": "",
        "python": platform.python_version(),
        "compiler": compiler_version(),
    }
    sources = BINDING_SOURCES + OP_SOURCES + KERNEL_SOURCES
    if home:
        cpp_extension.CUDA_HOME = home
        if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
            os.environ["TORCH_CUDA_ARCH_LIST"] = default_arch_list(
                torch._C._cuda_getArchFlags() or "", ask_nvcc(home, "--list-gpu-arch")
            )
        info["arch_list"] = arch_list_of(cpp_extension._get_cuda_arch_flags())
        info["nvcc"] = nvcc_release(home) or "unknown"
        sources = sources + CUDA_SOURCES
        print(f"glance-ext: CUDA architectures: {info['arch_list']}", flush=True)

    macros = [
        ("GLANCE_EXT_TORCH_VERSION", f'"{info["torch"]}"'),
        ("GLANCE_EXT_CUDA_VERSION", f'"{info["cuda"]}"'),
        ("GLANCE_EXT_ARCH_LIST", f'"{info["arch_list"]}"'),
    ]
    if home:
        macros.append(("GLANCE_EXT_WITH_CUDA", None))
    # -g0 against Python's own -g, which makes the library fifteen times as large.
    flags = ["/O2"] if os.name == "nt" else ["-O3", "-g0", "-Wall", "-fno-math-errno"]
    openmp = openmp_flags(torch.__config__.parallel_info())
    factory = cpp_extension.CUDAExtension if home else cpp_extension.CppExtension
    module = factory(
        "glance_ext._C",
        sources,
        include_dirs=[str(ROOT / "csrc"), *pybind11_include(cpp_extension.include_paths())],
        define_macros=macros,
        depends=[*HEADERS, "setup.py"],
        extra_compile_args={"cxx": flags + openmp, **({"nvcc": ["-O3"]} if home else {})},
        extra_link_args=openmp if os.name != "nt" else [],
    )
    base = cpp_extension.BuildExtension.with_options(use_ninja=True)
    return {"ext_modules": [module], "cmdclass": {"build_ext": build_command(base, info)}}


def main() -> None:
    """Runs setuptools, with the extension where it is about to be built."""
    asked = BUILDS & set(sys.argv[1:])
    if asked:
        check_environment()
    setuptools.setup(**(build_settings() if asked - {"dist_info"} else {}))


if __name__ == "__main__":
    main()
