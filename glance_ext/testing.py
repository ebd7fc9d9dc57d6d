"""How far a result may stand from its reference, for these tests and for those of your own kernels.

The rule is a comparison, not a constant: a result may be twice as far from the float64 reference as
plain torch in the result's own dtype is, plus a small floor for the cases where torch is exact.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from glance_ext import _library

FLOORS: Mapping[torch.dtype, float] = MappingProxyType(
    {
        torch.float64: 1e-13,
        torch.float32: 1e-6,
        torch.float16: 1e-3,
        torch.bfloat16: 8e-3,
    }
)
"""The absolute error that is allowed on top, by dtype: some roundings of a number near 1, and two
for the 16-bit dtypes."""

PATHS = ("rule", "fused", "library")


@contextlib.contextmanager
def partial_conv_path(path: str) -> Iterator[None]:
    """Has ``partial_conv2d`` take one of its two native paths, in every thread, for as long.

    The result is the same to rounding; which one is faster depends on the shape, and by itself
    the op chooses by a rule (docs/ops.md).

    Args:
        path: ``"fused"``, our own kernel where there is one for the arguments; ``"library"``, the
            platform's convolution with a kernel of ours before and behind it; or ``"rule"``.

    Raises:
        ValueError: The path is none of these.
        RuntimeError: The native ops are not there; the message says why.
    """
    if path not in PATHS:
        raise ValueError(f"partial_conv_path: expected one of {', '.join(PATHS)}, got {path!r}")
    if not _library.is_loaded():
        raise RuntimeError(f"partial_conv_path: {_library.why_not_loaded()}")
    before = _library.module.partial_conv_path(path)
    try:
        yield
    finally:
        _library.module.partial_conv_path(before)


def assert_matches_reference(
    actual: Tensor,
    reference_float64: Tensor,
    reference_same_dtype: Tensor,
    *,
    name: str = "result",
    scale: float = 1.0,
) -> None:
    """Fails unless ``actual`` is at most twice as wrong as plain torch in its dtype, plus a floor.

    The error is the largest absolute difference from ``reference_float64`` over all elements. A NaN
    or an infinity has to stand where the reference has the same; only where the reference in
    ``actual``'s dtype overflowed, the same infinity is accepted.

    Args:
        actual: The result, of any shape; float32, float64, float16 or bfloat16; any device.
        reference_float64: The truth: the same work in float64. The same shape.
        reference_same_dtype: Plain torch's result in ``actual``'s dtype. The same shape.
        name: What to call the result in a message.
        scale: What to multiply the floor (:data:`FLOORS`) with: the size of the numbers that were
            summed up, where it is far from 1.

    Raises:
        AssertionError: The result is too far off, is of another shape or dtype, or has a NaN or an
            infinity of its own; the message tells where, how far, and how far it may be.
    """
    if reference_float64.dtype != torch.float64:
        raise AssertionError(f"{name}: expected a float64 reference, got {reference_float64.dtype}")
    if actual.dtype not in FLOORS or reference_same_dtype.dtype != actual.dtype:
        raise AssertionError(
            f"{name}: expected the dtype of its reference, {reference_same_dtype.dtype}, "
            f"got {actual.dtype}"
        )
    for reference in (reference_float64, reference_same_dtype):
        if reference.shape != actual.shape:
            raise AssertionError(
                f"{name}: expected shape {tuple(reference.shape)}, got {tuple(actual.shape)}"
            )
    got, exact, same = (
        tensor.detach().to("cpu", torch.float64)
        for tensor in (actual, reference_float64, reference_same_dtype)
    )
    # Not numbers that can be compared by distance: they have to be the same.
    overflowed = same.isinf() & exact.isfinite()
    expected = torch.where(overflowed, same, exact)
    special = ~expected.isfinite() | ~got.isfinite()
    agree = (got == expected) | (got.isnan() & expected.isnan()) | (overflowed & (got == exact))
    wrong = special & ~agree
    if bool(wrong.any()):
        index = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: expected {exact[index].item():g} at {list(index)}, got {got[index].item():g} "
            f"({int(wrong.sum())} of {wrong.numel()} elements are NaN or infinite, "
            "or should be)"
        )
    error = torch.where(special, 0.0, got - exact).abs()
    if error.numel() == 0:
        return
    torch_error = float(torch.where(special | ~same.isfinite(), 0.0, same - exact).abs().max())
    allowed = 2 * torch_error + FLOORS[actual.dtype] * scale
    worst = float(error.max())
    if worst > allowed:
        index = tuple((error == worst).nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: expected an error of at most {allowed:.3g} (twice torch's own "
            f"{torch_error:.3g} in {actual.dtype} + a floor of "
            f"{FLOORS[actual.dtype] * scale:.3g}), got {worst:.3g} at {list(index)}: "
            f"{got[index].item():.9g} instead of {exact[index].item():.9g}"
        )
