"""The contract of a kind of task: all that depends on what a label is.

A kind reads and checks labels and says which head they need, what the losses are, how answers are scored and how far
two sets of answers are apart. Nothing else asks what kind a task is of. A kind holds no state.

Shapes: N examples of a split, B of a batch, C outputs of the head. Labels are `[N]` or `[N, C]`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from edgemin.encoder import building, parts
from edgemin.encoder.building import ProblemType
from edgemin.errors import UserError
from edgemin.plain_text import is_text

Labels = NDArray[np.int64] | NDArray[np.float32]
Reduction = Literal["mean", "none"]


def refusal(key: str, expected: str, given: object) -> UserError:
    """The error for a key of the task: what was expected and what was given, in one line."""
    shown = " ".join(str(given).split()) if given is not None else "null"
    return UserError(f"task.{key}: expected {expected}, given {shown}")


def listed(names: Iterable[str]) -> str:
    """The first dozen names, for a message."""
    names = list(names)
    return ", ".join(names[:12]) + (f" ... ({len(names)} in all)" if len(names) > 12 else "")


class LabelColumn(NamedTuple):
    """The labels of a split as they were read.

    Attributes:
        name: of the column.
        split: of the data, for messages.
        values: one per row.
        named: the names that numbers in it stand for, where the data itself says so.
        asked: the names that `task.labels` lists.
    """

    name: str
    split: str
    values: Sequence[Any]
    named: tuple[str, ...] | None = None
    asked: tuple[str, ...] | None = None


class Kind(ABC):
    """One kind of task.

    Attributes:
        name: what `task.kind` calls it.
        problem_type: what transformers calls it, in a model's configuration; stock pipelines go by it.
        one_class: whether every example has exactly one of several classes, so that examples can be grouped by it and
            the classes of two tasks can be matched.
    """

    name: ClassVar[str]
    problem_type: ClassVar[ProblemType]
    one_class: ClassVar[bool] = False

    @property
    def module(self) -> str:
        """The module whose code is part of the key of what was trained or scored on such a task."""
        return type(self).__module__

    # -- labels ------------------------------------------------------------------------------------

    @abstractmethod
    def check_names(self, names: Sequence[str]) -> None:
        """Refuse names that `task.labels` must not have."""

    @abstractmethod
    def names(self, train: LabelColumn) -> tuple[str, ...]:
        """The name of each output of the head, in order.

        Raises:
            UserError: the training split, or what `task.labels` says of it, is of another kind.
        """

    @abstractmethod
    def read(self, column: LabelColumn, names: Sequence[str]) -> Labels:
        """The labels of a split, in the form in which batches have them.

        Raises:
            UserError: a label cannot be one of this kind; the line names its row.
        """

    def check_train(self, labels: Labels, names: Sequence[str]) -> Sequence[str]:
        """The names that no training example has.

        Raises:
            UserError: nothing can be learnt from these labels.
        """
        return ()

    def strata(self, labels: Labels) -> NDArray[np.int64]:
        """The stratum of each example, `[N]`: a draw keeps the share of each. Here: equal labels."""
        _, strata = np.unique(labels, axis=0, return_inverse=True)
        return strata.reshape(-1)

    @abstractmethod
    def shown(self, answer: Any, names: Sequence[str]) -> str | float:
        """One label, or one of `answers`, as a reader knows it: in names, or a number."""

    # -- the model ---------------------------------------------------------------------------------

    def takes_head(self, problem_type: str | None) -> bool:
        """Whether a head that was trained as transformers calls it answers tasks of this kind."""
        return problem_type == self.problem_type

    def ensure_head(self, model: PreTrainedModel, names: Sequence[str]) -> None:
        """Keep a head of this kind for these names, else attach a fresh one (drawn from torch's generator)."""
        if parts.label_names(model) != tuple(names) or not self.takes_head(model.config.problem_type):
            building.attach_head(model, names, self.problem_type)

    @abstractmethod
    def loss(self, logits: Tensor, labels: Tensor, reduction: Reduction = "mean") -> Tensor:
        """The loss of logits `[B, C]`: the mean over examples, or `[B]`. At least float32."""

    def has_loss(self, logits: Tensor, labels: Tensor) -> bool:
        """Whether these logits can have a loss; a head that was trained for another task may lack classes."""
        return True

    @abstractmethod
    def soft_loss(self, teacher: Tensor, student: Tensor, temperature: float, *, entropy: bool = False) -> Tensor:
        """The distance of a student's logits `[B, C]` from a teacher's, the mean over examples, for training.

        Computed in float32 also under autocast and for 16-bit logits; with a float64 argument in float64.

        Args:
            teacher: the target; gets no gradient.
            student: 0 where it answers as the teacher does.
            temperature: by which distributions are softened, where there are any.
            entropy: leave in what does not depend on the student: a cross-entropy in the place of a divergence.
        """

    # -- answers -----------------------------------------------------------------------------------

    @abstractmethod
    def answers(self, logits: Tensor) -> Tensor:
        """What logits `[N, C]` say, in the form of the labels."""

    def is_constant(self, answers: Tensor) -> bool:
        """Whether all answers are the same."""
        return bool((answers == answers[0]).all())

    def flips(self, before: Tensor, after: Tensor) -> int | None:
        """How many examples two sets of logits `[N, C]` answer differently; `None` where that says nothing."""
        changed = self.answers(before) != self.answers(after)
        return int(changed.reshape(len(changed), -1).any(1).sum())

    @abstractmethod
    def distance(self, before: Tensor, after: Tensor) -> float:
        """How far logits `[N, C]`, float64, have moved: the mean over examples, without a label."""

    def majority(self, labels: Tensor, outputs: int) -> Tensor | None:
        """The logits `[N, C]` of a model that always gives the most frequent label; `None` where that says nothing."""
        return None

    # -- metrics -----------------------------------------------------------------------------------

    @abstractmethod
    def metrics(self, outputs: int) -> tuple[str, ...]:
        """The metrics that fit a head of so many outputs, the primary one first."""

    def checked_metrics(self, asked: Sequence[str] | None, outputs: int) -> tuple[str, ...]:
        """The metrics to report, in the order asked; all that fit when none is asked. The first one leads.

        Raises:
            UserError: a name is not one of the metrics that fit.
        """
        known = self.metrics(outputs)
        for name in asked or ():
            if name not in known:
                raise refusal("metrics", f"some of {', '.join(known)} ({self.name}, outputs: {outputs})", name)
        return tuple(asked) if asked else known

    @abstractmethod
    def scorers(self, logits: Tensor, labels: Tensor, outputs: int) -> Mapping[str, Callable[[], float]]:
        """By name, what computes each metric of these answers. A score that is undefined is 0."""

    def score(self, logits: Tensor, labels: Tensor, metrics: Sequence[str], outputs: int) -> dict[str, float]:
        """The metrics of some answers.

        Args:
            logits: `[N, C]`.
            labels: of the same examples.
            metrics: which, in which order.
            outputs: how many outputs a head for the task has; this one may have more, or fewer.
        """
        scorers = self.scorers(logits, labels, outputs)
        return {name: scorers[name]() for name in metrics}


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in the precision that losses are computed in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def label_name(value: Any) -> str | None:
    """A label as the name of its class; 1 and 1.0 are '1'."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def sorted_names(found: Iterable[str]) -> tuple[str, ...]:
    """Names that were found in the data, whole numbers in their order before all else.

    Raises:
        UserError: one is no text.
    """
    names = set(found)
    if broken := sorted(name for name in names if not is_text(name)):
        raise refusal("label_column", "labels that can be written in UTF-8", repr(broken[0]))
    return tuple(sorted(names, key=_by_number_then_name))


def named_value(value: Any, named: Sequence[str] | None) -> Any:
    """A value of a column, or the name that the data says it stands for."""
    return named[value] if named and value is not None and 0 <= value < len(named) else value


def check_same_names(column: LabelColumn) -> None:
    """Refuse `task.labels` where the data itself says other names."""
    asked, named = column.asked, column.named
    if asked is None or named is None or set(asked) == set(named):
        return
    if len(asked) != len(named):
        expected = f"the data's {len(named)} classes ({listed(named)})"
        raise refusal("labels", expected, f"{len(asked)} ({listed(asked)})")
    raise refusal("labels", f"the data's class names ({listed(named)})", listed(asked))


def check_single(column: LabelColumn) -> None:
    """Refuse a column with more than one label in a row."""
    for row, value in enumerate(column.values, start=1):
        if isinstance(value, list | tuple | dict | bytes):
            found = f"a {type(value).__name__} in row {row} of {column.split}"
            raise refusal("label_column", f"one label per row in {column.name}", found)


def _by_number_then_name(name: str) -> tuple[float, str]:
    try:
        return int(name), name
    except ValueError:
        return math.inf, name
