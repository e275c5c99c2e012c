"""The table of latencies that stages with a latency to reach are planned by: kept in the store, measured where missing.

It belongs to a machine, a shape, a runtime with its versions and a precision, and is measured once for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from edgemin.deploy.runtime import check_installed, check_names, versions
from edgemin.encoder import building
from edgemin.errors import UserError
from edgemin.measure.layer_latency import SETTINGS, latency_table
from edgemin.measure.machine import host
from edgemin.measure.runtime import Measure
from edgemin.progress import live_line, node_line
from edgemin.store.artifacts import Store
from edgemin.store.content import content_key
from edgemin.store.digest import code_digest
from edgemin.study import roots
from edgemin.study.nodes import Study
from edgemin.study.starts import Start, read_starts
from edgemin.training.latency import LatencyTable

CODE = ("edgemin.measure.layer_latency",)
_KIND = "latency_table"


def with_latency(study: Study, store: Store, settings: Measure | None, *, measured: bool) -> Study:
    """The study with its table, if any of its stages has a latency to reach.

    Args:
        study: as it was read.
        store: where tables are kept.
        settings: how the job measures; `None`: by the defaults.
        measured: whether a missing table may be measured now; else the study stays without one.

    Raises:
        UserError: stages that ask for different runtimes or precisions, or a runtime that is not installed.
    """
    wanted = _wanted(study)
    if wanted is None:
        return study
    runtime, precision, key = wanted
    check_names([runtime], f"{key}.runtime")
    check_installed([runtime], f"{key}.runtime")
    own = settings or Measure()
    how = Measure(runtimes=(runtime,), length=own.length, threads=own.threads)
    start = read_starts(study.roots, study.splits)["student"]
    content = {
        "outline": asdict(replace(start.outline, tokenizer=None, quantized=None)),
        "precision": precision,
        "settings": how.content,
        "host": host()["id"],
        "code": code_digest(*CODE),
        "versions": versions(runtime),
    }
    name = content_key(content)
    kept = store.result(_KIND, name)
    if kept is not None:
        return replace(study, latency=_read(kept["table"]))
    if not measured:
        return study
    node_line("latency table", "measuring", f"layers at each width, {precision} in {runtime}")
    with live_line("latency table") as line:

        def progress(done: int, total: int, what: str) -> None:
            line.text, line.done, line.total = f"latency table  {what}  step", done, total

        table = latency_table(_model(start), runtime, precision, how, progress=progress)
    store.keep_result(_KIND, name, {"table": asdict(table), "content": content})
    return replace(study, latency=table)


def _wanted(study: Study) -> tuple[str, Any, str] | None:
    """The runtime and the precision that its stages are to reach a latency in, and the key that says so."""
    found: dict[tuple[str, Any], str] = {}
    for name in dict.fromkeys(stage for row in study.rows for stage in row.stages):
        node = study.settings.get(name)
        target = node.get("target") if isinstance(node, Mapping) else None
        if isinstance(target, Mapping) and target.get("measure") == "latency_ms":
            precision = target.get("precision")
            if precision not in SETTINGS:
                raise UserError(f"{name}.target.precision: expected {', '.join(SETTINGS)}, given {precision!r}")
            found[str(target.get("runtime")), precision] = f"{name}.target"
    if len(found) > 1:
        raise UserError(
            f"{list(found.values())[1]}: expected one runtime and precision for all targets of a job, given "
            f"{' and '.join(f'{precision} in {runtime}' for runtime, precision in found)}"
        )
    return next(((runtime, precision, key) for (runtime, precision), key in found.items()), None)


def _model(start: Start) -> Any:
    """Random weights in the shape that the student starts with, all layers alike."""
    torch.manual_seed(0)
    model = roots.reshape(building.build(start.config), start.root)
    if building.outline(model).labels is None:
        building.attach_head(model, ["0", "1"])
    return model.eval()


def _read(kept: Mapping[str, Any]) -> LatencyTable:
    """A table as JSON has it, whose keys are text."""
    widths = {name: {int(width): ms for width, ms in kept[name].items()} for name in ("heads_ms", "ffn_ms")}
    return LatencyTable(**{**kept, **widths})
