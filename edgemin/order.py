"""Which rows a study prints: an order of stages, by hand or by name, its prefixes and its controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgemin.config import check_type
from edgemin.errors import UserError


@dataclass(frozen=True)
class RowSpec:
    """One row: a path of stages from a named model."""

    name: str
    model: str
    stages: tuple[str, ...]
    control: bool = False
    named: bool = True  #: by the user or an order file; an unnamed one is a prefix and may be left out

    @property
    def path(self) -> str:
        """``student/finetune/distill``."""
        return "/".join((self.model, *self.stages))


def row_specs(
    order: Mapping[str, Any], stages: Sequence[str], own_stages: Mapping[str, Sequence[str]]
) -> list[RowSpec]:
    """The rows of a study, in the order they are printed.

    Args:
        order: the ``order`` node: ``name``, ``stages``, ``rows`` (``None``: the teacher and every prefix),
            ``controls``.
        stages: the student's stages as they will run. Where they are not the order's own, they were given by hand,
            and the order's rows
            and controls do not apply.
        own_stages: for every model of the study the path of its own, by name; ``student``'s is empty.

    Raises:
        UserError: a row or control that is not of the form ``{name, model, stages}``, or two rows of one name.
    """
    for key in sorted(set(order) - {"name", "stages", "rows", "controls"}):
        raise UserError(f"order.{key}: unknown key (there are: name, stages, rows, controls)")
    by_hand = list(stages) != list(order["stages"])
    rows = None if by_hand else order.get("rows")
    controls = [] if by_hand else order.get("controls") or []
    for key, value in (("rows", rows), ("controls", controls)):
        if value is not None:
            check_type(value, list[Any], f"order.{key}")
    if rows == []:
        raise UserError("order.rows: expected null or at least one row, given none")
    if rows is None:
        specs = [RowSpec("Teacher", "teacher", tuple(own_stages["teacher"]), named=False), *_prefixes(stages)]
    else:
        specs = [_row(row, f"order.rows[{index}]", own_stages) for index, row in enumerate(rows)]
        if tuple(stages) not in {spec.stages for spec in specs if spec.model == "student"}:
            raise UserError(f"order.stages: expected the stages of one of order.rows, given {list(stages)}")
    specs += [_row(row, f"order.controls[{index}]", own_stages, control=True) for index, row in enumerate(controls)]
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"order.rows: expected a name of its own for every row, given {name!r} twice")
    return specs


def order_name(order: Mapping[str, Any], stages: Sequence[str]) -> str:
    """The order's name, or that its stages were given by hand."""
    return str(order["name"]) if list(stages) == list(order["stages"]) else "by hand"


def _prefixes(stages: Sequence[str]) -> list[RowSpec]:
    specs: list[RowSpec] = []
    for end in range(1, len(stages) + 1):
        stage, times = stages[end - 1], stages[:end].count(stages[end - 1])
        name = f"{'Student: ' if end == 1 else '+ '}{stage}{f' ({times})' if times > 1 else ''}"
        specs.append(RowSpec(name, "student", tuple(stages[:end]), named=False))
    return specs or [RowSpec("Student", "student", (), named=False)]


def _row(row: Any, key: str, own_stages: Mapping[str, Sequence[str]], *, control: bool = False) -> RowSpec:
    check_type(row, dict[str, Any], key)
    unknown = sorted(set(row) - {"name", "model", "stages"})
    if unknown:
        raise UserError(f"{key}.{unknown[0]}: unknown key (there are: name, model, stages)")
    check_type(row.get("name"), str, f"{key}.name")
    model = row.get("model", "student")
    if model not in own_stages:
        raise UserError(f"{key}.model: expected one of {', '.join(own_stages)}, given {model!r}")
    stages = row.get("stages", list(own_stages[model]) if model != "student" else None)
    check_type(stages, list[str], f"{key}.stages")
    return RowSpec(row["name"], model, tuple(stages), control)
