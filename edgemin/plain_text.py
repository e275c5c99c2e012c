"""Texts that others chose (names, overrides, messages) made harmless: for a terminal, for a file, for a spreadsheet."""

from __future__ import annotations

import re
import unicodedata

_FORMULA = "=+-@\t\r"
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_CONTROL = {"Cc", "Cs", "Zl", "Zp"}
_DIRECTION = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def printable(text: str) -> str:
    """The text as one line that no terminal acts on, words separated by single blanks."""
    return inert(" ".join(text.split()))


def inert(text: str) -> str:
    r"""The text without what a terminal acts on.

    A control character, half of a surrogate pair (which no file can hold) and a sign that reverses the direction of
    what follows are written out, an escape as `\x1b`.
    """
    return "".join(_written_out(character) for character in text)


def csv_cell(text: str) -> str:
    """The text as a cell of a CSV file: with an apostrophe before what a spreadsheet would compute as a formula."""
    if len(text) < 2 or text[0] not in _FORMULA or _NUMBER.fullmatch(text):
        return text
    return f"'{text}"


def file_name(text: str) -> str:
    """The text as a part of a file's name, which leads into no other directory."""
    return re.sub(r"[^\w-]+", "_", text)


def _written_out(character: str) -> str:
    acted_on = unicodedata.category(character) in _CONTROL or unicodedata.bidirectional(character) in _DIRECTION
    return character.encode("unicode_escape").decode() if acted_on else character


def is_text(value: str) -> bool:
    """Whether a string is text; one that was not decoded rightly holds halves of characters (lone surrogates)."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
