"""Measures evaluation over many large maps: seconds a map, and the most memory it takes.

    python benchmarks/evaluation.py --json docs/results/evaluation.json

Each count of maps is measured in a process of its own, on one thread. Scores are smooth noise, a
quarter of the maps has a defect; made beforehand, so that making them costs nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from glance_ext.bench.machine import describe
from glance_ext.files import write_json
from glance_ext.metrics import PixelStore

SIDE, VARIANTS = 1024, 8
COUNTS = (40, 200, 400)


def measure(count: int) -> dict[str, float]:
    """Seconds and memory of one evaluation of so many maps of 1024x1024."""
    rng = np.random.default_rng(0)
    coarse = rng.random((VARIANTS, SIDE // 8, SIDE // 8), dtype=np.float32)
    maps = coarse.repeat(8, 1).repeat(8, 2) + rng.random((VARIANTS, SIDE, SIDE), dtype=np.float32)
    empty = np.zeros((SIDE, SIDE), bool)
    defect = empty.copy()
    defect[300:420, 500:560] = True
    before = _peak_mib()
    start = time.perf_counter()
    with PixelStore() as store:
        for index in range(count):
            anomaly_map = maps[index % VARIANTS] + np.float32(index / count)
            store.add(anomaly_map, defect if index % 4 == 0 else empty)
        figures = store.metrics()
    seconds = time.perf_counter() - start
    assert 0 < figures.pixel_AUPRO < 1
    return {
        "maps": count,
        "seconds": seconds,
        "ms_a_map": 1e3 * seconds / count,
        "mib_beyond_the_maps": _peak_mib() - before,
    }


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="Write the figures to this file.")
    parser.add_argument("--maps", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.maps:
        print(json.dumps(measure(arguments.maps)))
        return
    found = []
    for count in COUNTS:
        command = [sys.executable, __file__, "--maps", str(count)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout
        found.append(json.loads(output))
        print(found[-1], file=sys.stderr)
    if arguments.json:
        write_json(arguments.json, {"metadata": describe(torch.device("cpu")), "results": found})


if __name__ == "__main__":
    main()
