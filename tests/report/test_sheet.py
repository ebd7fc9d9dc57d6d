import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from glance_ext.errors import OutputError
from glance_ext.report import Tile, contact_sheet
from glance_ext.report.sheet import _shorten

RED, GREEN, BLUE = (200, 0, 0), (0, 130, 0), (0, 0, 200)
ORANGE, CYAN, BROWN = (250, 140, 20), (20, 200, 220), (120, 70, 20)
OUTLINE = (0, 255, 120)


def solid(colour: tuple[int, int, int], height: int = 50, width: int = 50) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def plain(
    left: tuple[int, int, int], right: tuple[int, int, int], caption: str = "c", heading: str = ""
) -> Tile:
    return Tile(solid(left), solid(right), None, caption, heading)


def draw(path: Path, rows: list[Tile], **options: int) -> np.ndarray:
    contact_sheet(path / "sheet.png", iter(rows), **options)
    with Image.open(path / "sheet.png") as picture:
        assert picture.format == "PNG"
        return np.asarray(picture)


def box(sheet: np.ndarray, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """The rectangle that a colour fills: top, left, height, width; it must fill it wholly."""
    there = (sheet == colour).all(axis=2)
    rows, columns = np.flatnonzero(there.any(axis=1)), np.flatnonzero(there.any(axis=0))
    top, left = rows[0], columns[0]
    height, width = rows[-1] - top + 1, columns[-1] - left + 1
    assert there.sum() == height * width
    return int(top), int(left), int(height), int(width)


def ink_rows(sheet: np.ndarray, left: int, right: int) -> np.ndarray:
    """The rows in which something nearly black is drawn between two columns."""
    return np.flatnonzero((sheet[:, left:right].max(axis=2) < 90).any(axis=1))


def test_strip_holds_image_and_heatmap_side_by_side(tmp_path: Path) -> None:
    sheet = draw(tmp_path, [plain(RED, GREEN)], tile=100)
    top, left, height, width = box(sheet, RED)
    assert (height, width) == (100, 100)
    assert box(sheet, GREEN) == (top, left + 104, 100, 100)
    assert sheet.shape[1] == left + 308 + left
    assert sheet.shape[0] >= top + 100 + 15


def test_strips_fill_columns_then_rows_in_order(tmp_path: Path) -> None:
    rows = [plain(RED, GREEN), plain(BLUE, ORANGE), plain(CYAN, BROWN)]
    sheet = draw(tmp_path, rows, tile=64, columns=2)
    red, green, blue, orange, cyan, brown = (
        box(sheet, colour) for colour in (RED, GREEN, BLUE, ORANGE, CYAN, BROWN)
    )
    assert {b[2:] for b in (red, green, blue, orange, cyan, brown)} == {(64, 64)}
    assert red[0] == green[0] == blue[0] == orange[0]
    assert cyan[0] == brown[0] >= red[0] + 64 + 15
    assert red[1] == cyan[1] < green[1] == brown[1]
    assert blue[1] >= green[1] + 2 * 64
    assert orange[1] == blue[1] + green[1] - red[1]
    one_column = draw(tmp_path, rows, tile=64, columns=1)
    assert box(one_column, RED)[1] == box(one_column, BLUE)[1] == box(one_column, CYAN)[1]
    assert box(one_column, RED)[0] < box(one_column, BLUE)[0] < box(one_column, CYAN)[0]
    assert one_column.shape[1] < sheet.shape[1]
    assert one_column.shape[0] > sheet.shape[0]


def test_tile_sets_the_size(tmp_path: Path) -> None:
    small = draw(tmp_path, [plain(RED, GREEN)], tile=64)
    large = draw(tmp_path, [plain(RED, GREEN)], tile=164)
    assert large.shape[0] - small.shape[0] == 100
    assert large.shape[1] - small.shape[1] == 300
    assert (
        draw(tmp_path, [plain(RED, GREEN)]).shape
        == draw(tmp_path, [plain(RED, GREEN)], tile=224).shape
    )


@pytest.mark.parametrize(
    ("height", "width", "fitted"),
    [(50, 100, (40, 80)), (1000, 250, (80, 20)), (3, 2000, (1, 80)), (1, 1, (80, 80))],
)
def test_any_aspect_ratio_is_centred_in_its_tile(
    tmp_path: Path, height: int, width: int, fitted: tuple[int, int]
) -> None:
    odd = Tile(solid(RED, height, width), solid(GREEN, height, width), None, "odd")
    sheet = draw(tmp_path, [odd, plain(BLUE, ORANGE)], tile=80, columns=1)
    _, tile_left, _, _ = box(sheet, BLUE)
    top, left, *size = box(sheet, RED)
    assert tuple(size) == fitted
    assert left == tile_left + (80 - fitted[1]) // 2
    assert box(sheet, GREEN) == (top, left + 84, *fitted)
    letterbox = sheet[top - (80 - fitted[0]) // 2, tile_left]
    if fitted != (80, 80):
        assert letterbox.tolist() == [236, 238, 241]


def test_float_image_is_drawn_like_its_8_bit_twin(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    one = draw(tmp_path, [Tile(pixels, pixels, None, "c")])
    two = draw(tmp_path, [Tile((pixels / 255).astype(np.float32), pixels, None, "c")])
    np.testing.assert_array_equal(one, two)


def test_ground_truth_outlines_the_mask_and_leaves_the_defect_bare(tmp_path: Path) -> None:
    mask = np.zeros((50, 50), bool)
    mask[10:20, 25:40] = True
    sheet = draw(tmp_path, [Tile(solid(RED), solid(GREEN), mask, "c")], tile=100)
    top, left, _, _ = box(sheet, GREEN)
    panel = sheet[top : top + 100, left + 104 : left + 204]
    line = np.argwhere((panel == OUTLINE).all(axis=2))
    # The mask in tile pixels is rows 20 to 39, columns 50 to 79; the line is 2 wide around it.
    assert line.min(axis=0).tolist() == [18, 48]
    assert line.max(axis=0).tolist() == [41, 81]
    assert (panel[20:40, 50:80] == RED).all()
    assert (panel[:15] == RED).all()
    assert (panel[18:20, 52:78] == OUTLINE).all()
    assert (panel[17, 52:78] == 0).all()
    assert not (sheet[top : top + 100, : left + 100] == OUTLINE).all(axis=2).any()


def test_defect_of_one_pixel_in_a_large_image_is_still_outlined(tmp_path: Path) -> None:
    mask = np.zeros((1000, 2000), np.uint8)
    mask[500, 1500] = 255
    entry = Tile(solid(RED, 1000, 2000), solid(GREEN, 1000, 2000), mask, "c")
    sheet = draw(tmp_path, [entry], tile=200)
    top, left, _, _ = box(sheet, GREEN)
    panel = sheet[top : top + 100, left + 204 : left + 404]
    line = np.argwhere((panel == OUTLINE).all(axis=2))
    assert len(line) >= 16
    np.testing.assert_allclose(line.mean(axis=0), [50, 150], atol=1)


def test_empty_mask_shows_the_bare_image_and_no_mask_shows_none(tmp_path: Path) -> None:
    empty = np.zeros((50, 50), bool)
    sheet = draw(tmp_path, [Tile(solid(RED), solid(GREEN), empty, "c")], tile=100)
    top, left, _, _ = box(sheet, GREEN)
    assert (sheet[top : top + 100, left + 104 : left + 204] == RED).all()
    sheet = draw(tmp_path, [Tile(solid(RED), solid(GREEN), None, "c")], tile=100)
    panel = sheet[top : top + 100, left + 104 : left + 204]
    assert not (panel == RED).all(axis=2).any()
    assert (panel == (236, 238, 241)).all(axis=2).mean() > 0.8
    assert (panel.max(axis=2) < 150).any()


def test_headings_part_the_groups(tmp_path: Path) -> None:
    rows = [
        plain(RED, GREEN, heading="worst cases"),
        plain(BLUE, ORANGE, heading="best cases"),
        plain(CYAN, BROWN, heading="best cases"),
    ]
    sheet = draw(tmp_path, rows, tile=64, columns=2)
    red, blue, cyan = box(sheet, RED), box(sheet, BLUE), box(sheet, CYAN)
    assert blue[0] == cyan[0] > red[0] + 64
    assert blue[1] == red[1] < cyan[1]
    written = ink_rows(sheet, red[1], red[1] + 200)
    assert (written < red[0] - 20).any()
    assert ((written > red[0] + 64 + 24) & (written < blue[0] - 20)).any()
    bare = draw(tmp_path, [plain(RED, GREEN)], tile=64)
    assert box(bare, RED)[0] < red[0] - 20


def test_caption_stands_below_its_strip_and_changes_it_only(tmp_path: Path) -> None:
    one = draw(tmp_path, [plain(RED, GREEN, "a"), plain(BLUE, ORANGE, "x")], tile=64)
    two = draw(tmp_path, [plain(RED, GREEN, "a"), plain(BLUE, ORANGE, "Y 0.9")], tile=64)
    rows, columns = np.nonzero((one != two).any(axis=2))
    top, left, _, _ = box(one, BLUE)
    assert rows.min() >= top + 64
    assert rows.max() < top + 64 + 24
    assert columns.min() >= left - 1  # a letter may lean out of its own box
    assert columns.max() < left + 3 * 64 + 8


def test_caption_letters_are_large_enough_to_read(tmp_path: Path) -> None:
    sheet = draw(tmp_path, [plain(RED, GREEN, "HHH")], tile=64)
    top, left, _, _ = box(sheet, RED)
    written = ink_rows(sheet[top + 64 :], left, left + 64)
    assert written[-1] - written[0] + 1 >= 10


@pytest.mark.parametrize("length", [100, 5000, 300_000])
def test_long_caption_stays_within_its_strip(tmp_path: Path, length: int) -> None:
    rows = [plain(RED, GREEN, "W" * length), plain(BLUE, ORANGE, "")]
    sheet = draw(tmp_path, rows, tile=64, columns=2)
    top, left, _, _ = box(sheet, RED)
    below = sheet[top + 64 : top + 88].max(axis=2) < 90
    columns = np.flatnonzero(below.any(axis=0))
    assert columns.min() >= left
    assert columns.max() < left + 3 * 64 + 8
    assert columns.max() > left + 3 * 64 + 8 - 40


def test_shortening_keeps_both_ends_and_as_much_as_fits() -> None:
    font = ImageFont.load_default(15)
    assert isinstance(font, ImageFont.FreeTypeFont)
    text = "folder/" + "x" * 200 + "/000.png  0.93  anomalous"
    short = _shorten(text, font, 400)
    head, _, tail = short.partition("…")
    assert text.startswith(head)
    assert text.endswith(tail)
    assert head.startswith("folder/")
    assert tail.endswith("0.93  anomalous")
    assert 380 < font.getlength(short) <= 400
    assert _shorten("short", font, 400) == "short"
    assert _shorten("WWW", font, 1) == "…"


@pytest.mark.parametrize(
    "name",
    ["日本語.png", "🔩🪛", "a\nb\x00c\td", os.fsdecode(b"\xff\xfe.png"), "مرحبا", "e\u0301", ""],
)
def test_names_that_the_font_lacks_do_not_crash(tmp_path: Path, name: str) -> None:
    sheet = draw(tmp_path, [plain(RED, GREEN, name, heading=name)], tile=64)
    assert box(sheet, RED)[2:] == (64, 64)


def test_control_characters_and_stray_bytes_are_spelled_out_on_one_line(tmp_path: Path) -> None:
    name = os.fsdecode(b"a\nb\xff")
    strange = draw(tmp_path, [plain(RED, GREEN, name, heading=name)], tile=64)
    spelled = draw(tmp_path, [plain(RED, GREEN, "a b\\xff", heading="a b\\xff")], tile=64)
    np.testing.assert_array_equal(strange, spelled)


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([], {}, "at least one tile"),
        ([plain(RED, GREEN)], {"tile": 31}, "tile >= 32"),
        ([plain(RED, GREEN)], {"columns": 0}, "columns >= 1"),
        ([Tile(np.zeros((4, 4)), solid(RED), None, "")], {}, "expected image to have shape"),
        ([Tile(solid(RED), np.zeros((0, 4, 3)), None, "")], {}, "expected overlay to have shape"),
        ([Tile(solid(RED), solid(RED), np.zeros((50, 49)), "")], {}, "expected mask .*50, 49"),
    ],
)
def test_impossible_arguments_are_named(
    tmp_path: Path, rows: list[Tile], options: dict[str, int], words: str
) -> None:
    with pytest.raises(ValueError, match=f"^contact_sheet: .*{words}"):
        contact_sheet(tmp_path / "sheet.png", rows, **options)
    assert list(tmp_path.iterdir()) == []


def test_sheet_under_a_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("here")
    with pytest.raises(OutputError, match=r"sheet\.png"):
        contact_sheet(tmp_path / "taken" / "sheet.png", [plain(RED, GREEN)])
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]
