"""Latency, memory and energy of several models in their runtimes, measured side by side.

Every variant, a model in a runtime, is measured in a process of its own, because whatever else a process holds changes
the numbers. The processes take turns in rounds, because machines drift within minutes: only ratios of interleaved times
can be trusted.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

from annotated_types import Ge

from edgemin.config import Checked, Count, NonNegative, Positive, Whole
from edgemin.deploy.runtime import check_installed, check_names
from edgemin.errors import UserError
from edgemin.measure.machine import WAIT_MINUTES, available_cores, machine_lock
from edgemin.measure.process import WorkerProcess
from edgemin.measure.rounds import Cell, Schedule, Turn, evenly_spaced
from edgemin.measure.summary import costs, grid, latencies
from edgemin.measure.workers import Progress, Workers

OPENER = "edgemin.deploy.runtime.open_model"
LENGTHS = (16, 32, 64, 128)
PROFILED = "torch"  # the runtime that can be looked into
BESIDE = "measured_beside_other_work"  # in a result: its times and energy are not those of a quiet machine

_CHUNK = 2**20


class Variant(NamedTuple):
    """A model in the runtime that it is measured in.

    Attributes:
        runtime: its name.
        path: the directory that the runtime opens.
        vocabulary: how many tokens the model knows.
        tokenizer: a file to be held in memory beside it; `None` where the runtime loads its own, or there is none.
        longest: tokens of the longest input that it takes; `None`: any.
        sentences: token ids of the task's sentences by a tokenizer of its own; `None`: those that all variants get.
        transfer: likewise of other tasks, by the task's name.
    """

    runtime: str
    path: Path
    vocabulary: int
    tokenizer: Path | None = None
    longest: int | None = None
    sentences: Sequence[Sequence[int]] | None = None
    transfer: Mapping[str, Sequence[Sequence[int]]] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Measure(Checked):
    """How to measure: single sentences, and batches where `batch_sizes` are given.

    Args:
        runtimes: Where models are measured and, beside torch, also scored: names of
            [`RUNTIMES`][edgemin.deploy.runtime.RUNTIMES].
        length: Tokens of the padded input, and of the sentence whose operations are counted.
        warmup: Untimed inferences of each process on each form of input, before anything is timed; unless it is 0, at
            least one of every length that the task's sentences have.
        runs: Timed inferences of each variant on the padded input, over `rounds` rounds.
        rounds: Turns that each variant gets at least.
        max_rounds: Turns that it gets at most: while any variant's spread is above `max_spread`, one more round of all
            is measured.
        sentences: At most so many of the task's sentences, evenly spaced, each timed once by each variant in `rounds`
            rounds; further rounds time them again.
        batch_sizes: Batches that are timed too, after the single sentences; none by default.
        lengths: Tokens of the sentences of these batches, each with each; a model that does not take so many is not
            timed on them.
        profile: Whether to look with torch's profiler into the `torch` runtime, after everything is timed.
        threads: Threads of each inference; `None`: all physical cores that this process may use.
        watts: Power of one busy core where the processor's own counters (RAPL) cannot be read; 5 is about
            what servers' and laptops' processors are specified for. The result is marked as an estimate.
        wait_minutes: How long to wait for a machine on which EdgeMIN trains or measures; then it is measured beside
            that, flagged, and not kept for later jobs.
        max_spread: Largest spread of a variant's rounds (see [`spread`][edgemin.measure.rounds.spread])
            that still counts as stable: the median over five rounds that lie within 0.25 is good to about 5 %.

    Raises:
        UserError: A value out of range, a runtime that is not known or not installed, settings that contradict.
    """

    runtimes: Sequence[str] = ("torch",)
    length: Count = 128
    warmup: Whole = 10
    runs: int = 100
    rounds: Annotated[int, Ge(2)] = 5  # a single one could not tell whether the machine is stable
    max_rounds: Count = 15
    sentences: Whole = 100
    batch_sizes: Sequence[Count] = ()
    lengths: Sequence[Count] = LENGTHS
    profile: bool = False
    threads: Count | None = None
    watts: Positive = 5.0
    max_spread: Positive = 0.25
    wait_minutes: NonNegative = WAIT_MINUTES

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names(self.runtimes, "runtimes")
        if not self.runtimes or len(set(self.runtimes)) < len(self.runtimes):
            raise UserError(f"runtimes: expected at least one runtime and each once, given {list(self.runtimes)}")
        check_installed(self.runtimes, "runtimes")
        for name in ("runs", "max_rounds"):
            if getattr(self, name) < self.rounds:
                least = f"a whole number of at least {self.rounds}, as rounds"
                raise UserError(f"{name}: expected {least}, given {getattr(self, name)}")
        self._check_grid()
        if self.profile and PROFILED not in self.runtimes:
            raise UserError(f"profile: expected {PROFILED} among runtimes, given true and {list(self.runtimes)}")

    def _check_grid(self) -> None:
        for name in ("batch_sizes", "lengths"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise UserError(f"{name}: expected each number once, given {list(given)}")
        if self.batch_sizes and not self.lengths:
            raise UserError("lengths: expected at least one length for the batch sizes, given []")
        if not self.batch_sizes and tuple(self.lengths) != LENGTHS:
            raise UserError(f"lengths: expected batch_sizes beside them, given {list(self.lengths)} and no batch size")

    def cells(self, longest: int | None) -> list[Cell]:
        """The batches that a model is timed on whose inputs have at most `longest` tokens; `None`: any number."""
        lengths = [length for length in self.lengths if longest is None or length <= longest]
        return [Cell(batch, length) for batch in self.batch_sizes for length in lengths]

    @property
    def content(self) -> dict[str, Any]:
        """The settings that decide the numbers, for the key they are kept under."""
        return {name: value for name, value in vars(self).items() if name != "wait_minutes"}


def measure(
    variants: Mapping[str, Variant],
    sentences: Sequence[Sequence[int]],
    settings: Measure,
    *,
    transfer: Mapping[str, Sequence[Sequence[int]]] = MappingProxyType({}),
    traces: Mapping[str, Path] | None = None,
    progress: Progress | None = None,
    waiting: Callable[[str], None] | None = None,
    opener: str = OPENER,
    lock_directory: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Measures variants against one another, alone on the machine if possible; it takes the machine's lock itself.

    The processes load their runtimes all at once, which takes seconds of each, then open their models one after the
    other, so that none disturbs another's loading, and then take turns.
    Memory is asked for when the task's single sentences are timed, and before those of other tasks and batches are,
    which may take more.

    Args:
        variants: What is measured, by the names that results are returned under.
        sentences: Token ids of the task's sentences, the same for all that have none of their own; none if there is no
            task.
        settings: How often, on which inputs and with how many threads.
        transfer: Likewise the sentences of other tasks, by the task's name.
        traces: Files for the profiler's traces, by the names of the variants to look into.
        progress: Called after each step with (steps done, steps in all, what was done).
        waiting: Called once with a line if something else uses the machine.
        opener: "module.function" that opens a variant, given the name of its runtime, its path and the threads.
        lock_directory: Of the machine's lock, if not the usual one.

    Returns:
        For each name what `cost.runtimes.<runtime>` in run.json has of the clock: `latency_ms` and `throughput_per_s`,
        each with `padded` and, if there are sentences, `task` (whose `length` is their mean); `latency_ms.transfer`
        by other tasks, if there are any; `grid`, if there are batch sizes; `cold_start_ms`; `peak_memory_bytes`,
        `runtime_memory_bytes`, `model_memory_bytes` (the steady resident set less what the runtime alone holds);
        `energy_mj` per padded inference, `power_w` and `energy_source`; `threads`; `profile`, where a trace was asked
        for, without the name of its file; and, where other work ran beside the measurement, `BESIDE`: true.

    Raises:
        UserError: A process ended before it had answered; one line with its last words.
    """
    if not variants:
        return {}
    threads = settings.threads or available_cores()
    inputs = _Inputs(variants, sentences, transfer, settings)
    setup = {
        "opener": opener,
        "threads": threads,
        "warmup": settings.warmup,
        "length": settings.length,
        "watts": settings.watts,
    }
    enough = settings.max_rounds, settings.max_spread
    lock = machine_lock("measuring", waiting, lock_directory, settings.wait_minutes)
    with lock as is_alone, ExitStack() as processes:
        workers = Workers(progress or (lambda *_: None), is_alone)
        started = {name: processes.enter_context(WorkerProcess(name, threads)) for name in variants}
        workers.start(started, {name: variant.runtime for name, variant in variants.items()}, threads)
        for name, variant in variants.items():
            _into_file_cache(variant.path)
            workers.open(name, {**_told(variant), **setup, **inputs.told(name)})
        timings = workers.rounds(inputs.single, inputs.forms, *enough)
        memory = workers.ask_all("memory")
        of_others = workers.rounds(inputs.further, inputs.other_tasks, *enough)
        batches = workers.take(inputs.batch_turns())
        profiles = workers.profiles(traces or {})
    timed = costs(timings, inputs.lengths(settings.length), settings.max_spread)
    for name, by_task in latencies(of_others, inputs.lengths_of_other_tasks(), settings.max_spread).items():
        timed[name]["latency_ms"]["transfer"] = by_task
    parts = (timed, grid(batches, inputs.cells), memory, workers.ready, profiles)
    flag = {} if workers.alone else {BESIDE: True}
    return {
        name: {key: value for part in parts for key, value in part.get(name, {}).items()} | flag for name in variants
    }


class _Inputs:
    """What variants are timed on besides the padded input: of each task's sentences as many as are asked for.

    Attributes:
        cells: by variant, the batches.
        single: the turns on the padded input and the task's sentences.
        forms: the forms of input of these turns.
        further: the turns on the sentences of other tasks.
        other_tasks: the names of those that have sentences.
    """

    def __init__(
        self,
        variants: Mapping[str, Variant],
        sentences: Sequence[Sequence[int]],
        transfer: Mapping[str, Sequence[Sequence[int]]],
        settings: Measure,
    ) -> None:
        names, most = list(variants), settings.sentences
        shared = evenly_spaced(sentences, most)
        others = {task: few for task, own in transfer.items() if (few := evenly_spaced(own, most))}
        self._of_task = {
            name: shared if variant.sentences is None else evenly_spaced(variant.sentences, most)
            for name, variant in variants.items()
        }
        self._of_others = {
            name: {task: evenly_spaced(variant.transfer.get(task, few), most) for task, few in others.items()}
            for name, variant in variants.items()
        }
        self.cells = {name: settings.cells(variant.longest) for name, variant in variants.items()}
        self.single = Schedule(names, {"task": list(map(len, shared))}, settings.rounds, settings.runs)
        self.forms = ["padded", "task"] if shared else ["padded"]
        self.further = Schedule(
            names, {task: list(map(len, own)) for task, own in others.items()}, settings.rounds, runs=0
        )
        self.other_tasks = list(others)

    def told(self, name: str) -> dict[str, Any]:
        """What a worker's set-up says of its variant's inputs, as JSON."""
        grid = {cell.form: cell for cell in self.cells[name]}
        return {"sentences": self._of_task[name], "further": self._of_others[name], "grid": grid}

    def batch_turns(self) -> list[Turn]:
        """The turns of all rounds on batches."""
        return [turn for round_ in range(self.single.rounds) for turn in self.single.grid_turns(round_, self.cells)]

    def lengths(self, padded: int) -> dict[str, dict[str, float]]:
        """By variant, the length of the padded input and the mean one of its sentences of the task, if it has any."""
        return {
            name: {"padded": padded, **({"task": _mean_length(own)} if "task" in self.forms else {})}
            for name, own in self._of_task.items()
        }

    def lengths_of_other_tasks(self) -> dict[str, dict[str, float]]:
        """By variant and other task, the mean length of its sentences."""
        return {
            name: {task: _mean_length(own) for task, own in by_task.items()}
            for name, by_task in self._of_others.items()
        }


def _mean_length(sentences: Sequence[Sequence[int]]) -> float:
    return statistics.fmean(map(len, sentences))


def _told(variant: Variant) -> dict[str, Any]:
    """What a worker's set-up says of its variant, as JSON."""
    tokenizer = None if variant.tokenizer is None else str(variant.tokenizer)
    return {
        "runtime": variant.runtime,
        "path": str(variant.path),
        "vocabulary": variant.vocabulary,
        "tokenizer": tokenizer,
    }


def _into_file_cache(path: Path) -> None:
    """Reads a model's files, so that how long it takes to load does not depend on whether that was done before."""
    for file in path.iterdir():
        if file.is_file():
            with file.open("rb", buffering=0) as opened:
                while opened.read(_CHUNK):
                    pass
