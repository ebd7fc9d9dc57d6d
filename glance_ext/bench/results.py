"""The form of a result file, its check, and its table."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from statistics import geometric_mean
from typing import Any

from glance_ext.report.table import format_table

RESULT_KEYS = (
    "suite",
    "case",
    "variant",
    "device",
    "dtype",
    "median_ms",
    "iqr_ms",
    "peak_mib",
    "max_error",
)
# Behind these where there were enough calls for it.
LATENCY_KEY = "p95_ms"
METADATA_KEYS = (
    "suite",
    "device",
    "dtype",
    "machine",
    "cpu",
    "gpu",
    "cores",
    "threads",
    "torch",
    "cuda",
    "python",
    "glance_ext",
    "git_commit",
    "date",
    "seed",
    "quick",
    "shapes",
    "repeats",
    "rates",
    "method",
)
DTYPES = ("float32", "bfloat16", "float16")

VARIANTS = (
    "reference",
    "patches",
    "fold",
    "nvidia",
    "nvidia-compiled",
    "ours",
    "ours-graph",
    "ours-anew",
    "ours-fused",
    "ours-library",
    "conv2d",
    "copy",
    "limit",
)
# (heading, slower or larger variant, what it is divided by): ratios of medians.
_RATIOS = (
    ("reference/ours", "reference", "ours"),
    ("reference/graph", "reference", "ours-graph"),
    ("patches/ours", "patches", "ours"),
    ("fold/ours", "fold", "ours"),
    ("nvidia/ours", "nvidia", "ours"),
    ("compiled/ours", "nvidia-compiled", "ours"),
    ("library/fused", "ours-library", "ours-fused"),
    ("ours/conv2d", "ours", "conv2d"),
    ("ours/copy", "ours", "copy"),
    ("ours/limit", "ours", "limit"),
    ("graph/limit", "ours-graph", "limit"),
)
_MEMORY_RATIO = ("memory ours/conv2d", "ours", "conv2d")


def result_file_name(results: Mapping[str, Any]) -> str:
    """``<suite>--<machine>--<dtype>.json``."""
    metadata = results["metadata"]
    return f"{metadata['suite']}--{metadata['machine']}--{metadata['dtype']}.json"


def validate_results(results: Any, file_name: str | None = None) -> None:
    """Checks that a result file has the agreed form (benchmarks/README.md).

    Args:
        results: What the file holds.
        file_name: Its name without folders, if it should be checked too.

    Raises:
        ValueError: It has not; the message says what is wrong.
    """
    _expect(isinstance(results, dict), "an object", results)
    _expect(set(results) == {"metadata", "results"}, "metadata and results", sorted(results))
    metadata, rows = results["metadata"], results["results"]
    _expect(isinstance(metadata, dict), "metadata to be an object", metadata)
    missing = [key for key in METADATA_KEYS if key not in metadata]
    _expect(not missing, f"metadata to have {', '.join(METADATA_KEYS)}", f"none of {missing}")
    _expect(metadata["dtype"] in DTYPES, f"dtype to be one of {DTYPES}", metadata["dtype"])
    _expect(
        isinstance(metadata["machine"], str)
        and bool(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", metadata["machine"])),
        "machine to be lower-case words joined by hyphens",
        metadata["machine"],
    )
    _expect(
        bool(re.fullmatch(r"\d{4}-\d{2}-\d{2}", str(metadata["date"]))),
        "date to be YYYY-MM-DD",
        metadata["date"],
    )
    for key in ("matrix_tflops", "copy_gb_s"):
        rate = metadata["rates"].get(key) if isinstance(metadata["rates"], dict) else None
        _expect(_is_number(rate) and float(rate or 0) > 0, f"rates.{key} to be positive", rate)
    _expect(isinstance(rows, list) and bool(rows), "results to be a list of objects", rows)
    seen: set[tuple[str, str]] = set()
    for index, row in enumerate(rows):
        _validate_row(index, row, metadata)
        place = (row["case"], row["variant"])
        _expect(place not in seen, "each variant once a case", f"{place} again")
        seen.add(place)
    for case in {case for case, _ in seen}:
        _expect((case, "ours") in seen, f"a variant ours in {case}", "none")
    if file_name is not None:
        expected = result_file_name(results)
        _expect(file_name == expected, f"the file to be named {expected}", file_name)


def _validate_row(index: int, row: Any, metadata: Mapping[str, Any]) -> None:
    where = f"result {index}"
    _expect(isinstance(row, dict), f"{where} to be an object", row)
    keys = tuple(key for key in row if key != LATENCY_KEY)
    _expect(keys == RESULT_KEYS, f"{where} to have {', '.join(RESULT_KEYS)}", list(row))
    for key in ("suite", "device", "dtype"):
        expected = metadata[key]
        _expect(row[key] == expected, f"{where} to have the metadata's {key} {expected}", row[key])
    for key in ("case", "variant"):
        _expect(
            isinstance(row[key], str) and bool(row[key]), f"{where} to name its {key}", row[key]
        )
    for key in ("shapes", "repeats"):
        _expect(row["case"] in metadata[key], f"{key} of {row['case']}", "none")
    median, iqr = row["median_ms"], row["iqr_ms"]
    _expect(_is_number(median) and median > 0, f"{where} to have a positive median_ms", median)
    _expect(_is_number(iqr) and iqr >= 0, f"{where} to have an iqr_ms of 0 or more", iqr)
    if LATENCY_KEY in row:
        p95 = row[LATENCY_KEY]
        _expect(
            _is_number(p95) and p95 >= median,
            f"{where} to have a {LATENCY_KEY} of at least its median_ms",
            p95,
        )
    for key in ("peak_mib", "max_error"):
        value = row[key]
        unseen = key == "peak_mib" and "/alone/" in row["case"]
        if row["variant"] == "limit" or unseen:
            _expect(value is None, f"{where}, {row['variant']}, to have no {key}", value)
        else:
            _expect(_is_number(value) and value >= 0, f"{where} to have a {key}", value)


def _expect(condition: bool, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"bench results: expected {expected}, got {str(got)[:200]}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def format_results(results: Mapping[str, Any]) -> str:
    """A table for each op, with the geometric mean of every ratio as its last row.

    Args:
        results: What :func:`glance_ext.bench.run_suite` returned or a result file holds.
    """
    metadata = results["metadata"]
    cases: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in results["results"]:
        cases.setdefault(row["case"], {})[row["variant"]] = row
    groups: dict[str, dict[str, dict[str, Mapping[str, Any]]]] = {}
    for case, variants in cases.items():
        group, _, rest = case.partition("/")
        groups.setdefault(group, {})[rest or group] = variants
    rates = metadata["rates"]
    lines = [
        f"{metadata['suite']} on {metadata['gpu'] or metadata['cpu']}, {metadata['dtype']}, "
        f"{metadata['threads']} threads, torch {metadata['torch']}, {metadata['date']}",
        f"measured rates: {rates['matrix_tflops']:.3g} TFLOP/s, {rates['copy_gb_s']:.3g} GB/s; "
        "medians in ms",
    ]
    for group, of_group in groups.items():
        lines += ["", group, _format_group(of_group)]
    return "\n".join(lines)


def _format_group(cases: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    found = dict.fromkeys(name for variants in cases.values() for name in variants)
    names = sorted(
        found, key=lambda name: VARIANTS.index(name) if name in VARIANTS else len(VARIANTS)
    )
    ratios = [
        (heading, "median_ms", above, below)
        for heading, above, below in _RATIOS
        if any(above in variants and below in variants for variants in cases.values())
    ]
    if any({"ours", "conv2d"} <= set(variants) for variants in cases.values()):
        heading, above, below = _MEMORY_RATIO
        ratios.append((heading, "peak_mib", above, below))
    table = []
    collected: list[list[float]] = [[] for _ in ratios]
    for case, variants in cases.items():
        cells: list[object] = [case]
        cells += [_ms(variants[name]) if name in variants else "-" for name in names]
        for values, (_, key, above, below) in zip(collected, ratios, strict=True):
            ratio = _ratio(variants, key, above, below)
            if ratio is not None:
                values.append(ratio)
            cells.append("-" if ratio is None else f"{ratio:.3g}x")
        table.append(cells)
    means = [f"{geometric_mean(values):.3g}x" if values else "-" for values in collected]
    table.append(["geometric mean", *("" for _ in names), *means])
    return format_table(["case", *names, *(heading for heading, *_ in ratios)], table)


def _ms(row: Mapping[str, Any]) -> str:
    value = float(row["median_ms"])
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _ratio(
    variants: Mapping[str, Mapping[str, Any]], key: str, above: str, below: str
) -> float | None:
    if above not in variants or below not in variants:
        return None
    numerator, denominator = variants[above][key], variants[below][key]
    return numerator / denominator if numerator and denominator else None
