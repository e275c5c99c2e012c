"""Quality gates: the footnote of a row that lost more than it was allowed, and what CSV holds of every gate."""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgemin.report.entries import entries
from edgemin.report.fields import Row
from edgemin.report.findings import Gate
from edgemin.report.fold import Line, Study
from edgemin.report.grid import FULL, Column
from edgemin.report.measure import Measure
from edgemin.report.schema import Run
from edgemin.report.titles import metric_word, split_title, task_title

MEASURES = (
    Measure(
        "gate", "agreement", Column("agreement_with_parent_fraction", "Agreement with parent", "%", 100.0, level=FULL)
    ),
    Measure("gate", "flips", Column("predictions_changed", "Predictions changed", digits=0, level=FULL)),
    Measure("gate", "drop", Column("gate_drop_fraction", "Drop from parent", "pp", 100.0, level=FULL)),
    Measure("gate", "drop_from", Column("gate_drop_from_fraction", "Drop, from", "pp", 100.0, level=FULL)),
    Measure("gate", "drop_to", Column("gate_drop_to_fraction", "Drop, to", "pp", 100.0, level=FULL)),
    Measure("gate", "max_drop", Column("gate_max_drop_fraction", "Allowed drop", "pp", 100.0, exact=True, level=FULL)),
)
"""The parent is the row that it was made from, or the model that its last stage was given where that is no row."""
_WORST = 3
"""How many of the worst layers a line names."""


def gate_notes(line: Line, *, name_task: bool = False) -> list[str]:
    """The footnote of a row whose gate did not pass, in a line; none where all passed, or none was set.

    Args:
        line: the row, with its seeds.
        name_task: whether to say which task it was, where several stand in one row.
    """
    failed = _failed(line)
    if not failed:
        return []
    run, row, _ = failed[0]
    said = f"quality gate not passed{f' on {task_title(run.task.name)}' if name_task and run.task.name else ''}"
    said += f" in {len(failed)} of {len(line.rows)} seeds" if len(line.rows) > 1 else ""
    return [f"{said}: {_stages(row)} {_loss(run, [gate for _, _, gate in failed])}"]


def gate_details(study: Study) -> list[str]:
    """A line for every gate that did not pass: its footnote, how many predictions changed, which layers are worst."""
    said = []
    for entry in entries(study):
        for line in (line.first_of_each_seed for line in entry.lines.values()):
            labels = ", ".join(f"{key}={label}" for key, label in zip(study.keys, entry.labels, strict=True))
            gates = [gate for _, _, gate in _failed(line)]
            name = f"{entry.name} ({labels})" if labels else entry.name
            said += [f"{name}: {note}{_changed(gates)}{_worst(gates)}" for note in gate_notes(line)]
    return said


def _failed(line: Line) -> list[tuple[Run, Row, Gate]]:
    rows = zip(line.runs, line.rows, strict=True)
    return [(run, row, row.gate) for run, row in rows if row.gate is not None and not row.gate.passed]


def _stages(row: Row) -> str:
    """The stages that it took from the parent to the row."""
    before = (row.gate.parent or "").split("/")[1:] if row.gate is not None else []
    own = row.stages[len(before) :] if row.stages[: len(before)] == before else row.stages[-1:]
    return ", ".join(own) or "the last stage"


def _loss(run: Run, gates: Sequence[Gate]) -> str:
    gate = gates[0]
    drops = [100 * one.drop for one in gates if one.drop is not None]
    metric = metric_word(gate.metric or "the primary metric")
    where = f" on {split_title(gate.split)}" if gate.split and run.splits and gate.split != run.first_split else ""
    limits = [] if gate.max_drop is None else [100 * gate.max_drop]
    digits = _digits(drops, limits)
    limit = f" ({_span(limits, digits)} allowed)" if limits else ""
    cost = f"cost {_span(drops, digits) if drops else 'too many'} points of {metric}{where}"
    if all(one.collapsed for one in gates):
        return f"left one answer to every example ({cost})"
    ends = [100 * end for end in gate.interval if end is not None] if len(gates) == 1 else []
    within = f" (95 %: {_span(ends, digits)})" if ends else ""
    return f"{cost}{within} against {_parent(run, gate)}{limit}"


def _digits(drops: Sequence[float], limits: Sequence[float]) -> int:
    """Decimals that tell the numbers from zero and the least drop from the limit that it exceeds: one to four."""
    least = min((abs(value) for value in (*drops, *limits) if value), default=1.0)
    digits = min(max(1, -math.floor(math.log10(least))), 4)
    while digits < 4 and drops and limits and _span([min(drops)], digits) == _span(limits, digits):
        digits += 1
    return digits


def _span(values: Sequence[float], digits: int) -> str:
    """The least and the greatest as text: `3.2`, or `2.1 to 3.2` where they differ."""
    return " to ".join(dict.fromkeys(f"{value:z.{digits}f}" for value in (min(values), max(values))))


def _parent(run: Run, gate: Gate) -> str:
    """The model that was compared with, by the name of its row, else by its path."""
    named = (row.name for row in run.rows if row.artifact is not None and row.artifact == gate.parent_artifact)
    name = next(named, None)
    return gate.parent or "" if name is None else f'"{name}"'


def _changed(gates: Sequence[Gate]) -> str:
    """How many predictions differ from the parent's; nothing for a regression, which has none to count."""
    flips = [gate.flips for gate in gates if gate.flips is not None]
    examples = [gate.examples for gate in gates if gate.examples is not None]
    if not flips:
        return ""
    return f", {_span(flips, 0)}{f' of {max(examples):.0f}' if examples else ''} predictions changed"


def _worst(gates: Sequence[Gate]) -> str:
    """The layers that did most of the damage, by its sum over seeds."""
    damage: dict[str, float] = {}
    for gate in gates:
        for blamed in gate.worst:
            damage[blamed.layer] = damage.get(blamed.layer, 0.0) + blamed.damage
    layers = sorted(damage, key=lambda layer: -damage[layer])[:_WORST]
    return f"; worst layers: {', '.join(layers)}" if layers else ""
