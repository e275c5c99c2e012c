"""Layer-wise knowledge transfer: MobileBERT (Sun et al. 2020, arXiv 2004.02984).

Each student layer learns from the teacher layer it is matched with: its feature map (the layer's output), by the terms
of [`feature_maps`][edgemin.distillation.feature_maps], and with a_t,a the attention distribution of head a in row t

    L_AT = 1 / (T A) · Σ_t Σ_a KL(a_t,a of the teacher ‖ a_t,a of the student)

which is [`attention_kl`][edgemin.distillation.relation.attention_kl]. The published code (google-research/mobilebert,
`run_pretraining.py`) differs in points that are not followed: it averages over padding too, it takes the cross-entropy
in place of the KL (equal but for a constant), it compares each student layer's mean and variance with those of all
teacher layers at once, it runs the student without dropout beside a teacher, and it never trains the embeddings layer
by layer (they are the teacher's).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from edgemin.config import NonNegative, Share
from edgemin.distillation.feature_maps import feature_map_error, mean_error, variance_error
from edgemin.distillation.relation import attention_kl
from edgemin.encoder import parts
from edgemin.encoder.outline import Outline
from edgemin.encoder.taps import Reading
from edgemin.errors import UserError
from edgemin.training.attention import check_rebuildable, matched_heads
from edgemin.training.distillation import Asks, Distillation, TaskWeight
from edgemin.training.fit import Fit
from edgemin.training.layer_maps import matched_layers
from edgemin.training.soft_targets import check_outputs, output_loss
from edgemin.training.stage import Effect, Place
from edgemin.training.teaching import Teaching


class MobileBERT(Distillation):
    r"""MobileBERT's transfer (Sun et al. 2020, arXiv 2004.02984): each layer's feature map and attention.

    $$ L = \frac{1}{P} \sum_l w_F L_{norm}^l + w_M L_{mean}^l + w_V L_{var}^l + w_A L_{AT}^l, \qquad
       L_2 = w \, ((1 - \alpha) \, L_{task} + \alpha \, KL) $$

    over the P matched layers, with the terms of [`mobilebert`][edgemin.distillation.mobilebert]; that L is divided by P
    is the published code's, as are the defaults. `normalize=false` with `mean_weight` and `variance_weight` 0 is the
    paper's own equation, P times smaller.

    Progressively, there is one fit per matched student layer, from the lowest up, each with that layer's terms alone
    (still divided by P): what lies below is frozen, without dropout, or learns on at `lower_rate`; what lies above does
    not run; the embeddings are trained with the first. With a task loss a last fit follows, of the whole model by L_2
    alone, as the published code pre-trains after its transfer on words and on the teacher's answers. `steps` or
    `epochs` are divided evenly among the fits, the last takes what remains; each has its own warm-up and decay. All at
    once (`progressive=false`), the loss is L + L_2.

    Feature maps are compared as they are, so student and teacher need equal hidden sizes, and attention head by head,
    so matched layers need equally many. The paper's teacher is a BERT-large made to have them (IB-BERT).

    Args:
        layer_map: {student layer: teacher layer}, counted from 1; `None` spreads them evenly, the last to the last.
        feature_weight: weight of the feature maps.
        normalize: whether each token's mean and variance are taken off a feature map before.
        mean_weight: weight of the means.
        variance_weight: weight of the variances.
        attention_weight: weight of the attention distributions; not for ModernBERT, whose attention does not follow
            from the projections alone.
        progressive: train layer after layer; otherwise all matched layers at once, in one fit.
        lower_rate: learning rate of the layers below the one that learns, as a share of its own; 0 freezes them. The
            published code has 0.1.
        task_weight: weight of L_2; see [`Distillation`][edgemin.training.distillation.Distillation].
        alpha: share of the teacher's answers in L_2, from 0 to 1; the labels have the rest.
        fit: the budget of all fits; `patience` applies to the last, with the task loss, alone: before it there is
            nothing to score.
        teaching: as for any [`Distillation`][edgemin.training.distillation.Distillation].
    """

    def __init__(
        self,
        *,
        layer_map: dict[int, int] | None = None,
        feature_weight: NonNegative = 100.0,
        normalize: bool = True,
        mean_weight: NonNegative = 5000.0,
        variance_weight: NonNegative = 5.0,
        attention_weight: NonNegative = 1.0,
        progressive: bool = True,
        lower_rate: Share = 0.0,
        alpha: Share = 0.5,
        task_weight: TaskWeight = "auto",
        fit: Fit,
        teaching: Teaching,
    ) -> None:
        super().__init__(fit=fit, teaching=teaching, task_weight=task_weight)
        self.weights = {
            "feature": feature_weight,
            "mean": mean_weight,
            "variance": variance_weight,
            "attention": attention_weight,
        }
        if not any(self.weights.values()):
            raise UserError("feature_weight: expected it or another weight above 0, given all 0")
        self.layer_map, self.normalize, self.progressive = layer_map, normalize, progressive
        if lower_rate and not progressive:
            raise UserError(
                f"lower_rate: expected 0 where all layers learn at once (progressive=false), given {lower_rate}"
            )
        self.lower_rate, self.alpha = lower_rate, alpha
        self._joint_task_weight = 0.0
        self._pairs: dict[int, int] = {}
        self._heads: dict[int, int] = {}

    # -- what planning asks ------------------------------------------------------------------------

    def effect(self, model: Outline, teachers: Sequence[Outline], place: Place) -> Effect:
        """All fits divide one budget; the last, after those of single layers, has the task loss."""
        found = super().effect(model, teachers, place)
        assert self.task_weight != "auto"
        self._joint_task_weight = self.task_weight
        self.task_weight *= 1 - self.alpha  # of the labels; progressively, of the last fit
        if self.progressive and self._joint_task_weight == 0 and self.settings.patience is not None:
            raise UserError(
                "patience: expected null where layers are learnt one after the other (progressive) and nothing after "
                f"them (task_weight=0), as there is nothing to score, given {self.settings.patience}"
            )
        return replace(
            found,
            reads_holdout=self.settings.patience is not None,
            reads_answers=found.trains_head and self.alpha > 0,
            steps=self.settings.optimizer_steps(place.given(found.reads_labels)),
        )

    @property
    def reads_labels(self) -> bool:
        """Whether the last fit has the labels' share."""
        return super().reads_labels and self.alpha < 1

    def match(self, student: Outline, teachers: Sequence[Outline]) -> None:
        """Match the layers, the lowest first; refuse hidden sizes, heads or families that cannot be compared."""
        (teacher,) = teachers
        pairs = matched_layers(self.layer_map, len(student.layers), len(teacher.layers))
        self._pairs = dict(sorted(pairs.items()))
        if self.weights["attention"]:
            check_rebuildable(student, teacher)
        if self.weights["feature"] and student.hidden != teacher.hidden:
            raise UserError(
                f"feature_weight: expected 0 where the student's hidden size {student.hidden} is not the teacher's "
                f"{teacher.hidden}, as feature maps are compared unit by unit, given {self.weights['feature']}"
            )
        if self.weights["attention"]:
            self._heads = matched_heads(student, teacher, self._pairs)
        if self._joint_task_weight and self.alpha:
            check_outputs(student, teachers)

    # -- training ----------------------------------------------------------------------------------

    def equip(self, student: Outline, teachers: Sequence[Outline]) -> None:
        """Note layers for which there are no steps."""
        untrained = [layer for layer, fit in zip(self._pairs, self.fits(), strict=False) if not fit.trains]
        if self.settings.trains and untrained:
            self.notes.append(f"{self.settings.steps} steps are too few for a fit of each layer: none of {untrained}")

    def fits(self) -> list[Fit]:
        """One fit; or, progressively, one for each matched layer and, with a task loss, one more.

        Before layers are matched their number is not known: then two stand for "more than one".
        """
        if not self.progressive:
            return [self.settings]
        if not self._pairs:
            return [self.settings] * 2
        fits = _divided(self.settings, len(self._pairs) + (self._joint_task_weight != 0))
        alone = [replace(fit, patience=None) for fit in fits[: len(self._pairs)]]
        return alone + fits[len(self._pairs) :]

    def _layers(self) -> tuple[int, ...]:
        """The student's layers that learn from their teacher's in this fit: one, in the last none, or all at once."""
        found = tuple(self._pairs)
        return found[self.phase : self.phase + 1] if self.progressive else found

    @property
    def _task_weight_now(self) -> float:
        return 0.0 if self.progressive and self._layers() else self._joint_task_weight

    def _learning(self) -> range:
        """The depths that learn with the layer of this fit: its own and, below, those of layers that are not matched.

        Depth 0 is the embeddings.
        """
        (layer,) = self._layers()
        return range(max((other for other in self._pairs if other < layer), default=-1) + 1, layer + 1)

    def _lower(self) -> range:
        """The depths of the layers below them."""
        return range(1, self._learning().start)

    def setup(self, stage: str) -> None:
        """Freeze all but what learns in this fit, before its optimizer is made; also when a fit is resumed."""
        super().setup(stage)
        self.task_weight = (1 - self.alpha) * self._task_weight_now
        alone = self.progressive and bool(self._layers())
        self.model.requires_grad_(not alone)
        if alone:
            depths = parts.parameters_by_depth(self.model)
            for depth in (*self._learning(), *(self._lower() if self.lower_rate else ())):
                for parameter in depths[depth]:
                    parameter.requires_grad_(True)
            parts.silence_frozen(self.model)

    def grouped(self, groups: list[dict[str, Any]], fit: Fit) -> list[dict[str, Any]]:
        """Give the layers below the one that learns their own rate."""
        if not self.lower_rate or not self._layers():
            return groups
        depths = parts.parameters_by_depth(self.model)
        lower = {id(parameter) for depth in self._lower() for parameter in depths[depth]}

        def part(group: dict[str, Any], is_lower: bool) -> dict[str, Any]:
            return group | {"params": [one for one in group["params"] if (id(one) in lower) == is_lower]}

        rate = self.lower_rate * fit.learning_rate
        return [part(group, False) for group in groups] + [part(group, True) | {"lr": rate} for group in groups]

    def asks_student(self) -> Asks:
        """Reads the student layers that learn in this fit, and the logits where the teacher's answers are learnt."""
        return self._asks(self._layers())

    def asks_teacher(self) -> Asks:
        """Reads the same of the teacher layers that they are matched with."""
        return self._asks(tuple(sorted({self._pairs[layer] for layer in self._layers()})))

    def _asks(self, layers: tuple[int, ...]) -> Asks:
        maps = any(self.weights[name] for name in ("feature", "mean", "variance"))
        return Asks(
            projections=layers if self.weights["attention"] else (),
            hidden=layers if maps else (),
            logits=self._task_weight_now * self.alpha > 0,
        )

    def terms(self, student: Reading, teachers: Sequence[Reading], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`feature`, `mean`, `variance` and `attention` of the layers of this fit; `soft` where answers are learnt."""
        (teacher,) = teachers
        mask = batch["attention_mask"]
        errors: dict[str, list[Tensor]] = {name: [] for name, weight in self.weights.items() if weight}
        for mine in self._layers():
            theirs = self._pairs[mine]
            if "feature" in errors:
                maps = teacher.hidden[theirs], student.hidden[mine]
                errors["feature"].append(feature_map_error(*maps, mask, normalize=self.normalize))
            if "mean" in errors:
                errors["mean"].append(mean_error(teacher.hidden[theirs], student.hidden[mine], mask))
            if "variance" in errors:
                errors["variance"].append(variance_error(teacher.hidden[theirs], student.hidden[mine], mask))
            if "attention" in errors:
                sides = teacher.projections[theirs], student.projections[mine]
                errors["attention"].append(attention_kl(*sides, mask, self._heads[mine]))
        found = {
            name: self.weights[name] / len(self._pairs) * torch.stack(of_layers).sum()
            for name, of_layers in errors.items()
            if of_layers
        }
        if (weight := self.alpha * self._task_weight_now) > 0:
            assert student.logits is not None and teacher.logits is not None
            found["soft"] = weight * output_loss(self.data.kind, [teacher.logits], student.logits, 1.0)
        return found

    def finish(self) -> PreTrainedModel:
        """Return the student with all its parameters trainable again."""
        return super().finish().requires_grad_(True)


def _divided(fit: Fit, parts: int) -> list[Fit]:
    """A fit's steps or epochs in equal parts; what remains of the steps goes to the last."""
    if fit.steps is not None:
        each = fit.steps // parts
        return [replace(fit, steps=each)] * (parts - 1) + [replace(fit, steps=fit.steps - each * (parts - 1))]
    assert fit.epochs is not None
    return [replace(fit, epochs=fit.epochs / parts)] * parts
