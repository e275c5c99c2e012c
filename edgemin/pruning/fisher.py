r"""Retraining-free pruning by Fisher information: which units stay, and by how much they grow (Kwon et al. 2022).

Every unit has a gate that multiplies what it hands on, 1 in the model as it is (arXiv 2204.09656). With g(x) the
gradient of example x's own loss by the gates, the loss without the units S is to second order

$$
L(S) \approx L + \tfrac12 \sum_{i, j \in S} F_{ij}, \qquad F = \operatorname{mean}_x g(x) g(x)^\top
$$

F's diagonal alone ranks units. Then a rearrangement within each layer takes in the rest of F, and units that stay are
scaled so that the layer gives what it gave before.

Shapes: n examples or tokens, U units of a layer, S size of a unit, M outputs of the Linear that reads them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DAMPING = 0.01  # of scales, as a share of the mean of what a unit writes, squared
LARGEST_SCALE = 10.0  # a layer whose least squares solution scales any unit more than that is left as it is


def rearrange(fisher: Tensor, removed: Sequence[int]) -> list[int]:
    """Exchange units that go for units that stay where that lowers the loss, off-diagonal Fisher included.

    The units that stay are tried in order of their own importance, the least first: one joins those that go, and of
    them all the one comes back that leaves the least loss. So no exchange makes it larger.

    Args:
        fisher: `[U, U]`, F of one layer.
        removed: the units that go.

    Returns:
        As many units, ascending.
    """
    fisher, own = fisher.double(), fisher.double().diagonal()
    gone = torch.zeros(len(fisher), dtype=torch.bool)
    gone[list(removed)] = True
    if not removed:
        return []
    together = fisher[:, gone].sum(1)  # for each unit its Fisher with all that go
    for unit in torch.where(gone, torch.inf, own).argsort(stable=True)[: int((~gone).sum())].tolist():
        gone[unit] = True
        together += fisher[:, unit]
        # the loss without all of them but i is less by F_i,i / 2 + the sum of F_i,j over the others, half of this:
        gain = torch.where(gone, 2 * together - own, -torch.inf)
        back = unit if gain[unit] >= gain.max() else int(gain.argmax())
        gone[back] = False
        together -= fisher[:, back]
    return gone.nonzero().flatten().tolist()


def rescale(write: Tensor, products: Tensor, targets: Tensor, damping: float = DAMPING) -> Tensor:
    r"""Scales of the units, so that they together write what the layer wrote before.

    They minimize $\lVert \sum_u s_u W_u a_u - y \rVert^2 + \lambda \lVert s - 1 \rVert^2$ over all tokens.

    Args:
        write: `[U, S, M]`, what the units that stay write with.
        products: `[U*S, U*S]`, $X^\top X$ over tokens of what they hand on.
        targets: `[U*S, M]`, $X^\top Y$ over tokens with Y what shall be written, the Linear's bias apart.
        damping: λ as a share of the mean over units of $\lVert W_u a_u \rVert^2$.

    Returns:
        `[U]`, float64; all 1 where the solution scales some unit by more than 10, in either direction.
    """
    units, size, _ = write.shape
    write = write.double()
    between = (write.flatten(0, 1) @ write.flatten(0, 1).T) * products.double()
    squares = between.view(units, size, units, size).sum((1, 3))
    wanted = (write * targets.double().view_as(write)).sum((1, 2))
    ones = torch.ones(units, dtype=torch.float64)
    strength = damping * squares.diagonal().mean()
    if strength <= 0:
        return ones  # the units write nothing
    system = squares + strength * torch.eye(units, dtype=torch.float64)
    scales = ones + torch.linalg.solve(system, wanted - squares @ ones)
    return scales if scales.abs().max() <= LARGEST_SCALE else ones
