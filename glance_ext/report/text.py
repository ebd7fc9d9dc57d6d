"""Text from file names and users, made fit for a terminal, a picture or a page."""

from __future__ import annotations

import unicodedata


def printable(text: str) -> str:
    r"""Returns ``text`` as one line that every output can encode and none can misread.

    File names are bytes in disguise: they may hold line breaks, terminal escapes, and bytes that
    are no UTF-8, which Python keeps as lone surrogates and no encoder accepts. Control characters
    and line separators become spaces, surrogates are spelled out (``\xff``); all else is kept.
    """
    return "".join(_printable_character(character) for character in text)


def _printable_character(character: str) -> str:
    category = unicodedata.category(character)
    if category in ("Cc", "Zl", "Zp"):
        return " "
    if category == "Cs":
        code = ord(character)
        # os.fsdecode hides the byte 0xNN as U+DCNN.
        return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"
    return character
