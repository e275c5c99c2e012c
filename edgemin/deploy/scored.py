"""Scores of a model in its runtime on a split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from edgemin.data.batches import evaluation_batches
from edgemin.data.encoding import Encoded
from edgemin.deploy.runtime import Runtime
from edgemin.evaluate import Evaluation
from edgemin.progress import live_line
from edgemin.tasks.base import Kind


def score(
    opened: Runtime, encoded: Encoded, kind: Kind, outputs: int, metrics: Sequence[str], *, batch_size: int = 64
) -> Evaluation:
    """What [`evaluate`][edgemin.evaluate.evaluate] finds of a model in torch, by what a runtime answers.

    Args:
        opened: The model.
        encoded: The split.
        kind: What labels mean.
        outputs: How many outputs the model has.
        metrics: Which metrics, in which order.
        batch_size: Examples at a time.

    Returns:
        Metrics and logits.
    """
    logits = np.empty((len(encoded), outputs), np.float32)
    with live_line("scoring sentences", len(encoded)) as line:
        for rows, batch in evaluation_batches(encoded, batch_size):
            inputs = {name: values.numpy() for name, values in batch.items() if name != "labels"}
            logits[rows] = opened.answers(inputs)
            line.done += len(rows)
    answers, labels = torch.from_numpy(logits), torch.from_numpy(encoded.labels)
    found = kind.score(answers, labels, metrics, outputs)
    return Evaluation({**found, "loss": kind.loss(answers, labels).item(), "n": len(encoded)}, logits)
