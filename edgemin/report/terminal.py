"""Prints a table on the terminal so that it fits: narrow headings, then fewer columns, but never a cut number."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from typing import Literal, NamedTuple, TextIO

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as TerminalTable
from rich.text import Text

from edgemin.plain_text import printable
from edgemin.report.grid import CORE, MAIN, MOST, Column, Table, decimals, written

_HEADING, _NARROW_HEADING = 11, 8
"""A heading on the terminal is broken at about so many characters, or at fewer where the width is wanted."""
_NAME = 18
"""A name on the terminal is broken at so many characters where not even the most important numbers fit beside it."""


def show(table: Table, file: TextIO | None = None) -> None:
    """Prints the table of a page so that no number is ever cut.

    A terminal that is too narrow, and output of which the environment variable COLUMNS says how wide it is, gets
    narrow headings, then fewer columns with a line that names those left out, then names of several lines. Other
    output takes the width it needs.
    """
    console = Console(file=file, highlight=False, markup=False, emoji=False)
    ascii_only = "utf" not in console.encoding.lower()
    told = os.environ.get("COLUMNS", "").isdecimal()  # rich takes it as the width, and 0 where it says nothing
    known = (console.file.isatty() or told) and console.width > 0
    page = table.for_people()
    layouts = _layouts(page, ascii_only, console if known else None)
    keys = {page.columns[place].key for layout in layouts for place in layout.places}
    kept = page.only([place for place, column in enumerate(page.columns) if column.key in keys])
    left_out = [column.title for column in page.columns if column.key not in keys]
    notes = [_plain(f"[{mark}] {note}" if mark else note, ascii_only) for mark, note in kept.footnotes]
    notes += [f"Left out for lack of width: {', '.join(left_out)}"] if left_out else []
    if known:
        wrap = textwrap.TextWrapper(max(console.width, _NAME), subsequent_indent="    ", break_on_hyphens=False)
        notes = [wrap.fill(note) for note in notes]
    console.print(Text(_plain(table.title, ascii_only), style="bold"), soft_wrap=True)
    places = {column.key: place for place, column in enumerate(kept.columns)}
    for layout in layouts:
        part = kept.part([places[page.columns[place].key] for place in layout.places])
        drawn = _drawn(part, ascii_only, layout.heading, layout.names)
        console.width = max(console.width, _width(console, drawn))
        console.print(drawn)
    for note in notes:
        console.print(Text(note), soft_wrap=True)


class _Layout(NamedTuple):
    """Which columns of a table are drawn, and the widths at which headings and names are broken."""

    places: Sequence[int]
    heading: int = _HEADING
    names: int | None = None


def _layouts(page: Table, ascii_only: bool, console: Console | None) -> list[_Layout]:
    """The parts of a table; of several, narrower ones before one of them loses a column."""
    widths = range(MOST, page.leading, -1) if len(page.parts()) > 1 else [MOST]
    tried = []
    for most in widths:
        parts = page.parts(most)
        tried.append([_layout(page, places, ascii_only, console) for places in parts])
        if all(len(layout.places) == len(places) for layout, places in zip(tried[-1], parts, strict=True)):
            return tried[-1]
    return tried[0]


def _layout(table: Table, places: Sequence[int], ascii_only: bool, console: Console | None) -> _Layout:
    """As many of some columns as are no wider than the console; all of them where nobody knows its width."""
    layout = _Layout(places)

    def fits() -> bool:
        drawn = _drawn(table.part(layout.places), ascii_only, layout.heading, layout.names)
        return console is None or _width(console, drawn) <= console.width

    for names in (None, _NAME):
        while not fits():
            least = _least(table, layout.places, CORE if names is not None else MAIN)
            if layout.heading == _HEADING or layout.names != names:
                layout = layout._replace(heading=_NARROW_HEADING, names=names)
            elif least is not None:
                layout = layout._replace(places=[place for place in layout.places if place != least])
            else:
                break
    return layout


def _least(table: Table, places: Sequence[int], level: int) -> int | None:
    """The column to drop next: the last of the highest level, if that is at least `level`.

    Texts and the first number stay.
    """
    numbers = [place for place in places if not table.columns[place].text]
    found = [place for place in numbers[1:] if table.columns[place].level >= level]
    return max(found, key=lambda place: (table.columns[place].level, place), default=None)


def _width(console: Console, drawn: TerminalTable) -> int:
    return Measurement.get(console, console.options.update(width=100_000), drawn).maximum


def _drawn(table: Table, ascii_only: bool, heading: int = _HEADING, names: int | None = None) -> TerminalTable:
    """The table for the terminal.

    Args:
        table: the table.
        ascii_only: whether the terminal knows no other characters.
        heading: the width at which a heading is broken.
        names: the width at which a text is broken; None: nowhere.
    """
    style = box.ASCII2 if ascii_only else box.SIMPLE_HEAD
    gap = (0, 1) if heading == _HEADING else (0, 1, 0, 0)
    drawn = TerminalTable(box=style, padding=gap, pad_edge=False)
    headings = [_broken_heading(column, _plain(column.title, ascii_only), heading, names) for column in table.columns]
    for column, lines in zip(table.columns, headings, strict=True):
        above = [""] * (max(map(len, headings)) - len(lines))
        justify: Literal["left", "right"] = "left" if column.text else "right"
        drawn.add_column(Text("\n".join(above + lines)), justify=justify, no_wrap=True)
    digits = [decimals(table, place) for place in range(len(table.columns))]
    for number, row in enumerate(table.rows):
        if number in table.sections:
            drawn.add_section()
        cells = []
        for cell, column, places in zip(row, table.columns, digits, strict=True):
            text = written(cell.value, column, places) + (f" [{','.join(cell.marks)}]" if cell.marks else "")
            text = _plain(text, ascii_only)
            cells.append(Text("\n".join(_broken(text, names)) if column.text else text))
        drawn.add_row(*cells)
    return drawn


def _broken_heading(column: Column, title: str, width: int, names: int | None) -> list[str]:
    """The lines of a heading: its title, its unit and its footnotes."""
    if column.text:
        lines = [title] if names is None else title.replace(".", ".\n").split("\n")
    else:
        lines = textwrap.wrap(title, width, break_long_words=False)
    lines += [column.unit] if column.unit else []
    marks = f"[{','.join(column.marks)}]" if column.marks else ""
    if marks and width < _HEADING and len(f"{lines[-1]} {marks}") > width:
        lines.append(marks)
    elif marks:
        lines[-1] += f" {marks}"
    return lines


def _broken(text: str, width: int | None) -> list[str]:
    return [text] if width is None else textwrap.wrap(text, width) or [text]


def _plain(text: str, ascii_only: bool) -> str:
    text = printable(text)
    return text.replace("±", "+/-").encode("ascii", "replace").decode("ascii") if ascii_only else text
