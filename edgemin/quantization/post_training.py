"""Quantization without training: rounded weights, and activations calibrated on the task's sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from edgemin.data.module import DataModule
from edgemin.encoder.outline import Outline
from edgemin.quantization.settings import Quantization, quantize_given
from edgemin.training.stage import Effect, Place, Stage


class PostTraining(Stage):
    """Quantize a model as it is.

    The result is an encoder like any other: a later stage trains it under the rounding, prunes it, or quantizes it
    anew.

    Args:
        quantization: which layers, and how.
    """

    def __init__(self, *, quantization: Quantization) -> None:
        super().__init__()
        self.quantization = quantization

    def effect(self, model: Outline, teachers: Sequence[Outline], place: Place) -> Effect:
        """The task's sentences are read to calibrate static activations, and to find what each layer does."""
        return replace(
            super().effect(self.quantization.after(model), teachers, place),
            reads_labels=False,
            quantizes="integers",
            reads_task=self.quantization.reads_data,
            idle=self.quantization.idle(model),
        )

    def prepare(
        self, model: PreTrainedModel, data: DataModule | None, teachers: Sequence[PreTrainedModel] = ()
    ) -> None:
        """Quantize the model and calibrate its activations."""
        super().prepare(model, data, teachers)
        quantize_given(self, self.quantization, data)
