"""Patient knowledge distillation: soft targets, and the [CLS] states of several layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from edgemin.distillation.layers import matched_layers
from edgemin.distillation.logits import check_outputs, check_temperature, output_loss
from edgemin.distillation.pkd import Strategy, patience_loss, patient_layers
from edgemin.distillation.weights import check_weight
from edgemin.encoder import Reading
from edgemin.errors import UserError
from edgemin.stages.base import Shape
from edgemin.stages.distillation import Asks, Distillation, DistillSettings


class PatientDistillation(Distillation):
    r"""PKD (Sun et al. 2019, arXiv 1908.09355): answers as a teacher gives them, and how it comes to them.

    .. math:: L = (1 - \alpha) \, CE + \alpha \, \tau^2 \, KL + \beta \, L_{PT}

    with the KL of :func:`edgemin.distillation.logits.soft_target_kl` (for regression squared errors) and
    :func:`edgemin.distillation.pkd.patience_loss`. Student and teacher need equal hidden sizes.

    Args:
        temperature: τ, above 0.
        alpha: share of the teacher's answers in the loss on answers, from 0 to 1; the labels have the rest.
        beta: weight of the [CLS] states, whose distance is summed over dimensions: 1 / H of what the official code
            calls β.
        layer_map: which layers are matched: ``skip`` (evenly spaced) or ``last`` (the top ones), either for all student
            layers but the last (:func:`edgemin.distillation.pkd.patient_layers`), or {student layer: teacher layer},
            counted from 1.
        settings: see :class:`edgemin.stages.distillation.Distillation`.
    """

    takes_corpus: ClassVar[bool] = False

    def __init__(
        self,
        *,
        temperature: float,
        alpha: float,
        beta: float,
        layer_map: Strategy | dict[int, int] = "skip",
        **settings: Unpack[DistillSettings],
    ) -> None:
        check_temperature(temperature)
        if not 0 <= alpha <= 1:
            raise UserError(f"alpha: expected a share in [0, 1], given {alpha}")
        check_weight("beta", beta)
        if alpha == beta == 0:
            raise UserError(
                "alpha: expected alpha or beta above 0, for nothing else comes from the teacher, given both 0"
            )
        if not layer_map:
            raise UserError(f"layer_map: expected skip, last or at least one pair of layers, given {layer_map}")
        super().__init__(task_weight=1 - alpha, settings=settings)
        self.temperature, self.alpha, self.beta, self.layer_map = temperature, alpha, beta, layer_map
        self._pairs: dict[int, int] = {}

    @property
    def trains_head(self) -> bool:
        """Always: teacher and labels share the loss on answers."""
        return self.settings.trains

    @property
    def needs_trained_teacher(self) -> bool:
        """Where its answers are learnt."""
        return self.alpha > 0

    def check(self, model: Shape, teachers: Sequence[Shape]) -> None:
        """Layers must exist, hidden sizes be equal."""
        (teacher,) = teachers
        self.pairs(model.layers, teacher.layers)
        self._check_widths(model.hidden, teacher.hidden)

    def match(self, student: Mapping[str, Any], teachers: Sequence[Mapping[str, Any]]) -> None:
        """Match layers."""
        (teacher,) = teachers
        if self.alpha > 0:
            check_outputs(student["labels"], [teacher["labels"]])
        self._check_widths(student["hidden"], teacher["hidden"])
        self._pairs = self.pairs(len(student["layers"]), len(teacher["layers"]))

    def pairs(self, student_layers: int, teacher_layers: int) -> dict[int, int]:
        """The matched layers, {student: teacher}, counted from 1; none without ``beta``.

        Raises:
            UserError: a layer that one of the models does not have.
        """
        if self.beta == 0:
            return {}
        if isinstance(self.layer_map, str):
            return patient_layers(self.layer_map, student_layers, teacher_layers)
        return matched_layers(self.layer_map, student_layers, teacher_layers)

    def asks_student(self) -> Asks:
        """Its answers where the teacher's are to be learnt, the states of its matched layers."""
        return Asks(hidden=tuple(self._pairs), logits=self.alpha > 0)

    def asks_teacher(self) -> Asks:
        """As of the student."""
        return Asks(hidden=tuple(sorted(set(self._pairs.values()))), logits=self.alpha > 0)

    def terms(self, student: Reading, teachers: Sequence[Reading], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``soft``: the answers; ``patience``: the [CLS] states."""
        (teacher,) = teachers
        found = {}
        if self.alpha > 0:
            assert student.logits is not None and teacher.logits is not None
            found["soft"] = self.alpha * output_loss([teacher.logits], student.logits, self.temperature)
        if self._pairs:
            target = torch.stack([teacher.hidden[layer][:, 0] for layer in self._pairs.values()], dim=1)
            learnt = torch.stack([student.hidden[layer][:, 0] for layer in self._pairs], dim=1)
            found["patience"] = self.beta * patience_loss(target, learnt)
        return found

    def _check_widths(self, student: int, teacher: int) -> None:
        if self.beta > 0 and student != teacher:
            raise UserError(
                f"beta: expected 0 where the student's hidden size {student} is not the teacher's {teacher}, as their "
                f"states cannot be compared, given {self.beta}"
            )
