"""`ablate=interaction`: whether two stages help or hurt one another, from the rows with neither, each and both.

A metric is compared by differences and a cost by ratios, both against the order with neither stage:

    I_metric = (m_both - m_one) - (m_other - m_neither)
    I_cost = (c_neither / c_both) / ((c_neither / c_one) * (c_neither / c_other))

0 and 1 say that what the stages do alone adds up (multiplies) to what they do together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from edgemin.report import measures as m
from edgemin.report.entries import entries
from edgemin.report.fields import Row
from edgemin.report.fold import Group, Statistic, Study, statistic
from edgemin.report.footnotes import BESIDE, SIMULATED, UNSTABLE, timing_notes
from edgemin.report.grid import CORE, Cell, Column, Footnotes, Table, written
from edgemin.report.measures import Measure
from edgemin.report.noise import Floor, Noise, within
from edgemin.report.schema import Run
from edgemin.report.titles import metric_word

ABLATION = "interaction"
"""The name of `order.ablation` in the run.json of a job that asked for it."""


class Cells(NamedTuple):
    """The four rows of one job."""

    neither: Row
    one: Row
    other: Row
    both: Row


@dataclass(frozen=True)
class _Effect:
    """A row of the table: how it follows from the four numbers, in the order of `Cells`, of a metric and of a cost."""

    name: str
    difference: Callable[[float, float, float, float], float]
    ratio: Callable[[float, float, float, float], float]


_INTERACTION = _Effect(
    "Interaction",
    lambda none, one, other, both: (both - one) - (other - none),
    lambda none, one, other, both: one * other / none / both,
)
_EFFECTS = (
    _Effect("Only {one}", lambda none, one, other, both: one - none, lambda none, one, other, both: none / one),
    _Effect("Only {other}", lambda none, one, other, both: other - none, lambda none, one, other, both: none / other),
    _Effect(
        "Both {one} and {other}",
        lambda none, one, other, both: both - none,
        lambda none, one, other, both: none / both,
    ),
    _Effect(
        "Both, if they did not interact",
        lambda none, one, other, both: (one - none) + (other - none),
        lambda none, one, other, both: (none / one) * (none / other),
    ),
    _INTERACTION,
)


def stages(run: Run) -> tuple[str, str] | None:
    """The two stages that a job crossed; None where it did not."""
    ablation = run.order.ablation
    if ablation is None or ablation.name != ABLATION or len(ablation.stages) != 2:
        return None
    return ablation.stages[0], ablation.stages[1]


def cells(run: Run) -> Cells | None:
    """The four rows of a job, found by their stages; None where it crossed nothing, or one is missing."""
    crossed = stages(run)
    if crossed is None:
        return None
    found = []
    for without in (crossed, crossed[1:], crossed[:1], ()):
        path = [stage for stage in run.order.stages if stage not in without]
        found.append(next((row for row in run.rows if row.model == "student" and row.stages == path), None))
    there = [row for row in found if row is not None]
    return Cells(*there) if len(there) == len(found) else None


def table(study: Study) -> Table | None:
    """What the two stages do alone and together, per metric, size and latency; None where no job crossed two."""
    groups = [(group, known) for group in study.groups if (known := _known(group))]
    if not groups:
        return None
    measures = [measure for measure in _measures(study) if any(_values(measure, known) for _, known in groups)]
    footnotes = Footnotes()
    leading = [Column(key, key, level=CORE, text=True) for key in study.keys]
    leading.append(Column("name", "Stages", level=CORE, text=True))
    columns = [_column(measure) for measure in measures]
    columns = [
        replace(column, marks=footnotes.mark(_timing(measure, [pair for _, known in groups for pair in known])))
        for column, measure in zip(columns, measures, strict=True)
    ]
    rows: list[tuple[Cell, ...]] = []
    sections = []
    noise = Noise(entries(study))
    for group, known in groups:
        sections += [len(rows)] if rows else []
        footnotes.general += [note for note in _group_notes(group, known) if note not in footnotes.general]
        one, other = _crossed(group)
        for effect in _EFFECTS:
            numbers = [_cell(measure, known, effect, noise, footnotes) for measure in measures]
            name = Cell(effect.name.format(one=one, other=other))
            rows.append((*(Cell(label) for label in group.labels), name, *numbers))
    footnotes.general += [_HOW, *noise.notes(measures)]
    return Table("interaction", _TITLE, (*leading, *columns), tuple(rows), tuple(sections), footnotes.listed())


def sentences(study: Study) -> list[str]:
    """The interaction in one sentence per group of seeds, for below the stage table."""
    said, noise = [], Noise(entries(study))
    for group in study.groups:
        known = _known(group)
        if not known:
            continue
        one, other = _crossed(group)
        points: list[str] = []
        ratios: list[str] = []
        for measure in _measures(study):
            value = _fold(measure, known, _INTERACTION)
            if value is not None:
                words = _words(measure, value, known, noise.floor(measure))
                (points if measure.is_metric else ratios).append(words)
        labels = ", ".join(f"{key}={label}" for key, label in zip(study.keys, group.labels, strict=True))
        parts = [f"(both - only {one}) - (only {other} - neither) is {', '.join(points)}"] if points else []
        parts += [f"what both gain is, of the product of what each gains, {', '.join(ratios)}"] if ratios else []
        said.append(f"interaction of {one} and {other}{f' ({labels})' if labels else ''}: {'; '.join(parts)}")
    return said


_TITLE = "What two stages do alone and together"
_HOW = (
    "all against the row with neither stage; if two stages do not interact, their differences of a metric add up "
    "(interaction 0) and their ratios of costs multiply (interaction 1)"
)


def _crossed(group: Group) -> tuple[str, str]:
    return next(crossed for run in group.runs if (crossed := stages(run)) is not None)


def _known(group: Group) -> list[tuple[Run, Cells]]:
    return [(run, found) for run in group.runs if (found := cells(run)) is not None]


def _measures(study: Study) -> list[Measure]:
    """Primary metrics, the size, and the latencies."""
    metrics = m.primary_metrics(study)
    return [*metrics, m.SIZE, *(m.latency(form, "p50", CORE) for form in m.FORMS)]


def _column(measure: Measure) -> Column:
    own = measure.column
    if measure.is_metric:
        unit = "pp" if own.unit == "%" else own.unit
        key = f"{own.key.removesuffix('_fraction')}_difference" + "_fraction" * own.key.endswith("_fraction")
        return replace(own, key=key, title=f"{own.title}, difference", unit=unit, level=CORE)
    if measure.form is None:
        return Column("compression_ratio", "Compression", "x", 1.0, 2, exact=True, level=CORE)
    return Column(f"speed_up_{measure.form}", f"Speed-up, {m.FORMS[measure.form]}", "x", 1.0, 2, level=CORE)


def _values(measure: Measure, known: Sequence[tuple[Run, Cells]]) -> list[tuple[float, float, float, float]]:
    """The four numbers of each seed that has them all."""
    found = []
    for run, rows in known:
        none, one, other, both = (measure.read(run, row) for row in rows)
        if none is not None and one is not None and other is not None and both is not None:
            found.append((none, one, other, both))
    return found if measure.is_metric else [four for four in found if min(four) > 0]


def _fold(measure: Measure, known: Sequence[tuple[Run, Cells]], effect: _Effect) -> Statistic | None:
    """An effect, formed in each seed by itself and then folded."""
    form = effect.difference if measure.is_metric else effect.ratio
    return statistic(form(*four) for four in _values(measure, known))


def _cell(
    measure: Measure, known: Sequence[tuple[Run, Cells]], effect: _Effect, noise: Noise, footnotes: Footnotes
) -> Cell:
    value = _fold(measure, known, effect)
    return Cell(value, footnotes.mark(within(noise.floor(measure), value) if value is not None else []))


def _words(measure: Measure, value: Statistic, known: Sequence[tuple[Run, Cells]], floor: Floor | None) -> str:
    column = _column(measure)
    if measure.is_metric:
        sign = "+" if value.mean > 0 else ""
        return f"{sign}{written(value, column, 2)} points of {metric_word(measure.name)}"
    weak = _timing(measure, known)
    words = {UNSTABLE: "unstable", BESIDE: "beside other work", SIMULATED: "simulated"}
    caution = [word for note, word in words.items() if note in weak]
    caution += ["within the noise floor"] if within(floor, value) else []
    remark = f" ({', '.join(caution)})" if caution else ""
    return f"{written(value, column, 2)} x {column.title.lower()}{remark}"


def _timing(measure: Measure, known: Sequence[tuple[Run, Cells]]) -> list[str]:
    """The footnotes that weaken a measure: timings that spread, or that say nothing about integer kernels."""
    return [note for run, rows in known for row in rows for note in timing_notes(measure, run, row)]


def _group_notes(group: Group, known: Sequence[tuple[Run, Cells]]) -> list[str]:
    """Which row has neither stage, and how many seeds lack one of the four."""
    found = [f'neither stage: the row "{known[0][1].neither.name}"']
    if len(known) < len(group.runs):
        found.append(f"formed from the {len(known)} of {len(group.runs)} seeds that have all four rows")
    return found
