"""Brings the jobs of a sweep together: what was swept, and seeds folded into mean and standard deviation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from edgemin.report.fields import Row
from edgemin.report.schema import Run
from edgemin.report.statistics import seeds_alone

SEED = "seed"
TASK = "task"


@dataclass(frozen=True)
class Statistic:
    """A folded number.

    Args:
        mean: the mean.
        sd: the sample standard deviation (divisor n - 1); None for a single value.
        n: how many values.
        low: the lower end of the 95 % interval; None where none is known.
        high: its upper end.
        examples: how many examples the interval counts with; None where it is for other seeds alone.
    """

    mean: float
    sd: float | None
    n: int
    low: float | None = None
    high: float | None = None
    examples: int | None = None

    @property
    def half(self) -> float | None:
        """Half the width of the interval: what stands after ±."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def statistic(values: Iterable[float]) -> Statistic | None:
    """Mean, sample standard deviation and count, and of several values the t interval; None of nothing."""
    found = [float(value) for value in values]
    if not found:
        return None
    n = len(found)
    mean = found[0] if min(found) == max(found) else math.fsum(found) / n
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in found) / (n - 1)) if n > 1 else None
    if sd is None:
        return Statistic(mean, None, n)
    low, high = seeds_alone(found).around(mean) if sd else (mean, mean)
    return Statistic(mean, sd, n, low, high)


@dataclass(frozen=True)
class Line:
    """The rows of one name from jobs that differ only by seed, or by what does not touch the row.

    Args:
        runs: the jobs that have such a row.
        rows: the rows, one per job.
    """

    runs: tuple[Run, ...]
    rows: tuple[Row, ...]

    @property
    def seeds(self) -> Mapping[int, Line]:
        """The jobs of each seed."""
        found: dict[int, Line] = {}
        for run, row in zip(self.runs, self.rows, strict=True):
            known = found.get(run.seed, Line((), ()))
            found[run.seed] = Line((*known.runs, run), (*known.rows, row))
        return found

    @property
    def models(self) -> Line:
        """The same with one job per model: one that all seeds share is one model."""
        found: dict[object, tuple[Run, Row]] = {}
        for run, row in zip(self.runs, self.rows, strict=True):
            found.setdefault(row.artifact or id(row), (run, row))
        return Line(tuple(run for run, _ in found.values()), tuple(row for _, row in found.values()))

    @property
    def first_of_each_seed(self) -> Line:
        """The same with one job per seed."""
        lines = self.seeds.values()
        return Line(tuple(line.runs[0] for line in lines), tuple(line.rows[0] for line in lines))

    def fold(self, read: Callable[[Run, Row], float | None]) -> Statistic | None:
        """Folds what `read` finds in each seed; seeds where it finds nothing are left out.

        Where several jobs of a seed share the row, each has timed it: the seed's number is their mean.
        """
        means = []
        for line in self.seeds.values():
            values = (read(run, row) for run, row in zip(line.runs, line.rows, strict=True))
            if found := statistic(value for value in values if value is not None):
                means.append(found.mean)
        return statistic(means)

    def any(self, test: Callable[[Run, Row], bool]) -> bool:
        """Whether any of the rows passes."""
        return any(test(run, row) for run, row in zip(self.runs, self.rows, strict=True))


@dataclass(frozen=True)
class Group:
    """Jobs that differ only by seed.

    Args:
        labels: the values of the study's swept keys.
        runs: the jobs.
        lines: `{row name: its rows}` in the order of the first job.
    """

    labels: tuple[str, ...]
    runs: tuple[Run, ...]
    lines: Mapping[str, Line]

    @property
    def task(self) -> str | None:
        """The name of the task of these jobs."""
        return self.runs[0].task.name


@dataclass(frozen=True)
class Study:
    """The jobs of a sweep, or a single job.

    Args:
        keys: the overrides that differ between the jobs, the seed left out.
        groups: the jobs by the values of those keys.
        superseded: jobs left out because a newer one has the same overrides and seed.
    """

    keys: tuple[str, ...]
    groups: tuple[Group, ...]
    superseded: int = 0

    @property
    def runs(self) -> tuple[Run, ...]:
        """All jobs that count."""
        return tuple(run for group in self.groups for run in group.runs)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks of its jobs, each once."""
        return tuple(dict.fromkeys(group.task for group in self.groups if group.task))

    @property
    def folded(self) -> bool:
        """Whether any group holds more than one seed."""
        return any(len(group.runs) > 1 for group in self.groups)


def fold(runs: Sequence[Run]) -> Study:
    """Groups jobs by what was swept, and folds the seeds of each group by row name."""
    keys = _swept(runs)
    members: dict[tuple[str, ...], dict[int, Run]] = {}
    superseded = 0
    for run in runs:
        seeds = members.setdefault(tuple(run.setting(key) for key in keys), {})
        superseded += run.seed in seeds
        if run.seed not in seeds or run.when >= seeds[run.seed].when:
            seeds[run.seed] = run
    groups = tuple(_group(labels, tuple(seeds.values())) for labels, seeds in members.items())
    return Study(keys, groups, superseded)


def _swept(runs: Sequence[Run]) -> tuple[str, ...]:
    candidates = dict.fromkeys(["study", *(key for run in runs for key in run.overrides)])
    return tuple(key for key in candidates if key != SEED and len({run.setting(key) for run in runs}) > 1)


def _group(labels: tuple[str, ...], runs: tuple[Run, ...]) -> Group:
    lines: dict[str, Line] = {}
    for run in runs:
        for row in run.rows:
            line = lines.get(row.name, Line((), ()))
            lines[row.name] = Line((*line.runs, run), (*line.rows, row))
    return Group(labels, runs, lines)
