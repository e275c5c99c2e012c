r"""Retraining-free pruning by Fisher information: which units stay, and by how much they grow (Kwon et al. 2022).

Every unit has a gate that multiplies what it hands on, 1 in the model as it is (arXiv 2204.09656). With g(x) the
gradient of example x's own loss by the gates, the loss without the units S is to second order

$$
L(S) \approx L + \tfrac12 \sum_{i, j \in S} F_{ij}, \qquad F = \operatorname{mean}_x g(x) g(x)^\top
$$

Three steps: a search keeps the units with the most of F's diagonal within a number of operations; a rearrangement
within each layer takes in the rest of F; and units that stay are scaled so that the layer gives what it gave before.

Shapes: n examples or tokens, U units of a layer, S size of a unit, M outputs of the Linear that reads them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgemin.errors import UserError

DAMPING = 0.01  # of scales, as a share of the mean of what a unit writes, squared
LARGEST_SCALE = 10.0  # a layer whose least squares solution scales any unit more than that is left as it is


def search(
    heads: Sequence[Tensor], neurons: Sequence[Tensor], *, head_macs: float, neuron_macs: float, budget: float
) -> tuple[list[list[int]], list[list[int]]]:
    """The units of most importance that a number of operations pays for; of every layer one head and one neuron stay.

    For each number of heads, the best so many, and what is left is spent on the best neurons; the number of heads that
    keeps most importance wins, the lower one among equals. What every layer keeps is paid for like all others.

    Args:
        heads: importance of the heads, `[A_l]` per layer, not negative.
        neurons: importance of the neurons, `[F_l]` per layer, in the same unit.
        head_macs: what a head costs, as in [`unit_macs`][edgemin.pruning.fisher.unit_macs].
        neuron_macs: what a neuron costs.
        budget: what all heads and neurons that stay may cost together.

    Returns:
        Heads and neurons to keep, ascending, per layer.

    Raises:
        UserError: the budget does not pay for one head and one neuron in every layer.
    """
    least = len(heads) * head_macs + len(neurons) * neuron_macs
    if budget < least:
        raise UserError(
            f"value: expected at least {least:.0f}, one head and one neuron in every layer, given {budget:.0f}"
        )
    first, second = _ranked(heads), _ranked(neurons)
    kept_by = [
        torch.tensor([0.0, *(score for score, _, _ in ranked)], dtype=torch.float64).cumsum(0)
        for ranked in (first, second)
    ]
    best = (-1.0, 0, 0)
    for count in range(len(heads), len(first) + 1):
        paid = int((budget - count * head_macs) / neuron_macs + 1e-9)
        others = min(paid, len(second))
        if others >= len(neurons):
            found = float(kept_by[0][count] + kept_by[1][others])
            best = max(best, (found, count, others), key=lambda one: one[0])
    return _chosen(first[: best[1]], len(heads)), _chosen(second[: best[2]], len(neurons))


def unit_macs(tokens: float, hidden: int, head_size: int) -> tuple[float, float]:
    """Multiply-accumulates of one head (its queries, keys, values and output, and attention itself) and of one neuron.

    Args:
        tokens: n, what a sentence of the task has on average.
        hidden: H, the width of the residual stream.
        head_size: D.
    """
    return 4 * tokens * hidden * head_size + 2 * tokens**2 * head_size, 2 * tokens * hidden


def _ranked(layers: Sequence[Tensor]) -> list[tuple[float, int, int]]:
    """All units as importance, layer, unit: first the best of every layer, which stays, then the others, best first."""
    units = [(float(score), layer, unit) for layer, row in enumerate(layers) for unit, score in enumerate(row)]
    units.sort(key=lambda one: (-one[0], one[1], one[2]))
    best = {layer: int(row.argmax()) for layer, row in enumerate(layers)}
    return sorted(units, key=lambda one: best[one[1]] != one[2])  # stable: by importance inside both groups


def _chosen(units: Sequence[tuple[float, int, int]], layers: int) -> list[list[int]]:
    return [sorted(unit for _, place, unit in units if place == layer) for layer in range(layers)]


def rearrange(fisher: Tensor, removed: Sequence[int]) -> list[int]:
    """Exchange units that go for units that stay, as the loss without all that go says, off-diagonal Fisher included.

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
