"""Prints what the CUDA kernels take of a multiprocessor, as the table of docs/performance.md.

    python benchmarks/kernel_resources.py [SOURCE.cu ...]

Compiles the sources for each architecture and reads the compiler's report. Needs nvcc and a C++
compiler, no GPU. Exits with 1 if a kernel spills registers to memory.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Shared memory of a multiprocessor in bytes, by architecture (CUDA C++ Programming Guide, table of
# compute capabilities); each block takes 1 KiB more than it asks for.
SHARED = {80: 164 * 1024, 90: 228 * 1024}
REGISTERS, WARPS = 65536, 64
TAPS = 9  # of a 3x3 kernel: hole_conv's shared memory grows with them
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
    """Threads and bytes of shared memory of hole_conv's tiles: from the header that knows them."""
    prints = "".join(
        f'  std::printf("%d %d\\n", {tile}::kThreads, int(TileMemory<{tile}>::bytes({TAPS})));\n'
        for tile in tiles
    )
    program = folder / "sizes.cpp"
    program.write_text(
        '#include <cstdio>\n#include "hole_windows/hole_conv_kernel.h"\n'
        f"using namespace glance;\nint main() {{\n{prints}}}\n"
    )
    binary = folder / "sizes"
    command = ["c++", "-std=c++17", "-I", str(ROOT / "csrc"), str(program), "-o", str(binary)]
    subprocess.run(command, check=True)
    lines = subprocess.run([binary], capture_output=True, text=True, check=True).stdout.splitlines()
    pairs = [tuple(map(int, line.split())) for line in lines]
    return {tile: (pair[0], pair[1]) for tile, pair in zip(tiles, pairs, strict=True)}


def label(tile: str) -> str:
    """`ConvTile<Half, (Math)0, 64, 8>` in words."""
    found = re.fullmatch(r"ConvTile<(\w+), \(Math\)(\d), (\d+), (\d+)>", tile)
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
                    tile = re.search(r"\bconvolve_kernel<(ConvTile<.*?>) ?>", full)
                    short = re.search(r"(\w+)_kernel\b", full)
                    assert short is not None, full
                    key = label(tile[1]) if tile else f"{source.stem}: {short[1]}"
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
    return kernels


def table(kernels: dict[str, Kernel]) -> str:
    """Markdown: registers of a thread, shared memory of a block, blocks of a multiprocessor."""
    archs = list(SHARED)
    head = [f"registers sm_{arch}" for arch in archs] + ["threads", "shared bytes"]
    head += [f"blocks sm_{arch}" for arch in archs] + ["spilled bytes"]
    lines = [f"| kernel | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for name, kernel in sorted(kernels.items(), key=lambda item: natural(item[0])):
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
    sources = parser.parse_args().sources or sorted((ROOT / "csrc").rglob("*.cu"))
    kernels = collect(sources)
    print(table(kernels))
    if any(sum(kernel.spills.values()) for kernel in kernels.values()):
        sys.exit("some kernels spill registers")


if __name__ == "__main__":
    main()
