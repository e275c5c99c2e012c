"""Run an encoder and read what flows inside it, by forward hooks only, so that fused attention stays on.

Shapes: B batch, T tokens, A heads, D head size, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
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
    """One forward: the logits [B, C] (`None` if they were not asked for) and what was read on the way.

    `projections` are keyed by layer, counted from 0. `hidden[0]` is what the embeddings gave, `hidden[l]` the
    residual stream after l layers, each [B, T, H].
    """

    logits: Tensor | None
    projections: dict[int, Projections]
    hidden: dict[int, Tensor]


class _Stop(Exception):
    """Ends a forward when nothing that comes later is needed."""


def inputs(model: PreTrainedModel) -> list[str]:
    """The names of the tensors [B, T] that a model takes; token types only where it tells them apart."""
    token_types = table(model).token_types
    tells = token_types is not None and cast(int, model.get_submodule(token_types).num_embeddings) > 1
    return ["input_ids", "attention_mask", *(["token_type_ids"] if tells else [])]


def logits(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Run the model on a batch, with those of its tensors that the model takes.

    Args:
        model: A sequence classification model of a known family.
        batch: `input_ids` and, if any, `attention_mask` and `token_type_ids`, each [B, T]. The last are
            passed on only to a model that tells token types apart. All else, labels included, is left out.

    Returns:
        Logits [B, C].
    """
    return _logits(model, batch)


def read(
    model: PreTrainedModel,
    batch: Mapping[str, Tensor],
    *,
    projections: Collection[int] = (),
    hidden: Collection[int] = (),
    logits: bool,
) -> Reading:
    """Run the model and read it inside; gradients flow through what is read.

    The projections are raw, without mask, dropout or scale. The forward ends right after the deepest thing asked for,
    unless logits are.

    Args:
        model: A sequence classification model of a known family.
        batch: As for [`logits`][edgemin.encoder.taps.logits].
        projections: Layers whose queries, keys and values to read, counted from 0.
        hidden: Where to read the residual stream: 0 before the first layer, l after l layers.
        logits: Whether to run to the end.

    Raises:
        UserError: the model has no such layer.
    """
    assert projections or hidden or logits, "nothing to read, nowhere to stop"
    # Depths in the order of a forward: 2 l is the stream after l layers, 2 l + 1 the projections of layer l (from 0).
    depths = [2 * index + 1 for index in projections] + [2 * index for index in hidden]
    taps = _Taps(stop_at=None if logits else max(depths))
    with ExitStack() as stack:
        for index in sorted(projections):
            taps.on_projections(stack, index, layer_at(model, index).projections)
        for index in sorted(hidden):
            taps.on_stream(stack, index, layer_at(model, max(index - 1, 0)).module)
        result: Tensor | None = None
        with suppress(_Stop):
            result = _logits(model, batch)
    return Reading(
        result if logits else None, {index: _split(found) for index, found in taps.parts.items()}, taps.streams
    )


class _Taps:
    """Hooks that keep what passes them and end the forward after the deepest one."""

    def __init__(self, stop_at: int | None) -> None:
        self.stop_at = stop_at
        self.parts: dict[int, dict[int, Tensor]] = {}
        self.streams: dict[int, Tensor] = {}

    def on_projections(self, stack: ExitStack, layer: int, linears: Sequence[nn.Module]) -> None:
        kept = self.parts[layer] = {}

        def keep(position: int) -> Callable[[nn.Module, Any, Tensor], None]:
            def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
                kept[position] = output
                if self.stop_at == 2 * layer + 1 and len(kept) == len(linears):
                    raise _Stop

            return hook

        for position, linear in enumerate(linears):
            stack.enter_context(linear.register_forward_hook(keep(position)))

    def on_stream(self, stack: ExitStack, after: int, layer: nn.Module) -> None:
        """Watch the residual stream: the input of the first layer, or the output of a later one."""

        def hook(_module: nn.Module, *inside: Any) -> None:
            self.streams[after] = _first(inside[-1])
            if self.stop_at == 2 * after:
                raise _Stop

        stack.enter_context(layer.register_forward_hook(hook) if after else layer.register_forward_pre_hook(hook))


def given_to(model: PreTrainedModel, part: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The first input that a part of the model receives for a batch; the forward ends there.

    Args:
        model: A sequence classification model of a known family.
        part: One of its modules.
        batch: As for [`logits`][edgemin.encoder.taps.logits].
    """
    found: list[Tensor] = []

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0])
        raise _Stop

    handle = part.register_forward_pre_hook(keep)
    try:
        with suppress(_Stop):
            _logits(model, batch)
    finally:
        handle.remove()
    return found[0]


@contextmanager
def changed_input(model: PreTrainedModel, layer: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Give one layer other hidden states than the layers before it make.

    Args:
        model: A sequence classification model of a known family.
        layer: Counted from 0.
        change: From the hidden states [B, T, H] to those the layer shall read.
    """

    def hook(
        _module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if inputs:
            return (change(inputs[0]), *inputs[1:]), named
        return inputs, named | {"hidden_states": change(named["hidden_states"])}

    handle = layer_at(model, layer).module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def head_contexts(model: PreTrainedModel) -> AbstractContextManager[list[Tensor]]:
    """Watch the inputs of every attention output projection, the heads' contexts side by side.

    Yields:
        A list that each forward fills anew with L tensors [B, T, A*D] in layer order. After a backward their
        `grad` holds the loss's gradient, frozen parameters or not.
    """
    return _watched_inputs([layer.output for layer in layers(model)])


def ffn_activations(model: PreTrainedModel) -> AbstractContextManager[list[Tensor]]:
    """Watch the inputs of every FFN's second Linear, [B, T, F] per layer, as `head_contexts` does those of heads."""
    return _watched_inputs([layer.part(layer.family.ffn_out) for layer in layers(model)])


class Step(NamedTuple):
    """The hidden states [B, T, H] in front of a layer and behind it; a gradient is kept at the latter."""

    before: Tensor
    after: Tensor


@contextmanager
def layer_steps(model: PreTrainedModel) -> Iterator[list[Step]]:
    """Watch every layer's input and output.

    Yields:
        A list that each forward fills anew, in layer order. After a backward `grad` of `after` holds the loss's
        gradient by whatever follows the layer.
    """
    steps: list[Step] = []

    def watch(index: int) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def keep(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            if index == 0:
                steps.clear()
            after = _differentiable(_first(output))
            steps.append(Step(_first(inputs), after))
            return (after, *output[1:]) if isinstance(output, tuple) else after

        return keep

    with ExitStack() as stack:
        for index, layer in enumerate(layers(model)):
            stack.enter_context(layer.module.register_forward_hook(watch(index)))
        yield steps


@contextmanager
def hidden_states(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Watch the residual stream in front of the first layer and behind each.

    Yields:
        A list that each forward fills anew with L + 1 tensors [B, T, H]; after a backward `grad` holds the gradient.
    """
    states: list[Tensor] = []

    def embedded(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        states[:] = [_differentiable(inputs[0])]
        return (states[0], *inputs[1:])

    def passed(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> Any:
        states.append(_differentiable(_first(output)))
        return (states[-1], *output[1:]) if isinstance(output, tuple) else states[-1]

    with ExitStack() as stack:
        found = layers(model)
        stack.enter_context(found[0].module.register_forward_pre_hook(embedded))
        for layer in found:
            stack.enter_context(layer.module.register_forward_hook(passed))
        yield states


@contextmanager
def _watched_inputs(linears: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Watch what the Linears are given, in the order they run; each forward fills the list anew."""
    given: list[Tensor] = []

    def watch(index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if index == 0:
                given.clear()
            given.append(_differentiable(inputs[0]))
            return (given[-1], *inputs[1:])

        return keep

    with ExitStack() as stack:
        for index, linear in enumerate(linears):
            stack.enter_context(linear.register_forward_pre_hook(watch(index)))
        yield given


def _differentiable(found: Tensor) -> Tensor:
    """The tensor itself, or where nothing before it learns its values; a gradient is kept if there is one."""
    if is_grad_enabled():
        found = found if found.requires_grad else found.detach().requires_grad_()
        found.retain_grad()
    return found


def _split(parts: Mapping[int, Tensor]) -> Projections:
    """Query, key and value from three projections, or from one that holds them one after the other."""
    if len(parts) == 1:
        return Projections(*parts[0].chunk(3, dim=-1))
    return Projections(parts[0], parts[1], parts[2])


def _first(inside: Any) -> Tensor:
    """The hidden states among what a layer takes or gives: itself, or the first of a tuple."""
    return cast(Tensor, inside[0] if isinstance(inside, tuple) else inside)


def _logits(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    return cast(Tensor, model(**{name: batch[name] for name in inputs(model) if name in batch}).logits)
