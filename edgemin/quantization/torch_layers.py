"""Torch's dynamic INT8: what the EdgeMIN paper used, kept as the reference.

Weights are quantized once, per tensor and symmetric: `W_int8 = clamp(round(W / s), -128, 127)`. Activations are
quantized at every call to uint8 with the range they then have, and the matrix product runs on integers. Embeddings stay
in float. The result can neither be trained nor pruned any more, so it can only come last.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from edgemin.encoder import quantized
from edgemin.errors import UserError


def _layer_class() -> Any:
    try:
        return torch.ao.nn.quantized.dynamic.Linear
    except AttributeError as error:
        raise UserError(
            f"quantize: expected a torch with torch.ao.nn.quantized (2.13 has it), given torch {torch.__version__}"
        ) from error


def quantize(model: nn.Module) -> nn.Module:
    """Replace every `nn.Linear` of `model`, in place, by its dynamic INT8 form (weights per tensor)."""
    _select_engine()
    with _quiet():
        torch.ao.quantization.quantize_dynamic(model.cpu().eval(), {nn.Linear}, dtype=torch.qint8, inplace=True)
    return model


class TorchDynamic:
    """What the encoder asks of these layers; see [`quantized.Provider`][edgemin.encoder.quantized.Provider]."""

    def describe(self, model: nn.Module, layers: Mapping[str, Any]) -> dict[str, Any]:
        """The paths of the layers: all are quantized in one way."""
        return {"layers": {path: {} for path in layers}}

    def place(self, model: nn.Module, described: Mapping[str, Any]) -> None:
        """Put an empty layer in the place of every Linear that the description names."""
        _select_engine()
        places = dict(model.named_modules())
        for path in described["layers"]:
            if not isinstance(old := places.get(path), nn.Linear):
                raise UserError(f"structure: expected a Linear at {path}, found none")
            with _quiet():
                layer = _layer_class()(old.in_features, old.out_features, bias_=old.bias is not None, dtype=torch.qint8)
            model.set_submodule(path, layer)

    def pack(self, layer: Any) -> dict[str, Tensor]:
        """The integers, scale, zero point and bias of one Linear as plain tensors."""
        weight = layer.weight()
        tensors = {
            "weight_int8": weight.int_repr(),
            "weight_scale": torch.tensor(weight.q_scale(), dtype=torch.float64),
            "weight_zero_point": torch.tensor(weight.q_zero_point(), dtype=torch.int64),
        }
        if layer.bias() is not None:
            tensors["bias"] = layer.bias().detach()
        return tensors

    def unpack(self, layer: Any, tensors: Mapping[str, Tensor]) -> None:
        """Restore a layer whose outputs equal those of the packed layer to the last bit."""
        before = self.pack(layer)
        if damaged := sorted(before.keys() ^ tensors.keys()):
            raise KeyError(damaged[0])
        for name, tensor in before.items():
            if tensors[name].shape != tensor.shape or tensors[name].dtype != tensor.dtype:
                raise RuntimeError(
                    f"{name} of {str(tensors[name].dtype).removeprefix('torch.')} and shape "
                    f"{list(tensors[name].shape)}, not {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
                )
        with _quiet():
            weight = torch._make_per_tensor_quantized_tensor(
                tensors["weight_int8"], float(tensors["weight_scale"]), int(tensors["weight_zero_point"])
            )
        layer.set_weight_bias(weight, tensors.get("bias"))

    def scales(self, layers: Mapping[str, Any]) -> dict[str, list[nn.Parameter]]:
        """None: such a layer cannot be trained."""
        return {}

    def settle(self, layers: Mapping[str, Any]) -> None:
        """Nothing to do: such a layer cannot be trained, so it is always settled."""

    def latents(self, layer: Any) -> dict[str, Tensor]:
        """None: such a layer cannot be trained."""
        return {}

    def take_up(self, layer: Any, latents: Mapping[str, Tensor]) -> None:
        """Nothing to do: there are none."""

    def recalibrate(self, model: nn.Module, layers: Mapping[str, Any], draw: Any, who: str) -> list[str]:
        """Nothing to do: no stage comes after, and activations are quantized with the range they have at each call."""
        return []

    def summary(self, model: nn.Module, layers: Mapping[str, Any]) -> None:
        """`None`: the method has no choices to report."""
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's advice to use another library: this very method is to be reproduced."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")
        yield


def _select_engine() -> None:
    """Packed weights belong to one engine; torch picks none on some CPUs."""
    if torch.backends.quantized.engine == "none":
        engines = [engine for engine in torch.backends.quantized.supported_engines if engine != "none"]
        if not engines:
            raise UserError("quantize: expected a CPU for which torch has quantized kernels, given one without any")
        torch.backends.quantized.engine = engines[0]


with suppress(UserError):  # a torch without such layers: whoever asks for them is told so
    quantized.register("torch_dynamic", TorchDynamic(), _layer_class())
