"""Pruning of the vocabulary: rows of the word embeddings whose tokens no text has, and the tokenizer with them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from edgemin.config import Count
from edgemin.data.corpus import SHORTEST, Corpus
from edgemin.data.encoding import Encoded
from edgemin.data.module import DataModule
from edgemin.data.tokens import Tokens
from edgemin.encoder import parts, slicing, taps
from edgemin.encoder.outline import Outline
from edgemin.pruning import pieces
from edgemin.store.content import digest
from edgemin.training.fit import Fit
from edgemin.training.stage import Effect, Place, Stage


class VocabularyPruning(Stage):
    """Remove the tokens that the training sentences, or a corpus, do not have, then fine-tune if asked to.

    The tokenizer shrinks with the table. Special tokens and single characters stay, so that a word which lost its
    piece is put together of smaller ones; see [`kept`][edgemin.pruning.pieces.kept]. A sentence that lost no piece is
    cut as before and has the same logits. The split that is reported is never looked at. Later stages and the
    evaluation read the tokens of the tokenizer that is left; a distillation that compares tokens with a teacher's is
    refused after it.

    Args:
        min_count: a token stays if it occurs at least this often.
        corpus: text whose tokens stay instead of those of the task's training split: a Hub id or a local directory or
            file. It is read once, to its end.
        corpus_subset: the configuration inside a Hub data set.
        corpus_split: the split that is read.
        corpus_column: the column of the texts.
        fit: the fine-tuning afterwards; 0 epochs only prune. With one, of a task whose texts do not all have a label
            (`task.labelled_examples`) those that have one are counted alone.
    """

    def __init__(
        self,
        *,
        min_count: Count = 1,
        corpus: str | None = None,
        corpus_subset: str | None = None,
        corpus_split: str = "train",
        corpus_column: str = "text",
        fit: Fit,
    ) -> None:
        super().__init__()
        self.min_count, self.recovery = min_count, fit
        self.corpus = None
        if corpus is not None:
            self.corpus = Corpus(corpus, corpus_subset, corpus_split, corpus_column, SHORTEST)

    def effect(self, model: Outline, teachers: Sequence[Outline], place: Place) -> Effect:
        """Only a run tells which tokens are left; in planning, equal prunings get the same hash of their tokenizer."""
        read = None
        if self.corpus is not None:
            read = [self.corpus.fingerprint(), self.corpus.column]
            self.corpus.open()
        labelled_alone = self.corpus is None and self.recovery.trains and place.examples < place.texts
        counted = [model.tokenizer, self.min_count, read, labelled_alone]
        tokens = None if model.tokenizer is None else digest(json.dumps(counted))
        return replace(
            super().effect(replace(model, vocabulary=None, tokenizer=tokens), teachers, place),
            trains_head=self.recovery.trains,
            reads_task=self.corpus is None or self.recovery.trains,
            reads_labels=self.recovery.trains,
            corpus=self.corpus,
            not_keyed=("corpus",),  # what is in it is in the key
            idle=("corpus_subset", "corpus_split", "corpus_column") if self.corpus is None else (),
        )

    def prepare(
        self, model: PreTrainedModel, data: DataModule | None, teachers: Sequence[PreTrainedModel] = ()
    ) -> None:
        """Find the tokens that stay, and cut the table and the tokenizer down to them."""
        super().prepare(model, data, teachers)
        before, rows = self.data, parts.vocabulary_size(model)
        keep = pieces.kept(before.tokenizer, np.flatnonzero(self._counts(before) >= self.min_count).tolist())
        slicing.slice_vocabulary(model, keep)
        self.tokenizer = pieces.shrunk(before.tokenizer, keep)
        self._data = before.read_by(self.tokenizer)
        self.notes.append(f"removed {rows - len(keep)} of {rows} rows of the word embeddings, with their tokens")
        if self.planned.reads_task:
            self.notes.append("; ".join(_lengths(before, self._data)))

    def _counts(self, data: DataModule) -> NDArray[np.int64]:
        """How often each token occurs, by its id."""
        if self.corpus is None:
            return np.bincount(data.train.ids.numpy())
        found = np.zeros(len(data.tokenizer), dtype=np.int64)
        for tokens in Tokens(self.corpus, data.tokenizer).once():
            found += np.bincount(tokens, minlength=len(found))
        return found

    def fits(self) -> list[Fit]:
        """One fit: the fine-tuning with the smaller vocabulary."""
        return [self.recovery]

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The task loss."""
        return self.data.kind.loss(taps.logits(self.model, batch), batch["labels"])


def _lengths(before: DataModule, after: DataModule) -> list[str]:
    """What pruning did to the length of sentences, which costs time, and to the share of unknown words."""
    found = {"train": (before.train, after.train)}
    if before.holdout is not None and after.holdout is not None:
        found["the hold-out"] = before.holdout, after.holdout
    return [
        f"on {split} {was.lengths.mean():.2f} tokens a sentence became {now.lengths.mean():.2f}, "
        f"{_unknown(was, before.tokenizer):.2%} unknown ones {_unknown(now, after.tokenizer):.2%}"
        for split, (was, now) in found.items()
    ]


def _unknown(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> float:
    """The share of the unknown token among all, those that frame a sentence included."""
    return float((encoded.ids == tokenizer.unk_token_id).float().mean()) if tokenizer.unk_token_id is not None else 0.0
