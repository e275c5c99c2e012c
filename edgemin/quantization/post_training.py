"""Quantization without training: rounded weights, and activations calibrated on the task's sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Unpack

from transformers import PreTrainedModel

from edgemin.data.module import DataModule
from edgemin.encoder.quantized import Kind
from edgemin.quantization.settings import Quantization, QuantizationSettings
from edgemin.training.stage import Shape, Stage


class PostTraining(Stage):
    """Quantize a model as it is.

    The result is an encoder like any other: a later stage trains it under the rounding, prunes it, or quantizes it
    anew.

    Args:
        settings: all settings of [`Quantization`][edgemin.quantization.settings.Quantization].
    """

    quantizes: ClassVar[Kind | None] = "integers"

    def __init__(self, **settings: Unpack[QuantizationSettings]) -> None:
        super().__init__()
        self.quantization = Quantization(**settings)
        self.max_drop = self.quantization.max_drop

    @property
    def needs_task(self) -> bool:
        """Whether it reads the task's sentences, which calibrate static activations."""
        return self.quantization.reads_data

    def check(self, model: Shape, teachers: Sequence[Shape]) -> None:
        """Refuse what can be known to be impossible from the shape alone."""
        self.quantization.check(model)

    def key_settings(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Leave out `max_drop`: the gate judges the result and does not change it."""
        return {name: value for name, value in settings.items() if name != "max_drop"}

    def prepare(
        self, model: PreTrainedModel, data: DataModule | None, teachers: Sequence[PreTrainedModel] = ()
    ) -> None:
        """Quantize the model and calibrate its activations."""
        super().prepare(model, data, teachers)
        applied = self.quantization.apply(model, data, self.seed)
        self.notes += applied.notes
        self.findings |= applied.findings
