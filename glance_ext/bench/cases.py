"""What a suite is made of: a case, its variants, and the gate that only right ones pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from glance_ext.bench.limits import Work
from glance_ext.errors import GlanceError

Outputs = dict[str, Tensor]

# Tolerances are relative to a result's largest value. The floor is a few units in the last place
# and what the order of a float32 sum may cost; the ceiling is the most that plain torch may claim.
_FLOOR_EPS = 8
_ORDER_EPS = 4
_TF32_EPS = 2.0**-10
_CEILING = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 5e-2,
}
_TF32_CEILING = 5e-3


class WrongResultError(GlanceError):
    """A variant's result is beyond its tolerance: there is nothing to time."""


@dataclass(frozen=True)
class Variant:
    """One way to do a case's work.

    Attributes:
        run: Does the work once and returns its results by name.
        expected: Computes those results in float64.
        part: Takes from a result what ``expected`` has of it; None = all.
        elsewhere: Whether it runs in another process, whose memory cannot be seen from here.
    """

    run: Callable[[], Outputs]
    expected: Callable[[], Outputs]
    part: Callable[[Tensor], Tensor] | None = None
    elsewhere: bool = False


@dataclass(frozen=True)
class Case:
    """One comparison: the same work on the same inputs by several variants.

    Attributes:
        name: ``op/direction/shape``.
        shapes: What the metadata says about the inputs.
        work: The least work, for the limit.
        variants: By name.
        terms: How many products the longest of the sums adds up.
        yardstick: The variant of plain torch whose own error widens the tolerance, if there is one.
        same_everywhere: Whether all variants must also agree with the yardstick where ``expected``
            has no value.
        by_norm: Whether a result is right by the norm of its difference, and not by its largest
            element: for gradients in 16 bits, where a unit that rounding turns on or off changes
            single elements by any amount.
        ceiling: The most that plain torch's own error may claim of a result's size; None for what
            the dtype usually may.
        seconds: Time for the timed calls of each variant.
        min_repeats: Timed calls of a variant that takes less than that, at the least.
    """

    name: str
    shapes: Mapping[str, Any]
    work: Work
    variants: Mapping[str, Variant] = field(default_factory=dict)
    terms: int = 1
    yardstick: str | None = None
    same_everywhere: bool = False
    by_norm: bool = False
    ceiling: float | None = None
    seconds: float = 0.5
    min_repeats: int = 7


@dataclass(frozen=True)
class Error:
    """How far a variant is from float64, over all its results.

    Attributes:
        absolute: The largest difference.
        relative: The largest difference in a result by that result's largest value.
    """

    absolute: float
    relative: float


def check(case: Case, dtype: torch.dtype, *, tf32: bool = False) -> dict[str, Error]:
    """Runs every variant once and compares it with float64.

    The tolerance of a result, relative to its largest value (or its norm, if the case says so), is
    8 units in the last place, plus 4 sqrt(terms) units of float32 for the order of its sums, plus
    twice plain torch's own error in the same result (the case's yardstick, same dtype and device).
    Where only a part is known in float64, a case can ask that its variants agree with the yardstick
    everywhere, to the sum of both tolerances.

    Args:
        case: What to check.
        dtype: Of the inputs.
        tf32: Whether float32 products may be rounded to TF32.

    Returns:
        Each variant's errors.

    Raises:
        WrongResultError: A variant is beyond tolerance, or not finite.
    """
    accumulator = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    floor = _FLOOR_EPS * (_TF32_EPS if tf32 else torch.finfo(dtype).eps)
    floor += _ORDER_EPS * math.sqrt(case.terms) * accumulator
    found = {name: _compare(case, name, variant) for name, variant in case.variants.items()}
    ceiling = case.ceiling or (_TF32_CEILING if tf32 else _CEILING[dtype])
    yardstick = found.get(case.yardstick or "", {})
    own = {result: min(of.distance / of.size, ceiling) for result, of in yardstick.items()}
    for name, of_results in found.items():
        for result, of in of_results.items():
            tolerance = (2 * own.get(result, 0.0) + floor) * of.size
            if not of.distance <= tolerance:
                raise WrongResultError(
                    f"{case.name}: expected variant {name} to be within {tolerance:.3g} of float64 "
                    f"in {result}, got an error of {of.distance:.3g}"
                )
            if case.same_everywhere and result in yardstick:
                apart = _difference(of.whole, yardstick[result].whole)
                if not apart <= 2 * tolerance:
                    raise WrongResultError(
                        f"{case.name}: expected variant {name} to be within {2 * tolerance:.3g} of "
                        f"variant {case.yardstick} everywhere in {result}, got {apart:.3g}"
                    )
    return {
        name: Error(
            max(of.error for of in of_results.values()),
            max(of.error / of.scale for of in of_results.values()),
        )
        for name, of_results in found.items()
    }


@dataclass(frozen=True)
class _Compared:
    """One result.

    Attributes:
        error: Its largest difference from what was expected.
        scale: The largest expected value.
        distance: What must be within tolerance: the error, or the norm of the difference.
        size: What the tolerance is relative to: the scale, or the norm.
        whole: All of the result.
    """

    error: float
    scale: float
    distance: float
    size: float
    whole: Tensor


def _compare(case: Case, name: str, variant: Variant) -> dict[str, _Compared]:
    expected = variant.expected()
    found = variant.run()
    if found.keys() != expected.keys():
        raise WrongResultError(
            f"{case.name}: expected variant {name} to give {sorted(expected)}, got {sorted(found)}"
        )
    compared = {}
    for result, wanted in expected.items():
        whole = found[result].detach()
        got = whole if variant.part is None else variant.part(whole)
        if got.shape != wanted.shape:
            raise WrongResultError(
                f"{case.name}: expected variant {name} to give {result} of shape "
                f"{list(wanted.shape)}, got {list(got.shape)}"
            )
        error, scale = _difference(got, wanted), max(float(wanted.abs().max()), 1e-30)
        distance, size = error, scale
        if case.by_norm:
            distance = float((got.double() - wanted).norm())
            size = max(float(wanted.norm()), 1e-30)
        compared[result] = _Compared(error, scale, distance, size, whole)
    return compared


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; infinite where one is not a number."""
    difference = float((a.double() - b).abs().max())
    return difference if difference == difference else float("inf")
