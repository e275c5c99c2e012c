"""Several budgets of one stage: each row that has the stage is printed once for each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from edgemin.errors import UserError
from edgemin.study.order import RowSpec

FAMILY = "@"  # between a stage's name and its factor, as in `prune@0.5`


def expanded(
    settings: Mapping[str, Any], rows: Sequence[RowSpec], pairs: Sequence[Sequence[str]]
) -> tuple[dict[str, Any], list[RowSpec], list[list[str]]]:
    """Write out the stages that have `target.factors`, as stages of a factor each with a name of its own.

    `prune` with the factors 0.75 and 0.5 becomes `prune@0.75` and `prune@0.5`, in a row each. What does not depend on
    the factor is the same for all, importance too: a stage's seed does not know it.

    Args:
        settings: the whole resolved configuration.
        rows: of the study.
        pairs: names of rows that are compared.

    Returns:
        Settings that have the new stages too, the rows, and the pairs: where both rows of one have become several,
        those of equal factors.

    Raises:
        UserError: factors beside an ablation, whose rows are known by their stages, or twice the same.
    """
    factors = {name: list(_factors(node)) for name, node in settings.items() if _factors(node)}
    family = {name: own for name, own in factors.items() if any(name in row.stages for row in rows)}
    if not family:
        return dict(settings), list(rows), [list(pair) for pair in pairs]
    for name, own in family.items():
        if len(set(own)) < len(own):
            raise UserError(f"{name}.target.factors: expected each number once, given {own}")
        if settings["order"].get("ablate") is not None:
            raise UserError(
                f"{name}.target.factors: expected null beside ablate, given {own}; set {name}.target.factor"
            )
    stages = {
        f"{name}{FAMILY}{factor:g}": {
            **settings[name],
            "target": {**settings[name]["target"], "factors": None, "factor": factor},
        }
        for name, own in family.items()
        for factor in own
    }
    by_row = {row.name: list(_one_each(row, family)) for row in rows}
    made = [row for several in by_row.values() for row in several]
    names = {name: [row.name for row in several] for name, several in by_row.items()}
    compared = [pair for one, other in pairs for pair in _paired(names[one], names[other])]
    return {**settings, **stages}, made, compared


def _factors(node: Any) -> Sequence[float]:
    target = node.get("target") if isinstance(node, Mapping) else None
    found = target.get("factors") if isinstance(target, Mapping) else None
    numbers = isinstance(found, list) and all(isinstance(factor, int | float) for factor in found)
    return found if found and numbers else ()  # anything else is refused where the stage is constructed


def _one_each(row: RowSpec, family: Mapping[str, Sequence[float]]) -> list[RowSpec]:
    """The row with each choice of factors; a row without such a stage is left as it is."""
    choices = [[f"{stage}{FAMILY}{factor:g}" for factor in family.get(stage, ())] or [stage] for stage in row.stages]
    if all(len(choice) == 1 and FAMILY not in choice[0] for choice in choices):
        return [row]
    made = []
    for stages in product(*choices):
        told = ", ".join(stage.partition(FAMILY)[2] for stage in stages if FAMILY in stage)
        made.append(replace(row, name=f"{row.name} ({told}x)", stages=stages))
    return made


def _paired(ones: Sequence[str], others: Sequence[str]) -> list[list[str]]:
    if len(ones) == len(others):
        return [list(pair) for pair in zip(ones, others, strict=True)]
    return [list(pair) for pair in product(ones, others)]
