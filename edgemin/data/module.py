"""A task's data as the stages take it: tokenized for one tokenizer, split by split, when first asked for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from edgemin.data.encoding import Encoded, encode
from edgemin.store.cache import Cache

if TYPE_CHECKING:
    from edgemin.data.examples import Examples
    from edgemin.data.splits import Splits
    from edgemin.tasks.base import Kind

log = logging.getLogger(__name__)


class DataModule:
    """The splits of a task in the tokens of one tokenizer.

    Args:
        splits: The checked examples; `None` for a stage that must not depend on the task.
        tokenizer: The tokenizer of the model that reads them.
        cache: Where token ids are kept (see [`encode`][edgemin.data.encoding.encode]).
        of_teachers: For each teacher of a stage, the same splits in its tokens (this module itself where the tokens are
            the same); empty if all teachers read the same tokens.
    """

    def __init__(
        self,
        splits: Splits | None,
        tokenizer: PreTrainedTokenizerBase,
        cache: Cache,
        of_teachers: Sequence[DataModule] = (),
    ) -> None:
        self._splits = splits
        self.tokenizer = tokenizer
        self.cache = cache
        self.of_teachers = tuple(of_teachers)

    @property
    def splits(self) -> Splits:
        """The task's examples, read and checked, before they are tokenized."""
        assert self._splits is not None, "a stage that does not need the task asked for its data"
        return self._splits

    @property
    def has_segments(self) -> bool:
        """Whether the tokenizer tells the two texts of a pair apart."""
        return "token_type_ids" in self.tokenizer.model_input_names

    @property
    def labels(self) -> tuple[str, ...]:
        """The name of each output of the model, in order."""
        return self.splits.labels

    @property
    def kind(self) -> Kind:
        """What the labels mean."""
        return self.splits.kind

    @cached_property
    def train(self) -> Encoded:
        """The tokenized training examples, without the hold-out."""
        return self._encode(self.splits.train)

    @cached_property
    def holdout(self) -> Encoded | None:
        """The tokenized hold-out, which early stopping and searches look at; `None` if there is none."""
        return None if self.splits.holdout is None else self._encode(self.splits.holdout)

    @cached_property
    def evaluation(self) -> dict[str, Encoded]:
        """The tokenized evaluation splits, which are reported and select nothing, by name."""
        return {split: self._encode(examples) for split, examples in self.splits.evaluation.items()}

    def read_by(self, tokenizer: PreTrainedTokenizerBase) -> DataModule:
        """The same splits in the tokens of another tokenizer."""
        return DataModule(self._splits, tokenizer, self.cache)

    def calibration(self, examples: int, batch_size: int, seed: int) -> list[dict[str, Tensor]]:
        """Batches of training examples drawn without replacement, sorted by length.

        Args:
            examples: How many to draw; all, with a warning, where train has fewer.
            batch_size: Examples in a batch.
            seed: Seed of the draw.
        """
        drawn = self.drawn(examples, seed)
        drawn = drawn[np.argsort(self.train.lengths[drawn], kind="stable")]
        return [self.train.batch(drawn[i : i + batch_size]) for i in range(0, len(drawn), batch_size)]

    def drawn(self, examples: int, seed: int) -> NDArray[np.int64]:
        """Positions of training examples drawn without replacement; all, with a warning, if there are too few."""
        train = self.train
        if examples > len(train):
            log.warning("calibration: %d examples asked for, all %d of train used", examples, len(train))
        return np.random.default_rng(seed).permutation(len(train))[:examples]

    def _encode(self, examples: Examples) -> Encoded:
        return encode(examples, self.tokenizer, self.splits.task.max_length, self.cache)
