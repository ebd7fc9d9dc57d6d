"""Builds glance_ext._C: CUDA kernels where torch is a CUDA build and nvcc is found, else CPU only.

Settings, all environment variables:
    GLANCE_EXT_CUDA       1 demands the CUDA build and fails without; 0 leaves it out.
    TORCH_CUDA_ARCH_LIST  Architectures, as everywhere in torch ("8.0;9.0+PTX").
    MAX_JOBS              Compilers at a time; by default by cores and memory.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
INSTALL = "pip install --no-build-isolation ."

# CMakeLists.txt names the same files; tests/test_build.py keeps the two lists equal.
KERNEL_SOURCES = [
    "csrc/partial_conv/partial_conv_cpu.cpp",
    "csrc/patch_scores/patch_scores_cpu.cpp",
]
CUDA_SOURCES = [
    "csrc/partial_conv/partial_conv.cu",
    "csrc/patch_scores/patch_scores.cu",
]
OP_SOURCES = [
    "csrc/library.cpp",
    "csrc/partial_conv/partial_conv_op.cpp",
    "csrc/patch_scores/patch_scores_op.cpp",
]
BINDING_SOURCES = ["csrc/bindings.cpp"]
DEFAULT_ARCH_LIST = "8.0;9.0+PTX"


def fail(message):
    """Ends the build with one message instead of a traceback."""
    sys.exit(f"glance-ext: {message}")


def packaging_only():
    """Whether setuptools asks for metadata alone, which needs no torch."""
    asked = set(sys.argv[1:])
    return bool(asked & {"egg_info", "dist_info", "sdist", "--version", "--name"}) and not asked & {
        "build_ext",
        "bdist_wheel",
        "install",
        "develop",
        "editable_wheel",
    }


def cuda_home():
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


def decide_cuda(torch):
    """Whether to build the CUDA kernels, with which toolkit, and the reason in words."""
    wish = os.environ.get("GLANCE_EXT_CUDA", "")
    if wish not in ("", "0", "1"):
        fail(f"GLANCE_EXT_CUDA: expected 0 or 1, got {wish!r}")
    if wish == "0":
        return None, "GLANCE_EXT_CUDA=0"
    if torch.version.cuda is None:
        home, reason = None, f"torch {torch.__version__} is a build without CUDA"
    else:
        home = cuda_home()
        reason = (
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, nvcc is in {home}"
            if home
            else "no CUDA toolkit (nvcc and its headers) was found on PATH or in CUDA_HOME"
        )
        if home:
            major = nvcc_major(home)
            if major is not None and major != torch.version.cuda.split(".")[0]:
                reason = (
                    f"nvcc in {home} is of CUDA {major}, but torch is built for CUDA "
                    f"{torch.version.cuda}; the major versions must agree"
                )
                home = None
    if home is None and wish == "1":
        fail(f"GLANCE_EXT_CUDA=1 demands the CUDA build, but {reason}")
    return home, reason


def nvcc_major(home):
    """The major version of the toolkit in `home`, as a string, or None if it does not say."""
    answer = subprocess.run(
        [os.path.join(home, "bin", "nvcc"), "--version"], capture_output=True, text=True
    ).stdout
    return answer.split("release ")[1].split(".")[0] if "release " in answer else None


def limit_jobs():
    """Two GiB a compiler, so that a large machine with little memory survives the build."""
    if "MAX_JOBS" not in os.environ and hasattr(os, "sysconf"):
        try:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (ValueError, OSError):
            return
        os.environ["MAX_JOBS"] = str(max(1, min(os.cpu_count() or 1, memory // 2**31)))


def extension():
    """The extension module and the command that builds it."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        fail(
            "the build needs torch in this very environment (pip's build isolation hides it). "
            f"Install torch first, then run: {INSTALL}"
        )
    try:
        import pybind11  # noqa: F401
    except ImportError:
        fail(f"the build needs pybind11. Run: pip install pybind11 ninja && {INSTALL}")
    home, reason = decide_cuda(torch)
    print(f"glance-ext: building {'with' if home else 'WITHOUT'} CUDA: {reason}", flush=True)
    limit_jobs()
    arch_list = ""
    sources = BINDING_SOURCES + OP_SOURCES + KERNEL_SOURCES
    if home:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCH_LIST)
        arch_list = os.environ["TORCH_CUDA_ARCH_LIST"]
        cpp_extension.CUDA_HOME = home
        sources = sources + CUDA_SOURCES
        print(f"glance-ext: CUDA architectures: {arch_list}", flush=True)
    macros = [
        ("GLANCE_EXT_TORCH_VERSION", f'"{torch.__version__}"'),
        ("GLANCE_EXT_CUDA_VERSION", f'"{torch.version.cuda if home else ""}"'),
        ("GLANCE_EXT_ARCH_LIST", f'"{arch_list}"'),
    ]
    if home:
        macros.append(("GLANCE_EXT_WITH_CUDA", None))
    flags = ["-O3", "-Wall", "-fno-math-errno"] if os.name != "nt" else ["/O2"]
    factory = cpp_extension.CUDAExtension if home else cpp_extension.CppExtension
    module = factory(
        "glance_ext._C",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        define_macros=macros,
        extra_compile_args={"cxx": flags, "nvcc": ["-O3"]} if home else {"cxx": flags},
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=True)},
    }


if __name__ == "__main__":
    setup(**({} if packaging_only() else extension()))
