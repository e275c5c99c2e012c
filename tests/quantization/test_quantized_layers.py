"""Quantized layers: what slices keep, what scales do in training, what a checkpoint and a file hold."""

from __future__ import annotations

import copy
from typing import Literal

import pytest
import torch
from torch import nn

from edgemin.encoder.slicing import slice_weight
from edgemin.quantization.base import Quantized
from edgemin.quantization.layers import QuantizedEmbedding, QuantizedLinear
from edgemin.quantization.weights import Spec

SPECS = [Spec(8, "tensor"), Spec(4, "channel"), Spec(3, "group", 4), Spec(2, "group", 4)]


def linear(spec: Spec, rows: int = 6, columns: int = 16, seed: int = 0) -> QuantizedLinear:
    torch.manual_seed(seed)
    layer = QuantizedLinear(nn.Linear(columns, rows), spec)
    layer.fit_weights("mse")
    layer.settle()
    return layer.eval()


def integers(layer: Quantized) -> torch.Tensor:
    return layer.integers()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_settled_layer_computes_what_it_computed_before(spec: Spec) -> None:
    torch.manual_seed(1)
    layer = QuantizedLinear(nn.Linear(16, 6), spec)
    layer.fit_weights("mse")
    values = torch.randn(3, 16)
    before = layer(values)
    layer.settle()
    assert torch.equal(layer(values), before)
    assert torch.equal(layer.train()(values), before)  # rounding what is rounded changes nothing


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_unpacking_gives_the_very_layer_back(spec: Spec) -> None:
    layer, other = linear(spec), linear(spec, seed=5)
    other.unpack(layer.packed())
    assert torch.equal(other.weight, layer.weight) and torch.equal(other.weight_scale, layer.weight_scale)
    assert layer.packed()["weight_packed"].dtype == torch.uint8


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_quantize_then_slice_is_slice_then_quantize_at_the_same_scales(spec: Spec) -> None:
    layer = linear(spec)
    rows, columns = torch.tensor([4, 0, 5]), torch.arange(4, 12)  # whole groups
    expected = integers(layer)[rows][:, columns]
    sliced = copy.deepcopy(layer)
    slice_weight(sliced, rows, columns)
    assert torch.equal(integers(sliced), expected)
    assert sliced.rescaled == 0 and (sliced.out_features, sliced.in_features) == (3, 8)
    first_sliced = nn.Linear(8, 3)
    with torch.no_grad():
        first_sliced.weight.copy_(layer.weight[rows][:, columns])
        first_sliced.bias.copy_(layer.bias[rows])
    again = QuantizedLinear(first_sliced, spec)
    again.weight_scale = sliced.weight_scale.clone()
    values = torch.randn(2, 8)
    assert torch.equal(again.eval()(values), sliced(values))


def test_groups_that_a_cut_goes_through_are_scaled_again_and_the_others_are_not() -> None:
    layer = linear(Spec(4, "group", 4))
    before, scale = layer.weight.clone(), layer.weight_scale.clone()
    columns = torch.tensor([0, 1, 2, 3, 4, 5, 8, 9, 12, 13, 14])  # whole; of two; whole but for the last column
    slice_weight(layer, None, columns)
    assert layer.rescaled == 6 and layer.weight_scale.shape == (6, 3)
    assert torch.equal(layer.weight_scale[:, 0], scale[:, 0]) and torch.equal(layer.weight_scale[:, 2], scale[:, 3])
    found = layer.quantized_weight()
    assert torch.equal(found[:, :4], before[:, :4]) and torch.equal(found[:, 8:], before[:, 12:15])
    # of the group that is new no weight moves further than half a step of its own, or beyond its end
    step = layer.weight_scale[:, 1:2]
    moved, clipped = (found[:, 4:8] - before[:, columns[4:8]]).abs(), before[:, columns[4:8]] > 7.5 * step
    assert bool(((moved <= step / 2 + 1e-6) | clipped).all())


def test_a_sliced_layer_is_packed_and_comes_back() -> None:
    layer = linear(Spec(3, "group", 4))
    slice_weight(layer, torch.tensor([1, 2]), torch.arange(7))  # a last group of three
    layer.settle()
    torch.manual_seed(9)
    other = QuantizedLinear(nn.Linear(7, 2), layer.spec)
    other.unpack(layer.packed())
    assert torch.equal(other.weight, layer.weight)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_an_embedding_rounds_the_rows_it_reads_as_it_would_the_whole_table(spec: Spec) -> None:
    torch.manual_seed(2)
    layer = QuantizedEmbedding(nn.Embedding(10, 8, padding_idx=3), spec)
    layer.fit_weights("mse")
    ids = torch.tensor([[1, 9, 3], [3, 0, 1]])
    assert torch.equal(layer(ids), layer.quantized_weight()[ids])
    layer(ids).sum().backward()
    assert layer.weight.grad is not None
    assert set(layer.weight.grad.abs().sum(1).nonzero().flatten().tolist()) <= {0, 1, 9}
    slice_weight(layer, torch.tensor([9, 3, 1]), None)
    assert (layer.padding_idx, layer.num_embeddings) == (1, 3)


@pytest.mark.parametrize("scales", ["fixed", "moving", "learned"])
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_scales_stay_follow_or_learn(scales: Literal["fixed", "moving", "learned"], kind: str) -> None:
    torch.manual_seed(3)
    spec = Spec(4, "group", 4)
    layer: QuantizedLinear | QuantizedEmbedding
    layer = QuantizedLinear(nn.Linear(8, 4), spec) if kind == "linear" else QuantizedEmbedding(nn.Embedding(4, 8), spec)
    layer.fit_weights("mse")
    before = layer.weight_scale.clone()
    layer.follow(scales)
    names = {name for name, _ in layer.named_parameters()}
    assert ("weight_scale" in names) == (scales == "learned")
    layer.train()
    with torch.no_grad():
        layer.weight *= 2
    given = torch.randn(3, 8) if kind == "linear" else torch.tensor([0, 1, 3])
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    layer(given).square().sum().backward()
    optimizer.step()
    layer.follow("fixed")
    now = layer.weight_scale
    if scales == "fixed":
        assert torch.equal(now, before)
    elif scales == "moving":  # the weights are about twice as large, and so are their scales
        assert bool(((now / before - 2).abs() < 0.2).all()) and not torch.equal(now, before)
    else:
        assert not torch.equal(now, before)
    layer.settle()
    assert torch.equal(layer.weight_scale, layer.weight_scale.half().float())


def test_moving_ranges_of_activations_follow_an_average_and_learned_ones_a_gradient() -> None:
    torch.manual_seed(4)
    layer = QuantizedLinear(nn.Linear(8, 4), Spec(8, "channel", None, "static"))
    layer.fit_weights("minmax")
    layer.fit_inputs(torch.tensor(-1.0), torch.tensor(1.0))
    layer.follow("moving")
    layer.train()
    low, high = (float(end) for end in layer.input_range)
    layer(torch.full((2, 8), 5.0))
    assert float(layer.input_range[1]) == pytest.approx(0.99 * high + 0.05, rel=1e-5)
    assert float(layer.input_range[0]) == pytest.approx(0.99 * low + 0.05, rel=1e-5)
    span = float(layer.input_range[1] - layer.input_range[0])
    assert float(layer.input_scale) == pytest.approx(span / 255, rel=1e-5)
    layer.follow("learned")
    assert isinstance(layer.input_scale, nn.Parameter)
    layer(torch.randn(2, 8)).sum().backward()
    assert layer.input_scale.grad is not None and float(layer.input_scale.grad) != 0
    layer.follow("fixed")
    assert not isinstance(layer.input_scale, nn.Parameter) and "input_range" not in layer._buffers
