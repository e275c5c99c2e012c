"""Token ids of a split: made once, kept in one memory-mapped file, padded batch by batch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from edgemin.errors import UserError
from edgemin.progress import Line, live_line
from edgemin.store.cache import Cache
from edgemin.store.content import content_key
from edgemin.tasks.base import Labels, refusal

if TYPE_CHECKING:
    from edgemin.data.examples import Examples

log = logging.getLogger(__name__)

PAD_TO = 8  # widths are multiples of this: few distinct shapes, and full vector registers
_CHUNK = 4096
_FORMAT = "1"


@dataclass(frozen=True, eq=False)
class Encoded:
    """Token ids of one split.

    Attributes:
        ids: Token ids of all examples one after the other, int32, memory-mapped.
        types: Segment ids in the same order, uint8; None where the tokenizer makes none.
        starts: Where each example begins in `ids`, int64 [N].
        lengths: Tokens of each example, special ones included, int64 [N].
        labels: Labels of each example, [N] or [N, C].
        pad_id: The token that fills a batch up.
        max_length: The longest an input can be, in tokens.
        key: Hash of the examples, the tokenizer and `max_length`.
    """

    ids: Tensor
    types: Tensor | None
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    labels: Labels
    pad_id: int
    max_length: int
    key: str

    def __len__(self) -> int:
        return len(self.lengths)

    def sentence(self, index: int) -> list[int]:
        """The token ids of one example, without padding."""
        start = int(self.starts[index])
        found: list[int] = self.ids[start : start + int(self.lengths[index])].tolist()
        return found

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> dict[str, Tensor]:
        """A padded batch of the examples at `indices`.

        The width T is that of the longest example rounded up to a multiple of 8, at most `max_length`.

        Args:
            indices: B positions in this split.

        Returns:
            `input_ids`, `attention_mask`, `token_type_ids` (where the tokenizer makes them), int64
            [B, T], and `labels`, [B] or [B, C], as the kind of task has them.
        """
        rows = np.asarray(indices, dtype=np.int64)
        lengths = torch.from_numpy(self.lengths[rows]).unsqueeze(1)
        longest = int(self.lengths[rows].max())
        width = min(-(-longest // PAD_TO) * PAD_TO, self.max_length)
        offsets = torch.arange(width)
        mask = offsets < lengths
        positions = torch.from_numpy(self.starts[rows]).unsqueeze(1) + torch.minimum(offsets, lengths - 1)
        batch = {
            "input_ids": self.ids[positions].long().masked_fill(~mask, self.pad_id),
            "attention_mask": mask.long(),
            "labels": torch.from_numpy(self.labels[rows]),
        }
        if self.types is not None:
            batch["token_type_ids"] = self.types[positions].long().masked_fill(~mask, 0)
        return batch


def encode(examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int, cache: Cache) -> Encoded:
    """Tokenize a split, or find it tokenized.

    Args:
        examples: Texts and labels.
        tokenizer: A fast tokenizer (one with a `tokenizer.json`); it is left as it was.
        max_length: Longest input in tokens; of pairs the longer text is cut first.
        cache: Where `<key>/encoded.safetensors` is kept.

    Returns:
        The token ids, memory-mapped from the file.

    Raises:
        UserError: If the tokenizer cannot be used, or the file cannot be written.
    """
    backend = _backend(tokenizer, max_length)
    with_types = "token_type_ids" in tokenizer.model_input_names
    assert isinstance(tokenizer.pad_token_id, int)
    content = {
        "format": _FORMAT,
        "examples": examples.fingerprint,
        "tokenizer": backend.to_str(),
        "types": with_types,
        "padding": tokenizer.pad_token_id,
        "max_length": max_length,
    }
    key = content_key(content)
    name = f"{key}/encoded.safetensors"
    path = cache.find(name)
    if path is None:
        with live_line("tokenizing", len(examples)) as line:
            made = _tokenize(examples, backend, with_types, line)
        path = cache.keep(name, lambda path: save_file(made, path))
    tensors = load_file(path)
    lengths = tensors["lengths"].numpy().astype(np.int64)
    return Encoded(
        ids=tensors["ids"],
        types=tensors.get("types"),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        labels=examples.labels,
        pad_id=tokenizer.pad_token_id,
        max_length=max_length,
        key=key,
    )


def _backend(tokenizer: PreTrainedTokenizerBase, max_length: int) -> tokenizers.Tokenizer:
    """A copy of the Rust tokenizer, so that the truncation set here is not saved with the user's."""
    if not tokenizer.is_fast:
        raise UserError("source: expected a checkpoint with a fast tokenizer (tokenizer.json), given a slow one")
    if tokenizer.pad_token_id is None:
        raise UserError("source: expected a tokenizer with a padding token, given one without")
    if max_length > tokenizer.model_max_length:
        raise refusal("max_length", f"at most the tokenizer's {tokenizer.model_max_length} tokens", max_length)
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.enable_truncation(max_length, direction=tokenizer.truncation_side)
    return backend


def _tokenize(examples: Examples, backend: tokenizers.Tokenizer, with_types: bool, line: Line) -> dict[str, Tensor]:
    ids, types, lengths = [], [], []
    pairs = bool(examples.texts) and len(examples.texts[0]) == 2
    for start in range(0, len(examples), _CHUNK):
        chunk = examples.texts[start : start + _CHUNK]
        encodings = backend.encode_batch_fast(chunk if pairs else [text for (text,) in chunk])
        lengths += [len(encoding.ids) for encoding in encodings]
        ids.append(np.concatenate([np.array(encoding.ids, dtype=np.int32) for encoding in encodings]))
        if with_types:
            types.append(np.concatenate([np.array(encoding.type_ids, dtype=np.uint8) for encoding in encodings]))
        line.done += len(chunk)
    if min(lengths) == 0:
        raise UserError("source: expected a tokenizer that adds special tokens, given one that leaves a text empty")
    tensors = {
        "ids": torch.from_numpy(np.concatenate(ids)),
        "lengths": torch.tensor(lengths, dtype=torch.int32),
    }
    if with_types:
        tensors["types"] = torch.from_numpy(np.concatenate(types))
    return tensors
