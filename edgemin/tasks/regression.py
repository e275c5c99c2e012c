"""Regression: the label is a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef

from edgemin.encoder.building import ProblemType
from edgemin.tasks.base import Kind, LabelColumn, Labels, Reduction, at_least_float32, check_single, listed, refusal

_LARGEST = float(np.finfo(np.float32).max)
_ROUNDING = 8 * torch.finfo(torch.float32).eps  # relative; by so much padding and threads change equal predictions


def squared_error(teacher: Tensor, student: Tensor) -> Tensor:
    """(z_T - z_S)², averaged over examples, of scores `[B, 1]`; the teacher's get no gradient."""
    assert teacher.shape == student.shape and student.shape[-1] == 1
    with torch.autocast(student.device.type, enabled=False):
        return F.mse_loss(at_least_float32(student), at_least_float32(teacher.detach()))


class Regression(Kind):
    """A number: labels are `[N]` float32, the head has one output, the loss is the squared error.

    Pearson's and Spearman's correlation; 0 where all predictions or all labels are equal.
    """

    name: ClassVar[str] = "regression"
    problem_type: ClassVar[ProblemType] = "regression"

    # -- labels ------------------------------------------------------------------------------------

    def check_names(self, names: Sequence[str]) -> None:
        """Refuse any: numbers have no names."""
        raise refusal("labels", "null for a regression", list(names))

    def takes_head(self, problem_type: str | None) -> bool:
        """Also a head of which nothing is said, as transformers takes one output for a regression."""
        return problem_type in (None, self.problem_type)

    def names(self, train: LabelColumn) -> tuple[str, ...]:
        """One name, that of the column."""
        if train.named is not None:
            expected = f"another kind of task, as {train.name} holds classes ({listed(train.named)})"
            raise refusal("kind", expected, self.name)
        return (train.name,)

    def read(self, column: LabelColumn, names: Sequence[str]) -> Labels:
        """The number in each row."""
        check_single(column)
        numbers = [_number(column.split, row, value) for row, value in enumerate(column.values, start=1)]
        return np.array(numbers, dtype=np.float32)

    def strata(self, labels: Labels) -> NDArray[np.int64]:
        """All examples are one stratum."""
        return np.zeros(len(labels), dtype=np.int64)

    def shown(self, answer: Any, names: Sequence[str]) -> float:
        """The answer as it is shown: the number itself."""
        return float(answer)

    # -- the model ---------------------------------------------------------------------------------

    def loss(self, logits: Tensor, labels: Tensor, reduction: Reduction = "mean") -> Tensor:
        """The squared error."""
        scores = at_least_float32(logits).squeeze(-1)
        return F.mse_loss(scores, labels.to(scores.dtype), reduction=reduction)

    def soft_loss(self, teacher: Tensor, student: Tensor, temperature: float, *, entropy: bool = False) -> Tensor:
        """The squared error from the teacher's score: there is no distribution to soften, and no entropy."""
        return squared_error(teacher, student)

    # -- answers and metrics -----------------------------------------------------------------------

    def answers(self, logits: Tensor) -> Tensor:
        """The score, `[N]`."""
        return logits[:, 0]

    def is_constant(self, answers: Tensor) -> bool:
        """Whether all numbers are equal, apart from rounding errors of single precision."""
        return bool(answers.max() - answers.min() <= _ROUNDING * answers.abs().max())

    def flips(self, before: Tensor, after: Tensor) -> int | None:
        """Nearly every number changes a little, so there is nothing to count."""
        return None

    def distance(self, before: Tensor, after: Tensor) -> float:
        """The mean squared difference."""
        return float(F.mse_loss(after, before))

    def metrics(self, outputs: int) -> tuple[str, ...]:
        """The metrics that fit numbers: Pearson's and Spearman's correlation."""
        return ("pearson", "spearman")

    def scorers(self, logits: Tensor, labels: Tensor, outputs: int) -> Mapping[str, Callable[[], float]]:
        """By torchmetrics, in float64."""
        predicted, truth = self.answers(logits).double(), labels.double()
        undefined = self.is_constant(predicted) or self.is_constant(truth)
        return {
            "pearson": lambda: 0.0 if undefined else pearson_corrcoef(predicted, truth).item(),
            "spearman": lambda: 0.0 if undefined else spearman_corrcoef(predicted, truth).item(),
        }


def _number(split: str, row: int, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= _LARGEST:
        found = f"{str(value)[:40]} in row {row} of {split}"
        raise refusal("label_column", "finite numbers (task.kind=regression)", found)
    return number
