"""The table of batches: latency and throughput of every row in every runtime by batch size and length."""

from __future__ import annotations

from collections.abc import Sequence

from edgemin.report import measures as m
from edgemin.report.entries import Entry, entries
from edgemin.report.fields import Batch, Row, Runtime
from edgemin.report.fold import Statistic, Study
from edgemin.report.footnotes import BESIDE, SIMULATED, timing_notes
from edgemin.report.grid import CORE, FULL, Cell, Column, Footnotes, Table
from edgemin.report.runtimes import entry_notes, line_of, runtimes_of

_TITLE = "Batches: latency of one, and sentences per second"
_HOW = "all sentences of a batch are padded to the length above; latency is that of the whole batch"
_LATENCIES = ("p50", "p10", "p90")


def table(study: Study) -> Table | None:
    """A line for each row, runtime and batch size, with columns for each length; None where no grid was measured."""
    lines = [
        (entry, runtime, batch)
        for entry in entries(study)
        for runtime in runtimes_of(entry)
        for batch in sorted({one.batch for one in _grids(entry, runtime)})
    ]
    if not lines:
        return None
    lengths = sorted({one.length for entry, runtime, _ in lines for one in _grids(entry, runtime)})
    read = [(name, length, CORE) for name in ("p50", "sentences_per_s") for length in lengths]
    read += [(name, length, FULL) for length in lengths for name in ("p10", "p90", "n")]
    columns = [_column(*one) for one in read]
    footnotes = Footnotes(general=[_HOW])
    leading = [Column(key, key, level=CORE, text=True) for key in study.keys]
    leading += [
        Column(key, title, level=CORE, text=True)
        for key, title in (("name", "Model"), ("runtime", "Runtime"), ("batch", "Batch"))
    ]
    rows = []
    for entry, runtime, batch in lines:
        values = [Cell(_fold(entry, runtime, batch, length, name)) for name, length, _ in read]
        title = Cell(entry.name, footnotes.mark(entry_notes(entry)))
        where = Cell(runtime, footnotes.mark(_cautions(entry, runtime)))
        rows.append((*map(Cell, entry.labels), title, where, Cell(str(batch)), *values))
    sections = tuple(number for number in range(1, len(lines)) if lines[number][:2] != lines[number - 1][:2])
    return Table("grid", _TITLE, (*leading, *columns), tuple(rows), sections, footnotes.listed())


def _column(name: str, length: int, level: int) -> Column:
    if name == "n":
        return Column(f"length_{length}_timed_batches", f"Timed batches, {length} tokens", digits=0, level=level)
    if name in _LATENCIES:
        key, title = f"latency_length_{length}_{name}_ms", f"{name}, {length} tokens"
        return Column(key, title, "ms", 1.0, 2, True, level=level, group=name)
    key, title = f"throughput_length_{length}_sentences_per_s", f"Sentences, {length} tokens"
    return Column(key, title, "1/s", 1.0, 1, True, level=level, group=name)


def _cautions(entry: Entry, runtime: str) -> list[str]:
    """What holds of all times of a row in a runtime."""
    timed, line = m.in_runtime(m.throughput("padded", CORE), runtime), line_of(entry)
    notes = (note for run, row in zip(line.runs, line.rows, strict=True) for note in timing_notes(timed, run, row))
    return list(dict.fromkeys(note for note in notes if note in (BESIDE, SIMULATED)))


def _grids(entry: Entry, runtime: str) -> Sequence[Batch]:
    return [one for row in line_of(entry).rows for one in row.cost.runtimes.get(runtime, Runtime()).grid]


def _fold(entry: Entry, runtime: str, batch: int, length: int, name: str) -> Statistic | None:
    def read(run: object, row: Row) -> float | None:
        grid = row.cost.runtimes.get(runtime, Runtime()).grid
        found = (one for one in grid if (one.batch, one.length) == (batch, length))
        return getattr(next(found, None), name, None)

    return line_of(entry).fold(read)
