"""Movement pruning of heads and FFN units: those go whose weights move towards zero while the model is fine-tuned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from edgemin.encoder.gates import Gates
from edgemin.encoder.outline import Outline
from edgemin.pruning.gradual import GradualPruning
from edgemin.pruning.selection import removal_count, select_units
from edgemin.pruning.shares import Share
from edgemin.pruning.structures import Ffn, Heads


class Scores(nn.Module):
    """A score for every head and FFN unit, 0 at first."""

    def __init__(self, outline: Outline) -> None:
        super().__init__()
        self.heads = nn.ParameterList(torch.zeros(layer.heads or 0) for layer in outline.layers)
        self.units = nn.ParameterList(torch.zeros(layer.ffn or 0) for layer in outline.layers)


class MovementPruning(GradualPruning):
    r"""Block movement pruning (Lagunas et al. 2021, arXiv 2109.04838; Sanh et al. 2020, arXiv 2005.07683).

    The gate of a head or FFN unit is 1 if its score is among the highest of all layers, else 0, and has the score's
    gradient (straight-through). A gate multiplies W_O's columns of the head, W_2's column of the unit, so

    $$ \partial L / \partial S_u = \sum_{w \in W_u} w \, \partial L / \partial w $$

    and a score sinks as descent brings these weights nearer to zero. By the step t of n in which the sparsity rises to
    its target v, the share v (1 - (1 - t/n)^3) of all heads and of all FFN units is closed.

    The score of a head is thus that of whole blocks of the published code, a head wide; its rows of W_V would give the
    same sum, their bias included, since a head's output is linear in both.
    """

    name_of_scores: ClassVar[str] = "movement"
    gating: Scores

    @property
    def _shares(self) -> list[Share]:
        asked = self.masking.sparsity
        return [Share(kind, asked, "sparsity", "global") for kind in (Heads(), Ffn(self.masking.multiple))]

    def check_reachable(self, model: Outline) -> None:
        """Refuse a sparsity at which some layer would keep no head or no FFN unit."""
        for share in self._shares:
            share.left(model)

    def deciders(self, outline: Outline) -> Scores:
        """A score for every head and FFN unit."""
        return Scores(outline)

    def drawn(self) -> Gates:
        """Gates of 1 for the highest scores, as many as the schedule leaves open at this step, else 0."""
        steps = max(1, round(self.masking.sparsity_warmup * self.batch_count))
        share = self.masking.sparsity * (1 - (1 - min(1.0, self.batch / steps)) ** 3)
        self.log("target_sparsity", share)
        return self._gates_of(*(straight_through(list(kind), share) for kind in (self.gating.heads, self.gating.units)))

    def chosen(self) -> Gates:
        """Open as many gates as the sparsity leaves: at least one in each layer, FFN units rounded up to a multiple."""
        found = []
        for share, scores in zip(self._shares, self.importance().values(), strict=True):
            kind = share.structure
            closed = select_units(
                [group.detach() for group in scores],
                share.ratio,
                share.scope,
                what=kind.what,
                minimum=kind.least,
                multiple=kind.multiple,
            )
            ones = [torch.ones_like(group) for group in scores]
            found.append(
                [
                    one.index_fill(0, torch.tensor(units, dtype=torch.long, device=one.device), 0.0)
                    for one, units in zip(ones, closed, strict=True)
                ]
            )
        return self._gates_of(*found)

    def importance(self) -> dict[str, Sequence[Tensor]]:
        """The scores of each layer's heads and FFN units."""
        return {"heads": list(self.gating.heads), "ffn": list(self.gating.units)}

    def _gates_of(self, heads: Sequence[Tensor], units: Sequence[Tensor]) -> Gates:
        """Gates on heads and FFN units; all others are open."""
        blocks = heads[0].new_ones(len(heads))
        return Gates(blocks, heads, blocks, units, heads[0].new_ones(self.before.hidden))


def straight_through(scores: Sequence[Tensor], share: float) -> list[Tensor]:
    """Gates 0 for the lowest `int(share x n)` of all n scores and 1 for the others, with the scores' gradient."""
    joined = torch.cat(list(scores))
    closed = joined.argsort(stable=True)[: removal_count(len(joined), share)]
    gates = torch.ones_like(joined).index_fill(0, closed, 0.0) + (joined - joined.detach())
    return list(gates.split([len(group) for group in scores]))
