"""The order in which variants are timed, and the summary of the times of all rounds."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")


class Turn(NamedTuple):
    """One variant's place in the plan: which inputs of which form it is timed on."""

    round: int  # from 0
    form: str  # "padded" or "task"
    name: str
    items: list[int]


class Timing(NamedTuple):
    """The result of a turn: the latency of each item, and energy and time of all items together."""

    turn: Turn
    latency_ms: list[float]
    joules: float
    seconds: float


def schedule(names: Sequence[str], lengths: Sequence[int], rounds: int, runs: int) -> Iterator[Turn]:
    """Plans the turns of all variants.

    In every round each variant has one turn on the padded input and one on its share of the sentences. The
    order is reversed from one round to the next and rotated after every two, so that no variant is always first
    or always follows the same one. The sentences are dealt out by length like cards: all rounds get
    about the same lengths, so that their medians can be compared. Within a turn they come in random order,
    the same for every variant.

    Args:
        names: The variants.
        lengths: Tokens of each sentence; none if there is no task.
        rounds: How many.
        runs: Padded inferences of each variant over all rounds.

    Yields:
        Turns in their order.
    """
    by_length = sorted(range(len(lengths)), key=lambda index: lengths[index])
    for round_ in range(rounds):
        shift = round_ // 2 % len(names)
        order = [*names[shift:], *names[:shift]]
        if round_ % 2:
            order.reverse()
        share = by_length[round_::rounds]
        random.Random(round_).shuffle(share)
        padded = [0] * len(range(round_, runs, rounds))
        for form, items in (("padded", padded), ("task", share)):
            if items:
                yield from (Turn(round_, form, name, items) for name in order)


def evenly_spaced(values: Sequence[T], count: int) -> list[T]:
    """At most `count` of the values, from the first on at equal distances."""
    count = min(count, len(values))
    return [values[index * len(values) // count] for index in range(count)]


def summary(latency_ms: Sequence[float]) -> dict[str, Any]:
    """Percentiles (linear between order statistics, as numpy has them), mean and number of some latencies."""
    p10, p50, p90, p95 = (float(value) for value in np.percentile(latency_ms, (10, 50, 90, 95)))
    mean = statistics.fmean(latency_ms)
    return {"p10": p10, "p50": p50, "p90": p90, "p95": p95, "mean": mean, "n": len(latency_ms)}


def spread(timings: Sequence[Timing], form: str) -> dict[str, float]:
    """How far the rounds of each variant disagree about its speed relative to the others.

    Per variant, the medians of its rounds, each divided by their median over the rounds, and by what was
    common to all variants in that round; of these the largest less the smallest. A machine that is slower for
    everybody during one round does not change a ratio of interleaved times and is divided out; a disturbance
    that hit one variant is not. "Common" is the (low) median over the variants, or nothing if there is only
    one. Percentiles over single inferences would not do: on a task's sentences they spread as widely as the
    sentences' lengths.

    Args:
        timings: Of all variants and forms.
        form: The form to look at.

    Returns:
        0 for a variant whose rounds agree perfectly; 0.2 where its speed-up from one round differs by about
        20 % from that of another.
    """
    medians: dict[str, dict[int, float]] = {}
    for turn, latency_ms, _, _ in timings:
        if turn.form == form:
            medians.setdefault(turn.name, {})[turn.round] = statistics.median(latency_ms)
    relative = {name: _relative(rounds) for name, rounds in medians.items()}
    common = {round_: 1.0 for rounds in relative.values() for round_ in rounds}
    if len(relative) > 1:
        common = {round_: statistics.median_low(r[round_] for r in relative.values()) for round_ in common}
    apart = {name: [r[round_] / common[round_] for round_ in r] for name, r in relative.items()}
    return {name: max(values) - min(values) for name, values in apart.items()}


def _relative(rounds: Mapping[int, float]) -> dict[int, float]:
    middle = statistics.median(rounds.values())
    return {round_: value / middle for round_, value in rounds.items()}
