"""The rows of a sweep's tables: a row that several jobs share is one, and tasks can stand beside one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from edgemin.report.fields import Costs, Delta, Row
from edgemin.report.fold import TASK, Line, Study
from edgemin.report.schema import Run

ALL = "all"
"""The label of a row that a swept key does not touch."""
_OF_ITS_JOB = {"cost": Costs(), "delta": Delta(), "made_from": None, "predictions": None}
"""Defaults for the fields of a row that depend on its job and not on its artifact, so that rows can be compared."""
_MEASURED = "latency in "
"""Begins the note that sets what was measured beside what a pruning was asked for."""


@dataclass(frozen=True)
class Entry:
    """One row of a table.

    Args:
        labels: the values of the swept keys that the table shows.
        name: the row's name.
        lines: where its numbers come from: `{task: line}`, several tasks where they stand side by side.
    """

    labels: tuple[str, ...]
    name: str
    lines: Mapping[str | None, Line]

    def line(self, task: str | None) -> Line | None:
        """The line of one task; with None, the only one."""
        return next(iter(self.lines.values())) if task is None else self.lines.get(task)


@dataclass(frozen=True)
class _Shared:
    """A row and the groups of jobs, by their numbers, that all have it."""

    name: str
    line: Line
    groups: tuple[int, ...]


def entries(study: Study) -> list[Entry]:
    """One entry for every row, in the order of the jobs.

    A row that jobs of different groups share, because no key in which they differ touches it, is one entry, and comes
    before what only some of them have.
    """
    found: list[_Shared] = []
    for number, group in enumerate(study.groups):
        for name, line in group.lines.items():
            same = (place for place, one in enumerate(found) if one.name == name and _same(one.line, line))
            place = next(same, None)
            if place is None:
                found.append(_Shared(name, line, (number,)))
                continue
            known = found[place]
            both = Line((*known.line.runs, *line.runs), (*known.line.rows, *line.rows))
            found[place] = _Shared(name, both, (*known.groups, number))
    found.sort(key=lambda one: (one.groups[0], -len(one.groups)))
    return [Entry(_labels(study, one.groups), one.name, {study.groups[one.groups[0]].task: one.line}) for one in found]


def _same(one: Line, other: Line) -> bool:
    """Whether the seeds that both have are of the same artifacts, and found the same but for what was timed."""
    mine, theirs = one.seeds, other.seeds
    common = [seed for seed in mine if seed in theirs]
    return bool(common) and all(
        _found(mine[seed].runs[0], mine[seed].rows[0]) == _found(theirs[seed].runs[0], theirs[seed].rows[0])
        for seed in common
    )


def _found(run: Run, row: Row) -> object:
    """What must be equal for two rows to be one; unique where it is not known what was scored."""
    if row.artifact is None:
        return id(row)
    said = [note for note in row.notes if not note.startswith(_MEASURED)]
    own, cost = row.model_copy(update={**_OF_ITS_JOB, "notes": said}), row.cost
    counted = cost.params, cost.params_visible, cost.macs, cost.flops
    runtimes = {name: (one.size_bytes, one.threads, one.energy_source) for name, one in cost.runtimes.items()}
    is_measured = any(one.latency_ms is not None for one in cost.runtimes.values())
    return run.task.name, own, counted, runtimes, (run.host.cpu, run.chosen("measure")) if is_measured else None


def _labels(study: Study, groups: Sequence[int]) -> tuple[str, ...]:
    """For each swept key its value; where the groups differ in it `all`, or its values if there are others."""
    labels = []
    for place in range(len(study.keys)):
        own = dict.fromkeys(study.groups[number].labels[place] for number in groups)
        every = {group.labels[place] for group in study.groups}
        labels.append(next(iter(own)) if len(own) == 1 else ALL if len(own) == len(every) else ", ".join(own))
    return tuple(labels)


def side_by_side(study: Study) -> tuple[tuple[str, ...], list[Entry]]:
    """Entries with the tasks of a sweep beside one another.

    Rows of different tasks are one entry where their names and all their other swept values match.

    Returns:
        The swept keys without the task, and the entries.
    """
    if TASK not in study.keys:
        return study.keys, entries(study)
    place = study.keys.index(TASK)
    merged: dict[tuple[str, ...], dict[str, Entry]] = {}
    for entry in entries(study):
        labels = entry.labels[:place] + entry.labels[place + 1 :]
        rows = merged.setdefault(labels, {})
        known = rows.get(entry.name, Entry(labels, entry.name, {}))
        rows[entry.name] = replace(known, lines={**known.lines, **entry.lines})
    keys = study.keys[:place] + study.keys[place + 1 :]
    return keys, [entry for rows in merged.values() for entry in rows.values()]
