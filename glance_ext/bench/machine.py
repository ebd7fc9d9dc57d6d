"""Where a result was measured: hardware, versions, source."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import glance_ext
from glance_ext import _library


def describe(device: torch.device) -> dict[str, Any]:
    """The part of the metadata that does not depend on the suite."""
    cuda = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return {
        "machine": machine_name(device),
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "compute_capability": f"{cuda[0]}.{cuda[1]}" if cuda else None,
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "tf32": uses_tf32(device),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "glance_ext": glance_ext.__version__,
        "glance_ext_build": _library.build_info(),
        "git_commit": git_commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def machine_name(device: torch.device) -> str:
    """The machine in a result file's name: the GPU, or the CPU and its cores."""
    if device.type == "cuda":
        return slug(torch.cuda.get_device_name(device))
    return slug(f"{cpu_name()} {_cores()} cores")


def uses_tf32(device: torch.device) -> bool:
    """Whether float32 convolutions may round their factors to TF32 on ``device``."""
    return (
        device.type == "cuda"
        and bool(torch.backends.cudnn.allow_tf32)
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def slug(name: str) -> str:
    """Lower-case words joined by hyphens, as file names have them."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def cpu_name() -> str:
    """The processor's name, as the system gives it, and the vectors that torch uses on it.

    Virtual machines give the same name to generations whose vectors differ by half.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def git_commit() -> str | None:
    """The commit of the checkout that the package runs from, ``-dirty`` if changed; or None."""
    root = Path(glance_ext.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
