"""What a pruned model may cost, in milliseconds, MiB or operations: the settings of `prune.target`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Gt, Lt

from edgemin.config import Checked, Positive
from edgemin.encoder.operations import operations
from edgemin.encoder.outline import Outline
from edgemin.errors import UserError
from edgemin.training.latency import LatencyTable, Precision

Cost = Callable[[Outline], float]
Factor = Annotated[float, Gt(0), Lt(1)]

_MIB = 2**20
# Bytes of a weight of a Linear and of a table. INT4: groups of 64 with a scale of two bytes each, tables in INT8.
_BYTES: dict[Precision, tuple[float, float]] = {"fp32": (4, 4), "int8": (1, 1), "int4": (0.5 + 2 / 64, 1)}


@dataclass(frozen=True)
class Target(Checked):
    """What a pruned model may cost once deployed, even where a later stage quantizes it.

    Attributes:
        measure: `latency_ms` at batch 1 on the padded input, by the table of this machine; `size_mib`, the weight
            matrices alone; `macs` of 128 tokens. `None`: no target, `ratio` says how much goes.
        value: the budget, in that unit.
        factor: the budget, as a share of what the model costs that the stage is given.
        factors: several of them: each row that has the stage is printed once for each (see
            [`expanded`][edgemin.study.family.expanded]).
        runtime: the runtime whose latency counts.
        precision: the precision of the deployed model, whose latency or size counts.
        table: a file of another device's latencies, as `bench.py` of a grid bundle writes it; `None` measures here.
    """

    measure: Literal["latency_ms", "size_mib", "macs"] | None = None
    value: Positive | None = None
    factor: Factor | None = None
    factors: Sequence[Factor] | None = None
    runtime: str = "openvino"
    precision: Precision = "int8"
    table: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("value", "factor", "factors") if getattr(self, name) is not None]
        if self.measure is None and given:
            raise UserError(
                f"measure: expected latency_ms, size_mib or macs beside {given[0]}, given null and "
                f"{getattr(self, given[0])}"
            )
        if self.measure is not None and len(given) != 1:
            raise UserError(
                f"measure: expected one of value, factor and factors beside it, given "
                f"{' and '.join(given) if given else 'none'}"
            )
        if self.table is not None and not self.reads_latency:
            raise UserError(f"table: expected null but for latency_ms, given {self.table} for {self.measure}")

    @property
    def reads_latency(self) -> bool:
        """Whether it is a latency."""
        return self.measure == "latency_ms"

    @property
    def idle(self) -> tuple[str, ...]:
        """The names of its settings that do not matter for this measure."""
        return {"latency_ms": (), "size_mib": ("runtime",)}.get(str(self.measure), ("runtime", "precision"))

    @property
    def content(self) -> dict[str, Any]:
        """The settings that decide a result, for its key; what a table of latencies says enters the key by itself."""
        named = ("measure", "value", "factor", "runtime", "precision")
        return {name: getattr(self, name) for name in named if name not in self.idle}

    def cost(self, table: LatencyTable | None) -> Cost:
        """The function that gives what a model costs, in the target's unit; `table` is needed for latencies alone."""
        if self.reads_latency:
            assert table is not None, "nobody measured"
            return table.ms
        return self._mib if self.measure == "size_mib" else _macs

    def is_known(self, outline: Outline) -> bool:
        """Whether planning knows all that this cost depends on."""
        layers = all(layer.heads is not None and layer.ffn is not None for layer in outline.layers)
        return layers and (self.measure != "size_mib" or outline.vocabulary is not None)

    def _mib(self, outline: Outline) -> float:
        linear, table = _BYTES[self.precision]
        sizes = ((matrix.size, matrix.is_table) for matrix in outline.matrices.values())
        return sum(rows * columns * (table if is_table else linear) for (rows, columns), is_table in sizes) / _MIB

    def budget(self, whole: float) -> float:
        """What the pruned model may cost; `whole` is the cost before anything is removed."""
        if self.value is not None:
            return self.value
        assert self.factor is not None
        return self.factor * whole

    def says(self, cost: float) -> str:
        """A cost with its unit."""
        if self.measure == "macs":
            return f"{cost / 1e9:.4g} G multiply-accumulates"
        return f"{cost:.2f} ms" if self.reads_latency else f"{cost:.2f} MiB of {self.precision} matrices"


def _macs(outline: Outline) -> float:
    return float(operations(outline)["macs"])
