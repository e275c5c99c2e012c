"""Tasks are read, checked, tokenized and batched as their yaml files say."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny

from edgemin import config
from edgemin.data import loading
from edgemin.data.examples import Examples
from edgemin.data.splits import load
from edgemin.data.task import Task
from edgemin.errors import UserError

GLUE = Path(os.environ.get("EDGEMIN_GLUE", Path(__file__).parents[3] / "shared" / "glue"))

Rows = list[dict[str, Any]]


def reviews(count: int) -> Rows:
    return [{"text": f"review number {i}", "label": ("bad", "good")[i % 3 == 0]} for i in range(count)]


def write(directory: Path, **splits: Rows) -> Path:
    for split, rows in splits.items():
        lines = "\n".join(json.dumps(row) for row in rows)
        (directory / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return directory


def own(path: Path | str | None, **changes: Any) -> Task:
    settings = {"text_columns": ["text"], "evaluation_splits": ["validation"], **changes}
    return Task(name="custom", path=None if path is None else str(path), **settings)


def refused(task: Task) -> str:
    with pytest.raises(UserError) as caught:
        load(task)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- own data ---------------------------------------------------------------------------------------------


def as_csv(path: Path, rows: Rows, delimiter: str) -> None:
    lines = [delimiter.join(rows[0])] + [delimiter.join(f'"{value}"' for value in row.values()) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


WRITERS = {
    "csv": lambda path, rows: as_csv(path, rows, ","),
    "tsv": lambda path, rows: as_csv(path, rows, "\t"),
    "json": lambda path, rows: path.write_text(json.dumps(rows)),
    "jsonl": lambda path, rows: path.write_text("\n".join(map(json.dumps, rows))),
    "parquet": lambda path, rows: datasets.Dataset.from_list(rows).to_parquet(path),
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_examples(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": "café, 'crème'", "label": "good"}, *reviews(5)]
    WRITERS[suffix](tmp_path / f"train.{suffix}", rows)
    write(tmp_path, validation=rows)
    splits = load(own(tmp_path))
    assert splits.labels == ("bad", "good")
    assert splits.train.texts == [(row["text"],) for row in rows]
    assert splits.train.labels.tolist() == [1, 1, 0, 0, 1, 0]
    assert splits.fingerprint("train") == splits.fingerprint("validation")


def test_csv_cells_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text('text,label\nNA,01\nnull,1\n"two\nlines",01\n', encoding="utf-8")
    write(tmp_path, validation=[{"text": "x", "label": "1"}])
    splits = load(own(tmp_path))
    assert splits.train.texts == [("NA",), ("null",), ("two\nlines",)]
    assert splits.labels == ("01", "1")


def test_one_file_holds_all_splits_in_a_column(tmp_path: Path) -> None:
    rows = [{**row, "split": "train" if i < 6 else "validation"} for i, row in enumerate(reviews(9))]
    path = tmp_path / "all.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    splits = load(own(path))
    assert (len(splits.train), len(splits.evaluation["validation"])) == (6, 3)


def test_pairs_keep_both_texts(tmp_path: Path) -> None:
    rows = [{"a": "one", "b": "two", "label": i} for i in (0, 1)]
    splits = load(own(write(tmp_path, train=rows, validation=rows), text_columns=["a", "b"]))
    assert splits.train.texts == [("one", "two")] * 2


@pytest.mark.parametrize(
    ("values", "names"),
    [([10, 2, 1], ("1", "2", "10")), (["b", "a", "c"], ("a", "b", "c")), ([1.0, 0.0, 1.0], ("0", "1"))],
)
def test_labels_not_given_are_found_in_train_and_sorted(
    tmp_path: Path, values: list[Any], names: tuple[str, ...]
) -> None:
    rows = [{"text": "x", "label": value} for value in values]
    splits = load(own(write(tmp_path, train=rows, validation=rows)))
    assert splits.labels == names
    expected = [names.index(str(int(v)) if not isinstance(v, str) else v) for v in values]
    assert splits.train.labels.tolist() == expected


def test_the_order_of_task_labels_decides_the_indices(tmp_path: Path) -> None:
    path = write(tmp_path, train=reviews(6), validation=reviews(6))
    one, other = load(own(path, labels=["bad", "good"])), load(own(path, labels=["good", "bad"]))
    assert (one.train.labels == 1 - other.train.labels).all()
    assert one.fingerprint("train") != other.fingerprint("train")


def test_fractions_can_be_classes_if_they_are_listed_and_belong_to_names(tmp_path: Path) -> None:
    rows = [{"text": "x", "label": value} for value in (0.5, 1, 1.5)]
    path = write(tmp_path, train=rows, validation=rows)
    assert load(own(path, labels=["0.5", 1, 1.5])).train.labels.tolist() == [0, 1, 2]
    rows = [{"text": "x", "label": value} for value in ("2.5", "beta", "3")]
    assert load(own(write(tmp_path, train=rows, validation=rows))).labels == ("3", "2.5", "beta")


@pytest.mark.parametrize(("kind", "said"), [("classification", "bad"), ("regression", "3")])
def test_a_split_of_one_label_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, said: str) -> None:
    rows = [{"text": "x", "label": value} for value in ((3, 4, 3) if kind == "regression" else ("bad", "good", "bad"))]
    load(own(write(tmp_path, train=rows, validation=rows[::2]), kind=kind))
    assert f"task custom: every label of validation is {said}: no score there tells models apart" in caplog.messages


def test_minus_one_can_be_a_class_if_it_is_listed(tmp_path: Path) -> None:
    rows = [{"text": "x", "label": value} for value in (-1, 0, 1)]
    path = write(tmp_path, train=rows, validation=rows)
    assert load(own(path, labels=[-1, 0, 1])).train.labels.tolist() == [0, 1, 2]
    assert "-1 marks rows without a label" in refused(own(path))


def test_a_class_without_training_examples_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(own(write(tmp_path, train=reviews(6), validation=reviews(6)), labels=["bad", "fair", "good"]))
    assert "no training example of the class fair" in caplog.text


def test_a_regression_keeps_numbers(tmp_path: Path) -> None:
    rows = [{"text": "x", "label": value} for value in ("0.5", 3, 4.25)]
    splits = load(own(write(tmp_path, train=rows, validation=rows), kind="regression"))
    assert splits.train.labels.dtype == np.float32
    assert splits.train.labels.tolist() == [0.5, 3.0, 4.25]
    assert splits.labels == ("label",)


def test_a_tsv_that_quotes_nothing_is_read_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = ['"I loved it.\t1', 'It was great."\t0', 'a "fine" film\t1', '"so" he said\t0']
    for split in ("train", "validation"):
        (tmp_path / f"{split}.tsv").write_text("text\tlabel\n" + "\n".join(lines) + "\n")
    read = load(own(tmp_path)).train
    assert [text for (text,) in read.texts] == [line.partition("\t")[0] for line in lines]
    assert read.labels.tolist() == [1, 0, 1, 0] and "quotation marks are taken for characters" in caplog.text


def test_a_tsv_that_quotes_its_cells_may_have_breaks_in_them(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (tmp_path / f"{split}.tsv").write_text('text\tlabel\n"one\nof ""two"" lines"\t1\n"a tab\there"\t0\n')
    assert load(own(tmp_path)).train.texts == [('one\nof "two" lines',), ("a tab\there",)]


def test_a_tsv_of_one_column_may_have_breaks_in_its_cells(tmp_path: Path) -> None:
    (tmp_path / "one.tsv").write_text('text\n"one\nof two lines"\n')
    assert loading.read_file(tmp_path / "one.tsv").columns == {"text": ["one\nof two lines"]}


def test_a_missing_text_is_no_word(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text('{"text": NaN, "label": 1}\n{"text": "fine", "label": 0}\n')
    assert "1 empty in train, the first in row 1" in refused(own(tmp_path))


# --- data sets in the Hub's layout ------------------------------------------------------------------------


def hub_layout(directory: Path, labels: dict[str, list[int]], names: list[str]) -> Path:
    features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    entries = []
    (directory / "tiny").mkdir(parents=True)
    for split, values in labels.items():
        rows = {"sentence": [f"{split} {i}" for i in range(len(values))], "label": values}
        datasets.Dataset.from_dict(rows, features).to_parquet(directory / "tiny" / f"{split}.parquet")
        entries.append(f"  - {{split: {split}, path: tiny/{split}.parquet}}")
    card = ["---", "configs:", "- config_name: tiny", "  data_files:", *entries, "---", ""]
    (directory / "README.md").write_text("\n".join(card))
    return directory


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    splits = {"train": [0, 1, 1], "validation": [1, 0], "test": [-1, -1]}
    return hub_layout(tmp_path / "data", splits, ["negative", "positive"])


def hub_task(path: Path | str, **changes: Any) -> Task:
    settings = {
        "labels": ["negative", "positive"],
        "subset": "tiny",
        "evaluation_splits": ["validation"],
        **changes,
    }
    return Task(name="tiny", path=str(path), text_columns=["sentence"], **settings)


def test_class_names_of_the_data_are_matched_by_name(hub: Path) -> None:
    assert load(hub_task(hub)).train.labels.tolist() == [0, 1, 1]
    assert load(hub_task(hub, labels=["positive", "negative"])).train.labels.tolist() == [1, 0, 0]
    found = load(hub_task(hub, labels=None))
    assert found.labels == ("negative", "positive")


def test_the_folder_of_a_subset_is_read_as_own_data(hub: Path) -> None:
    whole, folder = load(hub_task(hub)), load(hub_task(hub / "tiny"))
    assert whole.fingerprint("train") == folder.fingerprint("train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subset": "large"}, "task.subset: expected one of tiny, given large"),
        ({"evaluation_splits": ["dev"]}, "task.evaluation_splits: expected splits of"),
        ({"train_split": "training"}, "task.train_split: expected splits of"),
        ({"evaluation_splits": ["test"]}, "given -1 in row 1 of test"),
        (
            {"labels": ["no", "yes"]},
            "task.labels: expected the data's class names (negative, positive), given no",
        ),
        (
            {"labels": ["a", "b", "c"]},
            "task.labels: expected the data's 2 classes (negative, positive), given 3",
        ),
        ({"labels": None, "kind": "regression"}, "task.kind: expected another kind of task, as label holds classes"),
    ],
)
def test_what_a_data_set_does_not_hold_is_refused(hub: Path, changes: dict[str, Any], message: str) -> None:
    assert message in refused(hub_task(hub, **changes))


def test_files_that_changed_are_read_anew(hub: Path) -> None:
    cached = loading._cache_directory(str(hub))
    assert load(hub_task(hub)).train.labels.tolist() == [0, 1, 1]
    assert loading._cache_directory(str(hub)) == cached, "reading changes nothing"
    shutil.rmtree(hub)
    hub_layout(hub, {"train": [1, 0, 0, 1], "validation": [1, 0]}, ["negative", "positive"])
    assert load(hub_task(hub)).train.labels.tolist() == [1, 0, 0, 1]
    assert loading._cache_directory(str(hub)) != cached
    assert loading._cache_directory("nyu-mll/glue") is None, "the Hub's have versions of their own"


def test_two_directories_of_one_name_are_two_data_sets(tmp_path: Path) -> None:
    for parent, labels in (("one", [0, 1, 1]), ("two", [1, 1, 0, 0])):
        path = hub_layout(tmp_path / parent / "data", {"train": labels, "validation": [1, 0]}, ["negative", "positive"])
        assert load(hub_task(path)).train.labels.tolist() == labels


def test_no_network_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = refused(hub_task("nyu-mll/glue"))
    assert message.startswith("task.path: ") and "task.path=<local copy>" in message


def test_reading_leaves_the_libraries_as_loud_as_they_were(hub: Path) -> None:
    before = datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    load(hub_task(hub))
    assert (datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()) == before


@pytest.mark.skipif(not (GLUE / "README.md").is_file(), reason="no local copy of GLUE")
@pytest.mark.parametrize(
    ("subset", "columns", "splits", "labels"),
    [
        ("sst2", ["sentence"], {"validation": [428, 444]}, ["negative", "positive"]),
        ("qqp", ["question1", "question2"], {"validation": [25545, 14885]}, ["not_duplicate", "duplicate"]),
        (
            "mnli",
            ["premise", "hypothesis"],
            {"validation_matched": [3479, 3123, 3213], "validation_mismatched": [3463, 3129, 3240]},
            ["entailment", "neutral", "contradiction"],
        ),
    ],
)
def test_glue_has_its_published_class_counts(
    subset: str, columns: list[str], splits: dict[str, list[int]], labels: list[str]
) -> None:
    task = Task(
        name=subset,
        path=str(GLUE),
        subset=subset,
        text_columns=columns,
        labels=labels,
        evaluation_splits=list(splits),
        max_train_examples=2000,
    )
    loaded = load(task)
    assert len(loaded.train) == 2000
    for split, counts in splits.items():
        assert np.bincount(loaded.evaluation[split].labels).tolist() == counts


# --- bad input --------------------------------------------------------------------------------------------

GOOD = reviews(6)
ONLY_BAD = [row for row in GOOD if row["label"] == "bad"]
BLANK = [{"text": " ", "label": "bad"}, {"text": None, "label": "bad"}]


@pytest.mark.parametrize(
    ("train", "changes", "message"),
    [
        (
            GOOD,
            {"text_columns": ["body"]},
            "expected columns of train (text, label), given body",
        ),
        (GOOD, {"label_column": "y"}, "label_column: expected a column of validation (text, label), given y"),
        (
            GOOD,
            {"labels": ["good", "poor"]},
            "expected labels out of good, poor, given bad in row 2",
        ),
        ([*GOOD, {"text": "x", "label": None}], {}, "given an empty label in row 7 of train"),
        ([], {}, "train_split: expected a split with examples, given train with no row"),
        ([*GOOD, *BLANK], {}, "a text in every row of text, given 2 empty in train, the first in row 7"),
        (
            [*GOOD, {"text": ["x"], "label": "bad"}],
            {},
            "expected texts in text, given a list in row 7",
        ),
        (ONLY_BAD, {"labels": ["bad", "good"]}, "at least two classes in train, given only bad"),
        (
            GOOD,
            {"kind": "regression"},
            "label_column: expected finite numbers (task.kind=regression)",
        ),
        (
            [{"text": "x", "label": label} for label in (1, 2.5, 0.5)],
            {},
            "label_column: expected classes (task.kind=regression predicts numbers; "
            "numbers that are classes are listed in task.labels), given 2.5 in train",
        ),
        (
            [*GOOD, {"text": "x", "label": 0.5}],
            {"labels": ["good", "bad"]},
            "expected labels out of good, bad (task.kind=regression predicts numbers), given 0.5 in row 7 of train",
        ),
        (GOOD, {"holdout": 0.01}, "holdout: expected a share that leaves examples on both sides of 6"),
        (GOOD, {"holdout": 0.99}, "holdout: expected a share that leaves examples on both sides of 6"),
        (GOOD, {"max_train_examples": 1}, "at least two classes in train"),
        (GOOD, {"evaluation_splits": ["dev"]}, "path: expected a file for the split 'dev'"),
        (
            GOOD,
            {"metrics": ["recall"]},
            "metrics: expected some of accuracy, f1, matthews (classification, outputs: 2)",
        ),
    ],
)
def test_bad_data_is_refused(tmp_path: Path, train: Rows, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path, train=train, validation=GOOD)
    if "label_column" in changes:  # train has what is asked for, validation has not
        write(tmp_path, train=[{**row, "y": "a"} for row in train])
    assert message in refused(own(path, **changes))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "train.csv",
            "text,label\n",
            "task.train_split: expected a split with examples, given train with no row",
        ),
        ("train.csv", "text,label\na,b,c\n", "expected 2 cells in row 1"),
        ("train.csv", "text,text\na,b\n", "task.path: expected distinct column names"),
        (
            "train.csv",
            "text;label\na;b\n",
            "expected columns separated by commas, given",
        ),
        ("train.csv", "text;label\na, b;c\n", "columns are separated by ';'"),
        (
            "train.csv",
            "text\tlabel\na\tb\n",
            "train.csv, whose columns are separated by tabs",
        ),
        (
            "train.tsv",
            "text,label\na,b\n",
            "train.tsv, whose columns are separated by commas",
        ),
        ("train.csv", b"text,label\n\xff,good\n", "task.path: expected a readable .csv file in UTF-8"),
        ("train.json", "[1, 2]", "expected an object per row"),
        ("train.jsonl", "{", "task.path: expected a readable .jsonl file"),
        ("train.parquet", "no parquet", "task.path: expected a readable .parquet file"),
        ("train.txt", "good", "task.path: expected a file for the split 'train'"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    write(tmp_path, validation=GOOD)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refused(own(tmp_path))


def test_two_files_for_one_split_are_refused(tmp_path: Path) -> None:
    write(tmp_path, train=GOOD, validation=GOOD)
    (tmp_path / "train.csv").write_text("text,label\nx,good\n")
    assert "given train.csv, train.jsonl" in refused(own(tmp_path))


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert refused(own(tmp_path / "nothing")).startswith("task.path: expected an existing directory or file")
    assert refused(own(None)).startswith("task.path: ")
    (tmp_path / "rows.txt").touch()
    assert "a file that ends in .csv" in refused(own(tmp_path / "rows.txt"))
    (write(tmp_path, train=GOOD) / "train.jsonl").rename(tmp_path / "all.jsonl")
    assert "a file with a column 'split'" in refused(own(tmp_path / "all.jsonl"))


def test_empty_texts_of_benchmarks_are_kept_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, train=[*GOOD, {"text": "", "label": "bad"}], validation=GOOD)
    with caplog.at_level(logging.WARNING):
        assert len(load(own(path, blank_texts="keep")).train) == 7
    assert "1 empty in train, the first in row 7, kept" in caplog.text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("holdout", 1.0),
        ("holdout", -0.1),
        ("holdout", "some"),
        ("holdout", float("nan")),
        ("max_train_examples", 0),
        ("max_evaluation_examples", -3),
        ("max_length", 0),
        ("max_length", "long"),
        ("seed", 1.5),
        ("labels", ["only"]),
        ("labels", ["a", "a"]),
        ("labels", [True, False]),
        ("metrics", ["bleu"]),
        ("text_columns", []),
        ("text_columns", ["a", "b", "c"]),
        ("label_column", "text"),
        ("evaluation_splits", []),
        ("evaluation_splits", ["train"]),
        ("kind", "ranking"),
        ("blank_texts", "maybe"),
        ("name", ""),
    ],
)
def test_a_setting_out_of_range_is_refused_by_its_name(key: str, value: Any) -> None:
    settings: dict[str, Any] = {
        "name": "custom",
        "text_columns": ["text"],
        "evaluation_splits": ["validation"],
    }
    settings |= {"labels": ["a", "b"], key: value}
    with pytest.raises(UserError, match=rf"^task\.{key}: expected .*, given [^\n]*$"):
        Task(**settings)


# --- hold-out and subsets ---------------------------------------------------------------------------------


def test_subsets_and_holdout_keep_the_class_balance(tmp_path: Path) -> None:
    path = write(tmp_path, train=reviews(300), validation=reviews(90))
    splits = load(own(path, max_train_examples=150, holdout=0.2, max_evaluation_examples=30))
    assert splits.holdout is not None
    counts = [np.bincount(part.labels).tolist() for part in (splits.train, splits.holdout)]
    assert counts == [[80, 40], [20, 10]]
    assert np.bincount(splits.evaluation["validation"].labels).tolist() == [20, 10]
    assert not set(splits.train.texts) & set(splits.holdout.texts)


def test_without_a_subset_train_and_holdout_are_all_of_train(tmp_path: Path) -> None:
    path = write(tmp_path, train=reviews(50), validation=reviews(5))
    splits = load(own(path, holdout=0.1))
    assert splits.holdout is not None
    assert sorted(splits.train.texts + splits.holdout.texts) == sorted(load(own(path)).train.texts)


def test_the_draw_depends_on_the_seed_alone(tmp_path: Path) -> None:
    path = write(tmp_path, train=reviews(60), validation=reviews(6))
    task = own(path, max_train_examples=30, holdout=0.2)
    prints = [load(t).fingerprint("holdout") for t in (task, task, dataclasses.replace(task, seed=7))]
    assert prints[0] == prints[1] != prints[2]


def test_the_fingerprint_tells_apart_what_differs() -> None:
    labels = np.array([0, 1])
    base = Examples([("ab", "c"), ("d", "e")], labels)
    same = Examples([("ab", "c"), ("d", "e")], labels.copy())
    others = [
        Examples([("a", "bc"), ("d", "e")], labels),
        Examples([("d", "e"), ("ab", "c")], labels),
        Examples([("ab", "c"), ("d", "e")], labels[::-1]),
        Examples([("ab", "c"), ("d", "e")], labels.astype(np.float32)),
    ]
    assert base.fingerprint == same.fingerprint
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 5


# --- the tasks that ship ----------------------------------------------------------------------------------

CONF = Path(__file__).parents[2] / "conf" / "task"


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("[!_]*.yaml")))
def test_every_task_file_is_a_task_under_its_name(name: str) -> None:
    assert config.construct(tiny.node("task", name), "task", Task).name == name


def test_the_toy_task_reports_on_the_same_reviews_whatever_the_size_of_train() -> None:
    task = config.construct(tiny.node("task", "toy"), "task", Task)
    small = load(dataclasses.replace(task, max_train_examples=200, max_evaluation_examples=50))
    large = load(dataclasses.replace(task, max_train_examples=300, max_evaluation_examples=50))
    assert (len(small.train), len(large.train)) == (200, 300)
    assert small.fingerprint("validation") == large.fingerprint("validation")
    assert not set(small.train.texts) & set(small.evaluation["validation"].texts)
