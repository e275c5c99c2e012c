"""Running an encoder and reading what flows inside it, by forward hooks only: fused attention stays on.

Shapes: B batch, T tokens, A heads, D head size, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, cast

from torch import Tensor, is_grad_enabled, nn
from transformers import PreTrainedModel

from edgemin.encoder.families import table
from edgemin.encoder.parts import layer_at, layers


class Projections(NamedTuple):
    """What one layer's query, key and value Linears gave, each [B, T, A*D]; before any rotary embedding."""

    query: Tensor
    key: Tensor
    value: Tensor


class Reading(NamedTuple):
    """One forward: the logits [B, C] (``None`` where it was stopped early) and the layers that were read."""

    logits: Tensor | None
    projections: dict[int, Projections]


class _Stop(Exception):
    """Ends a forward whose remainder nobody needs."""


def logits(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Run the model on a batch, with those of its tensors that the model takes.

    Args:
        model: A sequence classification model of a known family.
        batch: ``input_ids`` and, if any, ``attention_mask`` and ``token_type_ids``, each [B, T]. The last are
            passed on only to a model that tells token types apart. All else, labels included, is left out.

    Returns:
        Logits [B, C].
    """
    names = ["input_ids", "attention_mask"]
    token_types = table(model).token_types
    if token_types is not None and cast(int, model.get_submodule(token_types).num_embeddings) > 1:
        names.append("token_type_ids")
    return cast(Tensor, model(**{name: batch[name] for name in names if name in batch}).logits)


def read(model: PreTrainedModel, batch: Mapping[str, Tensor], layers: Sequence[int], *, stop: bool) -> Reading:
    """Run the model and read query, key and value of some layers.

    These are the raw projections, without mask, dropout or scale. Gradients flow through what is read.

    Args:
        model: A sequence classification model of a known family.
        batch: As for [logits][edgemin.encoder.logits].
        layers: Layers to read, counted from 0.
        stop: Whether to end the forward right after the deepest of them was read.

    Returns:
        The reading; its logits are ``None`` if ``stop``.

    Raises:
        UserError: the model has no such layer.
    """
    assert layers or not stop, "nothing to read, nowhere to stop"
    found: dict[int, dict[int, Tensor]] = {index: {} for index in layers}
    deepest = max(layers, default=-1)

    def hook(layer: int, position: int, last: bool) -> Callable[[nn.Module, Any, Tensor], None]:
        def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            found[layer][position] = output
            if last and stop and layer == deepest:
                raise _Stop

        return keep

    with ExitStack() as stack:
        for index in found:
            linears = layer_at(model, index).projections
            for position, linear in enumerate(linears):
                last = position == len(linears) - 1
                stack.enter_context(linear.register_forward_hook(hook(index, position, last)))
        try:
            result: Tensor | None = logits(model, batch)
        except _Stop:
            result = None
    return Reading(result, {index: _split(parts) for index, parts in found.items()})


@contextmanager
def head_contexts(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Watch the inputs of every attention output projection, the heads' contexts side by side.

    Yields:
        A list that each forward fills anew with L tensors [B, T, A*D] in layer order. After a backward their
        ``grad`` holds the loss's gradient, frozen parameters or not.
    """
    contexts: list[Tensor] = []

    def watch(index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            context = inputs[0]
            if is_grad_enabled():
                context = context if context.requires_grad else context.detach().requires_grad_()
                context.retain_grad()
            if index == 0:
                contexts.clear()
            contexts.append(context)
            return (context, *inputs[1:])

        return keep

    with ExitStack() as stack:
        for index, layer in enumerate(layers(model)):
            stack.enter_context(layer.output.register_forward_pre_hook(watch(index)))
        yield contexts


def _split(parts: Mapping[int, Tensor]) -> Projections:
    """Query, key and value from three projections, or from one that holds them one after the other."""
    if len(parts) == 1:
        return Projections(*parts[0].chunk(3, dim=-1))
    return Projections(parts[0], parts[1], parts[2])
