r"""How many units each layer keeps within a budget: the least loss that the money buys, by dynamic programming.

Every part of a model (a layer's heads, a layer's neurons) has levels: so many units kept, at a cost, with a loss. One
level of each part is chosen so that the losses add up to as little as possible and the costs to no more than B:

$$ \min \sum_p l_{p, k_p}, \quad \sum_p c_{p, k_p} \le B $$

ZipLM (Kurtic et al. 2023, arXiv 2302.04089) and SPDY (Frantar and Alistarh 2022, arXiv 2201.13096) search so. That
losses of parts add up is an assumption: what the model as a whole loses is seen only when it is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_BUCKETS = 10_000
"""Steps that a budget is divided into. A cost is rounded up by at most one of them, so that B is never exceeded."""


class Levels(NamedTuple):
    """What one part of a model may keep.

    Attributes:
        kept: how many units are kept at each level.
        costs: what each level costs, in the unit of the budget.
        losses: what each level loses, comparable between parts.
    """

    kept: Sequence[int]
    costs: Sequence[float]
    losses: Sequence[float]


def removal_losses(scores: Tensor) -> list[float]:
    """What is lost by keeping only the 0, 1, 2, ... most important units: the sum of the scores of all others.

    Args:
        scores: `[U]`, one per unit of a part.

    Returns:
        U + 1 numbers, the last of them 0.

    Example:
        >>> import torch
        >>> removal_losses(torch.tensor([3.0, 1.0, 2.0]))
        [6.0, 3.0, 1.0, 0.0]
    """
    ascending = scores.double().sort().values
    lost = ascending.cumsum(0).flip(0).tolist()
    return [*map(float, lost), 0.0]


def least(parts: Sequence[Levels]) -> float:
    """The smallest budget that any choice of levels stays within."""
    return sum(min(part.costs) for part in parts)


def choose(parts: Sequence[Levels], budget: float) -> list[int]:
    """How many units each part keeps: of all choices of levels within the budget, the one that loses least.

    Costs are rounded up to ten-thousandths of what the budget leaves above the cheapest levels. So a choice may be
    passed over whose costs come closer to the budget than one such step per part.

    Args:
        parts: at least one, each with at least one level.
        budget: B, at least `least(parts)`.

    Returns:
        The units that each part keeps.
    """
    spare = budget - least(parts)
    assert spare >= 0, "a budget below the least possible"
    steps = [_steps(part.costs, spare / _BUCKETS) for part in parts]
    best = np.zeros(_BUCKETS + 1)  # the least loss of the parts so far, by what they may spend above the cheapest
    taken: list[NDArray[np.int64]] = []  # and the last part's level there
    for part, step in zip(parts, steps, strict=True):
        found, level = np.full(_BUCKETS + 1, np.inf), np.zeros(_BUCKETS + 1, dtype=np.int64)
        for number, (paid, loss) in enumerate(zip(step.tolist(), part.losses, strict=True)):
            with_it = best[: max(_BUCKETS + 1 - paid, 0)] + loss
            is_better = with_it < found[paid:]
            found[paid:][is_better] = with_it[is_better]
            level[paid:][is_better] = number
        best = found
        taken.append(level)
    left, kept = _BUCKETS, list[int]()
    for part, step, level in zip(reversed(parts), reversed(steps), reversed(taken), strict=True):
        number = int(level[left])
        kept.append(part.kept[number])
        left -= int(step[number])
    return kept[::-1]


def _steps(costs: Sequence[float], unit: float) -> NDArray[np.int64]:
    """The steps of size `unit` that each level costs above the cheapest, rounded up; out of reach where that is 0."""
    above = np.asarray(costs) - min(costs)
    if unit == 0:
        return np.where(above > 0, _BUCKETS + 1, 0)
    return np.minimum(np.ceil(above / unit - 1e-9), _BUCKETS + 1).astype(np.int64)
