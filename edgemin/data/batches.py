"""The order in which examples meet a model: shuffled and bucketed for training, by length for evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from edgemin.data.encoding import Encoded

BUCKET_BATCHES = 50


class TrainBatches:
    """All batches of a fit, from the first step to the last.

    Epoch e is a permutation drawn from (seed, e), cut into windows of 50 batches; inside a window examples
    are sorted by length (so that little is padding), cut into batches, and all batches of the epoch are
    shuffled again. Every example comes once an epoch; one batch of an epoch may be smaller.

    Batch k depends on the arguments and k alone, so a fit resumed with ``start=k`` sees the very batches an
    unbroken one does.

    Args:
        encoded: What to draw from.
        batch_size: Examples in a batch.
        seed: Seed of the order.
        epochs: Passes over the data, also fractions; give this or `steps`.
        steps: Batches in all, over as many epochs as that takes.
        start: The first step to yield; ``len()`` stays the whole fit.
    """

    def __init__(
        self,
        encoded: Encoded,
        batch_size: int,
        seed: int,
        epochs: float | None = None,
        steps: int | None = None,
        start: int = 0,
    ) -> None:
        assert batch_size > 0 and (epochs is None) != (steps is None), "give epochs or steps"
        self.encoded = encoded
        self.batch_size = batch_size
        self.seed = seed
        self.batches_per_epoch = -(-len(encoded) // batch_size)
        if steps is None:
            assert epochs is not None
            # Rounded before it is cut up, so that 0.1 + 0.2 epochs are not one step more than 0.3.
            steps = math.ceil(round(epochs * self.batches_per_epoch, 6))
        assert 0 <= start <= steps, f"step {start} is not in a fit of {steps}"
        self.steps = steps
        self.start = start

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        step = self.start
        while step < self.steps:
            epoch, first = divmod(step, self.batches_per_epoch)
            for indices in self.epoch(epoch)[first : first + self.steps - step]:
                yield self.encoded.batch(indices)
                step += 1

    def epoch(self, number: int) -> list[NDArray[np.int64]]:
        """The indices of every batch of one epoch, in order."""
        generator = np.random.default_rng((self.seed, number))
        order = generator.permutation(len(self.encoded))
        window = self.batch_size * BUCKET_BATCHES
        batches = []
        for begin in range(0, len(order), window):
            bucket = order[begin : begin + window]
            bucket = bucket[np.argsort(self.encoded.lengths[bucket], kind="stable")]
            batches += [bucket[i : i + self.batch_size] for i in range(0, len(bucket), self.batch_size)]
        return [batches[i] for i in generator.permutation(len(batches))]


def evaluation_batches(encoded: Encoded, batch_size: int) -> Iterator[tuple[NDArray[np.int64], dict[str, Tensor]]]:
    """Every example once, sorted by length, with its position in the split.

    Args:
        encoded: What to evaluate.
        batch_size: Examples in a batch.

    Yields:
        Positions in `encoded`, int64 [B], and their batch.
    """
    order = np.argsort(encoded.lengths, kind="stable")
    for begin in range(0, len(order), batch_size):
        indices = order[begin : begin + batch_size]
        yield indices, encoded.batch(indices)
