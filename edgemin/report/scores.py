"""Metrics in numpy, of weighted examples: as torchmetrics computes them, and of many resamples at once.

A resample of a bootstrap is a number of times that each example was drawn: its weight. So every metric takes labels and
answers once and weights `[B, N]`, a row for each resample, and gives `[B]`. Legend: N examples, C classes or labels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Answers = NDArray[np.float64]
"""What a model says of each example: the class `[N]`, the labels `[N, C]` (0 or 1) or the number `[N]`."""


def answers(logits: NDArray[np.float32], labels: NDArray[np.generic]) -> Answers:
    """What logits `[N, C]` answer: the kind of task follows from the labels."""
    if labels.ndim == 2:
        return np.asarray(logits > 0, dtype=np.float64)
    if np.issubdtype(labels.dtype, np.floating):
        return np.asarray(logits.reshape(len(logits), -1)[:, 0], dtype=np.float64)
    return np.asarray(logits.argmax(1), dtype=np.float64)


def right(said: Answers, labels: NDArray[np.generic]) -> Numbers:
    """1 for each example whose answer is right (all of its labels, where it may have several), else 0: `[N]`."""
    same = said == labels
    return np.asarray(same.all(1) if same.ndim == 2 else same, dtype=np.float64)


def score(metric: str, said: Answers, labels: NDArray[np.generic], weights: Numbers) -> Numbers:
    """A metric of each resample, `[B]`; NaN where a correlation has no spread to correlate.

    Args:
        metric: a key of `METRICS`.
        said: what a model answers.
        labels: what is right, of the same shape.
        weights: `[B, N]`, how often each example counts.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return METRICS[metric](said, labels.astype(np.float64), weights)


def _accuracy(said: Answers, labels: Numbers, weights: Numbers) -> Numbers:
    return np.asarray(weights @ right(said, labels) / weights.sum(1))


def _counts(said: Answers, labels: Numbers, weights: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """How often each class was right, was predicted and was there: three times `[B, C]`."""
    if labels.ndim == 1:
        classes = np.unique(np.concatenate([said, labels]))
        said, labels = said[:, None] == classes, labels[:, None] == classes
    return weights @ (said * labels), weights @ said, weights @ labels


def _f1(right: Numbers, predicted: Numbers, there: Numbers) -> Numbers:
    """2 right / (predicted + there), 0 of nothing."""
    return np.asarray(np.nan_to_num(2 * right / (predicted + there)))


def _binary_f1(said: Answers, labels: Numbers, weights: Numbers) -> Numbers:
    """F1 of the class with index 1."""
    found = _counts((said == 1)[:, None], (labels == 1)[:, None], weights)
    return _f1(*found)[:, 0]


def _macro_f1(said: Answers, labels: Numbers, weights: Numbers) -> Numbers:
    """F1 averaged over the classes that are there or predicted; of examples with several labels over all labels."""
    right, predicted, there = _counts(said, labels, weights)
    counts = np.ones_like(there) if labels.ndim == 2 else (predicted + there > 0)
    return np.asarray((_f1(right, predicted, there) * counts).sum(1) / counts.sum(1))


def _micro_f1(said: Answers, labels: Numbers, weights: Numbers) -> Numbers:
    """F1 over all labels of all examples."""
    right, predicted, there = (count.sum(1) for count in _counts(said, labels, weights))
    return _f1(right, predicted, there)


def _matthews(said: Answers, labels: Numbers, weights: Numbers) -> Numbers:
    """Gorodkin's (2004) correlation of any number of classes, 0 where all labels or all answers are equal."""
    hits, predicted, there = _counts(said, labels, weights)
    total = weights.sum(1)
    together = hits.sum(1) * total - (predicted * there).sum(1)
    spread = (total**2 - (there**2).sum(1)) * (total**2 - (predicted**2).sum(1))
    return np.asarray(np.nan_to_num(together / np.sqrt(spread), posinf=0.0, neginf=0.0))


def _pearson(said: Answers, labels: Numbers, weights: Numbers) -> Numbers:
    """Pearson's correlation."""
    # Around the mean of all examples, where sums of squares lose no digits.
    return _correlation(np.broadcast_to(said - said.mean(), weights.shape), labels - labels.mean(), weights)


def _spearman(said: Answers, labels: Numbers, weights: Numbers) -> Numbers:
    """Pearson's correlation of the ranks, equal values at the mean of theirs, as they are in each resample."""
    return _correlation(_ranks(said, weights), _ranks(labels, weights), weights)


def _correlation(one: Numbers, other: Numbers, weights: Numbers) -> Numbers:
    total = weights.sum(1, keepdims=True)
    one = one - (weights * one).sum(1, keepdims=True) / total
    other = other - (weights * other).sum(1, keepdims=True) / total
    both, alone, beside = ((weights * product).sum(1) for product in (one * other, one**2, other**2))
    return np.asarray(both / np.sqrt(alone * beside))


def _ranks(values: Numbers, weights: Numbers) -> Numbers:
    """The rank of each value in each resample, `[B, N]`."""
    distinct, place = np.unique(values, return_inverse=True)
    tied = np.zeros((len(weights), len(distinct)))
    np.add.at(tied.T, place, weights.T)
    return np.asarray((tied.cumsum(1) - (tied - 1) / 2)[:, place])


METRICS: dict[str, Callable[[Answers, Numbers, Numbers], Numbers]] = {
    "accuracy": _accuracy,
    "f1": _binary_f1,
    "macro_f1": _macro_f1,
    "micro_f1": _micro_f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}
"""The metrics that the kinds of task have, by their names in run.json."""
