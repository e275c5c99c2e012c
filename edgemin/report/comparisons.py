"""Rows against the row they were made from, their control and the teacher: what of a difference is more than noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from edgemin.report import paired
from edgemin.report import statistics as st
from edgemin.report.controls import controlled
from edgemin.report.entries import Entry, entries
from edgemin.report.fields import Row
from edgemin.report.fold import Line, Study
from edgemin.report.paired import Estimate, Score
from edgemin.report.schema import Run

Role = Literal["parent", "control", "teacher", "declared"]
MARGIN = 0.01
"""Where neither the job nor the command says what counts as no difference."""
BETTER, WORSE, EQUIVALENT, UNDETECTED = "better", "worse", "equivalent", "no difference detected"
FEW_EXAMPLES, FEW_SEEDS = "too few examples to tell", "too few seeds to tell"


@dataclass(frozen=True)
class Comparison:
    """One row less another, in the primary metric on the first split.

    Args:
        labels: the values of the study's swept keys.
        row: the row's name.
        other: the name of the row it is compared with.
        role: what that one is to it: `parent`, `control`, `teacher`; `declared` where the order names the pair and it
            is none of these.
        metric: the metric's name.
        differences: row less other in each seed that has a model of its own, a fraction.
        estimate: their mean.
        low: the lower end of the 95 % interval.
        high: its upper end.
        p: of the test that there is no difference.
        corrected: the same by Holm's correction over the family: the pairs that the order declares, by default every
            row with its parent and its controls; None where this is none of them.
        p_equivalent: of the test that the difference is at least the margin.
        margin: differences below it count as none, a fraction.
        share: how much of the variance of the estimate comes from the examples, not from the seeds; 1 for one seed.
        examples: how many examples both answered.
        test: which test it was.
        verdict: `better` or `worse` by more than chance; else `equivalent` where it is shown to be less than the
            margin; else `too few examples to tell`, or `seeds`, where that could not be shown even of no difference at
            all; else `no difference detected`.
    """

    labels: tuple[str, ...]
    row: str
    other: str
    role: Role
    metric: str
    differences: tuple[float, ...]
    estimate: float
    low: float
    high: float
    p: float
    corrected: float | None
    p_equivalent: float
    margin: float
    share: float
    examples: int
    test: str
    verdict: str

    @property
    def is_noise(self) -> bool:
        """Whether the difference may be one of chance alone."""
        return self.verdict not in (BETTER, WORSE)


class _Pair(NamedTuple):
    entry: Entry
    other: str
    role: Role
    declared: bool
    line: Line
    against: Line
    score: Score


def margin_of(study: Study, margin: float | None = None) -> float:
    """The margin given, else the jobs' own.

    Raises:
        UserError: it is no fraction between 0 and 1.
    """
    if margin is None:
        asked = (run.chosen("evaluate", "margin") for run in study.runs)
        margin = next((one for one in asked if isinstance(one, int | float) and not isinstance(one, bool)), MARGIN)
    return st.check_margin(margin)


def comparisons(study: Study, margin: float | None = None) -> list[Comparison]:
    """Every row against its parent, its controls and the teacher, and the pairs that the order declares.

    Args:
        study: the jobs.
        margin: differences below it count as none; None: as the jobs' `evaluate.margin` says.

    Returns:
        Those of rows whose predictions are there, in the order of the rows.

    Raises:
        UserError: a margin that is none, or predictions that do not belong to the rows.
    """
    margin = margin_of(study, margin)
    known = [
        (pair, found)
        for pair in _pairs(study)
        if (found := paired.estimate([(1.0, pair.line), (-1.0, pair.against)], pair.score)) is not None
    ]
    family = iter(st.holm([found.p for pair, found in known if pair.declared]))
    return [_judged(pair, found, next(family) if pair.declared else None, margin) for pair, found in known]


def _pairs(study: Study) -> Iterator[_Pair]:
    """The pairs to compare, each once."""
    for entry in entries(study):
        for line in entry.lines.values():
            run = line.runs[0]
            if run.task.name is None or run.first_split is None or run.task.metric is None:
                continue
            score = Score(run.task.name, run.first_split, run.task.metric)
            asked = [one for own, row in zip(line.runs, line.rows, strict=True) for one in _others(own, row)]
            family = {other for _, other, belongs in asked if belongs}
            seen = {entry.name}
            for role, other, _ in asked:
                if other not in seen and (against := _named(line, other)) is not None:
                    yield _Pair(entry, other, role, other in family, line, against, score)
                seen.add(other)


def _others(run: Run, row: Row) -> list[tuple[Role, str, bool]]:
    """The rows that a job compares a row with, by name: what it was made from, its controls, the teacher, the declared.

    With each, whether the pair is one of the job's family.
    """
    parent, teacher = run.reference("parent", row), run.reference("teacher", row)
    controls = [one for one in run.rows if one.control and row.name in (other.name for other in controlled(run, one))]
    declared = [other for name, other in run.order.comparisons if name == row.name]
    found: list[tuple[Role, str]] = [("parent", parent.name)] if parent is not None else []
    found += [("control", one.name) for one in controls]
    found += [("teacher", teacher.name)] if teacher is not None and row.model != teacher.model else []
    found += [("declared", other) for other in declared]
    by_default = () if run.order.comparisons else ("parent", "control")
    return [(role, other, other in declared or role in by_default) for role, other in found]


def _named(line: Line, name: str) -> Line | None:
    """The rows of a name in those jobs of a line that have one; None where none has."""
    found = [(run, row) for run in line.runs for row in run.rows if row.name == name]
    return Line(tuple(run for run, _ in found), tuple(row for _, row in found)) if found else None


def _judged(pair: _Pair, found: Estimate, corrected: float | None, margin: float) -> Comparison:
    equivalent = found.p_equivalent(margin)
    return Comparison(
        pair.entry.labels,
        pair.entry.name,
        pair.other,
        pair.role,
        pair.score.metric,
        found.values,
        found.value,
        found.low,
        found.high,
        found.p,
        corrected,
        equivalent,
        margin,
        found.spread.share,
        found.examples,
        found.test,
        _verdict(found, found.p if corrected is None else corrected, equivalent, margin),
    )


def _verdict(found: Estimate, p: float, equivalent: float, margin: float) -> str:
    if p < st.CHANCE:
        return BETTER if found.value > 0 else WORSE
    if equivalent < st.CHANCE:
        return EQUIVALENT
    if found.spread.p_equivalent(0.0, margin) < st.CHANCE:
        return UNDETECTED
    return FEW_EXAMPLES if found.spread.of_examples.p_equivalent(0.0, margin) >= st.CHANCE else FEW_SEEDS
