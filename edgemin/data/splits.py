"""All examples of a task: read and checked, with its subsets and hold-out drawn."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from edgemin import toy
from edgemin.data.examples import Examples, check_table, label_column, read_examples
from edgemin.data.holdout import hold_out, stratified
from edgemin.data.loading import Table, local_files, read_tables
from edgemin.data.task import Task, find_kind
from edgemin.progress import live_line
from edgemin.store.content import digest
from edgemin.store.memo import Memo
from edgemin.tasks.base import Kind, refusal

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Splits:
    """All examples of a task.

    Attributes:
        task: The task they belong to.
        kind: What its labels mean.
        labels: The name of each output of the model, in order.
        metrics: What is reported, the primary metric first.
        train: What is trained on (without the hold-out and what would give it away); every example has a label.
        holdout: What early stopping and searches look at, or None.
        evaluation: What is reported, by split.
        texts: Where only some of the training examples have a label, all of them.
    """

    task: Task
    kind: Kind
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    train: Examples
    holdout: Examples | None
    evaluation: dict[str, Examples]
    texts: Examples | None = None

    @cached_property
    def without_labels(self) -> Splits:
        """What a stage is trained on that reads no label: all training texts."""
        return self if self.texts is None else replace(self, train=self.texts, texts=None)

    def given(self, reads_labels: bool) -> Splits:
        """What a stage is given, by whether it reads labels."""
        return self if reads_labels else self.without_labels

    def fingerprint(self, kind: str) -> str:
        """SHA-256 of the labels' names and the examples of `train`, `holdout` or an evaluation split."""
        examples = {"train": self.train, "holdout": self.holdout, **self.evaluation}[kind]
        assert examples is not None, "the task has no hold-out"
        return digest("\0".join((examples.fingerprint, *self.labels)))

    def content(self) -> dict[str, Any]:
        """What a stage that trains on this task depends on, for its key."""
        return {
            "train": self.fingerprint("train"),
            "holdout": self.fingerprint("holdout") if self.holdout is not None else None,
            "labels": list(self.labels),
            "kind": self.task.kind,
            "max_length": self.task.max_length,
        }


# A sweep reads each task once, for all plans and all jobs; of the largest two, QQP and MNLI, each takes a quarter GB.
_known = Memo[tuple[Splits, list[logging.LogRecord]]](most=8)


def load(task: Task) -> Splits:
    """Read a task's data and check all of it before anything is trained.

    Subsets are drawn first, then the hold-out from the subset of train ([`hold_out`][edgemin.data.holdout.hold_out]),
    then which of the rest have a label. All draws are stratified by label and depend on the data and `task.seed` alone.
    A sweep asks for a task once for the plan and once for each job: the last few tasks are therefore kept in memory
    while their files do not change. Warnings are repeated every time.

    Args:
        task: Any task but `none`.

    Returns:
        The checked splits.

    Raises:
        UserError: If a file, split, column, text or label is not what the task says.
    """
    assert task.name != "none", "the task 'none' has no data"
    splits, said = _known.of(task, local_files(task.path), lambda: _listened(task))
    for record in said:
        logging.getLogger(record.name).handle(record)
    return splits


def _listened(task: Task) -> tuple[Splits, list[logging.LogRecord]]:
    """The data of a task, and what was warned of while it was read."""
    package, said = logging.getLogger("edgemin.data"), list[logging.LogRecord]()

    def keep(record: logging.LogRecord) -> bool:
        said.append(record)
        return False

    handler = logging.Handler()
    handler.addFilter(keep)
    package.addHandler(handler)
    package.propagate = False
    try:
        return _read(task), said
    finally:
        package.propagate = True
        package.removeHandler(handler)


def _read(task: Task) -> Splits:
    with live_line(f"{task.name}  reading the data", beside_bars=True):
        tables = _toy_tables(task) if task.name == "toy" else read_tables(task)
        for split, table in tables.items():
            check_table(task, split, table)
        kind = find_kind(task.kind)
        labels = kind.names(label_column(task, task.train_split, tables[task.train_split]))
        examples = {split: read_examples(task, kind, split, table, labels) for split, table in tables.items()}
    train = _subset(task, kind, examples[task.train_split], task.max_train_examples, 0)
    holdout = None
    if task.holdout:
        train, holdout = hold_out(task, kind, train)
    train, texts = _labelled(task, kind, train)
    if missing := kind.check_train(train.labels, labels):
        log.warning("task %s: no training example of the class %s", task.name, ", ".join(missing))
    metrics = kind.checked_metrics(task.metrics, len(labels))
    evaluation = {
        split: _subset(task, kind, examples[split], task.max_evaluation_examples, 1) for split in task.evaluation_splits
    }
    for split, found in {task.train_split: train, **evaluation}.items():
        if bool((found.labels == found.labels[0]).all()):
            only = kind.shown(found.labels[0], labels)
            only = only if isinstance(only, str) else f"{only:g}"
            log.warning("task %s: every label of %s is %s: no score there tells models apart", task.name, split, only)
    return Splits(task, kind, labels, metrics, train, holdout, evaluation, texts)


def _labelled(task: Task, kind: Kind, train: Examples) -> tuple[Examples, Examples | None]:
    """The examples that have a label and, where not all of train has one, all of train."""
    count = task.labelled_examples
    if count is None or count == len(train):
        return train, None
    if count > len(train):
        raise refusal("labelled_examples", f"at most the {len(train)} examples of {task.train_split}", count)
    rows = stratified(kind.strata(train.labels), count, (task.seed, 2))
    return train.take(rows), train.labelled_at(rows)


def _subset(task: Task, kind: Kind, examples: Examples, limit: int | None, stream: int) -> Examples:
    if limit is None or limit >= len(examples):
        return examples
    return examples.take(stratified(kind.strata(examples.labels), limit, (task.seed, stream)))


def _toy_tables(task: Task) -> dict[str, Table]:
    sizes = {split: task.max_evaluation_examples or toy.EVALUATION_EXAMPLES for split in task.evaluation_splits}
    # Train comes last, so that its size does not change what is reported.
    sizes[task.train_split] = task.max_train_examples or toy.TRAIN_EXAMPLES
    texts, labels = toy.generate(sum(sizes.values()), task.seed)
    tables, start = {}, 0
    for split, size in sizes.items():
        rows = slice(start, start + size)
        tables[split] = Table({toy.TEXT_COLUMN: texts[rows], toy.LABEL_COLUMN: labels[rows]})
        start += size
    return tables
