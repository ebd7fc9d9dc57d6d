import os

import pytest

from glance_ext.report import format_table


def test_numbers_stand_right_and_text_stands_left() -> None:
    text = format_table(
        ["category", "image_AUROC", "n"],
        [["bottle", "0.982", 12], ["metal_nut", "n/a", 3], ["grid", "10.5", 1200]],
    )
    assert text.split("\n") == [
        "category   image_AUROC     n",
        "---------  -----------  ----",
        "bottle           0.982    12",
        "metal_nut          n/a     3",
        "grid              10.5  1200",
    ]


@pytest.mark.parametrize(
    "cell",
    [
        *("1", "-1.5", "+.5", "2.", "1e-3", "98.2%", "98.2 %", "1.53x", "3\u00d7", "1,725"),
        *("nan", "-inf", "\u22121", "1.2 ± 0.1"),
    ],
)
def test_column_of_numbers_is_to_the_right(cell: str) -> None:
    assert format_table(["a long name"], [[cell]]).split("\n")[2] == cell.rjust(11)


@pytest.mark.parametrize("cell", ["v1", "1.2.3", "12 images", "a", "-", "", "0x1f", "e5", "1-2"])
def test_column_of_anything_else_is_to_the_left(cell: str) -> None:
    assert format_table(["a long name"], [[cell]]).split("\n")[2] == cell


def test_one_word_makes_a_column_text() -> None:
    lines = format_table(["name", "n"], [["10000", "1"], ["best", "2"]]).split("\n")
    assert lines[3] == "best   2"


def test_table_without_rows_is_header_and_rule() -> None:
    assert format_table(["name", "n"], []) == "name  n\n----  -"


def test_wide_and_combining_characters_keep_columns_aligned() -> None:
    lines = format_table(["name", "score"], [["日本", "0.5"], ["e\u0301a", "0.25"]]).split("\n")
    assert lines[2] == "日本    0.5"
    assert lines[3] == "e\u0301a     0.25"


def test_cells_cannot_break_lines_or_send_terminal_escapes() -> None:
    name = os.fsdecode(b"a\nb\x1b[31m\xff")
    lines = format_table(["name", "n"], [[name, 1]]).split("\n")
    assert lines[2] == "a b [31m\\xff  1"
    "\n".join(lines).encode("utf-8")


@pytest.mark.parametrize("row", [["a"], ["a", 1, 2]])
def test_row_of_another_length_is_refused(row: list[object]) -> None:
    expected = rf"expected rows of 2 cells .* got {len(row)} in row 1"
    with pytest.raises(ValueError, match=expected):
        format_table(["name", "n"], [["x", 1], row])
