"""Patient knowledge distillation: [CLS] of several layers (Sun, Cheng, Gan and Liu 2019, arXiv 1908.09355).

With h_i,l the hidden state of example i's first token, [CLS], after layer l, and P matched pairs of layers,

    L_PT = 1 / (B P) · Σ_i Σ_(l_S, l_T) ‖ h_i,l_S / ‖h_i,l_S‖ - h_i,l_T / ‖h_i,l_T‖ ‖²

Only directions count, so a distance is between 0 and 4 whatever the width. The paper sums over examples and layers;
here they are averaged, so that the weight β does not depend on their numbers. Like the paper, the H dimensions are
summed.

From the published code (intersun/PKD-for-BERT-Model-Compression) and not from the paper are the values of its example
(τ = 10, α = 0.7, β = 500; the paper searches for them) and the factor τ² of the soft targets. Of that code is not
followed: `mse_loss` of the normalized states is a mean over dimensions too, so its β is H times ours (500 for BERT-base
is 500 / 768 = 0.65 here); `KLDivLoss()` divides by the number of classes as well; and for 12 -> 3 layers it matches the
top ones.

Shapes: B batch, P pairs of layers, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from edgemin.config import NonNegative, Positive, Share
from edgemin.encoder.outline import Outline
from edgemin.encoder.taps import Reading
from edgemin.errors import UserError
from edgemin.training.averages import arithmetic
from edgemin.training.distillation import Asks, Distillation
from edgemin.training.fit import Fit
from edgemin.training.layer_maps import matched_layers
from edgemin.training.soft_targets import check_outputs, output_loss
from edgemin.training.stage import Effect, Place
from edgemin.training.teaching import Teaching

Strategy = Literal["skip", "last"]


def patience_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """Squared distance of normalized states (equation above), averaged over examples and pairs of layers.

    Computed in float32 also under autocast and for 16-bit states; with a float64 argument in float64.

    Args:
        teacher: `[B, P, H]`, the [CLS] states of the matched teacher layers; get no gradient.
        student: `[B, P, H]`, those of the student layers that learn from them.

    Returns:
        A scalar from 0 (equal directions) to 4 (opposite ones).
    """
    assert teacher.shape == student.shape and student.ndim == 3, "equal numbers of layers, equal widths"
    dtype = arithmetic(teacher, student)
    with torch.autocast(student.device.type, enabled=False):
        target = F.normalize(teacher.detach().to(dtype), dim=-1)
        learnt = F.normalize(student.to(dtype), dim=-1)
        return (learnt - target).square().sum(-1).mean()


def patient_layers(strategy: Strategy, student_layers: int, teacher_layers: int) -> dict[int, int]:
    """Which teacher layer each student layer but the last learns from; layers count from 1.

    | strategy | student layer l of L_S learns from   | 12 -> 6 (published) | 12 -> 3 |
    |----------|--------------------------------------|---------------------|---------|
    | skip     | ⌈l L_T / L_S⌉, evenly spaced         | 2, 4, 6, 8, 10      | 4, 8    |
    | last     | L_T - L_S + l, the layers at the top | 7, 8, 9, 10, 11     | 10, 11  |

    The last layers are not matched: the outputs, which stand on them, are.

    Raises:
        UserError: the student has a single layer, so that none is left to match, or more layers than its teacher.
    """
    if not 2 <= student_layers <= teacher_layers:
        raise UserError(
            f"layer_map: expected a student of at least 2 layers and at most its teacher's {teacher_layers} for "
            f"{strategy}, given one of {student_layers}"
        )
    if strategy == "last":
        return {layer: teacher_layers - student_layers + layer for layer in range(1, student_layers)}
    return {layer: -(-layer * teacher_layers // student_layers) for layer in range(1, student_layers)}


class PatientDistillation(Distillation):
    r"""PKD (Sun et al. 2019, arXiv 1908.09355): answers as a teacher gives them, and how it comes to them.

    $$ L = (1 - \alpha) \, CE + \alpha \, \tau^2 \, KL + \beta \, L_{PT} $$

    with the KL of [`soft_target_kl`][edgemin.tasks.classification.soft_target_kl] (for regression squared errors) and
    [`patience_loss`][edgemin.distillation.pkd.patience_loss]. Student and teacher need equal hidden sizes.

    Args:
        temperature: τ, above 0.
        alpha: share of the teacher's answers in the loss on answers, from 0 to 1; the labels have the rest.
        beta: weight of the [CLS] states, whose distance is summed over dimensions: 1 / H of what the official code
            calls β.
        layer_map: which layers are matched: `skip` (evenly spaced) or `last` (the top ones), either for all student
            layers but the last ([`patient_layers`][edgemin.distillation.pkd.patient_layers]), or {student layer:
            teacher layer}, counted from 1.
        fit: as for any [`Distillation`][edgemin.training.distillation.Distillation].
        teaching: likewise.
    """

    takes_corpus: ClassVar[bool] = False

    def __init__(
        self,
        *,
        temperature: Positive,
        alpha: Share,
        beta: NonNegative,
        layer_map: Strategy | dict[int, int] = "skip",
        fit: Fit,
        teaching: Teaching,
    ) -> None:
        if alpha == beta == 0:
            raise UserError(
                "alpha: expected alpha or beta above 0, for nothing else comes from the teacher, given both 0"
            )
        if not layer_map:
            raise UserError(f"layer_map: expected skip, last or at least one pair of layers, given {layer_map}")
        super().__init__(fit=fit, teaching=teaching, task_weight=1 - alpha)
        self.temperature, self.alpha, self.beta, self.layer_map = temperature, alpha, beta, layer_map
        self._pairs: dict[int, int] = {}

    def effect(self, model: Outline, teachers: Sequence[Outline], place: Place) -> Effect:
        """Soft targets and labels train the head; the teacher's answers are read where they have a weight."""
        found = super().effect(model, teachers, place)
        return replace(found, trains_head=self.settings.trains, reads_answers=self.alpha > 0)

    def match(self, student: Outline, teachers: Sequence[Outline]) -> None:
        """Match the layers; refuse other outputs, and unequal hidden sizes where [CLS] states are compared."""
        (teacher,) = teachers
        self._pairs = self.pairs(len(student.layers), len(teacher.layers))
        if self.beta > 0 and student.hidden != teacher.hidden:
            raise UserError(
                f"beta: expected 0 where the student's hidden size {student.hidden} is not the teacher's "
                f"{teacher.hidden}, as their states cannot be compared, given {self.beta}"
            )
        if self.alpha > 0:
            check_outputs(student, teachers)

    def pairs(self, student_layers: int, teacher_layers: int) -> dict[int, int]:
        """The matched layers, {student: teacher}, counted from 1; none without `beta`.

        Raises:
            UserError: a layer that one of the models does not have.
        """
        if self.beta == 0:
            return {}
        if isinstance(self.layer_map, str):
            return patient_layers(self.layer_map, student_layers, teacher_layers)
        return matched_layers(self.layer_map, student_layers, teacher_layers)

    def asks_student(self) -> Asks:
        """Reads the hidden states of the matched layers, and the logits where soft targets are learnt."""
        return Asks(hidden=tuple(self._pairs), logits=self.alpha > 0)

    def asks_teacher(self) -> Asks:
        """Reads the same of the teacher's matched layers."""
        return Asks(hidden=tuple(sorted(set(self._pairs.values()))), logits=self.alpha > 0)

    def terms(self, student: Reading, teachers: Sequence[Reading], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Two terms: `soft` (answers) and `patience` ([CLS] states), each where its weight is above 0."""
        (teacher,) = teachers
        found = {}
        if self.alpha > 0:
            assert student.logits is not None and teacher.logits is not None
            found["soft"] = self.alpha * output_loss(self.data.kind, [teacher.logits], student.logits, self.temperature)
        if self._pairs:
            target = torch.stack([teacher.hidden[layer][:, 0] for layer in self._pairs.values()], dim=1)
            learnt = torch.stack([student.hidden[layer][:, 0] for layer in self._pairs], dim=1)
            found["patience"] = self.beta * patience_loss(target, learnt)
        return found
