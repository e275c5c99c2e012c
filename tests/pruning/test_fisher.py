"""Retraining-free pruning: rearrangement and scales against brute force, plain loops and least squares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from edgemin.pruning import fisher


def gates(examples: int = 40, units: int = 6) -> Tensor:
    """Gradients of gates, some of which almost cancel each other: [n, U]."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(examples, units, generator=generator).double() * torch.linspace(0.5, 1.5, units)
    found[:, 5] = -found[:, 4] + 0.1 * found[:, 5]
    return found


def loss_without(gone: list[int], gradients: Tensor) -> float:
    return float(gradients[:, gone].sum(1).square().mean() / 2)


def rearranged_by_loop(gradients: Tensor, removed: list[int]) -> list[int]:
    """The paper's greedy exchange, on the gradients themselves."""
    gone = list(removed)
    own = gradients.square().mean(0)
    for unit in sorted(set(range(gradients.shape[1])) - set(gone), key=lambda u: float(own[u])):
        gone.append(unit)
        gone.remove(min(gone[::-1], key=lambda back: loss_without([u for u in gone if u != back], gradients)))
    return sorted(gone)


@pytest.mark.parametrize("removed", [[], [0], [0, 1], [0, 1, 2], [0, 1, 2, 3, 4]])
def test_the_rearrangement_is_the_papers_and_never_makes_the_loss_larger(removed: list[int]) -> None:
    gradients = gates()
    found = fisher.rearrange(gradients.T @ gradients / len(gradients), removed)
    assert found == rearranged_by_loop(gradients, removed)
    assert loss_without(found, gradients) <= loss_without(removed, gradients) + 1e-12


def test_a_unit_that_makes_up_for_one_that_goes_takes_the_place_of_another() -> None:
    noise = torch.randn(40, 2, generator=torch.Generator().manual_seed(0)).double()
    noise = noise / noise.square().mean(0).sqrt()
    gradients = torch.stack([noise[:, 0], 1.1 * noise[:, 1], -1.2 * noise[:, 1]], dim=1)
    assert fisher.rearrange(gradients.T @ gradients / 40, [0, 1]) == [1, 2]


@pytest.mark.parametrize(("units", "size"), [(6, 1), (4, 3)])
def test_scales_are_the_damped_least_squares_solution(units: int, size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    tokens, outputs = 50, 5
    write = torch.randn(units, size, outputs, generator=generator).double()
    inputs = torch.randn(tokens, units * size, generator=generator).double()
    wanted = torch.randn(tokens, outputs, generator=generator).double() + inputs @ write.flatten(0, 1)
    found = fisher.rescale(write, inputs.T @ inputs, inputs.T @ wanted, damping=0.01)
    # [n * M, U]: what each unit writes
    single = torch.stack([(inputs.view(tokens, units, size)[:, u] @ write[u]).flatten() for u in range(units)], dim=1)
    root = (0.01 * single.square().sum(0).mean()).sqrt() * torch.eye(units, dtype=torch.float64)
    rows = torch.cat([single, root])
    expected = torch.linalg.lstsq(rows, torch.cat([wanted.flatten(), root @ torch.ones(units).double()])).solution
    torch.testing.assert_close(found, expected)


def test_scales_of_a_layer_that_writes_what_it_should_are_one() -> None:
    write = torch.eye(4)[:, None]
    inputs = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)).double()
    products = inputs.T @ inputs
    torch.testing.assert_close(fisher.rescale(write, products, products, 0.01), torch.ones(4).double())
    nothing = fisher.rescale(torch.zeros(4, 1, 3), products, torch.zeros(4, 3), 0.01)
    assert torch.equal(nothing, torch.ones(4).double())


@pytest.mark.parametrize("factor", [30.0, -30.0])
def test_a_layer_whose_scales_run_away_is_left_as_it_is(factor: float) -> None:
    write, products = torch.eye(3)[:, None], torch.eye(3)
    assert torch.equal(fisher.rescale(write, products, factor * products, 0.01), torch.ones(3).double())
    assert fisher.rescale(write, products, 3 * products, 0.01).max() == pytest.approx(1 + 2 / 1.01)
