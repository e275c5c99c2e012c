"""One job: plan, train, score, measure, write `run.json`, print the tables."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgemin import __version__, config
from edgemin.data.splits import Splits, load
from edgemin.data.task import Task
from edgemin.errors import UserError
from edgemin.measure.machine import host
from edgemin.measure.runtime import Measure
from edgemin.processes import ranks
from edgemin.progress import live_line, node_line
from edgemin.report import published as literature
from edgemin.report.published import Published
from edgemin.report.write import Report, of_job
from edgemin.store.artifacts import Store
from edgemin.store.disk import disk_errors, write_atomically
from edgemin.store.provenance import git_revision, versions
from edgemin.study import predictions, results, tree
from edgemin.study.family import expanded
from edgemin.study.latency_tables import with_latency
from edgemin.study.nodes import Plan, Study
from edgemin.study.order import ablation, compared, order_name, row_specs, student_stages
from edgemin.study.pipeline import Done, Pipeline
from edgemin.study.plan import build, unused
from edgemin.study.roots import Root
from edgemin.study.runtimes import check_lengths
from edgemin.study.scoring import Scoring
from edgemin.tracking import Tracker
from edgemin.training.fitting import Trainer, use_threads
from edgemin.training.stage import Stage

PUBLISHED_FILE = "published.yaml"
Settings = Mapping[str, Any]


def read_study(settings: Settings) -> Study:
    """Check every part of a configuration and read the data.

    Raises:
        UserError: the first thing that cannot work.
    """
    for key, annotation in (
        ("seed", config.Whole),
        ("stages", list[str] | None),
        ("study", str),
        ("order", dict[str, Any]),
    ):
        config.check_type(settings.get(key), annotation, key)
    max_drop = settings["evaluate"]["max_drop"]
    config.check_type(max_drop, config.Share | None, "evaluate.max_drop")
    config.check_type(settings["evaluate"]["margin"], config.Margin, "evaluate.margin")
    task = config.construct(settings.get("task"), "task", Task)
    trainer = config.construct(settings.get("trainer"), "trainer", Trainer)
    roots = {name: config.construct(settings.get(name), name, Root) for name in _models(settings)}
    use_threads(trainer.threads)
    rows = row_specs(settings["order"], settings["stages"], {name: root.stages for name, root in roots.items()})
    pairs = compared(settings["order"], settings["stages"], rows)
    settings, rows, pairs = expanded(settings, rows, pairs)
    splits = None if task.name == "none" else load(task)
    return Study(settings, task, splits, roots, rows, trainer, settings["seed"], max_drop, pairs)


def _models(settings: Settings) -> list[str]:
    """The models of a study by name: teacher, student and every further node that describes one.

    Raises:
        UserError: a node of the user's own that is neither a model nor a stage.
    """
    own = [
        name
        for name in settings
        if name not in config.KEYS and isinstance(settings[name], Mapping) and "_target_" in settings[name]
    ]
    kinds = {name: config.target(settings[name], name) for name in own}
    for name, kind in kinds.items():
        if not issubclass(kind, Root | Stage):
            raise UserError(
                f"{name}._target_: expected a stage or a model (edgemin.study.roots.Root), given "
                f"{settings[name]['_target_']}"
            )
    return ["teacher", "student", *(name for name, kind in kinds.items() if issubclass(kind, Root))]


def plan_job(settings: Settings, job: Settings, transfer: Mapping[str, Settings], *, timed: bool) -> tree.Planned:
    """Check all that can be checked before a job trains. Nothing is written.

    Args:
        settings: the resolved configuration.
        job: what Hydra says of the job, as [`run_job`][edgemin.study.job.run_job] takes it.
        transfer: settings of the tasks that rows are also scored on, by name.
        timed: whether to look in the store for how long like stages took.

    Raises:
        UserError: the first thing that cannot work.
    """
    asked = _read(settings, job, transfer, measured=False)
    return tree.Planned(tree.states(asked.plan, asked.store, timed), asked.plan.notes)


def run_job(settings: Settings, job: Settings, transfer: Mapping[str, Settings]) -> None:
    """Run a job to its tables; of several processes the first alone scores, measures and writes.

    Args:
        settings: the resolved configuration.
        job: `number`, `overrides`, `experiment`, `run_dir`, `command`, `group` (what the jobs of its launch share),
            `given` (see [`unused`][edgemin.study.plan.unused]), and `set_by`: the keys that are set by a file which the
            user chose, each with that choice.
        transfer: settings of the tasks that rows are also scored on, by name.

    Raises:
        UserError: a mistake of the user's; what was computed before is kept.
    """
    started, run_dir = datetime.now(UTC), Path(job["run_dir"])
    reports: list[Report] = []  # of several processes, the first has it
    with disk_errors(run_dir, "paths.outputs"), _collected_warnings() as warned:
        with live_line("plan  reading models and data", beside_bars=True):
            asked = ranks.together(lambda: _read(settings, job, transfer, measured=True))
        plan, store, tracker = asked.plan, asked.store, asked.tracker
        for note in plan.notes:
            if note not in tree.told:
                node_line("plan", "note", note)
        failed = True
        try:
            tags = [
                asked.study.task.name,
                order_name(settings["order"], settings["stages"]),
                *(root.name for root in asked.study.roots.values()),
            ]
            ranks.from_main(lambda: tracker.start(run_dir, job["group"], _name(job), settings, tags))
            pipeline = Pipeline(asked.study, plan, store, tracker)
            done = pipeline.train()

            def conclude() -> None:
                scored = Scoring(asked.study, plan, store, pipeline.data).rows(asked.transfer, asked.measure)
                predictions.write(run_dir, plan, scored, pipeline.data, asked.transfer)
                primary = _primary(asked.study)
                rows = results.rows(plan, scored, run_dir, primary, list(asked.transfer))
                content = _content(settings, job, asked.study, started, done, [*plan.notes, *warned], primary)
                content["threads"] = results.threads(plan, store)
                if asked.published is not None:
                    write_atomically(run_dir / PUBLISHED_FILE, literature.text(asked.published).encode())
                results.write(run_dir, {**content, "rows": rows})
                with live_line("tables and figures  drawing"):
                    report = of_job(run_dir)
                    paths = report.write()
                tracker.rows(rows, content["task"])
                tracker.figures([path for path in paths.values() if path.suffix == ".png"])
                reports.append(report)

            ranks.from_main(conclude)
            failed = False
        finally:
            tracker.close(failed)
    for report in reports:
        report.show()


@dataclass(frozen=True)
class _Asked:
    """A job's configuration, read and checked."""

    study: Study
    plan: Plan
    store: Store
    tracker: Tracker
    measure: Measure | None
    transfer: dict[str, Splits]
    published: Published | None


def _read(settings: Settings, job: Settings, transfer: Mapping[str, Settings], *, measured: bool) -> _Asked:
    """Read and check; where a stage has a latency to reach, its table too, or `measured` makes it if it is missing."""
    try:
        return _asked(settings, job, transfer, measured)
    except config.UnknownKeyError as error:
        choice = job["set_by"].get(error.key)
        if choice is None or error.key in job["given"]:
            raise
        group = error.key.partition(".")[0]
        raise UserError(
            f"{error.key}: {choice} sets it, and the {group} that was chosen has no such key; leave it out with "
            f"~{error.key}"
        ) from error


def _asked(settings: Settings, job: Settings, transfer: Mapping[str, Settings], measured: bool) -> _Asked:
    study = read_study(settings)
    measure = config.construct(settings["measure"], "measure", Measure) if settings.get("measure") is not None else None
    tracker = config.construct(settings.get("logger"), "logger", Tracker)
    others = _other_tasks(study, transfer)
    published = _published(settings.get("published"))
    store, plan = Store(settings["paths"]["store"], settings["paths"]["outputs"]), build(study)
    timed, notes = with_latency(study, plan, store, measure, measured=measured)  # minutes: after all else was checked
    if timed is not study:
        study, plan = timed, build(timed)
    plan.notes += notes
    store.check_writable({node.key: node.path for node in plan.nodes})
    if measure is not None:
        check_lengths(measure, [row.node for row in plan.rows])
    plan.notes += unused(plan, settings, job["given"])
    return _Asked(study, plan, store, tracker, measure, others, published)


def _published(path: Any) -> Published | None:
    """A file of published numbers: from the working directory, from the clone, or from the installed package."""
    if path is None:
        return None
    config.check_type(path, str, "published")
    package = Path(__file__).parents[1]
    for place in (Path(path).expanduser(), package.parent / path, package / path):
        if place.is_file():
            try:
                return literature.read(place)
            except UserError as error:
                raise UserError(f"published: {str(error).removeprefix('published: ')}") from error
    raise UserError(f"published: expected a file of published numbers, given {path!r}, which does not exist")


def _name(job: Settings) -> str:
    """A job's name for trackers: its overrides, as far as they change the result; else its number."""
    kept = [entry for entry in job["overrides"] if not entry.startswith(("experiment=", "hydra.", "paths."))]
    return ",".join(kept) or str(job["number"])


@contextmanager
def _collected_warnings() -> Iterator[list[str]]:
    """Collect what edgemin's loggers warn of inside, each warning once."""
    found: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if (message := record.getMessage()) not in found:
                found.append(message)

    handler = Collect(logging.WARNING)
    logging.getLogger("edgemin").addHandler(handler)
    try:
        yield found
    finally:
        logging.getLogger("edgemin").removeHandler(handler)


def _other_tasks(study: Study, transfer: Mapping[str, Settings]) -> dict[str, Splits]:
    """The tasks that rows are scored on without being trained for them."""
    tasks = {name: config.construct(task, f"evaluate.transfer.{name}", Task) for name, task in transfer.items()}
    if "none" in tasks:
        raise UserError("evaluate.transfer: expected tasks with data, given none")
    others = {name: load(task) for name, task in tasks.items()}
    for name, splits in others.items():
        classes = study.splits is not None and study.splits.kind.one_class and splits.kind.one_class
        if not classes or name == study.task.name:
            raise UserError(
                f"evaluate.transfer: expected other classification tasks beside a classification task, given {name} "
                f"beside {study.task.name}"
            )
    return others


def _primary(study: Study) -> tuple[str, str, str] | None:
    if study.splits is None:
        return None
    return study.task.name, next(iter(study.splits.evaluation)), study.splits.metrics[0]


def _content(
    settings: Settings,
    job: Settings,
    study: Study,
    started: datetime,
    done: list[Done],
    warnings: list[str],
    primary: tuple[str, str, str] | None,
) -> dict[str, Any]:
    task, splits = study.task, study.splits
    described: dict[str, Any] | None = None
    if splits is not None and primary is not None:
        described = {
            "name": task.name,
            "path": task.path,
            "max_length": task.max_length,
            "splits": list(task.evaluation_splits),
            "labels": list(splits.labels),
            "metric": primary[2],
            "train_examples": len(splits.train),
            "evaluation_examples": {name: len(examples) for name, examples in splits.evaluation.items()},
        }
    order, by_hand = settings["order"], settings["stages"]
    ablated = ablation(order)
    return {
        "edgemin": __version__,
        "study": settings["study"],
        "experiment": job["experiment"],
        "job": {"number": job["number"], "overrides": job["overrides"], "command": job["command"]},
        "started": started.isoformat(timespec="seconds"),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": study.seed,
        "task": described,
        "order": {
            "name": order_name(order, by_hand),
            "stages": student_stages(order, by_hand),
            "comparisons": study.comparisons,
            "ablation": ablated.described(student_stages(order, by_hand)) if ablated is not None else None,
        },
        "config": study.settings,
        "host": host(),
        "versions": versions(),
        "git": git_revision(),
        "precision": study.trainer.lightning_precision,
        "device": study.trainer.device,
        "published": PUBLISHED_FILE if settings.get("published") is not None else None,
        "nodes": [_node(entry) for entry in done],
        "warnings": warnings,
    }


def _node(done: Done) -> dict[str, Any]:
    model, *stages = done.path.split("/")
    return {"path": done.path, "model": model, "stages": stages, **vars(done)}
