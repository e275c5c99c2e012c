"""How far rows that are the same graph differ when they are timed, and speed-ups that are no more than that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from edgemin.medians import around_median
from edgemin.report import measures as m
from edgemin.report.entries import Entry
from edgemin.report.fields import Row
from edgemin.report.fold import Line, Statistic
from edgemin.report.grid import CORE
from edgemin.report.measure import Measure
from edgemin.report.schema import Run
from edgemin.report.titles import task_title

OVER_ROUNDS = "the rounds leave open on which side of 1 their median lies: no speed-up"
_Place = tuple[str | None, str, str | None, str]
"""What was timed where: the runtime, the form of input, the job's task where several stand side by side, the device."""


@dataclass(frozen=True)
class Floor:
    """The noise floor of a measurement.

    Args:
        ratio: the largest ratio between two rows that are the same graph: of their medians, or the farther end of the
            interval that holds the median of their ratios over the rounds; at least 1.
        graphs: the names of such rows, together where they are one graph.
    """

    ratio: float
    graphs: tuple[tuple[str, ...], ...]

    @property
    def percent(self) -> str:
        """As text, how much slower a row may seem in per cent without being slower."""
        return f"{100 * (self.ratio - 1):.1f} %"

    def covers(self, ratio: float) -> bool:
        """Whether a ratio of latencies is no larger than the noise."""
        return 1 / self.ratio <= ratio <= self.ratio


class Noise:
    """The noise floors of a table: one for each runtime, form of input, task and device.

    Args:
        lines: its rows.
    """

    def __init__(self, lines: Sequence[Entry]) -> None:
        self._lines = lines
        self._known: dict[_Place, Floor | None] = {}

    def floor(self, measure: Measure, device: str = "") -> Floor | None:
        """The noise floor that a latency or a ratio of latencies has; None where no two rows are the same graph."""
        if measure.form not in m.FORMS:
            return None
        place = (measure.runtime, measure.form, measure.job_task, device)
        if place not in self._known:
            timed = replace(m.latency(measure.form, "p50", CORE), runtime=measure.runtime, job_task=measure.job_task)
            self._known[place] = self._floor(timed, device)
        return self._known[place]

    def _floor(self, timed: Measure, device: str) -> Floor | None:
        graphs = [same for same in _graphs(timed, self._lines, device) if len(same) > 1]
        ratios = [
            ratio
            for same in graphs
            for (_, one, p50), (_, other, theirs) in combinations(same, 2)
            for ratio in (p50 / theirs, theirs / p50, *_over_rounds(timed, one, other))
        ]
        return Floor(max(ratios), tuple(tuple(name for name, _, _ in same) for same in graphs)) if ratios else None

    def doubts(self, measure: Measure, line: Line, value: Statistic) -> list[str]:
        """Why a ratio or a difference of latencies is no speed-up; nothing if it is one, or neither of these."""
        if measure.part in ("change", "share") and measure.form is not None:
            ratio = _ratio(measure, line)
            return within(self.floor(measure, line.rows[0].device), ratio) if ratio is not None else []
        if measure.name != "speed_up" or measure.statistic is not None:
            return []
        if not line.any(lambda run, row: run.reference(measure.reference or "", row) is not row):
            return []  # it is 1 because it is compared with itself
        inside = within(self.floor(measure, line.rows[0].device), value)
        if inside:
            return inside
        low, high = (replace(measure, statistic=name).fold(line) for name in ("low", "high"))
        return [OVER_ROUNDS] if low is not None and high is not None and low.mean <= 1 <= high.mean else []

    def notes(self, measures: Sequence[Measure]) -> list[str]:
        """Notes below a table: how large the noise floor of its timings is, and which rows show it."""
        timed = [one for one in measures if one.form is not None and one.name in ("latency_ms", "speed_up")]
        devices = dict.fromkeys(
            row.device for entry in self._lines for line in entry.lines.values() for row in line.rows
        )
        for measure in timed:
            for device in devices:
                self.floor(measure, device)
        several = len({place[0] for place, floor in self._known.items() if floor is not None}) > 1
        said: dict[str, list[str]] = {}
        for place, floor in self._known.items():
            if floor is not None:
                graphs = "; ".join(dict.fromkeys(_listed(names) for names in floor.graphs))
                said.setdefault(graphs, []).append(f"{floor.percent} ({_where(place, several)})")
        return [
            f"{graphs} are the same graph by every count: their latencies differ by noise alone. "
            f"Noise floor: {', '.join(floors)}; no speed-up within it is claimed"
            for graphs, floors in said.items()
        ]


def _ratio(change: Measure, line: Line) -> Statistic | None:
    """The latency of what a change of it is formed against, divided by the row's own."""
    timed = replace(change, part="cost", reference=None)

    def reference(run: Run, row: Row) -> float | None:
        other = run.reference(change.reference or "", row)
        return None if other is None else timed.read(run, other)

    own, theirs = timed.fold(line), line.fold(reference)
    return None if own is None or theirs is None else Statistic(theirs.mean / own.mean, None, own.n)


def within(floor: Floor | None, value: Statistic) -> list[str]:
    """Says that a ratio lies within the noise floor, if it does."""
    covered = floor is not None and floor.covers(value.mean)
    return [f"within the noise floor of {floor.percent}: no speed-up"] if floor is not None and covered else []


def _where(place: _Place, several: bool) -> str:
    runtime, form, task, device = place
    parts = [task_title(task) if task else "", (runtime or "") if several else "", m.FORMS[form]]
    return ", ".join(part for part in (*parts, f"on {device}" if device else "") if part)


def _over_rounds(timed: Measure, one: Line, other: Line) -> Iterator[float]:
    """How far from 1 the median of the ratios over the rounds may lie, over all measurements that both were part of."""
    rows = {id(run): row for run, row in zip(other.runs, other.rows, strict=True)}
    pairs = [(row, rows[id(run)]) for run, row in zip(one.runs, one.rows, strict=True) if id(run) in rows]
    ratios = [ratio for mine, theirs in pairs for ratio in timed.timing(mine).over(timed.timing(theirs))]
    if ratios:
        inner = around_median(ratios)
        yield inner[-1]
        yield 1 / inner[0]


def _graphs(measure: Measure, lines: Sequence[Entry], device: str) -> list[list[tuple[str, Line, float]]]:
    """The lines of each job by graph: their names, the lines, and the mean of the measure."""
    graphs: list[tuple[tuple[str, ...], list[tuple[str, Line, float]]]] = []
    for entry in lines:
        line = entry.line(measure.job_task)
        value = measure.fold(line) if line is not None else None
        if line is None or value is None or line.rows[0].device != device:
            continue
        row = line.rows[0]
        known = (
            same for labels, same in graphs if labels == entry.labels and _same_graph(measure, same[0][1].rows[0], row)
        )
        same = next(known, None)
        if same is None:
            same = []
            graphs.append((entry.labels, same))
        same.append((entry.name, line, value.mean))
    return [same for _, same in graphs]


def _same_graph(measure: Measure, one: Row, other: Row) -> bool:
    counts = [(row.cost.params, row.cost.params_visible, row.cost.macs) for row in (one, other)]
    sizes = [measure.cost(row).size_bytes or 0.0 for row in (one, other)]
    # Integers of the same layers in the same groups take equally many bytes whether or not activations are rounded.
    is_alike = one.findings.quantization == other.findings.quantization
    # Between equal graphs the bytes of config.json and structure.json may differ by a few.
    return (
        None not in counts[0] and counts[0] == counts[1] and is_alike and abs(sizes[0] - sizes[1]) < 0.005 * max(sizes)
    )


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
