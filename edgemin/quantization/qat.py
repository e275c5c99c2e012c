"""Quantization-aware training: the weights learn under the rounding that they will be stored with."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from transformers import PreTrainedModel

from edgemin.data.batches import Batches
from edgemin.data.module import DataModule
from edgemin.encoder import quantized
from edgemin.encoder.outline import Outline
from edgemin.errors import UserError
from edgemin.quantization import model as quantization
from edgemin.quantization.model import ScaleOwner
from edgemin.quantization.scales import ScaleTraining
from edgemin.quantization.settings import Quantization, quantize_given
from edgemin.training.distillation import TaskWeight
from edgemin.training.fit import Fit
from edgemin.training.method_sum import MethodSum
from edgemin.training.stage import Effect, Place
from edgemin.training.teaching import Teaching

# The learning rates of scales, as shares of that of weights, by trial (benchmarks/README.md).
SCALE_SHARES: dict[ScaleOwner, float] = {"weights": 0.1, "inputs": 0.1, "embeddings": 0.1}


class QuantizationAware(MethodSum):
    """Train a quantized model on the task's labels, or by distillation from a full-precision model.

    Weights and activations are rounded in every forward, gradients go straight through the rounding (Jacob et al. 2018,
    arXiv 1712.05877). It begins with post-training quantization: 0 steps give exactly that.

    Scales that learn have the gradient of LSQ (see [`affine`][edgemin.quantization.affine], also for what of it is
    not LSQ).

    Args:
        train: `all`, or the `scales` alone, as the second phase of EfficientQAT (arXiv 2407.11062) does: the integers
            stay, whatever becomes of their scales, and the gradient of a scale is that of its integers. With
            `learned_scales=auto` those of embeddings and inputs rest.
        train_on: `train`, or only the `calibration` sentences (their labels too, where there is no method that does
            without).
        methods: distillation, as in [`MethodSum`][edgemin.training.method_sum.MethodSum]; none: labels alone.
        task_weight: weight of the task loss; `auto` is 1, or 0 where a method trains the head.
        quantization: which layers, and how. A model that is quantized in this way already is trained on as it is.
        scaling: what the scales do.
        fit: as for any [`Distillation`][edgemin.training.distillation.Distillation].
        teaching: likewise; `teacher` is `parent`, the model that is quantized, as it was before, unless given. One that
            was quantized in this way already has nothing to teach and is refused.
    """

    def __init__(
        self,
        *,
        train: Literal["all", "scales"] = "all",
        train_on: Literal["train", "calibration"] = "train",
        methods: Mapping[str, dict[str, Any]],
        task_weight: TaskWeight = "auto",
        quantization: Quantization,
        scaling: ScaleTraining,
        fit: Fit,
        teaching: Teaching,
    ) -> None:
        if train == "scales" and scaling.scales != "learned":
            given = scaling.scales
            raise UserError(f"scales: expected learned, as nothing else is trained (train=scales), given {given}")
        if teaching.corpus is not None and not methods:
            raise UserError("methods: expected at least one with a corpus, which has no labels to learn, given none")
        if not methods and teaching.teacher is not None:
            raise UserError(
                "teacher: expected null without methods (quantize=qat_distill has some), as labels alone are learnt, "
                f"given {teaching.teacher}"
            )
        if not methods and teaching.teacher_cache:
            raise UserError("teacher_cache: expected false without methods, given true")
        if not methods and task_weight == 0 and fit.trains:
            raise UserError(
                "task_weight: expected auto or a number above 0 without methods, given 0, which learns nothing"
            )
        if teaching.corpus is not None and train_on == "calibration":
            raise UserError("train_on: expected train with a corpus, which takes its place, given calibration")
        teaching = replace(teaching, teacher=teaching.teacher or "parent")
        super().__init__(methods=methods, task_weight=task_weight, fit=fit, teaching=teaching)
        scaling.check({"inputs": quantization.activations == "static"})
        self.quantization = quantization
        self.teachers = self.teachers if self._parts else ()
        self.scaling, self.train_what, self.train_on = scaling, train, train_on
        self.scale_learning_rates = scaling.learning_rates(SCALE_SHARES, fit.learning_rate)

    def effect(self, model: Outline, teachers: Sequence[Outline], place: Place) -> Effect:
        """As its methods; an epoch may be the calibration sentences, and scales alone are trained under the head."""
        after = self.quantization.after(model)
        if self.train_on == "calibration":
            most = self.quantization.calibration_examples
            place = replace(place, examples=min(most, place.examples), texts=min(most, place.texts))
        found = super().effect(after, teachers, place)
        learns_from_itself = self.teachers == ("parent",) and self.task_weight == 0
        if learns_from_itself and self.quantization.changes_nothing(model):
            raise UserError(
                "teacher: expected another model than parent, which is quantized in this very way already and would "
                "learn from itself, given parent"
            )
        if self.train_what == "scales":
            found = replace(found, trains_head=False, moves_encoder=False)
        return replace(
            found,
            quantizes="integers",
            reads_task=found.reads_task or self.quantization.reads_data,
            idle=(*found.idle, *self.quantization.idle(model, draws=self.train_on == "calibration")),
        )

    @property
    def reads_labels(self) -> bool:
        """Whether it trains on any: of 0 steps calibration alone is left, as of post-training quantization."""
        return self.settings.trains and super().reads_labels

    def prepare(
        self, model: PreTrainedModel, data: DataModule | None, teachers: Sequence[PreTrainedModel] = ()
    ) -> None:
        """Match layers with the teachers, then quantize the model."""
        super().prepare(model, data, teachers)
        quantize_given(self, self.quantization, data)
        alone = self.train_what == "scales"
        self.scaling.begin(model, ["weights"] if alone else get_args(ScaleOwner))
        if alone:
            model.requires_grad_(False)
            for scale in itertools.chain(*quantized.scales(model).values()):
                scale.requires_grad_(True)
            for layer in quantization.quantized_layers(model).values():
                layer.fix_integers()

    def batches(self, fit: Fit) -> Batches:
        """All batches of a fit: of the calibration sentences with `train_on=calibration`."""
        if self.train_on == "train" or self.corpus is not None:
            return super().batches(fit)
        return self.task_batches(fit, self.data.drawn(self.quantization.calibration_examples, self.seed))

    def finish(self) -> PreTrainedModel:
        """Return the quantized model with all its parameters trainable again."""
        if self.train_what == "scales":
            for layer in quantization.quantized_layers(self.model).values():
                layer.free_integers()
        return super().finish().requires_grad_(True)
