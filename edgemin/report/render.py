"""Writes a table as Markdown, CSV, LaTeX, and on the terminal."""

from __future__ import annotations

import csv
import io
import re
import textwrap
from typing import TextIO

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as TerminalTable
from rich.text import Text

from edgemin.plain_text import printable
from edgemin.report.fold import Statistic
from edgemin.report.grid import MAIN, PAGE, Cell, Column, Table, decimals, written

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
_WIDE = 9
"""From this many columns on, a LaTeX table spans both columns and is scaled to the line."""
_HEADING = 11
"""A heading on the terminal is broken at about this many characters."""


def _heading(column: Column) -> str:
    return f"{column.title} ({column.unit})" if column.unit else column.title


def markdown(table: Table) -> str:
    """The table as GitHub-flavoured Markdown, title and footnotes included."""
    table = table.upto(PAGE)
    places = range(len(table.columns))
    digits = [decimals(table, place) for place in places]

    def cell(text: str, marks: tuple[str, ...]) -> str:
        return escape_markdown(text) + (f"<sup>{','.join(marks)}</sup>" if marks else "")

    lines = [f"**{escape_markdown(table.title)}**", ""]
    lines.append("| " + " | ".join(cell(_heading(column), column.marks) for column in table.columns) + " |")
    lines.append("|" + "|".join(" :--- " if column.text else " ---: " for column in table.columns) + "|")
    for row in table.rows:
        shown = [
            cell(written(row[place].value, table.columns[place], digits[place]), row[place].marks) for place in places
        ]
        lines.append("| " + " | ".join(shown) + " |")
    for mark, note in table.footnotes:
        lines += ["", (f"<sup>{mark}</sup> " if mark else "") + escape_markdown(note)]
    return "\n".join(lines) + "\n"


def escape_markdown(text: str) -> str:
    """Text that no Markdown reader takes for markup."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", printable(text))


def comma_separated(table: Table) -> str:
    """The table as CSV: every column, raw numbers in the unit that the column's name says.

    Where seeds are folded, a column holds the mean, and `<column>_sd` and `<column>_n` follow it.
    """
    folded = table.folded
    header: list[str] = []
    for column in table.columns:
        header.append(column.key)
        if folded and not column.text and column.key != "seeds":
            header += [f"{column.key}_sd", f"{column.key}_n"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in table.rows:
        values: list[str] = []
        for cell, column in zip(row, table.columns, strict=True):
            values.append(_raw(cell))
            if folded and not column.text and column.key != "seeds":
                known = cell.value if isinstance(cell.value, Statistic) else None
                values.append("" if known is None or known.sd is None else repr(known.sd))
                values.append("" if known is None else str(known.n))
        writer.writerow(values)
    return text.getvalue()


def _raw(cell: Cell) -> str:
    if cell.value is None:
        return ""
    if isinstance(cell.value, str):
        return cell.value
    mean = cell.value.mean
    return str(int(mean)) if mean.is_integer() and abs(mean) < 2**53 else repr(mean)


def latex(table: Table) -> str:
    """The table as a LaTeX float for the packages booktabs and graphicx, footnotes below it."""
    table = table.upto(PAGE)
    wide = len(table.columns) >= _WIDE
    places = range(len(table.columns))
    digits = [decimals(table, place) for place in places]

    def cell(text: str, marks: tuple[str, ...]) -> str:
        return escape_latex(text) + (rf"\textsuperscript{{{','.join(marks)}}}" if marks else "")

    def line(cells: list[str]) -> str:
        return "    " + " & ".join(cells) + r" \\"

    environment = "table*" if wide else "table"
    lines = [
        r"% needs \usepackage{booktabs,graphicx}",
        rf"\begin{{{environment}}}",
        r"  \centering",
        rf"  \caption{{{escape_latex(table.title)}}}",
        rf"  \label{{tab:{table.name.replace('_', '-')}}}",
    ]
    lines += [r"  \resizebox{\textwidth}{!}{%"] if wide else []
    lines.append(rf"  \begin{{tabular}}{{{''.join('l' if column.text else 'r' for column in table.columns)}}}")
    lines.append(r"    \toprule")
    headings = [escape_latex(part) for column in table.columns for part in [_heading(column)]]
    headings = [_stacked(column, heading) for column, heading in zip(table.columns, headings, strict=True)]
    lines.append(line(headings))
    lines.append(r"    \midrule")
    for number, row in enumerate(table.rows):
        if number in table.sections:
            lines.append(r"    \midrule")
        lines.append(
            line(
                [
                    cell(written(row[place].value, table.columns[place], digits[place]), row[place].marks)
                    for place in places
                ]
            )
        )
    lines += [r"    \bottomrule", r"  \end{tabular}" + ("}" if wide else "")]
    for mark, note in table.footnotes:
        sign = rf"\textsuperscript{{{mark}}} " if mark else ""
        lines += ["", rf"  \smallskip {{\footnotesize {sign}{escape_latex(note)}\par}}"]
    return "\n".join([*lines, rf"\end{{{environment}}}", ""])


def _stacked(column: Column, heading: str) -> str:
    marks = rf"\textsuperscript{{{','.join(column.marks)}}}" if column.marks else ""
    if column.text:
        return heading + marks
    parts = textwrap.wrap(heading, 14, break_long_words=False, break_on_hyphens=False)
    return rf"\shortstack[r]{{{(chr(92) * 2).join(parts)}{marks}}}" if len(parts) > 1 else heading + marks


def escape_latex(text: str) -> str:
    """Text that LaTeX prints as it stands."""
    return "".join(_LATEX.get(character, character) for character in text)


def terminal(table: Table, file: TextIO | None = None) -> None:
    """Prints the table so that no number is ever cut.

    A terminal that is too narrow gets fewer columns, and a line that names those left out; where the output
    is no terminal, the table takes the width it needs.
    """
    console = Console(file=file, highlight=False, markup=False, emoji=False)
    shown = table.upto(MAIN)
    dropped: list[str] = []
    if console.is_terminal:
        while _width(console, shown) > console.width and (place := _least(shown)) is not None:
            dropped.insert(0, shown.columns[place].title)
            shown = shown.only([number for number in range(len(shown.columns)) if number != place])
    console.width = max(console.width, _width(console, shown))
    ascii_only = "utf" not in console.encoding.lower()

    def show(what: Text | TerminalTable) -> None:
        console.print(what, soft_wrap=not isinstance(what, TerminalTable))

    show(Text(_plain(table.title, ascii_only), style="bold"))
    show(_drawn(shown, ascii_only))
    for mark, note in shown.footnotes:
        show(Text(_plain(f"[{mark}] {note}" if mark else note, ascii_only)))
    if dropped:
        show(Text(f"Left out for lack of width: {', '.join(dropped)}"))


def _least(table: Table) -> int | None:
    """The column to drop next: of the highest level the last one; the texts and the first number stay."""
    numbers = [place for place, column in enumerate(table.columns) if not column.text]
    if len(numbers) < 2:
        return None
    return max(numbers[1:], key=lambda place: (table.columns[place].level, place))


def _width(console: Console, table: Table) -> int:
    roomy = console.options.update(width=100_000)
    return Measurement.get(console, roomy, _drawn(table, ascii_only=True)).maximum


def _drawn(table: Table, ascii_only: bool) -> TerminalTable:
    drawn = TerminalTable(box=box.ASCII2 if ascii_only else box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for column in table.columns:
        lines = [column.title] if column.text else textwrap.wrap(column.title, _HEADING)
        lines += [column.unit] if column.unit else []
        lines[-1] += f" [{','.join(column.marks)}]" if column.marks else ""
        heading = Text("\n".join(_plain(line, ascii_only) for line in lines))
        drawn.add_column(heading, justify="left" if column.text else "right", no_wrap=True, vertical="bottom")
    digits = [decimals(table, place) for place in range(len(table.columns))]
    for number, row in enumerate(table.rows):
        if number in table.sections:
            drawn.add_section()
        cells = []
        for cell, column, places in zip(row, table.columns, digits, strict=True):
            text = written(cell.value, column, places) + (f" [{','.join(cell.marks)}]" if cell.marks else "")
            cells.append(Text(_plain(text, ascii_only)))
        drawn.add_row(*cells)
    return drawn


def _plain(text: str, ascii_only: bool) -> str:
    text = printable(text)
    return text.replace("±", "+/-").encode("ascii", "replace").decode("ascii") if ascii_only else text


FORMATS = {"md": markdown, "csv": comma_separated, "tex": latex}
"""The file formats by suffix."""
