"""What the student learns of its teachers' outputs; the loss itself is that of the kind of task.

Shapes: B batch, C outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgemin.encoder.outline import Outline
from edgemin.errors import UserError
from edgemin.tasks.base import Kind


def output_loss(kind: Kind, teachers: Sequence[Tensor], student: Tensor, temperature: float) -> Tensor:
    """Distance of the student's outputs from its teachers': soft targets, or squared error for a regression.

    Of several teachers each counts the same: the mean of the losses towards each. For soft targets its gradient is
    that of the KL from the mean of the teachers' distributions; for squared error that of the error from their mean.

    Args:
        kind: of the task that is answered; see [`Kind.soft_loss`][edgemin.tasks.base.Kind.soft_loss].
        teachers: `[B, C]` each; they get no gradient.
        student: `[B, C]`.
        temperature: τ, above 0.

    Returns:
        A scalar; 0 where the student answers as every teacher does.
    """
    assert teachers, "nobody to learn from"
    return torch.stack([kind.soft_loss(teacher, student, temperature) for teacher in teachers]).mean()


def check_outputs(student: Outline, teachers: Sequence[Outline]) -> None:
    """Refuse a teacher of another number of outputs than the student has, or will have once it has the task's head.

    Raises:
        UserError: with the first such number.
    """
    for teacher in teachers:
        if None not in (student.labels, teacher.labels) and teacher.labels != student.labels:
            raise UserError(
                f"teacher: expected a head of {student.labels} outputs, as the student's, given one of {teacher.labels}"
            )
