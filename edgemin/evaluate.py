"""Scores of a model on a split: the same code for the teacher and for every stage."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef
from torchmetrics.functional.classification import (
    binary_f1_score,
    multiclass_accuracy,
    multiclass_f1_score,
    multiclass_matthews_corrcoef,
)
from transformers import PreTrainedModel

from edgemin import encoder
from edgemin.data import Encoded, checked_metrics, evaluation_batches, metric_names

log = logging.getLogger(__name__)


class Evaluation(NamedTuple):
    """Metrics as fractions, with ``loss`` and ``n``, and the logits [N, C], float32, in the data's order."""

    metrics: dict[str, float]
    logits: NDArray[np.float32]


def primary_metric(regression: bool, classes: int, metrics: Sequence[str] | None = None) -> str:
    """The metric that tables lead with: the first asked for, else accuracy, or Pearson's correlation."""
    return metrics[0] if metrics else metric_names(regression, classes)[0]


def evaluate(
    model: PreTrainedModel,
    encoded: Encoded,
    *,
    regression: bool,
    classes: int,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    metrics: Sequence[str] | None = None,
    transfer: bool = False,
) -> Evaluation:
    """Score a model on a split.

    Two classes: accuracy, F1 of the class with index 1, Matthews' correlation. More: accuracy, F1 averaged
    over the classes that are present or predicted. Regression: Pearson's and Spearman's correlation. The loss
    is the mean cross-entropy, or the mean squared error. Where a correlation is undefined (all predictions
    equal) it is 0, as Matthews' is by convention.

    Args:
        model: An encoder with a head; it is moved to `device` and left in the mode (train or eval) it was in.
        encoded: The split.
        regression: Whether labels are numbers.
        classes: How many classes the data has.
        batch_size: Examples at a time; it changes no metric.
        device: Where to compute.
        metrics: Which metrics, in which order; None: all that fit.
        transfer: The head was trained on another task: classes are matched by index. A class the head does
            not have is never predicted (and the loss is left out), one the data does not have is always
            wrong.

    Returns:
        Metrics and logits.

    Raises:
        UserError: If a metric does not fit the task.
    """
    names = checked_metrics(metrics, regression=regression, classes=classes)
    logits = _logits(model, encoded, batch_size, torch.device(device))
    assert transfer or logits.shape[1] == (1 if regression else classes), "the head does not fit the data"
    labels = torch.from_numpy(encoded.labels)
    loss: float | None
    if regression:
        values, loss = _regression(logits, labels.float())
    else:
        values, loss = _classification(logits, labels, classes)
    scores: dict[str, float] = {name: values[name]() for name in names}
    if loss is not None:
        scores["loss"] = loss
    scores["n"] = len(encoded)
    return Evaluation(scores, logits.numpy())


def _logits(model: PreTrainedModel, encoded: Encoded, batch_size: int, device: torch.device) -> Tensor:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    nn.Module.to(model, device)  # transformers' own to() is annotated as if it took the model twice
    rows, parts = [], []
    try:
        with torch.inference_mode():
            for indices, batch in evaluation_batches(encoded, batch_size):
                inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
                parts.append(encoder.logits(model, inputs).float().cpu())
                rows.append(torch.from_numpy(indices))
    finally:
        for module, training in modes.items():
            module.training = training
    by_length = torch.cat(parts)
    logits = torch.empty_like(by_length)
    logits[torch.cat(rows)] = by_length
    return logits


def _classification(
    logits: Tensor, labels: Tensor, classes: int
) -> tuple[Mapping[str, Callable[[], float]], float | None]:
    head = logits.shape[1]
    count = max(head, classes)
    predicted = logits.argmax(dim=1)
    # A label beyond the head's classes has no logit, hence no cross-entropy.
    loss = functional.cross_entropy(logits, labels).item() if int(labels.max()) < head else None
    return {
        "accuracy": lambda: multiclass_accuracy(predicted, labels, count, average="micro").item(),
        "f1": lambda: binary_f1_score((predicted == 1).long(), (labels == 1).long()).item(),
        "matthews": lambda: multiclass_matthews_corrcoef(predicted, labels, count).item(),
        "macro_f1": lambda: multiclass_f1_score(predicted, labels, count, average="macro").item(),
    }, loss


def _regression(logits: Tensor, labels: Tensor) -> tuple[Mapping[str, Callable[[], float]], float]:
    predicted = logits[:, 0]
    constant = bool((predicted == predicted[0]).all() or (labels == labels[0]).all())
    if constant:
        log.warning("all predictions or all labels are equal: correlations count as 0")
    return {
        "pearson": lambda: 0.0 if constant else pearson_corrcoef(predicted, labels).item(),
        "spearman": lambda: 0.0 if constant else spearman_corrcoef(predicted, labels).item(),
    }, functional.mse_loss(predicted, labels).item()
