"""What quantizing one layer at a time does, by layer and bits: folded over seeds, as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from edgemin.report import findings
from edgemin.report.entries import entries
from edgemin.report.fold import Line, Statistic, Study, statistic
from edgemin.report.grid import CORE, MAIN, Cell, Column, Footnotes, Table

_REGRESSION = ("pearson", "spearman")


@dataclass(frozen=True)
class Layer:
    """One layer, folded over seeds.

    Args:
        name: its path.
        weights: how many it has.
        damage: by the candidate's bits, in nats, or the mean squared difference of a regression's outputs.
        chosen: bits that were given to it, and by how many seeds.
    """

    name: str
    weights: Statistic
    damage: Mapping[int, Statistic]
    chosen: Mapping[int, int]

    @property
    def bits(self) -> str:
        """The chosen bits as text: `4`, or `8 (2 of 3), 4 (1 of 3)` where seeds differ."""
        seeds = sum(self.chosen.values())
        if len(self.chosen) < 2:
            return "".join(map(str, self.chosen))
        return ", ".join(f"{bits} ({count} of {seeds})" for bits, count in self.chosen.items())


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing each layer alone did in one row, folded over seeds.

    Args:
        labels: the values of the study's swept keys.
        name: the row's name.
        layers: in the order of the forward pass.
        candidates: bits that were tried, falling.
        seeds: how many were folded.
        squared: whether damage is a mean squared difference, not a divergence.
        notes: on how much was looked at, and what was chosen.
    """

    labels: tuple[str, ...]
    name: str
    layers: tuple[Layer, ...]
    candidates: tuple[int, ...]
    seeds: int
    squared: bool
    notes: tuple[str, ...]

    @property
    def unit(self) -> str:
        """What damage is measured in."""
        return "mean squared difference" if self.squared else "nats"


def found(study: Study) -> list[Sensitivity]:
    """The sensitivities of every row whose stage measured them, in the order of the tables."""
    made = []
    for entry in entries(study):
        line = next(iter(entry.lines.values())).first_of_each_seed
        looks = [row.findings.sensitivity for row in line.rows if row.findings.sensitivity is not None]
        if looks:
            squared = line.runs[0].task.metric in _REGRESSION
            layers = _layers(looks)
            bits = {bits for layer in layers for bits in layer.damage}
            candidates = tuple(sorted(bits, reverse=True))
            notes = _notes(looks, line, squared)
            made.append(Sensitivity(entry.labels, entry.name, layers, candidates, len(looks), squared, notes))
    return made


def table(study: Study) -> Table | None:
    """The damage of every layer at every candidate's bits, and the bits it was given; None where no row has it."""
    every = found(study)
    if not every:
        return None
    candidates = sorted({bits for one in every for bits in one.candidates}, reverse=True)
    units = list(dict.fromkeys(one.unit for one in every))
    suffix = {"nats": "_nats", "mean squared difference": "_squared_difference"}[units[0]] if len(units) == 1 else ""
    unit = f"{units[0]} x 1000" if len(units) == 1 else "x 1000"
    footnotes = Footnotes()
    columns = [Column(key, key, level=CORE, text=True) for key in study.keys]
    columns += [
        Column("name", "Model", level=CORE, text=True),
        Column("layer", "Layer", level=CORE, text=True),
        Column("weights", "Weights", "", 1.0, 0, exact=True, level=MAIN),
    ]
    columns += [
        Column(f"damage_{bits}_bits{suffix}", f"Damage at {bits} bits", unit, 1e3, 3, True, level=CORE)
        for bits in candidates
    ]
    columns.append(Column("bits", "Chosen bits", level=CORE, text=True))
    rows: list[tuple[Cell, ...]] = []
    sections = []
    for one in every:
        sections += [len(rows)] if rows else []
        marks = footnotes.mark(one.notes)
        for layer in one.layers:
            damage = [Cell(layer.damage.get(bits)) for bits in candidates]
            leading = [*(Cell(label) for label in one.labels), Cell(one.name, marks), Cell(layer.name)]
            rows.append((*leading, Cell(layer.weights), *damage, Cell(layer.bits)))
    title = "What each layer alone does when it is quantized"
    return Table("sensitivity", title, tuple(columns), tuple(rows), tuple(sections), footnotes.listed())


def _layers(looks: Sequence[findings.Sensitivity]) -> tuple[Layer, ...]:
    """The layers of one row, by name over its seeds."""
    weights: dict[str, list[float]] = {}
    damage: dict[str, dict[int, list[float]]] = {}
    chosen: dict[str, Counter[int]] = {}
    for layer in (layer for look in looks for layer in look.layers):
        weights.setdefault(layer.name, []).append(layer.weights)
        for candidate, value in layer.damage.items():
            if value is not None:
                damage.setdefault(layer.name, {}).setdefault(int(candidate), []).append(value)
        chosen.setdefault(layer.name, Counter()).update([] if layer.bits is None else [layer.bits])
    return tuple(
        Layer(
            name,
            size,
            {bits: folded for bits, values in damage.get(name, {}).items() if (folded := statistic(values))},
            dict(chosen[name].most_common()),
        )
        for name, counts in weights.items()
        if (size := statistic(counts))
    )


def _notes(looks: Sequence[findings.Sensitivity], line: Line, squared: bool) -> tuple[str, ...]:
    def mean(values: Iterable[float | None]) -> float | None:
        folded = statistic(value for value in values if value is not None)
        return folded.mean if folded else None

    examples, size = mean(look.examples for look in looks), mean(look.size_mib for look in looks)
    budget = mean(look.budget_mib for look in looks)
    answers = "outputs: their mean squared difference" if squared else "answers: the mean KL of them"
    on = f"on {examples:.0f} examples, " if examples is not None else ""
    found = [f"{on}what one layer quantized alone does to the full-precision model's {answers}"]
    if size is not None:
        found.append(
            f"the chosen bits make {size:.2f} MiB"
            + (f", the budget was {budget:.2f} MiB" if budget is not None else "; no budget was set")
        )
    if len(looks) < len(line.rows):
        found.append(f"known for {len(looks)} of {len(line.rows)} seeds")
    return tuple(found)
