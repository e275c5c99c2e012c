"""Draws from the rows of a split: so that every class keeps its share, and so that train gives no hold-out away.

The train texts of SST-2 are phrases cut from sentences: a random tenth of them stands almost word for word in the rest.
So only whole texts are held out, those that are part of no other, and what is part of them leaves train. Where an
example is two texts (a premise has several hypotheses), what shares a text with a held-out example leaves train, unless
it is a text that many examples have (an aspect, a blank).
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemin.data.examples import Examples
from edgemin.data.task import Task
from edgemin.tasks.base import Kind, refusal

log = logging.getLogger(__name__)

TELLING_WORDS = 4
"""A part of a held-out text leaves train if it has so many words; shorter ones stand everywhere and tell little."""

COMMON, COMMON_SHARE = 20, 0.01
"""A text of pairs that stands in more examples than this, and than this share of them, gives no other away."""

Words = tuple[str, ...]


def stratified(strata: NDArray[Any], count: int, seed: Sequence[int]) -> NDArray[np.int64]:
    """Draw rows so that every stratum keeps its share, to within one row, in their order in the data.

    Where shares are no whole numbers, the rows that are left go to strata by systematic sampling (their remainders end
    to end in random order, one drawn point in each whole number): every row is as likely as any other, also where
    strata are many and small, as sets of labels are.

    Args:
        strata: The stratum of every row, [N].
        count: How many rows to draw, 0 to N.
        seed: Seeds of the draw.

    Returns:
        `count` distinct row numbers, ascending.
    """
    classes, sizes = np.unique(strata, return_counts=True)
    exact = sizes * count / max(len(strata), 1)
    take = np.floor(exact).astype(np.int64)
    for_remainders = np.random.default_rng([*seed, 1])
    order = for_remainders.permutation(len(classes))
    ends = np.cumsum((exact - take)[order])
    ends[-1:] = count - int(take.sum())  # without what rounding has left
    take[order] += np.diff(np.floor(ends + for_remainders.random()), prepend=0).astype(np.int64)
    generator = np.random.default_rng(seed)
    drawn = [
        generator.permutation(np.flatnonzero(strata == value))[:number]
        for value, number in zip(classes, take, strict=True)
    ]
    return np.sort(np.concatenate(drawn))


def hold_out(task: Task, kind: Kind, train: Examples) -> tuple[Examples, Examples]:
    """Divide train: what is left to train on, and what is held out. It says how many examples are in neither.

    Texts are compared word by word (what stands between spaces, punctuation included; a text without spaces is one
    word), whatever their case, and parts of fewer than `TELLING_WORDS` words stay. Of single texts `task.holdout` is
    the share of whole ones, of pairs the share of all.

    Returns:
        Train without the hold-out and without what would give it away, and the hold-out.

    Raises:
        UserError: one of the two would be empty.
    """
    texts = [tuple(tuple(text.casefold().split()) for text in example) for example in train.texts]
    single = len(texts[0]) == 1
    common = set() if single else _common(texts)
    rows = _whole([words for (words,) in texts]) if single else np.arange(len(texts))
    count = round(task.holdout * len(rows))
    if not 0 < count < len(train):
        found = f"{len(rows)} texts that are part of no other" if single else f"{len(rows)}"
        raise refusal("holdout", f"a share that leaves examples on both sides of {found} in train", task.holdout)
    held = rows[stratified(kind.strata(train.labels[rows]), count, (task.seed, 2))]
    rest = np.setdiff1d(np.arange(len(train)), held)
    known = _given_away([texts[row] for row in held], [texts[row] for row in rest], common)
    kept = rest[~known]
    if not len(kept):
        raise refusal("holdout", "a smaller share, as all else in train is part of what is held out", task.holdout)
    if known.any():
        log.warning(
            "task %s: %d examples are held out, and %d of the other %d dropped from train: %s",
            task.name,
            len(held),
            known.sum(),
            len(rest),
            "each is part of a held-out text" if single else "each shares a text with a held-out one",
        )
    return train.take(kept), train.take(held)


def _whole(texts: list[Words]) -> NDArray[np.int64]:
    """The rows of those texts that are part of no other."""
    parts = parts_inside(set(texts), set(texts))
    return np.array([row for row, words in enumerate(texts) if words not in parts])


def _common(texts: list[tuple[Words, ...]]) -> set[Words]:
    """Texts of pairs that stand in so many examples that sharing one tells nothing: an aspect, a blank."""
    counts = Counter(words for example in texts for words in set(example))
    most = max(COMMON, COMMON_SHARE * len(texts))
    return {words for words, count in counts.items() if count > most or not words}


def _given_away(held: list[tuple[Words, ...]], rest: list[tuple[Words, ...]], common: set[Words]) -> NDArray[np.bool_]:
    """Which of the other examples give a held-out one away."""
    known = {words for example in held for words in example} - common
    if len(held[0]) == 1:
        telling = {words for (words,) in rest if len(words) >= TELLING_WORDS}
        known |= parts_inside(telling, known)
    return np.array([any(words in known for words in example) for example in rest])


def parts_inside(phrases: Collection[Words], texts: Iterable[Words]) -> set[Words]:
    """Those phrases that stand inside a longer one of the texts, word for word.

    A phrase is looked for only where a text has its first words.
    """
    lengths = defaultdict[Words, set[int]](set)  # of the phrases that begin with these words
    for phrase in phrases:
        lengths[phrase[:TELLING_WORDS]].add(len(phrase))
    known, found = set(phrases), set[Words]()
    for words in texts:
        for start in range(len(words)):
            most = min(len(words) - start, len(words) - 1)  # a text is no part of itself
            for begun in range(1, TELLING_WORDS + 1):
                for length in lengths.get(words[start : start + begun], ()):
                    part = words[start : start + length]
                    if length <= most and part in known:
                        found.add(part)
    return found
