"""What the numbers of a table do not say by themselves: estimates, noise, transfer, missing seeds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from edgemin.report.entries import ALL, Entry
from edgemin.report.fields import Row
from edgemin.report.fold import Line, Statistic, Study
from edgemin.report.measure import REFERENCE_TITLES, Measure
from edgemin.report.measures import TORCH
from edgemin.report.noise import Noise
from edgemin.report.schema import Run
from edgemin.report.titles import metric_title, split_title, task_title

UNSTABLE = "the spread of the timings is too wide to support a speed-up"
BESIDE = "measured beside other work on the machine, which was not free within measure.wait_minutes"
SIMULATED = (
    "simulated: torch computes the quantized layers in float with rounding, so this is no measure of integer kernels; "
    "the size is the file's"
)
OWN_LENGTH = "the task's own sentences, unpadded"

_PRECISIONS = {
    "bf16-mixed": "bf16 mixed with fp32",
    "16-mixed": "fp16 mixed with fp32",
    "32-true": "fp32",
}
_DEVICES = {"cpu": "CPU", "cuda": "GPU"}


# A whole or a decimal number that is a word or an item of a list; behind "layer" it is a name.
_NUMBER = re.compile(r"(?<![\w.,/-])(?<!layer )([+-]?\d+(?:\.\d+)?)(?![\w/-]|[.,]\d)")


def row_notes(rows: Iterable[Row]) -> list[str]:
    """What is said of a row in all its seeds; notes that differ in numbers alone are one, with the range of each."""
    found: dict[tuple[tuple[str, ...], int], list[list[str]]] = {}
    for row in rows:
        alike = Counter[tuple[str, ...]]()  # what one row says twice stays two notes
        for parts in map(_NUMBER.split, row.notes):
            text = tuple(parts[::2])
            alike[text] += 1
            found.setdefault((text, alike[text]), []).append(parts)
    return [*dict.fromkeys("".join(map(_range, zip(*notes, strict=True))) for notes in found.values())]


def _range(given: tuple[str, ...]) -> str:
    """A part of the same note in several rows: what all say, or the least and the largest number."""
    if len(set(given)) == 1 or len(set(map(float, given))) == 1:
        return given[0]
    return f"{min(given, key=float)} to {max(given, key=float)}"


def column_notes(measure: Measure, study: Study, lines: Sequence[Entry]) -> list[str]:
    """The footnotes of a column."""
    notes = [measure.note] if measure.note else []
    rows = [row for entry in lines if (line := entry.line(measure.job_task)) is not None for row in line.rows]
    if measure.is_energy:
        notes += _energy(measure, rows)
    if measure.form is not None:
        notes.append(_length(measure, rows))
    if measure.is_metric and measure.task is None:
        notes += _splits(study)
    return notes


def cell_notes(measure: Measure, line: Line, value: Statistic | None, noise: Noise) -> list[str]:
    """The footnotes of one number, or of its absence."""
    found = [withheld(measure, run, row) for run, row in zip(line.runs, line.rows, strict=True)]
    notes = [note for note in dict.fromkeys(found) if note]
    if value is None:
        return notes
    for run, row in zip(line.runs, line.rows, strict=True):
        notes += [note for note in timing_notes(measure, run, row) if note not in notes]
    notes += noise.doubts(measure, line, value)
    seeds = len((line.models if measure.is_metric else line).seeds)
    if value.n < seeds:
        notes.append(f"known for {value.n} of {seeds} seeds")
    return notes


def withheld(measure: Measure, run: Run, row: Row) -> str:
    """Why there is no share of a reference's metric; empty where there is one, or never could be."""
    if measure.reference is None or measure.name != "metric_retained" or measure.read(run, row) is not None:
        return ""
    title, reference = REFERENCE_TITLES[measure.reference], run.reference(measure.reference, row)
    if reference is None or run.task.metric is None:
        return ""
    if (run.first_split or "") in reference.collapsed.get(run.task.name or "", {}):
        return f"no share: the {title} gives one answer to every example"
    score = run.score(reference)
    none = score is not None and score <= 0
    return f"no share: {metric_title(run.task.metric)} of the {title} is not above 0" if none else ""


def timing_notes(measure: Measure, run: Run, row: Row) -> list[str]:
    """What one row's time, memory or energy does not say by itself."""
    if not measure.is_measured:
        return []
    notes = []
    reference = run.reference(measure.reference, row) if measure.reference is not None else None
    if any(measure.timing(one).unstable for one in (row, reference) if one is not None):
        notes.append(UNSTABLE)
    if measure.cost(row).measured_beside_other_work and (measure.form is not None or measure.is_energy):
        notes.append(BESIDE)
    if (measure.runtime or "").startswith(TORCH) and row.findings.quantization is not None:  # compiled or not
        notes.append(SIMULATED)
    return notes


def interval_notes(values: Iterable[Statistic | None]) -> list[str]:
    """What ± means below a table of these numbers."""
    bounded = [value for value in values if value is not None and value.half]
    examples = sorted({value.examples for value in bounded if value.examples is not None})
    said = []
    if examples:
        counted = " to ".join(str(count) for count in dict.fromkeys((examples[0], examples[-1])))
        seeds = any(value.n > 1 for value in bounded if value.examples is not None)
        others = f"other examples like these {counted}" + (" and other seeds" if seeds else "")
        said.append(f"of metrics for {others}")
    counts = sorted({value.n for value in bounded if value.examples is None and value.n > 1})
    if counts:
        seeds_alone = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
        said.append(f"{'of the rest ' if said else ''}for other seeds alone, by t over {seeds_alone} seeds")
    if any(value.examples is None and value.n == 1 for value in bounded):
        said.append("of speed-ups for the median over further rounds")
    return [f"± is half of the 95 % interval: {'; '.join(said)}"] if said else []


def study_notes(measures: Sequence[Measure], study: Study, lines: Sequence[Entry]) -> list[str]:
    """Notes on the whole table: shared rows, how it was trained, several machines, jobs left out."""
    notes = []
    if any(ALL in entry.labels for entry in lines):
        notes.append(
            f"{ALL}: one model for all these jobs, as the setting does not touch it; times are means over the jobs"
        )
    if any(measure.is_metric for measure in measures):
        notes += [*dict.fromkeys(said for run in study.runs if (said := _training(run)))]
    timed = any(measure.part == "cost" and measure.is_measured for measure in measures)
    processors = dict.fromkeys(run.host.cpu for run in study.runs if run.host.cpu)
    if timed and len(processors) > 1:
        notes.append(
            f"measured on different machines ({', '.join(processors)}): compare times, memory and energy "
            "only within a job"
        )
    if study.superseded:
        notes.append(f"{study.superseded} older job(s) with the same overrides and seed are left out")
    return notes


def _training(run: Run) -> str | None:
    """The precision and the number of threads that models were trained with, and what follows from them."""
    if run.device is None or run.precision is None:
        return None
    device, precision = _DEVICES.get(run.device, run.device), _PRECISIONS.get(run.precision, run.precision)
    said = f"trained on the {device} in {precision}"
    said += " (by trainer.precision=auto)" if run.chosen("trainer", "precision") == "auto" else ""
    if run.device != "cpu" or not run.threads:
        return said
    count = f"{' and '.join(map(str, run.threads))} thread{'' if run.threads == [1] else 's'}"
    return f"{said} with {count}; digits repeat at an equal number of threads"


def _energy(measure: Measure, rows: Sequence[Row]) -> list[str]:
    sources = {measure.cost(row).energy_source for row in rows}
    notes = ["an estimate: CPU time x a stated number of watts"] if "estimate" in sources else []
    return notes + (["read from the processor's RAPL counters"] if "rapl" in sources else [])


def _length(measure: Measure, rows: Sequence[Row]) -> str:
    found = {measure.timing(row).length for row in rows}
    lengths = sorted(length for length in found if length is not None)
    span = " to ".join(f"{length:.4g}" for length in dict.fromkeys((lengths[0], lengths[-1]))) if lengths else ""
    if measure.form == "padded":
        return f"batch 1, padded to {span} tokens" if span else "batch 1, padded"
    return f"batch 1, {OWN_LENGTH}" + (f", {span} tokens on average" if span else "")


def _splits(study: Study) -> list[str]:
    used = dict.fromkeys((run.task.name, run.first_split) for run in study.runs)
    where = [f"{task_title(task)} {split_title(split)}" for task, split in used if task and split]
    return [f"on {', '.join(where)}"] if where else []
