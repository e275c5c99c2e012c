"""From a job's settings to what it asks for: every part constructed, checked and planned before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemin import config
from edgemin.data.splits import Splits, load
from edgemin.data.task import Task
from edgemin.errors import UserError
from edgemin.measure.runtime import Measure
from edgemin.report import published as literature
from edgemin.report.published import Published
from edgemin.store.artifacts import Store
from edgemin.study.family import expanded
from edgemin.study.latency_tables import with_latency
from edgemin.study.nodes import Plan, Study
from edgemin.study.order import compared, row_specs
from edgemin.study.plan import build, unused
from edgemin.study.roots import Root
from edgemin.study.runtimes import check_lengths
from edgemin.tracking import Tracker
from edgemin.training.fitting import Trainer, use_threads
from edgemin.training.stage import Stage

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Asked:
    """What a job asks for, read and checked.

    Attributes:
        study: the models, stages, rows and data.
        plan: the results that it needs.
        store: where they are kept.
        tracker: where losses and tables are logged.
        measure: how rows are measured; `None`: not at all.
        transfer: the data of further tasks that rows are scored on, by name.
        published: the published numbers that stand beside the rows; `None` without any.
    """

    study: Study
    plan: Plan
    store: Store
    tracker: Tracker
    measure: Measure | None
    transfer: dict[str, Splits]
    published: Published | None


def read(settings: Settings, job: Settings, transfer: Mapping[str, Settings], *, measured: bool) -> Asked:
    """Read and check a job's settings. Nothing is trained, and nothing written but a missing latency table.

    Args:
        settings: the resolved configuration.
        job: what Hydra says of the job, as [`run_job`][edgemin.study.job.run_job] takes it.
        transfer: settings of the tasks that rows are also scored on, by name.
        measured: whether the latency table of a stage that is to reach a latency may be measured where it is missing.

    Raises:
        UserError: the first thing that cannot work.
    """
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


def _asked(settings: Settings, job: Settings, transfer: Mapping[str, Settings], measured: bool) -> Asked:
    study = read_study(settings)
    measure = config.construct(settings["measure"], "measure", Measure) if settings.get("measure") is not None else None
    tracker = config.construct(settings.get("logger"), "logger", Tracker)
    others = _other_tasks(study, transfer)
    published = _published(settings.get("published"))
    store, plan = Store(settings["paths"]["store"], settings["paths"]["outputs"]), build(study)
    if measure is not None:
        check_lengths(measure, [row.node for row in plan.rows])
    timed, notes = with_latency(study, plan, store, measure, measured=measured)  # minutes: after all else was checked
    if timed is not study:
        study, plan = timed, build(timed)
    plan.notes += notes
    store.check_writable({node.key: node.path for node in plan.nodes})
    plan.notes += unused(plan, settings, job["given"])
    return Asked(study, plan, store, tracker, measure, others, published)


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
