"""Post-training quantisation."""

from __future__ import annotations

from typing import ClassVar, cast

from transformers import PreTrainedModel

from edgemin.errors import UserError
from edgemin.quantization import dynamic
from edgemin.stages.base import Stage


class DynamicQuantisation(Stage):
    """Torch's dynamic INT8 of every Linear, as the EdgeMIN paper used it; see :mod:`edgemin.quantization.dynamic`.

    Args:
        bits: of the weights; torch's method knows 8 alone.
    """

    final: ClassVar[bool] = True

    def __init__(self, *, bits: int = 8) -> None:
        super().__init__()
        if bits != 8:
            raise UserError(f"bits: expected 8, all that torch's dynamic quantisation has, given {bits}")

    @property
    def needs_task(self) -> bool:
        """Activations are quantised as they come."""
        return False

    def finish(self) -> PreTrainedModel:
        """The encoder with quantised Linears, on the CPU, where they run."""
        return cast(PreTrainedModel, dynamic.quantise(self.model))
