"""Do stages help or hurt one another? What each does alone, or beside all the others, set beside what all do together.

A metric is compared by differences and a cost by ratios. Of `ablate=interaction` and `ablate=single` a stage's own
effect is that of the stage alone, of `ablate=leave_one_out` that of the stage beside all others:

    single: m_only - m_none, c_none / c_only         leave_one_out: m_all - m_without, c_without / c_all

Together the stages do m_all - m_none and c_none / c_all. The interaction is that less the sum of the stages' own
differences, and by the product of their own ratios: 0 and 1 say that what the stages do adds up (multiplies).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgemin.report import measures as m
from edgemin.report.entries import entries
from edgemin.report.fields import Ablation, Row
from edgemin.report.fold import Group, Line, Statistic, Study, statistic
from edgemin.report.footnotes import BESIDE, SIMULATED, UNSTABLE, timing_notes
from edgemin.report.grid import CORE, FULL, Cell, Column, Footnotes, Table, written
from edgemin.report.measure import Measure, with_interval
from edgemin.report.noise import Floor, Noise, within
from edgemin.report.schema import Run
from edgemin.report.titles import metric_word

_LEFT_OUT = "leave_one_out"
_KINDS = ("interaction", "single", _LEFT_OUT)
"""The names of `order.ablation` in run.json that have the rows for it."""

Numbers = tuple[float, ...]
"""A number of the row with none of the stages, of a row for each stage, and of the row with all."""


@dataclass(frozen=True)
class Question:
    """What was ablated in the jobs of a group.

    Args:
        kind: the name of the ablation.
        stages: the stages in question.
    """

    kind: str
    stages: tuple[str, ...]

    @property
    def is_left_out(self) -> bool:
        """Whether the row for a stage has all stages but this one; else it has this one alone."""
        return self.kind == _LEFT_OUT

    @property
    def effects(self) -> dict[str, Numbers]:
        """The rows of the table by their names: each stage's own, all together, the sum of the former, what is left.

        Each is a weighted sum of the numbers, of a cost the product of their powers: 1 less 0 is a ratio of 0 to 1.
        """
        none, *each, whole = np.eye(len(self.stages) + 2)
        together, two = whole - none, len(self.stages) == 2
        own = [whole - one if self.is_left_out else one - none for one in each]
        name = "{}, beside the others" if self.is_left_out else "Only {}"
        found = {name.format(stage): weights for stage, weights in zip(self.stages, own, strict=True)}
        found[("Both " if two else "All of ") + _listed(self.stages)] = together
        found[f"{'Both' if two else 'All'}, if they did not interact"] = np.sum(own, axis=0)
        found["Interaction"] = together - np.sum(own, axis=0)
        return {name: tuple(weights.tolist()) for name, weights in found.items()}


def question(run: Run) -> Question | None:
    """What a job asked of its stages; None where it asked nothing of the kind."""
    ablation: Ablation | None = run.order.ablation
    if ablation is None or ablation.name not in _KINDS or len(ablation.stages) < 2:
        return None
    return Question(ablation.name, tuple(ablation.stages))


def cells(run: Run) -> tuple[Row, ...] | None:
    """The rows of a job with none of the stages, with (or without) each and with all, found by their stages.

    None where it asked nothing, or one of them is missing.
    """
    asked = question(run)
    if asked is None:
        return None
    each = [{one} if asked.is_left_out else {*asked.stages} - {one} for one in asked.stages]
    found = []
    for without in ({*asked.stages}, *each, set[str]()):
        path = [stage for stage in run.order.stages if stage not in without]
        found.append(next((row for row in run.rows if row.model == "student" and row.stages == path), None))
    there = [row for row in found if row is not None]
    return tuple(there) if len(there) == len(found) else None


def table(study: Study) -> Table | None:
    """What the stages do by themselves and together, per metric, size and latency; None where no job asked."""
    groups = [(group, known) for group in study.groups if (known := _known(group))]
    if not groups:
        return None
    measures = _measures(study, [known for _, known in groups])
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
        asked = _asked(group)
        folded = [_fold(measure, known, asked) for measure in measures]
        for place, name in enumerate(asked.effects):
            numbers = [
                _cell(effects[place], noise.floor(measure), footnotes)
                for measure, effects in zip(measures, folded, strict=True)
            ]
            rows.append((*(Cell(label) for label in group.labels), Cell(name), *numbers))
    footnotes.general += [_HOW, *noise.notes(measures)]
    return Table("interaction", _TITLE, (*leading, *columns), tuple(rows), tuple(sections), footnotes.listed())


def sentences(study: Study) -> list[str]:
    """Whether what the stages do adds up, in one sentence per group of seeds, for below the stage table."""
    said, noise = [], Noise(entries(study))
    for group in study.groups:
        known = _known(group)
        if not known:
            continue
        asked = _asked(group)
        points: list[str] = []
        ratios: list[str] = []
        for measure in _measures(study, [known]):
            effects = [effect for effect in _fold(measure, known, asked) if effect is not None]
            if effects and measure.is_metric:
                points.append(_sum(measure, asked, effects))
            elif effects and measure.column.level == CORE:
                ratios.append(_words(measure, effects[-1], known, noise.floor(measure)))
        labels = ", ".join(f"{key}={label}" for key, label in zip(study.keys, group.labels, strict=True))
        all_of = "both" if len(asked.stages) == 2 else "all"
        parts = [*points]
        parts += [f"what {all_of} gain is, of the product of what each gains, {', '.join(ratios)}"] if ratios else []
        said.append(f"interaction of {_listed(asked.stages)}{f' ({labels})' if labels else ''}: {'; '.join(parts)}")
    return said


_TITLE = "What stages do by themselves and together"
_HOW = (
    "differences of a metric and ratios of costs; stages that do not interact have differences that add up "
    "(interaction 0) and ratios that multiply (interaction 1)"
)


def _listed(stages: Sequence[str]) -> str:
    return " and ".join(stages) if len(stages) == 2 else ", ".join(stages)


def _asked(group: Group) -> Question:
    return next(asked for run in group.runs if (asked := question(run)) is not None)


def _known(group: Group) -> list[tuple[Run, tuple[Row, ...]]]:
    return [(run, found) for run in group.runs if (found := cells(run)) is not None]


def _measures(study: Study, groups: Sequence[Sequence[tuple[Run, Sequence[Row]]]]) -> list[Measure]:
    """What is known of all rows in question: primary metrics, the size, and the latencies in each runtime.

    Those of torch, where a quantized model computes in float, are in the CSV alone if each group that has them was
    timed in another runtime too.
    """
    names = {name for run in study.runs for row in run.rows for name in row.cost.runtimes} - {m.TORCH}

    def timed(runtime: str, known: Sequence[tuple[Run, Sequence[Row]]]) -> bool:
        return any(_values(m.in_runtime(m.latency(form, "p50", CORE), runtime), known) for form in m.FORMS)

    served = all(any(timed(name, known) for name in names) for known in groups if timed(m.TORCH, known))
    found = [*m.primary_metrics(study), m.SIZE]
    for runtime in (m.TORCH, *sorted(names)):
        level = FULL if runtime == m.TORCH and served else CORE
        found += [m.in_runtime(m.latency(form, "p50", level), runtime) for form in m.FORMS]
    return [measure for measure in found if any(_values(measure, known) for known in groups)]


def _column(measure: Measure) -> Column:
    own = measure.column
    if measure.is_metric:
        unit = "pp" if own.unit == "%" else own.unit
        key = f"{own.key.removesuffix('_fraction')}_difference" + "_fraction" * own.key.endswith("_fraction")
        return replace(own, key=key, title=f"{own.title}, difference", unit=unit, level=CORE)
    if measure.form is None:
        return Column("compression_ratio", "Compression", "x", 1.0, 2, exact=True, level=CORE)
    key, title = f"speed_up_{measure.form}", f"Speed-up, {m.FORMS[measure.form]}"
    if measure.runtime != m.TORCH:
        key, title = f"{measure.runtime}_{key}", f"{title}, {measure.runtime}"
    return Column(key, title, "x", 1.0, 2, level=measure.column.level)


def _values(measure: Measure, known: Sequence[tuple[Run, Sequence[Row]]]) -> list[Numbers]:
    """The numbers of each seed that has them all."""
    found = []
    for run, rows in known:
        numbers = tuple(number for row in rows if (number := measure.read(run, row)) is not None)
        if len(numbers) == len(rows) and (measure.is_metric or min(numbers) > 0):
            found.append(numbers)
    return found


def _fold(measure: Measure, known: Sequence[tuple[Run, Sequence[Row]]], asked: Question) -> list[Statistic | None]:
    """Every effect, formed in each seed by itself and then folded; of a metric with the interval of its answers."""
    form = _weighted if measure.is_metric else _ratio
    seeds, runs = _values(measure, known), tuple(run for run, _ in known)
    lines = [Line(runs, rows) for rows in zip(*(rows for _, rows in known), strict=True)]
    effects = []
    for weights in asked.effects.values():
        # what is added first: a difference of two is then one of a pair
        terms = [(weight, line) for weight, line in zip(weights, lines, strict=True) if weight]
        terms.sort(key=lambda term: -term[0])
        value = statistic(form(weights, numbers) for numbers in seeds)
        effects.append(with_interval(value, terms, measure.score(runs[0])))
    return effects


def _weighted(weights: Numbers, numbers: Numbers) -> float:
    return math.fsum(map(operator.mul, weights, numbers))


def _ratio(weights: Numbers, numbers: Numbers) -> float:
    return math.prod(math.pow(number, -weight) for weight, number in zip(weights, numbers, strict=True))


def _cell(value: Statistic | None, floor: Floor | None, footnotes: Footnotes) -> Cell:
    return Cell(value, footnotes.mark(within(floor, value) if value is not None else []))


def _sum(measure: Measure, asked: Question, effects: Sequence[Statistic]) -> str:
    """Of a metric: what each stage does, their sum, what they do together, and whether the difference is noise."""
    factor = measure.column.factor

    def points(value: Statistic) -> str:
        return f"{'+' if value.mean > 0 else ''}{factor * value.mean:z.2f}"

    *own, together, summed, interaction = effects
    each = ", ".join(f"{stage} {points(value)}" for stage, value in zip(asked.stages, own, strict=True))
    where = "beside the others" if asked.is_left_out else "alone"
    said = (
        f"{metric_word(measure.name)} changes by {each} {where}: {points(summed)} in sum, {points(together)} together; "
        f"the difference is {points(interaction)} points"
    )
    low, high = interaction.low, interaction.high
    if low is None or high is None:
        return said
    alone = " for other seeds alone" if interaction.examples is None else ""
    noise = ", which may be chance alone" if low <= 0 <= high else ""
    return f"{said} (95 % interval{alone} {factor * low:z.2f} to {factor * high:z.2f}{noise})"


def _words(measure: Measure, value: Statistic, known: Sequence[tuple[Run, Sequence[Row]]], floor: Floor | None) -> str:
    """An interaction of costs, and what weakens it."""
    weak = _timing(measure, known)
    words = {UNSTABLE: "unstable", BESIDE: "beside other work", SIMULATED: "simulated"}
    caution = [word for note, word in words.items() if note in weak]
    caution += ["within the noise floor"] if within(floor, value) else []
    remark = f" ({', '.join(caution)})" if caution else ""
    column = _column(measure)
    return f"{written(value, column, 2)} x {column.title.lower()}{remark}"


def _timing(measure: Measure, known: Sequence[tuple[Run, Sequence[Row]]]) -> list[str]:
    """The footnotes that weaken a measure: timings that spread, or that say nothing about integer kernels."""
    return [note for run, rows in known for row in rows for note in timing_notes(measure, run, row)]


def _group_notes(group: Group, known: Sequence[tuple[Run, Sequence[Row]]]) -> list[str]:
    """Which row has none of the stages, and how many seeds lack one of the rows."""
    none = "neither stage" if len(_asked(group).stages) == 2 else "none of the stages"
    found = [f'{none}: the row "{known[0][1][0].name}"']
    if len(known) < len(group.runs):
        found.append(f"formed from the {len(known)} of {len(group.runs)} seeds that have all these rows")
    return found
