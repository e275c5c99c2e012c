"""Which rows a study prints: an order of stages, by hand or by name, its prefixes, its controls and its ablations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgemin.config import check_type, construct
from edgemin.errors import UserError


@dataclass(frozen=True)
class RowSpec:
    """One row: a path of stages from a named model."""

    name: str
    model: str
    stages: tuple[str, ...]
    control: bool = False
    named: bool = True  # the user or an order file names it; any other is a prefix, which may be left out

    @property
    def path(self) -> str:
        """Model and stages in one word, as in `student/finetune/distill`."""
        return "/".join((self.model, *self.stages))


class Ablation(ABC):
    """A way to expand one order into the rows that answer a question about its stages; a choice of `ablate`."""

    @property
    @abstractmethod
    def described(self) -> dict[str, Any]:
        """What `run.json` says of it: a `name`, and what the report finds the rows by."""

    @abstractmethod
    def rows(self, stages: Sequence[str], rows: Sequence[RowSpec]) -> list[RowSpec]:
        """The rows to print, controls apart.

        Args:
            stages: the student's stages as they will run.
            rows: those that would be printed without the ablation.

        Raises:
            UserError: the stages are not such that the question can be asked; the message begins with `ablate.`.
        """


class Interaction(Ablation):
    r"""Two stages crossed: the order with neither, with each of them alone, with both; all other stages in place.

    With $m$ the primary metric, the stages interact by $(m_{both} - m_{one}) - (m_{other} - m_{neither})$, which
    [`interaction`][edgemin.report.interaction] forms from these rows. It finds them by their stages, whatever they are
    called.

    Args:
        stages: the two, each once in the order.
    """

    def __init__(self, stages: list[str]) -> None:
        if len(stages) != 2 or stages[0] == stages[1]:
            raise UserError(f"stages: expected two different stages, given {stages}")
        self.stages = tuple(stages)

    @property
    def described(self) -> dict[str, Any]:
        """Its name and the two stages."""
        return {"name": "interaction", "stages": list(self.stages)}

    def rows(self, stages: Sequence[str], rows: Sequence[RowSpec]) -> list[RowSpec]:
        """The other models' rows and the student's that have neither stage, then the group.

        A row that has all stages but the two (the student baseline, say) keeps its name and is the group's first.
        """
        if any(list(stages).count(stage) != 1 for stage in self.stages):
            counts = " and ".join(f"{stage} {list(stages).count(stage)} times" for stage in self.stages)
            raise UserError(
                f"ablate.stages: expected two stages that the order has once each, given {counts} in {list(stages)}"
            )
        one, other = self.stages
        cells = {
            f"Neither {one} nor {other}": (one, other),
            f"Only {one}": (other,),
            f"Only {other}": (one,),
            f"Both {one} and {other}": (),
        }
        group = [
            RowSpec(name, "student", tuple(stage for stage in stages if stage not in without))
            for name, without in cells.items()
        ]
        kept = [row for row in rows if row.model != "student" or not set(self.stages) & set(row.stages)]
        if any(row.path == group[0].path for row in kept):
            # A prefix that is left out where its head is stale must not be left out here.
            kept = [replace(row, named=True) if row.path == group[0].path else row for row in kept]
            del group[0]
        return [*kept, *group]


def row_specs(
    order: Mapping[str, Any], by_hand: Sequence[str] | None, own_stages: Mapping[str, Sequence[str]]
) -> list[RowSpec]:
    """The rows of a study, in the order they are printed.

    Args:
        order: the `order` node: `name`, `stages`, `rows` (`None`: the teacher and every prefix),
            `controls`, `comparisons` (see [`compared`][edgemin.study.order.compared]), and `ablate` where an
            [`Ablation`][edgemin.study.order.Ablation] expands it.
        by_hand: the student's stages if the user gave them: the rows are then the teacher and every prefix, whatever
            the order says. `None`: as the order says.
        own_stages: the stages of each model's own path, by its name; the student has none.

    Raises:
        UserError: a row or control that is not of the form `{name, model, stages}`, two rows of one name, or an
            ablation that the stages do not allow.
    """
    for key in sorted(set(order) - {"name", "stages", "rows", "controls", "comparisons", "ablate"}):
        raise UserError(f"order.{key}: unknown key (there are: name, stages, rows, controls, comparisons)")
    check_type(order.get("name"), str, "order.name")
    check_type(order.get("stages"), list[str], "order.stages")
    stages = student_stages(order, by_hand)
    rows = order.get("rows") if by_hand is None else None
    controls = order.get("controls") or [] if by_hand is None else []
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
    if (expands := ablation(order)) is not None:
        specs = expands.rows(stages, specs)
    specs += [_row(row, f"order.controls[{index}]", own_stages, control=True) for index, row in enumerate(controls)]
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"order.rows: expected a name of its own for every row, given {name!r} twice")
    return specs


def compared(order: Mapping[str, Any], by_hand: Sequence[str] | None, rows: Sequence[RowSpec]) -> list[list[str]]:
    """The pairs of rows that an order declares: its questions, which the report corrects for one another.

    Args:
        order: the `order` node.
        by_hand: the student's stages if the user gave them: the order's own pairs are then left out with its rows.
        rows: those of the study.

    Returns:
        Pairs of names; none where the report's default is meant: every row with its parent and its controls.

    Raises:
        UserError: what is no list of pairs, a row that there is not, or a row beside itself.
    """
    pairs = order.get("comparisons") if by_hand is None else None
    check_type(pairs, list[list[str]] | None, "order.comparisons")
    names = [row.name for row in rows]
    for index, pair in enumerate(pairs or []):
        key = f"order.comparisons[{index}]"
        if len(pair) != 2 or pair[0] == pair[1]:
            raise UserError(f"{key}: expected the names of two rows, [row, other], given {pair}")
        for name in pair:
            if name not in names:
                raise UserError(f"{key}: expected rows of the order ({', '.join(names)}), given {name!r}")
    return [list(pair) for pair in pairs or []]


def student_stages(order: Mapping[str, Any], by_hand: Sequence[str] | None) -> list[str]:
    """The student's stages: those given by hand, else the order's."""
    return list(order["stages"] if by_hand is None else by_hand)


def order_name(order: Mapping[str, Any], by_hand: Sequence[str] | None) -> str:
    """The order's name, or that its stages were given by hand."""
    return str(order["name"]) if by_hand is None else "by hand"


def ablation(order: Mapping[str, Any]) -> Ablation | None:
    """What expands an order into more rows, if anything does."""
    node = order.get("ablate")
    return construct(node, "ablate", Ablation) if node is not None else None  # type: ignore[type-abstract]


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
