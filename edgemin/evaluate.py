"""Scores of a model on a split: the same code for the teacher and for every stage."""

from __future__ import annotations

import math
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
    multiclass_confusion_matrix,
    multiclass_f1_score,
)
from transformers import PreTrainedModel

from edgemin.data.batches import evaluation_batches
from edgemin.data.encoding import Encoded
from edgemin.data.task import checked_metrics, metric_names
from edgemin.encoder import taps
from edgemin.progress import live_line

_ROUNDING = 8 * torch.finfo(torch.float32).eps  # relative; by so much padding and threads change equal predictions


class Evaluation(NamedTuple):
    """Metrics as fractions, with `loss` and `n`, and the logits [N, C], float32, in the data's order."""

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

    Two classes: accuracy, F1 of the class with index 1, Matthews' correlation. More classes: accuracy, F1 averaged over
    the classes that are present or predicted, Matthews' correlation. Regression: Pearson's and Spearman's correlation.
    The loss is the mean cross-entropy, or the mean squared error. A score that is undefined is 0: a correlation,
    Matthews' included, where all predictions or all labels are equal, and F1 of a class that is neither there nor
    predicted.

    Args:
        model: An encoder with a head; it is moved to `device` and left in the mode (train or eval) it was in.
        encoded: The split.
        regression: Whether labels are numbers.
        classes: How many classes the data has.
        batch_size: Examples at a time; it changes no metric.
        device: Where to compute.
        metrics: Which metrics, in which order; None: all that fit.
        transfer: The head was trained on another task: classes are matched by index. A class that the head does not
            have is never predicted (and the loss is left out); one that the data does not have is always wrong.

    Returns:
        Metrics and logits.

    Raises:
        UserError: A metric does not fit the task.
    """
    names = checked_metrics(metrics, regression=regression, classes=classes)
    logits = _logits(model, encoded, batch_size, torch.device(device))
    assert transfer or logits.shape[1] == (1 if regression else classes), "the head does not fit the data"
    labels = torch.from_numpy(encoded.labels)
    scores = score(logits, labels, names, regression=regression, classes=classes)
    if regression:
        scores["loss"] = functional.mse_loss(logits[:, 0], labels.float()).item()
    elif int(labels.max()) < logits.shape[1]:  # a label beyond the head's classes has no cross-entropy
        scores["loss"] = functional.cross_entropy(logits, labels).item()
    scores["n"] = len(encoded)
    return Evaluation(scores, logits.numpy())


def score(logits: Tensor, labels: Tensor, names: Sequence[str], *, regression: bool, classes: int) -> dict[str, float]:
    """The metrics of some answers, as [`evaluate`][edgemin.evaluate.evaluate] defines them.

    Args:
        logits: [N, C], or [N, 1] for a regression.
        labels: [N], class indices or numbers.
        names: Which metrics, in which order.
        regression: Whether labels are numbers.
        classes: How many classes the data has; the answers may know more, or fewer.
    """
    if regression:
        values = _regression(logits[:, 0].double(), labels.double())
    else:
        values = _classification(logits.argmax(dim=1), labels, max(logits.shape[1], classes))
    return {name: values[name]() for name in names}


def is_constant(values: Tensor) -> bool:
    """Whether all numbers are equal, apart from rounding errors of single precision."""
    return bool(values.max() - values.min() <= _ROUNDING * values.abs().max())


def _logits(model: PreTrainedModel, encoded: Encoded, batch_size: int, device: torch.device) -> Tensor:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    nn.Module.to(model, device)  # transformers' own to() is annotated as if it took the model twice
    rows, parts = [], []
    try:
        with torch.inference_mode(), live_line("scoring sentences", len(encoded)) as line:
            for indices, batch in evaluation_batches(encoded, batch_size):
                inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
                parts.append(taps.logits(model, inputs).float().cpu())
                rows.append(torch.from_numpy(indices))
                line.done += len(indices)
    finally:
        for module, training in modes.items():
            module.training = training
    by_length = torch.cat(parts)
    logits = torch.empty_like(by_length)
    logits[torch.cat(rows)] = by_length
    return logits


def _classification(predicted: Tensor, labels: Tensor, classes: int) -> Mapping[str, Callable[[], float]]:
    return {
        "accuracy": lambda: multiclass_accuracy(predicted, labels, classes, average="micro").item(),
        "f1": lambda: binary_f1_score((predicted == 1).long(), (labels == 1).long()).item(),
        "matthews": lambda: matthews(multiclass_confusion_matrix(predicted, labels, classes)),
        "macro_f1": lambda: multiclass_f1_score(predicted, labels, classes, average="macro").item(),
    }


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


def _regression(predicted: Tensor, labels: Tensor) -> Mapping[str, Callable[[], float]]:
    undefined = is_constant(predicted) or is_constant(labels)
    return {
        "pearson": lambda: 0.0 if undefined else pearson_corrcoef(predicted, labels).item(),
        "spearman": lambda: 0.0 if undefined else spearman_corrcoef(predicted, labels).item(),
    }
