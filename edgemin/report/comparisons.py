"""Rows against the row they were made from, their control and the teacher: what of a difference is more than noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgemin.report.fold import Study

Role = Literal["parent", "control", "teacher", "declared"]


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
        corrected: the same by Holm's correction over the declared comparisons; None where this is none of them.
        p_equivalent: of the test that the difference is at least the margin.
        margin: differences below it count as none, a fraction.
        share: how much of the variance of the estimate comes from the examples, not from the seeds; 1 for one seed.
        examples: how many examples both answered.
        test: which test it was.
        verdict: `better`, `worse`, `equivalent`, `no difference detected`, `too few examples to tell` or `too few seeds
            to tell`.
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
        return self.verdict not in ("better", "worse")


def comparisons(study: Study, margin: float | None = None) -> list[Comparison]:
    """Every row against its parent, its controls and the teacher, and the pairs that the order declares.

    Args:
        study: the jobs.
        margin: differences below it count as none; None: as the jobs' `evaluate.margin` says.
    """
    return []
