"""What each stage contributed: every row less the row it was made from, in units and in per cent of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgemin.report import measures as m
from edgemin.report.entries import Entry
from edgemin.report.grid import CORE, FULL, Cell, Column, Table
from edgemin.report.measure import Measure

WHOLE = (
    "the whole: what the first row of the same model costs (the student baseline), so that the shares along a path of "
    "stages add up"
)


def _change(of: Measure, level: int) -> Measure:
    """The measure of how a cost changed against the row that each was made from."""
    column = replace(of.column, key=f"{of.column.key}_change", level=level)
    return replace(of, part="change", reference="parent", column=column)


def _share(of: Measure, level: int) -> Measure:
    """The measure of the same change in per cent of the whole."""
    column = Column(f"{of.column.key}_change_of_whole_fraction", f"{of.column.title}, of the whole", "%", 100.0, 1)
    column = replace(column, exact=of.column.exact, level=level)
    return replace(of, part="share", reference="parent", column=column, note=WHOLE)


_DIFFERENCE = m.difference("parent", CORE)
METRIC = replace(_DIFFERENCE, column=replace(_DIFFERENCE.column, title="Metric"))
"""The main metric less that of the row it was made from."""
_LATENCY = m.latency("padded", "p50", CORE)
_OWN_LENGTH = m.latency("task", "p50", CORE)
MEASURES = (
    METRIC,
    _change(_LATENCY, CORE),
    _share(_LATENCY, CORE),
    _change(m.SIZE, CORE),
    _share(m.SIZE, CORE),
    _change(m.PARAMS, CORE),
    _share(m.PARAMS, FULL),
    *(
        form(measure, FULL)
        for measure in (_OWN_LENGTH, m.FLOPS, m.MODEL_MEMORY, m.ENERGY)
        for form in (_change, _share)
    ),
)


def made_from(lines: Sequence[Entry]) -> list[tuple[Entry, str]]:
    """The rows that were made from another, each with the name of that one."""
    names = [
        next((row.made_from for line in one.lines.values() for row in line.rows if row.made_from), "") for one in lines
    ]
    return [(entry, name) for entry, name in zip(lines, names, strict=True) if name]


def with_parents(table: Table, names: Sequence[str]) -> Table:
    """The table with a column after the row's name that says what the row was made from."""
    place = table.leading
    column = Column("made_from", "Made from", level=CORE, text=True)
    rows = ((*row[:place], Cell(name), *row[place:]) for row, name in zip(table.rows, names, strict=True))
    return replace(table, columns=(*table.columns[:place], column, *table.columns[place:]), rows=tuple(rows))
