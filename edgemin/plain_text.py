"""Texts that others chose (names, overrides, messages) made harmless: for a terminal, for a file, for a spreadsheet."""

from __future__ import annotations

import unicodedata

_CONTROL = {"Cc", "Cs", "Zl", "Zp"}
_DIRECTION = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def printable(text: str) -> str:
    r"""The text as one line that no terminal acts on.

    White space becomes single blanks. A control character, half of a surrogate pair (which no file can hold) and a
    sign that reverses the direction of what follows are written out, an escape as ``\x1b``.
    """
    return "".join(_written_out(character) for character in " ".join(text.split()))


def _written_out(character: str) -> str:
    acted_on = unicodedata.category(character) in _CONTROL or unicodedata.bidirectional(character) in _DIRECTION
    return character.encode("unicode_escape").decode() if acted_on else character
