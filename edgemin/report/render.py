"""Writes a table as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections.abc import Sequence

from edgemin.plain_text import csv_cell, printable
from edgemin.report.fold import Statistic
from edgemin.report.grid import Cell, Column, Table, decimals, written

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
        lines += ["", f"<sup>{mark}</sup> {escape_markdown(note)}" if mark else markdown_paragraph(note)]
    return "\n".join(lines) + "\n"


def escape_markdown(text: str) -> str:
    """Text that no Markdown reader takes for markup."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", printable(text))


def markdown_paragraph(text: str) -> str:
    """The same at the beginning of a line or an item, where `+ `, `- `, `# ` or `1. ` begins an item or a heading."""
    return re.sub(r"^(#*|\d*)([-+#.)])(?=\s|$)", r"\1\\\2", escape_markdown(text))


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


FORMATS = {"md": markdown, "csv": comma_separated, "tex": latex}
"""The file formats by suffix."""
