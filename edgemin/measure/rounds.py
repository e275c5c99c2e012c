"""The order in which variants are timed, and the summary of the times of all rounds."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from edgemin.medians import around_median

T = TypeVar("T")


class Cell(NamedTuple):
    """A size of batches: `batch` sentences of `length` tokens each."""

    batch: int
    length: int

    @property
    def form(self) -> str:
        """Its name as a form of input."""
        return f"{self.batch}x{self.length}"


class Turn(NamedTuple):
    """One variant's place in the plan: which inputs of which form it is timed on."""

    round: int  # from 0
    form: str  # "padded", "task", another task's name, or that of a cell
    name: str
    items: list[int]


class Timing(NamedTuple):
    """The result of a turn: the latency of each item, and energy and time of all items together."""

    turn: Turn
    latency_ms: list[float]
    joules: float
    seconds: float


@dataclass(frozen=True)
class Schedule:
    """The turns of all variants, round by round, for as many rounds as are asked for.

    In every round each variant has one turn on every form of input. The order is reversed from one round to the next
    and rotated after every two, so that no variant is always first or always follows the same one.

    Args:
        names: The variants.
        lengths: Tokens of each sentence, by form of input.
        rounds: How many rounds time every sentence once; the rounds after these time them again, in the same shares.
        runs: Padded inferences of each variant over these rounds.
    """

    names: Sequence[str]
    lengths: Mapping[str, Sequence[int]]
    rounds: int
    runs: int

    def turns(self, round_: int) -> list[Turn]:
        """The turns of a round on the padded input and on a share of each form's sentences.

        The sentences are dealt out by length like cards: all rounds get about the same lengths, so that their medians
        can be compared. Within a turn they come in random order, the same for every variant.
        """
        forms = {"padded": [0] * self._padded(round_)}
        for form, lengths in self.lengths.items():
            by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
            forms[form] = by_length[round_ % self.rounds :: self.rounds]
            random.Random(round_).shuffle(forms[form])
        return [
            Turn(round_, form, name, items) for form, items in forms.items() if items for name in self._order(round_)
        ]

    def grid_turns(self, round_: int, cells: Mapping[str, Sequence[Cell]]) -> list[Turn]:
        """The turns of a round on batches: in each about as many sentences as on the padded input, at least one batch.

        Args:
            round_: From 0.
            cells: Of each variant.
        """
        every = dict.fromkeys(cell for own in cells.values() for cell in own)
        padded = self._padded(round_)
        return [
            Turn(round_, cell.form, name, [0] * -(-padded // cell.batch))
            for cell in every
            for name in self._order(round_)
            if cell in cells[name]
        ]

    def _padded(self, round_: int) -> int:
        return len(range(round_ % self.rounds, self.runs, self.rounds))

    def _order(self, round_: int) -> list[str]:
        shift = round_ // 2 % len(self.names)
        order = [*self.names[shift:], *self.names[:shift]]
        return order[::-1] if round_ % 2 else order


def evenly_spaced(values: Sequence[T], count: int) -> list[T]:
    """At most `count` of the values, from the first on at equal distances."""
    count = min(count, len(values))
    return [values[index * len(values) // count] for index in range(count)]


def percentiles(latency_ms: Sequence[float]) -> dict[str, Any]:
    """Percentiles (linear between order statistics, as numpy has them), mean and number of some latencies."""
    p10, p50, p90, p95 = (float(value) for value in np.percentile(latency_ms, (10, 50, 90, 95)))
    mean = statistics.fmean(latency_ms)
    return {"p10": p10, "p50": p50, "p90": p90, "p95": p95, "mean": mean, "n": len(latency_ms)}


def spread(timings: Sequence[Timing], form: str) -> dict[str, float]:
    """How uncertain the rounds of each variant leave its speed relative to the others.

    Per variant, the medians of its rounds, each divided by their median over the rounds, and by what was
    common to all variants in that round. A machine that is slower for everybody during one round does not change a
    ratio of interleaved times and is divided out; a disturbance that hit one variant is not. "Common" is the (low)
    median over the variants, or nothing if there is only one. Percentiles over single inferences would not do: on a
    task's sentences they spread as widely as the sentences' lengths.

    Of these ratios the spread is the width of the interval that holds the true median with a probability of at least
    94 % ([`around_median`][edgemin.medians.around_median]). So further rounds make a disturbed one matter less.

    Args:
        timings: Of all variants and forms.
        form: The form to look at.

    Returns:
        0 for a variant whose rounds agree perfectly; 0.2 where its speed-up from one round differs by about
        20 % from that of another.
    """
    relative = {name: _relative(rounds) for name, rounds in round_medians(timings, form).items()}
    common = {round_: 1.0 for rounds in relative.values() for round_ in rounds}
    if len(relative) > 1:
        common = {round_: statistics.median_low(r[round_] for r in relative.values()) for round_ in common}
    apart = {name: around_median([r[round_] / common[round_] for round_ in r]) for name, r in relative.items()}
    return {name: values[-1] - values[0] for name, values in apart.items()}


def round_medians(timings: Sequence[Timing], form: str) -> dict[str, dict[int, float]]:
    """The median latency of each variant in each round that timed it on a form of input, in the order of rounds."""
    medians: dict[str, dict[int, float]] = {}
    for turn, latency_ms, _, _ in timings:
        if turn.form == form:
            medians.setdefault(turn.name, {})[turn.round] = statistics.median(latency_ms)
    return medians


def _relative(rounds: Mapping[int, float]) -> dict[int, float]:
    middle = statistics.median(rounds.values())
    return {round_: value / middle for round_, value in rounds.items()}
