"""Scores and measures the rows of a plan, each from its artifact reloaded from disk, and judges what a stage cost.

Every result is kept in the store under what decides it, so that a job that is run again computes none of them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from edgemin import artifact
from edgemin.data.splits import Splits
from edgemin.evaluate import evaluate
from edgemin.measure.cost import static_cost
from edgemin.measure.rounds import evenly_spaced
from edgemin.measure.runtime import Measure
from edgemin.progress import live_line
from edgemin.store.artifacts import Store
from edgemin.store.content import content_key
from edgemin.store.digest import code_digest
from edgemin.store.provenance import releases
from edgemin.study import achieved, collapse, gate
from edgemin.study.exports import Lazy, machine, providers
from edgemin.study.nodes import STALE, Node, Plan, Study, StudyData
from edgemin.study.runtimes import Runtimes
from edgemin.tasks.base import Kind

log = logging.getLogger(__name__)

# What decides an evaluation, the kind of task and the providers of quantized layers apart.
EVALUATION_CODE = ("edgemin.evaluate", "edgemin.artifact")
GATE_CODE = ("edgemin.study.gate", "edgemin.artifact")


@dataclass
class Scored:
    """What is known of one artifact after scoring and measuring.

    Attributes:
        metrics: by task, split and name.
        cost: parameters, bytes, operations; latency and energy where they were measured.
        predictions: the file of logits and labels, by `<task>.<split>`.
        notes: what a reader of its row must know.
        findings: what its last stage found out besides the model.
        gate: the comparison with the model it was made from ([`compare`][edgemin.study.gate.compare]), where it was
            asked for.
        collapsed: by task and split, the one answer that it gives to all examples, where it does.
        trace: the file of torch's profiler, where `measure.profile` asked for it.
    """

    metrics: dict[str, dict[str, dict[str, float]]]
    cost: dict[str, Any]
    predictions: dict[str, Path]
    notes: list[str]
    findings: dict[str, Any]
    gate: dict[str, Any] | None
    collapsed: dict[str, dict[str, Any]]
    trace: Path | None = None


class Scoring:
    """Scores and measures the rows of one job; of several processes the first alone does.

    Args:
        study: what was asked for.
        plan: its rows.
        store: where artifacts and results are kept.
        data: the study's, in the tokens of its models.
    """

    def __init__(self, study: Study, plan: Plan, store: Store, data: StudyData) -> None:
        self.study, self.plan, self.store, self.data = study, plan, store, data

    def rows(self, transfer: Mapping[str, Splits], settings: Measure | None) -> dict[str, Scored]:
        """Evaluate the artifact of every row, then measure all of them in turns.

        Args:
            transfer: further tasks to score them on, which they were not trained for, by name.
            settings: how to measure; `None` measures nothing.

        Returns:
            What was found, by the artifact's key.
        """
        nodes = {row.node.key: row.node for row in self.plan.rows}
        parents = self._parents()
        runtimes = Runtimes(self.study, self.store, self.data, settings) if settings is not None else None
        length = settings.length if settings is not None else 128
        scored = {}
        for key, node in nodes.items():
            path = self.store.path(key)
            cached = Lazy(path)
            metrics: dict[str, dict[str, dict[str, float]]] = {}
            collapsed: dict[str, dict[str, Any]] = {}
            predictions: dict[str, Path] = {}
            own = {self.study.splits.task.name: self.study.splits} if self.study.splits is not None else {}
            for name, splits in {**transfer, **own}.items():
                metrics[name] = {}
                for split in splits.evaluation:
                    metrics[name][split], answers = self._evaluate(node, cached, splits, split, name not in own)
                    predictions[f"{name}.{split}"] = answers
                    if (found := collapse.of_predictions(splits, answers)) is not None:
                        collapsed.setdefault(name, {})[split] = found
            cost = self._static(node, cached, length)
            provenance = artifact.read_provenance(path)
            notes = [*provenance["notes"], *_warned(node, {**transfer, **own}, metrics, collapsed)]
            notes += [STALE] if metrics and node.head_stale else []
            judged = self._gate(node, parents[key], cached, notes)
            if runtimes is not None:
                notes += runtimes.note(node)
                costs, answers_there = runtimes.scored(node, cached, self._first(predictions))
                cost["runtimes"] |= costs
                predictions |= answers_there
            scored[key] = Scored(metrics, cost, predictions, notes, provenance["findings"], judged, collapsed)
        if runtimes is not None:
            measured = runtimes.measured(nodes, transfer)
            for key, costs in measured.costs.items():
                scored[key].trace = measured.traces.get(key)
                for name, cost in costs.items():
                    scored[key].cost["runtimes"][name] |= cost
        for key, node in nodes.items():
            self._set_beside(node, scored[key])
        return scored

    def _set_beside(self, node: Node, scored: Scored) -> None:
        """Set what was measured beside the latency that was asked for, where both are of the same precision."""
        target = achieved.asked(node, self.store)
        found = None if target is None else achieved.beside(target, scored.cost["runtimes"])
        if target is None or found is None:
            return
        if achieved.precision(Lazy(self.store.path(node.key)).model) == target["precision"]:
            scored.notes.append(found[0])
            scored.findings = {**scored.findings, "achieved": found[1]}

    def _first(self, predictions: Mapping[str, Path]) -> Path | None:
        """The file of answers on the task's first split."""
        splits = self.study.splits
        return None if splits is None else predictions[f"{splits.task.name}.{next(iter(splits.evaluation))}"]

    def _evaluate(
        self, node: Node, cached: Lazy, splits: Splits, split: str, transfer: bool
    ) -> tuple[dict[str, float], Path]:
        task = splits.task
        device = "cpu" if node.final else self.study.trainer.device
        content = {
            "artifact": node.key,
            "data": splits.fingerprint(split),
            "max_length": task.max_length,
            "metrics": list(splits.metrics),
            "transfer": transfer,
            "device": device,
            "code": code_digest(*EVALUATION_CODE, splits.kind.module, *providers(node)),
            "versions": releases("torch"),
        }
        key = content_key(content)
        name = f"evaluation/{key}.safetensors"
        predictions, kept = self.store.results.find(name), self.store.result("evaluation", key)
        if kept is not None and predictions is not None:
            return kept["metrics"], predictions
        encoded = self.data.of(node, splits).evaluation[split]
        with machine(node), live_line(f"{node.path}  evaluating on {task.name} {split}"):
            found = evaluate(
                cached.model,
                encoded,
                splits.kind,
                len(splits.labels),
                splits.metrics,
                device=device,
                transfer=transfer,
            )
        logits = {"logits": found.logits, "labels": encoded.labels}
        predictions = self.store.results.keep(name, lambda path: save_file(logits, path))
        self.store.keep_result("evaluation", key, {"metrics": found.metrics, "content": content})
        return found.metrics, predictions

    def _parents(self) -> dict[str, Node | None]:
        """What each row is judged against, by its key: the row it was made from, else what its stage was given."""
        found: dict[str, Node | None] = {}
        for index, row in enumerate(self.plan.rows):
            parent = self.plan.made_from(index)
            given = row.node.parent if row.node.step is not None else None
            found.setdefault(row.node.key, self.plan.rows[parent].node if parent is not None else given)
        return found

    def _gate(self, node: Node, parent: Node | None, cached: Lazy, notes: list[str]) -> dict[str, Any] | None:
        """What a row cost against the one it was made from.

        Where nothing can be said although both were trained on the task, the row's notes say why.
        """
        splits, allowed = self.study.splits, self.study.max_drop
        if allowed is None or splits is None or parent is None or not parent.head_trained or node.head_stale:
            return None
        if parent.head_stale:
            notes.append("no quality gate: the head of the model it was made from is not up to date")
            return None
        split = next(iter(splits.evaluation))
        before = Lazy(self.store.path(parent.key))
        _, answers = self._evaluate(node, cached, splits, split, transfer=False)
        _, answers_before = self._evaluate(parent, before, splits, split, transfer=False)
        kind, metric, kept = splits.kind, splits.metrics[0], load_file(answers)
        labels, outputs = torch.from_numpy(kept["labels"]), len(splits.labels)

        def scored(answers: gate.Answers, chosen: Any = ...) -> float:
            return kind.score(torch.from_numpy(answers), labels[chosen], [metric], outputs)[metric]

        compared = gate.compare(
            kind,
            scored,
            load_file(answers_before)["logits"],
            kept["logits"],
            allowed,
            collapsed=collapse.of_predictions(splits, answers) is not None,
            drawn=functools.partial(self._drawn, node, kind, metric, [answers_before.stem, answers.stem]),
        )
        if not compared["passed"] and _quantizes(node, parent):
            compared["worst"] = self._worst(node, parent, before, cached)
        where = {"parent": parent.path, "parent_artifact": parent.key, "task": splits.task.name, "split": split}
        return {**where, "metric": metric, **compared}

    def _drawn(
        self, node: Node, kind: Kind, metric: str, evaluations: list[str], draws: gate.Draws, *compared: Any
    ) -> Any:
        """`chance` or `interval` of two evaluations, which score a thousand times."""
        code = code_digest("edgemin.study.gate", kind.module)
        content = {"evaluations": evaluations, "metric": metric, "code": code, "versions": releases("torch")}
        key = content_key(content)
        name = draws.__name__
        kept = self.store.result(name, key)
        if kept is None:
            with live_line(f"{node.path}  comparing with what it was made from"):
                kept = {name: draws(*compared)}
            self.store.keep_result(name, key, kept)
        return kept[name]

    def _worst(self, node: Node, parent: Node, before: Lazy, after: Lazy) -> list[dict[str, Any]]:
        """The layers that do most damage, each alone in the place of the parent's."""
        splits = self.study.splits
        assert splits is not None
        split = next(iter(splits.evaluation))
        key = content_key(
            {
                "artifacts": [parent.key, node.key],
                "data": splits.fingerprint(split),
                "max_length": splits.task.max_length,
                "code": code_digest(*GATE_CODE, splits.kind.module, *providers(parent, node)),
                "versions": releases("torch"),
            }
        )
        kept = self.store.result("gate", key)
        if kept is None:
            encoded = self.data.of(node).evaluation[split]
            chosen = np.asarray(evenly_spaced(range(len(encoded)), gate.SENTENCES))
            batches = [encoded.batch(chosen[begin : begin + 64]) for begin in range(0, len(chosen), 64)]
            with machine(node), live_line(f"{node.path}  looking for the layers that do most damage"):
                kept = {"worst": gate.blame(before.model, after.model, batches, splits.kind)[: gate.NAMED]}
            self.store.keep_result("gate", key, kept)
        return list(kept["worst"])

    def _static(self, node: Node, cached: Lazy, length: int) -> dict[str, Any]:
        code = code_digest("edgemin.measure.cost", *providers(node))
        name = content_key({"artifact": node.key, "length": length, "code": code})
        kept = self.store.result("static", name)
        if kept is None:
            kept = dict(static_cost(cached.model, cached.path, length))
            self.store.keep_result("static", name, kept)
        return kept


def _quantizes(node: Node, parent: Node) -> bool:
    """Whether a stage that quantizes lies between the two, and both read the same tokens, so that layers compare."""
    if node.outline.tokenizer != parent.outline.tokenizer:
        return False
    stage: Node | None = node
    while stage is not None and stage is not parent:
        if stage.step is not None and stage.step.planned.quantizes is not None:
            return True
        stage = stage.parent
    return False


def _warned(
    node: Node,
    tasks: Mapping[str, Splits],
    metrics: Mapping[str, Mapping[str, Mapping[str, float]]],
    collapsed: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """Warn of a model that gives one answer to all of a task, and return that for its row; once a task."""
    said = []
    for name, found in collapsed.items():
        split, metric = next(iter(found)), tasks[name].metrics[0]
        said.append(collapse.sentence(found[split], metric, metrics[name][split][metric], f"{name} {split}"))
        log.warning("%s %s", node.path, said[-1])
    return said
