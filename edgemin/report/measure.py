"""What a number of a row is: which field of run.json, in which runtime, against what, and how it is displayed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from edgemin.medians import around_median
from edgemin.report import paired
from edgemin.report.fields import Latencies, Latency, Row, Runtime
from edgemin.report.fold import Line, Statistic
from edgemin.report.grid import Column
from edgemin.report.paired import Score
from edgemin.report.schema import Run
from edgemin.report.scores import METRICS

REFERENCE_TITLES = {"teacher": "teacher", "student": "student baseline", "parent": "the row it was made from"}


def quantile(values: Sequence[float], tenths: int) -> float:
    """The number below which `tenths` tenths of the values lie."""
    return statistics.quantiles(values, n=10, method="inclusive")[tenths - 1] if len(values) > 1 else values[0]


def with_interval(
    found: Statistic | None, terms: Sequence[tuple[float, Line]], score: Score | None
) -> Statistic | None:
    """A sum of a metric over rows with the interval that follows from their predictions, where these are there."""
    known = paired.estimate(terms, score) if found is not None and score is not None else None
    if found is None or known is None:
        return found
    return replace(found, low=known.low, high=known.high, examples=known.examples)


@dataclass(frozen=True)
class Measure:
    """A number of a row: which one it is, and how it is displayed.

    Args:
        part: what part of a row holds it. Of a cost also `less`: as the share of the reference's that it saves;
            `change`: less the reference's; `share`: that as a share of what the first row of its model costs.
        name: its field there, such as `accuracy`, `size_bytes`, `latency_ms` or `speed_up`.
        column: how it is displayed.
        runtime: the runtime it was found in; None where it does not depend on one.
        form: of timings, what was timed: a key of `FORMS`, or `transfer`: another task's sentences as they are.
        statistic: of timings, `p50`, `mean`, `n` ...; of a speed-up, of the ratios over rounds `p10`, `p90`, or
            `low` and `high`, the ends of the interval that holds their median.
        reference: what a difference or a ratio is formed against: a key of `REFERENCE_TITLES`.
        task: the task of a metric (None: the job's own), or of `transfer`.
        split: the split of a metric; None: the job's first.
        transfer: whether it is a zero-shot score (None: both kinds).
        job_task: the task of the job it is read from, where tasks stand side by side.
        note: a footnote on the column.
    """

    part: Literal["metrics", "cost", "delta", "gate", "less", "change", "share"]
    name: str
    column: Column
    runtime: str | None = None
    form: str | None = None
    statistic: str | None = None
    reference: str | None = None
    task: str | None = None
    split: str | None = None
    transfer: bool | None = None
    job_task: str | None = None
    note: str = ""

    @property
    def is_metric(self) -> bool:
        """Whether it says how good the answers are."""
        return self.part == "metrics"

    @property
    def is_energy(self) -> bool:
        """Whether it rests on the counters of the processor, or an estimate of them."""
        return self.name in ("energy_mj", "power_w")

    @property
    def is_measured(self) -> bool:
        """Whether a clock or a meter was read for it: it then differs from one machine to the next."""
        return self.runtime is not None and not self.column.exact and not self.is_metric

    def read(self, run: Run, row: Row) -> float | None:
        """The number in one row; None where it is missing."""
        if self.transfer is not None and (self.task in row.transfer) != self.transfer:
            return None
        if self.is_metric:
            return row.score(self.task or run.task.name, self.split or run.first_split, self.name, self.runtime)
        if self.is_formed_here:
            return self._against(run, row)
        place: Any = getattr(row, self.part)
        if self.reference is not None:
            place = getattr(place, self.reference)
        if self.runtime is not None:
            place = place.runtimes.get(self.runtime)
        for name in (self.name, self.form, self.statistic):
            if name is not None and place is not None:
                place = place.of(name, self.task) if isinstance(place, Latencies) else getattr(place, name)
        return None if place is None else float(place)

    @property
    def is_formed_here(self) -> bool:
        """Whether run.json has no field for it, as it follows from the costs of several rows."""
        return self.part in ("less", "change", "share") or (self.name == "speed_up" and self.statistic is not None)

    def _against(self, run: Run, row: Row) -> float | None:
        """What follows from the costs of a row and its reference."""
        reference = run.reference(self.reference or "", row)
        if reference is None:
            return None
        if self.name == "speed_up":
            ratios = self.timing(reference).over(self.timing(row))
            if not ratios:
                return None
            inner = around_median(ratios)
            ends = {"p10": quantile(ratios, 1), "p90": quantile(ratios, 9), "low": inner[0], "high": inner[-1]}
            return ends[self.statistic or ""]
        whole = replace(self, part="cost", reference=None)
        own, theirs = whole.read(run, row), whole.read(run, reference)
        if own is None or theirs is None:
            return None
        if self.part == "change":
            return own - theirs
        of = theirs if self.part == "less" else whole.read(run, run.reference(row.model, row) or row)
        less = theirs - own if self.part == "less" else own - theirs
        return less / of if of is not None and of > 0 else None

    def cost(self, row: Row) -> Runtime:
        """What a row costs in the runtime of this measure."""
        return row.cost.runtimes.get(self.runtime or "", Runtime())

    def timing(self, row: Row) -> Latency:
        """The timings of a row that a latency, a throughput or a speed-up rests on."""
        timed = self.cost(row).latency_ms
        return Latency() if timed is None or self.form is None else timed.of(self.form, self.task)

    def fold(self, line: Line) -> Statistic | None:
        """The number over the seeds of a row, with its interval; None where it is missing.

        A row that several jobs share has no difference to a row that they do not share. A model that all seeds share is
        one: its metric counts once.
        """
        if self.reference is not None:
            for jobs in line.seeds.values():
                others = [run.reference(self.reference, row) for run, row in zip(jobs.runs, jobs.rows, strict=True)]
                if len({other.artifact if other is not None else None for other in others}) > 1:
                    return None
        found = (line.models if self.is_metric else line).fold(self.read)
        if found is not None and found.n == 1 and self.name == "speed_up" and self.statistic is None:
            return self._over_rounds(line, found)
        terms = [(1.0, line)]
        if self.reference is not None:
            against = paired.reference(line, self.reference)
            if against is None or against.rows == line.rows:
                return found
            terms.append((-1.0, against))
        return with_interval(found, terms, self.score(line.runs[0]))

    def _over_rounds(self, line: Line, found: Statistic) -> Statistic:
        """A single speed-up with the interval that holds the median of its rounds."""
        low, high = (replace(self, statistic=name).fold(line) for name in ("low", "high"))
        if low is None or high is None or low.mean == high.mean:
            return found
        return replace(found, low=low.mean, high=high.mean)

    def score(self, run: Run) -> Score | None:
        """The metric of predictions that it shows, or shows a difference of; None where it shows no metric."""
        is_difference = self.part == "delta" and self.name == "metric"
        task, split = self.task or run.task.name, self.split or run.first_split
        metric = self.name if self.is_metric else run.task.metric if is_difference else None
        if task is None or split is None or metric not in METRICS:
            return None
        return Score(task, split, metric, self.runtime)
