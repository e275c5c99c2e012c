"""What rows answered to every example, from stored predictions: the row's own answers beside those of another row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from edgemin.errors import UserError
from edgemin.report import paired, scores, stored
from edgemin.report.fields import Row
from edgemin.report.fold import Line
from edgemin.report.schema import Run
from edgemin.report.stored import Examples

BINS = 15
"""Bins of the calibration error, as in Guo et al. 2017 and torchmetrics."""


@dataclass(frozen=True)
class Answered:
    """What one model answered, in torch, on the first split of its job's task.

    Args:
        examples: what was to be answered.
        logits: `[N, C]`.
    """

    examples: Examples
    logits: NDArray[np.float32]

    @property
    def one_class(self) -> bool:
        """Whether the answer is one of several classes."""
        return self.examples.labels.ndim == 1

    @cached_property
    def said(self) -> scores.Answers:
        """What the model says to each example: the number of a class, or 0 or 1 for each of several labels."""
        return scores.answers(self.logits, self.examples.labels)

    @cached_property
    def right(self) -> NDArray[np.bool_]:
        """Which answers are right; of several labels all must be."""
        return scores.right(self.said, self.examples.labels) > 0

    def agreement(self, other: Answered) -> float:
        """The share of examples with the same answer."""
        same = self.said == other.said
        return float((same if self.one_class else same.all(1)).mean())

    def lost(self, other: Answered) -> int:
        """How many examples the other one has right and this one wrong."""
        return int((other.right & ~self.right).sum())


def calibration_error(answered: Answered) -> float:
    r"""The expected calibration error (Guo et al. 2017, arXiv 1706.04599): confidence that the answers do not deserve.

    $\sum_m |B_m| / n \cdot |acc(B_m) - conf(B_m)|$, where $B_m$ are the examples whose confidence, the highest
    probability, lies in $((m - 1) / 15, m / 15]$.
    """
    logits = answered.logits.astype(np.float64)
    powers = np.exp(logits - logits.max(1, keepdims=True))
    confidence = (powers / powers.sum(1, keepdims=True)).max(1)
    place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    deserved = np.bincount(place, weights=answered.right - confidence, minlength=BINS)
    return float(np.abs(deserved).sum() / len(confidence))


def read(run: Run, row: Row) -> Answered | None:
    """What a row answered; None where its job kept no predictions, or answers are numbers, none of them right or wrong.

    Raises:
        UserError: a file of predictions cannot be used.
    """
    task, split = run.task.name, run.first_split
    if task is None or split is None or (examples := stored.examples(run, task, split)) is None:
        return None
    if examples.labels.ndim == 1 and np.issubdtype(examples.labels.dtype, np.floating):
        return None
    logits = stored.answers(run, row, task, split)
    return Answered(examples, logits) if logits is not None else None


def of_seeds(line: Line, *references: str) -> list[tuple[Answered, ...]]:
    """The answers of a row in every seed, each with those of the rows that it is compared with.

    Args:
        line: the row.
        references: the rows it is compared with: `parent`, `teacher` or `student`.

    Returns:
        A tuple for each of the [`distinct`][edgemin.report.paired.distinct] models whose predictions were kept: the
        row's answers, then the references' in their order. Nothing where the row has no such reference, or is it.

    Raises:
        UserError: a file of predictions cannot be used, or seeds have not the same examples.
    """
    others = [other for name in references if (other := paired.reference(line, name)) is not None]
    if len(others) < len(references) or any(other.rows == line.rows for other in others):
        return []
    found: list[tuple[Answered, ...]] = []
    for models in paired.distinct([line, *others]):
        answers = [answered for run, row in models if (answered := read(run, row)) is not None]
        if len(answers) < len(models):
            continue
        found.append(tuple(answers))
        if not np.array_equal(found[0][0].examples.rows, answers[0].examples.rows):
            run, row = models[0]
            raise UserError(
                f"{run.file}: expected predictions on the same examples as those of the other seeds of {row.name!r}, "
                "given others"
            )
    return found
