"""Soft targets: the student learns the class probabilities that its teachers give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar

from annotated_types import Gt, Le
from torch import Tensor

from edgemin.config import Positive
from edgemin.encoder.outline import Outline
from edgemin.encoder.taps import Reading
from edgemin.training.distillation import Asks, Distillation
from edgemin.training.fit import Fit
from edgemin.training.soft_targets import check_outputs, output_loss
from edgemin.training.stage import Effect, Place
from edgemin.training.teaching import Teaching


class LogitsDistillation(Distillation):
    r"""Hinton, Vinyals and Dean 2015 (arXiv 1503.02531): match the teachers' softened distributions.

    $$ L = (1 - \alpha) \, CE(y, z_S) + \alpha \, \tau^2 \, KL(softmax(z_T / \tau) \,\|\, softmax(z_S / \tau)) $$

    The KL is averaged over examples and, with several teachers, over them with equal weights
    ([`output_loss`][edgemin.training.soft_targets.output_loss]). A task with one output (regression) has squared errors
    in the place of CE and of the KL, and no temperature. Teachers may have another tokenizer than the student: each
    reads the sentences in its own tokens, and only answers are compared.

    Args:
        temperature: τ, above 0; 1 compares the distributions as they are.
        alpha: share of the teachers in the loss, above 0; the labels have the rest. 1 never looks at a label.
        fit: as for any [`Distillation`][edgemin.training.distillation.Distillation].
        teaching: likewise.
    """

    several_teachers: ClassVar[bool] = True
    takes_corpus: ClassVar[bool] = False
    same_tokens = False

    def __init__(
        self, *, temperature: Positive, alpha: Annotated[float, Gt(0), Le(1)], fit: Fit, teaching: Teaching
    ) -> None:
        super().__init__(fit=fit, teaching=teaching, task_weight=1 - alpha)
        self.temperature, self.alpha = temperature, alpha

    def effect(self, model: Outline, teachers: Sequence[Outline], place: Place) -> Effect:
        """Both terms train the head; an untrained teacher's answers would be noise."""
        found = super().effect(model, teachers, place)
        return replace(found, trains_head=self.settings.trains, reads_answers=True)

    def match(self, student: Outline, teachers: Sequence[Outline]) -> None:
        """Check that student and teachers have equally many outputs."""
        check_outputs(student, teachers)

    def asks_student(self) -> Asks:
        """Reads the student's logits."""
        return Asks(logits=True)

    def asks_teacher(self) -> Asks:
        """Reads each teacher's logits."""
        return Asks(logits=True)

    def terms(self, student: Reading, teachers: Sequence[Reading], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One term, `soft`: the distance of the student's answers from the teachers'."""
        answers = [teacher.logits for teacher in teachers if teacher.logits is not None]
        assert student.logits is not None and len(answers) == len(teachers)
        return {"soft": self.alpha * output_loss(self.data.kind, answers, student.logits, self.temperature)}
