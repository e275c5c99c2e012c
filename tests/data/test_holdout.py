"""The hold-out: drawn from whole texts, and nothing left in train that gives one of them away."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import datasets
import numpy as np
import pytest

from edgemin.data.examples import Examples
from edgemin.data.holdout import hold_out, parts_inside, stratified
from edgemin.data.task import Task, find_kind
from edgemin.errors import UserError

GLUE = Path(os.environ.get("EDGEMIN_GLUE", Path(__file__).parents[3] / "shared" / "glue"))
KIND = find_kind("classification")


def task(holdout: float, seed: int = 42, columns: int = 1) -> Task:
    names = [f"text{column}" for column in range(columns)]
    return Task(
        name="custom",
        text_columns=names,
        labels=["a", "b"],
        evaluation_splits=["validation"],
        holdout=holdout,
        seed=seed,
    )


def examples(*texts: str | tuple[str, ...]) -> Examples:
    """Texts whose labels alternate."""
    rows = [(text,) if isinstance(text, str) else text for text in texts]
    return Examples(rows, np.arange(len(rows)) % 2)


def phrases(seed: int, sentences: int = 40) -> list[str]:
    """Sentences of few words, and random parts of them, as SST-2's train has them; in random order."""
    generator = np.random.default_rng(seed)
    found = []
    for length in generator.integers(1, 12, sentences):
        words = [f"w{word}" for word in generator.integers(0, 6, length)]
        for _ in range(6):
            begin, end = sorted(generator.integers(0, length + 1, 2))
            found.append(" ".join(words[begin:end]) or words[0])
        found.append(" ".join(words))
    return [found[row] for row in generator.permutation(len(found))]


def is_inside(part: str, text: str) -> bool:
    return part != text and f" {part} " in f" {text} "


@pytest.mark.parametrize("seed", range(3))
def test_parts_are_those_of_a_plain_search(seed: int) -> None:
    texts = phrases(seed)
    expected = {tuple(part.split()) for part in texts if any(is_inside(part, text) for text in texts)}
    words = {tuple(text.split()) for text in texts}
    assert parts_inside(words, words) == expected


@pytest.mark.parametrize("seed", range(3))
def test_whole_texts_are_held_out_and_their_parts_of_four_words_leave_train(
    seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    texts = phrases(seed)
    given = Examples([(text,) for text in texts], np.array([len(text) % 2 for text in texts]))
    train, held = hold_out(task(0.2), KIND, given)
    kept, out = ([text for (text,) in part.texts] for part in (train, held))
    assert all(not is_inside(text, other) for text in out for other in texts)
    whole = [text for text in texts if not any(is_inside(text, other) for other in texts)]
    assert len(out) == round(0.2 * len(whole))

    def tells(text: str) -> bool:
        return any(text == other or (is_inside(text, other) and len(text.split()) >= 4) for other in out)

    rest = list(texts)
    for text in out:
        rest.remove(text)
    assert kept == [text for text in rest if not tells(text)] and len(kept) < len(rest)
    said = f"{len(out)} examples are held out, and {len(rest) - len(kept)} of the other {len(rest)} dropped from train"
    assert [said in record.getMessage() for record in caplog.records] == [True]


def test_case_and_spaces_hide_no_part_and_words_are_not_cut() -> None:
    given = examples("A Fine  film for All of us", "fine film for all", "A fine film for allies", "fine film", "zero")
    for seed in range(20):
        train, held = hold_out(task(0.34, seed), KIND, given)  # one of the three whole ones
        assert len(held) == 1 and held.texts[0][0] in ("A Fine  film for All of us", "A fine film for allies", "zero")
        dropped = {text for (text,) in given.texts} - {text for (text,) in train.texts + held.texts}
        assert dropped == ({"fine film for all"} if held.texts[0][0].endswith("us") else set())


def test_a_text_that_comes_twice_is_not_on_both_sides() -> None:
    train, held = hold_out(task(0.25), KIND, examples("one", "two", "three", "four", *["five"] * 4))
    assert not set(train.texts) & set(held.texts)


def test_of_pairs_train_shares_no_text_with_the_hold_out(caplog: pytest.LogCaptureFixture) -> None:
    generator = np.random.default_rng(0)
    rows = [(f"text {one}", f"text {two}") for one, two in generator.integers(0, 300, (200, 2))]
    train, held = hold_out(task(0.1, columns=2), KIND, examples(*rows))
    out = {text for pair in held.texts for text in pair}
    assert len(held) == 20
    assert not any(text in out for pair in train.texts for text in pair)
    rest = [pair for pair in rows if not set(pair) & out]
    assert train.texts == rest and len(rest) < 180
    assert "each shares a text with a held-out one" in caplog.text


@pytest.mark.parametrize("aspect", ["aspect {}", ""])
def test_a_second_text_that_many_examples_have_gives_none_away(aspect: str) -> None:
    rows = [(f"review {number} of a film", aspect.format(number % 3)) for number in range(200)]
    train, held = hold_out(task(0.1, columns=2), KIND, examples(*rows))
    assert (len(train), len(held)) == (180, 20)


def test_a_draw_is_fair_to_many_small_strata() -> None:
    drawn = np.zeros(150 * 20)
    for seed in range(200):
        rows = stratified(np.repeat(np.arange(150), 20), 100, (seed, 0))
        assert len(np.unique(rows)) == 100 and np.bincount(rows // 20, minlength=150).max() == 1
        drawn[rows] += 1
    by_stratum = drawn.reshape(150, 20).sum(1) / 200  # 2/3 are expected, with a deviation of 0.033
    assert abs(by_stratum - 2 / 3).max() < 0.15


def test_a_draw_keeps_shares_to_within_a_row() -> None:
    strata = np.repeat(np.arange(4), (500, 301, 150, 49))
    for seed in range(20):
        taken = np.bincount(strata[stratified(strata, 97, (seed, 0))])
        assert taken.sum() == 97 and (abs(taken - 0.097 * np.bincount(strata)) < 1).all()
    assert np.array_equal(stratified(strata, 1000, (0, 0)), np.arange(1000)) and not len(stratified(strata, 0, (0, 0)))


def test_where_nothing_is_given_away_nothing_is_dropped_or_said(caplog: pytest.LogCaptureFixture) -> None:
    given = examples(*(f"text {number} alone" for number in range(40)))
    train, held = hold_out(task(0.25), KIND, given)
    assert (len(train), len(held), caplog.text) == (30, 10, "")
    assert np.bincount(held.labels).tolist() == [5, 5]


def test_the_draw_depends_on_data_and_seed_alone_and_what_was_dropped_is_in_the_key() -> None:
    given = Examples([(text,) for text in phrases(5)], np.arange(280) % 2)
    first, again = (hold_out(task(0.1), KIND, given) for _ in range(2))
    other = hold_out(task(0.1, seed=7), KIND, given)
    assert [part.fingerprint for part in first] == [part.fingerprint for part in again]
    assert first[0].fingerprint != other[0].fingerprint and first[1].fingerprint != other[1].fingerprint
    without = dataclasses.replace(given, texts=list(given.texts))
    held = set(first[1].texts)
    rest = without.take(np.array([row for row, text in enumerate(given.texts) if text not in held]))
    assert len(first[0]) < len(rest) and first[0].fingerprint != rest.fingerprint


@pytest.mark.parametrize(
    ("texts", "share", "message"),
    [
        (["a b c d", "b c", "c"], 0.5, "a share that leaves examples on both sides of 1 texts that are part of no"),
        (["a b c d e", "a b c d", "b c d e", "x y"], 0.9, "a smaller share, as all else in train is part of what"),
        ([("a", "b"), ("b", "c"), ("c", "b")], 0.34, "a smaller share, as all else in train is part of what"),
    ],
)
def test_a_hold_out_that_leaves_one_side_empty_is_refused(
    texts: list[str | tuple[str, ...]], share: float, message: str
) -> None:
    columns = 1 if isinstance(texts[0], str) else 2
    with pytest.raises(UserError, match=rf"^task\.holdout: expected {message}[^\n]*, given {share}$"):
        hold_out(task(share, columns=columns), KIND, examples(*texts))


@pytest.mark.skipif(not (GLUE / "sst2").is_dir(), reason="needs a copy of SST-2")
def test_sst2_has_its_6885_whole_phrases() -> None:
    files = {"train": str(GLUE / "sst2" / "train.parquet")}
    rows = datasets.Dataset.from_parquet(files["train"])
    given = Examples([(text,) for text in rows["sentence"]], np.array(rows["label"]))
    train, held = hold_out(task(0.1), KIND, given)
    assert (len(given), len(held)) == (67_349, 688)
    assert 0.9 * len(given) < len(train) < 0.95 * len(given)
