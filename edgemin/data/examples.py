"""From rows to examples: every text is there, every label is matched to its class by name."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemin.config import is_text
from edgemin.data.loading import Table
from edgemin.data.task import Task, listed, refusal
from edgemin.errors import UserError
from edgemin.store.content import digest

log = logging.getLogger(__name__)

_LARGEST = float(np.finfo(np.float32).max)
UNLABELLED = "-1"  # what benchmarks write where a label is kept secret

Labels = NDArray[np.int64] | NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Examples:
    """Texts with their labels.

    Attributes:
        texts: One or two texts per example.
        labels: int64 class indices, or float32 numbers for regression.
    """

    texts: list[tuple[str, ...]]
    labels: Labels

    def __len__(self) -> int:
        return len(self.texts)

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

    def take(self, rows: NDArray[np.int64]) -> Examples:
        """The examples at these rows."""
        return Examples([self.texts[row] for row in rows], self.labels[rows])


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


def class_names(task: Task, train: Table) -> tuple[str, ...]:
    """The classes in the order of the model's outputs."""
    named = train.class_names.get(task.label_column)
    if task.regression:
        if named is not None:
            raise refusal("regression", f"false, {task.label_column} holds classes ({listed(named)})", True)
        return (task.label_column,)
    if named is not None:
        _check_same_names(task, named)
        return tuple(task.labels or named)
    if task.labels is not None:
        return tuple(task.labels)
    values = train.columns[task.label_column]
    found = {name for value in values if (name := _label_name(value))}
    fraction = next((name for name in map(_label_name, values) if name and _is_fraction(name)), None)
    if fraction is not None and all(_is_number(name) for name in found):
        expected = "classes (task.regression=true predicts numbers; numbers that are classes are listed in task.labels)"
        raise refusal("label_column", expected, f"{fraction} in train")
    if broken := sorted(name for name in found if not is_text(name)):
        raise refusal("label_column", "labels that can be written in UTF-8", repr(broken[0]))
    return tuple(sorted(found - {UNLABELLED}, key=_by_number_then_name))


def _check_same_names(task: Task, named: Sequence[str]) -> None:
    if task.labels is None or set(task.labels) == set(named):
        return
    if len(task.labels) != len(named):
        expected = f"the data's {len(named)} classes ({listed(named)})"
        raise refusal("labels", expected, f"{len(task.labels)} ({listed(task.labels)})")
    raise refusal("labels", f"the data's class names ({listed(named)})", listed(task.labels))


def _label_name(value: Any) -> str | None:
    """A label as the name of its class; 1 and 1.0 are '1'."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _is_number(name: str) -> bool:
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False


def _is_fraction(name: str) -> bool:
    return _is_number(name) and not float(name).is_integer()


def _by_number_then_name(name: str) -> tuple[float, str]:
    try:
        return int(name), name
    except ValueError:
        return math.inf, name


def read_examples(task: Task, split: str, table: Table, labels: tuple[str, ...]) -> Examples:
    """Check and convert every row of a split.

    Args:
        task: What its columns and labels mean.
        split: Its name, for messages.
        table: Its rows.
        labels: The classes, in the order of the model's outputs.

    Raises:
        UserError: If a text is empty or no text, or a label is none of the classes (or no number).
    """
    texts = _texts(task, split, table)
    values = table.columns[task.label_column]
    for row, value in enumerate(values, start=1):
        if isinstance(value, list | tuple | dict | bytes):
            found = f"a {type(value).__name__} in row {row} of {split}"
            raise refusal("label_column", f"one label per row in {task.label_column}", found)
    if task.regression:
        numbers = [_number(split, row, value) for row, value in enumerate(values, start=1)]
        return Examples(texts, np.array(numbers, dtype=np.float32))
    named = table.class_names.get(task.label_column, ())
    if named:
        _check_same_names(task, named)
        values = [named[v] if v is not None and 0 <= v < len(named) else v for v in values]
    index = {name: position for position, name in enumerate(labels)}
    indices = np.empty(len(texts), dtype=np.int64)
    for row, value in enumerate(values):
        name = _label_name(value)
        if name not in index:
            raise _foreign_label(split, row + 1, name, labels)
        indices[row] = index[name]
    return Examples(texts, indices)


def _foreign_label(split: str, row: int, name: str | None, labels: Sequence[str]) -> UserError:
    expected = f"labels out of {listed(labels)}"
    if name == UNLABELLED:
        expected += " (-1 marks rows without a label; where it is a class, list it in task.labels)"
    elif name is not None and _is_fraction(name):
        expected += " (task.regression=true predicts numbers)"
    return refusal("label_column", expected, f"{name or 'an empty label'} in row {row} of {split}")


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
    if value is None:
        return ""
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        found = f"a {type(value).__name__} in row {row} of {split}"
        raise refusal("text_columns", f"texts in {column}", found)
    if not is_text(str(value)):
        found = f"half a character (a lone surrogate) in row {row} of {split}"
        raise refusal("text_columns", f"text that can be written in UTF-8 in {column}", found)
    return str(value)


def _number(split: str, row: int, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= _LARGEST:
        found = f"{str(value)[:40]} in row {row} of {split}"
        raise refusal("label_column", "finite numbers (task.regression=true)", found)
    return number
