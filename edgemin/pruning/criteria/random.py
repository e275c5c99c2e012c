"""Units drawn at random: the control that every other criterion has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from edgemin.pruning.criteria.base import Criterion, Given
from edgemin.pruning.structures import StructureName


def random(units: Sequence[int], seed: int) -> list[Tensor]:
    """Uniform numbers in [0, 1), `[U_g]` per group, float64, on CPU: independent of the model's device."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(count, generator=generator, dtype=torch.float64) for count in units]


class Random(Criterion):
    """Uniform numbers that depend on the seed alone."""

    structures: ClassVar[tuple[StructureName, ...]] = ("heads", "ffn", "layers", "hidden")

    def scores(self, given: Given) -> list[Tensor]:
        """One draw per unit."""
        return random(given.structure.units(given.model), given.seed)
