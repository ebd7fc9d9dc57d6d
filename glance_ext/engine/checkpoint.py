"""Checkpoints: safetensors with JSON metadata, written whole or not at all, read with suspicion."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from glance_ext.errors import CheckpointError
from glance_ext.files import atomic_write

FORMAT_VERSION = 1
_KEY = "glance_ext"


def save_checkpoint(
    path: str | os.PathLike[str], kind: str, tensors: dict[str, Tensor], metadata: dict[str, Any]
) -> None:
    """Writes a checkpoint.

    Args:
        path: The file; an older one is replaced only once the new one is complete.
        kind: What the file holds: ``"local_net"``, ``"model"`` or ``"training"``.
        tensors: Named tensors on any device.
        metadata: JSON values: settings, normalisation, calibration.

    Raises:
        OutputError: The file cannot be written.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "sha256": _digest(stored, kind, metadata),
        "metadata": metadata,
    }
    content = serialise(stored, metadata={_KEY: json.dumps(header, allow_nan=False)})
    with atomic_write(path) as stream:
        stream.write(content)


def load_checkpoint(
    path: str | os.PathLike[str], kind: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a checkpoint that :func:`save_checkpoint` wrote.

    Args:
        path: The file.
        kind: What the file is expected to hold.

    Returns:
        The tensors, on the CPU, and the metadata.

    Raises:
        CheckpointError: The file is missing, cut short, damaged, not one of glance-ext's, of
            another kind, or from a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a checkpoint, but there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            header_text = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: expected a safetensors checkpoint, but the file is cut short or of another "
            f"kind ({str(error).splitlines()[0]})"
        ) from error
    if header_text is None:
        raise CheckpointError(
            f"{path}: a safetensors file, but not one that glance-ext wrote "
            f"(its metadata has no '{_KEY}')"
        )
    try:
        header = json.loads(header_text)
        version, found_kind = int(header["format_version"]), str(header["kind"])
        metadata, digest = header.get("metadata"), header.get("sha256")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path}: the checkpoint's metadata is damaged") from error
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {version} is newer than the {FORMAT_VERSION} that this "
            "glance-ext reads; upgrade with pip install --upgrade glance-ext"
        )
    if found_kind != kind:
        raise CheckpointError(f"{path}: expected a checkpoint of kind '{kind}', got '{found_kind}'")
    expected = _digest(tensors, found_kind, metadata)
    if not isinstance(metadata, dict) or digest != expected:
        raise CheckpointError(f"{path}: the checkpoint is damaged: its checksum does not match")
    return tensors, metadata


def load_module(
    module: torch.nn.Module, tensors: dict[str, Tensor], prefix: str, path: str | os.PathLike[str]
) -> None:
    """Loads the tensors whose names begin with ``prefix.`` into ``module``, strictly.

    Raises:
        CheckpointError: A tensor is missing, superfluous or of another shape.
    """
    state = {k[len(prefix) + 1 :]: v for k, v in tensors.items() if k.startswith(prefix + ".")}
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise CheckpointError(
            f"{path}: the tensors of '{prefix}' do not fit: {' '.join(lines[1:3])}"
        ) from error


def prefixed(module: torch.nn.Module, prefix: str) -> dict[str, Tensor]:
    """``module``'s state with ``prefix.`` before every name."""
    return {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}


def _digest(tensors: dict[str, Tensor], kind: str, metadata: Any) -> str:
    digest = hashlib.sha256()
    for value in (kind, metadata):
        digest.update(json.dumps(value, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
