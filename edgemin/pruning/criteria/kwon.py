"""Retraining-free pruning (Kwon et al.): Fisher information, exchanges of units, and scales for those that stay."""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
from torch import Tensor

from edgemin.encoder import taps
from edgemin.pruning import fisher
from edgemin.pruning.criteria.base import Given, Needs, passes
from edgemin.pruning.criteria.compensating import Compensating, given_to, in_order
from edgemin.pruning.criteria.fisher import Fisher
from edgemin.pruning.criteria.gradients import gates
from edgemin.pruning.selection import others
from edgemin.pruning.structures import Watch


class Kwon(Compensating):
    """I_u of `fisher`; then units change places within their group, and those that stay are scaled.

    Kwon et al. 2022 (arXiv 2204.09656), see [`fisher`][edgemin.pruning.fisher]. Scales are solved for layer by layer,
    on the inputs that each receives from the pruned layers in front of it, so that it writes what it wrote in the
    unpruned model, and are multiplied into the weights that units write with.
    """

    needs: ClassVar[Needs] = "gradients"
    comparable = "everywhere"

    def scores(self, given: Given) -> list[Tensor]:
        """The diagonal Fisher information."""
        return Fisher().scores(given)

    def solve(self, given: Given, keep: list[list[int]]) -> list[list[int]]:
        """Exchange units, set the columns of those that leave to 0, then scale the others."""
        keep = _rearranged(given, keep)
        full = copy.deepcopy(given.model)
        readers, full_readers = given.structure.readers(given.model), given.structure.readers(full)
        units = given.structure.units(given.model)
        stay = []
        for linear, kept, count in zip(readers, keep, units, strict=True):
            size = linear.weight.shape[1] // count
            stay.append((torch.tensor(kept)[:, None] * size + torch.arange(size)).flatten().to(linear.weight.device))
            linear.weight.copy_(torch.zeros_like(linear.weight).index_copy_(1, stay[-1], linear.weight[:, stay[-1]]))
        for group in in_order(given, keep):
            linear, columns = readers[group], stay[group]
            products = targets = torch.zeros(())
            for batch, inputs in given_to(given, linear):
                mask = batch["attention_mask"].bool()
                own = inputs[mask][:, columns].float()
                wanted = taps.given_to(full, full_readers[group], batch)[mask] @ full_readers[group].weight.T
                products = products + (own.T @ own).cpu().double()
                targets = targets + (own.T @ wanted.float()).cpu().double()
            write = linear.weight[:, columns].T.unflatten(0, (len(keep[group]), -1)).cpu()
            scales = fisher.rescale(write, products, targets).to(linear.weight)
            linear.weight[:, columns] *= scales.repeat_interleave(write.shape[1])
        return keep


def _rearranged(given: Given, keep: list[list[int]]) -> list[list[int]]:
    """The units that stay once the whole of F has been looked at, group by group."""

    def watch() -> Watch:
        return given.structure.outputs(given.model)

    units = given.structure.units(given.model)
    found = [torch.zeros(count, count, dtype=torch.float64) for count in units]
    for seen in passes(given, watch, by_gradient=True):
        for total, values, gradient in zip(found, seen.values, seen.gradients, strict=True):
            assert gradient is not None, "no gradient has reached this layer"
            own = gates(values, gradient, seen.mask, len(total)).detach().cpu().double()
            total += own.T @ own  # which is n times F, and n changes no choice
    pairs = zip(found, others(keep, units), strict=True)
    return others([fisher.rearrange(total, gone) for total, gone in pairs], units)
