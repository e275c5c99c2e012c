"""Executes a plan: every node that the store does not hold is computed and stored, parents and teachers first."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from edgemin import artifact, checkpoint
from edgemin.data.module import DataModule
from edgemin.encoder import building, quantized
from edgemin.errors import SharedError, UserError
from edgemin.measure.machine import host, machine_lock
from edgemin.processes import ranks, stopping
from edgemin.progress import NodeProgress, duration, live_line, node_line
from edgemin.store.artifacts import Store
from edgemin.store.disk import disk_errors
from edgemin.store.provenance import git_revision, versions
from edgemin.study import roots
from edgemin.study.family import FAMILY
from edgemin.study.nodes import Node, Plan, Study, StudyData
from edgemin.tracking import CSV_NAME, Tracker, read_points, write_points
from edgemin.training import fitting
from edgemin.training.stage import Stage


@dataclass
class Done:
    """What a job did about one node, for `run.json`: found it in the store (`cached`), or trained it."""

    path: str
    key: str
    teachers: list[str]
    cached: bool
    seconds: float | None = None
    steps: int | None = None


class Pipeline:
    """Computes and stores what one job needs.

    Of several processes the first decides and writes; the others train along, each for its part of a batch.

    Args:
        study: what was asked for.
        plan: its nodes and rows.
        store: where results are kept.
        tracker: where losses go.
    """

    def __init__(self, study: Study, plan: Plan, store: Store, tracker: Tracker) -> None:
        self.study, self.plan, self.store, self.tracker = study, plan, store, tracker
        self.data = StudyData(study, store)

    # -- training ----------------------------------------------------------------------------------

    def train(self) -> list[Done]:
        """Compute every node of the plan that is not stored; one that was interrupted goes on from its checkpoint.

        A node that is stored is compared with its checksums, and its training curves are sent to the tracker again.
        """
        return [self._ensure(node) for node in self.plan.nodes]

    def _ensure(self, node: Node) -> Done:
        stopping.check()
        teachers = [teacher.path for teacher in node.teachers]
        if self._is_cached(node):  # without the lock: a store that is only read takes none
            return Done(node.path, node.key, teachers, cached=True)
        with ExitStack() as held:
            with live_line(f"{node.path}  waiting for its turn"):
                held.enter_context(self._locked(node.key, node.path))
            if self._is_cached(node):  # another run was faster
                return Done(node.path, node.key, teachers, cached=True)
            with live_line(f"{node.path}  loading"):
                fitted, tokenizer = ranks.together(lambda: self._start(node))
            if node.step is not None:
                fitted = self._run(node, fitted)
            with live_line(f"{node.path}  saving"):
                ranks.from_main(lambda: self._commit(node, fitted, tokenizer))
        if node.step is not None and fitted.steps == 0:  # what trains says so itself
            node_line(node.path, "done", duration(fitted.seconds))
        for note in fitted.notes:
            node_line(node.path, "note", note)
        return Done(node.path, node.key, teachers, cached=False, seconds=round(fitted.seconds, 3), steps=fitted.steps)

    def _locked(self, key: str, path: str) -> AbstractContextManager[None]:
        """The lock that process 0 holds for all."""
        if not ranks.is_main():
            return nullcontext()
        return self.store.lock(key, lambda: node_line(path, "waiting", "another run computes it"))

    def _is_cached(self, node: Node) -> bool:
        if not ranks.from_main(lambda: self._is_stored(node.key)):
            return False
        node_line(node.path, "cached", node.key)
        ranks.from_main(lambda: self._replay(node.key))
        return True

    def _is_stored(self, key: str) -> bool:
        if not self.store.has(key):
            return False
        with live_line(f"{key}  comparing with its checksums"):
            self.store.verify(key)
        return True

    def _replay(self, key: str) -> None:
        """The training curves of a stage that was trained before."""
        path = self.store.path(key) / CSV_NAME
        if path.is_file():
            for stage, step, metrics in read_points(path):
                self.tracker.log(stage, metrics, step)

    def _commit(self, node: Node, fitted: fitting.Fitted, tokenizer: PreTrainedTokenizerBase | None) -> None:
        with self.store.commit(node.key) as directory:
            if fitted.tokenizer is not None:
                tokenizer = fitted.tokenizer
            artifact.save(directory, fitted.model, tokenizer, self._provenance(node, fitted), fitted.state)
            artifact.save_scores(directory, fitted.scores)
            if fitted.points:
                write_points(directory / CSV_NAME, fitted.points)

    def _start(self, node: Node) -> tuple[fitting.Fitted, PreTrainedTokenizerBase | None]:
        """What a node begins with: its parent's result, or for a root the weights themselves."""
        if node.step is None:
            return self._root(node)
        assert node.parent is not None
        path = self.store.path(node.parent.key)
        model, tokenizer = artifact.load(path)
        return fitting.Fitted(model, 0, 0.0, state=artifact.load_training_state(path)), tokenizer

    def _root(self, node: Node) -> tuple[fitting.Fitted, PreTrainedTokenizerBase | None]:
        node_line(node.path, "loading", node.start.root.source or "random weights")
        model = self._weights(node)
        start, root, tokenizer = node.start, node.start.root, self.data.tokenizer(node)
        fitted = fitting.Fitted(model, steps=0, seconds=0.0)
        if root.source is None:
            return fitted, tokenizer
        if start.latent:
            assert start.facts is not None
            quantized.take_up(model, artifact.load_training_state(start.facts.directory))
        if start.own_labels and self.study.splits is not None:
            checkpoint.align_head(model, self.study.splits.labels, self.study.splits.kind.problem_type)
        fitted.model = roots.reshape(model, root)
        if start.latent:
            fitted.notes.append(f"goes on from the latent weights of {root.source}")
            fitted.state = {name: tensor.clone() for name, tensor in quantized.latents(fitted.model).items()}
            quantized.settle(fitted.model)
        return fitted, tokenizer

    def _weights(self, node: Node) -> PreTrainedModel:
        start, root = node.start, node.start.root
        if node.parent is not None:  # the model of the study that it is cut from
            return artifact.load(self.store.path(node.parent.key))[0]
        if start.facts is not None:
            try:
                return checkpoint.load_checkpoint(start.facts, root.seed)
            except UserError as error:
                raise UserError(f"{start.name}.source: {error}") from error
        torch.manual_seed(root.seed)
        return building.build(start.config)

    def _run(self, node: Node, given: fitting.Fitted) -> fitting.Fitted:
        assert node.step is not None
        stage = copy.deepcopy(node.step)  # what it is given while it runs is not kept with the plan
        teachers = [artifact.load(self.store.path(teacher.key))[0] for teacher in node.teachers]
        alone: AbstractContextManager[object] = (
            machine_lock("training", lambda line: node_line(node.path, "waiting", line))
            if stage.planned.steps and ranks.is_first_here()  # two of one run would wait for each other
            else nullcontext()
        )
        with disk_errors(self.store.root), _keyed(node), ExitStack() as held:
            with live_line(f"{node.path}  waiting for the machine"):
                held.enter_context(alone)
            return fitting.run(
                stage,
                given.model,
                self._stage_data(node, stage),
                teachers,
                seed=node.seed,
                trainer=self.study.trainer,
                work=self.store.work(node.key),
                name=node.path,
                callbacks=[NodeProgress()],
                send=self.tracker.log,
                inherited=given.state,
            )

    def _stage_data(self, node: Node, stage: Stage) -> DataModule | None:
        """The data that a stage may see, in the tokens of the model that it is given and of its teachers."""
        assert node.parent is not None
        tokenizer = self.data.tokenizer(node.parent)
        if tokenizer is None:
            return None
        if not stage.planned.reads_task:
            return DataModule(None, tokenizer, self.store.tokens)
        assert self.study.splits is not None
        splits = self.study.splits.given(stage.planned.reads_labels)
        own = self.data.of(node.parent, splits)
        theirs = [self.data.of(teacher, splits) for teacher in node.teachers]
        if stage.planned.same_tokens:
            # Of equal tokens those with segments, where a teacher reads them and the student does not.
            segmented = [module for module in theirs if module.has_segments]
            return segmented[0] if segmented and node.start.outline.token_types <= 1 else own
        if all(module is own for module in theirs):
            return own
        return DataModule(splits, tokenizer, own.cache, theirs)

    def _provenance(self, node: Node, fitted: fitting.Fitted) -> dict[str, Any]:
        task = self.study.task
        return {
            "path": node.path,
            "key": node.key,
            "content": node.content,
            "parent": node.parent.key if node.parent else None,
            "teachers": [teacher.key for teacher in node.teachers],
            "source": node.start.root.source,
            "task": {**asdict(task), "path": _place(task.path)},
            "head_trained": node.head_trained,
            "notes": fitted.notes,
            "findings": fitted.findings,
            "seed": node.seed,
            "threads": torch.get_num_threads(),
            "host": host(),
            "versions": versions(),
            "git": git_revision(),
            "seconds": round(fitted.seconds, 3),
            "steps": fitted.steps,
        }


@contextmanager
def _keyed(node: Node) -> Iterator[None]:
    """Put the stage's name in front of a setting of its own that it refuses while it runs, as planning does."""
    try:
        yield
    except UserError as error:
        first, *others = error.args
        if first.partition(":")[0].partition(".")[0] not in node.settings:
            raise
        kind = SharedError if isinstance(error, SharedError) else UserError
        raise kind(f"{node.stage.partition(FAMILY)[0]}.{first}", *others) from error


def _place(path: str | None) -> str | None:
    """Where data lies, for whoever reads it later from another directory; a Hub id stays what it is."""
    place = None if path is None else Path(path).expanduser()
    return str(place.resolve()) if place is not None and place.exists() else path
