"""Decoding one image file: which kind it is, whether it is whole, and its samples as float32.

PNG, JPEG and BMP are decoded by Pillow, TIFF by tifffile, except for the compressions that
tifffile needs a further package for (LZW, JPEG, PackBits, ...), which Pillow decodes. The kind of
a file is read from its first bytes; its suffix plays no part.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import operator
import os
import stat
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
import tifffile
from PIL import Image

MAX_PIXELS = 178_956_970
"""The largest image that is decoded, in pixels: Pillow's own limit (1 GiB / 6 bytes)."""

_KINDS = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0\x08\0\0\0", "TIFF"),
    (b"MM\0+\0\x08\0\0", "TIFF"),
)
_FOREIGN = (
    (0, b"GIF8", "a GIF"),
    (8, b"WEBP", "a WebP file"),
    (4, b"ftyp", "a HEIC, AVIF or MP4 file"),
    (4, b"jP  ", "a JPEG 2000 file"),
    (0, b"%PDF", "a PDF"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"version https://git-lfs", "a Git LFS pointer"),
)

# TIFF tag values
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK = 0, 1, 2, 3, 5
_UNCOMPRESSED, _DEFLATE = 1, (8, 32946)
_REDUCED_OR_MASK = 1 | 4
_CHANNELS = {  # samples a pixel, alpha included
    _WHITE_IS_ZERO: (1, 2),
    _BLACK_IS_ZERO: (1, 2, 3),
    _RGB: (3, 4, 5),
    _PALETTE: (1, 2),
    _CMYK: (4, 5),
}


class UnusableError(Exception):
    """The reason why a file cannot be used, before it is known which file that is."""


class _Quiet:
    """Mutes Python warnings, the decoders' loggers and libtiff while any thread decodes an image.

    ``warnings.catch_warnings`` alone is not safe where threads overlap: whoever leaves last would
    restore the filters of whoever came in between. So the threads are counted. libtiff, which
    decodes for Pillow, writes errors of its own to stderr besides failing; Pillow offers no way to
    turn that off, so its handlers are looked up (where they cannot be found, it stays as it is).
    """

    def __init__(self, loggers: Sequence[str]) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._changes = contextlib.ExitStack()
        self._handlers: list[Any] = []
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL(Image.core.__file__)
            for handler in (library.TIFFSetErrorHandler, library.TIFFSetWarningHandler):
                handler.argtypes, handler.restype = [ctypes.c_void_p], ctypes.c_void_p
                self._handlers.append(handler)
        for name in loggers:
            logging.getLogger(name).addFilter(lambda record: self._inside == 0)

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._changes.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
                for handler in self._handlers:
                    self._changes.callback(handler, handler(None))
            self._inside += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._changes.close()


quiet = _Quiet(("tifffile", "PIL.TiffImagePlugin"))


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a regular file; anything else could block (a pipe) or never end (a device)."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise UnusableError("expected an image file, found a folder")
    if not stat.S_ISREG(mode):
        raise UnusableError("expected an image file, found a device, pipe or socket")
    return open(path, "rb")


def decode(stream: BinaryIO, max_pixels: int) -> np.ndarray:
    """Decodes an open file to float32 ``(H, W, 3)``; every failure but the system's is named."""
    head = stream.read(32)
    kind = _kind(head)
    _check_size(_declared_size(head, kind), max_pixels)
    try:
        if kind == "TIFF":
            values, orientation = _decode_tiff(stream, max_pixels)
        else:
            # Pillow gives a JPEG that holds more pictures as MPO; its first frame is the JPEG.
            with _open_pillow(stream, kind) as image:
                _check_size((image.height, image.width), max_pixels)
                frames = getattr(image, "n_frames", 1)
                if frames > 1 and image.format != "MPO":
                    raise UnusableError(
                        f"expected one image, found an animated {kind} of {frames} frames"
                    )
            values, orientation = _decode_pillow(stream, kind)
        return _finish(values, orientation)
    except (UnusableError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system's: the disk failed, not the image
        if "imagecodecs" in str(error):
            raise UnusableError(
                "expected a TIFF that is uncompressed or Deflate-compressed without predictor, "
                f"found one that needs the imagecodecs package ({error})"
            ) from error
        why = "its header" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        why = " ".join(why.split())[:200] or type(error).__name__
        raise UnusableError(
            f"expected a complete {kind} image, found a broken or truncated one ({why})"
        ) from error


def _kind(head: bytes) -> str:
    """Names the format that the first bytes of a file announce."""
    if not head:
        raise UnusableError("expected an image file, found an empty file (0 bytes)")
    for magic, kind in _KINDS:
        if head.startswith(magic):
            return kind
    found = f"a file that begins with {head[:8]!r}"
    if any(magic.startswith(head) for magic, _ in _KINDS):
        found = f"a truncated file of {len(head)} bytes"
    for offset, magic, name in _FOREIGN:
        if head[offset:].startswith(magic):
            found = name
    raise UnusableError(f"expected a PNG, JPEG, BMP or TIFF image, found {found}")


def _declared_size(head: bytes, kind: str) -> tuple[int, int] | None:
    """(H, W) where it stands at a fixed place of the header, otherwise None."""
    if kind == "PNG" and len(head) >= 24:
        width, height = struct.unpack(">II", head[16:24])
        return height, width
    if kind == "BMP" and len(head) >= 26 and head[14] >= 40:
        width, height = struct.unpack("<ii", head[18:26])
        return abs(height), width  # a negative height means rows from the top
    return None


def _check_size(size: tuple[int, int] | None, max_pixels: int) -> None:
    """Refuses an image of no pixels or too many."""
    if size is None:
        return
    if min(size) < 1:
        raise UnusableError(f"expected at least one pixel, found a size of {size[0]}x{size[1]}")
    if size[0] * size[1] > max_pixels:
        raise UnusableError(
            f"expected at most {max_pixels} pixels, found {size[0]}x{size[1]} (HxW)"
        )


def _open_pillow(stream: BinaryIO, kind: str) -> Image.Image:
    """Reads a header by Pillow, with no decoder tried but the one for ``kind``."""
    try:
        return Image.open(stream, formats=[kind])
    except Image.DecompressionBombError as error:
        raise UnusableError(f"expected at most {MAX_PIXELS} pixels, found more") from error


def _decode_pillow(stream: BinaryIO, kind: str, page: int = 0) -> tuple[np.ndarray, int]:
    """Decodes by Pillow to colour samples ``(H, W, 1 or 3)`` of any type, and an orientation."""
    image = _open_pillow(stream, kind)
    if page:
        image.seek(page)
    raw, mode = _raw_mode(image), image.mode
    premultiplied = raw.startswith("RGBa")
    raw = raw.replace("RGBa", "RGBA")  # alpha is dropped, not divided by
    if "16" in raw and not mode.startswith("I"):
        # Pillow keeps 8 of these 16 bits. Both halves can be had, one decoding for each.
        name, _, order = raw.partition(";16")
        if name == "LA" and kind == "PNG":
            halves = _reread(stream, kind, page, "RGBA").astype(np.uint16)
            values = halves[..., 0:1] << 8 | halves[..., 1:2]
        elif name in ("RGB", "RGBX", "RGBA") and order in ("B", "L", "N"):
            native = "L" if sys.byteorder == "little" else "B"
            high, low = ("B", "L") if (native if order == "N" else order) == "B" else ("L", "B")
            values = _reread(stream, kind, page, f"{name};16{high}").astype(np.uint16) << 8
            values |= _reread(stream, kind, page, f"{name};16{low}")
        else:
            raise UnusableError(f"expected grey or RGB samples, found 16-bit {mode} ({raw})")
        image.load()
        return values[..., :3], _orientation(image)
    image.load()
    orientation = _orientation(image)
    if premultiplied:
        return _reread(stream, kind, page, raw)[..., :3], orientation
    if mode == "1":
        image = image.convert("L")
    elif mode in ("P", "PA", "CMYK", "YCbCr"):
        image = image.convert("RGB")
    elif mode not in ("L", "LA", "RGB", "RGBA", "RGBX", "I", "F") and not mode.startswith("I;16"):
        raise UnusableError(f"expected grey, palette, RGB or CMYK samples, found mode {mode}")
    values = np.asarray(image)
    if mode == "I":  # Pillow's one type for several
        signed = raw.endswith("S")
        if raw.startswith("I;16"):
            values = values.astype(np.int16 if signed else np.uint16)
        elif not signed:
            values = values.view(np.uint32)
    values = values.reshape(*values.shape[:2], -1)
    return values[..., : 1 if mode in ("LA", "1") else 3], orientation


def _raw_mode(image: Image.Image) -> str:
    """The layout of the samples in the file, which Pillow turns into ``image.mode``."""
    arguments: Any = image.tile[0][3]  # type: ignore[attr-defined]
    return str(arguments if isinstance(arguments, str) else arguments[0])


def _reread(stream: BinaryIO, kind: str, page: int, raw: str) -> np.ndarray:
    """Decodes by Pillow as if the samples lay in the file as ``raw`` says, of the same size."""
    image: Any = _open_pillow(stream, kind)
    if page:
        image.seek(page)
    tiles = []
    for tile in image.tile:
        arguments = raw if isinstance(tile[3], str) else (raw, *tile[3][1:])
        # named since Pillow 11, a plain tuple before
        named = hasattr(tile, "_replace")
        tiles.append(tile._replace(args=arguments) if named else (*tile[:3], arguments))
    image.tile = tiles
    image.load()
    return np.asarray(image)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation of a loaded image; unreadable EXIF data are no reason to refuse it."""
    try:
        value = image.getexif().get(0x0112, 1)
        return value if isinstance(value, int) else 1
    except Exception:
        return 1


def _decode_tiff(stream: BinaryIO, max_pixels: int) -> tuple[np.ndarray, int]:
    """Decodes a TIFF to colour samples ``(H, W, 1 or 3)`` of any type, and an orientation."""
    stream.seek(0)
    with tifffile.TiffFile(stream) as tiff:
        every: Any = tiff.pages
        pages = [page for page in every if not int(page.subfiletype) & _REDUCED_OR_MASK]
        if not pages:
            raise ValueError("no directory of an image")
        if len(pages) != 1:
            raise UnusableError(f"expected one image, found a TIFF of {len(pages)} pages")
        page = pages[0]
        _check_tiff(page, max_pixels)
        _check_segments(page, stream)
        photometric = int(page.photometric)
        if page.bitspersample < 8 or not _is_plain(page):
            try:
                return _decode_pillow(stream, "TIFF", page.index)
            except Image.UnidentifiedImageError:
                if page.bitspersample < 8 or photometric not in _CHANNELS:
                    raise
                # a layout that Pillow does not know; tifffile says what it lacks, or decodes it
        values = page.asarray(squeeze=False, maxworkers=1)[:, 0]
        values = values[..., 0].transpose(1, 2, 0) if len(values) > 1 else values[0]
        if photometric == _PALETTE:
            colours = np.asarray(page.colormap).T
            colours = (colours >> 8 if colours.max() > 255 else colours).astype(np.uint8)
            return colours[values[..., 0]], _tiff_orientation(page)
        if photometric == _CMYK:
            ink = _scale(values[..., :4])
            return (1 - ink[..., :3]) * (1 - ink[..., 3:]), _tiff_orientation(page)
        values = values[..., : 3 if values.shape[2] > 2 else 1]
        if photometric == _WHITE_IS_ZERO:
            values = ~values if values.dtype.kind == "u" else 1 - _scale(values)
        return values, _tiff_orientation(page)


def _is_plain(page: Any) -> bool:
    """Whether tifffile can decode the page's compression without a further package."""
    return page.compression == _UNCOMPRESSED or page.compression in _DEFLATE


def _tiff_orientation(page: Any) -> int:
    """Orientation tag of a page that Pillow, which applies it itself, has not decoded."""
    value = page.tags.valueof(274, default=1)
    return int(value) if isinstance(value, int) else 1


def _check_tiff(page: Any, max_pixels: int) -> None:
    """Refuses by its tags alone what would be too large or is no grey, palette, RGB or CMYK."""
    # a broken tag may hold anything, also a fraction
    _check_size((operator.index(page.imagelength), operator.index(page.imagewidth)), max_pixels)
    if page.imagedepth != 1:
        raise UnusableError(f"expected one image, found a volume of {page.imagedepth} slices")
    if page.is_tiled:
        _check_size((operator.index(page.tilelength), operator.index(page.tilewidth)), max_pixels)
    if page.bitspersample not in (1, 2, 4, 8, 16, 32, 64):
        raise UnusableError(
            f"expected 1, 2, 4, 8, 16, 32 or 64 bits a sample, found {page.bitspersample}"
        )
    photometric, samples = int(page.photometric), page.samplesperpixel
    # Pillow turns what else there is (YCbCr) into RGB
    if samples not in _CHANNELS.get(photometric, () if _is_plain(page) else (3,)):
        raise UnusableError(
            "expected grey, palette, RGB or CMYK samples, "
            f"found {samples} samples a pixel of photometric interpretation {photometric}"
        )


def _check_segments(page: Any, stream: BinaryIO) -> None:
    """Refuses a TIFF with strips or tiles that are missing, lie outside the file, or explode.

    tifffile fills missing ones with zeros and inflates without a limit.
    """
    needed = int(np.prod(page.chunked, dtype=np.int64))
    segments = list(zip(page.dataoffsets, page.databytecounts, strict=False))[:needed]
    end = stream.seek(0, io.SEEK_END)
    if len(segments) < needed:
        raise UnusableError(
            f"expected {needed} strips or tiles, found a truncated TIFF of {len(segments)}"
        )
    for offset, length in segments:
        if offset < 1 or length < 1 or offset + length > end:
            raise UnusableError(
                f"expected a complete TIFF image, found one truncated to {end} bytes "
                f"(a strip or tile of {length} bytes at {offset})"
            )
    if page.compression in _DEFLATE:
        rows = page.tilelength if page.is_tiled else min(page.rowsperstrip, page.imagelength)
        width = page.tilewidth if page.is_tiled else page.imagewidth
        size = (rows * width * page.samplesperpixel * page.bitspersample + 7) // 8
        limit = 2 * size + 65536
        for offset, length in segments:
            stream.seek(offset)
            if len(zlib.decompressobj().decompress(stream.read(length), limit)) == limit:
                raise UnusableError(
                    f"expected a strip or tile of {size} bytes, found one that inflates to more"
                )


def _scale(values: np.ndarray) -> np.ndarray:
    """Maps samples to float32 in [0, 1] by the range of their type."""
    kind = values.dtype.kind
    if kind == "b":
        return values.astype(np.float32)
    if kind == "f":
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 1):  # also if either is not a number
            raise UnusableError(
                f"expected floating-point values from 0 to 1, found {low:g} to {high:g}"
            )
        return values.astype(np.float32)
    if kind not in "iu":
        raise UnusableError(f"expected integer or floating-point samples, found {values.dtype}")
    if kind == "i" and values.min() < 0:
        raise UnusableError(
            f"expected values of at least 0, found {values.dtype} from {values.min()} to "
            f"{values.max()}"
        )
    # float32 holds 16 bits exactly; a wider sample is rounded once, at the end
    wide = np.float32 if values.dtype.itemsize <= 2 else np.float64
    scaled = np.true_divide(values, np.iinfo(values.dtype).max, dtype=wide)
    return scaled.astype(np.float32, copy=False)


def _finish(values: np.ndarray, orientation: int) -> np.ndarray:
    """Scales samples ``(H, W, 1 or 3)``, turns them upright, and repeats grey to three channels."""
    image = _scale(values)
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))
