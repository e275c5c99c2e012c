"""Models that give one answer to every example: found in their predictions, and set beside the majority class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch.nn import functional

from edgemin.data.splits import Splits
from edgemin.data.task import checked_metrics
from edgemin.evaluate import is_constant, score


def of_predictions(splits: Splits, predictions: Path) -> dict[str, Any] | None:
    """What the model always answers that a file of predictions comes from, as `find` has it.

    Args:
        splits: of the task that was answered.
        predictions: `logits` and `labels` in safetensors.
    """
    task, kept = splits.task, load_file(predictions)
    metrics = checked_metrics(task.metrics, regression=task.regression, classes=len(splits.labels))
    return find(kept["logits"], kept["labels"], regression=task.regression, names=splits.labels, metrics=metrics)


def find(
    logits: NDArray[np.float32],
    labels: NDArray[Any],
    *,
    regression: bool,
    names: Sequence[str],
    metrics: Sequence[str],
) -> dict[str, Any] | None:
    """What a model always answers, where it always answers the same although the labels differ.

    Args:
        logits: [N, C], or [N, 1] for a regression.
        labels: [N].
        regression: Whether labels are numbers.
        names: The classes' names; a class that only the head knows is called by its number.
        metrics: The metrics by which the majority class is scored.

    Returns:
        `None` where answers differ, or all labels are equal: one answer may be right then. Else `prediction`, the
        name of a class or a number; and for classes `majority`: the `class` that most examples have, and the
        `metrics` of a model that always answers it.
    """
    answers, truth = torch.from_numpy(logits), torch.from_numpy(labels)
    predicted = answers[:, 0] if regression else answers.argmax(dim=1)
    if bool((truth == truth[0]).all()) or not is_constant(predicted):
        return None
    if regression:
        return {"prediction": float(predicted[0])}
    only, most = int(predicted[0]), int(truth.bincount().argmax())
    always = functional.one_hot(torch.full_like(truth, most), len(names)).float()
    scores = score(always, truth, metrics, regression=False, classes=len(names))
    return {
        "prediction": names[only] if only < len(names) else str(only),
        "majority": {"class": names[most], "metrics": scores},
    }


def sentence(found: Mapping[str, Any], metric: str, value: float, where: str) -> str:
    """What a reader of such a model's numbers must know.

    Args:
        found: As `find` returns it.
        metric: The task's primary metric.
        value: The model's own.
        where: Task and split.
    """
    given = found["prediction"]
    if isinstance(given, float):
        return f"always answers {given:.4g} on {where}: its correlations count as 0"
    own, majority = f"{metric} {100 * value:.2f}", found["majority"]["class"]
    if given == majority:
        return f'always answers "{given}", the majority class, on {where}: {own}'
    best = 100 * found["majority"]["metrics"][metric]
    return f'always answers "{given}" on {where}: {own}, the majority class "{majority}" alone scores {best:.2f}'
