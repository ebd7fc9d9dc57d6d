"""What the machine can do at best: its own measured matrix rate and copy rate.

The limit of a piece of work is ``max(flops / matrix rate, bytes / copy rate)`` on the least work
that gives the exact answer. The two probes take turns with the variants of a case, so that they
see the machine in the same state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from glance_ext.bench.timing import Call, Timing, last_level_cache

_MIB = 2**20


@dataclass(frozen=True)
class Work:
    """The least work of a case.

    Attributes:
        flops: Floating-point operations, a multiply-add counting as two.
        bytes: Bytes read from and written to memory, each input and output once.
    """

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Probe:
    """A call that does nothing but ``work``."""

    call: Call
    work: Work


@dataclass(frozen=True)
class Rates:
    """Flops a second of a large matrix product, bytes (read + written) a second of a large copy."""

    flops: float
    bytes: float


def matrix_probe(device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> Probe:
    """A large square matrix product in ``dtype``.

    For float32 on CUDA it may use TF32 exactly if torch's convolutions may, since a limit must
    hold for what it is compared with.
    """
    side = 8192 if device.type == "cuda" else 1024
    if quick:
        side = 256
    a = torch.randn(side, side, device=device).to(dtype)
    b = torch.randn(side, side, device=device).to(dtype)
    out = torch.empty_like(a)

    def product() -> torch.Tensor:
        if device.type != "cuda":
            return torch.mm(a, b, out=out)
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
        try:
            return torch.mm(a, b, out=out)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return Probe(product, Work(2.0 * side**3, 3.0 * side**2 * a.element_size()))


def copy_probe(device: torch.device, *, quick: bool = False) -> Probe:
    """A copy that no cache holds: four times the last level, on CUDA 2 GiB at least."""
    size = 4 * last_level_cache(device)
    if device.type == "cuda":
        size = max(size, 2048 * _MIB)
    if quick:
        size = 4 * _MIB
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Probe(lambda: target.copy_(source), Work(0.0, 2.0 * size * source.element_size()))


def rates(matrix: Probe, matrix_ms: float, copy: Probe, copy_ms: float) -> Rates:
    """The rates that the probes' times mean."""
    return Rates(matrix.work.flops / (matrix_ms * 1e-3), copy.work.bytes / (copy_ms * 1e-3))


def limit_ms(work: Work, rates: Rates) -> float:
    """Milliseconds that ``work`` takes at least."""
    return 1e3 * max(work.flops / rates.flops, work.bytes / rates.bytes)


def limit_timing(work: Work, matrix: Probe, copy: Probe, taken: tuple[Timing, Timing]) -> Timing:
    """The limit as a variant: its spread is the binding probe's, scaled alike; no memory."""
    matrix_taken, copy_taken = taken
    measured = rates(matrix, matrix_taken.median_ms, copy, copy_taken.median_ms)
    limit = limit_ms(work, measured)
    by_flops = work.flops / measured.flops >= work.bytes / measured.bytes
    binding = matrix_taken if by_flops else copy_taken
    return Timing(limit, binding.iqr_ms * limit / binding.median_ms, None, binding.repeats)
