"""Trackers: where a job's training curves, table rows and figures go while it runs.

A tracker records; nothing reads it back. Every job writes ``training.csv``; :class:`WandbTracker` sends the
same numbers, the table and the figures to Weights & Biases too. A pipeline calls ``start``, then ``log``,
``rows`` and ``figures`` in any order, and ``close`` in a ``finally``: all jobs of a Hydra sweep share one
process, and an open run would swallow the next.
"""

from __future__ import annotations

import csv
import json
import logging
import netrc
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal
from urllib.parse import urlsplit

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from edgemin.errors import UserError
from edgemin.plain_text import csv_cell

CSV_NAME = "training.csv"
CSV_COLUMNS = ("stage", "step", "metric", "value")
# What the W&B server accepts.
_MAX_NAME, _MAX_TAG = 128, 64

_log = logging.getLogger(__name__)


class Tracker:
    """``training.csv`` in the job's directory: one line per number, columns ``stage,step,metric,value``.

    The base of every tracker, and one by itself. The file is appended to and flushed at each call, so that a
    killed job keeps what it logged; after a resumed stage a step can stand there twice, and the later line
    holds. Rows and figures are files of the job already.
    """

    def __init__(self) -> None:
        self._file: IO[str] | None = None

    def start(
        self, run_dir: Path, study: str, job_name: str, config: Mapping[str, Any], tags: Sequence[str] = ()
    ) -> None:
        """Open the record of one job.

        Args:
            run_dir: The job's directory; everything a tracker writes lies below it.
            study: The study's name, shared by all jobs of a sweep.
            job_name: What tells this job from its neighbours, such as its overrides.
            config: The resolved configuration.
            tags: Tags of this job, added to the tracker's own.
        """
        assert self._file is None, "close() comes before the next start()"
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / CSV_NAME
        _drop_torn_line(path)
        self._file = path.open("a", newline="", encoding="utf-8")
        if self._file.tell() == 0:
            csv.writer(self._file).writerow(CSV_COLUMNS)
            self._file.flush()

    def log(self, stage: str, metrics: Mapping[str, float], step: int) -> None:
        """Record ``metrics`` of ``stage`` at ``step``; each stage counts its own steps."""
        assert self._file is not None, "start() comes before log()"
        lines = [(csv_cell(stage), step, csv_cell(name), repr(float(value))) for name, value in metrics.items()]
        csv.writer(self._file).writerows(lines)
        self._file.flush()

    def rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record the job's table: rows as they stand in ``run.json``."""

    def figures(self, paths: Iterable[Path]) -> None:
        """Record the drawn figures that are PNG; the other formats are for print."""

    def close(self, failed: bool) -> None:
        """End the record, marked as failed or finished. May be called twice, or before ``start``."""
        if self._file is not None:
            self._file.close()
            self._file = None


class WandbTracker(Tracker):
    """Weights & Biases beside ``training.csv``: a run per job, grouped by study, in ``<run_dir>/wandb``.

    A stage's metrics are named ``<stage>/<metric>`` over an axis of their own, ``<stage>/step``. The table is
    logged as ``stages``, each of its numbers also as the summary entry ``row/<row>/<column>``, a figure as
    ``figure_<name>``. Console, code, git and the machine's load are not sent: their sampler would run while
    latency is measured.

    Args:
        project: The W&B project.
        entity: The W&B user or team; the account's default if None.
        mode: ``auto`` takes ``WANDB_MODE`` where it is set, else ``online`` when the user is logged in
            (``WANDB_API_KEY`` or a netrc entry), else ``offline``; where the server cannot be reached it
            warns and goes on offline. The other modes are taken at their word.
        tags: Tags of every run.
    """

    def __init__(
        self,
        project: str = "edgemin",
        entity: str | None = None,
        mode: Literal["auto", "online", "offline", "disabled"] = "auto",
        tags: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self._project = project
        self._entity = entity
        self._mode = mode
        self._tags = tuple(tags)
        self._wandb: Any = None
        self._run: Any = None
        self._defined: set[str] = set()

    def start(
        self, run_dir: Path, study: str, job_name: str, config: Mapping[str, Any], tags: Sequence[str] = ()
    ) -> None:
        """See :meth:`Tracker.start`.

        Raises:
            UserError: The server refuses or is not there, and ``mode`` is not ``auto``.
        """
        import wandb  # here, so that logger=csv never loads it

        super().start(run_dir, study, job_name, config, tags)
        self._wandb = wandb
        self._defined = set()
        options = {
            "project": self._project,
            "entity": self._entity,
            "group": study[:_MAX_NAME],
            "name": job_name[:_MAX_NAME],
            "config": dict(config),
            "tags": list(dict.fromkeys(tag[:_MAX_TAG] for tag in (*self._tags, *tags) if tag)),
            "dir": str(run_dir),
        }
        mode = resolve_mode(self._mode)
        try:
            self._run = self._init(mode, options)
        except wandb.Error as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            if self._mode != "auto" or mode == "offline":
                raise UserError(f"logger.mode: W&B cannot start in mode {mode!r}: {reason}") from error
            warnings.warn(f"W&B does not answer ({reason}): this run is logged offline", stacklevel=2)
            self._run = self._init("offline", options)

    def _init(self, mode: str, options: Mapping[str, Any]) -> Any:
        settings = self._wandb.Settings(
            silent=True,
            console="off",
            save_code=False,
            disable_git=True,
            x_disable_stats=True,
            init_timeout=30.0,
            reinit="finish_previous",
        )
        return self._wandb.init(mode=mode, settings=settings, **options)

    def log(self, stage: str, metrics: Mapping[str, float], step: int) -> None:
        """See :meth:`Tracker.log`."""
        super().log(stage, metrics, step)
        axis = f"{stage}/step"
        named = {f"{stage}/{name}": float(value) for name, value in metrics.items()}
        # One by one, not by `stage/*`: stages named by paths would catch each other's metrics.
        for name in [name for name in named if name not in self._defined]:
            self._run.define_metric(name, step_metric=axis)
            self._defined.add(name)
        self._run.log({axis: step, **named})

    def rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """See :meth:`Tracker.rows`."""
        assert self._run is not None, "start() comes before rows()"
        flat = [flatten(row) for row in rows]
        columns = list(dict.fromkeys(column for row in flat for column in row))
        cells = [[row.get(column) for column in columns] for row in flat]
        self._run.log({"stages": self._wandb.Table(columns=columns, data=cells, allow_mixed_types=True)})
        for row in flat:
            numbers = {c: v for c, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)}
            self._run.summary.update({f"row/{row['name']}/{column}": v for column, v in numbers.items()})

    def figures(self, paths: Iterable[Path]) -> None:
        """See :meth:`Tracker.figures`."""
        assert self._run is not None, "start() comes before figures()"
        drawn = [path for path in paths if path.suffix.lower() == ".png"]
        if drawn:
            self._run.log({f"figure_{path.stem}": self._wandb.Image(str(path)) for path in drawn})

    def close(self, failed: bool) -> None:
        """See :meth:`Tracker.close`."""
        super().close(failed)
        run, self._run = self._run, None
        if run is None:
            return
        try:
            if run.offline:
                # The file W&B itself writes online; offline it is missing (wandb issue 9646), and the numbers
                # would lie in a binary log that nothing but an upload can read.
                summary = json.dumps(dict(run.summary), default=dict)
                Path(run.dir, "wandb-summary.json").write_text(summary, encoding="utf-8")
        finally:
            run.finish(exit_code=int(failed))


class TrackerLogger(Logger):
    """Lightning's logger for one stage: what ``self.log`` records goes to ``tracker.log(stage, ...)``.

    Args:
        tracker: A started tracker.
        stage: The stage's name or path.
    """

    def __init__(self, tracker: Tracker, stage: str) -> None:
        super().__init__()
        self._tracker = tracker
        self._stage = stage

    @property
    def name(self) -> str:
        """The stage."""
        return self._stage

    @property
    def version(self) -> str:
        """Always empty: a stage is trained once per job."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Forward ``metrics``; Lightning gives the step whenever a stage trains."""
        self._tracker.log(self._stage, metrics, 0 if step is None else step)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the tracker got the whole configuration at its start."""


def resolve_mode(mode: str, environment: Mapping[str, str] | None = None) -> str:
    """The mode W&B is started in: ``mode`` itself unless it is ``auto``.

    Args:
        mode: ``auto``, or a mode of ``wandb.init``.
        environment: The environment's variables; those of this process if None.

    Returns:
        ``WANDB_MODE`` where it is set, else ``online`` for a user who is logged in, else ``offline``.
    """
    environment = os.environ if environment is None else environment
    if mode != "auto":
        return mode
    return environment.get("WANDB_MODE") or ("online" if _logged_in(environment) else "offline")


def flatten(row: Mapping[str, Any]) -> dict[str, Any]:
    """One row of ``run.json`` as one flat line of a table, in the row's order.

    Nested keys are joined by dots (``cost.latency_ms.padded.p50``), lists by commas; null is left out.
    """
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{inner}": v for inner, v in flatten(value).items()})
        elif isinstance(value, list | tuple):
            flat[key] = ", ".join(str(item) for item in value)
        elif value is not None:
            flat[key] = value
    return flat


def _logged_in(environment: Mapping[str, str]) -> bool:
    if environment.get("WANDB_API_KEY"):
        return True
    host = urlsplit(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    named = environment.get("NETRC")
    for path in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if netrc.netrc(path).authenticators(host):
                return True
        except FileNotFoundError:
            continue
        except (netrc.NetrcParseError, OSError) as error:
            _log.warning("%s cannot be read (%s): W&B is taken as not logged in", path, error)
    return False


def _drop_torn_line(path: Path) -> None:
    """Cut what a killed job left after the last full line."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
