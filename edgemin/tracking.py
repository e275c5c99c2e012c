"""Trackers: where a job's training curves, table rows and figures go while it runs.

A tracker records; nothing reads it back. Every job writes `training.csv`;
[`WandbTracker`][edgemin.weights_and_biases.WandbTracker] sends the same numbers, the table and the figures to Weights &
Biases too. A pipeline calls `start`, then `log`, `rows` and `figures` in any order, and `close` in a `finally`: all
jobs of a Hydra sweep share one process, and a run left open would take the next job's numbers too.

The curves of a stage are kept beside its artifact in the same form, so that a job that finds it trained has them too.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from edgemin.plain_text import csv_cell

CSV_NAME = "training.csv"
CSV_COLUMNS = ("stage", "step", "metric", "value")

# One point of a training curve: the stage, its step, what was logged at it.
Point = tuple[str, int, dict[str, float]]


def write_points(path: Path, points: Iterable[Point]) -> None:
    """Write training curves, a line per number."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        for stage, step, metrics in points:
            writer.writerows((stage, step, name, repr(value)) for name, value in metrics.items())


def read_points(path: Path) -> Iterator[Point]:
    """The points that [`write_points`][edgemin.tracking.write_points] wrote, in their order."""
    with path.open(newline="", encoding="utf-8") as file:
        for (stage, step), lines in groupby(csv.DictReader(file), key=lambda line: (line["stage"], line["step"])):
            yield stage, int(step), {line["metric"]: float(line["value"]) for line in lines}


class Tracker:
    """`training.csv` in the job's directory: one line per number, columns `stage,step,metric,value`.

    This is the base of every tracker, and by itself the one of `logger=csv`. The file is flushed at each call, so that
    a killed job keeps what it logged. A job that is run again in the same directory begins the file anew: what was
    trained comes from the store, what was begun from its checkpoint, so that no step stands twice. Rows and figures are
    files of the job already.
    """

    def __init__(self) -> None:
        self._file: IO[str] | None = None

    def start(
        self, run_dir: Path, group: str, job_name: str, config: Mapping[str, Any], tags: Sequence[str] = ()
    ) -> None:
        """Open the record of one job.

        Args:
            run_dir: The job's directory; everything a tracker writes lies below it.
            group: What the jobs of one launch have in common.
            job_name: What tells this job from its neighbours, such as its overrides.
            config: The resolved configuration.
            tags: Tags of this job, added to the tracker's own.
        """
        assert self._file is None, "close() comes before the next start()"
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = (run_dir / CSV_NAME).open("w", newline="", encoding="utf-8")
        csv.writer(self._file).writerow(CSV_COLUMNS)
        self._file.flush()

    def log(self, stage: str, metrics: Mapping[str, float], step: int) -> None:
        """Record `metrics` of `stage` at `step`; each stage counts its own steps."""
        assert self._file is not None, "start() comes before log()"
        lines = [(csv_cell(stage), step, csv_cell(name), repr(float(value))) for name, value in metrics.items()]
        csv.writer(self._file).writerows(lines)
        self._file.flush()

    def rows(self, rows: Sequence[Mapping[str, Any]], task: Mapping[str, Any] | None) -> None:
        """Record the job's table: rows and task as they stand in `run.json`."""

    def figures(self, paths: Iterable[Path]) -> None:
        """Record the drawn figures that are PNG; the other formats are for print."""

    def sweep(self, directory: Path, group: str, study: str) -> None:
        """Record the table and the figures over all jobs of a launch, as they lie in its directory."""

    def close(self, failed: bool) -> None:
        """End the record, marked as failed or finished. May be called twice, or before `start`."""
        if self._file is not None:
            self._file.close()
            self._file = None


def launch_group(study: str, directory: Path) -> str:
    """What the jobs of one launch share: the study, and the name of the launch's directory, which is its time."""
    return f"{study}/{directory.name}"
