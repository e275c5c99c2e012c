"""Rows in the runtimes that serve them: exported where the runtime needs it, scored and measured there.

Every result is kept in the store under what decides it, so that a job that is run again computes none of them.
"""

from __future__ import annotations

import functools
import logging
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.numpy import load_file, save_file

from edgemin import artifact
from edgemin.data.splits import Splits
from edgemin.deploy.runtime import ARTIFACT, RUNTIMES, open_model, versions
from edgemin.deploy.scored import score
from edgemin.encoder import structure_file
from edgemin.errors import UserError
from edgemin.measure.cost import RUNTIME
from edgemin.measure.machine import available_cores, host
from edgemin.measure.rounds import evenly_spaced
from edgemin.measure.runtime import BESIDE, PROFILED, Measure, Variant, measure
from edgemin.progress import live_line, node_line
from edgemin.store.artifacts import Store
from edgemin.store.content import content_key
from edgemin.store.digest import code_digest
from edgemin.study.exports import EXPORT_CODE, Exported, Exports, Lazy, machine, providers
from edgemin.study.nodes import Node, Study, StudyData

log = logging.getLogger(__name__)

# What decides a score in a runtime and a measurement, beside the runtime's own module, the kind of task and the
# providers of quantized layers.
SCORE_CODE = ("edgemin.deploy.scored", *EXPORT_CODE)
MEASURE_CODE = ("edgemin.measure.runtime", "edgemin.measure.worker", "edgemin.measure.profiling", "edgemin.artifact")
_TOKENIZER = "tokenizer.json"


def _trace(measurement: str, artifact: str) -> str:
    return f"measurement/{measurement}/{artifact}.json.gz"


def check_lengths(settings: Measure, nodes: Iterable[Node]) -> None:
    """Refuse to measure on more tokens than a model takes.

    Raises:
        UserError: names the model.
    """
    for node in nodes:
        limit = node.outline.max_tokens
        if limit is not None and settings.length > limit:
            raise UserError(
                f"measure.length: expected at most {limit}, what {node.path} takes, given {settings.length}"
            )


class Measured(NamedTuple):
    """What was measured of rows, by their keys.

    Attributes:
        costs: by key and runtime.
        traces: of torch's profiler, where it was asked for.
    """

    costs: dict[str, dict[str, dict[str, Any]]]
    traces: dict[str, Path]


class Runtimes:
    """The rows of one job in their runtimes.

    Args:
        study: what was asked for.
        store: where artifacts and results are kept.
        data: the study's, in the tokens of its models.
        settings: which runtimes, and how to measure in them.
    """

    def __init__(self, study: Study, store: Store, data: StudyData, settings: Measure) -> None:
        self.study, self.store, self.data, self.settings = study, store, data, settings
        self.exports = Exports(store, settings.runtimes)
        self.others = [name for name in settings.runtimes if name != RUNTIME]

    def note(self, node: Node) -> list[str]:
        """Notes for a row that say where it was not measured, and why."""
        notes = []
        if node.final and self.others:
            notes.append(f"not in {' and '.join(self.others)}: torch's dynamic INT8 runs in torch alone")
        limit, settings = node.outline.max_tokens, self.settings
        if limit is not None and settings.batch_sizes and (over := [n for n in settings.lengths if n > limit]):
            notes.append(f"no batches of {', '.join(map(str, over))} tokens: it takes at most {limit}")
        return notes

    def scored(
        self, node: Node, cached: Lazy, answers: Path | None
    ) -> tuple[dict[str, dict[str, Any]], dict[str, Path]]:
        """Score a row in every runtime but torch on the first split, exported for those that open no artifact.

        Args:
            node: of the row.
            cached: its artifact.
            answers: torch's on that split; `None` without data.

        Returns:
            By runtime its part of the cost, without what is measured; and files of predictions, by
            `<task>.<split>.<runtime>`.

        Raises:
            UserError: a model that cannot be exported.
        """
        costs: dict[str, dict[str, Any]] = {}
        predictions: dict[str, Path] = {}
        for runtime in self._runtimes(node):
            if runtime != RUNTIME:
                exported = self.exports.of(node, cached, runtime)
                costs[runtime] = {"size_bytes": exported.size_bytes}
                if answers is not None:
                    found, name, file = self._score(node, exported, runtime, answers)
                    costs[runtime] |= found
                    predictions[name] = file
        return costs, predictions

    def _runtimes(self, node: Node) -> list[str]:
        return [name for name in self.settings.runtimes if name == RUNTIME or not node.final]

    def _score(self, node: Node, exported: Exported, runtime: str, answers: Path) -> tuple[dict[str, Any], str, Path]:
        splits = self.study.splits
        assert splits is not None
        kind, task, split = splits.kind, splits.task, next(iter(splits.evaluation))
        content = {
            "artifact": node.key,
            "runtime": runtime,
            "data": splits.fingerprint(split),
            "max_length": task.max_length,
            "metrics": list(splits.metrics),
            "host": host()["id"],  # the instructions that it has decide how integers are added up
            "code": code_digest(*SCORE_CODE, RUNTIMES[runtime].module, kind.module, *providers(node)),
            "versions": versions(runtime),
        }
        key = content_key(content)
        name = f"evaluation/{key}.safetensors"
        file, kept = self.store.results.find(name), self.store.result("evaluation", key)
        if kept is None or file is None:
            encoded = self.data.of(node).evaluation[split]
            with machine(node), live_line(f"{node.path}  evaluating on {task.name} {split} in {runtime}"):
                opened = open_model(runtime, exported.path, self.settings.threads or available_cores())
                found = score(opened, encoded, kind, len(splits.labels), splits.metrics)
                opened.release()
            logits = {"logits": found.logits, "labels": encoded.labels}
            file = self.store.results.keep(name, functools.partial(save_file, logits))
            kept = {"metrics": found.metrics, "content": content}
            self.store.keep_result("evaluation", key, kept)
        mine, theirs = (torch.from_numpy(load_file(one)["logits"]) for one in (answers, file))
        flips = kind.flips(mine, theirs)
        compared = {
            "metrics": {task.name: {split: kept["metrics"]}},
            "largest_difference": float((mine - theirs).abs().max()),
            **({} if flips is None else {"agreement": 1 - flips / len(mine)}),
        }
        return compared, f"{task.name}.{split}.{runtime}", file

    # -- measuring ---------------------------------------------------------------------------------

    def measured(self, nodes: Mapping[str, Node], transfer: Mapping[str, Splits]) -> Measured:
        """Measure rows in their runtimes in turns, all against one another.

        Args:
            nodes: of the rows, by their keys.
            transfer: further tasks that they are scored on, and timed on the sentences of, by name.
        """
        here, settings, own = host(), self.settings, self.study.splits
        sentences = self._sentences(nodes, own) if own is not None else []
        further = {name: self._sentences(nodes, splits) for name, splits in transfer.items()}
        runtimes = {name for node in nodes.values() for name in self._runtimes(node)}
        code = [RUNTIMES[name].module for name in sorted(runtimes)]
        code += EXPORT_CODE if runtimes - {RUNTIME} else ()
        key = content_key(
            {
                "artifacts": sorted(nodes),
                "settings": settings.content,
                "host": here["id"],
                "sentences": sentences,
                "transfer": further,
                "code": code_digest(*MEASURE_CODE, *code, *providers(*nodes.values())),
                "versions": {name: versions(name) for name in sorted(runtimes)},
            }
        )
        profiled = list(nodes) if settings.profile else []
        kept = self.store.result("measurement", key)
        traces = {of: self.store.results.find(_trace(key, of)) for of in profiled} if kept is not None else {}
        whole = {of: trace for of, trace in traces.items() if trace is not None}
        if kept is not None and len(whole) == len(profiled):
            node_line("latency", "cached", key)
            return Measured(kept, whole)
        places = {f"{node.path} ({name})": (key, name) for key, node in nodes.items() for name in self._runtimes(node)}
        variants = {title: self._variant(nodes[key], name, transfer) for title, (key, name) in places.items()}
        node_line("latency", "measuring", f"{len(variants)} variants, each in its own process, in turns")
        with live_line("latency  measuring") as line:

            def progress(done: int, total: int, what: str) -> None:
                line.text, line.done, line.total = f"latency  {what}  step", done, total

            def waits(reason: str) -> None:
                node_line("latency", "waiting", reason)
                line.text = f"latency  waiting  {reason}"

            with tempfile.TemporaryDirectory() as directory:
                made = {of: Path(directory) / of for of in profiled}
                looked_into = {
                    title: made[of] for title, (of, name) in places.items() if of in made and name == PROFILED
                }
                timed = measure(
                    *(variants, sentences, settings),
                    transfer=further,
                    traces=looked_into,
                    progress=progress,
                    waiting=waits,
                )
                for of, trace in made.items():
                    whole[of] = self.store.results.keep(_trace(key, of), functools.partial(shutil.copyfile, trace))
        found: dict[str, dict[str, dict[str, Any]]] = {key: {} for key in nodes}
        for title, (of, name) in places.items():
            found[of][name] = timed[title]
        if any(cost.get(BESIDE) for cost in timed.values()):
            log.warning("latency: measured beside other work on the machine: flagged, and not kept for later jobs")
        else:
            self.store.keep_result("measurement", key, found)
        return Measured(found, whole)

    def _sentences(self, nodes: Mapping[str, Node], splits: Splits) -> list[list[int]]:
        """The same sentences for all, of a task's first split in the student's tokens: the student is deployed.

        Only where a stage has changed the tokenizer, which changes how many tokens there are, a row reads its own.
        """
        readers = [node for node in nodes.values() if node.tokens is None] or list(nodes.values())
        node = next((node for node in readers if node.start.name == "student"), readers[0])
        encoded = next(iter(self.data.of(node, splits).evaluation.values()))
        return [encoded.sentence(index) for index in evenly_spaced(range(len(encoded)), self.settings.sentences)]

    def _variant(self, node: Node, runtime: str, transfer: Mapping[str, Splits]) -> Variant:
        path = self.store.path(node.key)
        vocabulary = structure_file.read_outline(path / artifact.STRUCTURE).vocabulary
        own, others = None, {}
        if node.tokens is not None and self.study.splits is not None:
            own = self._sentences({node.key: node}, self.study.splits)
            others = {name: self._sentences({node.key: node}, splits) for name, splits in transfer.items()}
        assert vocabulary is not None, "a stored model's is known"
        held = None
        if RUNTIMES[runtime].form != ARTIFACT:
            tokenizer = path / _TOKENIZER
            held = tokenizer if tokenizer.is_file() else None
            path = self.exports.of(node, Lazy(path), runtime).path
        return Variant(runtime, path, vocabulary, held, node.outline.max_tokens, own, others)
