"""Hard concrete gates against their own frequencies, plain loops and a descent that ends at the target."""

from __future__ import annotations

import math

import pytest
import torch

from edgemin.encoder.gates import Gates
from edgemin.pruning import hard_concrete

ALPHAS = [-4.0, -1.0, 0.0, 0.7, 3.0]


@pytest.mark.parametrize("log_alpha", ALPHAS)
def test_gates_are_open_as_often_as_is_said(log_alpha: float) -> None:
    uniform = (torch.arange(100_000).double() + 0.5) / 100_000  # every quantile once: no chance is left
    gates = hard_concrete.sample(torch.tensor(log_alpha).double(), uniform)
    assert gates.min() >= 0 and gates.max() <= 1
    expected = hard_concrete.open_probability(torch.tensor(log_alpha).double()).item()
    assert (gates > 0).double().mean().item() == pytest.approx(expected, abs=2e-5)
    for u in (0.1, 0.5, 0.9):
        s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + log_alpha) * 1.5))
        found = hard_concrete.sample(torch.tensor(log_alpha).double(), torch.tensor(u).double())
        assert found.item() == pytest.approx(min(1.0, max(0.0, s * 1.2 - 0.1)))


def test_a_gate_learns_only_where_it_is_neither_open_nor_closed() -> None:
    log_alpha = torch.tensor([0.0, 0.0, 0.0], requires_grad=True)
    hard_concrete.sample(log_alpha, torch.tensor([0.001, 0.5, 0.999])).sum().backward()
    assert log_alpha.grad is not None
    assert log_alpha.grad[0] == 0 and log_alpha.grad[1] > 0 and log_alpha.grad[2] == 0


def test_at_test_time_as_many_gates_are_closed_as_are_expected_to_be() -> None:
    log_alpha = torch.tensor([2.0, -6.0, 0.5, -5.0, 4.0, -7.0])
    gates = hard_concrete.settled(log_alpha)
    assert gates.nonzero().flatten().tolist() == [0, 2, 4]
    torch.testing.assert_close(gates[[0, 2, 4]], torch.sigmoid(log_alpha[[0, 2, 4]] * 1.5 * 0.8))
    assert hard_concrete.settled(torch.full((4,), 10.0)).min() > 0.99
    assert not hard_concrete.settled(torch.full((4,), -10.0)).any()


def test_expected_weights_are_a_loop_over_all_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    layers, heads, size, units, hidden = 2, 3, 4, 5, 6
    gates = Gates(*(torch.rand(shape, generator=generator) for shape in [(2,), (2, 3), (2,), (2, 5), (6,)]))
    expected = 0.0
    for layer in range(layers):
        for one in range(hidden):
            for head in range(heads):
                expected += 4 * size * float(gates.attention[layer] * gates.heads[layer, head] * gates.hidden[one])
            for unit in range(units):
                expected += 2 * float(gates.ffn[layer] * gates.units[layer, unit] * gates.hidden[one])
    assert float(hard_concrete.expected_weights(gates, size)) == pytest.approx(expected, rel=1e-5)
    whole = Gates(*(torch.ones_like(gate) for gate in gates))
    assert float(hard_concrete.expected_weights(whole, size)) == layers * hidden * (4 * heads * size + 2 * units)


def test_mixed_precision_does_not_round_the_expected_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    gates = Gates(*(torch.rand(shape, generator=generator) for shape in [(12,), (12, 12), (12,), (12, 96), (64,)]))
    expected = float(hard_concrete.expected_weights(gates, 64))
    with torch.autocast("cpu", torch.bfloat16):
        assert float(hard_concrete.expected_weights(gates, 64)) == pytest.approx(expected, rel=1e-6)


def test_the_target_is_warmed_up_to() -> None:
    assert [hard_concrete.target_sparsity(0.6, step, 4) for step in (0, 1, 4, 9)] == pytest.approx([0, 0.15, 0.6, 0.6])
    assert hard_concrete.target_sparsity(0.6, 0, 0) == 0.6


@pytest.mark.parametrize("target", [0.3, 0.8])
def test_descent_of_gates_and_ascent_of_multipliers_end_at_the_target(target: float) -> None:
    log_alpha = torch.full((40,), 2.0, requires_grad=True)
    multipliers = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([{"params": [log_alpha], "lr": 0.1}, {"params": [multipliers], "lr": 0.1}])
    for _ in range(600):
        optimizer.zero_grad()
        sparsity = 1 - hard_concrete.open_probability(log_alpha).mean()
        hard_concrete.lagrangian(sparsity, target, multipliers[0], multipliers[1]).backward()
        assert multipliers.grad is not None
        multipliers.grad.neg_()
        optimizer.step()
        hard_concrete.limit(log_alpha)
    assert log_alpha.abs().max() <= math.log(100) + 1e-6
    assert 1 - hard_concrete.open_probability(log_alpha).mean().item() == pytest.approx(target, abs=0.02)
