"""ZipLM: the exact error that a unit's leaving costs, with the weights that stay solved for."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from edgemin.pruning import obs
from edgemin.pruning.criteria.base import Given, Needs, passes
from edgemin.pruning.criteria.compensating import Compensating, given_to, in_order
from edgemin.pruning.selection import others
from edgemin.pruning.structures import Watch


class ZipLM(Compensating):
    """I_u = the error of u's group when u leaves it, the cheapest first and the weights that stay solved for each time.

    Kurtic et al. 2023 (arXiv 2302.04089): the squared error of what the attention output or the second FFN Linear
    gives, see [`obs`][edgemin.pruning.obs]. Importance is found on the unpruned model and decides how many units each
    layer loses. Then the weights are solved for layer by layer, on the inputs that each receives from the pruned layers
    in front of it, and which units leave is chosen again there.

    Errors of different layers differ in scale, so a search within a budget takes a group's errors as shares of their
    sum, which is what the whole group writes, as ZipLM's search does.
    """

    needs: ClassVar[Needs] = "sentences"
    comparable = "group"

    def scores(self, given: Given) -> list[Tensor]:
        """Of each unit the largest cost among its own and those of all units that left before it."""

        def watch() -> Watch:
            return given.structure.outputs(given.model)

        units = given.structure.units(given.model)
        inputs = [obs.Inputs() for _ in units]
        for batch in passes(given, watch, by_gradient=False):
            for seen, values in zip(inputs, batch.values, strict=True):
                seen.add(values, batch.mask)
        weights = [linear.weight for linear in given.structure.readers(given.model)]
        return [_importance(*group) for group in zip(weights, inputs, units, strict=True)]

    def solve(self, given: Given, keep: list[list[int]]) -> list[list[int]]:
        """Choose again, one at a time, as many units of each group as are to leave it, and solve for the others."""
        readers, units = given.structure.readers(given.model), given.structure.units(given.model)
        keep = list(keep)
        for group in in_order(given, keep):
            weight, count = readers[group].weight, units[group] - len(keep[group])
            seen = obs.Inputs()
            for batch, inputs in given_to(given, readers[group]):
                seen.add(inputs, batch["attention_mask"])
            removal = obs.remove(weight.cpu(), seen.inverse_hessian(), units[group], count)
            weight.copy_(removal.weights[count])
            keep[group] = others([removal.order], [units[group]])[0]
        return keep


def _importance(weight: Tensor, inputs: obs.Inputs, units: int) -> Tensor:
    removal = obs.remove(weight.detach().cpu(), inputs.inverse_hessian(), units, units)
    importance = torch.empty(units, dtype=torch.float64)
    importance[removal.order] = removal.errors.diff().cummax(0).values
    return importance
