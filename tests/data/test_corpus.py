"""Text without labels is packed without padding, in an order that a resumed or divided run repeats."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from torch import Tensor

from edgemin import toy
from edgemin.data import corpus as corpus_module
from edgemin.data import tokens
from edgemin.data.corpus import Corpus
from edgemin.data.mixture import read_corpus
from edgemin.data.packing import CorpusBatches
from edgemin.errors import UserError

Batch = dict[str, Tensor]
LENGTH = 16


def documents(count: int, seed: int = 0, longest: int = 40) -> list[str]:
    generator = np.random.default_rng(seed)
    words = toy.vocabulary()[4:]
    return [" ".join(generator.choice(words, size=generator.integers(1, longest))) for _ in range(count)]


DOCUMENTS = documents(23)


def batches(path: Path, steps: int = 9, corpus: dict[str, str] | None = None, **changes: Any) -> CorpusBatches:
    settings: dict[str, Any] = {"batch_size": 4, "seed": 3, "shuffle_window": 3, **changes}
    return CorpusBatches(Corpus(str(path), length=LENGTH, **(corpus or {})), toy.tokenizer(), steps=steps, **settings)


def refused(corpus: Corpus) -> str:
    with pytest.raises(UserError) as caught:
        list(CorpusBatches(dataclasses.replace(corpus, length=LENGTH), toy.tokenizer(), 2, 0, 1))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(one, other, strict=True)
    )


def packed(texts: list[str], steps: int, size: int = 4, window: int = 3, seed: int = 3) -> Iterator[list[list[int]]]:
    """The reference: all documents at once, joined, cut, framed and shuffled."""
    tokenizer = toy.tokenizer()
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    stream = cycle(list(chain.from_iterable([*document, sep] for document in ids if document)))
    for number in range(-(-steps // window)):
        sequences = [[cls, *islice(stream, LENGTH - 2), sep] for _ in range(window * size)]
        order = np.random.default_rng((seed, number)).permutation(len(sequences))
        for step in range(window):
            if number * window + step < steps:
                yield [sequences[row] for row in order[step * size : (step + 1) * size]]


def text(rows: list[str]) -> bytes:
    return "\n".join(rows).encode()


def lines(rows: list[str]) -> bytes:
    return "\n".join(json.dumps({"id": i, "text": row}) for i, row in enumerate(rows)).encode()


def cells(rows: list[str], separator: str) -> bytes:
    return "\n".join([f"id{separator}text", *(f'{i}{separator}"{row}"' for i, row in enumerate(rows))]).encode()


def parquet(rows: list[str]) -> bytes:
    file = io.BytesIO()
    columns = {"id": list(range(len(rows))), "text": rows}
    datasets.Dataset.from_dict(columns).to_parquet(file, batch_size=5)  # several row groups
    return file.getvalue()


FORMATS: dict[str, Callable[[list[str]], bytes]] = {
    "txt": text,
    "jsonl": lines,
    "json": lambda rows: json.dumps([{"text": row} for row in rows]).encode(),
    "csv": lambda rows: cells(rows, ","),
    "tsv": lambda rows: cells(rows, "\t"),
    "parquet": parquet,
    "txt.gz": lambda rows: gzip.compress(text(rows)),
    "jsonl.gz": lambda rows: gzip.compress(lines(rows)),
    "csv.gz": lambda rows: gzip.compress(cells(rows, ",")),
}


def write(directory: Path, suffix: str = "txt", texts: list[str] = DOCUMENTS) -> Path:
    """Three files in a directory, the last one below another."""
    (directory / "more").mkdir(parents=True)
    third = len(texts) // 3
    parts = {"a": texts[:third], "b": texts[third : 2 * third], "more/c": texts[2 * third :]}
    for name, part in parts.items():
        (directory / f"{name}.{suffix}").write_bytes(FORMATS[suffix](part))
    return directory


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


# --- packing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
def test_batches_are_those_of_a_naive_packer_over_several_epochs(tmp_path: Path, suffix: str) -> None:
    found = list(batches(write(tmp_path / "texts", suffix), steps=25))
    epoch = sum(len(document.split()) + 1 for document in DOCUMENTS)
    assert 2 * epoch < 25 * 4 * (LENGTH - 2)
    assert [batch["input_ids"].tolist() for batch in found] == list(packed(DOCUMENTS, 25))


def test_small_chunks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "texts")
    whole = list(batches(path))
    monkeypatch.setattr(tokens, "_ROWS", 2)
    monkeypatch.setattr(tokens, "_CHARACTERS", 100)
    assert same(list(batches(path)), whole)


def test_sequences_are_full_framed_and_without_padding(tmp_path: Path) -> None:
    tokenizer = toy.tokenizer()
    for batch in batches(write(tmp_path / "texts")):
        assert batch.keys() == {"input_ids", "attention_mask", "token_type_ids"}
        assert all(value.shape == (4, LENGTH) and value.dtype == torch.int64 for value in batch.values())
        assert (batch["input_ids"][:, 0] == tokenizer.cls_token_id).all()
        assert (batch["input_ids"][:, -1] == tokenizer.sep_token_id).all()
        assert (batch["input_ids"] != tokenizer.pad_token_id).all()
        assert batch["attention_mask"].all() and not batch["token_type_ids"].any()


def test_token_types_come_only_where_the_tokenizer_makes_them(tmp_path: Path) -> None:
    tokenizer = toy.tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    corpus = Corpus(str(write(tmp_path / "texts")), length=LENGTH)
    assert next(iter(CorpusBatches(corpus, tokenizer, 4, 0, 1))).keys() == {"input_ids", "attention_mask"}


def test_the_tokenizer_is_left_as_it_was(tmp_path: Path) -> None:
    tokenizer = toy.tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(5)
    before = tokenizer.backend_tokenizer.to_str()
    corpus = Corpus(str(write(tmp_path / "texts")), length=LENGTH)
    (batch,) = CorpusBatches(corpus, tokenizer, 4, 3, 1, shuffle_window=3)
    assert tokenizer.backend_tokenizer.to_str() == before
    assert batch["input_ids"].tolist() == next(packed(DOCUMENTS, 1))


def test_a_long_document_goes_on_and_an_epoch_ends_inside_a_sequence(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("good " * 20 + "\nbad\n")  # 23 tokens with separators
    vocabulary, sep = toy.tokenizer().get_vocab(), toy.tokenizer().sep_token_id
    one_epoch = [*[vocabulary["good"]] * 20, sep, vocabulary["bad"], sep]
    rows = [row for batch in batches(tmp_path, steps=3, shuffle_window=1, batch_size=1) for row in batch["input_ids"]]
    assert [token for row in rows for token in row[1:-1].tolist()] == (one_epoch * 2)[: 3 * (LENGTH - 2)]


def test_the_order_follows_the_seed_and_stays_inside_windows(tmp_path: Path) -> None:
    path = write(tmp_path / "texts")
    one, other = list(batches(path)), list(batches(path, seed=4))
    assert same(one, list(batches(path))) and not same(one, other)
    for begin in range(0, 9, 3):
        windows = [torch.cat([b["input_ids"] for b in run[begin : begin + 3]]).tolist() for run in (one, other)]
        assert sorted(windows[0]) == sorted(windows[1])


def test_how_many_steps_there_are_does_not_change_the_first(tmp_path: Path) -> None:
    path = write(tmp_path / "texts")
    assert len(batches(path, steps=7)) == 7 and list(batches(path, steps=0)) == []
    assert same(list(batches(path, steps=7)), list(batches(path, steps=9))[:7])


def test_a_file_or_the_files_called_after_the_split_can_be_the_corpus(tmp_path: Path) -> None:
    path = write(tmp_path / "texts", texts=documents(9, seed=1))
    (path / "train.txt").write_bytes(text(DOCUMENTS))
    (path / "valid-00000-of-00002.txt").write_bytes(text(DOCUMENTS[:9]))
    (path / "valid-00001-of-00002.txt").write_bytes(text(DOCUMENTS[9:]))
    expected = list(packed(DOCUMENTS, 9))
    for found in (batches(path), batches(path / "train.txt"), batches(path, corpus={"split": "valid"})):
        assert [batch["input_ids"].tolist() for batch in found] == expected


def test_names_with_wildcards_hidden_and_empty_files_are_no_trouble(tmp_path: Path) -> None:
    path = write(tmp_path / ".kept" / "te[x]ts*", "jsonl")
    (path / ".cache").mkdir()
    for name in (".cache/d.jsonl", ".e.jsonl"):
        (path / name).write_bytes(lines(["good"] * 9))
    for name in ("0.jsonl", "notes.md"):
        (path / name).touch()
    assert [batch["input_ids"].tolist() for batch in batches(path)] == list(packed(DOCUMENTS, 9))


def test_cells_of_a_table_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,n\nNA,1\n01,2\n"good\nbad, good",3\n')
    rows = Corpus(str(tmp_path)).open()
    assert list(rows) == [{"text": "NA"}, {"text": "01"}, {"text": "good\nbad, good"}]


def hub_layout(directory: Path) -> Path:
    """A data set as the Hub has it: two subsets, one with two splits."""
    card = ["---", "configs:"]
    for subset, split, texts in (
        ("large", "train", DOCUMENTS),
        ("large", "test", DOCUMENTS[5:]),
        ("small", "train", DOCUMENTS[:5]),
    ):
        file = directory / subset / f"{split}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(parquet(texts))
        entry = [f"  - split: {split}", f"    path: {subset}/{split}.parquet"]
        card += entry if split == "test" else [f"- config_name: {subset}", "  data_files:", *entry]
    (directory / "README.md").write_text("\n".join([*card, "---", ""]))
    return directory


def test_a_directory_laid_out_like_the_hub_has_subsets_and_splits(tmp_path: Path) -> None:
    path = hub_layout(tmp_path / "texts")
    for subset, split, texts in (
        ("small", "train", DOCUMENTS[:5]),
        ("large", "train", DOCUMENTS),
        ("large", "test", DOCUMENTS[5:]),
    ):
        found = batches(path, corpus={"subset": subset, "split": split})
        assert [batch["input_ids"].tolist() for batch in found] == list(packed(texts, 9)), (subset, split)
    assert "corpus_subset: expected one of large, small, given null" in refused(Corpus(str(path)))
    assert "corpus_subset: expected one of large, small, given tiny" in refused(Corpus(str(path), subset="tiny"))
    message = refused(Corpus(str(path), subset="large", split="dev"))
    assert re.match(r"corpus_split: expected a split of .*texts \(train, test\), given dev$", message)


# --- resuming ---------------------------------------------------------------------------------------------


def kept(state: dict[str, Any]) -> dict[str, Any]:
    """A state as it comes back out of a checkpoint."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert isinstance(loaded, dict)
    return loaded


@pytest.mark.parametrize("suffix", ["txt", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_a_resumed_fit_sees_the_batches_of_an_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, ahead: int
) -> None:
    monkeypatch.setattr(tokens, "_ROWS", 3)
    monkeypatch.setattr(tokens, "_CHARACTERS", 300)
    path = write(tmp_path / "texts", suffix)
    whole = list(batches(path, steps=25))
    drawn, states = batches(path, steps=25), []
    for _ in drawn:
        states.append(kept(drawn.state_dict()))
    assert max(mark["place"]["places"][0]["epoch"] for mark in states[-1]["marks"]) >= 2, "crosses epochs"
    for start in (1, 2, 3, 4, 11, 12, 21):
        resumed = batches(path, steps=25, start=start)
        resumed.load_state_dict(states[start - 1 + ahead])
        assert same(list(resumed), whole[start:]), start


def test_a_fit_can_be_broken_off_and_resumed_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_ROWS", 2)
    monkeypatch.setattr(tokens, "_CHARACTERS", 100)
    path, found, state = write(tmp_path / "texts"), [], None
    for start in range(0, 24, 2):
        part = batches(path, steps=24, start=start)
        if state is not None:
            part.load_state_dict(state)
            assert kept(part.state_dict()) is not None, "before the first batch, too"
        found += list(islice(part, 2))
        state = kept(part.state_dict())
    assert same(found, list(batches(path, steps=24)))


def test_a_place_spares_reading_what_lies_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_ROWS", 3)
    monkeypatch.setattr(tokens, "_CHARACTERS", 300)
    path = write(tmp_path / "texts")
    seen: list[str] = []
    read = tokens.Tokens._text
    monkeypatch.setattr(tokens.Tokens, "_text", lambda self, row, value: seen.append(value) or read(self, row, value))
    unbroken = batches(path, steps=25)
    whole = list(unbroken)
    everything = len(seen)
    resumed = batches(path, steps=25, start=24)
    resumed.load_state_dict(unbroken.state_dict())
    seen.clear()
    assert same(list(resumed), whole[24:])
    assert 0 < len(seen) < everything / 4


@pytest.mark.parametrize("state_at", [None, 20])
def test_without_a_place_to_go_back_to_the_corpus_is_read_from_its_beginning(
    tmp_path: Path, state_at: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "texts")
    resumed = batches(path, steps=25, start=5)
    if state_at is not None:  # all that is known lies behind the start
        late = batches(path, steps=25)
        for _ in islice(late, state_at):
            pass
        resumed.load_state_dict(late.state_dict())
    assert same(list(resumed), list(batches(path, steps=25))[5:])
    assert "corpus: no place was kept" in caplog.text


def test_a_place_of_other_windows_is_not_mistaken_for_its_own(tmp_path: Path) -> None:
    path = write(tmp_path / "texts")
    first = batches(path)
    next(iter(first))
    with pytest.raises(AssertionError, match="other windows"):
        batches(path, batch_size=2).load_state_dict(first.state_dict())


# --- a stream that breaks ---------------------------------------------------------------------------------


class Breaking:
    """A stream that breaks off before some of its rows, so many times each."""

    def __init__(self, rows: datasets.IterableDataset, breaks: dict[int, int], error: Exception) -> None:
        self.rows, self.breaks, self.error = rows, breaks, error
        self.num_shards = rows.num_shards

    def shard(self, count: int, index: int) -> Breaking:
        return Breaking(self.rows.shard(count, index), self.breaks, self.error)

    def iter(self, size: int) -> Iterator[dict[str, list[str]]]:
        for batch in self.rows.iter(size):  # what of it was read before the break is lost
            for number in map(DOCUMENTS.index, batch["text"]):
                if self.breaks.get(number, 0):
                    self.breaks[number] -= 1
                    raise self.error
            yield batch


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, int], Exception], list[float]]:
    def install(breaks: dict[int, int], error: Exception) -> list[float]:
        pauses: list[float] = []
        whole = Corpus.open
        monkeypatch.setattr(tokens, "_ROWS", 3)
        monkeypatch.setattr(tokens.time, "sleep", pauses.append)
        monkeypatch.setattr(Corpus, "open", lambda self: Breaking(whole(self), breaks, error))
        return pauses

    return install


@pytest.mark.parametrize(
    ("suffix", "error"),
    [
        ("txt", ConnectionError("reset by peer")),
        ("json", TimeoutError()),
        ("parquet", corpus_module.HTTPError("peer closed")),
    ],
)
def test_a_broken_stream_goes_on_where_it_stood(
    tmp_path: Path,
    breaking: Callable[..., list[float]],
    suffix: str,
    error: Exception,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = write(tmp_path / "texts", suffix)
    whole = list(batches(path, steps=25))
    pauses = breaking({0: 1, 8: 3, 12: 1, 16: 2, 22: 1}, error)
    assert same(list(batches(path, steps=25)), whole)
    assert pauses == [1, 1, 4, 16, 1, 1, 4, 1]
    assert f"corpus: the stream broke ({str(error) or 'TimeoutError'}), next try in 16 s" in caplog.text


def test_a_stream_that_stays_broken_is_one_line_and_the_run_can_go_on_later(
    tmp_path: Path, breaking: Callable[..., list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "texts")
    whole = list(batches(path, steps=25, shuffle_window=1))
    breaks = {13: 4}
    pauses = breaking(breaks, ConnectionError("reset\nby peer"))
    monkeypatch.setattr(tokens, "_CHARACTERS", 300)
    first, found = batches(path, steps=25, shuffle_window=1), []
    with pytest.raises(UserError) as caught:
        for batch in first:
            found.append(batch)
    assert str(caught.value) == (
        "corpus: the stream broke after 13 documents of epoch 1 (reset by peer); "
        "run again to go on from the last checkpoint"
    )
    assert pauses == [1, 4, 16] and 0 < len(found) < 25
    resumed = batches(path, steps=25, shuffle_window=1, start=len(found))
    resumed.load_state_dict(kept(first.state_dict()))
    assert same(found + list(resumed), whole)


# --- several processes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3, 6])
def test_processes_share_every_batch_and_their_number_changes_nothing(tmp_path: Path, world: int) -> None:
    path = write(tmp_path / "texts")
    whole = list(batches(path))
    ranks = [list(batches(path, rank=rank, world=world)) for rank in range(world)]
    for step, batch in enumerate(whole):
        assert "share" not in batch
        ids = batch["input_ids"]
        for rank in range(world):
            part = ranks[rank][step]
            expected = ids[rank::world] if rank < 4 else ids[:1]
            assert torch.equal(part["input_ids"], expected)
            assert part["share"].ndim == 0 and part["share"].dtype == torch.float32
            assert part["share"].item() == pytest.approx(len(ids[rank::world]) * world / 4)
        mean = sum(part[step]["share"] * part[step]["input_ids"].double().mean() for part in ranks) / world
        assert mean.item() == pytest.approx(ids.double().mean().item())


def test_a_run_on_one_process_can_be_resumed_on_two(tmp_path: Path) -> None:
    path = write(tmp_path / "texts")
    one = batches(path)
    whole = list(one)
    other = batches(path, start=7, rank=1, world=2)
    other.load_state_dict(one.state_dict())
    assert torch.equal(next(iter(other))["input_ids"], whole[7]["input_ids"][1::2])


# --- empty documents --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv", "parquet"])
def test_empty_documents_are_skipped_counted_and_told_once(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    blanks = ["", " ", "\t ", "\u00a0"]
    path = write(tmp_path / "texts", suffix, [blanks[i % 4] if i % 5 == 2 else t for i, t in enumerate(DOCUMENTS)])
    full = [t for i, t in enumerate(DOCUMENTS) if i % 5 != 2]
    found = batches(path, steps=25, shuffle_window=25)
    with caplog.at_level(logging.WARNING):
        assert [b["input_ids"].tolist() for b in found] == list(packed(full, 25, window=25))
    epochs = 25 * 4 * (LENGTH - 2) / sum(len(document.split()) + 1 for document in full)
    assert found.skipped == 5 * int(np.ceil(epochs))
    assert [record.getMessage() for record in caplog.records] == ["corpus: 5 of 23 documents are empty and skipped"]


@pytest.mark.parametrize(
    "files",
    [
        {"a.jsonl": '{"text": "good", "n": 1}\n', "b.jsonl": '{"id": "q", "text": "bad"}\n'},
        {"a.jsonl": '{"text": "good", "n": 1}\n', "b.jsonl": '{"text": "bad", "n": "x"}\n'},
        {"a.jsonl": '{"text": null}\n', "b.jsonl": '{"text": "good"}\n{"text": "bad"}\n'},
        {"a.jsonl": '{"text": "good"}\n{"text": "bad"}\n', "b.jsonl": '{"content": "ugly"}\n'},
        {"a.parquet": {"text": ["good"], "n": [1]}, "b.parquet": {"text": ["bad"], "id": ["x"]}},
    ],
    ids=["other columns", "other types", "null first", "no text", "parquet"],
)
def test_columns_that_are_not_read_may_differ_from_file_to_file(files: dict[str, Any], tmp_path: Path) -> None:
    for name, content in files.items():
        if isinstance(content, str):
            (tmp_path / name).write_text(content)
        else:
            datasets.Dataset.from_dict(content).to_parquet(tmp_path / name)
    found = tokens.Tokens(Corpus(str(tmp_path)), toy.tokenizer())
    good, bad, separator = toy.tokenizer().convert_tokens_to_ids(["good", "bad", "[SEP]"])
    assert np.concatenate(list(found.once())).tolist() == [good, separator, bad, separator]


def test_missing_texts_count_as_empty(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": null}\n{"id": 1}\n')
    found = batches(tmp_path, steps=1, batch_size=1, shuffle_window=1)
    assert len(list(found)) == 1 and found.skipped == 2 * -(-(LENGTH - 2) // 2)


@pytest.mark.parametrize(
    ("name", "content", "given"),
    [
        ("a.txt", b"\n \n\n", "given 3 empty ones"),
        ("a.jsonl", lines(["", " "]), "given 2 empty ones"),
        ("a.csv", b"text\n", "given none"),
        ("a.json", b"[]", "given none"),
        ("a.parquet", parquet([]), "given none"),
    ],
)
def test_a_corpus_without_text_is_refused(tmp_path: Path, name: str, content: bytes, given: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert refused(Corpus(str(tmp_path))) == f"corpus: expected documents with text in {tmp_path}, {given}"


# --- what decides the content -----------------------------------------------------------------------------


def test_the_fingerprint_follows_the_content_and_no_path(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one"), write(tmp_path / "other")
    base = Corpus(str(one)).fingerprint()
    assert Corpus(str(other), length=64).fingerprint() == base and json.loads(json.dumps(base)) == base
    (other / "a.txt").rename(other / "aa.txt")
    assert Corpus(str(other)).fingerprint() == base
    (other / "aa.txt").rename(other / "z.txt")
    assert Corpus(str(other)).fingerprint() != base, "another order"
    (one / "b.txt").write_text("something else")
    assert Corpus(str(one)).fingerprint() != base
    assert str(tmp_path) not in str(base)


def test_the_fingerprint_tells_formats_and_splits_apart(tmp_path: Path) -> None:
    content = b'"good", "bad"\n"bad", "good"\n'
    for name in ("a.txt", "a.csv", "a.tsv"):
        (tmp_path / name).write_bytes(content)
    prints = [Corpus(str(tmp_path / name)).fingerprint() for name in ("a.txt", "a.csv", "a.tsv")]
    path = hub_layout(tmp_path / "texts")
    parts = [("small", "train"), ("large", "train"), ("large", "test")]
    prints += [Corpus(str(path), subset=subset, split=split).fingerprint() for subset, split in parts]
    assert len({json.dumps(print, sort_keys=True) for print in prints}) == 6


def test_the_fingerprint_of_a_hub_data_set_is_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, load = hub_layout(tmp_path / "texts"), datasets.load_dataset_builder
    asked: list[str] = []

    def builder(name: str, subset: str | None) -> datasets.DatasetBuilder:
        asked.append(name)
        found = load(str(path), subset)
        found.hash = "5" * 40  # on the Hub it is the commit
        return found

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    corpus = Corpus("someone/resolved", subset="large", split="test")
    assert corpus.fingerprint() == {"id": "someone/resolved", "commit": "5" * 40, "subset": "large", "split": "test"}
    corpus = dataclasses.replace(corpus, length=LENGTH)
    found = CorpusBatches(corpus, toy.tokenizer(), 4, 3, 9, shuffle_window=3)
    assert [batch["input_ids"].tolist() for batch in found] == list(packed(DOCUMENTS[5:], 9))
    assert asked == ["someone/resolved"], "resolved once, so that all files are of one commit"


def test_offline_the_copy_in_the_cache_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "7" * 40
    home = tmp_path / "datasets--someone--copied"
    hub_layout(home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    corpus = Corpus("someone/copied", subset="small", length=LENGTH)
    assert corpus.fingerprint() == {"id": "someone/copied", "commit": commit, "subset": "small", "split": "train"}
    found = CorpusBatches(corpus, toy.tokenizer(), 4, 3, 9, shuffle_window=3)
    assert [batch["input_ids"].tolist() for batch in found] == list(packed(DOCUMENTS[:5], 9))
    message = refused(Corpus("someone/unknown"))
    assert message.startswith("corpus: expected an existing directory or file, or a data set that is cached or can be")


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("path", ""),
        ("path", None),
        ("subset", " "),
        ("split", "train[:10%]"),
        ("split", ""),
        ("column", 3),
        ("length", 7),
        ("length", 16.0),
        ("length", True),
    ],
)
def test_a_setting_out_of_range_is_refused_by_its_name(key: str, value: Any) -> None:
    name = "corpus" if key == "path" else f"corpus_{key}"
    with pytest.raises(UserError, match=rf"^{name}: expected .*, given [^\n]*$"):
        Corpus(**{"path": "some/texts", key: value})


def test_sequences_longer_than_the_tokenizer_allows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^corpus_length: expected at most the tokenizer's 128 tokens, given 512$"):
        CorpusBatches(Corpus(str(tmp_path)), toy.tokenizer(), 4, 0, 1)


def test_a_tokenizer_without_a_separator_is_refused(tmp_path: Path) -> None:
    tokenizer = toy.tokenizer()
    tokenizer.sep_token = None
    with pytest.raises(UserError, match=r"^source: expected a tokenizer with"):
        list(CorpusBatches(Corpus(str(write(tmp_path / "texts")), length=LENGTH), tokenizer, 4, 0, 1))


@pytest.mark.parametrize(
    ("files", "changes", "message"),
    [
        (
            {},
            {},
            "corpus: expected text in {path} (.txt, .jsonl, .json, .csv, .tsv, .parquet; or .gz of them), given no",
        ),
        ({"a.md": b"x", "b.txt": b""}, {}, "given a.md, b.txt (empty)"),
        ({"a.parquet.gz": b"x"}, {}, "given a.parquet.gz"),
        ({"a.txt": b"x", "b.jsonl": b"{}"}, {}, "corpus: expected files of one format in {path}, given a.txt, b.jsonl"),
        ({"a.txt": b"good"}, {"column": "body"}, "corpus_column: expected a column of {path} (text), given body"),
        ({"a.jsonl": lines(["good"])}, {"column": "body"}, "expected a column of {path} (id, text), given body"),
        ({"a.json": b'[{"text": "good"}]'}, {"column": "body"}, "expected a column of {path} (text), given body"),
        ({"a.csv": b"id,text\n1,good\n"}, {"column": "body"}, "expected a column of {path} (id, text), given body"),
        ({"a.parquet": parquet(["good"])}, {"column": "body"}, "expected a column of {path} (id, text), given body"),
        (
            {"a.jsonl": lines(["good"])},
            {"column": "id"},
            "corpus_column: expected texts in id of {path}, given a int in document 1",
        ),
        ({"a.jsonl": b'{"text": "good"}\n{"text": ["bad"]}'}, {}, "given a list in document 2"),
        ({"a.txt": b"good\n\xff\n"}, {}, "corpus: expected a data set that can be read, given {path} ("),
        (
            {"a.txt": b"good\n", "b.txt": b"\xff"},
            {},
            "corpus: expected readable files (text in UTF-8), given {path}, damaged after document 1 (",
        ),
        ({"a.jsonl": b"{"}, {}, "corpus: expected "),
        ({"a.parquet": b"no parquet"}, {}, "corpus: expected a data set that can be read, given {path} ("),
        ({"a.txt.gz": b"no gzip"}, {}, "corpus: expected a data set that can be read, given {path} ("),
        (
            {"a.txt": b"good"},
            {"split": "test"},
            "corpus_split: expected train, or files called test in {path}, given test",
        ),
        ({"a.txt": b"good"}, {"subset": "en"}, "corpus_subset: expected one of default, given en"),
    ],
)
def test_bad_corpora_are_refused_in_one_line(
    tmp_path: Path, files: dict[str, bytes], changes: dict[str, Any], message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    found = refused(Corpus(str(tmp_path), **changes))
    assert message.format(path=tmp_path) in found and found.startswith("corpus")


def test_what_is_no_path_and_no_hub_id_is_refused(tmp_path: Path) -> None:
    for path in (str(tmp_path / "nothing"), "a/b/c", "some texts"):
        assert refused(Corpus(path)).startswith("corpus: expected an existing directory or file, or a Hub id, given ")
    (tmp_path / "a.txt").write_text("good")
    assert refused(Corpus(str(tmp_path / "a.txt"), subset="en")) == "corpus_subset: expected null for a file, given en"


# --- several corpora --------------------------------------------------------------------------------------


def two(folder: Path) -> list[str]:
    """Two files whose tokens tell them apart, the second much shorter."""
    folder.mkdir()
    for name, word, count in (("long", "good", 400), ("short", "bad", 7)):
        (folder / f"{name}.txt").write_text("\n".join(f"{word} {word}" for _ in range(count)))
    return [str(folder / "long.txt"), str(folder / "short.txt")]


def mixed(paths: list[str], weights: list[float] | None = None, steps: int = 25, **changes: Any) -> CorpusBatches:
    settings: dict[str, Any] = {"batch_size": 4, "seed": 3, "shuffle_window": 3, **changes}
    corpus = read_corpus(paths, weights, LENGTH, subset=None, split="train", column="text")
    return CorpusBatches(corpus, toy.tokenizer(), steps=steps, **settings)


def sources(found: list[Batch]) -> list[str]:
    """Of which file each sequence is; each is of one alone."""
    words = {name: toy.tokenizer().convert_tokens_to_ids(name) for name in ("good", "bad")}
    rows = [row for batch in found for row in batch["input_ids"].tolist()]
    of = [[name for name, index in words.items() if index in row] for row in rows]
    assert all(len(names) == 1 for names in of)
    return [names[0] for names in of]


@pytest.mark.parametrize(("weights", "share"), [(None, 0.5), ([3, 1], 0.75), ([0.2, 0.8], 0.2), ([2.5, 1e-3], 1.0)])
def test_sequences_of_several_corpora_come_in_their_shares(
    weights: list[float] | None, share: float, tmp_path: Path
) -> None:
    found = sources(list(mixed(two(tmp_path / "texts"), weights, steps=30)))  # ten windows of 12 sequences
    for end in range(12, 121, 12):
        assert abs(found[:end].count("good") - share * end) <= 1, end
    assert len({tuple(found[start : start + 12]) for start in range(0, 120, 12)}) > 1 or share == 1, "shuffled"


def test_each_of_several_corpora_is_packed_as_it_is_alone(tmp_path: Path) -> None:
    paths = two(tmp_path / "texts")

    def alone(batches: CorpusBatches) -> list[list[int]]:
        return sorted(row for batch in batches for row in batch["input_ids"].tolist())

    both = alone(mixed(paths, [1, 1], steps=6))  # two windows: 12 sequences of each
    assert both == sorted(row for path in paths for row in alone(mixed([path], steps=3)))


def test_of_one_corpus_a_list_is_that_corpus(tmp_path: Path) -> None:
    path = two(tmp_path / "texts")[0]
    assert same(list(mixed([path])), list(batches(Path(path), steps=25)))
    assert read_corpus(path, None, 64) == read_corpus([path], None, 64) == Corpus(path, length=64)


@pytest.mark.parametrize("start", [1, 3, 4, 11, 12, 21])
def test_a_mixture_is_resumed_where_each_corpus_stood(
    start: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_ROWS", 3)
    monkeypatch.setattr(tokens, "_CHARACTERS", 100)
    paths = two(tmp_path / "texts")
    drawn, states = mixed(paths, [2, 1]), []
    whole = [(batch, states.append(kept(drawn.state_dict())))[0] for batch in drawn]
    resumed = mixed(paths, [2, 1], start=start)
    resumed.load_state_dict(states[start - 1])
    assert same(list(resumed), whole[start:])
    parts = [list(mixed(paths, [2, 1], rank=rank, world=2)) for rank in range(2)]
    rows = [torch.cat([part[step]["input_ids"] for part in parts]).tolist() for step in range(25)]
    assert [sorted(found) for found in rows] == [sorted(batch["input_ids"].tolist()) for batch in whole]


def test_the_fingerprint_of_several_follows_each_and_the_shares(tmp_path: Path) -> None:
    paths = two(tmp_path / "texts")

    def of(paths: list[str], weights: list[float] | None) -> str:
        return json.dumps(read_corpus(paths, weights, LENGTH).fingerprint())

    assert of(paths, None) == of(paths, [2, 2]) and of(paths, None) != of(paths, [2, 1])
    assert len({of(paths, [2, 1]), of(paths[::-1], [2, 1]), of(paths[:1], None)}) == 3


@pytest.mark.parametrize(
    ("count", "settings", "message"),
    [
        (2, {"weights": [1]}, "corpus_weights: expected 2 numbers above 0, one for each corpus, given [1]"),
        (2, {"weights": [1, 0]}, "corpus_weights: expected 2 numbers above 0, one for each corpus, given [1, 0]"),
        (2, {"weights": [1, float("inf")]}, "corpus_weights: expected 2 numbers above 0, one for each corpus, given"),
        (1, {"weights": [1]}, "corpus_weights: expected null for one corpus, given [1]"),
        (2, {"subset": ["a"]}, "corpus_subset: expected one for all, or a list of 2, one for each corpus, given ['a']"),
        (0, {}, "corpus: expected null or at least one, given []"),
    ],
)
def test_settings_that_are_not_one_for_each_corpus_are_one_line(
    count: int, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        read_corpus(two(tmp_path / "texts")[:count], settings.pop("weights", None), LENGTH, **settings)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_one_of_several_that_is_not_there_is_refused(tmp_path: Path) -> None:
    corpus = read_corpus([two(tmp_path / "texts")[0], str(tmp_path / "nosuch")], None, LENGTH)
    with pytest.raises(UserError, match=r"^corpus: expected an existing directory or file[^\n]*nosuch"):
        corpus.open()
