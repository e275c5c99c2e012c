"""Which rows a control is there for, as the stages of a run.json say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgemin.report.fields import Row
from edgemin.report.schema import Run

_FURTHER_TRAINING = "finetune"
_FACTOR = "@"  # in front of a stage's factor, as in `prune@0.5`


def controlled(run: Run, control: Row) -> list[Row]:
    """The rows that a control is there for.

    One of their stages is another one in it: of the same kind (heads drawn at random), or further training in the place
    of a distillation (no teacher). If there are none, they have one stage more than it (not quantized).
    """
    rows = [row for row in run.rows if not row.control and row.model == control.model]
    replaced = [row for row in rows if _replaces(run, control.stages, row.stages)]
    return replaced or [row for row in rows if _leaves_one_out(control.stages, row.stages)]


def _replaces(run: Run, control: Sequence[str], stages: Sequence[str]) -> bool:
    if len(control) != len(stages):
        return False
    different = [pair for pair in zip(control, stages, strict=True) if pair[0] != pair[1]]
    if len(different) != 1:
        return False
    if len({stage.partition(_FACTOR)[2] for stage in different[0] if _FACTOR in stage}) > 1:
        return False  # pruned to other budgets
    own, theirs = (_kind(run, stage) for stage in different[0])
    return theirs == ("distillation" if own == _FURTHER_TRAINING else own)


def _leaves_one_out(control: Sequence[str], stages: Sequence[str]) -> bool:
    return any([*stages[:place], *stages[place + 1 :]] == list(control) for place in range(len(stages)))


def _kind(run: Run, stage: str) -> str:
    """What a stage does: `pruning`, `distillation` ...; its own name where the job does not say."""
    node = run.config.get(stage)
    target = node.get("_target_") if isinstance(node, Mapping) else None
    return target.split(".")[1] if isinstance(target, str) and "." in target else stage
