"""The definition of a task: where its data lies, what its columns hold, and which part of it is used."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from edgemin.errors import check_name
from edgemin.tasks.base import Kind, refusal

BLANK_TEXTS = ("refuse", "keep")
# Imported by name, so that a new kind in the table changes no key; the kind of the task is in the keys itself.
TABLE = "edgemin.tasks.table"


@dataclass(frozen=True)
class Task:
    """One task on texts, as its yaml file states it.

    Attributes:
        name: How tables call it. `toy` is generated; `none` has no data at all (architecture only).
        path: Hub id, or a local directory of the same layout, or own data: a directory that holds `<split>.csv`
            (`.tsv`, `.jsonl`, `.json`, `.parquet`) or one such file with a column `split`.
        subset: The configuration inside a Hub data set.
        text_columns: One column, or two for pairs of texts.
        label_column: The column of labels.
        kind: What a label is, a name in [`KINDS`][edgemin.tasks.table.KINDS]; `find_kind` gives what it stands for.
        labels: Names of the classes, in the order of the model's outputs; the data is matched to them by
            name. None: the data set's own names, or else the values found in train, sorted.
        train_split: The split trained on.
        evaluation_splits: The splits reported. They select nothing.
        max_length: Longest input in tokens; what is longer is cut.
        holdout: Share of train, in [0, 1), that is set aside for early stopping and searches: of texts that are part
            of no other. What is part of one of them and has at least four words, or shares one of two texts with one
            (but a text that many examples have), is dropped from train
            ([`hold_out`][edgemin.data.holdout.hold_out]).
        max_train_examples: Seeded stratified subset of train (the hold-out is taken from it). None: all.
        labelled_examples: How many examples of train (without the hold-out) have a label, a seeded stratified subset;
            the others are text for stages that read no label. None: all.
        max_evaluation_examples: The same as `max_train_examples` for every evaluation split.
        metrics: What to report, primary metric first. None: all that fit.
        blank_texts: `refuse` makes an empty text an error, `keep` trains and evaluates on it with a
            warning (for benchmarks, which are scored on every row they have).
        seed: Draws subsets, hold-out and the toy task; the run's own `seed` does not touch the data.

    Raises:
        UserError: If a value is of the wrong type or out of range.
    """

    name: str
    path: str | None = None
    subset: str | None = None
    text_columns: Sequence[str] = ()
    label_column: str = "label"
    kind: str = "classification"
    labels: Sequence[str] | None = None
    train_split: str = "train"
    evaluation_splits: Sequence[str] = ()
    max_length: int = 128
    holdout: float = 0.0
    max_train_examples: int | None = None
    labelled_examples: int | None = None
    max_evaluation_examples: int | None = None
    metrics: Sequence[str] | None = None
    blank_texts: str = "refuse"
    seed: int = 42

    def __post_init__(self) -> None:
        check_name(self.name, "task.name")
        for key in ("label_column", "train_split"):
            _check_name(key, getattr(self, key))
        for key in ("text_columns", "labels", "evaluation_splits", "metrics"):
            object.__setattr__(self, key, _names(key, getattr(self, key)))
        if self.metrics is not None and not self.metrics:
            raise refusal("metrics", "null or at least one metric", "none")
        if self.blank_texts not in BLANK_TEXTS:
            raise refusal("blank_texts", " or ".join(BLANK_TEXTS), self.blank_texts)
        _check_whole("max_length", self.max_length, 4)
        _check_whole("seed", self.seed, 0)
        for key in ("max_train_examples", "labelled_examples", "max_evaluation_examples"):
            if getattr(self, key) is not None:
                _check_whole(key, getattr(self, key), 1)
        _check_holdout(self.holdout)
        self._check_labels(find_kind(self.kind))
        if self.name != "none":
            self._check_splits()

    def _check_labels(self, kind: Kind) -> None:
        if self.labels is not None:
            kind.check_names(self.labels)
            kind.checked_metrics(self.metrics, len(self.labels))

    def _check_splits(self) -> None:
        if not 1 <= len(self.text_columns) <= 2:
            raise refusal("text_columns", "one or two columns", list(self.text_columns))
        if self.label_column in self.text_columns:
            raise refusal("label_column", "a column that is no text column", self.label_column)
        if not self.evaluation_splits:
            raise refusal("evaluation_splits", "at least one split", [])
        for split in (self.train_split, *self.evaluation_splits):
            check_name(split, "task.train_split" if split == self.train_split else "task.evaluation_splits")
        for split in self.evaluation_splits:
            if split in (self.train_split, "train", "holdout"):
                raise refusal("evaluation_splits", "splits that nothing is trained or selected on", split)


def find_kind(name: str) -> Kind:
    """The kind of task that `task.kind` names.

    Raises:
        UserError: there is none of this name.
    """
    return cast(Kind, importlib.import_module(TABLE).find(name))


def _check_name(key: str, value: Any) -> None:
    if not isinstance(value, str) or not value.strip():
        raise refusal(key, "a name", value)


def _names(key: str, value: Any) -> tuple[str, ...] | None:
    """A list as a tuple of distinct strings; one name alone is a list of one."""
    if value is None:
        if key in ("labels", "metrics"):
            return None
        raise refusal(key, "a list of names", value)
    items = [value] if isinstance(value, str | int | float) else list(value)
    if any(isinstance(item, bool) or not isinstance(item, str | int | float) for item in items):
        raise refusal(key, "names (in quotes where yaml would read true or false)", items)
    names = tuple(str(item).strip() for item in items)
    if len(set(names)) < len(names) or "" in names:
        raise refusal(key, "distinct, non-empty names", list(names))
    return names


def _check_whole(key: str, value: Any, minimum: int) -> None:
    if type(value) is not int or value < minimum:
        raise refusal(key, f"a whole number of at least {minimum}", value)


def _check_holdout(value: Any) -> None:
    number = not isinstance(value, bool) and isinstance(value, int | float)
    if not number or not math.isfinite(value) or not 0 <= value < 1:
        raise refusal("holdout", "a number in [0, 1)", value)
