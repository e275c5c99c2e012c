"""The parts of a plan: the study that was asked for, the results it needs as a tree of nodes, the rows it prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from edgemin import artifact
from edgemin.data.module import DataModule
from edgemin.data.splits import Splits
from edgemin.data.task import Task
from edgemin.encoder.outline import Outline
from edgemin.encoder.quantized import is_trainable
from edgemin.store.artifacts import Store
from edgemin.study.order import RowSpec
from edgemin.study.roots import Root
from edgemin.study.starts import Start
from edgemin.training.fitting import Trainer
from edgemin.training.latency import LatencyTable
from edgemin.training.stage import Stage

STALE = "scored with a head from before its encoder was trained on"  # what is said of such a row


@dataclass(frozen=True)
class Study:
    """What a job asks for, read and checked: all that a plan is made of.

    Attributes:
        settings: the whole resolved configuration; a stage's name is a key of it.
        task: what is learnt.
        splits: its data; `None` for `task=none`.
        roots: the models that paths start at, by name: `teacher`, `student` and those the study adds.
        rows: what is printed.
        trainer: device and precision.
        seed: what the run's random choices follow from.
        max_drop: how much of the main metric a row may lose against the row it was made from; `None`: any.
        comparisons: pairs of rows that the order declares; none where the report's default is meant.
        latency: the table for stages that are to reach a latency; `None` where there are none or nobody measured.
    """

    settings: Mapping[str, Any]
    task: Task
    splits: Splits | None
    roots: Mapping[str, Root]
    rows: Sequence[RowSpec]
    trainer: Trainer
    seed: int
    max_drop: float | None = None
    comparisons: Sequence[Sequence[str]] = ()
    latency: LatencyTable | None = None


@dataclass(frozen=True, eq=False)
class Node:
    """One result: a root (no stages), or a parent with one more stage.

    Attributes:
        path: `student/finetune/distill`.
        key: its address in the store.
        content: what the key was made of; kept in the provenance.
        settings: the stage's resolved configuration, or the root's.
        start: the named model that its path begins with.
        outline: what planning knows of the model after its last stage.
        seed: of its last stage, or of a root's random weights.
        head_trained: whether the head has been trained on the task.
        head_stale: the encoder was trained since the head was.
        parent: the node that its last stage is given; for a root, the model of the study that it is cut from.
        teachers: the nodes that its last stage learns from.
        step: its last stage, as planning constructed it and asked it; `None` for a root.
    """

    path: str
    key: str
    content: Mapping[str, Any]
    settings: Mapping[str, Any]
    start: Start
    outline: Outline
    seed: int
    head_trained: bool
    head_stale: bool = False
    parent: Node | None = None
    teachers: tuple[Node, ...] = ()
    step: Stage | None = None

    @property
    def final(self) -> bool:
        """Whether it can neither be trained nor pruned."""
        return not is_trainable(self.outline.provider)

    @property
    def tokens(self) -> Node | None:
        """The last node on its path that changed the tokenizer, whose artifact has it; `None`: no stage did."""
        if self.parent is None:
            return None
        made_here = self.step is not None and self.outline.tokenizer != self.parent.outline.tokenizer
        return self if made_here else self.parent.tokens

    @property
    def stage(self) -> str:
        """The name of its last stage, or `weights` for a root."""
        return self.path.rpartition("/")[2] if "/" in self.path else "weights"


@dataclass(frozen=True)
class Row:
    """A row to print and the node it shows."""

    spec: RowSpec
    node: Node


@dataclass
class Plan:
    """What a job needs.

    Attributes:
        nodes: every result, after those that it is made from.
        rows: what is printed.
        notes: what the user should know before anything runs.
    """

    nodes: list[Node]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    def made_from(self, index: int) -> int | None:
        """The place of the row that a row was made from: that with the longest proper prefix of its path, if any."""
        mine = self.rows[index].spec
        before = [
            (len(row.spec.stages), other)
            for other, row in enumerate(self.rows)
            if row.spec.model == mine.model
            and len(row.spec.stages) < len(mine.stages)
            and row.spec.stages == mine.stages[: len(row.spec.stages)]
        ]
        return max(before)[1] if before else None


class StudyData:
    """The data of a study in the tokens of its models, each made once.

    Args:
        study: whose task it is.
        store: where token ids are kept, and the tokenizers that stages made.
    """

    def __init__(self, study: Study, store: Store) -> None:
        self.study, self.store = study, store
        self._made: dict[str, DataModule] = {}
        self._read: dict[str, PreTrainedTokenizerBase | None] = {}

    def tokenizer(self, node: Node) -> PreTrainedTokenizerBase | None:
        """The tokenizer of a node that is stored."""
        if (maker := node.tokens) is None:
            return node.start.tokenizer
        if maker.key not in self._read:
            self._read[maker.key] = artifact.read_tokenizer(self.store.path(maker.key))
        return self._read[maker.key]

    def of(self, node: Node, splits: Splits | None = None) -> DataModule:
        """The task's data, or that of another task, in the tokens of a node that is stored."""
        splits, tokenizer = splits or self.study.splits, self.tokenizer(node)
        assert splits is not None and tokenizer is not None
        name = f"{id(splits)}/{id(tokenizer)}"
        if name not in self._made:
            self._made[name] = DataModule(splits, tokenizer, self.store.tokens)
        return self._made[name]
