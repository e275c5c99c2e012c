"""From gates that were learnt to a smaller model: which stay at the sparsity that was asked for, and the surgery.

Sparsity is the share of the weights of all layers' matrices that is gone, biases, embeddings and head apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from edgemin.encoder import gates, slicing
from edgemin.encoder.gates import Gates
from edgemin.encoder.outline import LayerOutline, Outline
from edgemin.encoder.parts import layers
from edgemin.pruning import hard_concrete

_FARTHEST, _HALVINGS = 40.0, 50  # the search for a shift of log α: its range, and how often that is halved


def sparsity(before: Outline, after: Outline) -> float:
    """The share of the weights in the layers' matrices that is gone."""
    whole, left = (
        sum(matrix.size[0] * matrix.size[1] for matrix in outline.matrices.values() if matrix.place.isdigit())
        for outline in (before, after)
    )
    return 1 - left / whole


def ffn_matrices(layer: LayerOutline) -> int:
    """How many matrices of a layer have a row or column for each FFN unit."""
    return 3 if layer.gated else 2


def expected_sparsity(open_probability: Gates, outline: Outline) -> Tensor:
    """The expected sparsity, from each gate's probability to be open; differentiable."""
    first = outline.layers[0]
    left = hard_concrete.expected_weights(open_probability, first.head_size, ffn_matrices(first))
    return 1 - left / _weights(outline, everything(outline))


class Left(NamedTuple):
    """How much of a model stays.

    Attributes:
        layers: for each layer whether it stays.
        heads: for each layer, those that go included, the number of heads.
        units: likewise the number of FFN units.
        hidden: the hidden size.
    """

    layers: list[bool]
    heads: list[int]
    units: list[int]
    hidden: int


def everything(outline: Outline) -> Left:
    """All of a model, whose widths must be known."""
    heads, units = [layer.heads for layer in outline.layers], [layer.ffn for layer in outline.layers]
    assert None not in heads + units
    return Left([True] * len(heads), [count or 0 for count in heads], [count or 0 for count in units], outline.hidden)


def greatest_sparsity(outline: Outline, multiple: int) -> float:
    """The sparsity when only one layer with one head is left, and `multiple` FFN and hidden units."""
    whole, others = everything(outline), [False] * (len(outline.layers) - 1)
    units = [min(multiple, count) for count in whole.units]
    least = Left([True, *others], [1] * len(whole.heads), sorted(units, reverse=True), min(multiple, whole.hidden))
    return sparsity_of(least, outline)


def left(log_alpha: Gates, shift: float, multiple: int, block_shift: float | None = None) -> Left:
    """What stays if every log α were larger by `shift`: as many of each group as are then expected to be open.

    Whole blocks (a layer's attention, its FFN) may have a shift of their own, `block_shift`.

    The smaller model has no layer without a head or without FFN units. So one head stays in a layer whose attention is
    closed, `multiple` units where its FFN is; a layer goes where both are. FFN and hidden units are rounded up to a
    multiple. One layer stays in any case.
    """

    def count(gate: Tensor, least: int, of: int, is_open: bool = True) -> int:
        expected = hard_concrete.expected_open(gate, shift) if is_open else 0
        return min(len(gate), -(-max(expected, least) // of) * of)

    of_blocks = shift if block_shift is None else block_shift
    blocks = [
        [hard_concrete.expected_open(gate[None], of_blocks) > 0 for gate in kind]
        for kind in (log_alpha.attention, log_alpha.ffn)
    ]
    stays = [attention or ffn for attention, ffn in zip(*blocks, strict=True)]
    if not any(stays):
        stays[int(torch.maximum(log_alpha.attention, log_alpha.ffn).argmax())] = True
    heads = [count(gate, 1, 1, is_open) for gate, is_open in zip(log_alpha.heads, blocks[0], strict=True)]
    units = [count(gate, 1, multiple, is_open) for gate, is_open in zip(log_alpha.units, blocks[1], strict=True)]
    return Left(stays, heads, units, count(log_alpha.hidden, 1, multiple))


def settled(log_alpha: Gates, outline: Outline, target: float, multiple: int) -> Gates:
    """The gates at the end, of a model that has at least the sparsity asked for, and as little more as can be.

    The largest shift of log α at which that holds decides which whole blocks close. Closing a block removes much at
    once, so with these blocks the shift of all other gates is chosen once more. The value of a gate that stays is that
    of its own, unshifted log α: σ(0.8 log α / β).
    """
    blocks = _largest(lambda shift: sparsity_of(left(log_alpha, shift, multiple), outline) >= target)
    others = _largest(lambda shift: sparsity_of(left(log_alpha, shift, multiple, blocks), outline) >= target)
    chosen = left(log_alpha, others, multiple, blocks)
    stays = torch.tensor(chosen.layers, device=log_alpha.hidden.device)

    def each(of: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        # A layer that goes takes all of its own along.
        found = (hard_concrete.settled(gate, count) for gate, count in zip(of, counts, strict=True))
        return [gate * stay for gate, stay in zip(found, stays, strict=True)]

    return Gates(
        hard_concrete.settled(log_alpha.attention, len(stays)) * stays,
        each(log_alpha.heads, chosen.heads),
        hard_concrete.settled(log_alpha.ffn, len(stays)) * stays,
        each(log_alpha.units, chosen.units),
        hard_concrete.settled(log_alpha.hidden, chosen.hidden),
    )


def _largest(holds: Callable[[float], bool]) -> float:
    """The largest shift for which something holds that holds for all smaller ones."""
    low, high = -_FARTHEST, _FARTHEST
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def cut(model: PreTrainedModel, chosen: Gates) -> None:
    """Fold the gates into the weights and slice off what is closed, in place."""
    gates.fold(model, chosen)
    stays = [index for index in range(len(chosen.heads)) if chosen.attention[index] or chosen.ffn[index]]
    for index, layer in enumerate(layers(model)):
        heads, units = open_units(chosen.heads[index]), open_units(chosen.units[index])
        if index in stays and len(heads) < layer.heads:
            slicing.slice_heads(model, index, heads)
        if index in stays and len(units) < layer.ffn:
            slicing.slice_ffn(model, index, units)
    hidden = open_units(chosen.hidden)
    if len(hidden) < len(chosen.hidden):
        slicing.slice_hidden(model, hidden)
    if len(stays) < len(chosen.heads):
        slicing.slice_layers(model, stays)


def open_units(gate: Tensor) -> list[int]:
    """Which gates of one dimension are open, ascending."""
    found: list[int] = gate.nonzero().flatten().tolist()
    return found


def sparsity_of(chosen: Left, outline: Outline) -> float:
    """The sparsity of a model of which `chosen` stays."""
    return 1 - _weights(outline, chosen) / _weights(outline, everything(outline))


def _weights(outline: Outline, chosen: Left) -> int:
    """Weights in the layers' matrices, biases apart."""
    layers = zip(outline.layers, chosen.layers, chosen.heads, chosen.units, strict=True)
    return chosen.hidden * sum(
        4 * layer.head_size * heads + ffn_matrices(layer) * units for layer, stays, heads, units in layers if stays
    )
