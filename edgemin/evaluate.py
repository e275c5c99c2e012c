"""Scores of a model on a split: the same code for the teacher and for every stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgemin.data.batches import evaluation_batches
from edgemin.data.encoding import Encoded
from edgemin.encoder import taps
from edgemin.progress import live_line
from edgemin.tasks.base import Kind


class Evaluation(NamedTuple):
    """Metrics as fractions, with `loss` and `n`, and the logits [N, C], float32, in the data's order."""

    metrics: dict[str, float]
    logits: NDArray[np.float32]


def evaluate(
    model: PreTrainedModel,
    encoded: Encoded,
    kind: Kind,
    outputs: int,
    metrics: Sequence[str],
    *,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    transfer: bool = False,
) -> Evaluation:
    """Score a model on a split.

    Which metrics there are and what the loss is, the kind of task says. A score that is undefined is 0: a correlation,
    Matthews' included, where all predictions or all labels are equal, and F1 of a class that is neither there nor
    predicted.

    Args:
        model: An encoder with a head; it is moved to `device` and left in the mode (train or eval) it was in.
        encoded: The split.
        kind: What labels mean.
        outputs: How many outputs a head for the task has.
        metrics: Which metrics, in which order.
        batch_size: Examples at a time; it changes no metric.
        device: Where to compute.
        transfer: The head was trained on another task: classes are matched by index. A class that the head does not
            have is never predicted (and the loss is left out); one that the data does not have is always wrong.

    Returns:
        Metrics and logits.
    """
    logits = _logits(model, encoded, batch_size, torch.device(device))
    assert transfer or logits.shape[1] == outputs, "the head does not fit the data"
    labels = torch.from_numpy(encoded.labels)
    scores = kind.score(logits, labels, metrics, outputs)
    if kind.has_loss(logits, labels):
        scores["loss"] = kind.loss(logits, labels).item()
    scores["n"] = len(encoded)
    return Evaluation(scores, logits.numpy())


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
