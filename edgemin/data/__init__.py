"""Tasks and their data: read, checked, tokenised once, bucketed by length; and text without labels, streamed."""

from __future__ import annotations

from edgemin.data.batches import TrainBatches, evaluation_batches
from edgemin.data.corpus import Corpus
from edgemin.data.encoding import Encoded, encode
from edgemin.data.examples import Examples
from edgemin.data.module import DataModule
from edgemin.data.packing import CorpusBatches
from edgemin.data.splits import Splits, load
from edgemin.data.task import Task, checked_metrics, metric_names

__all__ = [
    "Corpus",
    "CorpusBatches",
    "DataModule",
    "Encoded",
    "Examples",
    "Splits",
    "Task",
    "TrainBatches",
    "checked_metrics",
    "encode",
    "evaluation_batches",
    "load",
    "metric_names",
]
