"""Optimal brain surgeon by structure: against least squares in float64, brute force and the real error."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from edgemin.pruning import obs

TOKENS, OUTPUTS = 60, 7
SHAPES = [pytest.param(6, 1, id="neurons"), pytest.param(5, 3, id="heads")]


def problem(units: int, size: int) -> tuple[Tensor, Tensor]:
    """Weights [M, U*S], and inputs [n, U*S] that depend on each other and have no mean of 0."""
    generator = torch.Generator().manual_seed(units)
    width = units * size
    mixing = torch.eye(width) + 0.4 * torch.randn(width, width, generator=generator)
    inputs = torch.randn(TOKENS, width, generator=generator) @ mixing + 0.5
    return torch.randn(OUTPUTS, width, generator=generator).double(), inputs.double()


def inverse(inputs: Tensor) -> Tensor:
    seen = obs.Inputs()
    seen.products, seen.tokens = inputs.T @ inputs, len(inputs)
    return seen.inverse_hessian()


def surgeon(weight: Tensor, inputs: Tensor, units: int, count: int, **settings: Iterable[int]) -> obs.Removal:
    return obs.remove(weight, inverse(inputs), units, count, **{name: [*given] for name, given in settings.items()})


def strength(inputs: Tensor) -> float:
    """λ."""
    return obs.DAMPING * 2 / len(inputs) * inputs.square().sum().item() / inputs.shape[1]


def increase(before: Tensor, after: Tensor, inputs: Tensor) -> float:
    """What the change costs: the mean squared error of the outputs, and the damping's share."""
    error = (inputs @ after.T - inputs @ before.T).square().sum() / len(inputs)
    return float(error + strength(inputs) / 2 * (after - before).square().sum())


def best_without(weight: Tensor, inputs: Tensor, size: int, gone: list[int]) -> Tensor:
    """The weights without these units that cost least, by least squares."""
    columns = torch.tensor([c for c in range(weight.shape[1]) if c // size not in gone])
    root = (strength(inputs) / 2) ** 0.5 * torch.eye(weight.shape[1], dtype=torch.float64)
    rows = torch.cat([inputs / len(inputs) ** 0.5, root])
    solved = torch.linalg.lstsq(rows[:, columns], rows @ weight.T).solution
    whole = torch.zeros_like(weight)
    whole[:, columns] = solved.T
    return whole


@pytest.mark.parametrize(("units", "size"), SHAPES)
def test_what_stays_is_the_least_squares_solution_without_the_units_that_left(units: int, size: int) -> None:
    weight, inputs = problem(units, size)
    found = surgeon(weight, inputs, units, units - 1, keep_at=range(units))
    assert torch.equal(found.weights[0], weight)
    for count in range(1, units):
        expected = best_without(weight, inputs, size, found.order[:count])
        torch.testing.assert_close(found.weights[count], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("units", "size"), SHAPES)
def test_the_error_is_what_the_outputs_really_lose_at_every_level(units: int, size: int) -> None:
    weight, inputs = problem(units, size)
    found = surgeon(weight, inputs, units, units, keep_at=range(units + 1))
    real = [increase(weight, found.weights[count], inputs) for count in range(units + 1)]
    torch.testing.assert_close(found.errors, torch.tensor(real, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    assert all(one < more for one, more in pairwise(real))
    assert not found.weights[units].any()


@pytest.mark.parametrize(("units", "size"), SHAPES)
def test_each_step_removes_the_unit_that_brute_force_finds(units: int, size: int) -> None:
    weight, inputs = problem(units, size)
    gone: list[int] = []
    for unit in surgeon(weight, inputs, units, units - 1).order:
        costs = {
            candidate: increase(weight, best_without(weight, inputs, size, [*gone, candidate]), inputs)
            for candidate in set(range(units)) - set(gone)
        }
        assert unit == min(costs, key=costs.__getitem__)
        gone.append(unit)


def test_dropping_what_has_left_changes_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = problem(24, 2)
    compact = surgeon(weight, inputs, 24, 24, keep_at=range(25))
    monkeypatch.setattr(obs, "_COMPACT_BELOW", 0.0)
    whole = surgeon(weight, inputs, 24, 24, keep_at=range(25))
    assert compact.order == whole.order
    torch.testing.assert_close(compact.errors, whole.errors, rtol=1e-10, atol=0)
    for level, weights in compact.weights.items():
        torch.testing.assert_close(weights, whole.weights[level], rtol=1e-9, atol=1e-12)


def test_a_duplicate_leaves_first_and_its_twin_takes_over() -> None:
    weight, inputs = problem(6, 1)
    inputs[:, 4] = inputs[:, 1]
    found = surgeon(weight, inputs, 6, 1)
    assert found.order[0] in (1, 4)
    twin = 5 - found.order[0]
    # all but what the damping holds back, which is the same on both
    assert increase(weight, found.weights[1], inputs) < 0.05 * increase(weight, weight.clone().fill_(0.0), inputs)
    assert found.weights[1][:, twin].sum() == pytest.approx(weight[:, [1, 4]].sum().item(), rel=0.1)


def test_dead_inputs_cost_nothing_and_a_layer_of_them_is_no_special_case() -> None:
    weight, inputs = problem(6, 1)
    inputs[:, [0, 3]] = 0.0
    found = surgeon(weight * 1e-3, inputs, 6, 3)
    assert set(found.order[:2]) == {0, 3}
    nothing = surgeon(weight, torch.zeros_like(inputs), 6, 6)
    assert nothing.order and nothing.errors[-1] < 1e-9


def test_padding_and_the_batch_size_do_not_enter_the_hessian() -> None:
    _, inputs = problem(6, 1)
    padded = torch.full((2, 40, 6), torch.nan)
    mask = torch.zeros(2, 40, dtype=torch.long)
    padded[0, :35], padded[1, :25] = inputs[:35].float(), inputs[35:].float()
    mask[0, :35], mask[1, :25] = 1, 1
    together, apart = obs.Inputs(), obs.Inputs()
    together.add(padded, mask)
    for example in range(2):
        apart.add(padded[example : example + 1], mask[example : example + 1])
    for found in (together, apart):
        assert found.tokens == TOKENS and found.products is not None
        torch.testing.assert_close(found.products, inputs.T @ inputs, rtol=1e-5, atol=1e-4)


def test_weights_keep_their_precision_and_what_is_given_stays_as_it_was() -> None:
    weight, inputs = problem(6, 1)
    given = inverse(inputs)
    before = weight.float(), given.clone()
    found = obs.remove(before[0], given, 6, 2)
    assert found.weights[2].dtype == torch.float32 and not found.weights[2][:, found.order].any()
    assert torch.equal(before[0], weight.float()) and torch.equal(given, before[1])
