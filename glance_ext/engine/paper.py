"""The paper's tables, to set results beside."""

from __future__ import annotations

import csv
from pathlib import Path

_DATA = Path(__file__).resolve().parent.parent / "data"
_TABLES = {
    "mvtec": ("table1_mvtec_pro.csv", "category"),
    "cifar10": ("table3_cifar10_auroc.csv", "normal_class"),
}
OURS = "Glance"
"""The column of the method itself."""


def paper_table(dataset: str) -> dict[str, dict[str, float]]:
    """The figures of every method, by row: categories or classes, and last ``mean``.

    Args:
        dataset: ``"mvtec"`` for Table 1 (PRO to 30 %), ``"cifar10"`` for Table 3 (image AUROC);
            others are not in the paper.

    Returns:
        Rows named as the data set names its folders (``metal_nut``); none for other data sets.
    """
    if dataset not in _TABLES:
        return {}
    name, key = _TABLES[dataset]
    with (_DATA / name).open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return {
        row_key(row[key]): {k: float(v) for k, v in row.items() if k not in ("group", key)}
        for row in rows
    }


def row_key(name: str) -> str:
    """A category's name as its folder has it."""
    return name.replace(" ", "_").casefold()
