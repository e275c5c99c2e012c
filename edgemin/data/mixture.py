"""Several corpora read as one: which they are, and their sequences in the shares that are asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from edgemin.data.corpus import Corpus, refusal
from edgemin.data.tokens import Tokens


@dataclass(frozen=True)
class Mixture:
    """Several corpora read as one.

    Attributes:
        corpora: Two or more, of sequences of one length.
        weights: How many of the sequences are of each, up to a factor.

    Raises:
        UserError: If there is not one weight above 0 for each.
    """

    corpora: tuple[Corpus, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        fits = len(self.weights) == len(self.corpora)
        if not fits or not all(0 < weight < math.inf for weight in self.weights):
            expected = f"{len(self.corpora)} numbers above 0, one for each corpus"
            raise refusal("corpus_weights", expected, list(self.weights))

    @property
    def length(self) -> int:
        """Tokens of each packed sequence, special ones included."""
        return self.corpora[0].length

    @property
    def column(self) -> list[str]:
        """The column of the texts of each."""
        return [corpus.column for corpus in self.corpora]

    def fingerprint(self) -> dict[str, Any]:
        """What decides the sequences: the documents of each corpus, and its share."""
        total = sum(self.weights)
        return {
            "corpora": [corpus.fingerprint() for corpus in self.corpora],
            "shares": [weight / total for weight in self.weights],
        }

    def open(self) -> None:
        """Check each up to its first row; see `Corpus.open`."""
        for corpus in self.corpora:
            corpus.open()


def read_corpus(
    paths: str | Sequence[str],
    weights: Sequence[float] | None,
    length: int,
    **where: str | Sequence[str | None] | None,
) -> Corpus | Mixture:
    """One corpus, or several with their weights.

    Args:
        paths: One, or a list.
        weights: Of several, one for each; `None` weighs all the same.
        length: Tokens of each packed sequence.
        where: `subset`, `split` and `column`: one for all, or a list with one for each.

    Raises:
        UserError: If a setting is of the wrong type, out of range or not one for each.
    """
    several = [paths] if isinstance(paths, str) else list(paths)
    if not several:
        raise refusal("corpus", "null or at least one", "[]")
    for name, value in where.items():
        if not isinstance(value, str | None) and len(value) != len(several):
            raise refusal(
                f"corpus_{name}", f"one for all, or a list of {len(several)}, one for each corpus", list(value)
            )
    if len(several) == 1 and weights is not None:
        raise refusal("corpus_weights", "null for one corpus", list(weights))
    columns = {
        name: [value] * len(several) if isinstance(value, str | None) else value for name, value in where.items()
    }
    rows: Any = [{name: values[index] for name, values in columns.items()} for index in range(len(several))]
    corpora = tuple(Corpus(path, **row, length=length) for path, row in zip(several, rows, strict=True))
    if len(corpora) == 1:
        return corpora[0]
    return Mixture(corpora, (1.0,) * len(corpora) if weights is None else tuple(weights))


class Streams:
    """The tokens of each corpus, and how many sequences were taken of it."""

    def __init__(self, corpus: Corpus | Mixture, tokenizer: PreTrainedTokenizerBase) -> None:
        corpora, weights = (corpus.corpora, corpus.weights) if isinstance(corpus, Mixture) else ((corpus,), (1.0,))
        self._tokens = [Tokens(one, tokenizer) for one in corpora]
        self._shares = [weight / sum(weights) for weight in weights]
        self._taken = [0] * len(corpora)

    @property
    def skipped(self) -> int:
        """Documents without a token that were skipped so far."""
        return sum(tokens.skipped for tokens in self._tokens)

    def take(self, count: int, width: int) -> NDArray[np.int32]:
        """The next sequences, `[count, width]`, those of one corpus after those of another."""
        before = list(self._taken)
        for number in range(sum(before) + 1, sum(before) + count + 1):
            behind = [share * number - taken for share, taken in zip(self._shares, self._taken, strict=True)]
            self._taken[behind.index(max(behind))] += 1
        own = [after - then for after, then in zip(self._taken, before, strict=True)]
        found = [tokens.take(number * width) for tokens, number in zip(self._tokens, own, strict=True)]
        return np.concatenate(found).reshape(count, width)

    def state_dict(self) -> dict[str, Any]:
        """The place in each corpus; plain values and int32 tensors."""
        return {"taken": list(self._taken), "places": [tokens.state_dict() for tokens in self._tokens]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a place that `state_dict` gave for the same corpora and tokenizer."""
        self._taken = list(state["taken"])
        for tokens, place in zip(self._tokens, state["places"], strict=True):
            tokens.load_state_dict(place)
