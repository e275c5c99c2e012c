"""The latency table for stages that are to reach a latency: kept in the store, measured where it is missing.

It belongs to a machine, a shape, a runtime with its versions and a precision, and is measured once for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from edgemin.deploy.runtime import check_installed, check_names, versions
from edgemin.encoder.outline import Outline
from edgemin.errors import UserError
from edgemin.measure import layer_grid
from edgemin.measure.layer_latency import Timed, latency_table, widest
from edgemin.measure.machine import host
from edgemin.measure.runtime import Measure
from edgemin.processes import ranks
from edgemin.progress import live_line, node_line
from edgemin.pruning.target import Target
from edgemin.store.artifacts import Store
from edgemin.store.content import content_key
from edgemin.store.digest import code_digest
from edgemin.study.family import FAMILY
from edgemin.study.nodes import Plan, Study
from edgemin.study.starts import Start, read_starts
from edgemin.training.latency import LatencyTable, Precision

CODE = ("edgemin.measure.layer_latency",)
_KIND = "latency_table"


class Wanted(NamedTuple):
    """The latency that a study's stages are to reach.

    Attributes:
        key: the settings that ask for it, such as `prune.target`, for messages.
        runtime: the runtime whose latency counts.
        precision: the precision of the deployed model.
        table: a file of another device's latencies; `None` measures here.
    """

    key: str
    runtime: str
    precision: Precision
    table: str | None


def with_latency(
    study: Study, plan: Plan, store: Store, settings: Measure | None, *, measured: bool
) -> tuple[Study, list[str]]:
    """The study with its table, if any of its stages has a latency to reach.

    Args:
        study: as it was read.
        plan: of it, without a table: the stages that will run, those of teachers too.
        store: where tables are kept.
        settings: how the job measures; `None`: by the defaults.
        measured: whether a missing table may be measured now; else the study stays without one.

    Returns:
        The study, and notes: that it has no table yet, or that the machine did other work while it was measured.

    Raises:
        UserError: stages that ask for different runtimes or precisions, a runtime that is not installed, or a file that
            is no table of such models.
    """
    wanted = _wanted(study, plan)
    if wanted is None:
        return study, []
    start = read_starts(study.roots, study.splits)["student"]
    outline = widest(start.outline)
    check_names([wanted.runtime], f"{wanted.key}.runtime")
    own = settings or Measure(length=min(Measure().length, outline.max_tokens or Measure().length))
    how = Measure(runtimes=(wanted.runtime,), length=own.length, threads=own.threads, wait_minutes=own.wait_minutes)
    if wanted.table is not None:
        try:
            table = layer_grid.read(Path(wanted.table), outline, wanted.runtime, wanted.precision, own.length)
        except UserError as error:
            raise UserError(f"{wanted.key}.table: {error}") from error
        return replace(study, latency=table), []
    check_installed([wanted.runtime], f"{wanted.key}.runtime")
    content = {
        "outline": asdict(outline),
        "precision": wanted.precision,
        "settings": how.content,
        "host": host()["id"],
        "code": code_digest(*CODE),
        "versions": versions(wanted.runtime),
    }
    name = content_key(content)
    kept = store.result(_KIND, name)
    if kept is not None:
        return replace(study, latency=LatencyTable.read(kept["table"])), kept.get("notes", [])
    if not measured:
        return study, [
            f"{wanted.key}: the latency table ({wanted.precision} in {wanted.runtime}) is not measured yet, so whether "
            "the target can be reached is not known, and the keys of what depends on it will be others"
        ]
    with store.lock(name, lambda: node_line("latency table", "waiting", "another run measures it")):
        kept = store.result(_KIND, name)
        if kept is not None:  # another run was faster
            return replace(study, latency=LatencyTable.read(kept["table"])), kept.get("notes", [])
        timed = _measured(start, outline, wanted, how)
        notes = _unstable(wanted.key, timed, how.max_spread)
        if timed.alone or ranks.world() > 1:  # several processes must have the same
            store.keep_result(_KIND, name, {"table": timed.table.written(), "content": content, "notes": notes})
    if not timed.alone:
        notes.append(f"{wanted.key}: the latency table was measured beside other work, and is measured again next time")
    return replace(study, latency=timed.table), notes


def _unstable(key: str, timed: Timed, spread: float) -> list[str]:
    """A note where the machine was too noisy for some of the shapes."""
    if not timed.unstable:
        return []
    return [
        f"{key}: in the latency table the rounds of {timed.unstable} of {timed.shapes} shapes spread by more than "
        f"{100 * spread:.0f} %, so the latencies that it predicts are rough"
    ]


def _measured(start: Start, outline: Outline, wanted: Wanted, settings: Measure) -> Timed:
    node_line("latency table", "measuring", f"layers at each width, {wanted.precision} in {wanted.runtime}")
    with live_line("latency table") as line:

        def progress(done: int, total: int, what: str) -> None:
            line.text, line.done, line.total = f"latency table  {what}  step", done, total

        return latency_table(
            start.config,
            outline,
            wanted.runtime,
            wanted.precision,
            settings,
            progress=progress,
            waiting=lambda why: node_line("latency table", "waiting", why),
        )


def _wanted(study: Study, plan: Plan) -> Wanted | None:
    """What its stages ask for, which is one for all of them."""
    found: dict[tuple[str, str, str | None], Wanted] = {}
    for name in dict.fromkeys(node.stage for node in plan.nodes):
        node = study.settings.get(name)
        target = node.get("target") if isinstance(node, Mapping) else None
        if isinstance(target, Mapping) and target.get("measure") == "latency_ms":
            asked = Target(**target)
            of = asked.runtime, asked.precision, asked.table
            found.setdefault(of, Wanted(f"{name.partition(FAMILY)[0]}.target", *of))
    if len(found) > 1:
        told = (f"{of.precision} in {of.runtime}{f' by {of.table}' if of.table else ''}" for of in found.values())
        raise UserError(
            f"{list(found.values())[1].key}: expected one runtime, precision and table for all targets of a job, given "
            f"{' and '.join(told)}"
        )
    return next(iter(found.values()), None)
