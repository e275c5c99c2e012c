"""The search within a budget against every choice there is, and its arithmetic."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from edgemin.pruning.budget import Levels, choose, least, removal_losses


def drawn(seed: int) -> list[Levels]:
    draw = np.random.default_rng(seed)
    parts = []
    for _ in range(int(draw.integers(1, 6))):
        levels = int(draw.integers(1, 6))
        parts.append(Levels(list(range(1, levels + 1)), list(draw.random(levels)), list(draw.random(levels))))
    return parts


def by_hand(parts: list[Levels], budget: float) -> float:
    """The least loss over all choices within the budget."""
    every = itertools.product(*(range(len(part.kept)) for part in parts))
    sums = [
        (
            sum(part.costs[level] for part, level in zip(parts, levels, strict=True)),
            sum(part.losses[level] for part, level in zip(parts, levels, strict=True)),
        )
        for levels in every
    ]
    return min(loss for cost, loss in sums if cost <= budget)


def sums(parts: list[Levels], kept: list[int]) -> tuple[float, float]:
    places = [part.kept.index(count) for part, count in zip(parts, kept, strict=True)]
    costs = sum(part.costs[place] for part, place in zip(parts, places, strict=True))
    return costs, sum(part.losses[place] for part, place in zip(parts, places, strict=True))


@pytest.mark.parametrize("seed", range(40))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    parts = drawn(seed)
    most = sum(max(part.costs) for part in parts)
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        budget = least(parts) + share * (most - least(parts))
        cost, loss = sums(parts, choose(parts, budget))
        slack = 1e-3 * (budget - least(parts))  # costs are rounded up
        assert cost <= budget + 1e-12
        assert by_hand(parts, budget) <= loss + 1e-12
        assert loss <= by_hand(parts, max(budget - slack, least(parts))) + 1e-12


def test_more_money_never_loses_more() -> None:
    parts = drawn(7)
    spent = [sums(parts, choose(parts, least(parts) + more))[1] for more in np.linspace(0, 3, 30)]
    assert spent == sorted(spent, reverse=True)
    assert spent[-1] == sum(min(part.losses) for part in parts)


def test_ties_and_free_levels() -> None:
    free = Levels([4, 8], [1.0, 1.0], [2.0, 0.0])
    assert choose([free, free], 2.0) == [8, 8]


def test_removal_losses_are_sums_of_the_least_important() -> None:
    scores = torch.tensor([0.3, 0.1, 0.6])
    assert removal_losses(scores) == pytest.approx([1.0, 0.4, 0.1, 0.0])
