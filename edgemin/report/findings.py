"""The fields of run.json that hold what stages and quality gates found out besides the model."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from edgemin.report.values import Bits, Bounded, Number, Text


class Fields(BaseModel):
    """An object of a JSON file. Types are strict: true is no number."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        """What is null has its default; what has none and is absent is refused with the type that was expected."""
        if not isinstance(data, dict):
            return data
        needed = {name: None for name, field in cls.model_fields.items() if field.is_required()}
        return needed | {key: value for key, value in data.items() if value is not None}


class Damaged(Fields):
    """A layer that a quality gate blames."""

    layer: str
    damage: Bounded


class Gate(Fields):
    """A row against the one it was made from."""

    passed: bool
    parent: Text = None
    parent_artifact: Text = None
    split: Text = None
    metric: Text = None
    parent_value: Number = None
    drop: Number = None
    interval: list[Number] = []
    max_drop: Number = None
    agreement: Number = None
    flips: Number = None
    examples: Number = None
    collapsed: bool = False
    worst: list[Damaged] = []

    @property
    def drop_from(self) -> float | None:
        """The lower end of the interval."""
        return self.interval[0] if len(self.interval) == 2 else None

    @property
    def drop_to(self) -> float | None:
        """The upper end of the interval."""
        return self.interval[1] if len(self.interval) == 2 else None


class Layer(Fields):
    """What quantizing one layer alone does to the answers, by bits, and the bits it was given."""

    name: str
    weights: Bounded
    damage: dict[Bits, Number]
    bits: int | None = None


class Sensitivity(Fields):
    """What quantizing each layer alone does to the answers, and the budget that bits were chosen for."""

    examples: Number = None
    budget_mib: Number = None
    size_mib: Number = None
    layers: list[Layer]


class Quantization(Fields):
    """How a model is quantized: the bits of each layer, and what shares a scale."""

    bits: dict[str, int] = {}
    granularity: Text = None
    group_size: int | None = None
    activations: Text = None


class Pruned(Fields):
    """The scores of one structure's units and the round in which each went, 0 for those that are left; by layer.

    Of many units the number left and gone between every two edges of the score instead.
    """

    criterion: str
    scores: list[list[Bounded]] = []
    edges: list[Bounded] = []
    left: list[list[int]] = []
    gone: list[list[int]]


class Findings(Fields):
    """What the last stage found out besides the model."""

    sensitivity: Sensitivity | None = None
    quantization: Quantization | None = None
    pruning: dict[str, Pruned] = {}
