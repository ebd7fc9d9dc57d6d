"""Differentiating twice is an error, not a silent zero."""

from __future__ import annotations

from typing import Any, NoReturn

import torch


def forbid_second_backward(op: str) -> None:
    """Makes the gradient of ``glance_ext::<op>_backward`` an error that names ``op``."""

    def second_backward(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(f"{op}: expected to be differentiated once, got a second backward")

    torch.library.register_autograd(f"glance_ext::{op}_backward", second_backward)
