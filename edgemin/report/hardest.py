"""The examples that compression breaks most often: their row numbers, labels and lengths, and never their texts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from edgemin.report.answered import Answered, of_seeds
from edgemin.report.entries import entries
from edgemin.report.fold import Statistic, Study
from edgemin.report.grid import CORE, Cell, Column, Table
from edgemin.report.titles import split_title, task_title

MOST = 10
"""So many examples are listed for each task."""


class _Data(NamedTuple):
    """A split whose rows are numbered."""

    task: str
    split: str
    path: str | None
    subset: str | None

    @property
    def title(self) -> str:
        """The task and the split."""
        return f"{task_title(self.task)} {split_title(self.split)}"

    @property
    def full(self) -> str:
        """The same with the data, where several jobs read others."""
        return f"{self.title} of {', '.join(str(part) for part in (self.path, self.subset) if part)}"


@dataclass
class _Counts:
    """What was counted of a split, by the number of an example's row in the data set."""

    broken: Counter[int] = field(default_factory=Counter)
    right_before: Counter[int] = field(default_factory=Counter)
    labels: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    models: int = 0

    def add(self, own: Answered, parent: Answered, teacher: Answered, names: list[str]) -> None:
        """Counts one model beside its parent and its teacher."""
        self.models += 1
        examples, before = own.examples, parent.right & teacher.right
        self.right_before.update(examples.rows[before].tolist())
        self.broken.update((found := examples.rows[before & ~own.right]).tolist())
        for row in found.tolist():
            place = int(np.flatnonzero(examples.rows == row)[0])
            self.labels[row] = _label(own, place, names)
            self.tokens[row] = int(examples.tokens[place])

    @property
    def worst(self) -> list[int]:
        """The rows that most models broke; of equally many the larger share first, then the data's order."""
        order = sorted(self.broken, key=lambda row: (-self.broken[row], self.right_before[row], row))
        return order[:MOST]


def table(study: Study) -> Table | None:
    """The examples that most models get wrong although parent and teacher have them right; None if there is none."""
    counted: dict[_Data, _Counts] = {}
    for entry in entries(study):
        (line,) = entry.lines.values()
        run = line.runs[0]
        data = _Data(run.task.name or "", run.first_split or "", run.task.path, run.chosen("task", "subset"))
        for own, parent, teacher in of_seeds(line, "parent", "teacher"):
            counted.setdefault(data, _Counts()).add(own, parent, teacher, run.task.labels)
    titles = Counter(data.title for data in counted)
    found = {data.title if titles[data.title] == 1 else data.full: counts for data, counts in counted.items()}
    rows = [
        (
            Cell(split),
            Cell(str(row)),
            Cell(counts.labels[row]),
            *(Cell(Statistic(float(count), None, 1)) for count in (counts.tokens[row], counts.broken[row])),
            Cell(Statistic(float(counts.right_before[row]), None, 1)),
        )
        for split, counts in found.items()
        for row in counts.worst
    ]
    if not rows:
        return None
    columns = (
        Column("split", "Split", level=CORE, text=True),
        Column("row", "Row", level=CORE, text=True),
        Column("label", "Label", level=CORE, text=True),
        Column("tokens", "Tokens", "", 1.0, 0, level=CORE),
        Column("broken_models", "Broken by", "", 1.0, 0, level=CORE),
        Column("models_with_parent_and_teacher_right", "of", "", 1.0, 0, level=CORE),
    )
    models = ", ".join(f"{counts.models} models on {split}" for split, counts in found.items())
    notes = (
        f"of {models} (rows that were made from another, in every seed): how many get an example wrong, of those "
        "whose parent and teacher both have it right",
        "row: its number in the split as the data set has it, counted from 0",
    )
    names = [row[0].value for row in rows]
    sections = tuple(place for place in range(1, len(rows)) if names[place] != names[place - 1])
    title = "The examples that compression breaks most often"
    return Table("hardest", title, columns, tuple(rows), sections, tuple(("", note) for note in notes))


def _label(answered: Answered, place: int, names: list[str]) -> str:
    """The name of an example's label, or of all that it has."""
    label = answered.examples.labels[place]
    numbers = [int(label)] if answered.one_class else np.flatnonzero(label).tolist()
    return ", ".join(names[number] if number < len(names) else str(number) for number in numbers) or "none"
