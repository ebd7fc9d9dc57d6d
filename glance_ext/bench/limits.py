"""What the machine can do at best: its own measured matrix rate and copy rate.

The limit of a piece of work is ``max(flops / matrix rate, bytes / copy rate)`` on the least work
that gives the exact answer. The two probes take turns with the variants of a case, so that they
see the machine in the same state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from glance_ext.bench.timing import Budget, Call, Timing, last_level_cache, measure_interleaved

_MIB = 2**20
_PROBE_BUDGET = Budget(seconds=0.1, min_repeats=5, max_repeats=10, flush=False)


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
    name: str = ""


@dataclass(frozen=True)
class Rates:
    """Flops a second of the fastest product, bytes (read + written) a second of a large copy."""

    flops: float
    bytes: float


def matrix_probe(device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> Probe:
    """The fastest of several large products in ``dtype``.

    Which of a machine's libraries is fastest depends on the machine: MKL's float32 product reaches
    half of oneDNN's convolution on an AMD processor. So a square matrix product and convolutions
    1x1 and 3x3 in channels_last are tried, and the limit follows from the best.

    For float32 on CUDA the product may use TF32 exactly if torch's convolutions may, since a limit
    must hold for what it is compared with.
    """
    probes = _products(device, dtype, quick)
    taken = measure_interleaved(
        {probe.name: probe.call for probe in probes}, device, _PROBE_BUDGET, memory=False
    )
    return max(probes, key=lambda probe: probe.work.flops / taken[probe.name].median_ms)


def _products(device: torch.device, dtype: torch.dtype, quick: bool) -> list[Probe]:
    """A matrix product and two convolutions, large enough for their rate to be the machine's."""
    cuda = device.type == "cuda"
    # side of the matrices; images, side and channels of the convolutions
    side, images, pixels, channels = (8192, 32, 64, 512) if cuda else (1024, 2, 64, 256)
    if quick:
        side, images, pixels, channels = 256, 1, 16, 64
    probes = [_matrix_product(side, device, dtype)]
    for kernel, scale in ((1, 2), (3, 1)):  # 1x1 with twice the channels, to be as large
        probes.append(_convolution(images, pixels, scale * channels, kernel, device, dtype))
    return probes


def _matrix_product(side: int, device: torch.device, dtype: torch.dtype) -> Probe:
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

    work = Work(2.0 * side**3, 3.0 * side**2 * a.element_size())
    return Probe(product, work, f"matrix product {side}x{side}x{side}")


def _convolution(
    images: int, pixels: int, channels: int, kernel: int, device: torch.device, dtype: torch.dtype
) -> Probe:
    def draw(*size: int) -> torch.Tensor:
        values = torch.randn(size, device=device)
        return values.to(dtype=dtype, memory_format=torch.channels_last)

    x = draw(images, channels, pixels, pixels)
    weight = draw(channels, channels, kernel, kernel)
    outputs = float(images * channels * (pixels - kernel + 1) ** 2)
    work = Work(
        2.0 * outputs * channels * kernel**2, (x.numel() + weight.numel() + outputs) * x.itemsize
    )
    return Probe(
        lambda: F.conv2d(x, weight),
        work,
        f"convolution {kernel}x{kernel}, {channels} channels, {images} of {pixels}x{pixels}",
    )


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
