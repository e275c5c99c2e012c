"""The stage of torch's dynamic INT8, the EdgeMIN paper's quantization, kept as the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from transformers import PreTrainedModel

from edgemin.encoder.outline import Outline, QuantizedLayers
from edgemin.errors import UserError
from edgemin.quantization import torch_layers
from edgemin.training.stage import Effect, Place, Stage


class DynamicQuantization(Stage):
    """Torch's dynamic INT8 of every Linear, as the EdgeMIN paper used it.

    See [`torch_layers`][edgemin.quantization.torch_layers] for what it computes.

    Args:
        bits: bits of the weights; torch's method has only 8.
    """

    def __init__(self, *, bits: int = 8) -> None:
        super().__init__()
        if bits != 8:
            raise UserError(
                "bits: expected 8, all that torch's dynamic quantization has (quantize=static, weight_only, "
                f"reconstruct and qat have 2, 3, 4 and 8), given {bits}"
            )

    def effect(self, model: Outline, teachers: Sequence[Outline], place: Place) -> Effect:
        """No data is needed; torch replaces float layers only, so a model that is quantized already is refused."""
        if model.quantized is not None:
            raise UserError("_target_: expected a float model for torch's dynamic INT8, given one quantized before")
        return replace(
            super().effect(replace(model, quantized=QuantizedLayers("torch_dynamic")), teachers, place),
            quantizes="torch_dynamic",
            reads_task=False,
        )

    def finish(self) -> PreTrainedModel:
        """Return the encoder with quantized Linears, on the CPU, where they run."""
        return cast(PreTrainedModel, torch_layers.quantize(self.model))
