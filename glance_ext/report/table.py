"""Plain-text tables for the terminal, and the rule for which columns are numbers."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from glance_ext.report.text import printable

_NUMBER = re.compile(
    r"[-+\u2212]?(?:\d[\d,_]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?:\s*±\s*[\d.]+)?\s*[%x\u00d7]?|[-+]?inf|nan"
)
_PLACEHOLDERS = frozenset({"", "-", "\u2013", "\u2014", "n/a", "N/A"})
_GAP = "  "


def format_table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Lays out ``rows`` under ``header`` in aligned columns, numbers to the right.

    Cells are shown as ``str(cell)``: the caller decides on the digits of a float. Widths count
    terminal columns (a CJK character takes two, an accent that combines takes none).

    Args:
        header: One name for each column.
        rows: The cells, each row as long as ``header``.

    Returns:
        The lines joined by newlines: header, a rule of dashes, rows; no trailing newline.

    Raises:
        ValueError: A row has more or fewer cells than the header.
    """
    names, cells = table_cells("format_table", header, rows)
    right = numeric_columns(cells, len(names))
    widths = [max(map(_terminal_width, column)) for column in zip(names, *cells, strict=True)]
    lines = [names, ["-" * width for width in widths], *cells]
    return "\n".join(_line(line, widths, right) for line in lines)


def table_cells(
    caller: str, header: Sequence[object], rows: Sequence[Sequence[object]]
) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows as printable text; a row of another length is a ValueError."""
    names = [printable(str(name)) for name in header]
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    for index, row in enumerate(cells):
        if len(row) != len(names):
            raise ValueError(
                f"{caller}: expected rows of {len(names)} cells like the header, "
                f"got {len(row)} in row {index}"
            )
    return names, cells


def numeric_columns(cells: Sequence[Sequence[str]], count: int) -> list[bool]:
    """Tells which of ``count`` columns hold numbers only.

    Percentages, factors (``1.5x``), spreads (``1.2 ± 0.1``) and thousands separators are numbers;
    placeholders such as ``n/a`` or ``-`` do not make a column text, nor alone make it numbers.
    """
    return [_is_numeric([row[index].strip() for row in cells]) for index in range(count)]


def _is_numeric(column: list[str]) -> bool:
    values = [cell for cell in column if cell not in _PLACEHOLDERS]
    return bool(values) and all(_NUMBER.fullmatch(value) for value in values)


def _line(cells: list[str], widths: list[int], right: list[bool]) -> str:
    parts = []
    for cell, width, to_right in zip(cells, widths, right, strict=True):
        padding = " " * (width - _terminal_width(cell))
        parts.append(padding + cell if to_right else cell + padding)
    return _GAP.join(parts).rstrip()


def _terminal_width(text: str) -> int:
    return sum(_character_width(character) for character in text)


def _character_width(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1
