"""The weights of an encoder that belong to one unit alone, by that unit.

Shapes: U units of a group, S size of a unit (that of a head; 1 for a single neuron), N what a unit reads, M what it
writes.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgemin.encoder.parts import Layer
from edgemin.encoder.stream import stream


class UnitWeights(NamedTuple):
    """The weights of one group by unit: read `[U, S, N]`, its bias `[U, S]`, and write `[U, S, M]`.

    A gated FFN unit reads with two rows; the second is its gate, with a bias of its own.
    """

    read: Tensor
    bias: Tensor | None
    write: Tensor
    gate: Tensor | None = None
    gate_bias: Tensor | None = None


def of_heads(layer: Layer) -> UnitWeights:
    """The weights of a layer by head."""
    value, output = layer.projections[-1], layer.output.weight
    assert isinstance(value.weight, Tensor) and isinstance(output, Tensor)
    own = value.weight.detach().chunk(layer.fused)[-1]  # values come last where one projection holds all three
    bias = value.bias.detach().chunk(layer.fused)[-1] if isinstance(value.bias, Tensor) else None
    by_head = (layer.heads, layer.head_size)
    return UnitWeights(
        own.unflatten(0, by_head),
        None if bias is None else bias.unflatten(0, by_head),
        output.detach().T.unflatten(0, by_head),
    )


def of_ffn(layer: Layer) -> UnitWeights:
    """The weights of a layer by FFN unit."""
    first, second = (cast(nn.Linear, layer.part(path)) for path in (layer.family.ffn_in, layer.family.ffn_out))
    rows = 2 if layer.family.gated else 1  # gates come last
    weights = [part[:, None] for part in first.weight.detach().chunk(rows)]
    biases = [part[:, None] for part in first.bias.detach().chunk(rows)] if first.bias is not None else [None, None]
    write = second.weight.detach().T[:, None]
    if rows == 1:
        return UnitWeights(weights[0], biases[0], write)
    return UnitWeights(weights[0], biases[0], write, weights[1], biases[1])


def of_hidden(model: PreTrainedModel) -> UnitWeights:
    """All weights of the residual stream by its units; those that read it are multiplied by the norm's scale.

    Several Linears write to a unit: its one bias is the root of the sum of their biases' squares.
    """
    found = stream(model)
    read = [table.weight.detach().T for table in found.tables] + [linear.weight.detach() for linear in found.writers]
    biases = [linear.bias.detach() for linear in found.writers if linear.bias is not None]
    write = [
        linear.weight.detach().T * (norm.weight.detach()[:, None] if norm is not None else 1.0)
        for linear, norm in found.reads
    ]
    bias = torch.stack(biases).square().sum(0).sqrt()[:, None] if biases else None
    return UnitWeights(torch.cat(read, dim=1)[:, None], bias, torch.cat(write, dim=1)[:, None])
