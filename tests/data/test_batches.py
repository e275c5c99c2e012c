"""Texts are tokenized once, padded little, and met in an order that a resumed fit repeats."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgemin import toy
from edgemin.data.batches import TrainBatches, evaluation_batches
from edgemin.data.encoding import Encoded, encode
from edgemin.data.examples import Examples
from edgemin.data.module import DataModule
from edgemin.data.splits import load
from edgemin.data.task import Task
from edgemin.errors import UserError
from edgemin.store.cache import Cache


def toy_task(**changes: Any) -> Task:
    settings = {"max_train_examples": 300, "max_evaluation_examples": 60, "max_length": 48, **changes}
    return Task(name="toy", text_columns=["sentence"], evaluation_splits=["validation"], **settings)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    return encode(load(toy_task()).train, toy.tokenizer(), 48, Cache(tmp_path_factory.mktemp("cache")))


# --- token ids --------------------------------------------------------------------------------------------


def test_batches_hold_what_the_tokenizer_itself_gives(tmp_path: Path) -> None:
    texts = [
        ("the plot was good .", "the hero was not so bad ."),
        ("good", "bad"),
        ("dull " * 30, "witty " * 9),
    ]
    tokenizer = toy.tokenizer()
    before = tokenizer.backend_tokenizer.to_str()
    batch = encode(Examples(texts, np.array([0, 1, 1])), tokenizer, 20, Cache(tmp_path)).batch([2, 0, 1])
    assert tokenizer.backend_tokenizer.to_str() == before
    first, second = zip(*(texts[i] for i in (2, 0, 1)), strict=True)
    expected = tokenizer(list(first), list(second), truncation=True, max_length=20, padding=True, return_tensors="pt")
    assert batch.keys() == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    for name, value in expected.items():
        assert torch.equal(batch[name], value), name
    assert batch["labels"].tolist() == [1, 0, 1]
    assert all(value.dtype == torch.int64 for value in batch.values())


def test_widths_are_multiples_of_eight_up_to_the_longest_allowed(tmp_path: Path) -> None:
    examples = Examples([("good " * n,) for n in (3, 7, 40)], np.zeros(3, dtype=np.int64))
    encoded = encode(examples, toy.tokenizer(), 20, Cache(tmp_path))
    assert [encoded.batch([i])["input_ids"].shape[1] for i in range(3)] == [8, 16, 20]
    assert encoded.lengths.tolist() == [5, 9, 20]


def test_labels_of_a_regression_stay_float32(tmp_path: Path) -> None:
    labels = np.array([0.5, 2.0], dtype=np.float32)
    batch = encode(Examples([("good",), ("bad",)], labels), toy.tokenizer(), 16, Cache(tmp_path)).batch([1])
    assert batch["labels"].dtype == torch.float32 and batch["labels"].tolist() == [2.0]


def test_a_split_is_tokenized_once_and_anew_when_the_file_is_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    examples = load(toy_task()).train
    first = encode(examples, toy.tokenizer(), 48, Cache(tmp_path))
    (path,) = tmp_path.rglob("*.safetensors")
    stamp = path.stat().st_mtime_ns
    assert encode(examples, toy.tokenizer(), 48, Cache(tmp_path)).key == first.key
    assert path.stat().st_mtime_ns == stamp
    expected = first.batch([0, 1])["input_ids"].clone()
    replacement = tmp_path / "replacement"
    replacement.write_bytes(path.read_bytes()[:100])
    replacement.replace(path)
    assert torch.equal(encode(examples, toy.tokenizer(), 48, Cache(tmp_path)).batch([0, 1])["input_ids"], expected)
    assert "differs from its checksum and is made again" in caplog.text
    assert sorted(entry.name for entry in path.parent.iterdir()) == [path.name, f"{path.name}.sha256"]


def test_the_key_follows_texts_tokenizer_and_length(tmp_path: Path) -> None:
    one, other = load(toy_task()).train, load(toy_task(seed=1)).train
    bigger = toy.tokenizer()
    bigger.add_tokens(["unheard"])
    keys = {
        encode(one, toy.tokenizer(), 48, Cache(tmp_path)).key,
        encode(other, toy.tokenizer(), 48, Cache(tmp_path)).key,
        encode(one, toy.tokenizer(), 40, Cache(tmp_path)).key,
        encode(one, bigger, 48, Cache(tmp_path)).key,
    }
    assert len(keys) == 4


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^paths\.store: "):
        encode(load(toy_task()).train, toy.tokenizer(), 48, Cache(tmp_path / "file"))


def test_a_length_beyond_the_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^task\.max_length: expected at most the tokenizer's 128 tokens"):
        encode(load(toy_task()).train, toy.tokenizer(), 129, Cache(tmp_path))


# --- batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 16, 1000])
def test_every_example_comes_once_an_epoch(encoded: Encoded, batch_size: int) -> None:
    batches = TrainBatches(encoded, batch_size, seed=3, epochs=2)
    for epoch in (0, 1):
        order = batches.epoch(epoch)
        assert len(order) == batches.batches_per_epoch
        assert Counter(np.concatenate(order).tolist()) == Counter(range(len(encoded)))
    if batch_size < len(encoded):
        assert not np.array_equal(np.concatenate(batches.epoch(0)), np.concatenate(batches.epoch(1)))


def test_buckets_waste_little_padding(encoded: Encoded) -> None:
    def tokens(order: list[np.ndarray]) -> int:
        return sum(len(rows) * int(encoded.lengths[rows].max()) for rows in order)

    bucketed = TrainBatches(encoded, 8, seed=0, epochs=1).epoch(0)
    shuffled = np.array_split(np.random.default_rng(0).permutation(len(encoded)), len(bucketed))
    assert tokens(bucketed) < 0.75 * tokens(shuffled)
    assert tokens(bucketed) < 1.1 * int(encoded.lengths.sum())


@pytest.mark.parametrize("length", [{"epochs": 2.5}, {"steps": 47}])
@pytest.mark.parametrize("start", [0, 1, 18, 19, 20, 46])
def test_a_resumed_fit_sees_the_batches_of_an_unbroken_one(
    encoded: Encoded, length: dict[str, Any], start: int
) -> None:
    whole = list(TrainBatches(encoded, 16, seed=5, **length))
    rest = TrainBatches(encoded, 16, seed=5, start=start, **length)
    assert len(rest) == len(whole)
    resumed = list(rest)
    assert len(resumed) == len(whole) - start
    for one, other in zip(whole[start:], resumed, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_steps_and_epochs_count_batches(encoded: Encoded) -> None:
    assert TrainBatches(encoded, 16, seed=0, epochs=1).batches_per_epoch == 19
    assert len(TrainBatches(encoded, 16, seed=0, epochs=0.5)) == 10
    assert len(TrainBatches(encoded, 16, seed=0, epochs=3)) == 57
    assert len(list(TrainBatches(encoded, 16, seed=0, steps=30))) == 30


def test_batches_say_which_examples_they_hold(encoded: Encoded) -> None:
    batches = TrainBatches(encoded, 16, seed=0, epochs=1)
    for batch, rows in zip(batches, batches.epoch(0), strict=True):
        assert batch.keys() == {*encoded.batch(rows), "index"}
        assert batch["index"].dtype == torch.int64 and batch["index"].tolist() == rows.tolist()
        again = encoded.batch(batch["index"].numpy())
        assert all(torch.equal(batch[name], again[name]) for name in again)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_processes_share_every_batch_and_their_means_average_to_its_mean(encoded: Encoded, world: int) -> None:
    # 300 examples: of 37 batches of 8 and one of 4, which leaves three of seven processes without an example
    whole = list(TrainBatches(encoded, 8, seed=1, epochs=1))
    ranks = [list(TrainBatches(encoded, 8, seed=1, epochs=1, rank=rank, world=world)) for rank in range(world)]
    for step, batch in enumerate(whole):
        index, parts = batch["index"], [rank[step] for rank in ranks]
        own = [part["index"].tolist() for part in parts]
        assert own == [index[rank::world].tolist() or index[:1].tolist() for rank in range(world)]
        assert [part["share"].item() > 0 for part in parts] == [rank < len(index) for rank in range(world)]
        assert all(part["share"].shape == () and part["share"].dtype == torch.float32 for part in parts)
        assert all(torch.equal(part["labels"], encoded.batch(part["index"].numpy())["labels"]) for part in parts)
        mean = sum(part["share"] * part["index"].double().mean() for part in parts) / world
        assert mean.item() == pytest.approx(index.double().mean().item())


def test_one_process_has_no_share(encoded: Encoded) -> None:
    assert all("share" not in batch for batch in TrainBatches(encoded, 8, seed=1, steps=3))


def test_evaluation_batches_cover_the_split_by_length(encoded: Encoded) -> None:
    seen = [indices for indices, batch in evaluation_batches(encoded, 32) if len(batch["labels"]) == len(indices)]
    order = np.concatenate(seen)
    assert sorted(order.tolist()) == list(range(len(encoded)))
    assert (np.diff(encoded.lengths[order]) >= 0).all()


def test_calibration_draws_without_replacement_at_true_lengths(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = DataModule(load(toy_task(holdout=0.1)), toy.tokenizer(), Cache(tmp_path))
    batches = data.calibration(examples=50, batch_size=8, seed=0)
    rows = [tuple(ids[mask.bool()].tolist()) for b in batches for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)]  # fmt: skip  # noqa: E501
    assert len(rows) == len(set(rows)) == 50
    again, other = data.calibration(50, 8, seed=0), data.calibration(50, 8, seed=1)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))
    assert not torch.equal(batches[0]["input_ids"], other[0]["input_ids"])
    assert sum(len(b["labels"]) for b in data.calibration(10_000, 64, seed=0)) == len(data.train)
    assert "10000 examples asked for" in caplog.text


def test_the_module_gives_every_split(tmp_path: Path) -> None:
    data = DataModule(load(toy_task(holdout=0.1)), toy.tokenizer(), Cache(tmp_path))
    assert data.holdout is not None
    assert data.splits.holdout is not None
    sizes = len(data.train), len(data.holdout), len(data.evaluation["validation"])
    assert sizes == (len(data.splits.train), len(data.splits.holdout), 60)
    assert data.labels == ("negative", "positive") and data.kind.name == "classification"
    assert DataModule(load(toy_task()), toy.tokenizer(), Cache(tmp_path)).holdout is None
