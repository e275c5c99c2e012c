"""The order in which examples meet a model: shuffled and bucketed for training, by length for evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgemin.data.encoding import Encoded

BUCKET_BATCHES = 50


class Batches(Protocol):
    """All batches of a fit; a resumed fit begins at any of its steps."""

    start: int  # the first step to yield

    def __len__(self) -> int:
        """The steps of the whole fit."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield the batches from the step `start` on."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed fit needs besides `start`, as plain values and tensors."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave for the same batches."""


class TrainBatches:
    """All batches of a fit, from the first step to the last.

    Epoch e is a permutation drawn from (seed, e), cut into windows of 50 batches; inside a window examples
    are sorted by length (so that little is padding), cut into batches, and all batches of the epoch are
    shuffled again. Every example comes once an epoch; one batch of an epoch may be smaller.

    Batch k depends on the arguments and k alone, so a fit resumed with `start=k` sees the very batches an
    unbroken one does.

    A batch is what [`Encoded.batch`][edgemin.data.encoding.Encoded.batch] returns and `index`, the positions of its
    examples in the split, int64 [B].

    Args:
        encoded: What to draw from.
        batch_size: Examples in a batch.
        seed: Seed of the order.
        epochs: Passes over the data, also fractions; give this or `steps`.
        steps: Batches in all, over as many epochs as that takes.
        start: The first step to yield; `len()` stays the whole fit.
        rank: The number of this process, from 0.
        world: How many processes train together. Each takes its rows of every batch (see `own_rows`), so their number
            does not change the batches.
        rows: Which examples of the split to draw from; `None`: all.
    """

    def __init__(
        self,
        encoded: Encoded,
        batch_size: int,
        seed: int,
        epochs: float | None = None,
        steps: int | None = None,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        rows: NDArray[np.int64] | None = None,
    ) -> None:
        assert batch_size > 0 and (epochs is None) != (steps is None), "give epochs or steps"
        assert 0 <= rank < world, f"process {rank} of {world}"
        self.encoded = encoded
        self.batch_size = batch_size
        self.seed = seed
        self.rows = np.arange(len(encoded)) if rows is None else rows
        self.batches_per_epoch = -(-len(self.rows) // batch_size)
        if steps is None:
            assert epochs is not None
            # Rounded before it is cut up, so that 0.1 + 0.2 epochs are not one step more than 0.3.
            steps = math.ceil(round(epochs * self.batches_per_epoch, 6))
        assert 0 <= start <= steps, f"step {start} is not in a fit of {steps}"
        self.steps = steps
        self.start = start
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        step = self.start
        while step < self.steps:
            epoch, first = divmod(step, self.batches_per_epoch)
            for indices in self.epoch(epoch)[first : first + self.steps - step]:
                rows, share = own_rows(indices, self.rank, self.world)
                yield {**self.encoded.batch(rows), "index": torch.from_numpy(rows), **share}
                step += 1

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a resumed fit needs `start` alone."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore: a resumed fit needs `start` alone."""

    def epoch(self, number: int) -> list[NDArray[np.int64]]:
        """The indices of every batch of one epoch, in order."""
        generator = np.random.default_rng((self.seed, number))
        order = self.rows[generator.permutation(len(self.rows))]
        window = self.batch_size * BUCKET_BATCHES
        batches = []
        for begin in range(0, len(order), window):
            bucket = order[begin : begin + window]
            bucket = bucket[np.argsort(self.encoded.lengths[bucket], kind="stable")]
            batches += [bucket[i : i + self.batch_size] for i in range(0, len(bucket), self.batch_size)]
        return [batches[i] for i in generator.permutation(len(batches))]


def own_rows(rows: NDArray[np.int64], rank: int, world: int) -> tuple[NDArray[np.int64], dict[str, Tensor]]:
    """One process's part of a batch: every `world`-th row from `rank` on.

    A process for which no row is left gets the first one, which does not count.

    Args:
        rows: The rows of the whole batch, [B].
        rank: The process, from 0.
        world: How many there are.

    Returns:
        Its rows, and if there are several processes `share`, a float tensor without dimensions: own rows times
        `world` over B (0 where none was left). The mean over processes of share times the mean over own rows is the
        mean over the batch.
    """
    if world == 1:
        return rows, {}
    own = rows[rank::world]
    share = torch.tensor(len(own) * world / len(rows))
    return own if len(own) else rows[:1], {"share": share}


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
