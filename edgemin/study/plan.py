"""From rows to work: the paths of a study as a tree of nodes, each with the key that its result is stored under.

Equal prefixes are one node. Everything that can be refused is refused here, before anything is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from edgemin import config
from edgemin.checkpoint import is_generic
from edgemin.encoder import quantized
from edgemin.errors import UserError
from edgemin.finetune import Finetune
from edgemin.store.content import content_key, digest
from edgemin.store.digest import code_digest
from edgemin.store.provenance import releases
from edgemin.study import roots
from edgemin.study.checks import plan_stage, stages_key, unequal_controls
from edgemin.study.family import FAMILY
from edgemin.study.nodes import STALE, Node, Plan, Row, Study
from edgemin.study.order import RowSpec
from edgemin.study.starts import SOURCE, Start, read_starts
from edgemin.tasks.base import Kind
from edgemin.training.stage import Effect, Place, Stage

ROOT_CODE = ("edgemin.study.roots", "edgemin.checkpoint")  # decides a root's weights
LATENCY = "edgemin.training.latency"  # how a table of latencies is read, by the stages that say so
KEYED = ("torch", "transformers")  # whose release decides what a stage comes to
PARENT = "parent"  # as a teacher: the very model that the stage is given


def build(study: Study) -> Plan:
    """Lay out every node that the rows need.

    Raises:
        UserError: an unknown stage, an order that cannot work, a setting that a stage refuses, a row whose head was
            never trained. An optional row for which that holds is left out, and the notes say why.
    """
    starts = read_starts(study.roots, study.splits)
    left_out: list[str] = []
    while True:
        planner = _Planner(study, starts)
        try:
            plan = planner.plan()
        except UserError as error:
            row = planner.row
            if row is None or not row.optional:
                raise
            left_out.append(f"row {row.name!r} is left out: {error}")
            # All anew, as what a stage does may depend on whether any row goes on from it to a fine-tuning.
            study = replace(study, rows=[spec for spec in study.rows if spec is not row])
        else:
            return replace(plan, notes=left_out + plan.notes)


def unused(plan: Plan, settings: Mapping[str, Any], given: Mapping[str, Sequence[str]]) -> list[str]:
    """A note for each stage that the user made settings for, though no row and no teacher has it.

    And for each setting of a stage that decides nothing beside its others.

    Args:
        plan: what will run.
        settings: the whole resolved configuration.
        given: the keys that the user set, each with the nodes of the configuration that take their values from it.
    """
    used = list(dict.fromkeys(node.stage.partition(FAMILY)[0] for node in plan.nodes if "/" in node.path))
    idle = {name for name, node in settings.items() if _is_stage(name, node)} - set(used)
    found: dict[str, list[str]] = {}
    for key, readers in given.items():
        if (name := key.partition(".")[0]) in idle and set(readers) <= idle:
            found.setdefault(name, []).append(key)
    idle_keys = {
        f"{node.stage.partition(FAMILY)[0]}.{key}": None
        for node in plan.nodes
        if node.step is not None
        for key in node.step.planned.idle
    }
    return [
        f"{', '.join(keys)}: set, but there is no stage {name} in this job, which has {', '.join(used) or 'none'}"
        for name, keys in found.items()
    ] + [
        f"{key}: set, but decides nothing with the stage's other settings"
        for key in given
        if any(key == idle_key or key.startswith(f"{idle_key}.") for idle_key in idle_keys)
    ]


def stage_code(effect: Effect, given: Sequence[Node], task: Kind | None) -> tuple[str, ...]:
    """The modules that decide a stage's result, with all that they import.

    Args:
        effect: of the stage: its own module, and those that it finds by name.
        given: its parent and its teachers. Of quantized ones those who know their layers count too.
        task: the kind of the study's task, which counts where the stage reads the task.
    """
    of_task = (task.module,) if effect.reads_task and task is not None else ()
    of_latency = (LATENCY,) if effect.reads_latency else ()
    kinds = [effect.quantizes, *(node.outline.provider for node in given)]
    found = (*effect.code, *of_task, *of_latency, *quantized.modules(*kinds))
    return (*found, "edgemin.training.fitting", "edgemin.artifact")


class _Planner:
    def __init__(self, study: Study, starts: Mapping[str, Start]) -> None:
        self.study, self.starts = study, starts
        self.row: RowSpec | None = None  # the one that is being planned
        self.nodes: dict[str, Node] = {}
        self.notes: list[str] = []
        self.making: list[str] = []
        self.paths = [spec.path for spec in study.rows]
        self.paths += ["/".join((name, *root.stages)) for name, root in study.roots.items()]

    def plan(self) -> Plan:
        rows = []
        for spec in self.study.rows:
            self.row = spec
            node = self.node(spec.model, spec.stages)
            if self.study.splits is None or (node.head_trained and (spec.named or not node.head_stale)):
                rows.append(Row(spec, node))
                if node.head_stale and self.study.splits is not None:
                    self.notes.append(f"row {spec.name!r} is {STALE}")
            elif node.head_trained:
                self.notes.append(f"row {spec.name!r} is not scored: its encoder was trained on since its head was")
            elif spec.named or spec is self.study.rows[-1] or spec.model == "teacher":
                raise UserError(
                    f"{'teacher.stages' if spec.model == 'teacher' else 'stages'}: expected a stage that trains the "
                    f"head on {self.study.task.name} (finetune) before the row {spec.name!r} is scored, given "
                    f"{spec.path}{_head(node, self.study.splits.kind)}"
                )
            else:
                self.notes.append(f"row {spec.name!r} is not scored: no stage up to {spec.path} trains the head")
        self.notes += unequal_controls([row.spec for row in rows], self.nodes)
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
                    "are quantized"
                )
        giver = parent if start.root.inherit == "all" else None  # the model that layers and head come from
        outline = start.outline
        if giver is not None and giver.outline != giver.start.outline:
            outline = start.cut_from(giver.outline)
        if parent is not None and (maker := parent.tokens) is not None:
            if start.root.tokenizer is not None:
                raise UserError(
                    f"{path}.tokenizer: expected null, as {maker.path} has pruned the vocabulary, with a tokenizer "
                    f"of its own, given {start.root.tokenizer}"
                )
            outline = replace(outline, vocabulary=None, tokenizer=parent.outline.tokenizer)
        content = start.content(self.study.splits, parent.key if parent else None)
        content |= {"code": code_digest(*ROOT_CODE, *quantized.modules(outline.provider)), "versions": releases(*KEYED)}
        trained = start.own_labels or (giver is not None and giver.head_trained)
        if start.own_labels and self._has_generic_labels(start):
            self.notes.append(f"{path}: its checkpoint names no labels; its outputs are taken in the task's order")
        return Node(
            path,
            content_key(content),
            content,
            roots.describe(start.root),
            start,
            outline,
            start.root.seed,
            trained,
            parent=parent,
        )

    def _has_generic_labels(self, start: Start) -> bool:
        facts, splits = start.facts, self.study.splits
        return facts is not None and splits is not None and is_generic(facts.labels or (), splits.labels)

    # -- stages ------------------------------------------------------------------------------------

    def _stage(self, path: str, parent: Node) -> Node:
        study = self.study
        name = path.rpartition("/")[2]
        model = parent.path.partition("/")[0]
        settings = self._settings(name, stages_key(model))
        stage = config.construct(settings, name.partition(FAMILY)[0], Stage)
        if parent.final:
            raise UserError(
                f"{stages_key(model)}: expected nothing after "
                f"{parent.path.rpartition('/')[2]}, whose result (torch's dynamic INT8) can neither be trained nor "
                f"pruned, given {name}"
            )
        teachers = tuple(self._teacher(teacher, name, parent) for teacher in stage.teachers)
        splits = study.splits
        examples, texts = (len(splits.train), len(splits.without_labels.train)) if splits is not None else (0, 0)
        place = Place(parent.head_trained, self._finetuned_later(path), examples, texts, study.latency)
        effect, notes = plan_stage(study, path, stage, place, parent, teachers)
        self.notes += notes
        settings = {**settings, **effect.decided}
        seed = _seed(study.seed if model == "student" else study.roots[model].seed, path)
        content = {
            "stage": {key: value for key, value in settings.items() if key not in (*effect.not_keyed, *effect.idle)},
            "parent": parent.key,
            "teachers": [teacher.key for teacher in teachers],
            "data": self._data(effect) if effect.reads_task else None,
            "seed": seed,
            **study.trainer.content,
            "code": code_digest(*stage_code(effect, (parent, *teachers), study.splits.kind if study.splits else None)),
            "versions": releases(*KEYED),
        }
        if effect.reads_latency and study.latency is not None:
            content["latency"] = asdict(study.latency)
        if (corpus := effect.corpus) is not None:
            content["reads"] = {**corpus.fingerprint(), "column": corpus.column, "length": corpus.length}
        return Node(
            path,
            content_key(content),
            content,
            settings,
            parent.start,
            effect.outline,
            seed,
            parent.head_trained or effect.trains_head,
            effect.leaves_head_stale or (parent.head_stale and not effect.trains_head),
            parent,
            teachers,
            stage,
        )

    def _settings(self, name: str, key: str = "stages") -> Mapping[str, Any]:
        nodes: dict[str, Mapping[str, Any]]
        nodes = {key: node for key, node in self.study.settings.items() if _is_stage(key, node)}
        if name not in nodes:
            known = ", ".join(sorted(nodes))
            raise UserError(f"{key}: expected names of stages in the configuration ({known}), given {name!r}")
        return nodes[name]

    def _teacher(self, name: str, stage: str, parent: Node) -> Node:
        if name == PARENT:
            return parent
        model = name.removesuffix(SOURCE)
        if model not in self.study.roots:
            known = ", ".join(f"{known}, {known}{SOURCE}" for known in self.study.roots)
            raise UserError(f"{stage}.teacher: expected one of {known}, {PARENT}, given {name!r}")
        return self._model(model, trained=not name.endswith(SOURCE))

    def _model(self, name: str, trained: bool) -> Node:
        """The node of a model: at the end of its own path if trained, else with its weights as they came."""
        return self.node(name, self.study.roots[name].stages if trained else ())

    def _finetuned_later(self, path: str) -> bool:
        """Whether any row goes on from this path to a fine-tuning."""
        later = {
            name for other in self.paths if other.startswith(f"{path}/") for name in other[len(path) + 1 :].split("/")
        }
        return any(issubclass(config.target(self._settings(name), name), Finetune) for name in later)

    def _data(self, effect: Effect) -> dict[str, Any]:
        splits = self.study.splits
        assert splits is not None
        read = splits.given(effect.reads_labels).content()
        return {"early_stopping": splits.metrics[0] if effect.reads_holdout else None, **read}


def _head(node: Node, task: Kind) -> str:
    """What is wrong with the head of the checkpoint that a path starts at, if it starts at one."""
    start = node.start
    if start.facts is None or start.root.inherit != "all":
        return ""
    head = f"whose head has the labels {', '.join(start.facts.labels)}" if start.facts.labels else "which has no head"
    if start.facts.labels and not task.takes_head(said := start.facts.config.problem_type):
        head += f" and, in its config.json, the problem_type {said or 'null'} instead of {task.problem_type}"
    return f" of {start.root.source}, {head}"


def _is_stage(name: str, node: Any) -> bool:
    """Whether a node of the configuration describes a stage, or may do so as its class cannot be found."""
    if not isinstance(node, dict) or "_target_" not in node:
        return False
    try:
        return name in config.STAGES or issubclass(config.target(node, name), Stage)
    except UserError:
        return True  # whoever uses it is told what is wrong


def _seed(seed: int, path: str) -> int:
    """A seed per (seed, path), so that a reused prefix changes nothing downstream; the same for all of a family."""
    plain = "/".join(stage.partition(FAMILY)[0] for stage in path.split("/"))
    return int(digest(f"{seed}/{plain}")[:8], 16)
