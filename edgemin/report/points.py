"""The points of a figure: rows with their coordinates, their names, and what they were made from."""

from __future__ import annotations

from dataclasses import dataclass, replace

from edgemin.report import measures as m
from edgemin.report.fold import TASK, Group, Line, Statistic, Study
from edgemin.report.footnotes import BESIDE, SIMULATED, UNSTABLE, timing_notes
from edgemin.report.measure import Measure

_CAUTIONS = {UNSTABLE: "unstable timing", BESIDE: "beside other work", SIMULATED: "simulated"}
"""What a point's name says of its cost, by the footnote that a table would have."""


@dataclass(frozen=True)
class Point:
    """One named point.

    Args:
        name: the row's name, with the swept values that tell it from others of that name.
        x: the cost.
        y: the metric, a fraction.
        kind: `teacher`, `student` (any other model) or `control`.
        origin: number of the point it was made from, if that is in the figure.
    """

    name: str
    x: Statistic
    y: Statistic
    kind: str
    origin: int | None = None


@dataclass
class _Found:
    line: Line
    name: str
    groups: list[int]
    x: list[Statistic]
    y: Statistic


def points(study: Study, task: str, cost: Measure) -> list[Point]:
    """The points of one task's figure.

    Rows of several jobs that are one artifact are one point, its cost the mean over these jobs.

    Args:
        study: the jobs.
        task: whose jobs.
        cost: the horizontal axis.
    """
    groups = [group for group in study.groups if group.task == task]
    found: dict[object, _Found] = {}
    for number, group in enumerate(groups):
        for name, line in group.lines.items():
            x, y = cost.fold(line), m.own_metric(group.runs[0].task.metric or "accuracy").fold(line)
            if x is None or y is None:
                continue
            known = found.setdefault(_identity(number, name, line), _Found(line, name, [], [], y))
            known.groups.append(number)
            known.x.append(x)
    places = {(group, known.name): place for place, known in enumerate(found.values()) for group in known.groups}
    made = []
    for known in found.values():
        origin = places.get((known.groups[0], known.line.rows[0].made_from or ""))
        row = known.line.rows[0]
        x = replace(known.x[0], mean=sum(one.mean for one in known.x) / len(known.x))
        name = known.name + _suffix(study, groups, known) + _caution(known.line, cost)
        kind = "control" if row.control else "teacher" if row.model == "teacher" else "student"
        made.append(Point(name, x, known.y, kind, origin))
    return made


def _identity(number: int, name: str, line: Line) -> object:
    artifacts = tuple(row.artifact for row in line.rows)
    return (name, artifacts) if None not in artifacts else (name, number)


def _suffix(study: Study, groups: list[Group], known: _Found) -> str:
    """The swept values that all jobs of the point share and other jobs of the task do not."""
    parts = []
    for place, key in enumerate(study.keys):
        own = {groups[number].labels[place] for number in known.groups}
        if key != TASK and len(own) == 1 and len({group.labels[place] for group in groups}) > 1:
            parts.append(f"{key.rpartition('.')[2]}={own.pop()}")
    return f" ({', '.join(parts)})" if parts else ""


def _caution(line: Line, cost: Measure) -> str:
    notes = [note for run, row in zip(line.runs, line.rows, strict=True) for note in timing_notes(cost, run, row)]
    remarks = [remark for note, remark in _CAUTIONS.items() if note in notes]
    return f" ({', '.join(remarks)})" if remarks else ""
