"""What can be removed from an encoder, as criteria see it: units in layers, their weights and what they compute.

Shapes: B batch, T tokens, U units of a layer, S size of a unit, N what a unit reads, M what it writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from edgemin.encoder import parts, taps

StructureName = Literal["heads"]


class UnitWeights(NamedTuple):
    """The weights of one layer that are a unit's alone: read `[U, S, N]`, its bias `[U, S]`, and write `[U, S, M]`."""

    read: Tensor
    bias: Tensor | None
    write: Tensor


class Structure(Protocol):
    """One kind of unit that can be removed: all that a criterion knows of it."""

    name: StructureName

    def units(self, model: PreTrainedModel) -> list[int]:
        """How many units each layer still has."""

    def weights(self, model: PreTrainedModel) -> list[UnitWeights]:
        """The weights of each layer by unit; of a quantized layer those that it computes with."""

    def outputs(self, model: PreTrainedModel) -> AbstractContextManager[Sequence[Tensor]]:
        """Watch what units hand on: each forward fills the sequence anew, `[B, T, U*S]` per layer.

        After a backward their `grad` holds the loss's gradient.
        """


class Heads:
    """Attention heads. A head reads with its rows of W_V, writes with its columns of W_O, and hands on its context."""

    name: StructureName = "heads"

    def units(self, model: PreTrainedModel) -> list[int]:
        """How many heads each layer still has."""
        return parts.heads(model)

    def weights(self, model: PreTrainedModel) -> list[UnitWeights]:
        """The weights of each layer by head."""
        return [_head_weights(layer) for layer in parts.layers(model)]

    def outputs(self, model: PreTrainedModel) -> AbstractContextManager[Sequence[Tensor]]:
        """Watch the contexts of the heads, side by side."""
        return taps.head_contexts(model)


HEADS = Heads()


def _head_weights(layer: parts.Layer) -> UnitWeights:
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
