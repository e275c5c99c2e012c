"""Published figures beside ours: reads published.yaml and builds the comparison as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from edgemin.errors import UserError
from edgemin.report import measures as m
from edgemin.report.entries import Entry, entries
from edgemin.report.fields import Row
from edgemin.report.fold import Statistic, Study
from edgemin.report.footnotes import cell_notes
from edgemin.report.grid import CORE, FULL, Cell, Column, Footnotes, Table
from edgemin.report.measure import Measure
from edgemin.report.noise import Noise
from edgemin.report.schema import Run
from edgemin.report.titles import task_title


@dataclass(frozen=True)
class Figure:
    """A published number in the unit of its key, or the range in which it is promised to lie.

    Args:
        value: None where the publication has a placeholder.
        note: a footnote on it.
    """

    value: float | tuple[float, float] | None
    note: str = ""

    @property
    def shown(self) -> Statistic | str | None:
        """What stands in its cell."""
        if isinstance(self.value, tuple):
            return f"{self.value[0]:g} to {self.value[1]:g}"
        return None if self.value is None else Statistic(self.value, None, 1)

    def difference(self, ours: float) -> tuple[float, float] | None:
        """Ours less the published number or the nearer end of the range (0 within it); and what it was taken from."""
        if self.value is None:
            return None
        low, high = self.value if isinstance(self.value, tuple) else (self.value, self.value)
        near = min(max(ours, low), high)
        return ours - near, near


@dataclass(frozen=True)
class Published:
    """The published rows.

    Args:
        source: where they come from.
        rows: `{row name: {(measure, task or None): figure}}`.
        notes: what holds for all of them.
        runtimes: those of our runtimes whose latencies and speed-ups stand beside the published ones.
        document: the file's content, which all of this was read from.
    """

    source: str
    rows: Mapping[str, Mapping[tuple[str, str | None], Figure]]
    notes: tuple[str, ...] = ()
    runtimes: tuple[str, ...] = (m.TORCH,)
    document: Mapping[str, Any] = field(default_factory=dict)


def text(published: Published) -> str:
    """A published.yaml with the same content as the one that was read, without comments and further text."""
    return str(yaml.safe_dump(dict(published.document), sort_keys=False, allow_unicode=True, width=120))


_LARGEST = 1e300
_PADDED = "padded to one length, our sentences take the same time whichever task they are of"
_MEASURES: Mapping[str, tuple[bool, Measure]] = {
    "accuracy_percent": (True, m.own_metric("accuracy")),
    "f1_percent": (True, m.own_metric("f1")),
    "retained_percent": (True, m.retained("teacher", CORE)),
    "latency_ms": (True, m.latency("padded", "mean", CORE)),
    "speed_up_to_teacher": (True, m.speed_up("padded", "teacher", CORE)),
    "speed_up_to_student": (True, m.speed_up("padded", "student", CORE)),
    "params_visible_m": (False, m.VISIBLE),
    "params_m": (False, m.PARAMS),
    "size_mib": (False, m.SIZE),
    "compression_to_teacher": (False, m.ratio("compression", "teacher", CORE)),
    "compression_to_student": (False, m.ratio("compression", "student", CORE)),
    "flops_g": (False, m.FLOPS),
    "peak_memory_mib": (False, m.PEAK_MEMORY),
    "less_peak_memory_percent": (False, m.less(m.PEAK_MEMORY, CORE)),
    "less_model_memory_percent": (False, m.less(m.MODEL_MEMORY, CORE)),
    "power_w": (False, m.POWER),
    "less_power_percent": (False, m.less(m.POWER, CORE)),
    "less_energy_percent": (False, m.less(m.ENERGY, CORE)),
}
"""What published.yaml may hold: whether it is given per task, and our measure of it."""


def read(path: Path) -> Published:
    """Reads published.yaml.

    Its keys: `source` (a text), `notes` (a list of texts, optional), `runtimes` (in which of ours times, memory and
    energy stand beside the published ones; torch by default), and `rows`, where each row name holds measures.
    `accuracy_percent`, `f1_percent`, `retained_percent` (of the teacher's metric), `latency_ms` and
    `speed_up_to_<teacher or student>` hold a number per task. `params_visible_m`, `params_m`, `size_mib`,
    `compression_to_<teacher or student>`, `flops_g`, `peak_memory_mib`, `power_w` and
    `less_<peak_memory, model_memory, power or energy>_percent` (than the teacher's) hold a number. In its place may
    stand a range (`[95, 99]`), null (the publication has a placeholder), or `{value: ..., note: ...}`.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"published: expected a readable file, given {path} ({error.strerror})") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else "?"
        raise UserError(f"{path}: expected YAML, given line {line}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected YAML, given {' '.join(str(error).split())}") from None
    if not isinstance(data, dict) or not isinstance(data.get("rows"), dict):
        raise UserError(f"{path}: rows: expected an object of row names, given {type(data).__name__}")
    unknown = set(data) - {"source", "notes", "runtimes", "rows"}
    if unknown:
        given = ", ".join(sorted(map(str, unknown)))
        raise UserError(f"{path}: expected source, notes, runtimes and rows, given {given}")
    notes, runtimes = (_texts(path, data, key) for key in ("notes", "runtimes"))
    rows = {str(name): _row(path, str(name), row) for name, row in data["rows"].items()}
    return Published(str(data.get("source", path)), rows, notes, tuple(dict.fromkeys(runtimes)) or (m.TORCH,), data)


def _texts(path: Path, data: Mapping[str, Any], key: str) -> tuple[str, ...]:
    texts = data.get(key) or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{path}: {key}: expected a list of texts, given {texts!r}")
    return tuple(texts)


def _row(path: Path, name: str, row: Any) -> dict[tuple[str, str | None], Figure]:
    if not isinstance(row, dict):
        raise UserError(f"{path}: rows.{name}: expected an object of measures, given {row!r}")
    found: dict[tuple[str, str | None], Figure] = {}
    for key, given in row.items():
        if key not in _MEASURES:
            raise UserError(f"{path}: rows.{name}: expected one of {', '.join(_MEASURES)}, given {key!r}")
        where = f"{path}: rows.{name}.{key}"
        if not _MEASURES[key][0]:
            found[key, None] = _figure(where, given)
            continue
        if not isinstance(given, dict):
            raise UserError(f"{where}: expected an object of tasks, given {given!r}")
        found.update({(key, str(task)): _figure(f"{where}.{task}", one) for task, one in given.items()})
    return found


def _figure(where: str, given: Any) -> Figure:
    note = ""
    if isinstance(given, dict):
        if set(given) != {"value", "note"}:
            raise UserError(f"{where}: expected value and note, given {', '.join(map(str, given))}")
        given, note = given["value"], str(given["note"])
    if given is None:
        return Figure(None, note)
    if _is_number(given):
        return Figure(float(given), note)
    if isinstance(given, list) and len(given) == 2 and all(map(_is_number, given)) and given[0] < given[1]:
        return Figure((float(given[0]), float(given[1])), note)
    raise UserError(f"{where}: expected a number, a range (two numbers that rise) or null, given {repr(given)[:40]}")


def _is_number(given: Any) -> bool:
    """Whether it is a number, and no integer that no float holds."""
    return isinstance(given, int | float) and not isinstance(given, bool) and abs(given) < _LARGEST


def compare(study: Study, published: Published) -> Table | None:
    """The published figures beside ours, for every measure that both have.

    Differences are ours less the published figure, or less the nearer end of a published range (0 within it): in
    percentage points for what is given in percent, in percent of it for the rest.
    """
    lines = [entry for entry in entries(study) if entry.name in published.rows]
    keys = dict.fromkeys(key for row in published.rows.values() for key in row)
    footnotes = Footnotes(general=[f"published: {published.source}", *published.notes])
    blocks = [
        block
        for kind in _MEASURES
        for key in keys
        for measure in _ours_of(kind, published)
        if key[0] == kind and (block := _block(key, measure, lines, published))
    ]
    if not blocks:
        return None
    known = {
        name for entry in lines for line in entry.lines.values() for row in line.rows for name in row.cost.runtimes
    }
    missing = [name for name in published.runtimes if name not in known]
    footnotes.general += [f"not measured in {' and '.join(missing)}"] if missing else []
    ranges = any(isinstance(figure.value, tuple) for block in blocks for figure, _, _ in block.cells)
    padded = any(key[1] is not None and _MEASURES[key[0]][1].form == "padded" for key in keys)
    transfer = any(row.transfer for entry in lines for line in entry.lines.values() for row in line.rows)
    footnotes.general += [_PADDED] if padded and transfer else []
    footnotes.general += ["difference from a range: from its nearer end, 0 within it"] if ranges else []
    noise = Noise(entries(study))
    leading = [Column(key, key, level=CORE, text=True) for key in study.keys]
    columns = [*leading, Column("name", "Model", level=CORE, text=True)]
    columns += [column for block in blocks for column in block.columns]
    rows = []
    for number, entry in enumerate(lines):
        cells = [*(Cell(label) for label in entry.labels), Cell(entry.name)]
        for block in blocks:
            figure, ours, difference = block.cells[number]
            line = entry.line(None)
            notes = cell_notes(block.measure, line, ours, noise) if line is not None and ours is not None else []
            cells += [
                Cell(figure.shown, footnotes.mark([figure.note] if figure.note else [])),
                Cell(ours, footnotes.mark(notes)),
                Cell(difference),
            ]
        rows.append(tuple(cells))
    sections = tuple(n for n in range(1, len(lines)) if lines[n].labels != lines[n - 1].labels)
    title = "Published figures and ours"
    return Table("published", title, tuple(columns), tuple(rows), sections, footnotes.listed())


@dataclass(frozen=True)
class _Block:
    """Three columns of one measure: published, ours, the difference."""

    measure: Measure
    columns: tuple[Column, Column, Column]
    cells: list[tuple[Figure, Statistic | None, Statistic | None]]


def _ours_of(kind: str, published: Published) -> list[Measure]:
    """Our measures of a published one, in each runtime that was asked for; named where it is not torch alone.

    Latencies are set beside both of ours, as publications seldom say what they have timed.
    """
    measure = _MEASURES[kind][1]
    forms = [measure, m.latency("task", "mean", CORE)] if kind == "latency_ms" else [measure]
    if not measure.is_measured or published.runtimes == (m.TORCH,):
        return forms
    return [_named(m.in_runtime(form, name), name) for form in forms for name in published.runtimes]


def _named(measure: Measure, runtime: str) -> Measure:
    column = measure.column
    return replace(measure, column=replace(column, key=f"{column.key}_{runtime}", title=f"{column.title}, {runtime}"))


def _block(key: tuple[str, str | None], measure: Measure, lines: list[Entry], published: Published) -> _Block | None:
    kind, task = key
    cells = []
    for entry in lines:
        figure = published.rows[entry.name].get(key, Figure(None))
        line = entry.line(None)
        ours = _ours(measure, task, line.runs[0], line.rows[0]) if line is not None else None
        value = ours.fold(line) if line is not None and ours is not None else None
        cells.append((figure, value, _difference(figure, value, measure)))
    if not any(value is not None for _, value, _ in cells):
        return None
    raw = measure.column
    title = f"{task_title(task)} {raw.title}" if task else raw.title
    suffix = "_own_length" if measure.form == "task" else ""
    suffix += f"_{measure.runtime}" if measure.is_measured and published.runtimes != (m.TORCH,) else ""
    name = (f"{kind}_{task}" if task else kind) + suffix
    exact = raw.exact
    theirs = Column(f"{name}_published", f"{title}, published", raw.unit, 1.0, raw.digits, level=CORE, group=name)
    shown = replace(
        raw, key=raw.key if not task else f"{task}_{raw.key}", title=f"{title}, ours", level=CORE, group=name
    )
    unit = "pp" if _in_percent(measure) else "%"
    less = Column(f"{name}_difference_{unit.replace('%', 'percent')}", f"{title}, difference", unit)
    less = replace(less, exact=exact, level=CORE if any(cell[2] for cell in cells) else FULL, group=name)
    return _Block(measure, (theirs, shown, less), cells)


def _ours(measure: Measure, task: str | None, run: Run, row: Row) -> Measure | None:
    """Our measure: a metric on the task's first split that has it; a cost of the job's own task.

    Other tasks that it was scored on have timings on their own sentences; padded to one length, those of every task
    take the same time.
    """
    if measure.is_metric:
        splits = row.metrics.get(task or "", {})
        split = next((split for split, found in splits.items() if found.get(measure.name) is not None), None)
        return replace(measure, task=task, split=split) if split is not None else None
    if measure.form == "task" and task in row.transfer:
        return replace(measure, form="transfer", task=task)
    is_its = task in (None, run.task.name) or (measure.form == "padded" and task in row.transfer)
    return measure if is_its else None


def _in_percent(measure: Measure) -> bool:
    return measure.column.unit == "%"


def _difference(figure: Figure, ours: Statistic | None, measure: Measure) -> Statistic | None:
    if ours is None or (found := figure.difference(ours.mean * measure.column.factor)) is None:
        return None
    less, than = found
    if _in_percent(measure):
        return Statistic(less, None, ours.n)
    return Statistic(100 * less / than, None, ours.n) if than else None
