"""Quantization-aware training: the weights learn under the rounding that they will be stored with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from transformers import PreTrainedModel

from edgemin.data.batches import Batches
from edgemin.data.module import DataModule
from edgemin.encoder import quantized
from edgemin.encoder.outline import Outline, QuantizedLayers
from edgemin.errors import UserError
from edgemin.quantization import model as quantization
from edgemin.quantization.layers import Scales
from edgemin.quantization.settings import Quantization, quantize_given
from edgemin.training.distillation import TaskWeight
from edgemin.training.fit import Fit
from edgemin.training.method_sum import MethodSum
from edgemin.training.stage import Effect, Place
from edgemin.training.teaching import Teaching


class QuantizationAware(MethodSum):
    """Train a quantized model on the task's labels, or by distillation from a full-precision model.

    Weights and activations are rounded in every forward, gradients go straight through the rounding (Jacob et al. 2018,
    arXiv 1712.05877). It begins with post-training quantization: 0 steps give exactly that.

    Args:
        scales: `fixed` at their calibrated values; `moving`: those of weights keep their share of the largest weight,
            those of activations follow a moving average of their range (padding included, momentum 0.99); `learned`
            (LSQ, arXiv 1902.08153; see [`affine`][edgemin.quantization.affine]), from their calibrated values on.
        train: `all`, or the `scales` alone (the second phase of EfficientQAT, arXiv 2407.11062).
        train_on: `train`, or only the `calibration` sentences (their labels too, where there is no method that does
            without).
        methods: distillation, as in [`MethodSum`][edgemin.training.method_sum.MethodSum]; none: labels alone.
        task_weight: weight of the task loss; `auto` is 1, or 0 where a method trains the head.
        quantization: which layers, and how.
        fit: as for any [`Distillation`][edgemin.training.distillation.Distillation].
        teaching: likewise; `teacher` is `parent`, the model that is quantized, in full precision, unless given.
    """

    def __init__(
        self,
        *,
        scales: Scales = "learned",
        train: Literal["all", "scales"] = "all",
        train_on: Literal["train", "calibration"] = "train",
        methods: Mapping[str, dict[str, Any]],
        task_weight: TaskWeight = "auto",
        quantization: Quantization,
        fit: Fit,
        teaching: Teaching,
    ) -> None:
        if train == "scales" and scales != "learned":
            raise UserError(f"scales: expected learned, as nothing else is trained (train=scales), given {scales}")
        if teaching.corpus is not None and not methods:
            raise UserError("methods: expected at least one with a corpus, which has no labels to learn, given none")
        if teaching.corpus is not None and train_on == "calibration":
            raise UserError("train_on: expected train with a corpus, which takes its place, given calibration")
        teaching = replace(teaching, teacher=teaching.teacher or "parent")
        super().__init__(methods=methods, task_weight=task_weight, fit=fit, teaching=teaching)
        self.quantization = quantization
        self.teachers = self.teachers if self._parts else ()
        self.scales, self.train_what, self.train_on = scales, train, train_on

    def effect(self, model: Outline, teachers: Sequence[Outline], place: Place) -> Effect:
        """As its methods; an epoch may be the calibration sentences."""
        self.quantization.check(model)
        if self.train_on == "calibration":
            place = replace(place, examples=min(self.quantization.calibration_examples, place.examples))
        found = super().effect(replace(model, quantized=QuantizedLayers("integers")), teachers, place)
        return replace(found, quantizes="integers", reads_task=found.reads_task or self.quantization.reads_data)

    def auto_task_weight(self, place: Place) -> float:
        """1 without methods: labels are then all there is to learn from."""
        return super().auto_task_weight(place) if self._parts else 1.0

    def prepare(
        self, model: PreTrainedModel, data: DataModule | None, teachers: Sequence[PreTrainedModel] = ()
    ) -> None:
        """Match layers with the teachers, then quantize the model."""
        super().prepare(model, data, teachers)
        quantize_given(self, self.quantization, data)
        quantization.follow(model, self.scales)
        if self.train_what == "scales":
            model.requires_grad_(False)
            for scale in quantized.scales(model):
                scale.requires_grad_(True)

    def batches(self, fit: Fit) -> Batches:
        """All batches of a fit: of the calibration sentences with `train_on=calibration`."""
        if self.train_on == "train" or self.corpus is not None:
            return super().batches(fit)
        return self.task_batches(fit, self.data.drawn(self.quantization.calibration_examples, self.seed))

    def finish(self) -> PreTrainedModel:
        """Return the quantized model with all its parameters trainable again."""
        return super().finish().requires_grad_(True)
