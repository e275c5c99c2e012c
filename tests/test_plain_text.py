"""Control characters in texts that others chose are written out."""

from __future__ import annotations

import pytest

from edgemin.plain_text import csv_cell, file_name, printable


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


@pytest.mark.parametrize("text", ["=1+1", "+ Distillation", "-x", "@SUM(A1)", "\tx", "\r=1", "-1+1", "+1e5x"])
def test_a_formula_becomes_text(text: str) -> None:
    assert csv_cell(text) == f"'{text}"


@pytest.mark.parametrize("text", ["", "-", "-0.5", "+3", "-1e-5", ".5", "a=b", "Teacher"])
def test_what_is_no_formula_stays(text: str) -> None:
    assert csv_cell(text) == text


def test_a_name_leads_into_no_other_directory() -> None:
    assert file_name("../a/b\\c.d") == "_a_b_c_d"
