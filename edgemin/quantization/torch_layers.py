"""Torch's dynamic INT8: what the EdgeMIN paper used, kept as the reference.

Weights are quantized once, per tensor and symmetric: ``W_int8 = clamp(round(W / s), -128, 127)``. Activations are
quantized at every
call to uint8 with the range they then have, and the matrix product runs on integers. Embeddings stay in float. The
result can
neither be trained nor pruned any more, so it can only come last.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edgemin.errors import UserError

#: The tensors that one quantized Linear leaves in a file, below its own name.
PARTS = ("weight_int8", "weight_scale", "weight_zero_point")


def _layer_class() -> Any:
    try:
        return torch.ao.nn.quantized.dynamic.Linear
    except AttributeError as error:
        raise UserError(
            f"quantize: expected a torch with torch.ao.nn.quantized (2.13 has it), given torch {torch.__version__}"
        ) from error


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a dynamically quantized Linear."""
    return isinstance(module, _layer_class())


def quantize(model: nn.Module) -> nn.Module:
    """Replace every ``nn.Linear`` of ``model``, in place, by its dynamic INT8 form (weights per tensor)."""
    _select_engine()
    with warnings.catch_warnings():
        # torch.ao's eager quantization is deprecated; it is the method that is being reproduced here.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")
        torch.ao.quantization.quantize_dynamic(model.cpu().eval(), {nn.Linear}, dtype=torch.qint8, inplace=True)
    return model


def pack(module: Any) -> dict[str, Tensor]:
    """The integers, scale, zero point and bias of one quantized Linear as plain tensors."""
    weight = module.weight()
    tensors = {
        "weight_int8": weight.int_repr(),
        "weight_scale": torch.tensor(weight.q_scale(), dtype=torch.float64),
        "weight_zero_point": torch.tensor(weight.q_zero_point(), dtype=torch.int64),
    }
    if module.bias() is not None:
        tensors["bias"] = module.bias().detach()
    return tensors


def unpack(tensors: Mapping[str, Tensor]) -> nn.Module:
    """The quantized Linear of which :func:`pack` gave the tensors; its outputs are equal to the last bit."""
    _select_engine()
    integers = tensors["weight_int8"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")
        weight = torch._make_per_tensor_quantized_tensor(
            integers, float(tensors["weight_scale"]), int(tensors["weight_zero_point"])
        )
        layer = _layer_class()(integers.shape[1], integers.shape[0], bias_="bias" in tensors, dtype=torch.qint8)
        layer.set_weight_bias(weight, tensors.get("bias"))
    assert isinstance(layer, nn.Module)
    return layer


def _select_engine() -> None:
    """Packed weights belong to one engine; torch picks none on some CPUs."""
    if torch.backends.quantized.engine == "none":
        engines = [engine for engine in torch.backends.quantized.supported_engines if engine != "none"]
        if not engines:
            raise UserError("quantize: expected a CPU for which torch has quantized kernels, given one without any")
        torch.backends.quantized.engine = engines[0]
