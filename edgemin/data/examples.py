"""From rows to examples: every text is there, every label is one of the task's kind."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemin.data.loading import Table
from edgemin.data.task import Task
from edgemin.plain_text import is_text
from edgemin.store.content import digest
from edgemin.tasks.base import Kind, LabelColumn, Labels, listed, refusal

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Examples:
    """Texts with their labels.

    Attributes:
        texts: One or two texts per example.
        labels: As the kind of task has them: one row per example.
        subset: Where each stands among the rows of its split, counted from 0; None: these are all of them.
    """

    texts: list[tuple[str, ...]]
    labels: Labels
    subset: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def rows(self) -> NDArray[np.int64]:
        """Where each example stands among the rows of its split as the data set has it, counted from 0."""
        return np.arange(len(self)) if self.subset is None else self.subset

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of texts and labels: equal wherever equal data was read from."""
        return digest(self._contents())

    def _contents(self) -> Iterator[bytes | str]:
        yield f"{len(self)} {self.labels.dtype}"
        for texts in self.texts:
            for text in texts:
                content = text.encode("utf-8", "surrogatepass")
                yield len(content).to_bytes(8, "little")
                yield content
        yield np.ascontiguousarray(self.labels).tobytes()

    def labelled_at(self, rows: NDArray[np.int64]) -> Examples:
        """The same texts, where these rows alone keep their labels: the others have -1 or NaN, which gives no loss."""
        labels = np.full_like(self.labels, -1 if np.issubdtype(self.labels.dtype, np.integer) else np.nan)
        labels[rows] = self.labels[rows]
        return Examples(self.texts, labels, self.subset)

    def take(self, rows: NDArray[np.int64]) -> Examples:
        """The examples at these places."""
        return Examples([self.texts[row] for row in rows], self.labels[rows], self.rows[rows])


def check_table(task: Task, split: str, table: Table) -> None:
    """Refuse a split without rows, or without a column the task names."""
    if not len(table):
        key = "train_split" if split == task.train_split else "evaluation_splits"
        raise refusal(key, "a split with examples", f"{split} with no row")
    there = listed(table.columns)
    for column in task.text_columns:
        if column not in table.columns:
            raise refusal("text_columns", f"columns of {split} ({there})", column)
    if task.label_column not in table.columns:
        raise refusal("label_column", f"a column of {split} ({there})", task.label_column)


def label_column(task: Task, split: str, table: Table) -> LabelColumn:
    """The labels of a split, with what the data and the task say of their names."""
    named = table.class_names.get(task.label_column)
    asked = None if task.labels is None else tuple(task.labels)
    return LabelColumn(task.label_column, split, table.columns[task.label_column], named, asked)


def read_examples(task: Task, kind: Kind, split: str, table: Table, labels: tuple[str, ...]) -> Examples:
    """Check and convert every row of a split.

    Args:
        task: What its columns mean.
        kind: What its labels mean.
        split: Its name, for messages.
        table: Its rows.
        labels: The name of each output of the model, in order.

    Raises:
        UserError: If a text is empty or no text, or a label is not of the task's kind.
    """
    texts = _texts(task, split, table)
    return Examples(texts, kind.read(label_column(task, split, table), labels))


def _texts(task: Task, split: str, table: Table) -> list[tuple[str, ...]]:
    texts = []
    for column in task.text_columns:
        values = table.columns[column]
        texts.append([_text(split, column, row, value) for row, value in enumerate(values, start=1)])
        blank = [row for row, text in enumerate(texts[-1], start=1) if not text.strip()]
        if blank:
            found = f"{len(blank)} empty in {split}, the first in row {blank[0]}"
            if task.blank_texts == "refuse":
                raise refusal("text_columns", f"a text in every row of {column}", found)
            log.warning("task %s: %s: %s, kept", task.name, column, found)
    return list(zip(*texts, strict=True))


def _text(split: str, column: str, row: int, value: Any) -> str:
    if value is None or value != value:  # NaN, a table's missing cell
        return ""
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        found = f"a {type(value).__name__} in row {row} of {split}"
        raise refusal("text_columns", f"texts in {column}", found)
    if not is_text(str(value)):
        found = f"half a character (a lone surrogate) in row {row} of {split}"
        raise refusal("text_columns", f"text that can be written in UTF-8 in {column}", found)
    return str(value)
