"""Multi-label classification: every example has any number of labels, none among them.

Each label is a question of its own, answered with the probability σ(z). Towards a teacher with logits z_T the loss of
an example is that of soft targets, label by label, averaged over the L labels:

    L_soft = τ² / L · Σ_l KL(σ(z_T,l / τ) ‖ σ(z_S,l / τ))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multilabel_exact_match, multilabel_f1_score

from edgemin.encoder.building import ProblemType
from edgemin.tasks.base import (
    Kind,
    LabelColumn,
    Labels,
    Reduction,
    at_least_float32,
    check_same_names,
    label_name,
    listed,
    named_value,
    refusal,
    sorted_names,
)

DELIMITER = "|"


def binary_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(σ(z_T) ‖ σ(z_S)) of each logit, in nats; both of one shape."""
    yes = F.logsigmoid(teacher).exp() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    no = F.logsigmoid(-teacher).exp() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return yes + no


class MultiLabel(Kind):
    """Any number of labels: `[N, L]` float32 of zeros and ones; the loss is the binary cross-entropy, averaged over L.

    A row of the data holds a list of labels, or a text that names them with `|` between; an empty one has none. A model
    answers with the labels whose logit is above 0. F1 over all labels of all examples, F1 averaged over labels (0 for
    one that is neither there nor predicted), and accuracy: the share of examples with exactly their labels.
    """

    name: ClassVar[str] = "multi_label"
    problem_type: ClassVar[ProblemType] = "multi_label_classification"

    # -- labels ------------------------------------------------------------------------------------

    def check_names(self, names: Sequence[str]) -> None:
        """Refuse fewer than two."""
        if len(names) < 2:
            raise refusal("labels", "at least two labels", list(names))

    def names(self, train: LabelColumn) -> tuple[str, ...]:
        """The labels: as `task.labels` lists them, as the data names them, or those found, sorted."""
        check_same_names(train)
        if (known := train.asked or train.named) is not None:
            return known
        found = sorted_names(name for row in range(len(train.values)) for name in _labels_of(train, row))
        if len(found) < 2:
            raise refusal("label_column", "at least two labels in train", listed(found) or "none")
        return found

    def read(self, column: LabelColumn, names: Sequence[str]) -> Labels:
        """A row of zeros and ones for each example."""
        check_same_names(column)
        index = {name: position for position, name in enumerate(names)}
        labels = np.zeros((len(column.values), len(names)), dtype=np.float32)
        for row in range(len(labels)):
            for name in _labels_of(column, row):
                if name not in index:
                    raise _refused(column, row, f"labels out of {listed(names)}", name)
                labels[row, index[name]] = 1
        return labels

    def check_train(self, labels: Labels, names: Sequence[str]) -> Sequence[str]:
        """The labels of no training example; refuse examples that all have the same ones."""
        if bool((labels == labels[0]).all()):
            raise refusal(
                "label_column", "examples of different labels in train", f"only {self.shown(labels[0], names)}"
            )
        present = np.flatnonzero(labels.any(axis=0))
        return [name for place, name in enumerate(names) if place not in present]

    def shown(self, answer: Any, names: Sequence[str]) -> str:
        """The labels with `|` between them."""
        return DELIMITER.join(name for name, has in zip(names, answer, strict=True) if has) or "no label"

    # -- the model ---------------------------------------------------------------------------------

    def loss(self, logits: Tensor, labels: Tensor, reduction: Reduction = "mean") -> Tensor:
        """The binary cross-entropy, averaged over labels."""
        wide = at_least_float32(logits)
        losses = F.binary_cross_entropy_with_logits(wide, labels.to(wide.dtype), reduction="none").mean(1)
        return losses if reduction == "none" else losses.mean()

    def soft_loss(self, teacher: Tensor, student: Tensor, temperature: float, *, entropy: bool = False) -> Tensor:
        """Soft targets, label by label."""
        assert teacher.shape == student.shape, "teacher and student must know the same labels"
        with torch.autocast(student.device.type, enabled=False):
            target = at_least_float32(teacher.detach()) / temperature
            learnt = at_least_float32(student) / temperature
            if entropy:
                losses = F.binary_cross_entropy_with_logits(learnt, target.sigmoid(), reduction="none")
            else:
                losses = binary_kl(target, learnt)
            return temperature**2 * losses.mean()

    # -- answers and metrics -----------------------------------------------------------------------

    def answers(self, logits: Tensor) -> Tensor:
        """Whether each label is given, `[N, L]`."""
        return logits > 0

    def distance(self, before: Tensor, after: Tensor) -> float:
        """The mean Kullback-Leibler divergence, in nats: the sum over labels, which are independent answers."""
        return max(0.0, float(binary_kl(before, after).sum(1).mean()))

    def majority(self, labels: Tensor, outputs: int) -> Tensor:
        """Always the labels that most examples have together."""
        sets, counts = labels.unique(dim=0, return_counts=True)
        most: Tensor = sets[counts.argmax()]
        return (2 * most - 1).expand(len(labels), outputs)

    def metrics(self, outputs: int) -> tuple[str, ...]:
        """The same for any number of labels."""
        return ("micro_f1", "macro_f1", "accuracy")

    def scorers(self, logits: Tensor, labels: Tensor, outputs: int) -> Mapping[str, Callable[[], float]]:
        """The metrics by name, as torchmetrics computes them over labels."""
        predicted, truth = self.answers(logits).long(), labels.long()
        return {
            "micro_f1": lambda: multilabel_f1_score(predicted, truth, outputs, average="micro").item(),
            "macro_f1": lambda: multilabel_f1_score(predicted, truth, outputs, average="macro").item(),
            "accuracy": lambda: multilabel_exact_match(predicted, truth, outputs).item(),
        }


def _labels_of(column: LabelColumn, row: int) -> list[str]:
    """The names of a row's labels."""
    value = column.values[row]
    if isinstance(value, str):
        value = value.split(DELIMITER) if value.strip() else []
    elif isinstance(value, int | float):
        value = [value]
    if not isinstance(value, list | tuple):
        expected = f"a list of labels in {column.name}, or a text of labels with {DELIMITER} between"
        raise _refused(column, row, expected, "null" if value is None else f"a {type(value).__name__}")
    names = [label_name(named_value(entry, column.named)) for entry in value]
    found = [name for name in names if name]
    if len(set(found)) < len(names):
        raise _refused(column, row, "distinct labels, none of them empty", listed(map(str, value)))
    return found


def _refused(column: LabelColumn, row: int, expected: str, given: str) -> Exception:
    return refusal("label_column", expected, f"{given} in row {row + 1} of {column.split}")
