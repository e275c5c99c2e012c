"""Weights & Biases: a run per job, the runs of a launch in one group, and one run with the table over all of them."""

from __future__ import annotations

import csv
import json
import logging
import netrc
import os
import re
import secrets
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from edgemin.errors import UserError
from edgemin.store.content import digest
from edgemin.store.disk import write_atomically
from edgemin.store.json_file import read_object
from edgemin.tracking import Tracker

# What the W&B server accepts.
_MAX_NAME, _MAX_TAG, _MAX_ID = 128, 64, 128
_MIB = 2**20
# The runtime whose file is the size that a row is compared by.
_RUNTIME = "torch"
# Of a configuration, what says where things lie and how they are logged, not what was asked for.
_PRIVATE = ("logger", "paths", "plan")
_ID_FILE = "job.json"

_log = logging.getLogger(__name__)


class WandbTracker(Tracker):
    """Weights & Biases beside `training.csv`: a run per job, in `<run_dir>/wandb`.

    A stage's metrics are named `<stage>/<metric>` over an axis of their own, `<stage>/step`. The summary has what
    jobs are compared by: `final/<metric>`, `final/size_mib`, `final/latency_<runtime>_ms`, `final/retained` of the
    last row that is no control, and the same of every row under `row/<row>/`. All else is in the table `stages`; a
    figure is logged as `figure_<name>`.

    The same job in the same directory goes on in its run. Console, code, git, the command line, names of user and host
    and the machine's load are not sent (their sampler would run while latency is measured), nor is the directory of an
    absolute path.

    Args:
        project: The W&B project.
        entity: The W&B user or team; the account's default if None.
        mode: `auto` takes `WANDB_MODE` where it is set, else `online` when the user is logged in
            (`WANDB_API_KEY` or a netrc entry), else `offline`; where the server cannot be reached it
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
        self._logged = 0

    def start(
        self, run_dir: Path, group: str, job_name: str, config: Mapping[str, Any], tags: Sequence[str] = ()
    ) -> None:
        """Open the job's run, or go on in the one that the same job began in this directory.

        Raises:
            UserError: The server refuses or is not there, and `mode` is not `auto`.
        """
        super().start(run_dir, group, job_name, config, tags)
        self._open(run_dir, group, job_name, config, tags, "job")

    def _open(
        self, run_dir: Path, group: str, name: str, config: Mapping[str, Any], tags: Sequence[str], job_type: str
    ) -> None:
        import wandb  # here, so that logger=csv never loads it

        self._wandb, self._defined, self._logged = wandb, set(), 0
        asked = {key: _without_directories(value) for key, value in config.items() if key not in _PRIVATE}
        kept = (_without_directories(tag)[:_MAX_TAG] for tag in (*self._tags, *tags) if tag)
        options = {
            "project": self._project,
            "entity": self._entity,
            "group": group[:_MAX_NAME],
            "job_type": job_type,
            "name": _without_directories(name)[:_MAX_NAME],
            "config": asked,
            "tags": list(dict.fromkeys(kept)),
            "dir": str(run_dir),
            "id": _run_id(run_dir, asked),
        }
        mode = resolve_mode(self._mode)
        try:
            self._run = self._init(mode, options)
        except wandb.Error as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            if self._mode != "auto" or mode == "offline":
                raise UserError(f"logger.mode: W&B cannot start in mode {mode!r}: {reason}") from error
            warnings.warn(f"W&B does not answer ({reason}): this run is logged offline", stacklevel=2)
            wandb.teardown()  # its service still has the run that did not begin, and refuses another of the same id
            self._run = self._init("offline", options)

    def _init(self, mode: str, options: Mapping[str, Any]) -> Any:
        settings = self._wandb.Settings(
            silent=True,
            console="off",
            save_code=False,
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
            init_timeout=30.0,
            reinit="finish_previous",
        )
        resume = {"resume": "allow"} if mode == "online" else {}  # offline there is nothing to go on in
        return self._wandb.init(mode=mode, settings=settings, **resume, **options)

    def log(self, stage: str, metrics: Mapping[str, float], step: int) -> None:
        """Log the numbers over the stage's own steps; what a run that goes on has already is not sent again."""
        super().log(stage, metrics, step)
        self._logged += 1
        axis = f"{stage}/step"
        named = {f"{stage}/{name}": float(value) for name, value in metrics.items()}
        # One by one, not by `stage/*`: stages named by paths would catch each other's metrics.
        for name in [name for name in (axis, *named) if name not in self._defined]:
            own = {} if name == axis else {"step_metric": axis}
            self._run.define_metric(name, summary="none", **own)
            self._defined.add(name)
        if self._logged > self._run.starting_step:
            self._run.log({axis: step, **named})

    def rows(self, rows: Sequence[Mapping[str, Any]], task: Mapping[str, Any] | None) -> None:
        """Log the table `stages`, and in the summary the numbers that jobs are compared by."""
        assert self._run is not None, "start() comes before rows()"
        self._table("stages", [flatten(row) for row in rows])
        summary = {f"row/{row['name']}/{key}": value for row in rows for key, value in headline(row, task).items()}
        final = next((row for row in reversed(rows) if not row["control"]), None)
        if final is not None:
            summary |= {f"final/{key}": value for key, value in headline(final, task).items()}
        self._run.summary.update(summary)

    def _table(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        columns = list(dict.fromkeys(column for line in lines for column in line))
        cells = [[line.get(column) for column in columns] for line in lines]
        self._run.log({name: self._wandb.Table(columns=columns, data=cells, allow_mixed_types=True)})

    def figures(self, paths: Iterable[Path]) -> None:
        """Log each figure that is a PNG as `figure_<name>`."""
        assert self._run is not None, "start() comes before figures()"
        drawn = [path for path in paths if path.suffix.lower() == ".png"]
        if drawn:
            self._run.log({f"figure_{path.stem}": self._wandb.Image(str(path)) for path in drawn})

    def sweep(self, directory: Path, group: str, study: str) -> None:
        """Send the rows of all jobs of a launch as one table, and the sweep's figures, as a run of its own."""
        jobs = [read_object(path) for path in sorted(directory.glob("**/run.json"))]
        lines = [
            {"job": run["job"]["number"], "overrides": " ".join(run["job"]["overrides"]), "seed": run["seed"]}
            | {"row": row["name"], "control": row["control"]}
            | headline(row, run["task"])
            for run in sorted(jobs, key=lambda run: int(run["job"]["number"]))
            for row in run["rows"]
        ]
        self._open(directory, group, "table", {"study": study}, (), "sweep")
        try:
            self._table("rows", lines)
            for path in sorted(directory.glob("tables/*.csv")):
                with path.open(newline="", encoding="utf-8") as file:
                    self._table(path.stem, list(csv.DictReader(file)))
            self.figures(sorted(directory.glob("figures/*.png")))
        finally:
            self.close(failed=False)

    def close(self, failed: bool) -> None:
        """End the run, marked as failed or finished; offline its summary is written to a file too."""
        super().close(failed)
        run, self._run = self._run, None
        if run is None:
            return
        try:
            if run.offline:
                # The file W&B itself writes online; offline it is missing (wandb issue 9646), and the numbers
                # would lie in a binary log that nothing but an upload can read.
                summary = json.dumps(dict(run.summary), default=dict)
                write_atomically(Path(run.dir, "wandb-summary.json"), summary.encode())
        finally:
            run.finish(exit_code=int(failed))


def resolve_mode(mode: str, environment: Mapping[str, str] | None = None) -> str:
    """The mode W&B is started in: `mode` itself unless it is `auto`.

    Args:
        mode: `auto`, or a mode of `wandb.init`.
        environment: The environment's variables; those of this process if None.

    Returns:
        `WANDB_MODE` where it is set, else `online` for a user who is logged in, else `offline`.
    """
    environment = os.environ if environment is None else environment
    if mode != "auto":
        return mode
    return environment.get("WANDB_MODE") or ("online" if _logged_in(environment) else "offline")


def flatten(row: Mapping[str, Any]) -> dict[str, Any]:
    """One row of `run.json` as one flat line of a table, in the row's order.

    Nested keys are joined by dots (`cost.runtimes.torch.size_bytes`), lists by commas; null is left out.
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


def headline(row: Mapping[str, Any], task: Mapping[str, Any] | None) -> dict[str, float]:
    """What a row is compared by: the task's first metric, `size_mib`, `latency_<runtime>_ms`, `retained`.

    Args:
        row: as in `run.json`.
        task: likewise; its metric on its first split.

    Returns:
        Plain numbers; latencies are p50, padded, in every runtime that was timed, `retained` is the metric over the
        teacher's. What is not known is absent.
    """
    found: dict[str, float] = {}
    if task is not None:
        found[task["metric"]] = row["metrics"][task["name"]][task["splits"][0]][task["metric"]]
    runtimes = row["cost"]["runtimes"]
    found["size_mib"] = runtimes[_RUNTIME]["size_bytes"] / _MIB
    for name, cost in runtimes.items():
        if latency := cost.get("latency_ms"):
            found[f"latency_{name}_ms"] = latency["padded"]["p50"]
    retained = (row["delta"].get("teacher") or {}).get("metric_retained")
    if retained is not None:
        found["retained"] = retained
    return found


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


def _without_directories(value: Any) -> Any:
    """A setting without the directories of absolute paths: they name users and machines, and compare nothing."""
    if isinstance(value, Mapping):
        return {key: _without_directories(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_directories(inner) for inner in value]
    if isinstance(value, str):
        return re.sub(r"(?<![^=,\[{ '\"])(~|/|[A-Za-z]:\\)[^,\]}'\"]*[/\\](?=[^/\\])", "", value)
    return value


def _run_id(run_dir: Path, asked: Mapping[str, Any]) -> str:
    """The id of a job's run: kept in its directory, for as long as the same is asked for there and it can be read."""
    path = run_dir / "wandb" / _ID_FILE
    content = digest(json.dumps(asked, sort_keys=True, default=str))
    with suppress(OSError, ValueError):  # of no file, or a damaged one
        kept = read_object(path)
        if kept.get("asked") == content and isinstance(kept.get("id"), str):
            return str(kept["id"])
    # Not from the directory's name alone: another machine may have one of the same name.
    name = re.sub(r"[^\w-]+", "-", f"{run_dir.parent.name}-{run_dir.name}", flags=re.ASCII).strip("-")
    made = f"{name[-(_MAX_ID - 9) :]}-{secrets.token_hex(4)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps({"id": made, "asked": content}) + "\n").encode())
    return made
