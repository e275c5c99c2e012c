"""One job: plan, train, score, measure, write `run.json`, print the tables."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgemin import __version__
from edgemin.measure.machine import host
from edgemin.processes import ranks
from edgemin.progress import live_line, node_line
from edgemin.report import published as literature
from edgemin.report.write import Report, of_job
from edgemin.store.disk import disk_errors, write_atomically
from edgemin.store.provenance import git_revision, versions
from edgemin.study import failures, predictions, results, tree
from edgemin.study.nodes import Study
from edgemin.study.order import ablation, order_name, student_stages
from edgemin.study.pipeline import Done, Pipeline
from edgemin.study.reading import Settings, read
from edgemin.study.scoring import Scoring

PUBLISHED_FILE = "published.yaml"


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
    asked = read(settings, job, transfer, measured=False)
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
            asked = ranks.together(lambda: read(settings, job, transfer, measured=True))
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
            # one that an earlier command left here is not this job's, should it end without a result
            ranks.from_main(lambda: (run_dir / failures.RESULT).unlink(missing_ok=True))
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
            "train_texts": len(splits.without_labels.train),
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
