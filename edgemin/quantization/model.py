"""Quantize a whole encoder: which of its layers, how, and what a file holds of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgemin.encoder import building, parts, quantized, taps
from edgemin.errors import UserError
from edgemin.progress import counted
from edgemin.quantization.base import Quantized, Scales
from edgemin.quantization.layers import QuantizedEmbedding, QuantizedLinear
from edgemin.quantization.ranges import Calibration, calibrate
from edgemin.quantization.weights import BITS, FLOAT, Activations, Granularity, Spec, WeightRange

# Whose scales: the weights of Linears, what they read, the embedding tables.
ScaleOwner = Literal["weights", "inputs", "embeddings"]
# How the integers of a quantized weight end in a file.
PACKED = quantized.PROVIDERS["integers"].weight


def quantize(
    model: PreTrainedModel, specs: Mapping[str, Spec], weight_range: WeightRange, calibration: Calibration
) -> None:
    """Quantize these layers, in place.

    Scales of weights are chosen at once, those of activations by [`fit_inputs`][edgemin.quantization.model.fit_inputs].
    The weights themselves stay where they are until they settle: training that begins here knows how near each is to
    the next step. A layer that is quantized already stays as it is if it was in the same way; else it is quantized
    anew, from the weights it has. Ranges of activations stay if all layers do and they were chosen in the same way, by
    however many examples.

    Args:
        model: an encoder.
        specs: by path, of [`matrices`][edgemin.encoder.outline.Outline.matrices]; 32 bits leave a layer as it is.
        weight_range: how scales of weights are chosen.
        calibration: how ranges of activations are chosen, now and when a later stage has changed the structure.
    """
    if replace(calibration_of(model), examples=calibration.examples) != calibration:
        cast(Any, model).ranges_of = None
    for path, spec in counted(specs.items(), "choosing scales"):
        old = model.get_submodule(path)
        if spec.bits == FLOAT or (isinstance(old, Quantized) and old.spec == spec):
            continue
        cast(Any, model).ranges_of = None  # what one layer is rounded to, all that follow read
        new = _layer(old, spec)
        new.fit_weights(weight_range)
        model.set_submodule(path, new.train(old.training))
    cast(Any, model).calibration = calibration


def quantized_layers(model: nn.Module) -> dict[str, Quantized]:
    """The quantized layers by path, in the order of the modules."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Quantized)}


def static_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantized Linears with static activations, which have a range of their own, by path."""
    return {
        path: layer
        for path, layer in quantized_layers(model).items()
        if isinstance(layer, QuantizedLinear) and layer.spec.activations == "static"
    }


def calibration_of(model: nn.Module) -> Calibration:
    """How the ranges of a quantized model's activations are chosen; tables moved to another model have none."""
    return cast(Calibration, getattr(model, "calibration", Calibration()))


def fit_inputs(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> None:
    """Calibrate the inputs of the layers with static activations.

    Raises:
        UserError: no sentence, or activations that are not finite.
    """

    def run(batch: Mapping[str, Tensor]) -> Tensor:
        return taps.logits(model, {name: tensor.to(model.device) for name, tensor in batch.items()})

    calibrate(model, static_layers(model), run, batches, calibration_of(model))
    cast(Any, model).ranges_of = _shape(model)


def needs_ranges(model: PreTrainedModel) -> bool:
    """Whether there are static activations whose ranges were not found for the model as it is: widths have changed."""
    return bool(static_layers(model)) and getattr(model, "ranges_of", None) != _shape(model)


def _shape(model: PreTrainedModel) -> tuple[Any, ...]:
    """What decides the ranges of activations besides weights."""
    layers = building.outline(model).layers
    return parts.hidden_size(model), *((layer.heads, layer.head_size, layer.ffn) for layer in layers)


def follow(model: nn.Module, scales: Scales, owners: Collection[ScaleOwner]) -> None:
    """Set what these scales of all quantized layers do in training; the others stay."""
    own: dict[ScaleOwner, Scales] = {owner: scales if owner in owners else "fixed" for owner in get_args(ScaleOwner)}
    for layer in quantized_layers(model).values():
        if isinstance(layer, QuantizedLinear):
            layer.follow(own["weights"], own["inputs"])
        else:
            layer.follow(own["embeddings"])


class Integers:
    """What the encoder asks of these layers; see [`quantized.Provider`][edgemin.encoder.quantized.Provider]."""

    def describe(self, model: nn.Module, layers: Mapping[str, Quantized]) -> dict[str, Any]:
        """How ranges are chosen, whether they must be chosen again, and every layer's specification."""
        stale = {"needs_ranges": True} if needs_ranges(cast(PreTrainedModel, model)) else {}
        described = {path: layer.spec.describe() for path, layer in layers.items()}
        return {"calibration": calibration_of(model).describe(), **stale, "layers": described}

    def place(self, model: nn.Module, described: Mapping[str, Any]) -> None:
        """Put a quantized layer in the place of every Linear and Embedding that the description names."""
        cast(Any, model).calibration = Calibration(**described["calibration"])
        for path, own in described["layers"].items():
            model.set_submodule(path, _layer(_place(model, path), _read_spec(path, own)))
        if not described.get("needs_ranges"):
            cast(Any, model).ranges_of = _shape(cast(PreTrainedModel, model))

    def pack(self, layer: Quantized) -> dict[str, Tensor]:
        """The layer's state, with packed integers in the place of its weights."""
        state = {name: tensor for name, tensor in layer.state_dict().items() if name != "weight"}
        return state | layer.packed()

    def unpack(self, layer: Quantized, tensors: Mapping[str, Tensor]) -> None:
        """Take the integers and scales, then the rest."""
        expected = set(layer.state_dict()) - {"weight"} | {PACKED}
        if damaged := sorted(expected ^ set(tensors)):
            raise KeyError(damaged[0])
        own = (PACKED, "weight_scale")
        rest = {name: tensor for name, tensor in tensors.items() if name not in own}
        layer.load_state_dict(rest, strict=False)  # the names were compared above
        layer.unpack({name: tensors[name] for name in own})

    def scales(self, layers: Mapping[str, Quantized]) -> dict[str, list[nn.Parameter]]:
        """Those of all layers, by `ScaleOwner`."""
        found: dict[str, list[nn.Parameter]] = {owner: [] for owner in get_args(ScaleOwner)}
        for layer in layers.values():
            own = "embeddings" if isinstance(layer, QuantizedEmbedding) else "weights"
            for scale in layer.learned_scales():
                found[own if scale is layer.weight_scale else "inputs"].append(scale)
        return found

    def settle(self, layers: Mapping[str, Quantized]) -> None:
        """Fix the scales and put the weights on their grid, as a file would bring them back."""
        for layer in layers.values():
            layer.settle()

    def latents(self, layer: Quantized) -> dict[str, Tensor]:
        """Its unrounded weights and its scales."""
        return layer.latents()

    def take_up(self, layer: Quantized, latents: Mapping[str, Tensor]) -> None:
        """Begin at unrounded weights and scales."""
        layer.take_up(latents)

    def recalibrate(
        self, model: PreTrainedModel, layers: Mapping[str, Quantized], draw: quantized.Draw | None, who: str
    ) -> list[str]:
        """Choose the ranges of static activations again, of the stage's own training examples, if widths changed."""
        notes = []
        if rescaled := sum(layer.rescaled for layer in layers.values()):
            notes.append(f"chose the scales of {rescaled} groups of weights again, which a cut went through")
            for layer in layers.values():
                layer.rescaled = 0
        if not needs_ranges(model):
            return notes
        watched = len(static_layers(model))
        if draw is None:
            return [
                *notes,
                f"the activations of {watched} quantized layers keep their ranges: {who} sees no data of the task to "
                "calibrate them on",
            ]
        fit_inputs(model, draw(calibration_of(model).examples))
        return [*notes, f"calibrated the activations of {watched} quantized layers again"]

    def summary(self, model: nn.Module, layers: Mapping[str, Quantized]) -> dict[str, Any]:
        """Bits of every quantized layer, and what the Linears have in common (where there are none, the tables)."""
        linears = (layer.spec for layer in layers.values() if isinstance(layer, nn.Linear))
        spec = next(linears, next(iter(layers.values())).spec)  # tables may have scales of their own
        return {
            "bits": {path: layer.spec.bits for path, layer in layers.items()},
            "granularity": spec.granularity,
            "group_size": spec.group_size,
            "activations": spec.activations,
            "calibration": calibration_of(model).describe(),
        }


def _place(model: nn.Module, path: str) -> nn.Module:
    found = dict(model.named_modules()).get(path)
    if not isinstance(found, nn.Linear | nn.Embedding):
        raise UserError(f"structure: expected a Linear or an Embedding at {path}, found none")
    return found


def _read_spec(path: str, described: Mapping[str, Any]) -> Spec:
    spec = Spec(**described)
    known = (
        spec.bits in BITS and spec.granularity in get_args(Granularity) and spec.activations in get_args(Activations)
    )
    if not known or (spec.granularity == "group") != (isinstance(spec.group_size, int) and spec.group_size >= 1):
        raise UserError(f"structure: expected how {path} is quantized, given {dict(described)}")
    return spec


def quantized_layer(old: nn.Module, spec: Spec, weight_range: WeightRange) -> Quantized:
    """A Linear or an Embedding quantized and settled; its activations are yet to be calibrated."""
    new = _layer(old, spec)
    new.fit_weights(weight_range)
    new.settle()
    return new


def _layer(old: nn.Module, spec: Spec) -> QuantizedLinear | QuantizedEmbedding:
    with torch.no_grad():
        if isinstance(old, nn.Linear):
            return QuantizedLinear(old, spec)
        assert isinstance(old, nn.Embedding)
        return QuantizedEmbedding(old, spec)


quantized.register("integers", Integers(), Quantized)
