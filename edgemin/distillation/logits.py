"""Soft targets: the student learns the class probabilities that its teachers give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Unpack

from torch import Tensor

from edgemin.encoder.outline import Outline
from edgemin.encoder.taps import Reading
from edgemin.errors import UserError
from edgemin.training.distillation import Asks, Distillation, DistillSettings
from edgemin.training.soft_targets import check_outputs, check_temperature, output_loss
from edgemin.training.stage import Effect, Place


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
        settings: see [`Distillation`][edgemin.training.distillation.Distillation].
    """

    several_teachers: ClassVar[bool] = True
    takes_corpus: ClassVar[bool] = False
    same_tokens: ClassVar[bool] = False

    def __init__(self, *, temperature: float, alpha: float, **settings: Unpack[DistillSettings]) -> None:
        check_temperature(temperature)
        if not 0 < alpha <= 1:
            raise UserError(f"alpha: expected a share above 0 and at most 1, given {alpha}")
        super().__init__(task_weight=1 - alpha, settings=settings)
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
