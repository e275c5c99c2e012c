"""Models that give one answer to every example: found in their predictions, and set beside the majority class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from edgemin.data.splits import Splits
from edgemin.tasks.base import Kind, Labels


def of_predictions(splits: Splits, predictions: Path) -> dict[str, Any] | None:
    """What `find` says of a stored file of predictions.

    Args:
        splits: of the task that was answered.
        predictions: `logits` and `labels` in safetensors.
    """
    kept = load_file(predictions)
    return find(kept["logits"], kept["labels"], splits.kind, names=splits.labels, metrics=splits.metrics)


def find(
    logits: NDArray[np.float32], labels: Labels, kind: Kind, *, names: Sequence[str], metrics: Sequence[str]
) -> dict[str, Any] | None:
    """What a model always answers, where it always answers the same although the labels differ.

    Args:
        logits: [N, C].
        labels: Of the same examples.
        kind: What labels mean.
        names: The name of each output.
        metrics: The metrics by which the majority class is scored.

    Returns:
        `None` where answers differ, or all labels are equal: one answer may be right then. Else `prediction`, as a
        reader knows it; and but for numbers `majority`: the `class` that most examples have, and the `metrics` of a
        model that always answers it.
    """
    answers, truth = kind.answers(torch.from_numpy(logits)), torch.from_numpy(labels)
    if bool((truth == truth[0]).all()) or not kind.is_constant(answers):
        return None
    found: dict[str, Any] = {"prediction": kind.shown(answers[0], names)}
    if (always := kind.majority(truth, len(names))) is not None:
        scores = kind.score(always, truth, metrics, len(names))
        found["majority"] = {"class": kind.shown(kind.answers(always)[0], names), "metrics": scores}
    return found


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
