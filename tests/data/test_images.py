import io
import logging
import os
import struct
import tempfile
import threading
import warnings
import zlib
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageFile

from glance_ext.data import decode, images
from glance_ext.data.images import (
    MAX_PIXELS,
    expand_inputs,
    list_images,
    load_image,
    load_mask,
    resize,
)
from glance_ext.errors import InputError

REAL = Path("../shared/data/mvtec_ad_256/screw")


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    limit = int(np.iinfo(dtype).max)
    return np.random.default_rng(7).integers(0, limit, shape, dtype, endpoint=True)


def same(image: np.ndarray, samples: np.ndarray, limit: float) -> None:
    """Asserts that an image is exactly samples / limit, grey repeated."""
    samples = samples if samples.ndim == 3 else samples[..., None]
    assert image.dtype == np.float32
    assert image.flags.c_contiguous
    assert image.shape == (*samples.shape[:2], 3)
    expected = (samples.astype(np.float64) / limit).astype(np.float32)
    np.testing.assert_allclose(image, np.broadcast_to(expected, image.shape), rtol=1.2e-7, atol=0)


def png_bytes(
    samples: np.ndarray, *, size: tuple[int, int] | None = None, interlaced: bool = False
) -> bytes:
    """A 16-bit PNG of (H, W, 1 to 4), with every filter type, by the letter of the standard."""
    height, width, channels = samples.shape
    rows = [row.astype(">u2").tobytes() for row in samples]
    step, before, body = 2 * channels, bytes(2 * width * channels), b""
    for i, row in enumerate(rows):
        kind = i % 5
        body += bytes([kind])
        for j, value in enumerate(row):
            a = row[j - step] if j >= step else 0
            b, c = before[j], before[j - step] if j >= step else 0
            p = a + b - c
            paeth = min((a, b, c), key=lambda x: abs(p - x))
            body += bytes([(value - (0, a, b, (a + b) // 2, paeth)[kind]) % 256])
        before = row
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", *(size or (width, height)), 16, colour, 0, 0, interlaced)

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(body))
        + chunk(b"IEND", b"")
    )


def encoded(format_: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(noise(24, 19, 3)).save(stream, format_, **options)
    return stream.getvalue()


# ---------------------------------------------------------------- what can be read


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.TIFF", "ü ñ 猫 .png"])
def test_grey_and_rgb_of_8_bits_are_divided_by_255(tmp_path: Path, name: str) -> None:
    for samples in (noise(5, 7), noise(5, 7, 3)):
        Image.fromarray(samples).save(tmp_path / name)
        same(load_image(tmp_path / name), samples, 255)


def test_channels_come_in_the_order_red_green_blue(tmp_path: Path) -> None:
    Image.new("RGB", (2, 3), (255, 51, 0)).save(tmp_path / "a.png")
    assert load_image(str(tmp_path / "a.png"))[0, 0].tolist() == [1, np.float32(0.2), 0]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_dropped_and_colours_beneath_it_stay(
    tmp_path: Path, mode: str, suffix: str
) -> None:
    samples = noise(6, 5, len(mode))
    samples[:3, :, -1] = 0
    Image.fromarray(samples, mode).save(tmp_path / f"a{suffix}")
    same(load_image(tmp_path / f"a{suffix}"), samples[..., :-1], 255)


@pytest.mark.parametrize("transparency", [None, 1, b"\x00\x80"])
def test_palette_colours_are_looked_up_with_or_without_transparency(
    tmp_path: Path, transparency: object
) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 255, 255, 255])
    options = {} if transparency is None else {"transparency": transparency}
    image.save(tmp_path / "a.png", **options)
    colours = np.array([[[10, 20, 30], [40, 50, 60], [255, 255, 255]]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(load_image(tmp_path / "a.png"), colours, 255)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_palette_of_a_tiff_is_looked_up(tmp_path: Path, compression: str) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 255, 255, 255])
    image.save(tmp_path / "a.tif", compression=compression)
    colours = np.array([[[10, 20, 30], [40, 50, 60], [255, 255, 255]]])
    same(load_image(tmp_path / "a.tif"), colours, 255)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif"])
def test_one_bit_images_are_0_and_1(tmp_path: Path, name: str) -> None:
    bits = noise(9, 11) > 127
    Image.fromarray(bits).save(tmp_path / name)
    same(load_image(tmp_path / name), bits, 1)


def test_cmyk_jpeg_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "a.jpg", quality=100)
    np.testing.assert_allclose(load_image(tmp_path / "a.jpg")[8, 8], [0, 1, 1], atol=0.02)


def test_cmyk_tiff_becomes_rgb(tmp_path: Path) -> None:
    ink = np.full((4, 4, 4), (65535, 0, 13107, 32768), np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", ink, photometric="separated")
    paper = 1 - 32768 / 65535
    np.testing.assert_allclose(
        load_image(tmp_path / "a.tif")[0, 0], [0, paper, 0.8 * paper], atol=1e-6
    )


def test_a_16_bit_grey_png_keeps_all_65536_values(tmp_path: Path) -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png")
    same(image, ramp, 65535)
    assert len(np.unique(image)) == 65536


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_16_bit_png_of_any_colour_type_keeps_all_16_bits(tmp_path: Path, channels: int) -> None:
    samples = noise(11, 6, channels, dtype=np.uint16)
    samples[0, 0], samples[0, 1] = 65535, 1
    (tmp_path / "a.png").write_bytes(png_bytes(samples))
    same(load_image(tmp_path / "a.png"), samples[..., : 1 if channels < 3 else 3], 65535)


def test_a_dark_16_bit_image_is_not_stretched(tmp_path: Path) -> None:
    Image.fromarray(np.array([[100, 200]], np.uint16)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").max() == pytest.approx(200 / 65535, rel=1e-6)


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("shape", [(8, 5), (8, 5, 3), (8, 5, 4)])
def test_a_16_bit_tiff_keeps_all_16_bits(
    tmp_path: Path, shape: tuple[int, ...], compression: str | None, byteorder: str
) -> None:
    samples = noise(*shape, dtype=np.uint16)
    tifffile.imwrite(
        tmp_path / "a.tif",
        samples,
        photometric="minisblack" if len(shape) == 2 else "rgb",
        compression=compression,
        predictor=None if compression is None else 2,
        byteorder=byteorder,
        rowsperstrip=3,
    )
    same(load_image(tmp_path / "a.tif"), samples[..., :3] if len(shape) == 3 else samples, 65535)


def lzw(data: bytes) -> bytes:
    """TIFF's LZW by literal codes alone, with a clear code before the table reaches 10 bits."""
    bits = ""
    for i, value in enumerate(data):
        bits += (format(256, "09b") if i % 200 == 0 else "") + format(value, "09b")
    bits += format(257, "09b")
    bits += "0" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


def lzw_tiff(samples: np.ndarray, order: str) -> bytes:
    """An LZW TIFF of (H, W, C) unsigned samples, which neither Pillow nor tifffile can write."""
    height, width, channels = samples.shape
    data = lzw(samples.astype(samples.dtype.newbyteorder(order)).tobytes())
    tags = [
        (256, "H", [width]),
        (257, "H", [height]),
        (258, "H", [8 * samples.itemsize] * channels),
        (259, "H", [5]),
        (262, "H", [1 if channels == 1 else 2]),
        (273, "I", [8]),
        (277, "H", [channels]),
        (278, "H", [height]),
        (279, "I", [len(data)]),
    ] + ([(338, "H", [2])] if channels == 4 else [])
    start = 8 + len(data)
    after = start + 2 + 12 * len(tags) + 4
    entries = extra = b""
    for code, kind, values in tags:
        value = struct.pack(f"{order}{len(values)}{kind}", *values)
        if len(value) > 4:
            extra, value = extra + value, struct.pack(f"{order}I", after + len(extra))
        number = 3 if kind == "H" else 4
        entries += struct.pack(f"{order}HHI", code, number, len(values)) + value.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", start)
    return head + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + extra


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_16_bit_lzw_tiff_keeps_all_16_bits(tmp_path: Path, channels: int, order: str) -> None:
    samples = noise(7, 5, channels, dtype=np.uint16)
    (tmp_path / "a.tif").write_bytes(lzw_tiff(samples, order))
    same(load_image(tmp_path / "a.tif"), samples[..., :3], 65535)


def test_a_uint32_lzw_tiff_is_unsigned(tmp_path: Path) -> None:
    samples = noise(7, 5, 1, dtype=np.uint32)
    (tmp_path / "a.tif").write_bytes(lzw_tiff(samples, "<"))
    same(load_image(tmp_path / "a.tif"), samples, 2**32 - 1)


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_adobe_deflate"])
def test_compressed_8_bit_tiffs_are_lossless(tmp_path: Path, compression: str) -> None:
    samples = noise(33, 21, 3)
    Image.fromarray(samples).save(tmp_path / "a.tif", compression=compression)
    same(load_image(tmp_path / "a.tif"), samples, 255)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_planar_tiffs_come_with_channels_last(
    tmp_path: Path, dtype: type, compression: str | None
) -> None:
    samples = noise(3, 9, 5, dtype=dtype)
    tifffile.imwrite(
        tmp_path / "a.tif",
        samples,
        photometric="rgb",
        planarconfig="separate",
        compression=compression,
    )
    same(load_image(tmp_path / "a.tif"), samples.transpose(1, 2, 0), np.iinfo(dtype).max)


def test_a_tiled_big_tiff_is_put_together(tmp_path: Path) -> None:
    samples = noise(50, 37, 3, dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", samples, photometric="rgb", tile=(16, 32), bigtiff=True)
    same(load_image(tmp_path / "a.tif"), samples, 65535)


def test_white_is_zero_is_inverted(tmp_path: Path) -> None:
    samples = noise(4, 5, dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", samples, photometric="miniswhite")
    same(load_image(tmp_path / "a.tif"), 65535.0 - samples, 65535)


def test_white_is_zero_is_inverted_for_one_bit(tmp_path: Path) -> None:
    bits = noise(9, 11) > 127
    tifffile.imwrite(tmp_path / "a.tif", bits, photometric="miniswhite")
    same(load_image(tmp_path / "a.tif"), ~bits, 1)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_premultiplied_alpha_is_dropped_too(tmp_path: Path, compression: str) -> None:
    samples = noise(6, 5, 4)
    Image.fromarray(samples).save(tmp_path / "a.tif", compression=compression)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as tiff:
        tiff.pages[0].tags[338].overwrite(1)
    same(load_image(tmp_path / "a.tif"), samples[..., :3], 255)


def test_a_uint32_tiff_is_divided_by_its_full_range(tmp_path: Path) -> None:
    samples = np.array([[0, 2**31, 2**32 - 1]], np.uint32)
    tifffile.imwrite(tmp_path / "a.tif", samples, photometric="minisblack")
    same(load_image(tmp_path / "a.tif"), samples, 2**32 - 1)


def test_a_signed_tiff_is_read_unless_negative(tmp_path: Path) -> None:
    for dtype in (np.int16, np.int32):
        limit = np.iinfo(dtype).max
        tifffile.imwrite(tmp_path / "a.tif", np.array([[0, limit]], dtype))
        same(load_image(tmp_path / "a.tif"), np.array([[0, limit]]), limit)
        tifffile.imwrite(tmp_path / "b.tif", np.array([[-5, 7]], dtype))
        assert "from -5 to 7" in refusal(tmp_path / "b.tif")


def test_a_float_tiff_in_the_unit_interval_is_read_as_it_is(tmp_path: Path) -> None:
    for dtype in (np.float32, np.float64):
        samples = np.linspace(0, 1, 12, dtype=dtype).reshape(3, 4)
        tifffile.imwrite(tmp_path / "a.tif", samples)
        same(load_image(tmp_path / "a.tif"), samples, 1)


@pytest.mark.parametrize(
    ("values", "found"),
    [([0, 255], "0 to 255"), ([-0.5, 1], "-0.5 to 1"), ([0, np.nan], "nan"), ([0, np.inf], "inf")],
)
def test_a_float_tiff_outside_the_unit_interval_is_refused_with_its_range(
    tmp_path: Path, values: list[float], found: str
) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.array([values], np.float32))
    assert found in refusal(tmp_path / "a.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "raw", "tiff_lzw", "16"])
def test_orientation_is_applied_as_a_viewer_does(
    tmp_path: Path, kind: str, orientation: int
) -> None:
    samples = noise(4, 6, 3, dtype=np.uint16 if kind == "16" else np.uint8)
    turns = {
        1: samples,
        2: np.fliplr(samples),
        3: np.rot90(samples, 2),
        4: np.flipud(samples),
        5: samples.transpose(1, 0, 2),
        6: np.rot90(samples, -1),
        7: np.rot90(samples, 2).transpose(1, 0, 2),
        8: np.rot90(samples),
    }
    path = tmp_path / "a.img"
    if kind == "16":
        tifffile.imwrite(
            path, samples, photometric="rgb", extratags=[(274, 3, 1, orientation, True)]
        )
    elif kind == "png":
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(samples).save(path, "PNG", exif=exif)
    else:
        Image.fromarray(samples).save(path, "TIFF", compression=kind, tiffinfo={274: orientation})
    same(load_image(path), turns[orientation], np.iinfo(samples.dtype).max)


@pytest.mark.parametrize("format_", ["JPEG", "PNG"])
@pytest.mark.parametrize("exif", [b"no TIFF", b"MM\0*\xde\x9c", b"II*\0\x08\0\0\0\xff\xff"])
def test_an_image_with_broken_exif_is_read(tmp_path: Path, exif: bytes, format_: str) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(format_, exif=b"Exif\0\0" + exif))
    assert load_image(tmp_path / "a.jpg").shape == (24, 19, 3)


def test_the_content_decides_and_not_the_suffix(tmp_path: Path) -> None:
    for format_ in ("PNG", "JPEG", "BMP", "TIFF"):
        (tmp_path / "a.bin").write_bytes(encoded(format_))
        expected = np.asarray(Image.open(tmp_path / "a.bin"))
        same(load_image(tmp_path / "a.bin"), expected, 255)


def test_a_jpeg_with_a_second_picture_gives_the_first(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (16, 8), "red"), Image.new("RGB", (16, 8), "blue")
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    np.testing.assert_allclose(load_image(tmp_path / "a.jpg")[4, 8], [1, 0, 0], atol=0.02)


def test_a_thumbnail_beside_a_tiff_image_is_passed_over(tmp_path: Path) -> None:
    samples = noise(8, 6, 3)
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(samples[::2, ::2], photometric="rgb", subfiletype=1, metadata=None)
        writer.write(samples, photometric="rgb", metadata=None)
    same(load_image(tmp_path / "a.tif"), samples, 255)


def test_real_images_and_masks_load() -> None:
    if not REAL.is_dir():
        pytest.skip(f"{REAL} is not there")
    image = load_image(REAL / "test/good/000.png")
    assert image.shape == (256, 256, 3)
    assert 0.2 < image.mean() < 0.9
    mask = load_mask(REAL / "ground_truth/scratch_neck/000_mask.png", (256, 256))
    assert 0 < mask.mean() < 0.1


# ---------------------------------------------------------------- what cannot


def refusal(path: Path, **options: int) -> str:
    with pytest.raises(InputError) as caught:
        load_image(path, **options)
    assert caught.value.path == str(path)
    reason = caught.value.reason
    assert "\n" not in reason
    assert "<_io" not in reason
    assert "object at 0x" not in reason
    return reason


def test_a_missing_file_a_folder_and_an_empty_file_are_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "a.png") == "expected an image file, found no such file"
    assert refusal(tmp_path) == "expected an image file, found a folder"
    (tmp_path / "a.png").touch()
    assert refusal(tmp_path / "a.png") == "expected an image file, found an empty file (0 bytes)"
    assert "path of a file" in refusal(tmp_path / "a\0b.png")
    (tmp_path / "b").touch()
    assert "Not a directory" in refusal(tmp_path / "b" / "c.png")


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    assert "pipe" in refusal(tmp_path / "a.png")


def test_denied_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded("PNG"))

    def deny(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", deny)
    assert refusal(path) == "cannot be read: Permission denied"


def test_an_interruption_and_a_lack_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded("PNG"))
    for raised, expected in ((KeyboardInterrupt, KeyboardInterrupt), (MemoryError, InputError)):

        def fail(*_: object, kind: type[BaseException] = raised) -> None:
            raise kind

        monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
        with pytest.raises(expected):
            load_image(path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"hello, no image\n", "begins with b'hello, n'"),
        (b"GIF89a" + bytes(20), "a GIF"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "a WebP"),
        (b"%PDF-1.7", "a PDF"),
        (b"\x89PN", "truncated file of 3 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    ],
)
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes, found: str) -> None:
    (tmp_path / "a.png").write_bytes(content)
    reason = refusal(tmp_path / "a.png")
    assert reason.startswith("expected a PNG, JPEG, BMP or TIFF image, found ")
    assert found in reason


def test_several_frames_or_pages_are_counted(tmp_path: Path) -> None:
    frames = [Image.fromarray(noise(5, 5) ^ i) for i in range(4)]
    for name, format_ in (("a.png", "PNG"), ("b.tif", "TIFF")):
        frames[0].save(tmp_path / name, format_, save_all=True, append_images=frames[1:])
    assert refusal(tmp_path / "a.png") == "expected one image, found an animated PNG of 4 frames"
    assert refusal(tmp_path / "b.tif") == "expected one image, found a TIFF of 4 pages"
    frames[0].save(tmp_path / "c.png", "GIF", save_all=True, append_images=frames[1:])
    assert "found a GIF" in refusal(tmp_path / "c.png")


def test_a_png_that_declares_too_many_pixels_is_refused_by_its_header(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_bytes(noise(1, 1, 3), size=(100000, 100000)))
    assert refusal(tmp_path / "a.png") == (
        f"expected at most {MAX_PIXELS} pixels, found 100000x100000 (HxW)"
    )


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "BMP", "TIFF"])
def test_the_limit_of_pixels_is_inclusive(tmp_path: Path, format_: str) -> None:
    (tmp_path / "a").write_bytes(encoded(format_))
    assert load_image(tmp_path / "a", max_pixels=24 * 19).shape == (24, 19, 3)
    assert "24x19 (HxW)" in refusal(tmp_path / "a", max_pixels=24 * 19 - 1)


def huge_jpeg() -> bytes:
    data = encoded("JPEG")
    start = data.index(b"\xff\xc0")
    return data[: start + 5] + struct.pack(">HH", 65500, 65500) + data[start + 9 :]


def huge_tiff() -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, noise(8, 8), photometric="minisblack")
    data = bytearray(stream.getvalue())
    stream.seek(0)
    with tifffile.TiffFile(stream) as tiff:
        for code in (256, 257):
            at = tiff.pages[0].tags[code].offset
            data[at : at + 12] = struct.pack("<HHII", code, 4, 1, 1_000_000)
    return bytes(data)


@pytest.mark.parametrize("make", [huge_jpeg, huge_tiff])
def test_too_large_images_are_refused_before_they_are_decoded(
    tmp_path: Path, make: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(tifffile.TiffPage, "asarray", fail)
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    (tmp_path / "a").write_bytes(make())  # type: ignore[operator]
    assert refusal(tmp_path / "a").startswith(f"expected at most {MAX_PIXELS} pixels, found")


def test_an_image_of_no_pixels_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_bytes(noise(1, 1, 3), size=(0, 9)))
    assert "found a size of 9x0" in refusal(tmp_path / "a.png")
    data = bytearray(encoded("BMP"))
    data[18:22] = bytes(4)
    (tmp_path / "a.bmp").write_bytes(data)
    assert "found a size of 24x0" in refusal(tmp_path / "a.bmp")


def test_a_tiff_whose_strip_inflates_without_end_is_refused(tmp_path: Path) -> None:
    tifffile.imwrite(
        tmp_path / "a.tif", noise(2000, 100), photometric="minisblack", compression="zlib"
    )
    data = bytearray((tmp_path / "a.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        offset, length = tiff.pages[0].dataoffsets[0], tiff.pages[0].databytecounts[0]
    bomb = zlib.compress(bytes(50_000_000))
    assert len(bomb) <= length
    data[offset : offset + len(bomb)] = bomb
    (tmp_path / "a.tif").write_bytes(data)
    assert "inflates to more" in refusal(tmp_path / "a.tif")


def test_a_tiff_with_a_missing_strip_is_refused_and_not_filled_with_zeros(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", noise(8, 8), photometric="minisblack", rowsperstrip=2)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as tiff:
        tiff.pages[0].tags[279].overwrite([16, 16, 0, 16])
    assert "a strip or tile of 0 bytes" in refusal(tmp_path / "a.tif")


def test_layouts_that_are_no_colours_are_refused(tmp_path: Path) -> None:
    tifffile.imwrite(
        tmp_path / "a.tif", noise(4, 5, 7), photometric="minisblack", planarconfig="contig"
    )
    assert "found 7 samples a pixel" in refusal(tmp_path / "a.tif")
    tifffile.imwrite(tmp_path / "b.tif", np.ones((4, 5), np.complex64))
    assert "complex64" in refusal(tmp_path / "b.tif")
    Image.new("LAB", (4, 5)).save(tmp_path / "c.tif")
    assert "photometric interpretation 8" in refusal(tmp_path / "c.tif")


ENCODINGS = {
    "png": encoded("PNG"),
    "png16": png_bytes(noise(10, 8, 3, dtype=np.uint16)),
    "jpeg": encoded("JPEG"),
    "progressive": encoded("JPEG", progressive=True),
    "bmp": encoded("BMP"),
    "tiff": encoded("TIFF"),
    "lzw": encoded("TIFF", compression="tiff_lzw"),
    "deflate": encoded("TIFF", compression="tiff_adobe_deflate"),
    "tiff_jpeg": encoded("TIFF", compression="jpeg"),
}


def planar_with_leading_directory() -> bytes:
    """A TIFF whose strips come last, so that a cut loses pixels and not the directory."""
    stream = io.BytesIO()
    tifffile.imwrite(stream, noise(24, 19, 3), photometric="rgb", rowsperstrip=5, metadata=None)
    return stream.getvalue()


ENCODINGS["strips"] = planar_with_leading_directory()


@pytest.mark.parametrize("kind", ENCODINGS)
def test_a_file_cut_anywhere_is_refused_or_whole(
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path, data = tmp_path / "a.png", ENCODINGS[kind]
    path.write_bytes(data)
    whole = load_image(path)
    refused = 0
    for cut in range(0, len(data), max(1, len(data) // 150)):
        path.write_bytes(data[:cut])
        try:
            image = load_image(path)
        except InputError:
            refused += 1
        else:
            np.testing.assert_array_equal(image, whole, err_msg=f"cut at {cut} of {len(data)}")
    assert refused > 100
    path.write_bytes(data[: len(data) // 2])
    assert "truncated" in refusal(path)
    assert capfd.readouterr().err == ""


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kind=st.sampled_from(sorted(ENCODINGS)),
    changes=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6
    ),
)
def test_a_damaged_file_gives_an_image_or_an_input_error(
    kind: str, changes: list[tuple[float, int]]
) -> None:
    data = bytearray(ENCODINGS[kind])
    for place, value in changes:
        data[int(place * len(data))] = value
    image_or_refusal(bytes(data))


@settings(max_examples=100, deadline=None)
@given(
    head=st.sampled_from([b"", *(magic for magic, _ in decode._KINDS)]), tail=st.binary(max_size=99)
)
def test_random_bytes_give_an_input_error(head: bytes, tail: bytes) -> None:
    image_or_refusal(head + tail)


def image_or_refusal(data: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        try:
            image = load_image(file.name, max_pixels=10**6)
        except InputError:
            return
    assert image.dtype == np.float32
    assert image.shape[2] == 3
    assert image.min() >= 0
    assert image.max() <= 1


def test_nothing_is_written_to_stderr_or_warned(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)  # 456 pixels: a warning, no error
    (tmp_path / "bomb.png").write_bytes(encoded("PNG"))
    lzw_data = bytearray(ENCODINGS["lzw"])
    lzw_data[60:600] = b"\xff" * 540
    (tmp_path / "lzw.tif").write_bytes(lzw_data)
    stream = io.BytesIO()
    tifffile.imwrite(stream, noise(8, 8), description="text " * 20, metadata=None)
    tagged = stream.getvalue()
    at = tagged.index(struct.pack("<HH", 270, 2))
    (tmp_path / "tag.tif").write_bytes(  # tifffile logs that it skips this tag
        tagged[: at + 8] + struct.pack("<I", 2**31) + tagged[at + 12 :]
    )
    handler = logging.StreamHandler()
    logging.getLogger().addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_image(tmp_path / "bomb.png")
            refusal(tmp_path / "lzw.tif")
            load_image(tmp_path / "tag.tif")
    finally:
        logging.getLogger().removeHandler(handler)
    assert capfd.readouterr().err == ""
    # the sources of the noise are real: without the mute each of them speaks
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(tmp_path / "bomb.png")
    monkeypatch.undo()
    with pytest.raises(OSError):  # noqa: PT011
        Image.open(tmp_path / "lzw.tif").load()
    with tifffile.TiffFile(tmp_path / "tag.tif") as tiff:
        assert tiff.pages[0].shape == (8, 8)
    assert capfd.readouterr().err.count("\n") >= 1


def test_warnings_and_loggers_of_others_are_as_before(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    before = list(warnings.filters)
    threads = [
        threading.Thread(target=lambda: [load_image(tmp_path / "a.png") for _ in range(30)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before
    assert logging.getLogger("tifffile").filter(logging.makeLogRecord({}))


def test_pillow_is_not_told_to_accept_truncated_images() -> None:
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    assert Image.MAX_IMAGE_PIXELS is not None
    assert 2 * Image.MAX_IMAGE_PIXELS == MAX_PIXELS


# ---------------------------------------------------------------- masks


def test_any_value_above_zero_in_any_colour_is_defect(tmp_path: Path) -> None:
    samples = np.zeros((2, 3, 4), np.uint8)
    samples[..., 3] = 255  # opaque, which is no defect
    samples[0, 1, 2], samples[1, 2, 0] = 1, 255
    Image.fromarray(samples).save(tmp_path / "a.png")
    mask = load_mask(tmp_path / "a.png")
    assert mask.dtype == bool
    assert mask.tolist() == [[False, True, False], [False, False, True]]


def test_the_smallest_16_bit_value_is_defect(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 1]], np.uint16)).save(tmp_path / "a.png")
    assert load_mask(tmp_path / "a.png", (1, 2)).tolist() == [[False, True]]


def test_a_mask_of_another_size_is_refused_with_both_sizes(tmp_path: Path) -> None:
    Image.fromarray(noise(4, 6)).save(tmp_path / "a.png")
    assert load_mask(tmp_path / "a.png", (4, 6)).shape == (4, 6)
    with pytest.raises(InputError, match=r"expected a mask of 6x4 pixels \(HxW\), found 4x6"):
        load_mask(tmp_path / "a.png", (6, 4))


# ---------------------------------------------------------------- resizing

unit_images = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 12), st.integers(1, 12), st.just(3)),
    elements=st.floats(0, 1, width=32),
)
lengths = st.integers(1, 20)


def triangle(old: int, new: int) -> np.ndarray:
    """(new, old) weights: a triangle as wide as the larger of both pixels, cut at the border."""
    scale = old / new
    width = max(scale, 1.0)
    centre = (np.arange(new)[:, None] + 0.5) * scale
    weights = np.maximum(0, 1 - np.abs(np.arange(old) + 0.5 - centre) / width)
    return weights / weights.sum(1, keepdims=True)


@settings(max_examples=60, deadline=None)
@given(unit_images, lengths, lengths)
def test_resize_is_bilinear_with_antialiasing(image: np.ndarray, h: int, w: int) -> None:
    resized = resize(image, (h, w))
    assert resized.dtype == torch.float32
    assert resized.shape == (3, h, w)
    expected = np.einsum(
        "yY,xX,YXc->cyx", triangle(image.shape[0], h), triangle(image.shape[1], w), image
    )
    np.testing.assert_allclose(resized, expected, atol=2e-5)


@settings(max_examples=30, deadline=None)
@given(unit_images)
def test_resize_to_the_same_size_changes_no_bit_and_shares_no_memory(image: np.ndarray) -> None:
    resized = resize(image, image.shape[:2])
    expected = image.transpose(2, 0, 1).copy()
    assert resized.is_contiguous()
    assert resized.numpy().tobytes() == expected.tobytes()
    image += 1
    assert resized.numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (1, 1)])
def test_resize_of_extreme_shapes_keeps_a_constant(shape: tuple[int, int]) -> None:
    resized = resize(np.full((*shape, 3), 0.25, np.float32), (32, 32))
    np.testing.assert_allclose(resized, 0.25, rtol=1e-6)


def test_resize_takes_flipped_and_read_only_images() -> None:
    image = np.random.default_rng(0).random((4, 5, 3), np.float32)
    image.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(
            resize(image[:, ::-1], (4, 5)), image[:, ::-1].transpose(2, 0, 1)
        )


@pytest.mark.parametrize("shape", [(256, 256), (300, 500), (20, 7000), (7000, 20), (2000, 2000)])
@pytest.mark.parametrize("size", [(256, 256), (8, 1)])
def test_resize_on_a_gpu_is_that_on_a_cpu(
    device: str, shape: tuple[int, int], size: tuple[int, int]
) -> None:
    image = np.random.default_rng(0).random((*shape, 3), np.float32)
    resized = resize(image, size, device)
    assert resized.device == torch.device(device)
    torch.testing.assert_close(resized.cpu(), resize(image, size), rtol=0, atol=1e-5)


class Elsewhere(torch.Tensor):
    """On a device whose kernels cannot shrink images."""

    is_cpu = False


def test_what_a_device_cannot_resize_the_cpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    real = images._interpolated

    def refuse(planes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        if isinstance(planes, Elsewhere):
            raise RuntimeError("Too much shared memory required")
        return real(planes, size)

    monkeypatch.setattr(images, "_interpolated", refuse)
    planes = torch.rand(3, 40, 50)
    monkeypatch.setattr(Elsewhere, "cpu", lambda _: planes, raising=False)
    there = planes.as_subclass(Elsewhere)
    assert torch.equal(images.resize_planes(there, (8, 9)), images.resize_planes(planes, (8, 9)))


@pytest.mark.parametrize(
    ("shape", "size"),
    [((4, 4), (2, 2)), ((4, 4, 4), (2, 2)), ((0, 4, 3), (2, 2)), ((4, 4, 3), (0, 2))],
)
def test_resize_names_a_wrong_shape_or_size(shape: tuple[int, ...], size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"resize: expected .* got \("):
        resize(np.zeros(shape, np.float32), size)


# ---------------------------------------------------------------- folders


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_list_images_finds_every_suffix_in_order_and_nothing_hidden(tmp_path: Path) -> None:
    wanted = ["a b/ü.JPG", "a.png", "a/b.Tiff", "a/c/d.tif", "b.jpeg", "c.BMP", "猫.png"]
    touch(tmp_path, *reversed(wanted))
    touch(tmp_path, "a.txt", ".hidden.png", ".git/a.png", "png", "a/.x/y.png", "a/b.npy")
    found = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)]
    assert found == sorted(wanted)
    assert found[:3] == ["a b/ü.JPG", "a.png", "a/b.Tiff"]


def test_list_images_takes_a_folder_that_is_itself_hidden(tmp_path: Path) -> None:
    touch(tmp_path, ".cache/a.png")
    assert list_images(tmp_path / ".cache") == [tmp_path / ".cache" / "a.png"]


def test_list_images_follows_links_but_no_loops(tmp_path: Path) -> None:
    touch(tmp_path, "set/z/a.png", "elsewhere/b.png")
    (tmp_path / "set/z/loop").symlink_to(tmp_path / "set")
    (tmp_path / "set/zz").symlink_to(tmp_path / "set/z")
    (tmp_path / "set/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/broken.png").symlink_to(tmp_path / "nowhere.png")
    found = [
        path.relative_to(tmp_path / "set").as_posix() for path in list_images(tmp_path / "set")
    ]
    assert found == ["broken.png", "linked/b.png", "z/a.png"]


def test_list_images_of_an_empty_a_missing_and_no_folder(tmp_path: Path) -> None:
    assert list_images(tmp_path) == []
    with pytest.raises(InputError, match="no such folder"):
        list_images(tmp_path / "no")
    touch(tmp_path, "a.png")
    with pytest.raises(InputError, match="expected a folder, found a file"):
        list_images(tmp_path / "a.png")


# ---------------------------------------------------------------- inputs and their names


def named(tmp_path: Path, *inputs: str) -> list[tuple[str, str]]:
    return [
        (path.relative_to(tmp_path).as_posix(), str(name))
        for path, name in expand_inputs([tmp_path / given for given in inputs])
    ]


def test_names_are_relative_to_a_folder_or_the_name_of_a_file(tmp_path: Path) -> None:
    touch(tmp_path, "in/b/x.png", "in/a.v2.png", "in/notes.txt", "raw.dat")
    assert named(tmp_path, "in", "raw.dat", "missing.png") == [
        ("in/a.v2.png", "a.v2"),
        ("in/b/x.png", "b/x"),
        ("raw.dat", "raw"),
        ("missing.png", "missing"),
    ]
    assert all(type(name) is PurePosixPath for _, name in expand_inputs([tmp_path]))


def test_equal_stems_in_one_folder_keep_their_suffix(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.png", "in/a.jpg", "in/b.png")
    assert [name for _, name in named(tmp_path, "in")] == ["a.jpg", "a.png", "b"]


def test_equal_names_from_two_places_get_their_folder(tmp_path: Path) -> None:
    touch(tmp_path, "left/a.png", "right/a.png", "left/s/t.png", "right/s/t.png")
    assert [n for _, n in named(tmp_path, "left/a.png", "right/a.png")] == ["left/a", "right/a"]
    assert [n for _, n in named(tmp_path, "right", "left")] == [
        "right/a",
        "right/s/t",
        "left/a",
        "left/s/t",
    ]


def test_equal_names_in_equal_folders_get_a_number(tmp_path: Path) -> None:
    touch(tmp_path, "1/d/a.png", "2/d/a.png", "3/d/a.png", "4/d/a.png-2.png")
    assert [n for _, n in named(tmp_path, "1/d", "2/d", "3/d/a.png")] == [
        "d/a.png",
        "d/a.png-2",
        "d/a.png-3",
    ]
    # a name that was free of collisions is left as it is
    assert [n for _, n in named(tmp_path, "1/d", "2/d", "4")] == [
        "d/a.png",
        "d/a.png-3",
        "d/a.png-2",
    ]


def test_a_file_named_twice_comes_once(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.png", "in/b.png")
    assert named(tmp_path, "in/b.png", "in", "in/../in/a.png") == [
        ("in/b.png", "b"),
        ("in/a.png", "a"),
    ]


def test_the_current_folder_is_named_by_its_real_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "left/a.png", "right/a.png")
    monkeypatch.chdir(tmp_path / "left")
    names = [str(name) for _, name in expand_inputs([Path("."), Path("../right"), Path("a.png")])]
    assert names == ["left/a", "right/a"]


def test_a_missing_folder_below_an_input_and_strings_are_taken(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    assert expand_inputs([str(tmp_path)]) == [(tmp_path / "a.png", PurePosixPath("a"))]
    assert expand_inputs([]) == []


parts = st.sampled_from(["a", "b", "a.png", "d"])
suffixes = st.sampled_from(["", ".png", ".jpg", ".png-2", "-2.png"])
names = st.tuples(st.lists(parts, max_size=3), parts, suffixes).map(
    lambda drawn: "/".join([*(f"{part}_" for part in drawn[0]), drawn[1] + drawn[2]])
)


@settings(max_examples=100, deadline=None)
@given(st.lists(names, min_size=1, max_size=14, unique=True), st.booleans())
def test_names_are_unique_relative_and_inside(drawn: list[str], as_folders: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        touch(root, *drawn)
        inputs = [root / name for name in drawn]
        if as_folders:
            inputs = sorted({path.parent for path in inputs}, key=lambda path: -len(path.parts))
        expanded = expand_inputs(inputs)
        names = [name for _, name in expanded]
        assert len(set(names)) == len(names)
        assert all(not name.is_absolute() and ".." not in name.parts for name in names)
        if not as_folders:
            assert [path for path, _ in expanded] == inputs
        assert expand_inputs(inputs) == expanded
