"""Runs a suite: checks every variant, then times them in turns beside the machine's own limits."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Collection
from typing import Any

import torch

from glance_ext import _library
from glance_ext.bench.cases import Case, check
from glance_ext.bench.limits import Probe, copy_probe, limit_timing, matrix_probe, rates
from glance_ext.bench.machine import describe, uses_tf32
from glance_ext.bench.results import DTYPES, LATENCY_KEY, VARIANTS, format_results, validate_results
from glance_ext.bench.suites import SUITES
from glance_ext.bench.timing import QUICK, Budget, Timing, measure_interleaved
from glance_ext.errors import GlanceError

__all__ = ["SUITES", "format_results", "run_suite"]

# What others are compared with, or what it is all about.
_NEEDED = ("reference", "conv2d", "copy", "ours", "limit")

METHOD = (
    "Every variant is compared with float64 before it is timed (aggregation in the first and the "
    "last map; detection in the pixels and patches that shapes name, and everywhere with its "
    "reference). Median and inter-quartile range of warm calls, the variants of a case and the two "
    "probes of the machine taking turns; p95_ms is the 95th percentile, of 20 calls or more. In "
    "front of each call a buffer larger than the last-level cache is overwritten. CUDA: events on "
    "the current stream, the flush in front hiding the host's launches as far as it lasts; CPU: "
    "time.perf_counter. Memory: the most that one call held beyond what was there before, results "
    "included, from torch's allocators. limit = max(flops / matrix rate, bytes / copy rate) on the "
    "least work, rates from the fastest of some large products (rates.matrix_by) and a large copy "
    "(read + written) in the same turns. max_error: largest absolute error against float64; conv2d "
    "and copy, which do other work, against their own. relative_errors: largest error of a result "
    "by its largest value. A training step in bfloat16 or TF32 is right by its results' norms."
)
QUICK_METHOD = " A quick run: small shapes, three calls, caches not emptied; no result to quote."


def run_suite(
    name: str,
    *,
    device: str | torch.device = "cpu",
    dtype: str = "float32",
    seed: int = 0,
    quick: bool = False,
    without: Collection[str] = (),
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Runs one suite.

    Args:
        name: A key of :data:`SUITES`.
        device: ``"cpu"`` or a CUDA device.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        seed: Of the inputs.
        quick: A few small shapes and calls, to see that all runs.
        without: Variants to leave out, such as one that takes long to compile.
        progress: Is told each case's name before it is measured.

    Returns:
        ``{"metadata": {...}, "results": [...]}`` as benchmarks/README.md describes it; valid by
        :func:`glance_ext.bench.validate_results`.

    Raises:
        GlanceError: There is no such suite, dtype, device or variant to leave out, the native ops
            are missing, or a variant's result is wrong.
    """
    if name not in SUITES:
        raise GlanceError(
            f"bench: expected a suite, one of {', '.join(sorted(SUITES))}, got {name!r}"
        )
    if dtype not in DTYPES:
        raise GlanceError(f"bench: expected a dtype, one of {', '.join(DTYPES)}, got {dtype!r}")
    spare = [name for name in VARIANTS if name not in _NEEDED]
    for left_out in without:
        if left_out not in spare:
            raise GlanceError(
                f"bench: expected a variant to leave out, one of {', '.join(spare)}, got "
                f"{left_out!r}"
            )
    on = _usable_device(device)
    torch_dtype: torch.dtype = getattr(torch, dtype)
    matrix = matrix_probe(on, torch_dtype, quick=quick)
    copy = copy_probe(on, quick=quick)
    rows: list[dict[str, Any]] = []
    repeats: dict[str, dict[str, int]] = {}
    relative: dict[str, dict[str, float]] = {}
    shapes: dict[str, Any] = {}
    probed: list[tuple[float, float]] = []
    for case in SUITES[name](torch_dtype, on, seed, quick):
        if progress is not None:
            progress(case.name)
        kept = {name: run for name, run in case.variants.items() if name not in without}
        case = dataclasses.replace(case, variants=kept)
        errors = check(case, torch_dtype, tf32=dtype == "float32" and uses_tf32(on))
        timings, probe_ms = _measure(case, on, matrix, copy, quick)
        probed.append(probe_ms)
        shapes[case.name] = dict(case.shapes) | {
            "least_gflop": case.work.flops / 1e9,
            "least_mib": case.work.bytes / 2**20,
        }
        relative[case.name] = {variant: error.relative for variant, error in errors.items()}
        repeats[case.name] = {variant: timing.repeats for variant, timing in timings.items()}
        rows += [
            {
                "suite": name,
                "case": case.name,
                "variant": variant,
                "device": on.type,
                "dtype": dtype,
                "median_ms": timing.median_ms,
                "iqr_ms": timing.iqr_ms,
                "peak_mib": timing.peak_mib,
                "max_error": errors[variant].absolute if variant in errors else None,
            }
            | ({} if timing.p95_ms is None else {LATENCY_KEY: timing.p95_ms})
            for variant, timing in timings.items()
        ]
    measured = rates(
        matrix,
        statistics.median(ms for ms, _ in probed),
        copy,
        statistics.median(ms for _, ms in probed),
    )
    metadata = {"suite": name, "device": on.type, "dtype": dtype} | describe(on)
    metadata |= {
        "seed": seed,
        "quick": quick,
        "rates": {
            "matrix_tflops": measured.flops / 1e12,
            "matrix_by": matrix.name,
            "copy_gb_s": measured.bytes / 1e9,
        },
        "method": METHOD + (QUICK_METHOD if quick else ""),
        "shapes": shapes,
        "repeats": repeats,
        "relative_errors": relative,
    }
    results = {"metadata": metadata, "results": rows}
    validate_results(results)
    return results


def _measure(
    case: Case, device: torch.device, matrix: Probe, copy: Probe, quick: bool
) -> tuple[dict[str, Timing], tuple[float, float]]:
    """Timings of a case's variants and its limit, and the probes' milliseconds."""
    budget = QUICK if quick else Budget(seconds=case.seconds, min_repeats=case.min_repeats)
    probes = {"matrix probe": matrix.call, "copy probe": copy.call}
    functions = {name: variant.run for name, variant in case.variants.items()}
    taken = measure_interleaved(functions | probes, device, budget)
    of_matrix, of_copy = (taken.pop(name) for name in probes)
    for name, variant in case.variants.items():
        if variant.elsewhere:
            taken[name] = dataclasses.replace(taken[name], peak_mib=None)
    taken["limit"] = limit_timing(case.work, matrix, copy, (of_matrix, of_copy))
    return taken, (of_matrix.median_ms, of_copy.median_ms)


def _usable_device(device: str | torch.device) -> torch.device:
    """The device, once it is sure that our own kernels run there and not their reference."""
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise GlanceError(f"bench: expected a device, got {device!r}") from error
    if chosen.type not in ("cpu", "cuda"):
        raise GlanceError(f"bench: expected a cpu or cuda device, got {device!r}")
    if not _library.is_loaded():
        raise GlanceError(f"bench: {_library.why_not_loaded()}")
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise GlanceError(f"bench: expected a CUDA device for {device!r}, torch finds none")
        if not _library.build_info().get("cuda"):
            raise GlanceError("bench: expected native ops with CUDA, got a build for CPU only")
    return chosen
