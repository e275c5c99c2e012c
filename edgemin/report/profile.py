"""The table of operators: what takes the time of an inference in torch, where it was profiled."""

from __future__ import annotations

from collections.abc import Sequence

from edgemin.report.entries import Entry, entries
from edgemin.report.fields import Operator, Profile, Row
from edgemin.report.fold import Statistic, Study
from edgemin.report.grid import CORE, MAIN, Cell, Column, Footnotes, Table
from edgemin.report.measures import MIB, TORCH
from edgemin.report.runtimes import line_of

_TITLE = "The costliest operators in torch"
_HOW = "by torch's profiler on the padded input, after all timing: it slows what it watches, so read shares, not times"
_COLUMNS = {
    "self_ms": Column("self_ms", "Own time", "ms", 1.0, 2, True, level=CORE),
    "share": Column("share_fraction", "Share of all", "%", 100.0, 1, level=CORE),
    "memory_bytes": Column("memory_bytes", "Memory", "MiB", MIB, 2, True, level=MAIN),
    "calls": Column("calls", "Calls", "", 1.0, 0, exact=True, level=MAIN),
}


def table(study: Study) -> Table | None:
    """A line for each row and operator, the costliest first; None where nothing was profiled."""
    lines = [(entry, name) for entry in entries(study) for name in _operators(entry)]
    if not lines:
        return None
    footnotes = Footnotes(general=[_HOW])
    leading = [Column(key, key, level=CORE, text=True) for key in study.keys]
    leading += [Column("name", "Model", level=CORE, text=True), Column("operator", "Operator", level=CORE, text=True)]
    rows = []
    for entry, name in lines:
        values = [Cell(_fold(entry, name, field)) for field in _COLUMNS]
        title = Cell(entry.name, footnotes.mark(_traces(entry)))
        rows.append((*map(Cell, entry.labels), title, Cell(name), *values))
    sections = tuple(number for number in range(1, len(lines)) if lines[number][0] is not lines[number - 1][0])
    return Table("profile", _TITLE, (*leading, *_COLUMNS.values()), tuple(rows), sections, footnotes.listed())


def _profile(row: Row) -> Profile:
    torch = row.cost.runtimes.get(TORCH)
    return (torch.profile if torch is not None else None) or Profile()


def _operators(entry: Entry) -> Sequence[str]:
    """Their names, in the order of the first job that has them."""
    return list(dict.fromkeys(one.name for row in line_of(entry).rows for one in _profile(row).operators))


def _traces(entry: Entry) -> list[str]:
    """Where all operators of a row are, beside its run.json."""
    traces = dict.fromkeys(trace for row in line_of(entry).rows if (trace := _profile(row).trace))
    return [f"all of them: {', '.join(traces)} beside run.json, for ui.perfetto.dev"] if traces else []


def _fold(entry: Entry, operator: str, field: str) -> Statistic | None:
    def read(run: object, row: Row) -> float | None:
        found: Operator | None = next((one for one in _profile(row).operators if one.name == operator), None)
        return None if found is None else getattr(found, field)

    return line_of(entry).fold(read)
