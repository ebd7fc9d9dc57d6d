"""The number formats that the networks may compute in."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch

from glance_ext.errors import GlanceError
from glance_ext.models.glance import Glance

PRECISIONS = ("float32", "bfloat16", "tf32", "float64")
"""What :class:`~glance_ext.engine.detector.Detector` takes; ``tf32`` on a GPU only."""


def network_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of the networks' weights and activations.

    Raises:
        GlanceError: There is no such precision, or not on this device.
    """
    if precision not in PRECISIONS:
        raise GlanceError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "tf32":
        if device.type != "cuda":
            raise GlanceError(
                "precision: expected float32 or bfloat16 on a CPU, got tf32, which only CUDA "
                "devices have"
            )
        return torch.float32
    dtype: torch.dtype = getattr(torch, precision)
    return dtype


def networks_in(model: Glance, dtype: torch.dtype) -> Glance:
    """The model with its networks in ``dtype`` and its heads in float32 or wider.

    Returns:
        ``model`` itself if that is what it is, else a copy.
    """
    if dtype == next(model.parameters()).dtype:
        return model
    converted = copy.deepcopy(model).to(dtype)
    if dtype != torch.float64:
        for name in ("distortion_head", "residual_scale", "memory", "context_head"):
            head = copy.deepcopy(getattr(model, name))
            setattr(converted, name, head if head is None else head.to(torch.float32))
    return converted


@contextlib.contextmanager
def rounding(precision: str) -> Iterator[None]:
    """Lets float32 products be rounded to tf32 on a GPU if, and only if, this precision says so.

    Torch by itself rounds them in cuDNN's convolutions and not in matrix products.
    """
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    allowed = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
