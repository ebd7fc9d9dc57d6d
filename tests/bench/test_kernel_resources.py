"""benchmarks/kernel_resources.json: what the CUDA kernels take, as the compiler reported it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARCHS = ("sm_80", "sm_90")


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "kernel_resources.json").read_text(encoding="utf-8"))


def test_every_kernel_is_there_and_none_that_is_gone(record: dict[str, Any]) -> None:
    sources = sorted((ROOT / "csrc").rglob("*.cu"))
    assert len(sources) >= 6
    named = {tuple(name.split(": ")[:2]) for name in record["kernels"]}
    defined = set()
    for source in sources:
        text = source.read_text()
        if "gemm_cuda.cuh" in text:
            text += (ROOT / "csrc" / "implicit_gemm" / "gemm_cuda.cuh").read_text()
        found = re.findall(r"__global__ [^;{]*?(\w+)_kernel\(", text)
        assert found, source
        defined |= {(source.stem, name) for name in found}
    assert named == defined


def test_no_kernel_spills_registers(record: dict[str, Any]) -> None:
    for name, kernel in record["kernels"].items():
        for arch in ARCHS:
            assert kernel[arch]["spilled_bytes"] == 0, f"{name}, {arch}"


def test_several_blocks_fit_a_multiprocessor(record: dict[str, Any]) -> None:
    """One block's barriers and copies are hidden by the work of another."""
    for name, kernel in record["kernels"].items():
        for arch in ARCHS:
            low, high = kernel[arch]["registers"]
            assert 0 < low <= high <= 255
            assert kernel[arch]["blocks"] >= 2, f"{name}, {arch}"
