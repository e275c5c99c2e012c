"""The toy task is reproducible, balanced, and needs more than single words."""

from __future__ import annotations

import re

import numpy as np

from edgemin import toy

GOOD = "good great superb lovely brilliant charming clever funny moving fresh warm witty"


def verdict(text: str) -> str:
    """A reader's own rule, written down apart from the generator."""
    sentence = next(part for part in text.split(" .") if re.search(r"\bthe \w+ was\b", part)).strip()
    if sentence.startswith(("although", "while")):
        main = sentence.split(" , ")[1]
    elif " but " in sentence:
        main = sentence.split(" but ")[1]
    else:
        main = sentence.split(" even though ")[0]
    good = any(word in GOOD.split() for word in main.split())
    negated = bool(set(main.split()) & {"not", "never", "hardly"})
    return "positive" if good != negated else "negative"


def test_labels_follow_from_the_rule() -> None:
    texts, labels = toy.generate(500, seed=0)
    assert [verdict(text) for text in texts] == labels


def test_the_seed_decides_everything_and_more_is_a_continuation() -> None:
    texts, labels = toy.generate(100, seed=3)
    longer = toy.generate(250, seed=3)
    assert (longer[0][:100], longer[1][:100]) == (texts, labels)
    assert toy.generate(100, seed=4)[0] != texts


def test_reviews_are_distinct_and_balanced() -> None:
    texts, labels = toy.generate(2001, seed=0)
    assert len(set(texts)) == 2001
    assert abs(labels.count("positive") - labels.count("negative")) == 1


def test_no_word_and_no_sum_of_words_decides() -> None:
    texts, labels = toy.generate(3000, seed=0)
    words = {word: column for column, word in enumerate(toy.vocabulary())}
    counts = np.ones((len(texts), len(words)))
    for row, text in enumerate(texts):
        for word in text.split():
            counts[row, words[word]] += 1
    truth = np.array([1.0 if label == "positive" else -1.0 for label in labels])
    present = np.where(counts > 1, 1.0, -1.0)
    single = np.abs(present.T @ truth) / len(truth) / 2 + 0.5
    assert single.max() < 0.6
    weights, *_ = np.linalg.lstsq(counts[:2000], truth[:2000], rcond=None)
    linear = np.mean(np.sign(counts[2000:] @ weights) == truth[2000:])
    assert 0.55 < linear < 0.75


def test_the_tokenizer_knows_every_word_and_frames_pairs() -> None:
    tokenizer = toy.tokenizer()
    texts, _ = toy.generate(500, seed=0)
    encoded = tokenizer(texts)
    assert tokenizer.unk_token_id not in {token for ids in encoded["input_ids"] for token in ids}
    assert max(map(len, encoded["input_ids"])) <= 48
    assert 130 <= len(tokenizer) <= 200
    pair = tokenizer("the plot was good .", "Unheard")
    tokens = "[CLS] the plot was good . [SEP] [UNK] [SEP]".split()  # noqa: SIM905
    assert tokenizer.convert_ids_to_tokens(pair["input_ids"]) == tokens
    assert pair["token_type_ids"] == [0] * 7 + [1] * 2
