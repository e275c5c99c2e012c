"""A job's result as data: the rows with their differences, as `run.json` keeps them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgemin import artifact
from edgemin.measure.runtime import PROFILED
from edgemin.store.artifacts import Store
from edgemin.store.disk import write_atomically
from edgemin.study import predictions
from edgemin.study.nodes import Plan, Row
from edgemin.study.scoring import Scored

SCHEMA = 2
FILE = "run.json"


def rows(
    plan: Plan,
    scored: Mapping[str, Scored],
    run_dir: Path,
    primary: tuple[str, str, str] | None,
    transfer: Sequence[str],
) -> list[dict[str, Any]]:
    """The rows of `run.json`; traces are copied beside it.

    Args:
        plan: its rows, in order.
        scored: what is known of each node, by key.
        run_dir: the job's directory.
        primary: (task, split, metric) that differences are formed in; `None` without data.
        transfer: tasks that were scored zero-shot.
    """
    made = [_row(number, row, scored[row.node.key], run_dir, transfer) for number, row in enumerate(plan.rows)]
    first = {
        model: next((index for index, row in enumerate(plan.rows) if row.spec.model == model), None)
        for model in ("teacher", "student")
    }
    for index in range(len(plan.rows)):
        parent = plan.made_from(index)
        made[index]["made_from"] = made[parent]["name"] if parent is not None else None
        references = {"teacher": first["teacher"], "student": first["student"], "parent": parent}
        made[index]["delta"] = {
            name: difference(made[index], made[reference], primary) if reference is not None else None
            for name, reference in references.items()
        }
    return made


def threads(plan: Plan, store: Store) -> list[int]:
    """The numbers of CPU threads that the trained stages of a plan were trained with, now or when they were stored."""
    read = [artifact.read_provenance(store.path(node.key)) for node in plan.nodes]
    return sorted({provenance["threads"] for provenance in read if provenance.get("steps") and "threads" in provenance})


def _row(number: int, row: Row, scored: Scored, run_dir: Path, transfer: Sequence[str]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "name": row.spec.name,
        "model": row.spec.model,
        "stages": list(row.spec.stages),
        "control": row.spec.control,
        "artifact": row.node.key,
        "metrics": scored.metrics,
        "transfer": [name for name in transfer if name in scored.metrics],
        "cost": _with_trace(number, scored, run_dir),
        "notes": list(scored.notes),
        **({"findings": scored.findings} if scored.findings else {}),
        **({"gate": scored.gate} if scored.gate is not None else {}),
        **({"collapsed": scored.collapsed} if scored.collapsed else {}),
    }
    if scored.predictions:
        made["predictions"] = f"{predictions.DIRECTORY}/{number}"
    return made


def _with_trace(number: int, scored: Scored, run_dir: Path) -> dict[str, Any]:
    """A row's cost; the profiler's trace is copied beside `run.json`, and named there."""
    if scored.trace is None:
        return scored.cost
    name = f"profile/{number}.json.gz"
    (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(scored.trace, run_dir / name)
    costs = scored.cost["runtimes"]
    profiled = {**costs[PROFILED], "profile": {"trace": name, **costs[PROFILED]["profile"]}}
    return {**scored.cost, "runtimes": {**costs, PROFILED: profiled}}


def difference(
    row: Mapping[str, Any], other: Mapping[str, Any], primary: tuple[str, str, str] | None
) -> dict[str, Any]:
    """One row against another; every ratio says how many times smaller or faster the first is.

    Returns:
        `metric` (difference of the primary metric, a fraction) and `metric_retained` (their quotient; a share of
        what is not above 0, or of a model that gives one answer to everything, says nothing); `params_ratio` and
        `flops_ratio` (the other's over this one's); and in `runtimes`, by runtime, `compression_ratio` (bytes
        likewise) and `speed_up` by form of input (p50 likewise). What cannot be formed is absent.
    """
    found: dict[str, Any] = {}
    if primary is not None:
        task, split, metric = primary
        mine, theirs = row["metrics"][task][split][metric], other["metrics"][task][split][metric]
        found["metric"] = mine - theirs
        if theirs > 0 and split not in other.get("collapsed", {}).get(task, {}):
            found["metric_retained"] = mine / theirs
    for field in ("params", "flops"):
        found[f"{field}_ratio"] = other["cost"][field] / row["cost"][field]
    runtimes, others = row["cost"]["runtimes"], other["cost"]["runtimes"]
    found["runtimes"] = {name: _ratios(runtimes[name], others[name]) for name in runtimes if name in others}
    return found


def _ratios(cost: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """One row against another in one runtime."""
    found: dict[str, Any] = {"compression_ratio": other["size_bytes"] / cost["size_bytes"]}
    mine, theirs = cost.get("latency_ms"), other.get("latency_ms")
    if mine and theirs:
        forms = [form for form in ("padded", "task") if form in mine and form in theirs]
        found["speed_up"] = {form: theirs[form]["p50"] / mine[form]["p50"] for form in forms}
    return found


def write(run_dir: Path, content: Mapping[str, Any]) -> Path:
    """Write `run.json`, whole or not at all."""
    path = run_dir / FILE
    write_atomically(path, (json.dumps({"schema": SCHEMA, **content}, indent=1) + "\n").encode())
    return path
