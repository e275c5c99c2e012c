"""The jobs of one command: planned before the first begins, run, and told of in one table after the last.

Hydra's configuration is read here, in [`ahead`][edgemin.study.ahead] and in [`settings`][edgemin.study.settings], for
`edgemin.train` alone; from there on, settings are plain dictionaries.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import OmegaConf

from edgemin import cli
from edgemin.cli import Failure
from edgemin.config import construct
from edgemin.errors import SharedError, UserError
from edgemin.plain_text import printable
from edgemin.processes import launch
from edgemin.study import ahead, failures, own_process
from edgemin.study.settings import check_paths, is_launched, mistake, read, words
from edgemin.tracking import Tracker, launch_group

if TYPE_CHECKING:
    from omegaconf import DictConfig


class Ended(BaseException):
    """Ends the command before any job, because of its cause, or because all that was asked for is done."""


@contextmanager
def _ending() -> Iterator[None]:
    """Inside a callback: Hydra makes a mere warning of any `Exception` that one raises."""
    try:
        yield
    except Exception as error:
        raise Ended from error


class Jobs(Callback):
    """The jobs of one command. Hydra runs them, and calls this object before the first and after the last.

    Attributes:
        failed: what went wrong in the jobs and around them, as far as this process knows.
    """

    def __init__(self) -> None:
        self.failed: list[Failure] = []
        self._names: list[str] = []  # of a sweep's jobs by number, where they are known before the first begins
        self._sweep: DictConfig | None = None  # while one goes on

    def run(self, command: Callable[[], object]) -> None:
        """Run Hydra's command line. What goes wrong outside of the jobs is said here."""
        token = _current.set(self)
        try:
            command()
        except Ended as ended:
            if isinstance(ended.__cause__, Exception):
                self._fail(ended.__cause__)
        except Exception as error:
            if mistake(error) is None and self._sweep is not None and is_launched(self._sweep.hydra):
                self._gave_up(error, self._sweep)
            elif isinstance(error, OSError) and error.filename is not None:  # Hydra makes directories before the jobs
                line = f"paths.outputs: {error.strerror} ({error.filename})"
                self.say(cli.failures(UserError(line)), error, by_all=False)
            else:
                self._fail(error)
        finally:
            _current.reset(token)

    def _fail(self, error: Exception) -> None:
        if (found := mistake(error)) is None:
            raise error
        self.say(cli.failures(found), error)

    def _gave_up(self, error: Exception, sweep: DictConfig) -> None:
        """A table of what has ended, where the launcher does not wait for the rest: joblib, when a worker is killed."""
        line = f"the launcher gave up: {type(error).__name__}: {printable(str(error))}"
        self.say([Failure(line, foreseen=False)], error)
        self._conclude(sweep)
        print("Run the same command again for the rest. Of jobs that run on in a cluster, this makes the tables:")
        print(f"  python -m edgemin.report study={sweep.hydra.sweep.dir}")

    def say(
        self, found: Sequence[Failure], error: Exception, *, by_all: bool = True, with_traceback: bool = False
    ) -> None:
        """Say what went wrong: once, if all processes know of it; else here, and end, so that the launcher ends all."""
        self.failed += found
        here = launch.place()
        alone = here.world > 1 and not by_all
        if alone or here.rank == 0:
            cli.tell(found, error, with_traceback=with_traceback)
        if alone:
            sys.exit(cli.exit_code(found))

    # --- what Hydra calls ---------------------------------------------------------------------------------

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse what would lead out of `paths.outputs`; with `plan=true` print the plan and end."""
        with _ending():
            check_paths(config)
            if (launcher := config.hydra.runtime.choices.get("launcher")) is not None:
                raise UserError(f"launcher: expected the jobs of a sweep (-m), given one job and {launcher}")
            if config.get("plan") is True:
                ahead.plan([ahead.Job("", lambda: config)], alone=True)
                raise Ended

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Plan every job, and end where one cannot work; with `plan=true` print one tree of all and end."""
        with _ending():
            check_paths(config)
            alone, jobs = config.get("plan") is True, ahead.jobs(config)
            if jobs and (alone or ahead.is_here(config)):
                ahead.plan(jobs, alone=alone)
                if alone:
                    raise Ended
            if jobs:
                failures.check_alone(Path(config.hydra.sweep.dir), len(jobs))
            self._names, self._sweep = [job.name for job in jobs], config

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write, print and log the table over the jobs, and name those that failed."""
        with _ending():
            self._conclude(config)

    def _conclude(self, config: DictConfig) -> None:
        # Loaded only now: Hydra asks for this object before it answers --help.
        from edgemin.report.serving import commands
        from edgemin.report.write import of_study

        if config.get("plan") or launch.place().rank > 0:
            return
        directory = Path(config.hydra.sweep.dir)
        failed = failures.below(directory, self._names)
        self.failed += failed  # some are of other processes
        lines = [failure.line for failure in failed]
        try:
            report = of_study(directory, lines)
            written = report.write()
            report.show()
        except UserError as error:
            print(f"No table over the sweep: {error}", file=sys.stderr)
            return
        print("The sweep's page, tables and figures:")
        for name in ("report.md", *(name for name in written if name.endswith(".png"))):
            print(f"  {written[name]}")
        for line in commands(directory):
            print(line)
        try:
            tracker = construct(OmegaConf.to_container(config.logger, resolve=True), "logger", Tracker)
            tracker.sweep(directory, launch_group(config.study, directory), config.study)
        except UserError as error:
            print(f"The sweep's table is not logged: {error}", file=sys.stderr)


# Hydra makes its callbacks itself, by their names in conf/train.yaml, so they cannot be handed the object that
# edgemin.train holds. Where there is none, in a launcher's process, a fresh one does for the one job there.
_current: ContextVar[Jobs | None] = ContextVar("jobs", default=None)


def current() -> Jobs:
    """The jobs of the command that runs."""
    return _current.get() or Jobs()


# --- one job ----------------------------------------------------------------------------------------------


def run(cfg: DictConfig) -> None:
    """One job of a run or sweep. What goes wrong in it is said in one line and kept, and a sweep goes on."""
    try:
        (Path(HydraConfig.get().runtime.output_dir) / failures.FILE).unlink(missing_ok=True)  # of an earlier try
        if is_launched(HydraConfig.get()) and not cfg.get("plan"):
            _run_launched(cfg)
        else:
            _run_here(cfg)
    except Exception as error:
        _report(error)


def _run_launched(cfg: DictConfig) -> None:
    """A job in a launcher's process, which does not load torch: it waits for the process that does the work."""
    if (world := launch.place().world) > 1:
        raise SharedError(
            f"launcher: expected one process for each job (tasks_per_node: 1, no torchrun), given {world}; "
            "for several write srun or torchrun ... -m edgemin.train trainer=ddp"
        )
    own_process.run_job(*read(cfg), logging=OmegaConf.to_container(HydraConfig.get().job_logging, resolve=True))


def _run_here(cfg: DictConfig) -> None:
    from edgemin.processes import ranks
    from edgemin.report.serving import commands
    from edgemin.study.job import plan_job, run_job
    from edgemin.study.tree import print_plans

    try:
        ranks.agree()  # Hydra has brought all processes here
    except SharedError as error:  # but one, which has ended: there is nothing to go on with
        raise UserError(*error.args) from error
    settings, job, transfer = ranks.together(lambda: read(cfg))
    if settings["plan"]:  # of a sweep whose jobs are not known before they begin
        print_plans([""], [ranks.together(lambda: plan_job(settings, job, transfer, timed=True))], whole=True)
    else:
        run_job(settings, job, transfer)
        if ranks.is_main() and HydraConfig.get().mode is RunMode.RUN:  # a sweep says it once, of all its jobs
            for line in commands(job["run_dir"]):
                print(line)


def _report(error: Exception) -> None:
    """Say what went wrong in a job, and keep it in the job's directory for the table over a sweep."""
    context, here = HydraConfig.get(), launch.place()
    run_dir, foreseen = Path(context.runtime.output_dir), isinstance(error, UserError)
    sweeping = context.mode is RunMode.MULTIRUN
    name = f"{ahead.job_name(context.job.num, context.overrides.task, words())}: " if sweeping else ""
    line = name + printable(str(error) if foreseen else f"{type(error).__name__}: {error}")
    told = line if foreseen else f"{line} (not foreseen; its traceback is in {run_dir / failures.FILE})"
    logging.getLogger("edgemin").info("error: %s", told)  # the job's log; on the terminal it is said below
    kept = here.rank == 0 and failures.keep(run_dir, Failure(told, foreseen), error)
    current().say(
        [Failure(told if kept else line, foreseen)],
        error,
        by_all=here.world == 1 or isinstance(error, SharedError),
        with_traceback=not (kept or foreseen),
    )
