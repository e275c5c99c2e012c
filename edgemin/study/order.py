"""Which rows a study prints: an order of stages, by hand or by name, its prefixes, its controls and its ablations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any, ClassVar

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
    optional: bool = False  # left out, with a note that says why, where it cannot be planned

    @property
    def path(self) -> str:
        """Model and stages in one word, as in `student/finetune/distill`."""
        return "/".join((self.model, *self.stages))


class Ablation(ABC):
    """A way to expand an order into the rows that answer a question about some of its stages; a choice of `ablate`.

    There are always the order without any of these stages and with all of them; what stands between is the question.
    All other stages stay in place. The report finds the rows by their stages, whatever they are called.

    Args:
        stages: the stages in question, at least two, each once in the order. `None`: all of the order but `finetune`,
            without which there is no head to score most students by.
    """

    name: ClassVar[str]
    """What `run.json` calls it."""
    complete: ClassVar[bool] = False
    """Whether it needs all its rows; else a row that cannot be planned is left out, with a note."""

    def __init__(self, stages: list[str] | None = None) -> None:
        if stages is not None and (len(stages) < 2 or len(set(stages)) < len(stages)):
            raise UserError(f"stages: expected two or more different stages, given {stages}")
        self.stages = stages

    @abstractmethod
    def between(self, ablated: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """By name of each row in between, which of the ablated stages it has, in the order in which they run."""

    def ablated(self, stages: Sequence[str]) -> tuple[str, ...]:
        """The stages in question, in the order in which they run.

        Raises:
            UserError: the order has not each of them once, or fewer than two; the message begins with `ablate.`.
        """
        every = [stage for stage in dict.fromkeys(stages) if stage != "finetune"]
        asked = every if self.stages is None else self.stages
        if wrong := [f"{stage} {list(stages).count(stage)} times" for stage in asked if list(stages).count(stage) != 1]:
            raise UserError(
                f"ablate.stages: expected stages that the order has once each, given {' and '.join(wrong)} in "
                f"{list(stages)}"
            )
        if len(asked) < 2:
            raise UserError(f"ablate.stages: expected null only with two stages besides finetune, given {list(stages)}")
        return tuple(sorted(asked, key=list(stages).index))

    def described(self, stages: Sequence[str]) -> dict[str, Any]:
        """What `run.json` says of it: its `name`, and which of the student's stages are ablated."""
        return {"name": self.name, "stages": list(self.ablated(stages))}

    def rows(self, stages: Sequence[str], rows: Sequence[RowSpec]) -> list[RowSpec]:
        """The rows to print, controls apart: those that have none of the stages, then the ablation's own.

        A row that there is already (the student baseline may be the order without any) keeps its name and its place.

        Args:
            stages: the student's stages as they will run.
            rows: those that would be printed without the ablation.

        Raises:
            UserError: see [`ablated`][edgemin.study.order.Ablation.ablated].
        """
        ablated = self.ablated(stages)
        made = [row for row in rows if row.model != "student" or not {*ablated} & {*row.stages}]
        named = ", ".join(ablated)
        none, whole = f"None of {named}", f"All of {named}"
        if len(ablated) == 2:
            none, whole = "Neither {} nor {}".format(*ablated), "Both {} and {}".format(*ablated)
        for name, having in {none: (), **self.between(ablated), whole: ablated}.items():
            optional = not self.complete and having != ablated
            spec = RowSpec(name, "student", _in_place(stages, ablated, having), optional=optional)
            place = next((place for place, row in enumerate(made) if row.path == spec.path), None)
            if place is None:
                made.append(spec)
            elif not made[place].named:  # a prefix, which is left out where its head is stale; not so here
                made[place] = replace(made[place], named=True, optional=optional)
        return made


class Single(Ablation):
    """Each stage alone: what it does to the model that the others have not touched."""

    name = "single"

    def between(self, ablated: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """Each of the stages alone."""
        return {f"Only {stage}": (stage,) for stage in ablated}


class Interaction(Single):
    """Two stages crossed: do they help or hurt one another?

    Args:
        stages: the two.
    """

    name, complete = "interaction", True

    def __init__(self, stages: list[str]) -> None:
        if len(stages) != 2:
            raise UserError(f"stages: expected two different stages, given {stages}")
        super().__init__(stages)


class LeaveOneOut(Ablation):
    """The whole order, and without each stage in turn: what the stage does after and before all the others."""

    name = "leave_one_out"

    def between(self, ablated: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """All stages but one, for each of them."""
        return {f"Without {left}": tuple(stage for stage in ablated if stage != left) for left in ablated}


class Prefixes(Ablation):
    """The first stage, the first two, and so on."""

    name = "prefixes"

    def between(self, ablated: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """Every prefix that has a stage and is not the whole."""
        return {", ".join(ablated[:end]): ablated[:end] for end in range(1, len(ablated))}


class Orders(Ablation):
    """Every order of the stages, in the places that they have in the order."""

    name = "orders"

    def between(self, ablated: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """Every permutation, that of the order itself first."""
        return {", ".join(order): order for order in permutations(ablated)}


def _in_place(stages: Sequence[str], ablated: Sequence[str], having: Sequence[str]) -> tuple[str, ...]:
    """The stages with only some of the ablated ones, which take one another's places where their order is another."""
    kept = [stage for stage in stages if stage not in ablated or stage in having]
    turn = iter(having)
    return tuple(next(turn) if stage in ablated else stage for stage in kept)


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
    check_type(model, str, f"{key}.model")
    if model not in own_stages:
        raise UserError(f"{key}.model: expected one of {', '.join(own_stages)}, given {model!r}")
    stages = row.get("stages", list(own_stages[model]) if model != "student" else None)
    check_type(stages, list[str], f"{key}.stages")
    return RowSpec(row["name"], model, tuple(stages), control)
