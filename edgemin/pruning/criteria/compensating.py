"""The base of criteria that change the weights of units that stay, so that they make up for those that leave."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from edgemin.encoder import parts, taps
from edgemin.progress import counted
from edgemin.pruning.criteria.base import Criterion, Given
from edgemin.pruning.structures import StructureName


class Compensating(Criterion):
    """A criterion that solves for weights group by group, in the order of a forward.

    Each group receives its inputs from groups that are already pruned. Nothing is cut in between: with the columns of
    its pruned units set to 0, a Linear gives what it will give after the cut.
    """

    structures: ClassVar[tuple[StructureName, ...]] = ("heads", "ffn")
    changes_weights: ClassVar[bool] = True

    @torch.no_grad()
    def compensate(self, given: Given, keep: list[list[int]]) -> list[list[int]]:
        """Choose and solve group by group; the columns that read pruned units are 0 afterwards."""
        was_training = given.model.training
        given.model.eval()
        try:
            return self.solve(given, keep)
        finally:
            given.model.train(was_training)

    @abstractmethod
    def solve(self, given: Given, keep: list[list[int]]) -> list[list[int]]:
        """Do what `compensate` promises; it is called without dropout and gradients."""


def in_order(given: Given, keep: list[list[int]]) -> Iterator[int]:
    """The groups that lose a unit, in the order of a forward: a layer's heads, then its FFN units."""
    units, layers = given.structure.units(given.model), parts.num_layers(given.model)
    groups = [group for layer in range(layers) for group in range(layer, len(units), layers)]
    yield from counted(
        [group for group in groups if len(keep[group]) < units[group]], "solving for the weights that stay"
    )


def given_to(given: Given, linear: nn.Module) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Every batch, moved to the model's device, with the input that the Linear receives for it."""
    for batch in given.batches:
        here = {name: tensor.to(given.model.device) for name, tensor in batch.items()}
        yield here, taps.given_to(given.model, linear, here)
