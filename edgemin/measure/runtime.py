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
from typing import Annotated, Any, NamedTuple

from annotated_types import Ge

from edgemin.config import Checked, Count, NonNegative, Positive, Whole
from edgemin.deploy.runtime import check_installed, check_names
from edgemin.errors import UserError
from edgemin.measure.machine import WAIT_MINUTES, available_cores, machine_lock
from edgemin.measure.process import WorkerProcess
from edgemin.measure.rounds import Timing, evenly_spaced, schedule, spread, summary

OPENER = "edgemin.deploy.runtime.open_model"
BESIDE = "measured_beside_other_work"  # in a result: its times and energy are not those of a quiet machine

Progress = Callable[[int, int, str], None]


class Variant(NamedTuple):
    """A model in the runtime that it is measured in.

    Attributes:
        runtime: its name.
        path: the directory that the runtime opens.
        vocabulary: how many tokens the model knows.
        tokenizer: a file to be held in memory beside it; `None` where the runtime loads its own, or there is none.
    """

    runtime: str
    path: Path
    vocabulary: int
    tokenizer: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Measure(Checked):
    """How to measure; batch size 1 throughout.

    Args:
        runtimes: Where models are measured and, beside torch, also scored: names of
            [`RUNTIMES`][edgemin.deploy.runtime.RUNTIMES].
        length: Tokens of the padded input, and of the sentence whose operations are counted.
        warmup: Untimed inferences of each process on each form of input, before anything is timed.
        runs: Timed inferences of each variant on the padded input, over all rounds.
        rounds: Turns that each variant gets.
        sentences: At most so many of the task's sentences, evenly spaced, each timed once by each variant.
        threads: Threads of each inference; `None`: all physical cores that this process may use.
        watts: Power of one busy core where the processor's own counters (RAPL) cannot be read; 5 is about
            what servers' and laptops' processors are specified for. The result is marked as an estimate.
        wait_minutes: How long to wait for a machine on which EdgeMIN trains or measures; then it is measured beside
            that, flagged, and not kept for later jobs.
        max_spread: Largest spread of a variant's rounds (see [`spread`][edgemin.measure.rounds.spread])
            that still counts as stable: the median over five rounds that lie within 0.25 is good to about 5 %.

    Raises:
        UserError: A value out of range, a runtime that is not known or not installed.
    """

    runtimes: Sequence[str] = ("torch",)
    length: Count = 128
    warmup: Whole = 10
    runs: int = 100
    rounds: Annotated[int, Ge(2)] = 5  # a single one could not tell whether the machine is stable
    sentences: Whole = 100
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
        if self.runs < self.rounds:
            raise UserError(f"runs: expected a whole number of at least {self.rounds}, as rounds, given {self.runs}")

    @property
    def content(self) -> dict[str, Any]:
        """The settings that decide the numbers, for the key they are kept under."""
        return {name: value for name, value in vars(self).items() if name != "wait_minutes"}


def measure(
    variants: Mapping[str, Variant],
    sentences: Sequence[Sequence[int]],
    settings: Measure,
    *,
    progress: Progress | None = None,
    waiting: Callable[[str], None] | None = None,
    opener: str = OPENER,
    lock_directory: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Measures variants against one another, alone on the machine if possible; it takes the machine's lock itself.

    Args:
        variants: What is measured, by the names that results are returned under.
        sentences: Token ids of the task's sentences, the same for all; none if there is no task.
        settings: How often, on which inputs and with how many threads.
        progress: Called after each turn with (turns done, turns in all, name of the variant).
        waiting: Called once with a line if something else uses the machine.
        opener: "module.function" that opens a variant, given the name of its runtime, its path and the threads.
        lock_directory: Of the machine's lock, if not the usual one.

    Returns:
        For each name what `cost.runtimes.<runtime>` in run.json has of the clock: `latency_ms` and `throughput_per_s`,
        each with `padded` and, if there are sentences, `task` (whose `length` is their mean); `peak_memory_bytes`,
        `runtime_memory_bytes`, `model_memory_bytes` (the steady resident set less what the runtime alone holds);
        `energy_mj` per padded inference, `power_w` and `energy_source`; `threads`; and, where other work ran beside the
        measurement, `BESIDE`: true.

    Raises:
        UserError: A process ended before it had answered; one line with its last words.
    """
    if not variants:
        return {}
    threads = settings.threads or available_cores()
    chosen = evenly_spaced(sentences, settings.sentences)
    setup = {
        "opener": opener,
        "threads": threads,
        "warmup": settings.warmup,
        "length": settings.length,
        "sentences": chosen,
        "watts": settings.watts,
    }
    lock = machine_lock("measuring", waiting, lock_directory, settings.wait_minutes)
    with lock as is_alone, ExitStack() as processes:
        workers = {name: processes.enter_context(WorkerProcess(name, threads)) for name in variants}
        for name, worker in workers.items():
            worker.send({**_told(variants[name]), **setup})  # they load side by side
        ready = {name: worker.answer() for name, worker in workers.items()}
        timings, alone = _take_turns(workers, [len(sentence) for sentence in chosen], settings, progress, is_alone)
        memory = {name: worker.ask({"form": None}) for name, worker in workers.items()}
    lengths: dict[str, float] = {"padded": settings.length}
    if chosen:
        lengths["task"] = statistics.fmean(map(len, chosen))
    timed = _results(timings, lengths, settings.max_spread)
    flag = {} if alone else {BESIDE: True}
    return {name: timed[name] | memory[name] | ready[name] | flag for name in variants}


def _told(variant: Variant) -> dict[str, Any]:
    """What a worker is told of its variant, as JSON has it."""
    paths = {"path": str(variant.path), "tokenizer": None if variant.tokenizer is None else str(variant.tokenizer)}
    return {**variant._asdict(), **paths}


def _take_turns(
    workers: Mapping[str, WorkerProcess],
    lengths: Sequence[int],
    settings: Measure,
    progress: Progress | None,
    is_alone: Callable[[], bool],
) -> tuple[list[Timing], bool]:
    """All timings, and whether nothing else ran beside any of them."""
    timings, alone = [], is_alone()
    plan = list(schedule(list(workers), lengths, settings.rounds, settings.runs))
    for number, turn in enumerate(plan, start=1):
        answer = workers[turn.name].ask({"form": turn.form, "items": turn.items})
        timings.append(Timing(turn, **answer))
        alone = alone and is_alone()
        if progress is not None:
            progress(number, len(plan), turn.name)
    return timings, alone


def _results(timings: Sequence[Timing], lengths: Mapping[str, float], max_spread: float) -> dict[str, dict[str, Any]]:
    spreads = {form: spread(timings, form) for form in lengths}
    results = {}
    for name in spreads["padded"]:
        own = {form: [t for t in timings if (t.turn.name, t.turn.form) == (name, form)] for form in lengths}
        latency: dict[str, Any] = {}
        for form, length in lengths.items():
            samples = [value for timing in own[form] for value in timing.latency_ms]
            width = spreads[form][name]
            judged = {"spread": width, "unstable": width > max_spread}
            latency[form] = {"length": length, **summary(samples), **judged}
        joules = sum(timing.joules for timing in own["padded"])
        results[name] = {
            "latency_ms": latency,
            "throughput_per_s": {form: 1000 / values["mean"] for form, values in latency.items()},
            "energy_mj": 1000 * joules / latency["padded"]["n"],
            "power_w": joules / sum(timing.seconds for timing in own["padded"]),
        }
    return results
