"""The table of rows by runtime: what a stage brings in each, so that its gain is not taken for a runtime's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgemin.report import measures as m
from edgemin.report.entries import Entry, entries
from edgemin.report.fold import Line, Study
from edgemin.report.footnotes import cell_notes, column_notes, same_graph_notes, study_notes
from edgemin.report.gate import gate_notes
from edgemin.report.grid import CORE, FULL, MAIN, Cell, Column, Footnotes, Table
from edgemin.report.measures import Measure

_TITLE = "Every row in every runtime"
_HOW = (
    "all variants were timed in turns, in one measurement; answers are compared and scored on all sentences of the "
    "split; speed-ups are against the teacher in the same runtime"
)


def table(study: Study) -> Table | None:
    """A line for each row and runtime; `None` where there is no runtime but torch."""
    lines = [(entry, runtime) for entry in entries(study) for runtime in _runtimes(entry)]
    if all(runtime == m.TORCH for _, runtime in lines):
        return None
    measures = [measure for measure in _measures(study) if any(_value(measure, *line) is not None for line in lines)]
    footnotes, every = Footnotes(), [entry for entry, _ in lines]
    named = list(dict.fromkeys(runtime for _, runtime in lines))
    leading = [Column(key, key, level=CORE, text=True) for key in study.keys]
    leading += [Column("name", "Model", level=CORE, text=True), Column("runtime", "Runtime", level=CORE, text=True)]
    columns = []
    for measure in measures:
        notes = [note for name in named for note in column_notes(m.in_runtime(measure, name), study, every)]
        columns.append(replace(measure.column, marks=footnotes.mark([*dict.fromkeys(notes)])))
    rows = []
    for entry, runtime in lines:
        cells = [_cell(measure, entry, runtime, footnotes) for measure in measures]
        title = Cell(entry.name, footnotes.mark(_row_notes(entry)))
        rows.append((*map(Cell, entry.labels), title, Cell(runtime), *cells))
    own = {name: [m.in_runtime(measure, name) for measure in measures] for name in named}
    for name in named:  # each has noise of its own
        footnotes.general += [f"in {name}, {note}" for note in same_graph_notes(own[name], entries(study))]
    footnotes.general += [_HOW, *study_notes([measure for name in named for measure in own[name]], study, every)]
    sections = tuple(number for number in range(1, len(lines)) if lines[number][0] is not lines[number - 1][0])
    columns = [*leading, *columns]
    return Table("runtimes", _TITLE, tuple(columns), tuple(rows), sections, footnotes.listed())


def _runtimes(entry: Entry) -> list[str]:
    return list(dict.fromkeys(name for row in _line(entry).rows for name in row.cost.runtimes))


def _line(entry: Entry) -> Line:
    line = entry.line(None)
    assert line is not None, "an entry has a line"
    return line


def _row_notes(entry: Entry) -> list[str]:
    line = _line(entry)
    notes = dict.fromkeys(note for row in line.rows for note in row.notes)
    return [*notes, *gate_notes(line.first_of_each_seed, name_task=False)]


def _measures(study: Study) -> Sequence[Measure]:
    """Whatever runtime they name is replaced by that of each line."""
    return [
        *m.primary_metrics(study),
        m.SIZE,
        m.latency("padded", "p50", CORE),
        m.speed_up("padded", "teacher", CORE),
        m.AGREEMENT,
        m.latency("task", "p50", MAIN),
        m.LARGEST_DIFFERENCE,
        *m.full([m.latency("padded", name, FULL) for name in ("p10", "p90", "mean", "n")]),
        *m.full([m.speed_up("task", "teacher", FULL), m.ratio("compression", "teacher", FULL)]),
        *m.full([m.throughput("padded", FULL), m.throughput("task", FULL), m.PEAK_MEMORY, m.ENERGY, *m.DETAILS]),
    ]


def _value(measure: Measure, entry: Entry, runtime: str) -> object:
    return m.in_runtime(measure, runtime).fold(_line(entry))


def _cell(measure: Measure, entry: Entry, runtime: str, footnotes: Footnotes) -> Cell:
    own, line = m.in_runtime(measure, runtime), _line(entry)
    value = own.fold(line)
    return Cell(value, footnotes.mark(cell_notes(own, line, value)))
