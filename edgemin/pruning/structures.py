"""What can be removed from an encoder, as criteria and stages see it: units, their weights and what they hand on.

Units are counted and ranked in groups: heads and FFN units have one group per layer; all layers are one group, and so
are all units of the hidden size. What a unit hands on is its output in a forward: a head's context, an FFN unit's
activation, what a layer adds to the residual stream.

Shapes: B batch, T tokens, U units of a group, S size of a unit, N what a unit reads, M what it writes, L layers, H
hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from edgemin.encoder import families, parts, slicing, taps
from edgemin.encoder.outline import Outline
from edgemin.encoder.truncation import sort_head_units
from edgemin.errors import UserError
from edgemin.pruning import unit_weights
from edgemin.pruning.unit_weights import UnitWeights

StructureName = Literal["heads", "ffn", "layers", "hidden"]

MULTIPLE = 8  # of FFN and hidden units: kernels take this many at a time at the least


class Outputs(NamedTuple):
    """What units handed on in the last forward of a watched model, and where the loss is differentiated for it.

    Attributes:
        values: `[B, T, U*S]` of each group; where units hand on at several places, these follow each other in T.
        points: tensors of that forward, for `torch.autograd.grad(loss, points())`; after a backward they have `grad`.
        gradients: turns the gradients at `points` into those at what units hand on, in the shapes of `values`.
    """

    values: Callable[[], list[Tensor]]
    points: Callable[[], list[Tensor]]
    gradients: Callable[[Sequence[Tensor]], list[Tensor]]


Watch = AbstractContextManager[Outputs]


class Units(ABC):
    """Units in groups: all that a criterion knows of them.

    Attributes:
        what: the name of these units in messages, in the plural.
    """

    what: str

    @abstractmethod
    def units(self, model: PreTrainedModel) -> list[int]:
        """How many units each group still has."""

    @abstractmethod
    def weights(self, model: PreTrainedModel) -> list[UnitWeights] | None:
        """The weights of each group by unit, of quantized Linears those before rounding where they are known.

        `None`: units have none of their own.
        """

    @abstractmethod
    def outputs(self, model: PreTrainedModel) -> Watch:
        """A context in which every forward of the model records what its units hand on."""

    def readers(self, model: PreTrainedModel) -> list[nn.Linear]:
        """For each group the one Linear whose whole input is what the group's units hand on, side by side."""
        raise AssertionError(f"{self.what} hand on to more than one Linear")

    def activity(self, model: PreTrainedModel) -> Watch:
        """As `outputs`, of that whose norm the criterion `activation` takes: by default what units hand on."""
        return self.outputs(model)


class Structure(Units):
    """One kind of unit that can be removed.

    Attributes:
        name: the structure's name in settings and results.
        one_group: whether all its units are one group, ranked together.
        least: each group keeps at least this many units.
        multiple: the number of units that a group keeps is rounded up to a multiple of this.
    """

    name: StructureName
    one_group: bool = False
    least: int = 1
    multiple: int = 1

    @abstractmethod
    def counts(self, outline: Outline) -> list[int | None]:
        """How many units each group of an outline has; `None` where that is not known yet."""

    @abstractmethod
    def shaped(self, outline: Outline, counts: Sequence[int | None]) -> Outline:
        """The outline with this number of units in each group; `None` where it is not known yet."""

    def check(self, outline: Outline) -> None:
        """Refuse a model of which no such units can be removed.

        Raises:
            UserError: with the reason.
        """

    @abstractmethod
    def cut(self, model: PreTrainedModel, keep: Sequence[Sequence[int]]) -> None:
        """Remove all units but these, in place; `keep` has those of each group, counted from 0, ascending."""


class Heads(Structure):
    """Attention heads. A head reads with its rows of W_V, writes with its columns of W_O, and hands on its context."""

    name: StructureName = "heads"
    what = "heads"

    def units(self, model: PreTrainedModel) -> list[int]:
        """How many heads each layer still has."""
        return parts.heads(model)

    def counts(self, outline: Outline) -> list[int | None]:
        """How many heads each layer has."""
        return [layer.heads for layer in outline.layers]

    def shaped(self, outline: Outline, counts: Sequence[int | None]) -> Outline:
        """The outline with this number of heads in each layer."""
        return outline.with_heads(counts)

    def weights(self, model: PreTrainedModel) -> list[UnitWeights]:
        """The weights of each layer by head."""
        return [unit_weights.of_heads(layer) for layer in parts.layers(model)]

    def readers(self, model: PreTrainedModel) -> list[nn.Linear]:
        """The output projection of each layer's attention."""
        return [cast(nn.Linear, layer.output) for layer in parts.layers(model)]

    @contextmanager
    def outputs(self, model: PreTrainedModel) -> Iterator[Outputs]:
        """Watch the contexts of each layer's heads, side by side."""
        with taps.head_contexts(model) as contexts:
            yield Outputs(lambda: contexts, lambda: contexts, list)

    def cut(self, model: PreTrainedModel, keep: Sequence[Sequence[int]]) -> None:
        """Slice every layer that loses a head."""
        for layer, (kept, count) in enumerate(zip(keep, self.units(model), strict=True)):
            if len(kept) < count:
                slicing.slice_heads(model, layer, kept)


class Ffn(Structure):
    """FFN units. A unit reads with a row of W_1 and of its gate, writes with a column of W_2, hands on one number."""

    name: StructureName = "ffn"
    what = "FFN units"

    def __init__(self, multiple: int = MULTIPLE) -> None:
        self.multiple = multiple

    def units(self, model: PreTrainedModel) -> list[int]:
        """How many units each layer still has."""
        return [layer.ffn for layer in parts.layers(model)]

    def counts(self, outline: Outline) -> list[int | None]:
        """How many units each layer has."""
        return [layer.ffn for layer in outline.layers]

    def shaped(self, outline: Outline, counts: Sequence[int | None]) -> Outline:
        """The outline with this number of FFN units in each layer."""
        return outline.with_ffn(counts)

    def check(self, outline: Outline) -> None:
        """Refuse layers with several stacked FFNs (MobileBERT)."""
        families.check_ffn(outline.family, max(layer.networks for layer in outline.layers))

    def weights(self, model: PreTrainedModel) -> list[UnitWeights]:
        """The weights of each layer by FFN unit."""
        return [unit_weights.of_ffn(layer) for layer in parts.layers(model)]

    def readers(self, model: PreTrainedModel) -> list[nn.Linear]:
        """The second Linear of each layer's FFN."""
        return [cast(nn.Linear, layer.part(layer.family.ffn_out)) for layer in parts.layers(model)]

    @contextmanager
    def outputs(self, model: PreTrainedModel) -> Iterator[Outputs]:
        """Watch the activations in front of each FFN's second Linear, a gate's product included."""
        with taps.ffn_activations(model) as activations:
            yield Outputs(lambda: activations, lambda: activations, list)

    def cut(self, model: PreTrainedModel, keep: Sequence[Sequence[int]]) -> None:
        """Slice every layer that loses a unit."""
        for layer, (kept, count) in enumerate(zip(keep, self.units(model), strict=True)):
            if len(kept) < count:
                slicing.slice_ffn(model, layer, kept)


class Layers(Structure):
    """Whole layers. A layer hands on what it adds to the residual stream: its output less its input."""

    name: StructureName = "layers"
    what = "layers"
    one_group = True

    def units(self, model: PreTrainedModel) -> list[int]:
        """How many layers there still are."""
        return [parts.num_layers(model)]

    def counts(self, outline: Outline) -> list[int | None]:
        """How many layers there are."""
        return [len(outline.layers)]

    def shaped(self, outline: Outline, counts: Sequence[int | None]) -> Outline:
        """The outline with this number of layers."""
        (count,) = counts
        assert count is not None, "the number of layers is known"
        return outline.with_layers(count)

    def weights(self, model: PreTrainedModel) -> None:
        """`None`: a layer has too many kinds of weights for one norm to say how much it matters."""

    @contextmanager
    def outputs(self, model: PreTrainedModel) -> Iterator[Outputs]:
        """Watch what each layer adds to the stream, `[B, T, L*H]`; the gradient is the one at the layer's output."""
        with taps.layer_steps(model) as steps:
            yield Outputs(
                lambda: _side_by_side([(step.after - step.before).detach() for step in steps]),
                lambda: [step.after for step in steps],
                _side_by_side,
            )

    @contextmanager
    def activity(self, model: PreTrainedModel) -> Iterator[Outputs]:
        """Watch how far each layer turns a token, `[B, T, L]`: 1 - cos(input, output), ShortGPT's block influence."""
        with taps.layer_steps(model) as steps:
            yield Outputs(lambda: _side_by_side([_turned(step) for step in steps]), list, list)

    def cut(self, model: PreTrainedModel, keep: Sequence[Sequence[int]]) -> None:
        """Remove the other layers."""
        (kept,) = keep
        if len(kept) < parts.num_layers(model):
            slicing.slice_layers(model, kept)


class Hidden(Structure):
    """Units of the hidden size, the same in all layers. A unit hands on its number in front of and behind each layer.

    It reads with its rows of what writes to the residual stream, embeddings included, and writes with its columns of
    what reads the stream, times the scale of the norm in between. The head, which may be fresh, has no say.
    """

    name: StructureName = "hidden"
    what = "hidden units"
    one_group = True

    def __init__(self, multiple: int = MULTIPLE) -> None:
        self.multiple = multiple

    def units(self, model: PreTrainedModel) -> list[int]:
        """The hidden size that is left, as the one group."""
        return [parts.hidden_size(model)]

    def counts(self, outline: Outline) -> list[int | None]:
        """The hidden size, as the one group."""
        return [outline.hidden]

    def shaped(self, outline: Outline, counts: Sequence[int | None]) -> Outline:
        """The outline with this hidden size."""
        (count,) = counts
        assert count is not None, "the hidden size is known"
        return outline.with_hidden(count)

    def check(self, outline: Outline) -> None:
        """Refuse a family whose layers have a width of their own, and a quantized model."""
        families.check_hidden(outline.family, outline.hidden)
        if outline.quantized is not None:
            raise UserError(
                "hidden: expected a model in full precision, as its head is sorted by its weights, given a quantized "
                "one; prune first"
            )

    def weights(self, model: PreTrainedModel) -> list[UnitWeights]:
        """All weights of the residual stream by unit, as one group."""
        return [unit_weights.of_hidden(model)]

    @contextmanager
    def outputs(self, model: PreTrainedModel) -> Iterator[Outputs]:
        """Watch the residual stream at its L + 1 places, joined along T: criteria sum over them as over tokens."""
        with taps.hidden_states(model) as states:
            yield Outputs(lambda: _in_a_row(states), lambda: states, _in_a_row)

    def cut(self, model: PreTrainedModel, keep: Sequence[Sequence[int]]) -> None:
        """Slice all weights that read or write the stream; of its inner units the head keeps the most important."""
        (kept,) = keep
        if len(kept) < parts.hidden_size(model):
            sort_head_units(model, kept)
            slicing.slice_hidden(model, kept)


HEADS, FFN, LAYERS, HIDDEN = Heads(), Ffn(), Layers(), Hidden()


def _side_by_side(found: Sequence[Tensor]) -> list[Tensor]:
    return [torch.cat(list(found), dim=-1)]


def _in_a_row(found: Sequence[Tensor]) -> list[Tensor]:
    return [torch.cat(list(found), dim=1)]


def _turned(step: taps.Step) -> Tensor:
    """`[B, T, 1]`: 1 - cos of the angle between a layer's input and output."""
    return 1 - functional.cosine_similarity(step.before.detach(), step.after.detach(), dim=-1)[..., None]
