"""Contact sheets: many detections on one picture, for the eye to go over."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from glance_ext.report.heatmap import line_width, outline, to_uint8, write_png
from glance_ext.report.text import printable

_PAPER = (255, 255, 255)
_LETTERBOX = (236, 238, 241)
_INK = (24, 28, 33)
_FAINT_INK = (96, 103, 112)
_OUTLINE = (0, 255, 120)
_OUTLINE_RIM = (0, 0, 0)
_PANELS = ("image", "heatmap", "ground truth")
_ELLIPSIS = "…"

_MARGIN = 16
_PANEL_GAP = 4
_STRIP_GAP = 28
_ROW_GAP = 16
_CAPTION_SIZE = 15
_LABEL_SIZE = 13
_HEADING_SIZE = 22


@dataclass(frozen=True)
class Tile:
    """One detection on a contact sheet.

    Attributes:
        image: The image, float ``(H, W, 3)`` in [0, 1] or uint8 ``(H, W, 3)``.
        overlay: The picture of :func:`glance_ext.report.overlay`, uint8 ``(H, W, 3)``.
        mask: The ground truth, ``(H, W)``, nonzero where anomalous, or None if there is none.
        caption: What stands below, such as name, score and verdict; shortened in its middle if it
            is too long, because both ends matter.
        heading: Neighbouring tiles of one heading stand together under it; none if empty.
    """

    image: np.ndarray
    overlay: np.ndarray
    mask: np.ndarray | None
    caption: str
    heading: str = ""


@dataclass(frozen=True)
class _Strip:
    """A tile scaled and drawn, without its caption, so that full images need not be kept."""

    picture: Image.Image
    caption: str


def contact_sheet(
    path: str | os.PathLike[str], rows: Iterable[Tile], *, tile: int = 224, columns: int = 2
) -> None:
    """Draws for each of ``rows`` a strip of image, heatmap and ground truth, and writes a PNG.

    Every picture is fitted into a square with its aspect ratio kept. A defect too small to survive
    the scaling is still outlined.

    Args:
        path: Where the sheet belongs.
        rows: What to show, in reading order; read once, so a generator keeps memory small.
        tile: The side of a square in pixels, at least 32.
        columns: How many strips stand side by side, at least 1.

    Raises:
        OutputError: The file cannot be written.
        ValueError: ``rows`` is empty, or an argument or a tile has an impossible shape.
    """
    if tile < 32 or columns < 1:
        raise ValueError(
            f"contact_sheet: expected tile >= 32 and columns >= 1, got {tile} and {columns}"
        )
    groups = [
        (heading, [_Strip(_strip(entry, tile), entry.caption) for entry in entries])
        for heading, entries in itertools.groupby(rows, key=lambda entry: entry.heading)
    ]
    if not groups:
        raise ValueError("contact_sheet: expected at least one tile in rows, got none")
    columns = min(columns, max(len(strips) for _, strips in groups))

    strip_width = 3 * tile + 2 * _PANEL_GAP
    strip_height = tile + _line_height(_CAPTION_SIZE) + _ROW_GAP
    width = 2 * _MARGIN + columns * strip_width + (columns - 1) * _STRIP_GAP
    height = 2 * _MARGIN - _ROW_GAP + (len(groups) - 1) * _ROW_GAP
    for heading, strips in groups:
        height += _line_height(_HEADING_SIZE) * bool(heading) + _line_height(_LABEL_SIZE)
        height += strip_height * -(-len(strips) // columns)

    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN
    for heading, strips in groups:
        if heading:
            _write_line(draw, (_MARGIN, top), heading, _HEADING_SIZE, _INK, width - 2 * _MARGIN)
            top += _line_height(_HEADING_SIZE)
        for column in range(min(columns, len(strips))):
            for panel, name in enumerate(_PANELS):
                left = _MARGIN + column * (strip_width + _STRIP_GAP) + panel * (tile + _PANEL_GAP)
                _write_line(draw, (left, top), name, _LABEL_SIZE, _FAINT_INK, tile)
        top += _line_height(_LABEL_SIZE)
        for index, strip in enumerate(strips):
            left = _MARGIN + index % columns * (strip_width + _STRIP_GAP)
            upper = top + index // columns * strip_height
            sheet.paste(strip.picture, (left, upper))
            _write_line(draw, (left, upper + tile), strip.caption, _CAPTION_SIZE, _INK, strip_width)
        top += strip_height * -(-len(strips) // columns) + _ROW_GAP
    write_png(path, np.asarray(sheet))


def _strip(entry: Tile, side: int) -> Image.Image:
    strip = Image.new("RGB", (3 * side + 2 * _PANEL_GAP, side), _PAPER)
    panels = (
        _fit(_picture(entry.image, "image"), side),
        _fit(_picture(entry.overlay, "overlay"), side),
        _ground_truth(entry, side),
    )
    for index, panel in enumerate(panels):
        strip.paste(panel, (index * (side + _PANEL_GAP), 0))
    return strip


def _picture(pixels: np.ndarray, name: str) -> Image.Image:
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
        raise ValueError(
            f"contact_sheet: expected {name} to have shape (H, W, 3) and not to be empty, "
            f"got {pixels.shape}"
        )
    return Image.fromarray(pixels if pixels.dtype == np.uint8 else to_uint8(pixels))


def _fitted_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    scale = side / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _fit(picture: Image.Image, side: int) -> Image.Image:
    """Scales ``picture`` to just fit a square and centres it there."""
    fitted = picture.resize(_fitted_size(picture.size, side), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (side, side), _LETTERBOX)
    square.paste(fitted, ((side - fitted.width) // 2, (side - fitted.height) // 2))
    return square


def _ground_truth(entry: Tile, side: int) -> Image.Image:
    if entry.mask is None:
        square = Image.new("RGB", (side, side), _LETTERBOX)
        ImageDraw.Draw(square).text(
            (side / 2, side / 2), "none given", _FAINT_INK, _font(_LABEL_SIZE), anchor="mm"
        )
        return square
    if entry.mask.shape != entry.image.shape[:2]:
        raise ValueError(
            f"contact_sheet: expected mask to have the image's size {entry.image.shape[:2]}, "
            f"got {entry.mask.shape}"
        )
    picture = _picture(entry.image, "image")
    size = _fitted_size(picture.size, side)
    fitted = np.array(picture.resize(size, Image.Resampling.LANCZOS))
    # In "F" a single pixel of a large mask stays above zero, where "L" would round it away.
    mask = Image.fromarray((entry.mask != 0).astype(np.float32))
    region = np.asarray(mask.resize(size, Image.Resampling.BOX)) > 0
    # The line runs around the defect, not over it, or a small one would be hidden by its own mark.
    width = 2 * line_width(side, side)
    line = outline(region, width)[1]
    fitted[outline(region | line, width // 2)[1]] = _OUTLINE_RIM
    fitted[line] = _OUTLINE
    return _fit(Image.fromarray(fitted), side)


def _write_line(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    text: str,
    size: int,
    ink: tuple[int, int, int],
    room: int,
) -> None:
    """Writes ``text`` into the line whose upper left is ``corner``, in at most ``room`` pixels."""
    font = _font(size)
    left, top = corner
    middle = top + _line_height(size) / 2
    draw.text((left, middle), _shorten(printable(text), font, room), ink, font, anchor="lm")


def _shorten(text: str, font: ImageFont.FreeTypeFont, room: int) -> str:
    """Replaces as little as possible of the middle of ``text`` so that it fits into ``room``."""
    # No character is narrower than a fiftieth of its size in any sane font: spare the layout of
    # a text that is hopelessly long.
    if len(text) < 8 * room and font.getlength(text) <= room:
        return text
    few, many = 0, min(len(text), 8 * room)
    while few < many:
        kept = (few + many + 1) // 2
        if font.getlength(_with_ellipsis(text, kept)) <= room:
            few = kept
        else:
            many = kept - 1
    return _with_ellipsis(text, few)


def _with_ellipsis(text: str, kept: int) -> str:
    head = kept // 2
    tail = kept - head
    return text[:head] + _ELLIPSIS + (text[-tail:] if tail else "")


def _line_height(size: int) -> int:
    return round(1.6 * size)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("contact_sheet: expected Pillow with FreeType support, got one without")
    return font
