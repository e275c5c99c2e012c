"""A whole encoder, quantized: which of its layers, how, and what a file holds of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from edgemin.encoder import building, taps
from edgemin.errors import UserError
from edgemin.progress import counted
from edgemin.quantization.layers import Quantized, QuantizedEmbedding, QuantizedLinear, Scales
from edgemin.quantization.ranges import Calibration, calibrate
from edgemin.quantization.weights import BITS, FLOAT, Activations, Granularity, Spec, WeightRange

#: How the integers of a quantized weight end in a file.
PACKED = "weight_packed"


def quantize(
    model: PreTrainedModel, specs: Mapping[str, Spec], weight_range: WeightRange, calibration: Calibration
) -> None:
    """Quantize these layers, in place.

    Scales of weights are chosen at once, those of activations by :func:`fit_inputs`. The weights themselves stay where
    they are until :func:`settle`: training that begins here knows how near each is to the next step. A layer that is
    quantized already is quantized anew, from the weights it has.

    Args:
        model: an encoder.
        specs: by path, of :func:`edgemin.encoder.matrices`; 32 bits leave a layer as it is.
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


def quantized(model: nn.Module) -> dict[str, Quantized]:
    """The quantized layers by path, in the order of the modules."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Quantized)}


def static_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Those whose activations have a range of their own."""
    return {
        path: layer
        for path, layer in quantized(model).items()
        if isinstance(layer, QuantizedLinear) and layer.spec.activations == "static"
    }


def calibration_of(model: nn.Module) -> Calibration:
    """How the ranges of a quantized model's activations are chosen; tables moved to another model have none."""
    return cast(Calibration, getattr(model, "calibration", Calibration()))


def fit_inputs(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> None:
    """Calibrate what the layers with static activations read.

    Raises:
        UserError: no sentence, or activations that are not finite.
    """

    def run(batch: Mapping[str, Tensor]) -> Tensor:
        return taps.logits(model, {name: tensor.to(model.device) for name, tensor in batch.items()})

    calibrate(model, static_layers(model), run, batches, calibration_of(model))


def follow(model: nn.Module, scales: Scales) -> None:
    """Say what the scales of all quantized layers do in training."""
    for layer in quantized(model).values():
        layer.follow(scales)


def settle(model: nn.Module) -> None:
    """Leave every quantized layer as a file would bring it back: fixed scales, weights on their grid."""
    for layer in quantized(model).values():
        layer.follow("fixed")
        layer.settle()


def summary(model: nn.Module) -> dict[str, Any]:
    """Bits of every quantized layer, and what they have in common; for run.json."""
    layers = quantized(model)
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


# -- what a file holds ---------------------------------------------------------------------------------


def structure(model: PreTrainedModel) -> dict[str, Any]:
    """As :func:`edgemin.encoder.structure`, and how which layers are quantized under ``quantized``."""
    layers = quantized(model)
    if not layers:
        return building.structure(model)
    described = {
        path: layer.spec.describe() | ({"scales": layer.scales} if layer.scales != "fixed" else {})
        for path, layer in layers.items()
    }
    quantization = {"calibration": calibration_of(model).describe(), "layers": described}
    return building.structure(model) | {"quantized": quantization}


def build(config: PreTrainedConfig, described: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """As :func:`edgemin.encoder.build`, of what :func:`structure` gave; quantized layers wait for their weights.

    Raises:
        UserError: as :func:`edgemin.encoder.build`.
    """
    model = building.build(config, described)
    quantization = (described or {}).get("quantized")
    if quantization is not None:
        cast(Any, model).calibration = Calibration(**quantization["calibration"])
        for path, own in quantization["layers"].items():
            layer = _layer(_place(model, path), _read_spec(path, own))
            layer.follow(own.get("scales", "fixed"))
            model.set_submodule(path, layer)
    return model


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that a file holds of a model: its state dict, but packed integers in the place of quantized weights."""
    found = dict(model.state_dict())
    for path, layer in quantized(model).items():
        del found[f"{path}.weight"]
        found |= {f"{path}.{name}": tensor for name, tensor in layer.packed().items()}
    return found


def fill(model: nn.Module, found: Mapping[str, Tensor]) -> None:
    """Give a built model what :func:`tensors` gave of another one.

    Raises:
        RuntimeError: shapes differ.
        KeyError: a tensor is missing (or, named by ``unexpected``, too many).
    """
    layers = quantized(model)
    names = {
        name for name in model.state_dict() if name.rpartition(".")[0] not in layers or not name.endswith(".weight")
    }
    names |= {f"{path}.{PACKED}" for path in layers}
    if damaged := sorted(names ^ set(found)):
        raise KeyError(damaged[0])
    for path, layer in layers.items():
        layer.unpack({name: found[f"{path}.{name}"] for name in (PACKED, "weight_scale")})
    own = {f"{path}.weight_scale" for path in layers} | {f"{path}.{PACKED}" for path in layers}
    rest = {name: tensor for name, tensor in found.items() if name not in own}
    model.load_state_dict(rest, strict=False)  # the names were compared above


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
