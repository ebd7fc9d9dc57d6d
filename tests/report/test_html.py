import base64
import io
import os
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glance_ext.errors import InputError, OutputError
from glance_ext.report import Paragraph, Picture, Section, Table, write_png, write_report

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Reads a page strictly: every element closed, in order, and remembers what it saw."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(path.read_text("utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def text(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


def pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def decoded(image: dict[str, str | None]) -> bytes:
    head, _, data = (image["src"] or "").partition(",")
    assert head == "data:image/png;base64"
    return base64.b64decode(data, validate=True)


def test_page_holds_its_sections_in_order(tmp_path: Path) -> None:
    sections = [
        Section("Scores", [Paragraph("All of them."), Table(["a"], [["b"]], caption="every one")]),
        Section("Pictures", [Picture(pixels(0, 4, 5, 3), "the worst", "a heatmap")]),
    ]
    write_report(tmp_path / "page.html", "Bottles", sections)
    page = Page(tmp_path / "page.html")
    assert page.text("title") == page.text("h1") == ["Bottles"]
    assert page.text("h2") == page.text("a") == ["Scores", "Pictures"]
    assert page.text("p") == ["All of them."]
    assert page.text("caption") == ["every one"]
    assert page.text("figcaption") == ["the worst"]
    order = [tag for tag, _ in page.tags if tag in ("section", "p", "table", "figure")]
    assert order == ["section", "p", "table", "section", "figure"]
    targets = ["#" + (section["id"] or "") for section in page.of("section")]
    assert [link["href"] for link in page.of("a")] == targets
    assert len(set(targets)) == 2


def test_all_text_is_escaped(tmp_path: Path) -> None:
    evil = """<script>alert('1')</script>" onload="x" & &amp;"""
    sections = [
        Section(
            evil,
            [
                Paragraph(evil),
                Table([evil], [[evil]], caption=evil),
                Picture(pixels(0, 2, 2, 3), evil, evil),
            ],
        ),
        Section("other", []),
    ]
    write_report(tmp_path / "page.html", evil, sections)
    page = Page(tmp_path / "page.html")
    assert page.of("script") == []
    for tag in ("title", "h1", "h2", "p", "th", "td", "caption", "figcaption"):
        assert page.text(tag)[0] == evil, tag
    assert page.text("a")[0] == evil
    assert page.of("img")[0]["alt"] == evil
    assert all("onload" not in attributes for _, attributes in page.tags)


def test_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    write_report(tmp_path / "page.html", "t", [Section("s", [Picture(pixels(0, 2, 2), "c", "a")])])
    page = Page(tmp_path / "page.html")
    assert {"script", "link", "iframe"}.isdisjoint(tag for tag, _ in page.tags)
    text = (tmp_path / "page.html").read_text("utf-8")
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    assert "@import" not in text
    policy = [m["content"] for m in page.of("meta") if "http-equiv" in m]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_page_suits_phones_and_both_light_and_dark(tmp_path: Path) -> None:
    write_report(tmp_path / "page.html", "t", [])
    page = Page(tmp_path / "page.html")
    meta = {m["name"]: m["content"] for m in page.of("meta") if "name" in m}
    assert "width=device-width" in (meta["viewport"] or "")
    assert {"charset": "utf-8"} in page.of("meta")
    assert page.of("html") == [{"lang": "en"}]
    assert "@media (prefers-color-scheme: dark)" in page.text("style")[0]
    assert "img { display: block; max-width: 100%; height: auto; }" in page.text("style")[0]


@pytest.mark.parametrize("shape", [(6, 9, 3), (6, 9)])
def test_pictures_decode_to_the_same_pixels(tmp_path: Path, shape: tuple[int, ...]) -> None:
    shown = [pixels(seed, *shape) for seed in range(3)]
    blocks = [Picture(p, f"caption {i}", f"alt {i}") for i, p in enumerate(shown)]
    write_report(tmp_path / "page.html", "t", [Section("s", blocks)])
    images = Page(tmp_path / "page.html").of("img")
    assert [image["alt"] for image in images] == ["alt 0", "alt 1", "alt 2"]
    for image, expected in zip(images, shown, strict=True):
        with Image.open(io.BytesIO(decoded(image))) as picture:
            np.testing.assert_array_equal(np.asarray(picture), expected)
        assert (image["width"], image["height"]) == ("9", "6")


def test_png_file_is_embedded_byte_for_byte(tmp_path: Path) -> None:
    # Uncompressed, so that encoding it again would give other bytes.
    Image.fromarray(pixels(0, 6, 9, 3)).save(tmp_path / "a.png", compress_level=0)
    for source in (tmp_path / "a.png", str(tmp_path / "a.png")):
        write_report(tmp_path / "p.html", "t", [Section("s", [Picture(source, "c", "a")])])
        (image,) = Page(tmp_path / "p.html").of("img")
        assert decoded(image) == (tmp_path / "a.png").read_bytes()
        assert (image["width"], image["height"]) == ("9", "6")


def test_file_of_another_format_becomes_a_png(tmp_path: Path) -> None:
    expected = pixels(0, 6, 9, 3)
    Image.fromarray(expected).save(tmp_path / "a.bmp")
    write_report(tmp_path / "p.html", "t", [Section("s", [Picture(tmp_path / "a.bmp", "c", "a")])])
    (image,) = Page(tmp_path / "p.html").of("img")
    with Image.open(io.BytesIO(decoded(image))) as picture:
        assert picture.format == "PNG"
        np.testing.assert_array_equal(np.asarray(picture), expected)


@pytest.mark.parametrize("damage", ["missing", "text", "cut short", "a folder"])
def test_unreadable_picture_file_is_an_input_error(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.png"
    if damage == "text":
        path.write_text("no picture")
    elif damage == "cut short":
        write_png(path, pixels(0, 40, 40, 3))
        path.write_bytes(path.read_bytes()[:2000])
    elif damage == "a folder":
        path.mkdir()
    with pytest.raises(InputError, match=r"a\.png: cannot read the picture: .+"):
        write_report(tmp_path / "p.html", "t", [Section("s", [Picture(path, "c", "a")])])
    assert not (tmp_path / "p.html").exists()


def test_table_aligns_numbers_right_and_keeps_its_cells(tmp_path: Path) -> None:
    table = Table(["name", "AUROC", "n"], [["bottle", "0.982", 12], ["grid", "n/a", 3]])
    write_report(tmp_path / "p.html", "t", [Section("s", [table])])
    page = Page(tmp_path / "p.html")
    assert page.text("th") == ["name", "AUROC", "n"]
    assert page.text("td") == ["bottle", "0.982", "12", "grid", "n/a", "3"]
    assert [cell.get("class") for cell in page.of("th")] == [None, "number", "number"]
    assert [cell.get("class") for cell in page.of("td")] == [None, "number", "number"] * 2
    assert all(cell["scope"] == "col" for cell in page.of("th"))
    assert ".number { text-align: right; }" in page.text("style")[0]
    assert page.of("caption") == []
    assert len(page.of("tr")) == 3


def test_ragged_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"write_report: expected rows of 2 cells"):
        write_report(tmp_path / "p.html", "t", [Section("s", [Table(["a", "b"], [["c"]])])])
    assert list(tmp_path.iterdir()) == []


def test_unknown_block_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="expected a Paragraph, Table or Picture, got 'text'"):
        write_report(tmp_path / "p.html", "t", [Section("s", ["text"])])  # type: ignore[list-item]


def test_file_names_that_are_no_unicode_can_be_shown(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9\x00\n.png")
    write_report(tmp_path / "p.html", name, [Section("日本é", [Table(["n"], [[name]])])])
    page = Page(tmp_path / "p.html")
    assert page.text("h1") == page.text("td") == ["caf\\xe9  .png"]
    assert page.text("h2") == ["日本é"]


def test_report_under_a_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("here")
    with pytest.raises(OutputError, match=r"p\.html"):
        write_report(tmp_path / "taken" / "p.html", "t", [])
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]
