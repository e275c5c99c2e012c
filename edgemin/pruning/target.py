"""A budget in milliseconds, MiB or operations, and how much each group of units may keep within it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt, Lt
from torch import Tensor

from edgemin.config import Checked, Positive
from edgemin.encoder.operations import operations
from edgemin.encoder.outline import Outline
from edgemin.errors import UserError
from edgemin.pruning.budget import Levels, choose, least, removal_losses
from edgemin.pruning.structures import Structure
from edgemin.training.latency import LatencyTable

Precision = Literal["fp32", "int8", "int4"]
Cost = Callable[[Outline], float]

_MIB = 2**20
# Bytes of a weight of a Linear and of a table. INT4: groups of 64 with a scale of two bytes each, tables in INT8.
_BYTES: dict[Precision, tuple[float, float]] = {"fp32": (4, 4), "int8": (1, 1), "int4": (0.5 + 2 / 64, 1)}


@dataclass(frozen=True)
class Target(Checked):
    """What a pruned model is to cost; everything is that of the deployed model, also where it is quantized later.

    Attributes:
        measure: `latency_ms` at batch 1 on the padded input, by the table of this machine; `size_mib`, the weight
            matrices alone; `macs` of 128 tokens. `None`: no target, `ratio` says how much goes.
        value: the budget, in that unit.
        factor: the budget, as a share of what the model costs that the stage is given.
        runtime: in which the latency is meant.
        precision: in which latency or size are meant.
    """

    measure: Literal["latency_ms", "size_mib", "macs"] | None = None
    value: Positive | None = None
    factor: Annotated[float, Gt(0), Lt(1)] | None = None
    runtime: str = "openvino"
    precision: Precision = "int8"

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("value", "factor") if getattr(self, name) is not None]
        if self.measure is None and given:
            raise UserError(f"{given[0]}: expected null without a measure, given {getattr(self, given[0])}")
        if self.measure is not None and len(given) != 1:
            raise UserError(
                f"measure: expected value or factor beside it, given {' and '.join(given) if given else 'neither'}"
            )

    @property
    def reads_latency(self) -> bool:
        """Whether it is a latency."""
        return self.measure == "latency_ms"

    def cost(self, table: LatencyTable | None) -> Cost:
        """What a model costs, in the target's unit."""
        if self.measure == "latency_ms":
            assert table is not None, "nobody measured"
            return table.ms
        return self._mib if self.measure == "size_mib" else lambda outline: float(operations(outline)["macs"])

    def _mib(self, outline: Outline) -> float:
        linear, table = _BYTES[self.precision]
        sizes = ((matrix.size, matrix.is_table) for matrix in outline.matrices.values())
        return sum(rows * columns * (table if is_table else linear) for (rows, columns), is_table in sizes) / _MIB

    def budget(self, outline: Outline, cost: Cost) -> float:
        """What may be spent, given the model as it is before anything of it goes."""
        if self.value is not None:
            return self.value
        assert self.factor is not None
        return self.factor * cost(outline)

    def check(self, outline: Outline, structures: Sequence[Structure], cost: Cost) -> None:
        """Refuse a budget that no pruning of these structures reaches.

        Raises:
            UserError: says what can be reached.
        """
        budget, smallest = self.budget(outline, cost), outline
        for structure in structures:
            counts = [min(structure.least, count or structure.least) for count in structure.counts(smallest)]
            smallest = structure.shaped(smallest, counts)
        if budget < cost(smallest):
            key, given = ("value", self.value) if self.value is not None else ("factor", self.factor)
            reached = cost(smallest) if self.value is not None else cost(smallest) / cost(outline)
            raise UserError(
                f"target.{key}: expected at least {reached:.3g}, what removing "
                f"{' and '.join(structure.what for structure in structures)} can reach, given {given:g}"
            )

    def counts(
        self,
        outline: Outline,
        structures: Sequence[Structure],
        scores: Sequence[Sequence[Tensor]],
        budget: float,
        cost: Cost,
    ) -> list[list[int]]:
        """How many units each group keeps within a budget, so that the importance that goes is least.

        The cost of a model is taken as a sum over groups, which holds for heads and FFN units.

        Args:
            outline: of the model as it is.
            structures: that may go.
            scores: of each structure `[U_g]` for each of its groups, comparable between groups and structures.
            budget: in the unit of `cost`.
            cost: of a model.
        """
        whole = cost(outline)
        parts: list[Levels] = []
        for structure, groups in zip(structures, scores, strict=True):
            present = structure.counts(outline)
            for group, units in enumerate(groups):
                losses, kept = removal_losses(units), _kept(len(units), structure)
                shapes = [[*present[:group], count, *present[group + 1 :]] for count in kept]
                costs = [cost(structure.shaped(outline, counts)) - whole for counts in shapes]
                parts.append(Levels(kept, costs, [losses[count] for count in kept]))
        chosen = iter(choose(parts, max(budget - whole, least(parts))))
        return [[next(chosen) for _ in groups] for groups in scores]


def _kept(units: int, structure: Structure) -> list[int]:
    """How many of so many units a group may keep, ascending."""
    step = structure.multiple
    fewest = -(-structure.least // step) * step
    return sorted({*range(fewest, units, step), units})
