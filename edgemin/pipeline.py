"""Executes a plan: makes every node that is not stored, then scores and measures the rows from what lies on disk."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import save
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from edgemin import artifact, checkpoint, encoder, ranks, roots
from edgemin.data import DataModule, Splits
from edgemin.digest import code_digest
from edgemin.errors import UserError
from edgemin.evaluate import evaluate
from edgemin.measure.cost import static_cost
from edgemin.measure.machine import host, machine_lock
from edgemin.measure.rounds import evenly_spaced
from edgemin.measure.runtime import Measure, measure
from edgemin.nodes import Node, Plan, Study
from edgemin.origin import git_revision, versions
from edgemin.progress import NodeProgress, live_line, node_line
from edgemin.stages import fitting
from edgemin.stages.base import Stage
from edgemin.starts import Start
from edgemin.store import Store, content_key, disk_errors, write_atomically
from edgemin.tracking import Tracker, TrackerLogger


@dataclass
class Done:
    """How a node came to be in this run."""

    path: str
    key: str
    teachers: list[str]
    cached: bool
    seconds: float | None = None
    steps: int | None = None


@dataclass
class Scored:
    """What is known of one artifact after scoring and measuring."""

    metrics: dict[str, dict[str, dict[str, float]]]
    cost: dict[str, Any]
    predictions: dict[str, Path]
    notes: list[str]


class Pipeline:
    """One job's execution.

    Of several processes the first decides, writes and scores; the others train along, each for its part of a batch.

    Args:
        study: what was asked for.
        plan: its nodes and rows.
        store: where results are kept.
        tracker: where losses go.
    """

    def __init__(self, study: Study, plan: Plan, store: Store, tracker: Tracker) -> None:
        self.study, self.plan, self.store, self.tracker = study, plan, store, tracker
        self._data: dict[str, DataModule] = {}

    # -- training ----------------------------------------------------------------------------------

    def train(self) -> list[Done]:
        """Make every node of the plan that the store does not have; a killed one goes on from its last checkpoint."""
        return [self._ensure(node) for node in self.plan.nodes]

    def _ensure(self, node: Node) -> Done:
        teachers = [teacher.path for teacher in node.teachers]
        with self._locked(node.key, node.path):
            if ranks.from_main(lambda: self._is_stored(node.key)):
                node_line(node.path, "cached", node.key)
                return Done(node.path, node.key, teachers, cached=True)
            model, tokenizer = ranks.together(lambda: self._start(node))
            fitted = fitting.Fitted(model, steps=0, seconds=0.0) if node.stage == "weights" else self._run(node, model)
            ranks.from_main(lambda: self._commit(node, fitted, tokenizer))
        for note in fitted.notes:
            node_line(node.path, "note", note)
        return Done(node.path, node.key, teachers, cached=False, seconds=round(fitted.seconds, 3), steps=fitted.steps)

    def _locked(self, key: str, path: str) -> AbstractContextManager[None]:
        """The lock that process 0 holds for all."""
        if not ranks.is_main():
            return nullcontext()
        return self.store.lock(key, lambda: node_line(path, "waiting", "another run computes it"))

    def _is_stored(self, key: str) -> bool:
        if not self.store.has(key):
            return False
        self.store.verify(key)
        return True

    def _commit(self, node: Node, fitted: fitting.Fitted, tokenizer: PreTrainedTokenizerBase | None) -> None:
        with self.store.commit(node.key) as directory:
            artifact.save(directory, fitted.model, tokenizer, self._provenance(node, fitted))

    def _start(self, node: Node) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
        """What a node begins with: its parent's result, or for a root the weights themselves."""
        if node.stage == "weights":
            return self._root(node)
        assert node.parent is not None
        return artifact.load(self.store.path(node.parent.key))

    def _root(self, node: Node) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
        node_line(node.path, "loading", node.start.root.source or "random weights")
        start, root = node.start, node.start.root
        if node.parent is not None:  # the model of the study that it is cut from
            model = artifact.load(self.store.path(node.parent.key))[0]
        elif start.facts is not None:
            try:
                model = checkpoint.load_checkpoint(start.facts, root.seed)
            except UserError as error:
                raise UserError(f"{start.name}.{error}") from error
        else:
            torch.manual_seed(root.seed)
            return encoder.build(start.config), start.tokenizer
        if start.own_labels and self.study.splits is not None:
            checkpoint.align_head(model, self.study.splits.labels)
        return roots.reshape(model, root), start.tokenizer

    def _run(self, node: Node, model: PreTrainedModel) -> fitting.Fitted:
        stage = node.build_stage()
        teachers = [artifact.load(self.store.path(teacher.key))[0] for teacher in node.teachers]
        alone = (
            machine_lock("training", lambda line: node_line(node.path, "waiting", line))
            if stage.trains and ranks.is_first_here()  # two of one run would wait for each other
            else nullcontext()
        )
        with disk_errors(self.store.root), alone:
            return fitting.run(
                stage,
                model,
                self._stage_data(node, stage),
                teachers,
                seed=node.seed,
                trainer=self.study.trainer,
                work=self.store.work(node.key),
                name=node.path,
                callbacks=[NodeProgress(node.path)],
                logger=lambda phase: TrackerLogger(
                    self.tracker, f"{node.path}/phase {phase + 1}" if len(stage.phases()) > 1 else node.path
                ),
            )

    def _stage_data(self, node: Node, stage: Stage) -> DataModule | None:
        """The data that a stage may see, in the tokens of its model and of its teachers."""
        tokenizer = node.start.tokenizer
        if tokenizer is None:
            return None
        if not stage.needs_task:
            return DataModule(None, tokenizer, self.store.root / ".tokens")
        own = self.data(node.start)
        theirs = [self.data(teacher.start) for teacher in node.teachers]
        if stage.same_tokens:
            # Of equal tokens those with segments, where a teacher reads them and the student does not.
            segmented = [module for module in theirs if module.has_segments]
            return segmented[0] if segmented and node.start.structure["token_types"] <= 1 else own
        if all(module is own for module in theirs):
            return own
        return DataModule(self.study.splits, tokenizer, own.cache, theirs)

    def data(self, start: Start) -> DataModule:
        """The task's data in the tokens of one root."""
        return self._module(self.study.splits, start)

    def _module(self, splits: Splits | None, start: Start) -> DataModule:
        assert splits is not None and start.tokenizer is not None
        name = f"{splits.task.name}/{id(start.tokenizer)}"
        if name not in self._data:
            self._data[name] = DataModule(splits, start.tokenizer, self.store.root / ".tokens")
        return self._data[name]

    def _provenance(self, node: Node, fitted: fitting.Fitted) -> dict[str, Any]:
        return {
            "path": node.path,
            "key": node.key,
            "content": node.content,
            "parent": node.parent.key if node.parent else None,
            "teachers": [teacher.key for teacher in node.teachers],
            "source": node.start.root.source,
            "head_trained": node.head_trained,
            "notes": fitted.notes,
            "seed": node.seed,
            "threads": torch.get_num_threads(),
            "host": host(),
            "versions": versions(),
            "git": git_revision(),
            "seconds": round(fitted.seconds, 3),
            "steps": fitted.steps,
        }

    # -- scoring and measuring ---------------------------------------------------------------------

    def score(self, transfer: Mapping[str, Splits], settings: Measure | None) -> dict[str, Scored]:
        """Reload every row's artifact, evaluate it, and measure all of them against each other; by key."""
        nodes = {row.node.key: row.node for row in self.plan.rows}
        length = settings.length if settings is not None else 128
        scored = {}
        for key, node in nodes.items():
            path = self.store.path(key)
            cached = _Lazy(path)
            metrics: dict[str, dict[str, dict[str, float]]] = {}
            predictions: dict[str, Path] = {}
            own = {self.study.splits.task.name: self.study.splits} if self.study.splits is not None else {}
            for name, splits in {**transfer, **own}.items():
                metrics[name] = {}
                for split in splits.evaluation:
                    metrics[name][split], predictions[f"{name}.{split}"] = self._evaluate(
                        node, cached, splits, split, name not in own
                    )
            cost = self._static(key, cached, length)
            scored[key] = Scored(metrics, cost, predictions, list(artifact.read_provenance(path)["notes"]))
        if settings is not None:
            for key, measured in self._measure(nodes, settings).items():
                scored[key].cost |= measured
        return scored

    def _evaluate(
        self, node: Node, cached: _Lazy, splits: Splits, split: str, transfer: bool
    ) -> tuple[dict[str, float], Path]:
        task = splits.task
        device = "cpu" if node.final else self.study.trainer.device
        content = {
            "artifact": node.key,
            "data": splits.fingerprint(split),
            "max_length": task.max_length,
            "metrics": list(task.metrics) if task.metrics else None,
            "transfer": transfer,
            "device": device,
            "code": code_digest("edgemin.evaluate", "edgemin.artifact"),
            "versions": {"torch": str(torch.__version__).partition("+")[0]},
        }
        key = content_key(content)
        predictions = self.store.root / ".results" / "evaluation" / f"{key}.safetensors"
        kept = self.store.result("evaluation", key)
        if kept is not None and predictions.is_file():
            return kept["metrics"], predictions
        encoded = self._module(splits, node.start).evaluation[split]
        with machine_lock("training"), live_line(f"{node.path}  evaluating  {task.name} {split}"):
            found = evaluate(
                cached.model,
                encoded,
                regression=task.regression,
                classes=len(splits.labels),
                device=device,
                metrics=task.metrics,
                transfer=transfer,
            )
        with disk_errors(self.store.root):
            predictions.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(predictions, save({"logits": found.logits, "labels": encoded.labels}))
        self.store.keep_result("evaluation", key, {"metrics": found.metrics, "content": content})
        return found.metrics, predictions

    def _static(self, key: str, cached: _Lazy, length: int) -> dict[str, Any]:
        name = content_key({"artifact": key, "length": length, "code": code_digest("edgemin.measure.cost")})
        kept = self.store.result("static", name)
        if kept is None:
            kept = dict(static_cost(cached.model, cached.path, length))
            self.store.keep_result("static", name, kept)
        return kept

    def _measure(self, nodes: Mapping[str, Node], settings: Measure) -> dict[str, dict[str, Any]]:
        splits = self.study.splits
        sentences: list[list[int]] = []
        if splits is not None:
            # The same sentences for all, in the student's tokens: what is deployed is the student.
            start = next((node.start for node in nodes.values() if node.start.name == "student"), None)
            encoded = next(iter(self.data(start or next(iter(nodes.values())).start).evaluation.values()))
            chosen = evenly_spaced(range(len(encoded)), settings.sentences)
            sentences = [encoded.sentence(index) for index in chosen]
        here = host()
        key = content_key(
            {
                "artifacts": sorted(nodes),
                "settings": {name: getattr(settings, name) for name in settings.__dataclass_fields__},
                "host": here["id"],
                "sentences": sentences,
                "code": code_digest("edgemin.measure.runtime", "edgemin.measure.worker", "edgemin.artifact"),
                "versions": {"torch": str(torch.__version__)},
            }
        )
        kept = self.store.result("measurement", key)
        if kept is not None:
            node_line("latency", "cached", key)
            return kept
        names = {key: self.store.path(key) for key in nodes}
        node_line("latency", "measuring", f"{len(nodes)} variants, each in its own process, in turns")
        with live_line("latency  measuring") as update:
            found = measure(
                names,
                sentences,
                settings,
                progress=lambda done, total, name: update(
                    f"latency  measuring  turn {done}/{total}  {nodes[name].path}"
                ),
                waiting=lambda line: node_line("latency", "waiting", line),
            )
        self.store.keep_result("measurement", key, found)
        return found


class _Lazy:
    """An artifact that is read from disk when something really has to run on it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._model: PreTrainedModel | None = None

    @property
    def model(self) -> PreTrainedModel:
        if self._model is None:
            self._model = artifact.load(self.path)[0]
        return self._model
