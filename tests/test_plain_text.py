"""Texts that others chose, made harmless."""

from __future__ import annotations

import pytest

from edgemin.plain_text import printable


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("red\x1b[31m", r"red\x1b[31m"),
        ("\x9b2J\x07\x00", r"\x9b2J\x07\x00"),
        ("two\nlines\r\tof\u2028it", "two lines of it"),
        ("a\u202egnp.exe", r"a\u202egnp.exe"),
        ("half \ud800", r"half \ud800"),
        ("Größe ± 名前 👩‍💻", "Größe ± 名前 👩‍💻"),
    ],
)
def test_nothing_that_a_terminal_acts_on_is_left(text: str, expected: str) -> None:
    assert printable(text) == expected
