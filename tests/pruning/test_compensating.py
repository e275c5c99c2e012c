"""Criteria that solve for the weights that stay: group by group against what the functions they are made of say."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgemin.encoder import taps
from edgemin.errors import UserError
from edgemin.pruning import fisher, obs
from edgemin.pruning.criteria.base import Criterion, Given
from edgemin.pruning.criteria.table import CRITERIA, find
from edgemin.pruning.several import Several
from edgemin.pruning.structures import FFN, HEADS, Units

COMPENSATING = [name for name, criterion in CRITERIA.items() if criterion.changes_weights]
BOTH = Several([HEADS, FFN])
LAYERS, HEAD_COUNT, WIDTH = 2, 4, 48
EXAMPLES, LONGEST = 12, 9


def model(family: str = "bert") -> PreTrainedModel:
    return tiny.model(family, layers=LAYERS, heads=HEAD_COUNT).double()


def example(number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(5, 30, (1, 3 + number % (LONGEST - 2)), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([number % 2])}


def batches(size: int) -> list[dict[str, Tensor]]:
    def padded(name: str, number: int) -> Tensor:
        given = example(number)[name]
        return given[0] if name == "labels" else F.pad(given, (0, LONGEST - given.shape[1]))[0]

    return [
        {name: torch.stack([padded(name, i) for i in range(at, min(at + size, EXAMPLES))]) for name in example(0)}
        for at in range(0, EXAMPLES, size)
    ]


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def given(of: PreTrainedModel, structure: Units = BOTH, size: int = 5) -> Given:
    return Given(of, structure, batches(size), losses)


def chosen(heads: int = 3, ffn: int = 32) -> list[list[int]]:
    return [list(range(heads)) for _ in range(LAYERS)] + [list(range(ffn)) for _ in range(LAYERS)]


def readers(of: PreTrainedModel) -> list[nn.Linear]:
    return BOTH.readers(of)


def inputs_of(of: PreTrainedModel, group: int) -> Tensor:
    """What the group's Linear is given for all examples, each alone and without padding: [n, U*S]."""
    found: list[Tensor] = []
    handle = readers(of)[group].register_forward_pre_hook(lambda _module, given: found.append(given[0][0].detach()))
    for number in range(EXAMPLES):
        taps.logits(of, example(number))
    handle.remove()
    return torch.cat(found)


@pytest.mark.parametrize("name", COMPENSATING)
@pytest.mark.parametrize("family", tiny.CUTTABLE)
def test_cutting_what_was_left_out_changes_no_logit(family: str, name: str) -> None:
    start = model(family)
    before = tiny.logits(start, batches(5)[0])
    keep = find(name, "heads", "ffn").compensate(given(start), chosen())
    assert [len(kept) for kept in keep] == [3, 3, 32, 32] and all(kept == sorted({*kept}) for kept in keep)
    after = tiny.logits(start, batches(5)[0])
    HEADS.cut(start, keep[:LAYERS])
    FFN.cut(start, keep[LAYERS:])
    torch.testing.assert_close(tiny.logits(start, batches(5)[0]), after, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(before, after, rtol=1e-3)


@pytest.mark.parametrize("name", list(CRITERIA))
def test_where_all_stays_or_the_criterion_only_ranks_no_weight_changes(name: str) -> None:
    start = model()
    weights = tiny.weights(start)
    criterion = find(name, "heads", "ffn")
    everything = chosen(HEAD_COUNT, WIDTH)
    assert criterion.compensate(given(start), everything) == everything
    if not criterion.changes_weights:
        assert criterion.compensate(given(start), chosen()) == chosen()
    assert all(torch.equal(weights[key], now) for key, now in tiny.weights(start).items())


def solved(criterion: Criterion, size: int) -> tuple[PreTrainedModel, list[list[int]]]:
    start = model()
    return start, criterion.compensate(given(start, size=size), chosen())


@pytest.mark.parametrize("name", COMPENSATING)
def test_neither_padding_nor_the_batch_size_matters(name: str) -> None:
    one, keep = solved(find(name, "heads", "ffn"), 1)
    for size in (5, EXAMPLES):
        other, kept = solved(find(name, "heads", "ffn"), size)
        assert kept == keep
        for first, second in zip(readers(one), readers(other), strict=True):
            torch.testing.assert_close(first.weight, second.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", COMPENSATING)
def test_the_model_is_left_in_the_mode_it_was_in_and_other_weights_as_they_were(name: str) -> None:
    start = model().train()
    weights = tiny.weights(start)
    find(name, "heads", "ffn").compensate(given(start), chosen())
    assert start.training and all(parameter.grad is None for parameter in start.parameters())
    changed = {id(linear.weight) for linear in readers(start)}
    for key, parameter in start.named_parameters():
        assert torch.equal(parameter, weights[key]) == (id(parameter) not in changed)


def test_ziplm_solves_each_group_on_what_the_pruned_layers_in_front_give_it() -> None:
    start, expected = model(), model()
    units = BOTH.units(start)
    keep = find("ziplm", "heads", "ffn").compensate(given(start), chosen())
    for group in (0, 2, 1, 3):  # heads and FFN units of the first layer, then of the second
        inputs = inputs_of(expected, group)
        seen = obs.Inputs()
        seen.products, seen.tokens = inputs.T @ inputs, len(inputs)
        count = units[group] - len(chosen()[group])
        removal = obs.remove(readers(expected)[group].weight, seen.inverse_hessian(), units[group], count)
        assert sorted(removal.order) == sorted({*range(units[group])} - {*keep[group]})
        readers(expected)[group].weight.data = removal.weights[count]
        found = readers(start)[group].weight
        torch.testing.assert_close(found, readers(expected)[group].weight, rtol=1e-3, atol=1e-4)


def test_ziplm_ranks_units_in_the_order_in_which_they_leave_by_what_that_costs() -> None:
    start = model()
    found = find("ziplm", "heads", "ffn").scores(given(start))
    for group, scores in enumerate(found):
        inputs = inputs_of(start, group)
        seen = obs.Inputs()
        seen.products, seen.tokens = inputs.T @ inputs, len(inputs)
        removal = obs.remove(readers(start)[group].weight, seen.inverse_hessian(), len(scores), len(scores))
        ranked = scores[removal.order]
        assert bool((ranked.diff() >= 0).all())
        torch.testing.assert_close(ranked[0], removal.errors[1], rtol=1e-3, atol=0)
        torch.testing.assert_close(ranked.max(), removal.errors.diff().max(), rtol=1e-3, atol=0)


def test_kwon_exchanges_units_by_all_of_the_fisher_information_and_scales_those_that_stay() -> None:
    start, full = model(), model()
    units = BOTH.units(start)
    keep = find("kwon", "heads", "ffn").compensate(given(start), chosen())
    expected = copy.deepcopy(full)
    for group, count in enumerate(units):
        gradients = gate_gradients(full, group)
        gone = fisher.rearrange(gradients.T @ gradients, sorted({*range(count)} - {*chosen()[group]}))
        assert keep[group] == sorted({*range(count)} - {*gone})
        size = readers(full)[group].weight.shape[1] // count
        columns = [unit * size + place for unit in gone for place in range(size)]
        readers(expected)[group].weight.data[:, columns] = 0
    for group in (0, 2, 1, 3):
        inputs, linear = inputs_of(expected, group), readers(expected)[group]
        wanted = (inputs_of(full, group) @ readers(full)[group].weight.T).flatten()
        by_unit = inputs.unflatten(1, (units[group], -1))[:, keep[group]]
        write = linear.weight.T.unflatten(0, (units[group], -1))[keep[group]]
        single = torch.einsum("nus,usm->nmu", by_unit, write).flatten(0, 1)
        root = (fisher.DAMPING * single.square().sum(0).mean()).sqrt() * torch.eye(single.shape[1]).double()
        targets = torch.cat([wanted, root.sum(1)])
        scales = torch.linalg.lstsq(torch.cat([single, root]), targets).solution
        assert scales.abs().max() < fisher.LARGEST_SCALE and (scales - 1).abs().max() > 0.01
        whole = torch.zeros(units[group]).double().index_copy_(0, torch.tensor(keep[group]), scales.detach())
        linear.weight.data *= whole.repeat_interleave(linear.weight.shape[1] // units[group])
        torch.testing.assert_close(readers(start)[group].weight, linear.weight, rtol=1e-3, atol=1e-4)


def gate_gradients(of: PreTrainedModel, group: int) -> Tensor:
    """By each example alone, the gradient of its loss by gates in front of the group's Linear: [n, U]."""
    units = BOTH.units(of)[group]
    rows = []
    for number in range(EXAMPLES):
        gates = torch.ones(units, dtype=torch.float64, requires_grad=True)
        handle = readers(of)[group].register_forward_pre_hook(
            lambda module, given, gates=gates: (given[0] * gates.repeat_interleave(module.in_features // units),)
        )
        loss = losses(taps.logits(of, example(number)), example(number)["labels"])
        handle.remove()
        rows.append(torch.autograd.grad(loss.sum(), gates)[0])
    return torch.stack(rows)


def test_half_the_fisher_information_is_what_a_gate_costs_to_second_order_by_single_examples() -> None:
    start = model()
    found = find("fisher", "heads", "ffn").scores(given(start))
    for group, scores in enumerate(found):
        torch.testing.assert_close(scores, gate_gradients(start, group).square().mean(0))


@pytest.mark.parametrize("name", COMPENSATING)
def test_structures_without_one_linear_behind_them_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"^criterion: expected one of .* for layers, given '{name}'$"):
        find(name, "layers")
