"""Prints what the CUDA kernels take of a multiprocessor; benchmarks/kernel_resources.json has it.

    python benchmarks/kernel_resources.py [--json benchmarks/kernel_resources.json] [SOURCE.cu ...]

Compiles the sources for each architecture and reads the compiler's report. Needs nvcc and a C++
compiler, no GPU. Exits with 1 if a kernel spills registers to memory.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Shared memory of a multiprocessor in bytes, by architecture (CUDA C++ Programming Guide, table of
# compute capabilities); each block takes 1 KiB more than it asks for.
SHARED = {80: 164 * 1024, 90: 228 * 1024}
REGISTERS, WARPS = 65536, 64
# Shared memory of the tiled convolutions grows with the taps and the steps over the channels: those
# of a 3x3 kernel on 256 channels of 16 bits.
TAPS, STEPS = 9, 72
MATH = {"0": "tensor cores", "1": "plain"}
REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\d+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@dataclass
class Kernel:
    """All instances of one kernel, or one instance of a tiled one, by architecture."""

    registers: dict[int, list[int]] = field(default_factory=dict)
    spills: dict[int, int] = field(default_factory=dict)
    shared: int = 0
    threads: int = 256  # csrc/common/cuda_scalar.cuh

    def add(self, arch: int, registers: int, spills: int) -> None:
        """Counts one instance."""
        self.registers.setdefault(arch, []).append(registers)
        self.spills[arch] = self.spills.get(arch, 0) + spills

    def blocks(self, arch: int) -> int:
        """How many blocks a multiprocessor holds at a time."""
        a_warp = -(-max(self.registers[arch]) * 32 // 256) * 256  # in units of 256
        warps = self.threads // 32
        return min(
            REGISTERS // (a_warp * warps), WARPS // warps, SHARED[arch] // (self.shared + 1024)
        )


def compile_report(source: Path, arch: int, folder: Path) -> str:
    """What ptxas says of a source's kernels, with names as in C++."""
    command = ["nvcc", "-O3", "-Xptxas", "-v", f"-arch=sm_{arch}", "-I", str(ROOT / "csrc")]
    result = subprocess.run(
        [*command, "-cubin", str(source), "-o", str(folder / "kernel.cubin")],
        capture_output=True,
        text=True,
    )
    if result.returncode != 0:
        sys.exit(result.stderr)
    return result.stdout + result.stderr


def demangled(names: list[str]) -> list[str]:
    """C++ names without the namespaces."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        sys.exit("cu++filt or c++filt is not on PATH")
    text = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True).stdout
    return re.sub(r"glance::|\(anonymous namespace\)::|_INTERNAL_\w+::", "", text).splitlines()


def tile_sizes(tiles: list[str], folder: Path) -> dict[str, tuple[int, int]]:
    """Threads and bytes of shared memory of `Tile, Work` pairs: from the headers that know them."""
    prints = "".join(
        f'  std::printf("%d %d\\n", {tile.rpartition(", ")[0]}::kThreads, '
        f"int(TileMemory<{tile}>::bytes({TAPS}, {STEPS})));\n"
        for tile in tiles
    )
    program = folder / "sizes.cpp"
    program.write_text(
        '#include <cstdio>\n#include "hole_windows/hole_conv_tile.h"\n'
        '#include "partial_conv/fused_tile.h"\n'
        f"using namespace glance;\nint main() {{\n{prints}}}\n"
    )
    binary = folder / "sizes"
    command = ["c++", "-std=c++17", "-I", str(ROOT / "csrc"), str(program), "-o", str(binary)]
    subprocess.run(command, check=True)
    lines = subprocess.run([binary], capture_output=True, text=True, check=True).stdout.splitlines()
    pairs = [tuple(map(int, line.split())) for line in lines]
    return {tile: (pair[0], pair[1]) for tile, pair in zip(tiles, pairs, strict=True)}


def label(tile: str) -> str:
    """`ConvTile<Half, (Math)0, 64, 8>, Work` in words."""
    found = re.fullmatch(r"ConvTile<(\w+), \(Math\)(\d), (\d+), (\d+)>, \w+", tile)
    assert found is not None, tile
    dtype, math, columns, chunk = found.groups()
    return f"convolve: {dtype.lower()}, {MATH[math]}, {columns} columns, {chunk}-byte copies"


def collect(sources: list[Path]) -> dict[str, Kernel]:
    """The kernels of the sources, by name."""
    kernels: dict[str, Kernel] = {}
    tiles: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for source in sources:
            for arch in SHARED:
                found = list(REPORT.finditer(compile_report(source, arch, folder)))
                for match, full in zip(
                    found, demangled([match["name"] for match in found]), strict=True
                ):
                    tile = re.search(r"\bconvolve_kernel<(ConvTile<.*?>, \w+) ?>", full)
                    short = re.search(r"(\w+)_kernel\b", full)
                    assert short is not None, full
                    key = f"{source.stem}: {label(tile[1]) if tile else short[1]}"
                    kernel = kernels.setdefault(key, Kernel())
                    kernel.add(arch, int(match["registers"]), int(match["stores"]))
                    static = re.search(r"(\d+) bytes smem", match["rest"])
                    kernel.shared = max(kernel.shared, int(static[1]) if static else 0)
                    if tile:
                        tiles[tile[1]] = key
        if tiles:
            for tile_name, (threads, shared) in tile_sizes(list(tiles), folder).items():
                kernel = kernels[tiles[tile_name]]
                kernel.threads, kernel.shared = threads, shared
    return dict(sorted(kernels.items(), key=lambda item: natural(item[0])))


def record(kernels: dict[str, Kernel]) -> dict[str, Any]:
    """All of it for the committed file."""
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release [\d.]+, V([\d.]+)", version)
    return {
        "nvcc": found[1] if found else "unknown",
        "taps": TAPS,
        "steps": STEPS,
        "kernels": {
            name: {
                "threads": kernel.threads,
                "shared_bytes": kernel.shared,
                **{
                    f"sm_{arch}": {
                        "registers": [min(registers), max(registers)],
                        "spilled_bytes": kernel.spills[arch],
                        "blocks": kernel.blocks(arch),
                    }
                    for arch, registers in kernel.registers.items()
                },
            }
            for name, kernel in kernels.items()
        },
    }


def table(kernels: dict[str, Kernel]) -> str:
    """Markdown: registers of a thread, shared memory of a block, blocks of a multiprocessor."""
    archs = list(SHARED)
    head = [f"registers sm_{arch}" for arch in archs] + ["threads", "shared bytes"]
    head += [f"blocks sm_{arch}" for arch in archs] + ["spilled bytes"]
    lines = [f"| kernel | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for name, kernel in kernels.items():
        ranges = []
        for arch in archs:
            low, high = min(kernel.registers[arch]), max(kernel.registers[arch])
            ranges.append(str(low) if low == high else f"{low}-{high}")
        cells = [*ranges, kernel.threads, kernel.shared]
        cells += [kernel.blocks(arch) for arch in archs] + [sum(kernel.spills.values())]
        lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def natural(text: str) -> list[tuple[int, str]]:
    """Sorts 8 before 16."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="*", type=Path, help="default: all of csrc")
    parser.add_argument("--json", type=Path, help="also writes them to this file")
    arguments = parser.parse_args()
    kernels = collect(arguments.sources or sorted((ROOT / "csrc").rglob("*.cu")))
    print(table(kernels))
    if arguments.json:
        arguments.json.write_text(json.dumps(record(kernels), indent=1) + "\n", encoding="utf-8")
    if any(sum(kernel.spills.values()) for kernel in kernels.values()):
        sys.exit("some kernels spill registers")


if __name__ == "__main__":
    main()
