"""Quality gates: the footnote of a row that lost more than it was allowed, and what CSV holds of every gate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from edgemin.report.entries import entries
from edgemin.report.fold import Line, Study
from edgemin.report.grid import FULL, Column
from edgemin.report.measures import Measure, metric_word, split_title, task_title
from edgemin.report.schema import Row, Run

MEASURES = (
    Measure(
        "gate", "agreement", Column("agreement_with_parent_fraction", "Agreement with parent", "%", 100.0, level=FULL)
    ),
    Measure("gate", "flips", Column("predictions_changed", "Predictions changed", digits=0, level=FULL)),
    Measure("gate", "drop", Column("gate_drop_fraction", "Drop from parent", "pp", 100.0, level=FULL)),
    Measure("gate", "max_drop", Column("gate_max_drop_fraction", "Allowed drop", "pp", 100.0, exact=True, level=FULL)),
)
"""The parent is the model that the row's last stage was given, whether or not that is a row."""
_WORST = 3
"""So many layers are named."""


def gate_notes(line: Line, *, name_task: bool = False) -> list[str]:
    """The footnote of a row whose gate did not pass, in a line; none where all passed, or none was set.

    Args:
        line: the row, with its seeds.
        name_task: whether to say which task it was, where several stand in one row.
    """
    failed = _failed(line)
    if not failed:
        return []
    run, row = failed[0]
    said = f"quality gate not passed{f' on {task_title(run.task)}' if name_task and run.task else ''}"
    said += f" in {len(failed)} of {len(line.rows)} seeds" if len(line.rows) > 1 else ""
    stage = row.stages[-1] if row.stages else "the last stage"
    return [f"{said}: {stage} {_loss(run, [row for _, row in failed])}"]


def gate_details(study: Study) -> list[str]:
    """A line for every gate that did not pass: its footnote, how many predictions changed, which layers are worst."""
    said = []
    for entry in entries(study):
        for line in (line.first_of_each_seed for line in entry.lines.values()):
            labels = ", ".join(f"{key}={label}" for key, label in zip(study.keys, entry.labels, strict=True))
            rows = [row for _, row in _failed(line)]
            name = f"{entry.name} ({labels})" if labels else entry.name
            said += [f"{name}: {note}{_changed(rows)}{_worst(rows)}" for note in gate_notes(line)]
    return said


def _failed(line: Line) -> list[tuple[Run, Row]]:
    gated = [(run, row) for run, row in zip(line.runs, line.rows, strict=True) if row.get("gate") is not None]
    return [(run, row) for run, row in gated if not row.get("gate", "passed")]


def _loss(run: Run, rows: Sequence[Row]) -> str:
    gate = rows[0].get("gate")
    drops = [100 * drop for row in rows if (drop := row.number("gate", "drop")) is not None]
    metric = metric_word(str(gate.get("metric", "the primary metric")))
    split = gate.get("split")
    where = f" on {split_title(split)}" if split and run.splits and split != run.splits[0] else ""
    allowed = rows[0].number("gate", "max_drop")
    limits = [] if allowed is None else [100 * allowed]
    digits = _digits(drops, limits)
    limit = f" ({_span(limits, digits)} allowed)" if limits else ""
    cost = f"cost {_span(drops, digits) if drops else 'too many'} points of {metric}{where}"
    if all(row.get("gate", "collapsed") for row in rows):
        return f"left one answer to every example ({cost})"
    return f"{cost} against {_parent(run, gate)}{limit}"


def _digits(drops: Sequence[float], limits: Sequence[float]) -> int:
    """Decimals that tell the numbers from zero and the least drop from the limit that it exceeds: one to four."""
    least = min((abs(value) for value in (*drops, *limits) if value), default=1.0)
    digits = min(max(1, -math.floor(math.log10(least))), 4)
    while digits < 4 and drops and limits and _span([min(drops)], digits) == _span(limits, digits):
        digits += 1
    return digits


def _span(values: Sequence[float], digits: int) -> str:
    """``3.2`` or ``2.1 to 3.2``."""
    return " to ".join(dict.fromkeys(f"{value:z.{digits}f}" for value in (min(values), max(values))))


def _parent(run: Run, gate: Mapping[str, Any]) -> str:
    """The model before by the name of its row, else by its path."""
    artifact = gate.get("parent_artifact")
    named = (row.name for row in run.rows if artifact is not None and row.artifact == artifact)
    name = next(named, None)
    return str(gate.get("parent", "")) if name is None else f'"{name}"'


def _changed(rows: Sequence[Row]) -> str:
    """How many predictions differ from the parent's; nothing for a regression, which has none to count."""
    flips = [flips for row in rows if (flips := row.number("gate", "flips")) is not None]
    examples = [n for row in rows if (n := row.number("gate", "examples")) is not None]
    if not flips:
        return ""
    return f", {_span(flips, 0)}{f' of {max(examples):.0f}' if examples else ''} predictions changed"


def _worst(rows: Sequence[Row]) -> str:
    """The layers that did most of the damage, by its sum over seeds."""
    damage: dict[str, float] = {}
    for row in rows:
        for entry in row.get("gate", "worst") or ():
            damage[entry["layer"]] = damage.get(entry["layer"], 0.0) + entry["damage"]
    layers = sorted(damage, key=lambda layer: -damage[layer])[:_WORST]
    return f"; worst layers: {', '.join(layers)}" if layers else ""
