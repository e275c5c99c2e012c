"""From rows to work: the paths of a study as a tree of nodes, each with the key under which its result is stored.

Equal prefixes are one node. Everything that can be refused is refused here, before anything is trained.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from edgemin import config, roots
from edgemin.data import Splits, Task
from edgemin.digest import code_digest
from edgemin.errors import UserError
from edgemin.evaluate import primary_metric
from edgemin.order import RowSpec
from edgemin.roots import Root
from edgemin.stages.base import Shape, Stage
from edgemin.stages.finetune import Finetune
from edgemin.stages.fitting import Trainer
from edgemin.starts import SOURCE, Start, check_same_tokens, read_starts
from edgemin.store import content_key


@dataclass(frozen=True)
class Study:
    """All that a plan is made of.

    Attributes:
        settings: the whole resolved configuration; a stage's name is a key of it.
        task: what is learnt.
        splits: its data; ``None`` for ``task=none``.
        roots: the models that paths start at, by name: ``teacher``, ``student`` and those the study adds.
        rows: what is printed.
        trainer: device and precision.
        seed: the run's.
    """

    settings: Mapping[str, Any]
    task: Task
    splits: Splits | None
    roots: Mapping[str, Root]
    rows: Sequence[RowSpec]
    trainer: Trainer
    seed: int


@dataclass(frozen=True, eq=False)
class Node:
    """One result: a root (no stages), or a parent with one more stage.

    Attributes:
        path: ``student/finetune/distill``.
        key: its address in the store.
        content: what the key was made of; kept in the provenance.
        settings: the stage's resolved configuration, or the root's.
    """

    path: str
    key: str
    content: Mapping[str, Any]
    settings: Mapping[str, Any]
    start: Start
    shape: Shape
    seed: int
    head_trained: bool
    final: bool = False
    head_stale: bool = False  #: the encoder was trained since the head was
    parent: Node | None = None
    teachers: tuple[Node, ...] = ()

    @property
    def stage(self) -> str:
        """The name of its last stage, or ``weights`` for a root."""
        return self.path.rpartition("/")[2] if "/" in self.path else "weights"

    def build_stage(self) -> Stage:
        """A fresh stage object."""
        stage = config.construct(self.settings, self.stage)
        assert isinstance(stage, Stage)
        return stage


@dataclass(frozen=True)
class Row:
    """A row to print and the node it shows."""

    spec: RowSpec
    node: Node


@dataclass
class Plan:
    """What to do, in an order in which it can be done."""

    nodes: list[Node]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)


def build(study: Study) -> Plan:
    """Lay out every node that the rows need.

    Raises:
        UserError: an unknown stage, an order that cannot work, a setting that a stage refuses, a row whose head was
            never trained.
    """
    return _Planner(study).plan()


class _Planner:
    def __init__(self, study: Study) -> None:
        self.study = study
        self.nodes: dict[str, Node] = {}
        self.notes: list[str] = []
        self.making: list[str] = []
        self.paths = [spec.path for spec in study.rows]
        self.paths += ["/".join((name, *root.stages)) for name, root in study.roots.items()]
        self.starts = read_starts(study.roots, study.splits)

    def plan(self) -> Plan:
        rows = []
        for spec in self.study.rows:
            node = self.node(spec.model, spec.stages)
            if self.study.splits is None or (node.head_trained and (spec.named or not node.head_stale)):
                rows.append(Row(spec, node))
                if node.head_stale and self.study.splits is not None:
                    self.notes.append(f"row {spec.name!r} is scored with a head from before its encoder was trained on")
            elif node.head_trained:
                self.notes.append(f"row {spec.name!r} is not scored: its encoder was trained on since its head was")
            elif spec.named or spec is self.study.rows[-1] or spec.model == "teacher":
                raise UserError(
                    f"{'teacher.stages' if spec.model == 'teacher' else 'stages'}: expected a stage that trains the "
                    f"head on {self.study.task.name} "
                    f"(finetune) before the row {spec.name!r} is scored, given {spec.path}"
                )
            else:
                self.notes.append(f"row {spec.name!r} is not scored: no stage up to {spec.path} trains the head")
        return Plan(list(self.nodes.values()), rows, self.notes)

    def node(self, model: str, stages: Sequence[str]) -> Node:
        path = "/".join((model, *stages))
        if path in self.making:
            chain = " <- ".join([*self.making[self.making.index(path) :], path])
            raise UserError(f"{model}.stages: expected no model that learns from itself, given {chain}")
        if path not in self.nodes:
            # Parents and teachers enter first, so that the order of insertion is an order of execution.
            self.making.append(path)
            made = self._stage(path, self.node(model, stages[:-1])) if stages else self._root(model)
            self.making.pop()
            self.nodes[path] = made
        return self.nodes[path]

    def _root(self, path: str) -> Node:
        start = self.starts[path]
        parent = None
        if start.origin is not None:
            parent = self._model(start.origin, start.from_trained)
            if parent.final:
                raise UserError(
                    f"{path}.source: expected a model that can be cut and trained, given {parent.path}, whose layers "
                    "are quantised"
                )
        content = start.content(self.study.splits, parent.key if parent else None)
        content |= {"code": code_digest("edgemin.roots", "edgemin.checkpoint"), "versions": _versions()}
        giver = parent if start.root.inherit == "all" else None  # of layers and head
        shape = start.shape._replace(pruned=start.shape.pruned or (giver is not None and giver.shape.pruned))
        trained = start.own_labels or (giver is not None and giver.head_trained)
        if start.own_labels and start.generic_labels:
            self.notes.append(f"{path}: its checkpoint names no labels; its outputs are taken in the task's order")
        return Node(
            path,
            content_key(content),
            content,
            roots.describe(start.root),
            start,
            shape,
            start.root.seed,
            trained,
            final=start.facts is not None and start.facts.quantised,
            parent=parent,
        )

    # -- stages ------------------------------------------------------------------------------------

    def _stage(self, path: str, parent: Node) -> Node:
        study = self.study
        name = path.rpartition("/")[2]
        model = parent.path.partition("/")[0]
        prefix = "" if model == "student" else f"{model}."
        settings = self._settings(name, f"{prefix}stages")
        stage = _construct(settings, name)
        if parent.final:
            raise UserError(
                f"{prefix}stages: expected nothing after "
                f"{parent.path.rpartition('/')[2]}, whose result (torch's dynamic INT8) can neither be trained nor "
                f"pruned, given {name}"
            )
        settings = stage.resolve(dict(settings), parent.head_trained, self._finetuned_later(path))
        stage = _construct(settings, name)
        teachers = tuple(self._teacher(teacher, name) for teacher in stage.teacher_names)
        reads = self._check(path, stage, parent, teachers)
        seed = _seed(study.seed if model == "student" else study.roots[model].seed, path)
        content = {
            "stage": stage.key_settings(settings),
            "parent": parent.key,
            "teachers": [teacher.key for teacher in teachers],
            "data": self._data(stage.stops_early) if stage.needs_task else None,
            "seed": seed,
            **study.trainer.content,
            "code": code_digest(*stage.code_modules, "edgemin.stages.fitting", "edgemin.artifact"),
            "versions": _versions(),
        }
        if reads is not None:
            content["reads"] = reads
        shape = parent.shape._replace(pruned=parent.shape.pruned or stage.narrows)
        trained = parent.head_trained or stage.trains_head
        return Node(
            path,
            content_key(content),
            content,
            settings,
            parent.start,
            shape,
            seed,
            trained,
            stage.final,
            stage.leaves_head_stale or (parent.head_stale and not stage.trains_head),
            parent,
            teachers,
        )

    def _check(self, path: str, stage: Stage, parent: Node, teachers: Sequence[Node]) -> Mapping[str, Any] | None:
        """Refuse a stage that cannot work here; gives what it reads besides the task's data."""
        study, name = self.study, path.rpartition("/")[2]
        try:
            stage.check(parent.shape, [teacher.shape for teacher in teachers])
            reads = stage.data_content
        except UserError as error:
            raise UserError(f"{name}.{error}") from error
        for read_by in (parent, *teachers):
            if stage.input_length is not None and stage.input_length > read_by.start.max_tokens:
                raise UserError(
                    f"{name}.corpus_length: expected at most {read_by.start.max_tokens} tokens, what {read_by.path} "
                    f"takes, given {stage.input_length}"
                )
        if stage.needs_task and study.splits is None:
            raise UserError(f"stages: expected only stages that need no data with task=none, given {name}")
        if study.splits is not None and study.splits.holdout is None and stage.stops_early:
            raise UserError(
                f"{name}.patience: expected null, or task.holdout above 0 to stop early on, given a patience alone"
            )
        if stage.reads_head and not parent.head_trained:
            self.notes.append(f"{path} ranks by the loss of a head that no stage before it trained")
        for teacher in teachers:
            if stage.same_tokens:
                check_same_tokens(name, parent.start, teacher.start, study.splits if stage.needs_task else None)
            if stage.needs_trained_teacher and not teacher.head_trained:
                raise UserError(
                    f"{name}.teacher: expected a model whose head was trained on {study.task.name}, as its logits are "
                    f"learnt from, given {teacher.path}"
                )
        return reads

    def _settings(self, name: str, key: str = "stages") -> Mapping[str, Any]:
        nodes: dict[str, Mapping[str, Any]]
        nodes = {key: node for key, node in self.study.settings.items() if _is_stage(node, key)}
        if name not in nodes:
            known = ", ".join(sorted(nodes))
            raise UserError(f"{key}: expected names of stages in the configuration ({known}), given {name!r}")
        return nodes[name]

    def _teacher(self, name: str, stage: str) -> Node:
        model = name.removesuffix(SOURCE)
        if model not in self.study.roots:
            known = ", ".join(f"{known}, {known}{SOURCE}" for known in self.study.roots)
            raise UserError(f"{stage}.teacher: expected one of {known}, given {name!r}")
        return self._model(model, trained=not name.endswith(SOURCE))

    def _model(self, name: str, trained: bool) -> Node:
        """A model of the study at the end of its own path, or its weights as they came."""
        return self.node(name, self.study.roots[name].stages if trained else ())

    def _finetuned_later(self, path: str) -> bool:
        """Whether any row goes on from this path to a fine-tuning."""
        later = {
            name for other in self.paths if other.startswith(f"{path}/") for name in other[len(path) + 1 :].split("/")
        }
        return any(issubclass(config.target(self._settings(name), name), Finetune) for name in later)

    def _data(self, stops_early: bool) -> dict[str, Any]:
        splits, task = self.study.splits, self.study.task
        assert splits is not None
        metric = primary_metric(task.regression, len(splits.labels), task.metrics) if stops_early else None
        return {"early_stopping": metric, **splits.content()}


def _is_stage(node: Any, key: str) -> bool:
    """Whether a node of the configuration describes a stage, to the extent that its class can be found."""
    if not isinstance(node, dict) or "_target_" not in node:
        return False
    try:
        return issubclass(config.target(node, key), Stage)
    except UserError:
        return True  # using it says what is wrong


def _construct(settings: Mapping[str, Any], name: str) -> Stage:
    stage = config.construct(settings, name)
    if not isinstance(stage, Stage):
        raise UserError(f"{name}._target_: expected a stage, given {settings['_target_']}")
    return stage


def _seed(seed: int, path: str) -> int:
    """A seed per (seed, path), so that a reused prefix changes nothing downstream."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{path}".encode()).digest()[:4])


def _versions() -> dict[str, str]:
    return {"torch": str(torch.__version__).partition("+")[0], "transformers": transformers.__version__}
