"""The stage table and the paper's four tables, built as data from the runs of a study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgemin.report import (
    batches,
    broken,
    comparisons_table,
    contributions,
    hardest,
    interaction,
    profile,
    runtimes,
    sensitivity,
)
from edgemin.report import measures as m
from edgemin.report.comparisons import Comparison
from edgemin.report.entries import Entry, entries, side_by_side
from edgemin.report.fold import Statistic, Study
from edgemin.report.footnotes import cell_notes, column_notes, interval_notes, row_notes, study_notes
from edgemin.report.gate import MEASURES as GATE
from edgemin.report.gate import gate_notes
from edgemin.report.grid import CORE, FULL, MAIN, PAGE, Cell, Column, Footnotes, Table
from edgemin.report.measure import Measure
from edgemin.report.noise import Noise
from edgemin.report.titles import metric_column, metric_title, split_title, task_title


def tables(study: Study, compared: Sequence[Comparison] = (), with_devices: Study | None = None) -> list[Table]:
    """All tables that the study has numbers for, the stage table first.

    Args:
        study: the jobs.
        compared: its comparisons.
        with_devices: the same with the rows that were measured on other devices too, for the tables of runtimes.
    """
    wider = with_devices or study
    built = (
        stage_table(study, compared),
        comparisons_table.table(study, compared),
        accuracy(study),
        latency(study),
        size(study),
        operations(study),
        contributed(study, compared),
        broken.table(study),
        hardest.table(study),
        runtimes.table(wider),
        batches.table(wider),
        profile.table(study),
        interaction.table(study),
        sensitivity.table(study),
    )
    return [explained(table) for table in built if table is not None]


def explained(table: Table) -> Table:
    """The table with a note on what ± means in it, if it has any."""
    shown = [place for place, column in enumerate(table.columns) if column.level <= PAGE and not column.exact]
    values = [value for row in table.rows for place in shown if isinstance(value := row[place].value, Statistic)]
    return replace(table, footnotes=(*table.footnotes, *(("", note) for note in interval_notes(values))))


def stage_table(study: Study, compared: Sequence[Comparison] = ()) -> Table | None:
    """Every row with its metrics, its costs, and both against the teacher and the student baseline.

    The columns stand in the order of what matters, as those on the right are the first that a page has no room for.
    """
    measures = [
        *m.primary_metrics(study),
        m.retained("teacher", CORE),
        m.SIZE,
        m.latency("padded", "p50", CORE),
        *m.other_splits(study),
        m.speed_up("padded", "teacher", MAIN),
        m.ratio("compression", "teacher", MAIN),
        m.PARAMS,
        m.FLOPS,
        *m.further_metrics(study),
        m.latency("task", "p50", MAIN),
        m.speed_up("padded", "student", MAIN),
        m.ratio("compression", "student", MAIN),
        m.retained("student", MAIN),
        m.VISIBLE,
        m.PEAK_MEMORY,
        m.ENERGY,
        m.less(m.MODEL_MEMORY, PAGE),
        m.less(m.ENERGY, PAGE),
        m.throughput("padded", PAGE),
        m.throughput("task", PAGE),
        *(m.speed_up("task", reference, PAGE) for reference in m.REFERENCES),
        *m.full([m.MACS, m.less(m.PEAK_MEMORY, FULL), *m.DETAILS, *m.COLD_START]),
        *m.speed_ups_over_rounds(),
    ]
    for reference in (*m.REFERENCES, "parent"):
        measures += [m.difference(reference, FULL), m.ratio("params", reference, FULL)]
        measures += [m.ratio("flops", reference, FULL)]
    title = "What each stage cost and bought"
    doubts = comparisons_table.noise_notes(compared)
    built = _table(
        "stages", title, study, study.keys, entries(study), [*m.served(measures, study), *GATE], doubts=doubts
    )
    below = tuple(("", sentence) for sentence in interaction.sentences(study))
    return replace(built, footnotes=built.footnotes + below) if built is not None else None


def accuracy(study: Study) -> Table | None:
    """Table I: tasks as columns, one row per path of stages."""
    keys, lines = side_by_side(study)
    found: dict[tuple[str, str, str, str | None], None] = {}
    for run in study.runs:
        for row in run.rows:
            for task, splits in row.metrics.items():
                source = run.task.name if task in row.transfer else None
                names = {(task, split, metric, source): None for split in splits for metric in splits[split]}
                found.update({name: None for name in names if name[2] not in ("loss", "n")})
    primary = {run.task.name: run.task.metric for run in study.runs}
    leading = sorted(found, key=lambda name: name[2] != primary.get(name[0], "accuracy"))
    measures = [_score(*name, primary, study) for name in leading]
    return _table("table1_accuracy", "Table I: task metrics", study, keys, lines, measures)


def _score(
    task: str,
    split: str,
    metric: str,
    source: str | None,
    primary: dict[str | None, str | None],
    study: Study,
) -> Measure:
    """The column of one metric; `source` is the task the models were trained for where that is another."""
    level = CORE if metric == primary.get(task, "accuracy") else MAIN
    title = f"{task_title(task)} {split_title(split)} {metric_title(metric)}".replace(" validation ", " ")
    key = f"{task}_{split}_{metric}" + (f"_zero_shot_from_{source}" if source else "")
    note = (
        f"zero-shot: the model trained on {task_title(source)} scored on {task_title(task)}, "
        "label spaces mapped by index"
        if source
        else ""
    )
    return Measure(
        "metrics",
        metric,
        metric_column(metric, key, title, level),
        task=task,
        split=split,
        transfer=source is not None,
        job_task=(source or task) if len(study.tasks) > 1 else None,
        note=note,
    )


def latency(study: Study) -> Table | None:
    """Table II: latency, and the speed-ups formed inside one measurement; tasks as columns."""
    keys, lines = side_by_side(study)
    tasks = study.tasks or ("",)
    several = len(tasks) > 1
    measures = []
    for task in tasks:
        for form in m.FORMS:
            level = CORE if form == "padded" else MAIN
            own = [
                m.latency(form, "p50", level),
                m.latency(form, "p90", PAGE),
                *(m.latency(form, name, FULL) for name in ("p10", "p95", "mean", "n")),
                *(m.speed_up(form, reference, level) for reference in m.REFERENCES),
                *(m.speed_up(form, reference, FULL, name) for reference in m.REFERENCES for name in ("p10", "p90")),
                m.throughput(form, PAGE),
            ]
            measures += [m.for_task(measure, task, several) for measure in own]
    scored = dict.fromkeys(
        (run.task.name or "", task) for run in study.runs for row in run.rows for task in row.transfer
    )
    for source, task in scored:
        levels = {"p50": MAIN, "p90": PAGE, "p10": FULL, "p95": FULL, "mean": FULL, "n": FULL}
        other = [m.of_other_task(task, statistic, level) for statistic, level in levels.items()]
        measures += [m.for_task(measure, source, several) for measure in other]
    return _table("table2_latency", "Table II: latency at batch 1", study, keys, lines, measures)


def size(study: Study) -> Table | None:
    """Table III: size on disk and both parameter counts."""
    measures = [
        replace(m.PARAMS, column=replace(m.PARAMS.column, level=CORE)),
        replace(m.VISIBLE, column=replace(m.VISIBLE.column, level=CORE)),
        m.SIZE,
        *(m.ratio("compression", reference, MAIN) for reference in m.REFERENCES),
        *(m.ratio("params", reference, MAIN) for reference in m.REFERENCES),
    ]
    return _table("table3_size", "Table III: size and parameters", study, study.keys, entries(study), measures)


def operations(study: Study) -> Table | None:
    """Table IV: floating-point operations and multiply-accumulates of one forward pass."""
    measures = [
        replace(m.FLOPS, column=replace(m.FLOPS.column, level=CORE), note=_OPERATIONS),
        replace(m.MACS, column=replace(m.MACS.column, level=CORE)),
        *(m.ratio("flops", reference, MAIN) for reference in m.REFERENCES),
    ]
    title = "Table IV: operations of one forward pass"
    return _table("table4_flops", title, study, study.keys, entries(study), measures)


def contributed(study: Study, compared: Sequence[Comparison] = ()) -> Table | None:
    """What each stage contributed, in points, milliseconds, MiB and parameters, and in per cent of the whole."""
    every = entries(study)
    known = contributions.made_from(every)
    lines, names = [entry for entry, _ in known], [name for _, name in known]
    title = "What each stage contributed: a row less the row it was made from"
    doubts, noise = comparisons_table.noise_notes(compared), Noise(every)
    built = _table("contributions", title, study, study.keys, lines, contributions.MEASURES, noise, doubts)
    return contributions.with_parents(built, names) if built is not None else None


_OPERATIONS = (
    "by formula from the structure, length 128, batch 1; FLOPs = 2 MACs, "
    "integer operations of a quantized model counted alike"
)


def _table(
    name: str,
    title: str,
    study: Study,
    keys: Sequence[str],
    lines: Sequence[Entry],
    measures: Sequence[Measure],
    noise: Noise | None = None,
    doubts: comparisons_table.Doubts = comparisons_table.NO_DOUBTS,
) -> Table | None:
    """Builds a table of the measures that any line has; None where no line has any.

    The noise is that of these lines unless given; `doubts` are footnotes of the primary metric by labels and name.
    """
    folds = {
        (number, measure.column.key): measure.fold(line)
        for number, entry in enumerate(lines)
        for measure in measures
        if (line := entry.line(measure.job_task)) is not None
    }
    noise = noise or Noise(lines)
    notes = {
        (number, measure.column.key): cell_notes(measure, line, folds[number, measure.column.key], noise)
        for number, entry in enumerate(lines)
        for measure in measures
        if (line := entry.line(measure.job_task)) is not None
    }
    present = {place[1] for place, value in folds.items() if value is not None or notes[place]}
    shown = [measure for measure in measures if measure.column.key in present]
    if not shown:
        return None
    footnotes = Footnotes()
    leading = [Column(key, key, level=CORE, text=True) for key in keys]
    leading.append(Column("name", "Model", level=CORE, text=True))
    counts = {len(line.seeds) for entry in lines for line in entry.lines.values()}
    if study.folded:
        leading.append(Column("seeds", "Seeds", level=CORE if len(counts) > 1 else FULL, text=True))
    columns = [replace(measure.column, marks=footnotes.mark(column_notes(measure, study, lines))) for measure in shown]
    doubted = [*m.primary_metrics(study), contributions.METRIC]
    rows = []
    for number, entry in enumerate(lines):
        cells = _leading(entry, study, footnotes)
        for measure in shown:
            place = (number, measure.column.key)
            doubt = (
                [doubts[entry.labels, entry.name]]
                if measure in doubted and (entry.labels, entry.name) in doubts
                else []
            )
            cells.append(Cell(folds.get(place), footnotes.mark(notes.get(place, []) + doubt)))
        rows.append(tuple(cells))
    footnotes.general += noise.notes(shown) + study_notes(shown, study, lines)
    sections = tuple(number for number in range(1, len(lines)) if lines[number].labels != lines[number - 1].labels)
    return Table(name, title, (*leading, *columns), tuple(rows), sections, footnotes.listed())


def _leading(entry: Entry, study: Study, footnotes: Footnotes) -> list[Cell]:
    """The cells before the numbers: the swept values, the row's name with its notes, the number of seeds."""
    notes = [*dict.fromkeys(note for line in entry.lines.values() for note in row_notes(line.rows))]
    several = len(entry.lines) > 1
    notes += [note for line in entry.lines.values() for note in gate_notes(line.first_of_each_seed, name_task=several)]
    if any(len(line.seeds) > len(line.models.rows) == 1 for line in entry.lines.values()):
        notes.append("one model for all seeds")
    cells = [Cell(label) for label in entry.labels]
    cells.append(Cell(entry.name, footnotes.mark(notes)))
    if study.folded:
        counts = [len(line.seeds) for line in entry.lines.values()]
        text = str(min(counts)) if min(counts) == max(counts) else f"{min(counts)}-{max(counts)}"
        cells.append(Cell(text))
    return cells
