"""Reports as one HTML file that needs nothing else: no network, no scripts, no other files."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image

from glance_ext.errors import InputError
from glance_ext.files import atomic_write
from glance_ext.report.heatmap import encode_png
from glance_ext.report.table import numeric_columns, table_cells
from glance_ext.report.text import printable


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of plain text."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table; columns that hold numbers only are aligned to the right.

    Attributes:
        header: One name for each column.
        rows: The cells, shown as ``str(cell)``; each row as long as ``header``.
        caption: What stands above the table; none if empty.
    """

    header: Sequence[object]
    rows: Sequence[Sequence[object]]
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """A picture with its caption.

    Attributes:
        source: Pixels, uint8 ``(H, W, 3)`` or ``(H, W)``, or the path of an image file. A PNG file
            is embedded byte for byte, another format is converted.
        caption: What stands below.
        alt: What the picture shows, for those who cannot see it.
    """

    source: np.ndarray | str | os.PathLike[str]
    caption: str
    alt: str


Block: TypeAlias = Paragraph | Table | Picture


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: Sequence[Block]


def write_report(path: str | os.PathLike[str], title: str, sections: Sequence[Section]) -> None:
    """Writes a self-contained HTML page, whole or not at all.

    All text is plain text and is escaped. The page follows the reader's light or dark setting and
    fits a phone; wide tables scroll by themselves.

    Args:
        path: Where the page belongs.
        title: The title of the page and its top heading.
        sections: What the page shows, in order.

    Raises:
        OutputError: The file cannot be written.
        InputError: A picture file cannot be read.
        ValueError: A table row or pixels have an impossible shape.
    """
    heading = _text(title)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">",
        f"<title>{heading}</title>",
        f"<style>{_STYLE}</style>",
        "</head>",
        "<body>",
        "<main>",
        f"<h1>{heading}</h1>",
    ]
    if len(sections) > 1:
        links = (
            f'<li><a href="#section-{number}">{_text(section.title)}</a></li>'
            for number, section in enumerate(sections, 1)
        )
        parts += ['<nav aria-label="Sections"><ul>', *links, "</ul></nav>"]
    for number, section in enumerate(sections, 1):
        parts += [f'<section id="section-{number}">', f"<h2>{_text(section.title)}</h2>"]
        parts += [_block(block) for block in section.blocks]
        parts.append("</section>")
    parts += ["</main>", "</body>", "</html>", ""]
    with atomic_write(path, "w") as stream:
        stream.write("\n".join(parts))


def _text(text: str) -> str:
    return escape(printable(text), quote=True)


def _block(block: Block) -> str:
    if isinstance(block, Paragraph):
        return f"<p>{_text(block.text)}</p>"
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Picture):
        return _picture(block)
    raise TypeError(f"write_report: expected a Paragraph, Table or Picture, got {block!r}")


def _table(table: Table) -> str:
    names, rows = table_cells("write_report", table.header, table.rows)
    classes = [' class="number"' if right else "" for right in numeric_columns(rows, len(names))]
    lines = ['<div class="wide"><table>']
    if table.caption:
        lines.append(f"<caption>{_text(table.caption)}</caption>")
    head = (
        f'<th scope="col"{kind}>{escape(name)}</th>'
        for name, kind in zip(names, classes, strict=True)
    )
    lines.append(f"<thead><tr>{''.join(head)}</tr></thead>")
    lines.append("<tbody>")
    for row in rows:
        cells = (f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row, classes, strict=True))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    lines += ["</tbody>", "</table></div>"]
    return "\n".join(lines)


def _picture(picture: Picture) -> str:
    data, (width, height) = _png(picture.source)
    address = "data:image/png;base64," + base64.b64encode(data).decode("ascii")
    image = f'<img src="{address}" width="{width}" height="{height}" alt="{_text(picture.alt)}">'
    return f"<figure>{image}<figcaption>{_text(picture.caption)}</figcaption></figure>"


def _png(source: np.ndarray | str | os.PathLike[str]) -> tuple[bytes, tuple[int, int]]:
    """Returns a picture as PNG bytes, and its width and height."""
    if isinstance(source, np.ndarray):
        return encode_png(source), (source.shape[1], source.shape[0])
    try:
        data = Path(source).read_bytes()
        with Image.open(io.BytesIO(data)) as picture:
            # Decoding it whole finds a file cut short, which a browser would show half.
            picture.load()
            if picture.format == "PNG":
                return data, picture.size
            return encode_png(np.asarray(picture.convert("RGB"))), picture.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(source, f"cannot read the picture: {reason}") from error


_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1f24; --faint: #59636e;
  --line: #d1d9e0; --stripe: #f6f8fa; --link: #0969da; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #0d1117; --ink: #e6edf3; --faint: #9198a1; --line: #3d444d;
    --stripe: #151b23; --link: #58a6ff; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1, h2, p, figcaption, caption, li { overflow-wrap: anywhere; }
h1 { font-size: 1.75rem; line-height: 1.2; }
h2 { margin-top: 2.5rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
a { color: var(--link); }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { padding: .25rem 0; color: var(--faint); text-align: left; }
th, td { padding: .35rem .75rem; border-bottom: 1px solid var(--line); text-align: left;
  white-space: nowrap; }
.number { text-align: right; }
tbody tr:nth-child(even) { background: var(--stripe); }
figure { margin: 1.5rem 0; }
img { display: block; max-width: 100%; height: auto; }
figcaption { margin-top: .5rem; color: var(--faint); font-size: .9rem; }
"""
