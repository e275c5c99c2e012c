"""From the timings of all turns to what run.json has of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgemin.measure.rounds import Cell, Timing, percentiles, round_medians, spread


def latencies(
    timings: Sequence[Timing], lengths: Mapping[str, Mapping[str, float]], max_spread: float
) -> dict[str, dict[str, Any]]:
    """What single sentences take, by variant and form of input.

    Args:
        timings: Of all variants.
        lengths: The forms of input, the same for all variants, with their (mean) length for each.
        max_spread: What is wider is flagged.
    """
    found: dict[str, dict[str, Any]] = {}
    for form in next(iter(lengths.values())):
        spreads = spread(timings, form)
        for name, medians in round_medians(timings, form).items():
            width = spreads[name]
            judged = {"spread": width, "unstable": width > max_spread, "rounds": list(medians.values())}
            timed = {"length": lengths[name][form], **percentiles(_samples(timings, name, form)), **judged}
            found.setdefault(name, {})[form] = timed
    return found


def costs(
    timings: Sequence[Timing], lengths: Mapping[str, Mapping[str, float]], max_spread: float
) -> dict[str, dict[str, Any]]:
    """What single sentences cost, by variant: `latency_ms`, `throughput_per_s`, `energy_mj` and `power_w`.

    The arguments are those of [`latencies`][edgemin.measure.summary.latencies].
    """
    found = {}
    for name, latency in latencies(timings, lengths, max_spread).items():
        padded = [timing for timing in timings if (timing.turn.name, timing.turn.form) == (name, "padded")]
        joules = sum(timing.joules for timing in padded)
        found[name] = {
            "latency_ms": latency,
            "throughput_per_s": {form: 1000 / values["mean"] for form, values in latency.items()},
            "energy_mj": 1000 * joules / latency["padded"]["n"],
            "power_w": joules / sum(timing.seconds for timing in padded),
        }
    return found


def grid(timings: Sequence[Timing], cells: Mapping[str, Sequence[Cell]]) -> dict[str, dict[str, Any]]:
    """What batches take, by variant: `grid`, where it was timed on any."""
    return {
        name: {"grid": [_of_cell(cell, _samples(timings, name, cell.form)) for cell in own]}
        for name, own in cells.items()
        if own
    }


def _of_cell(cell: Cell, latency_ms: Sequence[float]) -> dict[str, Any]:
    found = percentiles(latency_ms)
    kept = {name: found[name] for name in ("p10", "p50", "p90", "n")}
    return {**cell._asdict(), **kept, "sentences_per_s": 1000 * cell.batch / found["mean"]}


def _samples(timings: Sequence[Timing], name: str, form: str) -> list[float]:
    return [
        ms for timing in timings if (timing.turn.name, timing.turn.form) == (name, form) for ms in timing.latency_ms
    ]
