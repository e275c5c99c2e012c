"""The processes of one measurement: they start together, open their models one by one, and then take turns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgemin.measure.process import WorkerProcess
from edgemin.measure.rounds import Schedule, Timing, Turn, spread

Progress = Callable[[int, int, str], None]
"""Called after each step with (steps done, steps in all, what was done)."""


class Workers:
    """The processes that measure, one for each variant.

    Args:
        progress: told of every step.
        is_alone: whether nothing else runs on the machine at that moment.

    Attributes:
        ready: by variant, what its process answered when it had opened its model.
        alone: whether nothing else ran beside any step so far.
    """

    def __init__(self, progress: Progress, is_alone: Callable[[], bool]) -> None:
        self._processes: Mapping[str, WorkerProcess] = {}
        self.ready: dict[str, dict[str, Any]] = {}
        self.alone = is_alone()
        self._progress, self._is_alone = progress, is_alone
        self._done = self._expected = 0

    def _step(self, what: str) -> None:
        self.alone = self.alone and self._is_alone()
        self._done += 1
        self._progress(self._done, self._expected, what)

    def start(self, processes: Mapping[str, WorkerProcess], runtimes: Mapping[str, str], threads: int) -> None:
        """Has all processes load their runtimes at once, and waits for them.

        Args:
            processes: by variant, in the order in which they are asked.
            runtimes: by variant, the name of its runtime.
            threads: of each inference.
        """
        self._processes = processes
        self._expected += len(processes)  # the opening of each
        for name, process in processes.items():
            process.send({"name": runtimes[name], "threads": threads})
        for process in processes.values():
            process.answer()

    def open(self, name: str, setup: Mapping[str, Any]) -> None:
        """Has the process of a variant open its model, and waits for it.

        Args:
            name: the variant.
            setup: the arguments of [`Opened`][edgemin.measure.worker.Opened], as JSON.
        """
        self.ready[name] = self._processes[name].ask(setup)
        self._step(f"opening {name}")

    def ask_all(self, what: str) -> dict[str, dict[str, Any]]:
        """By variant, the answer of its process to a question without arguments, such as `memory`."""
        return {name: process.ask({what: {}}) for name, process in self._processes.items()}

    def take(self, turns: Sequence[Turn]) -> list[Timing]:
        """Has the processes take these turns, one after the other."""
        self._expected += len(turns)
        timings = []
        for turn in turns:
            answer = self._processes[turn.name].ask({"timed": {"form": turn.form, "items": turn.items}})
            timings.append(Timing(turn, **answer))
            self._step(f"timing {turn.name}")
        return timings

    def rounds(self, schedule: Schedule, forms: Collection[str], max_rounds: int, max_spread: float) -> list[Timing]:
        """The timings of all rounds, and of further ones for as long as the spread on any form of input is too wide."""
        timings = self.take([turn for round_ in range(schedule.rounds) for turn in schedule.turns(round_)])
        for round_ in range(schedule.rounds, max_rounds):
            if all(max(spread(timings, form).values()) <= max_spread for form in forms):
                break
            timings += self.take(schedule.turns(round_))
        return timings

    def profiles(self, traces: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
        """Has some variants profiled, each with the file that its trace is written to."""
        self._expected += len(traces)
        found = {}
        for name, trace in traces.items():
            found[name] = {"profile": self._processes[name].ask({"profile": {"trace": str(trace)}})}
            self._step(f"profiling {name}")
        return found
