"""Batches of a corpus: sequences of full length without padding, shuffled window by window."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from edgemin.data.batches import own_rows
from edgemin.data.corpus import Corpus, refusal
from edgemin.data.mixture import Mixture, Streams

log = logging.getLogger(__name__)

WINDOW_BATCHES = 64


class CorpusBatches:
    """All batches of a fit on a corpus, from the first step to the last.

    The documents are joined with the separator between them (RoBERTa's FULL-SENTENCES, arXiv 1907.11692, section
    4.2) to one stream of tokens, which is cut every `corpus.length - 2` tokens and framed as `[CLS] ... [SEP]`:
    a document that does not fit goes on in the next sequence, and the last sequence of an epoch takes its rest from
    the beginning of the next. There is no padding. Several corpora are one such stream each, and begin again each by
    itself: a sequence is of one of them, the one that is furthest behind its share.

    The sequences of `shuffle_window` batches are shuffled by a permutation drawn from (seed, window). Batch k depends
    on the arguments and k alone. So that a fit can be resumed with `start=k` without reading everything again,
    `state_dict` keeps the place in the corpus where the current window begins; without it the corpus is read from
    its beginning. A thread reads the next window while the current one is trained on.

    Args:
        corpus: The documents: one corpus, or several.
        tokenizer: The tokenizer of the models that read them.
        batch_size: Sequences in a batch, over all processes.
        seed: Seed of the order.
        steps: Batches in all, over as many epochs as that takes.
        shuffle_window: Batches whose sequences are shuffled among each other; they are held in memory.
        start: The first step to yield; `len()` stays the whole fit.
        rank: The number of this process, from 0.
        world: How many processes train together. Each takes its rows of every batch (see `own_rows`), so their number
            does not change the batches.

    Attributes:
        skipped: Documents without text among those read so far, in all epochs.

    Raises:
        UserError: If the sequences are longer than the tokenizer allows.
    """

    def __init__(
        self,
        corpus: Corpus | Mixture,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        seed: int,
        steps: int,
        *,
        shuffle_window: int = WINDOW_BATCHES,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        assert batch_size > 0 and shuffle_window > 0 and 0 <= rank < world
        assert 0 <= start <= steps, f"step {start} is not in a fit of {steps}"
        if corpus.length > tokenizer.model_max_length:
            expected = f"at most the tokenizer's {tokenizer.model_max_length} tokens"
            raise refusal("corpus_length", expected, corpus.length)
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.seed = seed
        self.steps = steps
        self.shuffle_window = shuffle_window
        self.start = start
        self.rank, self.world = rank, world
        self.skipped = 0
        self._marks: list[_Mark] = []

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self.start == self.steps:
            return
        streams = Streams(self.corpus, self.tokenizer)
        first, end = self.start // self.shuffle_window, -(-self.steps // self.shuffle_window)
        begin = self._go_back(streams, first)
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self._read, streams, begin)
            for number in range(begin, end):
                window = ahead.result()
                if number + 1 < end:
                    ahead = reader.submit(self._read, streams, number + 1)
                self._marks = [*self._marks[-1:], window.mark]
                self.skipped = window.skipped
                if number >= first:
                    yield from self._batches(number, window.sequences)

    def state_dict(self) -> dict[str, Any]:
        """Where to read on from: the beginnings of the current window and of the one before it.

        Two, because the training loop may have drawn one batch more than it has trained on. Plain values
        and, of the tokens between two windows, int32 tensors.
        """
        marks = [{"window": mark.window, "place": mark.place} for mark in self._marks]
        return {"sequences": self.batch_size * self.shuffle_window, "length": self.corpus.length, "marks": marks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` kept; only `start`, `rank` and `world` may differ from the arguments then."""
        assert state["sequences"] == self.batch_size * self.shuffle_window, "kept with other windows"
        assert state["length"] == self.corpus.length, "kept with sequences of another length"
        self._marks = [_Mark(mark["window"], mark["place"]) for mark in state["marks"]]

    def _go_back(self, streams: Streams, window: int) -> int:
        """Go to the last place known at or before a window's beginning; gives the number of the window there."""
        self._marks = [mark for mark in self._marks if mark.window <= window]
        if not self._marks:
            if window:
                log.warning("corpus: no place was kept, reading on from its beginning up to step %d", self.start)
            return 0
        mark = self._marks.pop()
        streams.load_state_dict(mark.place)
        return mark.window

    def _read(self, streams: Streams, number: int) -> _Window:
        mark = _Mark(number, streams.state_dict())
        sequences = streams.take(self.batch_size * self.shuffle_window, self.corpus.length - 2)
        return _Window(mark, sequences, streams.skipped)

    def _batches(self, window: int, sequences: NDArray[np.int32]) -> Iterator[dict[str, Tensor]]:
        """The batches of a window from `start` on and before the last step."""
        order = np.random.default_rng((self.seed, window)).permutation(len(sequences))
        before = window * self.shuffle_window
        for step in range(max(self.start, before), min(self.steps, before + self.shuffle_window)):
            begin = (step - before) * self.batch_size
            rows, share = own_rows(order[begin : begin + self.batch_size], self.rank, self.world)
            yield {**self._frame(sequences[rows]), **share}

    def _frame(self, sequences: NDArray[np.int32]) -> dict[str, Tensor]:
        ids = np.empty((len(sequences), self.corpus.length), dtype=np.int64)
        ids[:, 0], ids[:, 1:-1], ids[:, -1] = self.tokenizer.cls_token_id, sequences, self.tokenizer.sep_token_id
        batch = {"input_ids": torch.from_numpy(ids)}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        if "token_type_ids" in self.tokenizer.model_input_names:
            batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        return batch


class _Mark(NamedTuple):
    """The place in the corpus where a window begins."""

    window: int
    place: dict[str, Any]


class _Window(NamedTuple):
    mark: _Mark
    sequences: NDArray[np.int32]
    skipped: int
