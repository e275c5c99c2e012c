"""Soft targets: the student learns the outputs of its teachers (Hinton, Vinyals and Dean 2015, arXiv 1503.02531).

With logits z, a temperature τ and C classes, the loss of one example is

    L_soft = τ² · KL(softmax(z_T / τ) ‖ softmax(z_S / τ)) = τ² · Σ_c p_T,c (ln p_T,c - ln p_S,c)

The KL is summed over classes and averaged over examples. τ² keeps the size of its gradient as the temperature
changes: a large τ alone would make it smaller by 1/τ². Published codes differ, so their weights cannot be taken over:
the official code of PKD averages over classes as well (`KLDivLoss(reduction="mean")`: with C classes, C times
too small), and TinyBERT's soft cross-entropy ends in `.mean()`, which does the same, without τ².

Shapes: B batch, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from edgemin.errors import UserError
from edgemin.training.averages import arithmetic


def output_loss(teachers: Sequence[Tensor], student: Tensor, temperature: float) -> Tensor:
    """Distance of the student's outputs from its teachers': soft targets, or squared error where there is one output.

    Of several teachers each counts the same: the mean of the losses towards each. For soft targets its gradient is
    that of the KL from the mean of the teachers' distributions; for squared error that of the error from their mean.

    One output is a score, not a class: the loss is then (z_T - z_S)², averaged over examples, and the
    temperature has no part in it.

    Args:
        teachers: `[B, C]` each; they get no gradient.
        student: `[B, C]`.
        temperature: τ, above 0.

    Returns:
        A scalar; 0 where the student answers as every teacher does.
    """
    assert teachers, "nobody to learn from"
    if student.shape[-1] == 1:
        losses = [squared_error(teacher, student) for teacher in teachers]
    else:
        losses = [soft_target_kl(teacher, student, temperature) for teacher in teachers]
    return torch.stack(losses).mean()


def soft_target_kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """τ² times the KL divergence of the teacher's softened distribution from the student's (equation above).

    Computed in float32 also under autocast and for 16-bit logits; with a float64 argument in float64.

    Args:
        teacher: logits `[B, C]`, the target; gets no gradient.
        student: logits `[B, C]`.
        temperature: τ, above 0; 1 compares the distributions as they are.

    Returns:
        A scalar in nats, averaged over examples.
    """
    assert teacher.shape == student.shape, "teacher and student must know the same classes"
    assert temperature > 0
    dtype = arithmetic(teacher, student)
    with torch.autocast(student.device.type, enabled=False):
        target = F.log_softmax(teacher.detach().to(dtype) / temperature, dim=-1)
        learnt = F.log_softmax(student.to(dtype) / temperature, dim=-1)
        return temperature**2 * F.kl_div(learnt, target, reduction="batchmean", log_target=True)


def squared_error(teacher: Tensor, student: Tensor) -> Tensor:
    """(z_T - z_S)², averaged over examples, for tasks whose one output `[B, 1]` is a score."""
    assert teacher.shape == student.shape and student.shape[-1] == 1
    dtype = arithmetic(teacher, student)
    with torch.autocast(student.device.type, enabled=False):
        return F.mse_loss(student.to(dtype), teacher.detach().to(dtype))


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that softens nothing.

    Raises:
        UserError: it is not above 0, or not finite.
    """
    if not 0 < temperature < math.inf:
        raise UserError(f"temperature: expected a number above 0, given {temperature}")


def check_outputs(student: int, teachers: Sequence[int]) -> None:
    """Refuse a teacher of another number of outputs than the student has.

    Raises:
        UserError: with the first such number.
    """
    for outputs in teachers:
        if outputs != student:
            raise UserError(f"teacher: expected a head of {student} outputs, as the student's, given one of {outputs}")
