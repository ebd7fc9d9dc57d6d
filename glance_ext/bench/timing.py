"""Times and peak memory of functions, measured alike on CPU and CUDA.

Timed: one call, warm, with the caches emptied in front of it (a buffer larger than the last level
is overwritten), on CUDA by events on the current stream, on the CPU by ``time.perf_counter``.
Several functions take turns, so that a drift of the machine hits all alike.
"""

from __future__ import annotations

import contextlib
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]

_MIB = 2**20
_LAST_LEVEL_FALLBACK = 32 * _MIB
# A longer flush on CUDA lets the host run ahead, so that its launches hide as in a training loop.
_CUDA_FLUSH_MIN = 256 * _MIB
_SLOW_REPEATS = 3
_VERY_SLOW = 20
# The 95th percentile of fewer calls than this says nothing.
_PERCENTILE_CALLS = 20


@dataclass(frozen=True)
class Timing:
    """What one function took.

    Attributes:
        median_ms: Median of the timed calls in milliseconds.
        iqr_ms: Their inter-quartile range, third minus first quartile.
        peak_mib: Most memory that a call held beyond what was there before, in MiB, its results
            included; None if it was not measured.
        repeats: How many calls were timed.
        p95_ms: The 95th percentile of the timed calls; None if there were less than 20.
    """

    median_ms: float
    iqr_ms: float
    peak_mib: float | None
    repeats: int
    p95_ms: float | None = None


@dataclass(frozen=True)
class Budget:
    """How long to measure each function.

    Attributes:
        seconds: Time of the timed calls together, flushes not counted.
        min_repeats: Timed calls at the least; 3 for a function whose one call takes longer than
            ``seconds``, 1 if it takes 20 times as long.
        max_repeats: Timed calls at the most.
        flush: Whether to empty the caches before each call.
    """

    seconds: float = 0.5
    min_repeats: int = 7
    max_repeats: int = 200
    flush: bool = True


QUICK = Budget(seconds=0.005, min_repeats=3, max_repeats=3, flush=False)


def measure(fn: Call, device: torch.device, budget: Budget | None = None) -> Timing:
    """Times one function and takes its peak memory.

    Args:
        fn: Does the work; whether its result is right is the caller's business.
        device: Where it does it.
        budget: How long to measure; a default one without.
    """
    return measure_interleaved({"": fn}, device, budget)[""]


def measure_interleaved(
    functions: Mapping[str, Call],
    device: torch.device,
    budget: Budget | None = None,
    *,
    memory: bool = True,
) -> dict[str, Timing]:
    """Times several functions in turns: one call of each, then the next round.

    Each round begins with another function. A function that has used up its budget leaves the
    rounds. Before them come a call that takes memory, which warms a slow function up, and two more
    of a quick one.

    Args:
        functions: By name.
        device: Where they work.
        budget: How long to measure each; a default one without.
        memory: Whether to take peak memory too.

    Returns:
        A timing for each name.
    """
    budget = budget or Budget()
    flush = _flusher(device) if budget.flush else _nothing
    peaks: dict[str, float | None] = {}
    wanted: dict[str, int] = {}
    for name, fn in functions.items():
        started = time.perf_counter()
        peaks[name] = peak_mib(fn, device) if memory else None
        once = (time.perf_counter() - started) * 1e3
        if once <= budget.seconds * 1e3:
            _time_call(fn, device, _nothing)
            once = _time_call(fn, device, _nothing)
        wanted[name] = _repeats(once, budget)
    times: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for round_index in range(max(wanted.values(), default=0)):
        start = round_index % len(names)
        for name in names[start:] + names[:start]:
            if round_index < wanted[name]:
                times[name].append(_time_call(functions[name], device, flush))
    return {
        name: Timing(
            statistics.median(taken), spread(taken), peaks[name], len(taken), percentile_95(taken)
        )
        for name, taken in times.items()
    }


def _repeats(once_ms: float, budget: Budget) -> int:
    """How often to time a function whose one call takes ``once_ms``."""
    calls = budget.seconds * 1e3 / max(once_ms, 1e-6)
    if calls < 1:
        return min(1 if calls < 1 / _VERY_SLOW else _SLOW_REPEATS, budget.min_repeats)
    return max(budget.min_repeats, min(int(calls), budget.max_repeats))


def spread(values: list[float]) -> float:
    """Inter-quartile range; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return third - first


def percentile_95(values: list[float]) -> float | None:
    """The 95th percentile; None of fewer than 20 values."""
    if len(values) < _PERCENTILE_CALLS:
        return None
    return statistics.quantiles(values, n=20, method="inclusive")[-1]


def peak_mib(fn: Call, device: torch.device) -> float:
    """Most memory that one call of ``fn`` holds beyond what was there before, in MiB.

    On CUDA from the caching allocator (``torch.cuda.max_memory_allocated``). On the CPU by adding
    up torch's own record of its allocations and frees; what a library takes by itself (oneDNN's
    scratch space, for one) does not show there.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        fn()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / _MIB
    with _quiet_profiler(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        fn()
    events = profile.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most / _MIB


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache: the L2 of a CUDA device, the last level of the first core."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KM])", path.read_text(encoding="ascii").strip())
        if found:
            sizes.append(int(found[1]) * (1024 if found[2] == "K" else _MIB))
    return max(sizes, default=_LAST_LEVEL_FALLBACK)


def _flusher(device: torch.device) -> Call:
    """A function that overwrites twice the last-level cache (on CUDA 256 MiB at least)."""
    size = 2 * last_level_cache(device)
    if device.type == "cuda":
        size = max(2 * size, _CUDA_FLUSH_MIN)
    buffer = torch.empty(size, dtype=torch.uint8, device=device)
    return buffer.zero_


@contextlib.contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Keeps the profiler's library from writing to the terminal, which it does by default."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ[name] = before or "99"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


def _nothing() -> None:
    pass


def _time_call(fn: Call, device: torch.device, flush: Call) -> float:
    """Milliseconds of one call."""
    if device.type == "cuda":
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        with torch.cuda.device(device):
            flush()
            begin.record()
            result = fn()
            end.record()
            end.synchronize()
        del result
        return float(begin.elapsed_time(end))
    flush()
    start = time.perf_counter()
    result = fn()
    taken = (time.perf_counter() - start) * 1e3
    del result
    return taken
