"""From a finished run to what is served: the row to export, as a command, and the measurements that its card shows."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgemin.errors import UserError
from edgemin.medians import around_median
from edgemin.report.entries import entries
from edgemin.report.fields import Latency, Row, Runtime
from edgemin.report.fold import fold
from edgemin.report.grid import CORE
from edgemin.report.measures import in_runtime, latency
from edgemin.report.noise import Noise
from edgemin.report.schema import Run, find, read

EXPORTED = ("onnxruntime", "openvino", "openvino_bf16")  # runtimes that have a bundle
_TIMED = latency("padded", "p50", CORE)
_MIB = 2**20
_ROUNDING = 1e-6  # metrics are computed in single precision


@dataclass(frozen=True)
class _Served:
    """A row in a runtime that has a bundle, timed there."""

    run: Run
    row: Row
    runtime: str

    @property
    def cost(self) -> Runtime:
        return self.row.cost.runtimes[self.runtime]

    @property
    def p50(self) -> float:
        return _padded(self.cost).p50 or math.inf

    @property
    def rank(self) -> tuple[float, float]:
        """The better row comes first: the more accurate, of equal ones the smaller."""
        task = self.run.task
        score = self.row.score(task.name, self.run.first_split, task.metric, self.runtime)
        return math.inf if score is None else -score, self.cost.size_bytes or math.inf

    def is_no_slower(self, fastest: _Served, noise: Noise) -> bool:
        """Whether it does the same task, and is slower than the fastest by no more than noise."""
        if self.run.task.name != fastest.run.task.name:
            return False
        floors = [noise.floor(in_runtime(_TIMED, one.runtime)) for one in (self, fastest)]
        if any(floor is not None and floor.covers(self.p50 / fastest.p50) for floor in floors):
            return True
        ratios = _padded(self.cost).over(_padded(fastest.cost)) if self.run is fastest.run else []
        return bool(ratios) and around_median(ratios)[0] <= 1


def commands(directory: Path) -> list[str]:
    """How to export and ask the fastest row that passed the quality gate, over all jobs below a directory.

    Without a gate any row is as good. Of rows whose latencies differ by no more than noise, it is the most accurate
    one, then the smallest.

    Args:
        directory: of a job or a sweep; its `run.json` files have just been written.

    Returns:
        Lines to print; none where no row was exported to a runtime that has a bundle.
    """
    runs = [read(file) for file in find(directory)]
    candidates = [
        _Served(run, row, name)
        for run in runs
        for row in run.rows
        if not row.control and _passes(run, row)
        for name, cost in row.cost.runtimes.items()
        if name in EXPORTED and _padded(cost).p50
    ]
    if not candidates:
        return []
    fastest, noise = min(candidates, key=lambda one: one.p50), Noise(entries(fold(runs)))
    as_fast = [one for one in candidates if one is fastest or one.is_no_slower(fastest, noise)]
    best = min(as_fast, key=lambda one: one.rank)
    row, out = best.row, directory / "bundle"
    facts = [_score(best.run, row, best.runtime), _milliseconds(best.cost), _size(best.cost)]
    others = dict.fromkeys(
        one.row.name if one.runtime == best.runtime else f"{one.row.name} in {one.runtime}"
        for one in as_fast
        if (one.row.name, one.runtime) != (row.name, best.runtime)
    )
    has_gates = any(one.gate for run in runs for one in run.rows)
    which = "passed the quality gate" if has_gates else "can be exported"
    said = f"; as fast within the noise, and no more accurate: {', '.join(others)}" if others else ""
    artifact = Path(str(best.run.chosen("paths", "store"))) / str(row.artifact)
    export = {"artifact": artifact, "deploy": best.runtime, "study": best.run.file.parent, "out": out}
    ask = {"model": out, "text": "the plot was good"}
    if len(best.run.chosen("task", "text_columns") or ()) == 2:
        ask["text_pair"] = "the cast was dull"
    return [
        f"To serve {row.name}, of the rows that {which} the fastest "
        f"({', '.join(filter(None, facts))} in {best.runtime}{said}):",
        f"  {_command('edgemin.export', export)}",
        f"  {_command('edgemin.predict', ask)}",
    ]


def _passes(run: Run, row: Row) -> bool:
    """Whether it passed its quality gate; after a row that did not, its loss counts from the last one that did."""
    if row.collapsed or (row.gate is not None and not row.gate.passed):
        return False
    parent = before = run.reference("parent", row)
    while before is not None and not _passes(run, before):
        before = run.reference("parent", before)
    if row.gate is None or row.gate.max_drop is None or before is parent:
        return True
    own, earlier = run.score(row), run.score(before) if before is not None else None
    return own is None or earlier is None or earlier - own <= row.gate.max_drop + _ROUNDING


def _padded(cost: Runtime) -> Latency:
    return cost.latency_ms.padded if cost.latency_ms is not None else Latency()


def _command(module: str, words: dict[str, object]) -> str:
    here = {key: _from_here(value) if isinstance(value, Path) else value for key, value in words.items()}
    return " ".join([f"python -m {module}", *(shlex.quote(f"{key}={value}") for key, value in here.items())])


def _from_here(path: Path) -> Path:
    """The path as it is typed in the current directory, where it lies below that."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _score(run: Run, row: Row, runtime: str) -> str:
    task = run.task
    value = row.score(task.name, run.first_split, task.metric, None if runtime == "torch" else runtime)
    return "" if value is None or task.metric is None else f"{task.metric} {value:.4f}"


def _milliseconds(cost: Runtime) -> str:
    padded = _padded(cost)
    return "" if padded.p50 is None else f"{padded.p50:.2f} ms at {padded.length or 0:.0f} tokens"


def _size(cost: Runtime) -> str:
    return "" if cost.size_bytes is None else f"{cost.size_bytes / _MIB:.1f} MiB"


def measured(study: Path, artifact: str) -> str:
    """What was measured of an artifact, as a table in Markdown.

    Args:
        study: the directory of a job or a sweep.
        artifact: its key. Where several jobs have it, the one that ended last counts.

    Raises:
        UserError: no job there has it, or a `run.json` cannot be used.
    """
    runs = sorted(map(read, find(study)), key=lambda run: run.when)
    found = [(run, row) for run in runs for row in run.rows if row.artifact == artifact]
    if not found:
        raise UserError(f"study: expected a run with a row of the artifact {artifact}, given {study}, which has none")
    run, row = found[-1]
    metric = run.task.metric or "score"
    header = [
        "runtime",
        metric,
        "size, MiB",
        "p50, ms",
        "p10 - p90, ms",
        "task's sentences, ms",
        "same answers, %",
    ]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for name, cost in row.cost.runtimes.items():
        lines.append([name, *_cells(run, row, name, cost)])
    costs = list(row.cost.runtimes.values())
    padded = next((_padded(cost) for cost in costs if cost.latency_ms is not None), Latency())
    where = [run.host.cpu or "a CPU that is not recorded", run.when[:10], f"row {row.name!r} of the study {run.study}"]
    where += [f"{cost.threads:.0f} threads" for cost in costs[:1] if cost.threads is not None]
    where += [f"batch 1, {padded.length:.0f} tokens unless said otherwise"] if padded.length else []
    beside = any(cost.measured_beside_other_work for cost in costs)
    notes = ["; measured beside other work on the machine"] if beside else []
    return "\n".join([*map(_line, lines), "", f"Measured on {'; '.join(where)}{''.join(notes)}."])


def _cells(run: Run, row: Row, name: str, cost: Runtime) -> Sequence[str]:
    padded = _padded(cost)
    task = cost.latency_ms.task if cost.latency_ms is not None else Latency()
    return [
        _score(run, row, name).rpartition(" ")[2],
        _size(cost).removesuffix(" MiB"),
        _number(padded.p50) + (" (unstable)" if padded.unstable else ""),
        f"{_number(padded.p10)} - {_number(padded.p90)}" if padded.p10 else "",
        _number(task.p50) + (" (unstable)" if task.unstable else ""),
        "" if cost.agreement is None else f"{100 * cost.agreement:.1f}",
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
