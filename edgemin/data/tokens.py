"""A corpus as one endless stream of tokens, whose position can be saved and restored."""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import Any

import numpy as np
import pyarrow as pa
import tokenizers
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from edgemin.data.corpus import BROKEN, Corpus, refusal
from edgemin.errors import UserError

log = logging.getLogger(__name__)

RETRY_SECONDS = (1.0, 4.0, 16.0)  # after that a broken stream is given up
_ROWS = 64
_CHARACTERS = 1 << 18  # tokenized at once; few, as tokens not yet taken are part of `state_dict`
_DAMAGED = (ValueError, TypeError, EOFError, zlib.error, pa.ArrowException)


class Tokens:
    """The tokens of all documents, each followed by the separator, epoch after epoch.

    Documents come in the corpus's order. One without any token is skipped.

    Args:
        corpus: The documents.
        tokenizer: A fast tokenizer with a separator; it is left as it was.

    Attributes:
        skipped: Documents without a token that were skipped so far, in all epochs.

    Raises:
        UserError: If the corpus or the tokenizer cannot be used.
    """

    def __init__(self, corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> None:
        self._corpus = corpus
        self._backend = _backend(tokenizer)
        self._separator = tokenizer.sep_token_id
        self._rows = corpus.open()
        self._shard = self._batch = 0  # the file that is being read, and how many batches of it were read
        self._batches: Iterator[Mapping[str, list[Any]]] | None = None  # the batches of that file still to come
        self._left_over = np.empty(0, dtype=np.int32)
        self._epoch = self._documents = self._blank = 0  # documents and blank ones: counted in this epoch
        self.skipped = 0

    def take(self, count: int) -> NDArray[np.int32]:
        """The next `count` tokens.

        Raises:
            UserError: If the stream breaks and cannot be taken up again, a document is no text, or none has any.
        """
        parts = [self._left_over]
        have = len(self._left_over)
        while have < count:
            parts.append(self._read())
            have += len(parts[-1])
        tokens = np.concatenate(parts)
        self._left_over = tokens[count:].copy()
        return tokens[:count]

    def once(self) -> Iterator[NDArray[np.int32]]:
        """All tokens of one epoch, piece by piece; errors as of `take`."""
        while self._epoch == 0:
            yield self._read()

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream: plain values, and the tokens that were read and not yet taken."""
        return {
            "epoch": self._epoch,
            "documents": self._documents,
            "blank": self._blank,
            "skipped": self.skipped,
            "left_over": torch.from_numpy(self._left_over),
            "shard": self._shard,
            "batch": self._batch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position that `state_dict` gave for the same corpus and tokenizer."""
        self._epoch, self._documents, self._blank = state["epoch"], state["documents"], state["blank"]
        self.skipped = state["skipped"]
        self._left_over = state["left_over"].numpy()
        self._shard, self._batch, self._batches = state["shard"], state["batch"], None

    def _read(self) -> NDArray[np.int32]:
        """The tokens of the next documents; may be empty at the end of an epoch."""
        texts: list[str] = []
        characters, ended = 0, False
        while characters < _CHARACTERS and not ended:
            rows = [self._text(row, value) for row, value in enumerate(self._next_rows(), self._documents + 1)]
            self._documents += len(rows)
            characters += sum(map(len, rows))
            texts += rows
            ended = not rows
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        documents = [ids for encoding in encodings if (ids := encoding.ids)]
        for ids in documents:
            ids.append(self._separator)
        self._blank += len(texts) - len(documents)
        self.skipped += len(texts) - len(documents)
        if ended:
            self._end_epoch()
        return np.fromiter(chain.from_iterable(documents), np.int32, count=sum(map(len, documents)))

    def _text(self, row: int, value: Any) -> str:
        if value is None:
            return ""
        if not isinstance(value, str):
            given = f"a {type(value).__name__} in document {row}"
            raise refusal("corpus_column", f"texts in {self._corpus.column} of {self._corpus.path}", given)
        return value if value.strip() else ""  # some tokenizers make a token of a space

    def _end_epoch(self) -> None:
        if self._documents == self._blank:
            given = f"{self._documents} empty ones" if self._documents else "none"
            raise refusal("corpus", f"documents with text in {self._corpus.path}", given)
        if self._blank and self._epoch == 0:  # every epoch has the same
            log.warning("corpus: %d of %d documents are empty and skipped", self._blank, self._documents)
        self._epoch += 1
        self._documents = self._blank = 0

    def _next_rows(self) -> list[Any]:
        """The next documents; none at the end of an epoch."""
        while self._shard < self._rows.num_shards:
            rows = self._next_batch()
            if rows is not None:
                self._batch += 1
                return rows
            self._shard, self._batch, self._batches = self._shard + 1, 0, None
        self._shard = 0
        return []

    def _next_batch(self) -> list[Any] | None:
        """The next documents of a file; None at its end. A stream that breaks is taken up where it stood."""
        for pause in (*RETRY_SECONDS, None):
            try:
                if self._batches is None:
                    file = self._rows.shard(self._rows.num_shards, self._shard)
                    self._batches = islice(file.iter(_ROWS), self._batch, None)
                batch = next(self._batches, None)
                return None if batch is None else batch[self._corpus.column]
            except BROKEN as error:
                self._batches = None  # a generator that has raised is over; what it had begun is read again
                reason = " ".join(str(error).split()) or type(error).__name__
                if pause is None:
                    raise UserError(
                        f"corpus: the stream broke after {self._documents} documents of epoch {self._epoch + 1} "
                        f"({reason}); run again to go on from the last checkpoint"
                    ) from error
                log.warning("corpus: the stream broke (%s), next try in %g s", reason, pause)
                time.sleep(pause)
            except _DAMAGED as error:
                given = f"{self._corpus.path}, damaged after document {self._documents} ({str(error)[:300]})"
                raise refusal("corpus", "readable files (text in UTF-8)", given) from error
        raise AssertionError("the last try returns or raises")


def _backend(tokenizer: PreTrainedTokenizerBase) -> tokenizers.Tokenizer:
    """A copy of the Rust tokenizer that neither pads nor truncates."""
    if not tokenizer.is_fast:
        raise UserError("source: expected a checkpoint with a fast tokenizer (tokenizer.json), given a slow one")
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise UserError("source: expected a tokenizer with tokens for begin (cls) and separator, given one without")
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    return backend
