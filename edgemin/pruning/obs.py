r"""Optimal brain surgeon by structure: units leave a Linear one at a time, and the weights that stay make up for them.

ZipLM (Kurtic et al. 2023, arXiv 2302.04089). A Linear W reads U units side by side, each a block of columns: a neuron
is one, an attention head as many as its size. With X the Linear's inputs at n tokens, what a change of the weights to
W' costs is

$$
E(W') = \tfrac12 \operatorname{tr} (W' - W) H (W' - W)^\top
      = \tfrac1n \lVert X W'^\top - X W^\top \rVert^2 + \tfrac\lambda2 \lVert W' - W \rVert^2,
\qquad H = \tfrac2n X^\top X + \lambda I
$$

With G the inverse of H, the least cost of a W' whose block S is zero has a closed form, and so has that W':

$$
\tfrac12 \operatorname{tr} W_S G_{SS}^{-1} W_S^\top, \qquad
W \leftarrow W - W_S G_{SS}^{-1} G_{S:}, \quad G \leftarrow G - G_{:S} G_{SS}^{-1} G_{S:}
$$

After that G is the inverse over the units that are left, and the next unit can be chosen. All is computed in float64.

Shapes: n tokens, U units, S size of a unit, M outputs of the Linear, R units removed.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

DAMPING = 0.01  # λ as a share of the mean of H's diagonal
_LEAST_DAMPING = 1e-12  # where all inputs are 0
_COMPACT_BELOW = 0.75  # G drops its removed units when a smaller share than this is left, which changes no number


class Removal(NamedTuple):
    """Units that left a Linear, one after the other.

    Attributes:
        order: R units, first the one that left first.
        errors: `[R + 1]`, float64: what the first so many cost together; `errors[0]` is 0.
        weights: for each number of removed units that was asked for, the Linear's weights `[M, U*S]` then; the columns
            of units that left are 0.
    """

    order: list[int]
    errors: Tensor
    weights: dict[int, Tensor]


class Inputs:
    """Statistics of a Linear's inputs X, batch after batch: X^T X and the number of tokens."""

    def __init__(self) -> None:
        """Start at no token."""
        self.products: Tensor | None = None
        self.tokens = 0

    def add(self, inputs: Tensor, mask: Tensor) -> None:
        """Add the tokens of one batch, padding apart.

        Args:
            inputs: `[B, T, U*S]`.
            mask: `[B, T]`, non-zero where there is a token.
        """
        real = inputs.detach()[mask.bool()].float()  # float32: its rounding is far below the damping
        found = (real.T @ real).cpu().double()
        self.products = found if self.products is None else self.products.add_(found)
        self.tokens += len(real)

    def inverse_hessian(self, damping: float = DAMPING) -> Tensor:
        """G `[U*S, U*S]`, the inverse of H = (2/n) X^T X + λI.

        Args:
            damping: λ as a share of the mean of the first part's diagonal, above 0: so H has an inverse also where
                inputs depend on each other.
        """
        assert damping > 0 and self.products is not None, "no token was seen"
        hessian = self.products * (2 / self.tokens)
        diagonal = hessian.diagonal()
        diagonal += max(damping * diagonal.mean().item(), _LEAST_DAMPING)
        return torch.cholesky_inverse(torch.linalg.cholesky(hessian))


def remove(
    weight: Tensor, inverse: Tensor, units: int, count: int, *, keep_at: Collection[int] | None = None
) -> Removal:
    """Remove units one at a time, each time the one that then costs least; among equals the lower one.

    Args:
        weight: `[M, U*S]`, of the Linear.
        inverse: `[U*S, U*S]`, G.
        units: U.
        count: R, how many to remove.
        keep_at: numbers of removed units at which the weights are wanted; by default R alone.

    Returns:
        Which left, what it cost, and the weights that stay.
    """
    wanted = {count} if keep_at is None else set(keep_at)
    assert 0 <= count <= units and wanted <= set(range(count + 1))
    size = weight.shape[1] // units
    left = _Left(
        weight.detach().double().T.clone(memory_format=torch.contiguous_format),
        inverse.double().clone(),
        size,
        torch.arange(units),
    )
    order: list[int] = []
    costs: list[float] = []
    weights = {0: weight.detach().clone()} if 0 in wanted else {}
    for removed in range(1, count + 1):
        unit, cost = left.remove_cheapest()
        order.append(unit)
        costs.append(cost)
        if removed in wanted:
            weights[removed] = left.written(units).to(weight)
    errors = torch.tensor([0.0, *costs], dtype=torch.float64).cumsum(0)
    return Removal(order, errors, weights)


class _Left:
    """What has not been removed: the Linear's columns as rows `[U*S, M]`, and G over them."""

    def __init__(self, columns: Tensor, inverse: Tensor, size: int, names: Tensor) -> None:
        self.columns, self.inverse, self.size = columns, inverse, size
        self.names = names  # the unit at each place
        self.present = torch.ones(len(names), dtype=torch.bool)

    def remove_cheapest(self) -> tuple[int, float]:
        """Remove one unit; which, and what it costs."""
        places, size = len(self.names), self.size
        blocks = self.inverse.view(places, size, places, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        curvature = blocks.reciprocal() if size == 1 else torch.linalg.inv(blocks)
        by_unit = self.columns.view(places, size, -1)
        scores = (curvature * (by_unit @ by_unit.mT)).sum((1, 2)).masked_fill(~self.present, torch.inf)
        place = int(scores.argmin())
        own = slice(place * size, (place + 1) * size)
        reads, writes = self.inverse[own].clone(), self.columns[own].clone()
        shares = reads.T @ curvature[place]
        self.columns.addmm_(shares, writes, alpha=-1)
        self.inverse.addmm_(shares, reads, alpha=-1)
        self.columns[own] = 0
        self.inverse[own] = 0
        self.inverse[:, own] = 0
        self.inverse[own, own] = torch.eye(size, dtype=self.inverse.dtype)
        self.present[place] = False
        found = int(self.names[place]), scores[place].item() / 2
        self._compact()
        return found

    def _compact(self) -> None:
        if 0 < int(self.present.sum()) < _COMPACT_BELOW * len(self.present):
            kept = self.present.repeat_interleave(self.size)
            self.columns, self.inverse = self.columns[kept], self.inverse[kept][:, kept]
            self.names, self.present = self.names[self.present], self.present[self.present]

    def written(self, units: int) -> Tensor:
        """The weights `[M, U*S]`, 0 where a unit has left."""
        whole = self.columns.new_zeros(units, self.size * self.columns.shape[1])
        whole[self.names] = self.columns.view(len(self.names), -1)
        return whole.view(units * self.size, -1).T.contiguous()
