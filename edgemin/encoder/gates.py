"""Gates on what the parts of an encoder hand on: a forward that passes them, and their values folded into weights.

A gate is a number in [0, 1]; what passes a closed one (0) has no say in anything that follows. So the parts whose gate
is closed can be sliced off, and once [`fold`][edgemin.encoder.gates.fold] has made the others' gates part of the
weights, the smaller model computes what the gated one did.

Shapes: B batch, T tokens, L layers, A heads of a layer, D head size, F FFN units of a layer, H hidden units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from edgemin.encoder.families import table
from edgemin.encoder.parts import Layer, layers, num_layers
from edgemin.encoder.stream import plain, stream


class Gates(NamedTuple):
    """One number for each gate of a model, such as its value. A weight is multiplied by all the gates it passes.

    Attributes:
        attention: `[L]`, on what attention adds to the residual stream, its bias included.
        heads: L of `[A]`, on a head's context.
        ffn: `[L]`, on what the feed-forward network adds, its bias included.
        units: L of `[F]`, on an FFN unit's activation, in ModernBERT the product with its gate.
        hidden: `[H]`, on a unit of the residual stream, the same in all layers, and on the unit of the same number
            inside the head.
    """

    attention: Tensor
    heads: Sequence[Tensor]
    ffn: Tensor
    units: Sequence[Tensor]
    hidden: Tensor


class _Points(NamedTuple):
    """Where the hidden gates act."""

    carried: list[nn.LayerNorm]  # whose output goes on as the stream: over the open units, times their gates
    aside: list[nn.LayerNorm]  # whose output is only read: over the open units
    writers: list[nn.Linear]  # whose output is added to the stream as it is: times the gates
    classifier: nn.Linear  # which reads the head's own units: times the gates


@contextmanager
def gated(model: PreTrainedModel, read: Callable[[], Gates]) -> Iterator[None]:
    """A context in which every forward passes gates; gradients reach them.

    Norms run over the open hidden units alone. A layer both of whose blocks are closed is left out whole, with its
    norms.

    Args:
        model: A sequence classification model of a known family, without bottlenecks and in full precision.
        read: Gives the gates; called at every gate of every forward.
    """
    points = _points(model)
    with ExitStack() as stack:
        hooks = _Hooks(stack, read)
        for index, layer in enumerate(layers(model)):
            hooks.on_layer(index, layer)
        for norm in points.carried + points.aside:
            hooks.on_norm(norm)
        for module in [*points.carried, *points.writers]:
            hooks.on_output(module, _hidden)
        hooks.on_input(points.classifier, _hidden)
        yield


class _Hooks:
    """Hooks that multiply what passes them by gates."""

    def __init__(self, stack: ExitStack, read: Callable[[], Gates]) -> None:
        self.stack, self.read = stack, read

    def on_input(self, module: nn.Module, gate: Callable[[Gates], Tensor]) -> None:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (_times(inputs[0], gate(self.read())), *inputs[1:])

        self.stack.enter_context(module.register_forward_pre_hook(hook))

    def on_output(self, module: nn.Module, gate: Callable[[Gates], Tensor]) -> None:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            return _times(output, gate(self.read()))

        self.stack.enter_context(module.register_forward_hook(hook))

    def on_norm(self, norm: nn.LayerNorm) -> None:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return _over_open(norm, inputs[0], output, self.read().hidden)

        self.stack.enter_context(norm.register_forward_hook(hook))

    def on_layer(self, index: int, layer: Layer) -> None:
        def whole(_module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:
            if self.read().attention[index] or self.read().ffn[index]:
                return output
            return (inputs[0], *output[1:]) if isinstance(output, tuple) else inputs[0]

        last, size = layer.part(layer.family.ffn_out), layer.head_size
        self.on_input(layer.output, lambda gates: gates.heads[index].repeat_interleave(size))
        self.on_output(layer.output, lambda gates: gates.attention[index])
        self.on_input(last, lambda gates: gates.units[index])
        self.on_output(last, lambda gates: gates.ffn[index])
        self.stack.enter_context(layer.module.register_forward_hook(whole))


@torch.no_grad()
def fold(model: PreTrainedModel, gates: Gates) -> None:
    """Multiply the weights by the gates they pass, in place; what is closed is left to be sliced off."""
    points = _points(model)
    for index, layer in enumerate(layers(model)):
        output, out = (plain(part, nn.Linear) for part in (layer.output, layer.part(layer.family.ffn_out)))
        output.weight *= gates.heads[index].to(output.weight).repeat_interleave(layer.head_size)
        out.weight *= gates.units[index].to(out.weight)
        _scale_rows(output, gates.attention[index])
        _scale_rows(out, gates.ffn[index])
    for norm in points.carried:
        _scale_rows(norm, gates.hidden)
    for writer in points.writers:
        _scale_rows(writer, gates.hidden)
    points.classifier.weight *= gates.hidden.to(points.classifier.weight)


def _points(model: PreTrainedModel) -> _Points:
    family, found = table(model), stream(model)
    heads_norms = [plain(model.get_submodule(path), nn.LayerNorm) for path in family.head_norms]
    # Behind a block a norm carries the stream on; in front of one, what the block adds is added as it is.
    in_front = family.attention_norm is not None
    writers = found.writers if in_front else found.writers[: len(found.writers) - 2 * num_layers(model)]
    classifier = plain(model.get_submodule(family.classifier), nn.Linear)
    return _Points(found.carried, found.aside + heads_norms, writers, classifier)


def _hidden(gates: Gates) -> Tensor:
    return gates.hidden


def _times(found: Tensor, gate: Tensor) -> Tensor:
    return found * gate.to(found)


def _over_open(norm: nn.LayerNorm, given: Tensor, output: Tensor, gate: Tensor) -> Tensor:
    """The norm over the open units, as if there were no others; 0 at the closed ones."""
    kept = gate.nonzero().flatten()
    if len(kept) == len(gate):
        return output
    bias = None if norm.bias is None else norm.bias[kept]
    found = functional.layer_norm(given[..., kept], (len(kept),), norm.weight[kept], bias, norm.eps)
    return torch.zeros_like(output).index_copy(-1, kept, found.to(output.dtype))


def _scale_rows(module: nn.Linear | nn.LayerNorm, gate: Tensor) -> None:
    """Multiply what a module gives by a gate, or by one for each of its outputs."""
    gate = gate.to(module.weight)
    module.weight *= gate if gate.ndim == 0 or module.weight.ndim == 1 else gate[:, None]
    if module.bias is not None:
        cast(Tensor, module.bias).mul_(gate)
