"""Quantized layers in the place of float ones: a registry of their kinds, and how models with them are saved and built.

A provider is a module that knows one kind of quantized layer. It registers itself here when it is imported, and what
was quantized names it by a fixed name in structure.json. So a model of any kind is saved, loaded, trained on and
pruned by code that imports no quantization: [`build`][edgemin.encoder.quantized.build] imports the one provider that a
structure names.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from edgemin.encoder import building
from edgemin.encoder.outline import Outline, ProviderName, QuantizedLayers
from edgemin.errors import UserError

# Gives batches that hold the asked number of training examples.
Draw = Callable[[int], Sequence[Mapping[str, Tensor]]]


class Known(NamedTuple):
    """What is known of a kind of quantized layer before its provider is imported.

    Attributes:
        module: the provider's; its code is part of the key of whatever is computed with such a model.
        weight: the name, below the layer's own, of the tensor that holds its integers in a file.
        trainable: whether such a model can be trained and pruned.
    """

    module: str
    weight: str
    trainable: bool


# All providers; no other module is ever imported for a file.
PROVIDERS: dict[ProviderName, Known] = {
    "integers": Known("edgemin.quantization.model", "weight_packed", trainable=True),
    "torch_dynamic": Known("edgemin.quantization.torch_layers", "weight_int8", trainable=False),
}


class Provider(Protocol):
    """What is asked of the layers of one kind."""

    def describe(self, model: nn.Module, layers: Mapping[str, Any]) -> dict[str, Any]:
        """How the layers of a model are quantized, as JSON; by path under `layers`."""

    def place(self, model: nn.Module, described: Mapping[str, Any]) -> None:
        """Put layers without weights where `describe` found quantized ones.

        Raises:
            UserError: the description cannot be built.
        """

    def pack(self, layer: Any) -> dict[str, Tensor]:
        """All that a file holds of one layer, by names below its own."""

    def unpack(self, layer: Any, tensors: Mapping[str, Tensor]) -> None:
        """Give a layer what `pack` gave of another one.

        Raises:
            KeyError: a tensor is missing, or is one too many.
            RuntimeError: shapes differ.
        """

    def scales(self, layers: Mapping[str, Any]) -> dict[str, list[nn.Parameter]]:
        """The scales that training moves, by what they scale; weight decay must not pull them to 0."""

    def settle(self, layers: Mapping[str, Any]) -> None:
        """Put every layer into the state in which a file would restore it."""

    def latents(self, layer: Any) -> dict[str, Tensor]:
        """What training can go on from and no file of a model holds, by names below the layer's own."""

    def take_up(self, layer: Any, latents: Mapping[str, Tensor]) -> None:
        """Begin at what `latents` gave.

        Raises:
            KeyError: a tensor is missing.
            RuntimeError: shapes differ.
        """

    def recalibrate(self, model: PreTrainedModel, layers: Mapping[str, Any], draw: Draw | None, who: str) -> list[str]:
        """Choose again what cuts have made stale since it was chosen, and return notes that say what was.

        Args:
            model: on the device to compute on.
            layers: its quantized layers by path.
            draw: gives training examples; `None` if the stage sees none.
            who: the stage, for the notes.
        """

    def summary(self, model: nn.Module, layers: Mapping[str, Any]) -> dict[str, Any] | None:
        """Bits and ranges for run.json; `None` if the method has no choices."""


# What the names of latent tensors begin with in a training state.
LATENT = "latent/"
_registered: dict[ProviderName, tuple[Provider, type[nn.Module]]] = {}


def register(name: ProviderName, provider: Provider, layer: type[nn.Module]) -> None:
    """Make a provider known, and the class of its layers; its module calls this when it is imported."""
    _registered[name] = provider, layer


def _found(model: nn.Module) -> tuple[ProviderName, Provider, dict[str, nn.Module]] | None:
    """The kind of a model's quantized layers, their provider, and the layers by path. A model has at most one kind."""
    for name, (provider, layer) in _registered.items():
        if layers := {path: module for path, module in model.named_modules() if isinstance(module, layer)}:
            return name, provider, layers
    return None


def kind_of(model: nn.Module) -> ProviderName | None:
    """The kind of quantized layers that a live model has; `None` for a float model."""
    found = _found(model)
    return None if found is None else found[0]


def is_trainable(kind: ProviderName | None) -> bool:
    """Whether a model of this kind can be trained and pruned."""
    return kind is None or PROVIDERS[kind].trainable


def modules(*kinds: ProviderName | None) -> tuple[str, ...]:
    """The modules whose code decides what models of these kinds compute, for a key; none for float models."""
    return tuple(sorted({PROVIDERS[name].module for name in kinds if name is not None}))


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The quantized layers by path, in the order of the modules."""
    found = _found(model)
    return {} if found is None else found[2]


def outline(model: PreTrainedModel) -> Outline:
    """As [`building.outline`][edgemin.encoder.building.outline], and how layers are quantized."""
    described = building.outline(model)
    if (found := _found(model)) is None:
        return described
    name, provider, layers = found
    shared = provider.describe(model, layers)
    return replace(described, quantized=QuantizedLayers(name, shared.pop("layers"), shared))


def build(config: PreTrainedConfig, outline: Outline) -> PreTrainedModel:
    """As [`building.build`][edgemin.encoder.building.build], of what `outline` gave.

    Quantized layers wait to be filled.

    Raises:
        UserError: as there, or the quantized layers cannot be built.
    """
    model = building.build(config, outline)
    if (held := outline.quantized) is not None:
        importlib.import_module(PROVIDERS[held.provider].module)
        _registered[held.provider][0].place(model, {**held.shared, "layers": held.layers})
    return model


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that a file holds of a model: its state dict, with packed integers in the place of quantized weights."""
    found = dict(model.state_dict())
    if (quantized := _found(model)) is not None:
        _, provider, layers = quantized
        found = {name: found[name] for name in _outside(found, layers)}
        for path, layer in layers.items():
            found |= {f"{path}.{name}": tensor for name, tensor in provider.pack(layer).items()}
    return found


def fill(model: nn.Module, found: Mapping[str, Tensor]) -> None:
    """Give a built model what `tensors` gave of another one.

    Raises:
        KeyError: names a tensor that is missing, or one too many.
        RuntimeError: shapes differ.
    """
    quantized = _found(model)
    layers = {} if quantized is None else quantized[2]
    parts: dict[str, dict[str, Tensor]] = {path: {} for path in layers}
    rest: dict[str, Tensor] = {}
    for name, tensor in found.items():
        path, _, part = name.rpartition(".")
        if path in parts:
            parts[path][part] = tensor
        else:
            rest[name] = tensor
    state = model.state_dict()
    if damaged := sorted(set(_outside(state, layers)) ^ set(rest)):
        raise KeyError(damaged[0])
    for path, given in parts.items():
        assert quantized is not None
        try:
            quantized[1].unpack(layers[path], given)
        except KeyError as error:
            raise KeyError(f"{path}.{error.args[0]}") from error
        except RuntimeError as error:
            raise RuntimeError(f"{path}: {error}") from error
    for name, tensor in rest.items():  # not by load_state_dict: torch's quantized Linears insist on their own state
        if state[name].shape != tensor.shape:
            raise RuntimeError(f"{name} of shape {list(tensor.shape)}, not {list(state[name].shape)}")
        state[name].copy_(tensor)


def scales(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The scales of quantized layers that training moves, by what they scale; none in a float model."""
    found = _found(model)
    return {} if found is None else found[1].scales(found[2])


def settle(model: nn.Module) -> None:
    """Put every quantized layer into the state that a file restores: fixed scales, weights on their grid."""
    if (found := _found(model)) is not None:
        found[1].settle(found[2])


def latents(model: nn.Module) -> dict[str, Tensor]:
    """What training can go on from besides a quantized model's file, for its training state; none of a float model."""
    found = _found(model)
    if found is None:
        return {}
    _, provider, layers = found
    return {
        f"{LATENT}{path}.{name}": tensor
        for path, layer in layers.items()
        for name, tensor in provider.latents(layer).items()
    }


def take_up(model: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Let a quantized model begin where `latents` left the one that was saved, if a training state has it.

    Returns:
        Whether it has.

    Raises:
        UserError: what it has does not fit the model.
    """
    kept = {name.removeprefix(LATENT): tensor for name, tensor in state.items() if name.startswith(LATENT)}
    found = _found(model)
    if not kept or found is None:
        return False
    _, provider, layers = found
    parts: dict[str, dict[str, Tensor]] = {path: {} for path in layers}
    try:
        for name, tensor in kept.items():
            path, _, part = name.rpartition(".")
            parts[path][part] = tensor
        for path, layer in layers.items():
            provider.take_up(layer, parts[path])
    except (KeyError, RuntimeError) as error:
        raise UserError(
            f"training state: expected latent weights that fit the model, given others ({error})"
        ) from error
    return True


def recalibrate(model: PreTrainedModel, draw: Draw | None, who: str) -> list[str]:
    """Choose again the ranges that cuts have made stale; the arguments are those of `Provider.recalibrate`."""
    found = _found(model)
    return [] if found is None else found[1].recalibrate(model, found[2], draw, who)


def summary(model: nn.Module) -> dict[str, Any] | None:
    """What run.json says of a model's quantized layers; `None` for a float model."""
    found = _found(model)
    return None if found is None else found[1].summary(model, found[2])


def _outside(names: Iterable[str], layers: Mapping[str, Any]) -> list[str]:
    """The names of tensors that belong to none of these layers."""
    return [name for name in names if not any(name.startswith(f"{path}.") for path in layers)]
