"""Quantize a whole encoder: which of its layers, how, and what a file holds of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgemin.encoder import quantized, taps
from edgemin.errors import UserError
from edgemin.progress import counted
from edgemin.quantization.layers import Quantized, QuantizedEmbedding, QuantizedLinear, Scales
from edgemin.quantization.ranges import Calibration, calibrate
from edgemin.quantization.weights import BITS, FLOAT, Activations, Granularity, Spec, WeightRange

# How the integers of a quantized weight end in a file.
PACKED = quantized.PROVIDERS["integers"].weight


def quantize(
    model: PreTrainedModel, specs: Mapping[str, Spec], weight_range: WeightRange, calibration: Calibration
) -> None:
    """Quantize these layers, in place.

    Scales of weights are chosen at once, those of activations by [`fit_inputs`][edgemin.quantization.model.fit_inputs].
    The weights themselves stay where they are until they settle: training that begins here knows how near each is to
    the next step. A layer that is quantized already is quantized anew, from the weights it has.

    Args:
        model: an encoder.
        specs: by path, of [`matrices`][edgemin.encoder.outline.Outline.matrices]; 32 bits leave a layer as it is.
        weight_range: how scales of weights are chosen.
        calibration: how ranges of activations are chosen, now and when a later stage has moved them.
    """
    for path, spec in counted(specs.items(), "choosing scales"):
        if spec.bits == FLOAT:
            continue
        old = model.get_submodule(path)
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


def follow(model: nn.Module, scales: Scales) -> None:
    """Set what the scales of all quantized layers do in training."""
    for layer in quantized_layers(model).values():
        layer.follow(scales)


class Integers:
    """What the encoder asks of these layers; see [`quantized.Provider`][edgemin.encoder.quantized.Provider]."""

    def describe(self, model: nn.Module, layers: Mapping[str, Quantized]) -> dict[str, Any]:
        """How ranges are chosen, and every layer's specification; what its scales do unless they are fixed."""
        described = {
            path: layer.spec.describe() | ({"scales": layer.scales} if layer.scales != "fixed" else {})
            for path, layer in layers.items()
        }
        return {"calibration": calibration_of(model).describe(), "layers": described}

    def place(self, model: nn.Module, described: Mapping[str, Any]) -> None:
        """Put a quantized layer in the place of every Linear and Embedding that the description names."""
        cast(Any, model).calibration = Calibration(**described["calibration"])
        for path, own in described["layers"].items():
            layer = _layer(_place(model, path), _read_spec(path, own))
            layer.follow(own.get("scales", "fixed"))
            model.set_submodule(path, layer)

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
        layer.unpack({name: tensors[name] for name in own})
        rest = {name: tensor for name, tensor in tensors.items() if name not in own}
        layer.load_state_dict(rest, strict=False)  # the names were compared above

    def scales(self, layers: Mapping[str, Quantized]) -> list[nn.Parameter]:
        """Those of all layers."""
        return [scale for layer in layers.values() for scale in layer.learned_scales()]

    def settle(self, layers: Mapping[str, Quantized]) -> None:
        """Fix the scales and put the weights on their grid, as a file would bring them back."""
        for layer in layers.values():
            layer.follow("fixed")
            layer.settle()

    def recalibrate(
        self, model: PreTrainedModel, layers: Mapping[str, Quantized], draw: quantized.Draw | None, who: str
    ) -> list[str]:
        """Choose the ranges of static activations again, of the stage's own training examples."""
        notes = []
        if rescaled := sum(layer.rescaled for layer in layers.values()):
            notes.append(f"chose the scales of {rescaled} groups of weights again, which a cut went through")
        watched = static_layers(model)
        if watched and draw is not None:
            fit_inputs(model, draw(calibration_of(model).examples))
            notes.append(f"calibrated the activations of {len(watched)} quantized layers again")
        elif watched:
            notes.append(
                f"the activations of {len(watched)} quantized layers keep their ranges: {who} sees no data of the "
                "task to calibrate them on"
            )
        return notes

    def summary(self, model: nn.Module, layers: Mapping[str, Quantized]) -> dict[str, Any]:
        """Bits of every quantized layer, and what they have in common."""
        specs = [layer.spec for layer in layers.values()]
        return {
            "bits": {path: layer.spec.bits for path, layer in layers.items()},
            "granularity": specs[0].granularity,
            "group_size": specs[0].group_size,
            "activations": next(
                (layer.spec.activations for layer in layers.values() if isinstance(layer, nn.Linear)), "none"
            ),
            "calibration": calibration_of(model).describe(),
        }


def _place(model: nn.Module, path: str) -> nn.Module:
    found = dict(model.named_modules()).get(path)
    if not isinstance(found, nn.Linear | nn.Embedding):
        raise UserError(f"structure: expected a Linear or an Embedding at {path}, found none")
    return found


def _read_spec(path: str, described: Mapping[str, Any]) -> Spec:
    spec = Spec(**{name: value for name, value in described.items() if name != "scales"})
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
