"""The table of rows by runtime: what a stage brings in each, so that its gain is not taken for a runtime's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgemin.report import measures as m
from edgemin.report.entries import Entry, entries
from edgemin.report.fold import Line, Study
from edgemin.report.footnotes import cell_notes, column_notes, row_notes, study_notes
from edgemin.report.gate import gate_notes
from edgemin.report.grid import CORE, FULL, MAIN, PAGE, Cell, Column, Footnotes, Table
from edgemin.report.measure import REFERENCE_TITLES, Measure
from edgemin.report.noise import Noise

_TITLE = "Every row in every runtime"
_HOW = (
    "all variants were timed in turns, in one measurement; answers are compared and scored on all sentences of the "
    "split; speed-ups are against the {} in the same runtime"
)


def table(study: Study) -> Table | None:
    """A line for each row and runtime; `None` where there is no runtime but torch."""
    lines = [(entry, runtime) for entry in entries(study) for runtime in runtimes_of(entry)]
    if all(runtime == m.TORCH for _, runtime in lines):
        return None
    reference = _reference(study)
    measures = [
        measure for measure in _measures(study, reference) if any(_value(measure, *line) is not None for line in lines)
    ]
    footnotes, every = Footnotes(), entries(study)
    noise = Noise(every)
    named = list(dict.fromkeys(runtime for _, runtime in lines))
    leading = [Column(key, key, level=CORE, text=True) for key in study.keys]
    leading += [Column("name", "Model", level=CORE, text=True), Column("runtime", "Runtime", level=CORE, text=True)]
    columns = []
    for measure in measures:
        notes = [note for name in named for note in column_notes(m.in_runtime(measure, name), study, every)]
        columns.append(replace(measure.column, marks=footnotes.mark([*dict.fromkeys(notes)])))
    rows = []
    for entry, runtime in lines:
        cells = [_cell(measure, entry, runtime, footnotes, noise) for measure in measures]
        title = Cell(entry.name, footnotes.mark(entry_notes(entry)))
        rows.append((*map(Cell, entry.labels), title, Cell(runtime), *cells))
    own = [m.in_runtime(measure, name) for name in named for measure in measures]
    footnotes.general += [*noise.notes(own), _HOW.format(REFERENCE_TITLES[reference]), *study_notes(own, study, every)]
    sections = tuple(number for number in range(1, len(lines)) if lines[number][0] is not lines[number - 1][0])
    columns = [*leading, *columns]
    return Table("runtimes", _TITLE, tuple(columns), tuple(rows), sections, footnotes.listed())


def runtimes_of(entry: Entry) -> list[str]:
    """The runtimes that a row has numbers of, in the order of the first job."""
    return list(dict.fromkeys(name for row in line_of(entry).rows for name in row.cost.runtimes))


def line_of(entry: Entry) -> Line:
    """The one line of an entry, which must be of a single task."""
    line = entry.line(None)
    assert line is not None, "an entry has a line"
    return line


def entry_notes(entry: Entry) -> list[str]:
    """The footnotes of a row's name."""
    line = line_of(entry)
    return [*row_notes(line.rows), *gate_notes(line.first_of_each_seed, name_task=False)]


def _reference(study: Study) -> str:
    """What speed-ups are formed against: the teacher or, in a study without one, the model that it begins with."""
    return "teacher" if any(row.model == "teacher" for run in study.runs for row in run.rows) else "student"


def _measures(study: Study, reference: str) -> Sequence[Measure]:
    """Whatever runtime they name is replaced by that of each line."""
    return [
        *m.primary_metrics(study),
        m.SIZE,
        m.latency("padded", "p50", CORE),
        m.speed_up("padded", reference, CORE),
        m.AGREEMENT,
        m.less(m.MODEL_MEMORY, MAIN, reference),
        m.less(m.ENERGY, PAGE, reference),
        m.latency("task", "p50", PAGE),
        replace(m.LARGEST_DIFFERENCE, column=replace(m.LARGEST_DIFFERENCE.column, level=PAGE)),
        *m.full([m.latency("padded", name, FULL) for name in ("p10", "p90", "mean", "n")]),
        *m.full([m.speed_up("task", reference, FULL), m.ratio("compression", reference, FULL)]),
        *m.full(
            [
                m.throughput("padded", FULL),
                m.throughput("task", FULL),
                m.PEAK_MEMORY,
                m.ENERGY,
                *m.DETAILS,
                *m.COLD_START,
            ]
        ),
        m.less(m.PEAK_MEMORY, FULL, reference),
        *m.speed_ups_over_rounds([reference]),
    ]


def _value(measure: Measure, entry: Entry, runtime: str) -> object:
    return m.in_runtime(measure, runtime).fold(line_of(entry))


def _cell(measure: Measure, entry: Entry, runtime: str, footnotes: Footnotes, noise: Noise) -> Cell:
    own, line = m.in_runtime(measure, runtime), line_of(entry)
    value = own.fold(line)
    return Cell(value, footnotes.mark(cell_notes(own, line, value, noise)))
