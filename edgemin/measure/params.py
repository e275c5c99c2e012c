"""How many weights a model has, and how many of them PyTorch's usual count sees."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Counts the logical weights of a model, and those that `model.parameters()` shows.

    Torch's dynamic INT8 keeps the weights and biases of its Linear layers in packed objects outside
    `parameters()`. The usual count of a quantized encoder therefore sees embeddings and LayerNorms only,
    although every weight is still there: the published 11.94 M of a 33.36 M student are such a count.

    Args:
        model: Any model, floating point or with the quantized layers of `torch.ao.nn.quantized`.

    Returns:
        `params`: every logical weight, packed integer weights and their biases counted, scales and zero
        points not, a tensor that several layers share counted once; `params_visible`: `sum(p.numel() for p
        in model.parameters())`.
    """
    visible = sum(parameter.numel() for parameter in model.parameters())
    return {"params": visible + sum(tensor.numel() for tensor in _packed(model)), "params_visible": visible}


def _packed(model: nn.Module) -> Iterator[Tensor]:
    """Weights and biases of torch.ao's quantized layers; `modules()` yields a layer in two places once."""
    for module in model.modules():
        if not hasattr(module, "_packed_params"):
            continue
        for name in ("weight", "bias"):  # methods; an embedding has no bias, the packed part itself neither
            unpack: Any = getattr(module, name, None)
            tensor = unpack() if callable(unpack) else None
            if tensor is not None:
                yield tensor
