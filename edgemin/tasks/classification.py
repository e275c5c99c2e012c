"""Classification: every example has one of several classes.

Soft targets (Hinton, Vinyals and Dean 2015, arXiv 1503.02531): with logits z, a temperature τ and C classes, the loss
of one example towards its teacher is

    L_soft = τ² · KL(softmax(z_T / τ) ‖ softmax(z_S / τ)) = τ² · Σ_c p_T,c (ln p_T,c - ln p_S,c)

The KL is summed over classes and averaged over examples. τ² keeps the size of its gradient as the temperature
changes: a large τ alone would make it smaller by 1/τ². Published codes differ, so their weights cannot be taken over:
the official code of PKD averages over classes as well (`KLDivLoss(reduction="mean")`: with C classes, C times
too small), and TinyBERT's soft cross-entropy ends in `.mean()`, which does the same, without τ².
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_f1_score,
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_f1_score,
)

from edgemin.encoder.building import ProblemType
from edgemin.errors import UserError
from edgemin.tasks.base import (
    Kind,
    LabelColumn,
    Labels,
    Reduction,
    at_least_float32,
    check_same_names,
    check_single,
    label_name,
    listed,
    named_value,
    refusal,
    sorted_names,
)

UNLABELLED = "-1"  # what benchmarks write where a label is kept secret


def soft_target_kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """τ² times the KL divergence of the teacher's softened distribution from the student's (equation above).

    Args:
        teacher: logits `[B, C]`, the target; gets no gradient.
        student: logits `[B, C]`.
        temperature: τ, above 0; 1 compares the distributions as they are.

    Returns:
        A scalar in nats, averaged over examples.
    """
    assert teacher.shape == student.shape, "teacher and student must know the same classes"
    assert temperature > 0
    with torch.autocast(student.device.type, enabled=False):
        target = F.log_softmax(at_least_float32(teacher.detach()) / temperature, dim=-1)
        learnt = F.log_softmax(at_least_float32(student) / temperature, dim=-1)
        return temperature**2 * F.kl_div(learnt, target, reduction="batchmean", log_target=True)


def soft_cross_entropy(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """τ² times the cross-entropy of the student's softened distribution under the teacher's.

    Its gradient is that of [`soft_target_kl`][edgemin.tasks.classification.soft_target_kl]; its least value is τ² times
    the entropy of the teacher's distribution. Arguments and result as there.
    """
    assert teacher.shape == student.shape, "teacher and student must know the same classes"
    with torch.autocast(student.device.type, enabled=False):
        target = F.softmax(at_least_float32(teacher.detach()) / temperature, dim=-1)
        return temperature**2 * F.cross_entropy(at_least_float32(student) / temperature, target)


def matthews(confusion: Tensor) -> float:
    r"""Matthews' correlation coefficient of any number of classes (Gorodkin 2004, as in scikit-learn).

    $(c s - t \cdot p) / \sqrt{(s^2 - t \cdot t) (s^2 - p \cdot p)}$

    with s examples, c of them right, t of each class and p predicted as each; 0 where that denominator is 0, which is
    where all labels or all predictions are equal. It is computed in whole numbers: single precision loses rare classes
    among many examples, and torchmetrics' own reduction gives up to 1 to a constant prediction.

    Args:
        confusion: [C, C], counts by class (rows) and prediction.
    """
    true, predicted = confusion.sum(1).tolist(), confusion.sum(0).tolist()
    right, total = int(confusion.trace()), sum(true)
    spread = [total**2 - sum(count**2 for count in counts) for counts in (true, predicted)]
    if 0 in spread:
        return 0.0
    together = right * total - sum(one * other for one, other in zip(true, predicted, strict=True))
    return float(together / math.sqrt(spread[0] * spread[1]))


class Classification(Kind):
    """One of several classes: labels are class indices, `[N]` int64; the loss is the cross-entropy.

    Two classes: accuracy, F1 of the class with index 1, Matthews' correlation. More classes: accuracy, F1 averaged over
    the classes that are present or predicted, Matthews' correlation.
    """

    name: ClassVar[str] = "classification"
    problem_type: ClassVar[ProblemType] = "single_label_classification"
    one_class: ClassVar[bool] = True

    # -- labels ------------------------------------------------------------------------------------

    def check_names(self, names: Sequence[str]) -> None:
        """Refuse fewer than two classes."""
        if len(names) < 2:
            raise refusal("labels", "at least two classes", list(names))

    def names(self, train: LabelColumn) -> tuple[str, ...]:
        """The classes: as `task.labels` lists them, as the data names them, or the values found, sorted."""
        check_same_names(train)
        if (known := train.asked or train.named) is not None:
            return known
        found = {name for value in train.values if (name := label_name(value))}
        fraction = next((name for name in map(label_name, train.values) if name and _is_fraction(name)), None)
        if fraction is not None and all(_is_number(name) for name in found):
            expected = "classes (task.kind=regression predicts numbers; numbers that are classes are listed in "
            raise refusal("label_column", f"{expected}task.labels)", f"{fraction} in {train.split}")
        return sorted_names(found - {UNLABELLED})

    def read(self, column: LabelColumn, names: Sequence[str]) -> Labels:
        """The index of each row's class."""
        check_single(column)
        check_same_names(column)
        index = {name: position for position, name in enumerate(names)}
        indices = np.empty(len(column.values), dtype=np.int64)
        for row, value in enumerate(column.values):
            name = label_name(named_value(value, column.named))
            if name not in index:
                raise _foreign_label(column.split, row + 1, name, names)
            indices[row] = index[name]
        return indices

    def check_train(self, labels: Labels, names: Sequence[str]) -> Sequence[str]:
        """The classes without a training example; refuse fewer than two with one."""
        present = np.unique(labels)
        if len(present) < 2:
            raise refusal("label_column", "at least two classes in train", f"only {names[int(present[0])]}")
        return [name for index, name in enumerate(names) if index not in present]

    def shown(self, answer: Any, names: Sequence[str]) -> str:
        """The class's name; one that only the head knows is called by its number."""
        return names[int(answer)] if int(answer) < len(names) else str(int(answer))

    # -- the model ---------------------------------------------------------------------------------

    def takes_head(self, problem_type: str | None) -> bool:
        """Also a head of which nothing is said."""
        return problem_type in (None, self.problem_type)

    def loss(self, logits: Tensor, labels: Tensor, reduction: Reduction = "mean") -> Tensor:
        """The cross-entropy of the logits with the labels."""
        return F.cross_entropy(at_least_float32(logits), labels, reduction=reduction)

    def has_loss(self, logits: Tensor, labels: Tensor) -> bool:
        """A label beyond the head's classes has no cross-entropy."""
        return int(labels.max()) < logits.shape[1]

    def soft_loss(self, teacher: Tensor, student: Tensor, temperature: float, *, entropy: bool = False) -> Tensor:
        """The divergence of the answers from soft targets, or with `entropy` the cross-entropy."""
        return (soft_cross_entropy if entropy else soft_target_kl)(teacher, student, temperature)

    # -- answers and metrics -----------------------------------------------------------------------

    def answers(self, logits: Tensor) -> Tensor:
        """The class of the highest logit, `[N]`."""
        return logits.argmax(dim=1)

    def distance(self, before: Tensor, after: Tensor) -> float:
        """The mean Kullback-Leibler divergence, in nats, of the distributions before from those after."""
        target, answer = before.log_softmax(1), after.log_softmax(1)
        return max(0.0, float(F.kl_div(answer, target, reduction="batchmean", log_target=True)))

    def majority(self, labels: Tensor, outputs: int) -> Tensor:
        """Always the class that most examples have."""
        return F.one_hot(torch.full_like(labels, int(labels.bincount().argmax())), outputs).float()

    def metrics(self, outputs: int) -> tuple[str, ...]:
        """Accuracy, F1 (of two classes the second one's, else the macro average) and Matthews' correlation."""
        return ("accuracy", "f1" if outputs == 2 else "macro_f1", "matthews")

    def scorers(self, logits: Tensor, labels: Tensor, outputs: int) -> Mapping[str, Callable[[], float]]:
        """By torchmetrics, but for Matthews' correlation."""
        predicted, classes = self.answers(logits), max(logits.shape[1], outputs)
        return {
            "accuracy": lambda: multiclass_accuracy(predicted, labels, classes, average="micro").item(),
            "f1": lambda: binary_f1_score((predicted == 1).long(), (labels == 1).long()).item(),
            "matthews": lambda: matthews(multiclass_confusion_matrix(predicted, labels, classes)),
            "macro_f1": lambda: multiclass_f1_score(predicted, labels, classes, average="macro").item(),
        }


def _foreign_label(split: str, row: int, name: str | None, labels: Sequence[str]) -> UserError:
    expected = f"labels out of {listed(labels)}"
    if name == UNLABELLED:
        expected += " (-1 marks rows without a label; where it is a class, list it in task.labels)"
    elif name is not None and _is_fraction(name):
        expected += " (task.kind=regression predicts numbers)"
    return refusal("label_column", expected, f"{name or 'an empty label'} in row {row} of {split}")


def _is_number(name: str) -> bool:
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False


def _is_fraction(name: str) -> bool:
    return _is_number(name) and not float(name).is_integer()
