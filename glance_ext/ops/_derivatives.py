"""Derivatives that the ops do not have are an error, not a silent zero."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad


def forbid_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """Refuses dual tensors, whose tangents torch would drop at an op without a rule for them.

    Raises:
        RuntimeError: A tensor carries a tangent.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(
                f"{op}: expected to be differentiated backward, got a tangent of forward mode"
            )


def forbid_second_backward(op: str) -> None:
    """Makes the gradient of ``glance_ext::<op>_backward`` an error that names ``op``."""

    def second_backward(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(f"{op}: expected to be differentiated once, got a second backward")

    torch.library.register_autograd(f"glance_ext::{op}_backward", second_backward)
