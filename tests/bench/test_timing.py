import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from glance_ext.bench.limits import (
    Probe,
    Rates,
    Work,
    _products,
    copy_probe,
    limit_ms,
    limit_timing,
    matrix_probe,
    rates,
)
from glance_ext.bench.timing import (
    Budget,
    Timing,
    last_level_cache,
    measure,
    measure_interleaved,
    peak_mib,
    percentile_95,
    spread,
)

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
MIB = 2**20


def test_a_sleep_takes_as_long_as_it_sleeps():
    timing = measure(lambda: time.sleep(0.01), CPU, Budget(seconds=0.1, flush=False))
    assert 10 <= timing.median_ms < 50
    assert 0 <= timing.iqr_ms < 50
    assert 7 <= timing.repeats <= 10


def test_functions_take_turns_and_every_round_begins_with_another():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    measure_interleaved(
        functions, CPU, Budget(seconds=1, min_repeats=3, max_repeats=3, flush=False), memory=False
    )
    assert "".join(calls[-9:]) == "abcbcacab"


def test_a_slow_function_is_called_three_times_and_leaves_the_rounds():
    budget = Budget(seconds=0.05, min_repeats=6, max_repeats=50, flush=False)
    functions = {"slow": lambda: time.sleep(0.06), "quick": lambda: None}
    timings = measure_interleaved(functions, CPU, budget, memory=False)
    assert timings["slow"].repeats == 3
    assert timings["quick"].repeats == 50


def test_a_very_slow_function_is_timed_once():
    budget = Budget(seconds=0.0005, min_repeats=6, flush=False)
    assert measure(lambda: time.sleep(0.02), CPU, budget).repeats == 1


def test_caches_are_emptied_outside_the_timed_region(monkeypatch):
    flushes = []

    def slow_flush():
        flushes.append(1)
        time.sleep(0.02)

    monkeypatch.setattr("glance_ext.bench.timing._flusher", lambda device: slow_flush)
    timing = measure(lambda: None, CPU, Budget(seconds=0.5, min_repeats=4, max_repeats=4))
    assert len(flushes) == 4
    assert timing.median_ms < 10


def test_spread_is_the_inter_quartile_range():
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == 2.0
    assert spread([7.0]) == 0.0


def test_the_95th_percentile_wants_20_calls():
    assert percentile_95([float(i) for i in range(19)]) is None
    assert percentile_95([float(i) for i in range(101)]) == 95.0
    many = Budget(seconds=1, min_repeats=20, max_repeats=20, flush=False)
    few = Budget(seconds=1, min_repeats=5, max_repeats=5, flush=False)
    sleeps = iter([0.0] * 20 + [0.1] * 2)  # two calls warm, then 20
    timing = measure_interleaved(
        {"": lambda: time.sleep(next(sleeps, 0))}, CPU, many, memory=False
    )[""]
    assert timing.median_ms < 5 < timing.p95_ms
    assert measure(lambda: None, CPU, few).p95_ms is None


def test_peak_memory_on_the_cpu_counts_what_is_held_at_once():
    def two_of_four():
        a = torch.ones(MIB)  # 4 MiB
        b = a + 1
        del a
        c = b + 1
        del b
        return c

    assert peak_mib(two_of_four, CPU) == pytest.approx(8, abs=0.01)


def test_peak_memory_sees_what_native_code_allocates_inside():
    image = torch.zeros(1, 1, 512, 512)
    peak = peak_mib(lambda: torch.nn.functional.unfold(image, 3, padding=1), CPU)
    assert peak >= 9


def test_taking_memory_writes_nothing_to_the_terminal():
    """In a process of its own: the profiler's library asks once a process how much to write."""
    code = "import torch; from glance_ext.bench.timing import peak_mib; "
    code += "peak_mib(lambda: torch.ones(3) + 1, torch.device('cpu'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    assert "USDT" not in done.stderr


def test_last_level_cache_is_of_a_plausible_size():
    assert 2**18 <= last_level_cache(CPU) <= 2**32


def test_probes_state_the_work_that_they_do():
    products = _products(CPU, torch.float32, quick=True)
    assert [probe.name.split(",")[0] for probe in products] == [
        "matrix product 256x256x256",
        "convolution 1x1",
        "convolution 3x3",
    ]
    assert products[0].work == Work(2 * 256**3, 3 * 256**2 * 4)
    for probe in products:
        assert probe.call().numel() > 0
    weight, output = 64 * 64 * 9, 64 * 14 * 14
    assert products[2].call().numel() == output
    assert products[2].work == Work(2 * output * 64 * 9, 4 * (64 * 16 * 16 + weight + output))
    copied = copy_probe(CPU, quick=True)
    assert copied.work.bytes == 2 * copied.call().numel()


@pytest.mark.parametrize("best", ["a", "b"])
def test_the_matrix_rate_is_that_of_the_fastest_product(monkeypatch, best):
    # b does ten times the work, in three times the time or in thirty times
    seconds = {"a": 0.002, "b": 0.06 if best == "a" else 0.006}
    probes = [
        Probe(lambda name=name: time.sleep(seconds[name]), Work(flops, 0), name)
        for name, flops in (("a", 1e9), ("b", 1e10))
    ]
    monkeypatch.setattr("glance_ext.bench.limits._products", lambda *_: probes)
    assert matrix_probe(CPU, torch.float32).name == best


def test_the_limit_is_the_longer_of_arithmetic_and_traffic():
    machine = Rates(flops=1e9, bytes=1e8)
    assert limit_ms(Work(2e6, 1e3), machine) == pytest.approx(2.0)
    assert limit_ms(Work(2e6, 5e5), machine) == pytest.approx(5.0)
    assert Work(1, 2) + Work(10, 20) == Work(11, 22)


def test_the_limit_follows_from_the_probes_times_and_takes_the_binding_ones_spread():
    matrix = Probe(lambda: None, Work(1e9, 0))
    copy = Probe(lambda: None, Work(0, 1e8))
    taken = (Timing(10.0, 1.0, 0.0, 7), Timing(4.0, 2.0, 0.0, 9))
    assert rates(matrix, 10.0, copy, 4.0) == Rates(pytest.approx(1e11), pytest.approx(2.5e10))
    by_arithmetic = limit_timing(Work(2e9, 1e6), matrix, copy, taken)
    assert by_arithmetic == Timing(pytest.approx(20.0), pytest.approx(2.0), None, 7)
    by_traffic = limit_timing(Work(1e6, 5e7), matrix, copy, taken)
    assert by_traffic == Timing(pytest.approx(2.0), pytest.approx(1.0), None, 9)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_times_and_memory_are_the_devices():
    cuda = torch.device("cuda")
    a = torch.randn(64 * MIB // 4, device=cuda)
    timing = measure(lambda: a + 1, cuda, Budget(seconds=0.05))
    assert 0.01 < timing.median_ms < 50
    assert timing.peak_mib == pytest.approx(64, rel=0.05)
