"""The compiled library: loaded once, and if it cannot be, the reason kept for the first call.

Importing this module never fails and never builds anything.
"""

from __future__ import annotations

import json
import platform
import warnings
from pathlib import Path
from typing import Any

import torch

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."
_INFO_FILE = Path(__file__).resolve().parent / "build_info.json"
_warned: set[str] = set()


def _load() -> tuple[Any, str | None]:
    try:
        from glance_ext import _C  # type: ignore[attr-defined]
    except ImportError as error:  # missing, built for another torch or Python, or a lost library
        return None, (str(error).strip() or repr(error)).splitlines()[0]
    return _C, None


module, load_error = _load()


def is_loaded() -> bool:
    """Whether the native ops are there."""
    return module is not None


def build_info() -> dict[str, str]:
    """What the library was built with: torch, cuda, arch_list, python; empty if never built."""
    if module is not None:
        return dict(module.build_config())
    try:
        return dict(json.loads(_INFO_FILE.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def why_not_loaded() -> str:
    """One paragraph: why the native ops are missing, what was built, what runs, what to do."""
    running = f"running: torch {torch.__version__}, Python {platform.python_version()}"
    built = build_info()
    if not built:
        return (
            f"glance-ext's native ops were never built here ({load_error}; {running}). "
            f"In the folder of its source run: {REBUILD}"
        )
    return (
        f"glance-ext's native ops failed to load ({load_error}). "
        f"Built for: torch {built.get('torch')}, Python {built.get('python')}; {running}. "
        f"In the folder of its source run: {REBUILD}"
    )


def warn_reference(op: str) -> None:
    """Warns once for each op that its plain-torch reference runs instead of the native code."""
    if op not in _warned:
        _warned.add(op)
        warnings.warn(
            f"{op} runs its slow plain-torch reference: {why_not_loaded()} "
            "`glance-ext doctor` tells more.",
            RuntimeWarning,
            stacklevel=3,
        )
