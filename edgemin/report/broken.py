"""What compression broke beside the mean: answers that changed, confidence that is not deserved, kinds of examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgemin.report.answered import BINS, Answered, calibration_error, of_seeds
from edgemin.report.entries import Entry, entries
from edgemin.report.fold import Statistic, Study, statistic
from edgemin.report.grid import CORE, FULL, Cell, Column, Footnotes, Table
from edgemin.report.statistics import CHANCE, Spread, holm, mcnemar_mid_p, over_seeds, shared_by_seeds
from edgemin.report.stored import Examples

FEWEST = 50
"""A slice of fewer examples is not looked at."""

_PERCENT = ("%", 100.0)
_NOISE = f"this change may be chance alone: p is above {CHANCE:.2g} with Holm's correction over the row's slices, by "
_ONE_PAIR, _SEEDS = "McNemar's mid-p test", "a t test over seeds and examples"


@dataclass(frozen=True)
class Slice:
    """Some of the examples, and how a row does on them.

    Args:
        name: what they have in common.
        accuracy: the share that is right.
        change: that less the parent's; None where there is no parent.
        p: of the test that there is no change, by Holm's correction over the slices; None likewise.
    """

    name: str
    accuracy: Statistic
    change: Statistic | None = None
    p: float | None = None

    @property
    def described(self) -> str:
        """The slice in a table: `31-55 tokens: 82.6 %, -3.21 pp`."""
        change = f", {100 * self.change.mean:+z.2f} pp" if self.change is not None else ""
        return f"{self.name}: {100 * self.accuracy.mean:.1f} %{change}"


def masks(examples: Examples, labels: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    """The slices with enough examples: the quartiles of length in tokens, and the labels.

    Args:
        examples: what was to be answered.
        labels: the names of the labels; without one, a label is called by its number.
    """
    found = {}
    below = -1
    for end in np.quantile(examples.tokens, (0.25, 0.5, 0.75, 1), method="inverted_cdf"):
        mask = (examples.tokens > below) & (examples.tokens <= end)
        if mask.any():
            found[f"{examples.tokens[mask].min()}-{end} tokens"] = mask
        below = end
    if examples.labels.ndim == 1:
        for label in np.unique(examples.labels):
            name = labels[label] if 0 <= label < len(labels) else label
            found[f"label {name}"] = examples.labels == label
    return {name: mask for name, mask in found.items() if mask.sum() >= FEWEST}


@dataclass(frozen=True)
class _Row:
    """A row of the table: the answers of every seed, alone and beside those of the rows that it is compared with."""

    entry: Entry
    alone: Sequence[Answered]
    beside: Mapping[str, Sequence[tuple[Answered, ...]]]

    def slices(self) -> list[Slice]:
        """How the row does on each slice, over its seeds."""
        (line,) = self.entry.lines.values()
        parts, pairs = masks(self.alone[0].examples, line.runs[0].task.labels), self.beside["parent"]
        if not pairs:
            return [Slice(name, _mean(own.right[mask] for own in self.alone)) for name, mask in parts.items()]
        corrected = holm([_p(pairs, mask) for mask in parts.values()])
        found = []
        for (name, mask), p in zip(parts.items(), corrected, strict=True):
            change = _mean(own.right[mask].astype(float) - parent.right[mask] for own, parent in pairs)
            found.append(Slice(name, _mean(own.right[mask] for own, _ in pairs), change, p))
        return found

    def numbers(self) -> dict[str, Statistic | None]:
        """What is counted in each seed, folded, by the columns' keys."""
        found = {}
        for other, pairs in self.beside.items():
            found[f"agreement_with_{other}_fraction"] = statistic(own.agreement(theirs) for own, theirs in pairs)
            found[f"lost_against_{other}_examples"] = statistic(own.lost(theirs) for own, theirs in pairs)
            found[f"gained_against_{other}_examples"] = statistic(theirs.lost(own) for own, theirs in pairs)
        of_one_class = [own for own in self.alone if own.one_class]
        found["calibration_error_fraction"] = statistic(calibration_error(own) for own in of_one_class)
        return found


def table(study: Study) -> Table | None:
    """A line for each row: agreement, lost and gained examples, calibration, its worst slice; None without answers."""
    every = _rows(study)
    if not every:
        return None
    footnotes = Footnotes()
    parts = [row.slices() for row in every]
    numbers = [row.numbers() | _slice_numbers(several) for row, several in zip(every, parts, strict=True)]
    shown = [
        column
        for column in (*_columns(study.folded), *_slice_columns(parts))
        if any(found.get(column.key) is not None for found in numbers)
    ]
    rows = []
    for row, found, several in zip(every, numbers, parts, strict=True):
        worst = min(several, key=lambda one: (one.change or one.accuracy).mean, default=None)
        noise = worst is not None and worst.p is not None and worst.p > CHANCE
        test = _SEEDS if len(row.beside["parent"]) > 1 else _ONE_PAIR
        marks = footnotes.mark([_NOISE + test] if noise else [])
        leading = [*(Cell(label) for label in row.entry.labels), Cell(row.entry.name)]
        cells = [Cell(found.get(column.key)) for column in shown]
        rows.append((*leading, *cells, Cell(worst.described if worst else None, marks)))
    heading = [Column(key, key, level=CORE, text=True) for key in study.keys]
    heading.append(Column("name", "Model", level=CORE, text=True))
    last = Column("worst_slice", "Worst slice", level=CORE, text=True)
    footnotes.general += _notes(study, every)
    labels = [row.entry.labels for row in every]
    sections = tuple(place for place in range(1, len(labels)) if labels[place] != labels[place - 1])
    title = "What compression broke beside the mean"
    return Table("broken", title, (*heading, *shown, last), tuple(rows), sections, footnotes.listed())


def _rows(study: Study) -> list[_Row]:
    """The rows whose answers were kept."""
    found = []
    for entry in entries(study):
        (line,) = entry.lines.values()
        alone = [own for (own,) in of_seeds(line)]
        if alone:
            found.append(_Row(entry, alone, {other: of_seeds(line, other) for other in ("parent", "teacher")}))
    return found


def _columns(folded: bool) -> list[Column]:
    counted = int(folded)  # decimals of a mean over seeds
    found = [
        Column(f"agreement_with_{other}_fraction", f"Same answers as {other}", *_PERCENT, 1, level=CORE)
        for other in ("parent", "teacher")
    ]
    for other, level in (("parent", CORE), ("teacher", FULL)):
        for kind in ("lost", "gained"):
            title = f"{kind.capitalize()} against {other}"
            found.append(Column(f"{kind}_against_{other}_examples", title, "", 1.0, counted, level=level))
    return [*found, Column("calibration_error_fraction", "Calibration error", *_PERCENT, 2, level=CORE)]


def _slice_columns(parts: Sequence[Sequence[Slice]]) -> list[Column]:
    """Every slice's numbers, for CSV."""
    found = []
    for name in dict.fromkeys(one.name for several in parts for one in several):
        found += [
            Column(f"accuracy_{_key(name)}_fraction", f"Accuracy, {name}", *_PERCENT, 2, level=FULL),
            Column(f"change_{_key(name)}_fraction", f"Change, {name}", "pp", 100.0, 2, level=FULL),
            Column(f"change_{_key(name)}_holm_p", f"p of the change, {name}", "", 1.0, 4, level=FULL),
        ]
    return found


def _slice_numbers(parts: Sequence[Slice]) -> dict[str, Statistic | None]:
    found: dict[str, Statistic | None] = {}
    for one in parts:
        found[f"accuracy_{_key(one.name)}_fraction"] = one.accuracy
        found[f"change_{_key(one.name)}_fraction"] = one.change
        found[f"change_{_key(one.name)}_holm_p"] = statistic([one.p] if one.p is not None else [])
    return found


def _key(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def _p(pairs: Sequence[tuple[Answered, ...]], mask: NDArray[np.bool_]) -> float:
    """Of the test that a row and its parent have equally many examples of a slice right."""
    differences = np.stack([own.right[mask].astype(float) - parent.right[mask] for own, parent in pairs])
    if len(differences) == 1:
        return mcnemar_mid_p(int((differences < 0).sum()), int((differences > 0).sum()))
    return _spread(differences).p(float(differences.mean()))


def _mean(values: Iterable[NDArray[np.bool_] | NDArray[np.float64]]) -> Statistic:
    """The mean over the examples of a slice, folded over seeds; of several with the interval that `_p` goes with."""
    every = np.stack([each.astype(float) for each in values])
    found = statistic(every.mean(1).tolist())
    assert found is not None
    if found.n == 1:
        return found
    low, high = _spread(every).around(found.mean)
    return replace(found, low=low, high=high, examples=every.shape[1])


def _spread(per_example: NDArray[np.float64]) -> Spread:
    """How far the mean of `[S, N]` may be from that of other seeds and other examples."""
    return over_seeds(per_example.mean(1).tolist(), shared_by_seeds(per_example))


def _notes(study: Study, every: Sequence[_Row]) -> list[str]:
    of = " or ".join(map(str, sorted({len(row.alone[0].right) for row in every})))
    several = any(not row.alone[0].one_class for row in every)
    return [
        "parent: the row it was made from; lost: what the parent has right and the row wrong; gained: the reverse; of "
        f"{of} examples{', means over seeds' if study.folded else ''}",
        f"calibration error: how far confidence is from accuracy, over {BINS} bins of confidence (Guo et al. 2017)",
        "worst slice: the one that lost most against the parent (without a parent: has the lowest accuracy) of the "
        f"quartiles of length and the labels with at least {FEWEST} examples; all are in the CSV",
        *(["where examples have several labels, an answer is right if all are"] if several else []),
    ]
