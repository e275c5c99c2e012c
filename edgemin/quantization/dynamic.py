"""The stage of torch's dynamic INT8, the EdgeMIN paper's quantization, kept as the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from transformers import PreTrainedModel

from edgemin.encoder.quantized import Kind
from edgemin.errors import UserError
from edgemin.quantization import torch_layers
from edgemin.quantization.settings import check_max_drop
from edgemin.training.stage import Shape, Stage


class DynamicQuantization(Stage):
    """Torch's dynamic INT8 of every Linear, as the EdgeMIN paper used it.

    See [`torch_layers`][edgemin.quantization.torch_layers] for what it computes.

    Args:
        bits: bits of the weights; torch's method has only 8.
        max_drop: the quality gate; see [`Quantization`][edgemin.quantization.settings.Quantization].
    """

    quantizes: ClassVar[Kind | None] = "torch_dynamic"

    def __init__(self, *, bits: int = 8, max_drop: float | None = None) -> None:
        super().__init__()
        if bits != 8:
            raise UserError(
                "bits: expected 8, all that torch's dynamic quantization has (quantize=static, weight_only, "
                f"reconstruct and qat have 2, 3, 4 and 8), given {bits}"
            )
        check_max_drop(max_drop)
        self.max_drop = max_drop

    def check(self, model: Shape, teachers: Sequence[Shape]) -> None:
        """Refuse a model that is quantized already: torch replaces float layers only."""
        if model.quantized:
            raise UserError("_target_: expected a float model for torch's dynamic INT8, given one quantized before")

    def key_settings(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Leave out `max_drop`: the gate judges the result and does not change it."""
        return {name: value for name, value in settings.items() if name != "max_drop"}

    @property
    def needs_task(self) -> bool:
        """No data is needed: activations are quantized with the range they have at each call."""
        return False

    def finish(self) -> PreTrainedModel:
        """Return the encoder with quantized Linears, on the CPU, where they run."""
        return cast(PreTrainedModel, torch_layers.quantize(self.model))
