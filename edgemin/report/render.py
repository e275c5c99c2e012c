"""Writes a table as Markdown, CSV, LaTeX, and on the terminal."""

from __future__ import annotations

import csv
import io
import os
import re
import textwrap
from collections.abc import Sequence
from typing import Literal, NamedTuple, TextIO

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as TerminalTable
from rich.text import Text

from edgemin.plain_text import csv_cell, printable
from edgemin.report.fold import Statistic
from edgemin.report.grid import CORE, MAIN, MOST, Cell, Column, Table, decimals, written

_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "%": r"\%",
    "_": r"\_",
    "&": r"\&",
    "#": r"\#",
    "$": r"\$",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "\n": " ",
}
_WIDE = 7
"""From this many columns on, a LaTeX table spans both columns and is scaled to the line."""
_HEADING, _NARROW_HEADING = 11, 8
"""A heading on the terminal is broken at about so many characters, or at fewer where the width is wanted."""
_NAME = 18
"""A name on the terminal is broken at so many characters where not even the most important numbers fit beside it."""


def _heading(column: Column) -> str:
    return f"{column.title} ({column.unit})" if column.unit else column.title


def markdown(table: Table) -> str:
    """The table as GitHub-flavoured Markdown, title and footnotes included."""
    table = table.for_people()
    digits = [decimals(table, place) for place in range(len(table.columns))]

    def cell(text: str, marks: tuple[str, ...]) -> str:
        return escape_markdown(text) + (f"<sup>{','.join(marks)}</sup>" if marks else "")

    lines = [f"**{escape_markdown(table.title)}**"]
    for places in table.parts():
        columns = [table.columns[place] for place in places]
        lines += ["", "| " + " | ".join(cell(_heading(column), column.marks) for column in columns) + " |"]
        lines.append("|" + "|".join(" :--- " if column.text else " ---: " for column in columns) + "|")
        for row in table.rows:
            texts = (written(row[place].value, table.columns[place], digits[place]) for place in places)
            cells = [cell(text, row[place].marks) for text, place in zip(texts, places, strict=True)]
            lines.append("| " + " | ".join(cells) + " |")
    for mark, note in table.footnotes:
        lines += ["", (f"<sup>{mark}</sup> " if mark else "") + escape_markdown(note)]
    return "\n".join(lines) + "\n"


def escape_markdown(text: str) -> str:
    """Text that no Markdown reader takes for markup."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", printable(text))


def comma_separated(table: Table) -> str:
    """The table as CSV: every column but those for people alone, raw numbers in the unit that the column's name says.

    Where seeds are folded, a column holds the mean, and `<column>_sd` and `<column>_n` follow it; then the ends of its
    95 % interval, `<column>_low` and `<column>_high`, where any of its numbers has one.
    """
    table = table.only([place for place, column in enumerate(table.columns) if column.in_csv])
    folded = table.folded
    header: list[str] = []
    bounded = [table.bounded(place) for place in range(len(table.columns))]
    for column, has_ends in zip(table.columns, bounded, strict=True):
        name = csv_cell(column.key)
        header.append(name)
        if folded and not column.text:
            header += [f"{name}_sd", f"{name}_n"]
        header += [f"{name}_low", f"{name}_high"] if has_ends else []
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in table.rows:
        values: list[str] = []
        for cell, column, has_ends in zip(row, table.columns, bounded, strict=True):
            values.append(_raw(cell))
            known = cell.value if isinstance(cell.value, Statistic) else None
            if folded and not column.text:
                values += ["", ""] if known is None else [_number(known.sd), str(known.n)]
            if has_ends:
                values += ["", ""] if known is None else [_number(known.low), _number(known.high)]
        writer.writerow(values)
    return text.getvalue()


def _number(value: float | None) -> str:
    return "" if value is None else repr(value)


def _raw(cell: Cell) -> str:
    if cell.value is None:
        return ""
    if isinstance(cell.value, str):
        return csv_cell(cell.value)
    mean = cell.value.mean
    return str(int(mean)) if mean.is_integer() and abs(mean) < 2**53 else repr(mean)


def latex(table: Table) -> str:
    """The table as a LaTeX float for the packages booktabs and graphicx, footnotes below it."""
    table = table.for_people()
    parts = table.parts()
    wide = max(map(len, parts)) >= _WIDE
    environment = "table*" if wide else "table"
    lines = [
        r"% needs \usepackage{booktabs,graphicx}",
        rf"\begin{{{environment}}}",
        r"  \centering",
        rf"  \caption{{{escape_latex(table.title)}}}",
        rf"  \label{{tab:{table.name.replace('_', '-')}}}",
    ]
    for number, places in enumerate(parts):
        lines += ["", r"  \medskip"] if number else []
        tabular = _tabular(table, places)
        lines += [r"  \resizebox{\textwidth}{!}{%", *tabular[:-1], tabular[-1] + "}"] if wide else tabular
    for mark, note in table.footnotes:
        sign = rf"\textsuperscript{{{mark}}} " if mark else ""
        lines += ["", rf"  \smallskip {{\footnotesize {sign}{escape_latex(note)}\par}}"]
    return "\n".join([*lines, rf"\end{{{environment}}}", ""])


def _tabular(table: Table, places: Sequence[int]) -> list[str]:
    """Some columns of a table as a LaTeX tabular."""

    def cell(row: Sequence[Cell], place: int) -> str:
        marks = row[place].marks
        text = escape_latex(written(row[place].value, table.columns[place], decimals(table, place)))
        return text + (rf"\textsuperscript{{{','.join(marks)}}}" if marks else "")

    def line(cells: Sequence[str]) -> str:
        return "    " + " & ".join(cells) + r" \\"

    columns = [table.columns[place] for place in places]
    lines = [rf"  \begin{{tabular}}{{{''.join('l' if column.text else 'r' for column in columns)}}}", r"    \toprule"]
    lines += [line([_stacked(column, escape_latex(_heading(column))) for column in columns]), r"    \midrule"]
    for number, row in enumerate(table.rows):
        lines += [r"    \midrule"] if number in table.sections else []
        lines.append(line([cell(row, place) for place in places]))
    return [*lines, r"    \bottomrule", r"  \end{tabular}"]


def _stacked(column: Column, heading: str) -> str:
    marks = rf"\textsuperscript{{{','.join(column.marks)}}}" if column.marks else ""
    if column.text:
        return heading + marks
    parts = textwrap.wrap(heading, 14, break_long_words=False, break_on_hyphens=False)
    return rf"\shortstack[r]{{{(chr(92) * 2).join(parts)}{marks}}}" if len(parts) > 1 else heading + marks


def escape_latex(text: str) -> str:
    """Text that LaTeX prints as it stands."""
    return "".join(_LATEX.get(character, character) for character in printable(text))


def terminal(table: Table, file: TextIO | None = None) -> None:
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


FORMATS = {"md": markdown, "csv": comma_separated, "tex": latex}
"""The file formats by suffix."""
