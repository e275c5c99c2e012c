"""``python -m edgemin.train``: from one configuration to the stage table.

Only Hydra is imported at the top, so that ``--help`` and ``--cfg job`` answer at once; everything that loads torch is
imported when jobs are planned, or when several processes start.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path

from edgemin.processes import stopping

if __name__ == "__main__":
    stopping.install()  # before all that takes time to load

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from edgemin.errors import UserError
from edgemin.processes import launch
from edgemin.report import failures, sweep
from edgemin.report.failures import Failure
from edgemin.study import own_process
from edgemin.study.ahead import Ended, job_name
from edgemin.study.settings import conf_directory, is_hydras, is_launched, one_line, read, words


@hydra.main(version_base="1.3", config_path=conf_directory(), config_name="train")
def _job(cfg: DictConfig) -> None:
    """One job of a run or sweep. What goes wrong in it is said in one line, and the other jobs of a sweep go on."""
    with stopping.handled():  # in a launcher's process, which did not come through main()
        if is_launched(HydraConfig.get()) and not cfg.get("plan"):
            _launched_job(cfg)
        else:
            _one_job(cfg)


def _launched_job(cfg: DictConfig) -> None:
    """A job in a launcher's process, which does not load torch: it waits for the process that does the work."""
    try:
        failures.forget(Path(HydraConfig.get().runtime.output_dir))
        if (world := launch.place().world) > 1:
            raise UserError(
                f"launcher: expected one process for each job (tasks_per_node: 1, no torchrun), given {world}; "
                "for several write srun or torchrun ... -m edgemin.train trainer=ddp"
            )
        logging = OmegaConf.to_container(HydraConfig.get().job_logging, resolve=True)
        own_process.run_job(*read(cfg), logging=logging)
    except Exception as error:
        _report_job(error)


def _one_job(cfg: DictConfig) -> None:
    from edgemin.processes import ranks

    try:
        ranks.agree()  # Hydra has brought all processes here
    except UserError as error:
        _report_job(error, by_all=False)
    try:
        failures.forget(Path(HydraConfig.get().runtime.output_dir))
        _run(cfg)
    except ranks.SharedError as error:
        _report_job(error)
    except Exception as error:
        if launch.place().world > 1 and not isinstance(error, UserError):
            raise  # this process ends, and its launcher ends the others
        _report_job(error, by_all=False)


def main() -> None:
    """The command line: exit code 0, or 2 after one line per mistake of the user's, or 1 where one was not foreseen.

    A signal ends all jobs, with exit code 143 (SIGTERM) or 130 (SIGINT). Of several processes, as torchrun or srun
    starts them, all run the jobs; the first has their directories and speaks.
    """
    with stopping.handled():
        _run_all()


def _run_all() -> None:
    try:
        here = launch.place()
    except UserError as error:
        sys.exit(f"error: {error}")
    if here.world == 1:
        _command_line()
    else:
        # before torch is loaded: DDP warns where it looked for parameters without a gradient and found none
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from edgemin.processes import ranks

        ranks.start()
        with nullcontext() if here.rank == 0 else _aside():
            mistake = _command_line()
        ranks.finish(mistake)
    if failures.seen:
        sys.exit(2 if all(failure.foreseen for failure in failures.seen) else 1)


@contextmanager
def _aside() -> Iterator[None]:
    """For a process that is not the first: a job's directory that is thrown away, and no voice."""
    with (
        tempfile.TemporaryDirectory(prefix="edgemin-") as directory,
        Path(os.devnull).open("w") as nowhere,
        redirect_stdout(nowhere),
        warnings.catch_warnings(action="ignore"),
    ):
        sys.argv += [f"hydra.run.dir='{directory}'", f"hydra.sweep.dir='{directory}'", "hydra.output_subdir=null"]
        if not any(word.startswith("~hydra.callbacks") for word in sys.argv):
            sys.argv += ["~hydra.callbacks.tables"]  # over a sweep
        yield


def _command_line() -> str | None:
    """Run all jobs; gives what went wrong outside of them."""
    debugging = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing several lines and leaving
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # Ray drops lines that differ from others in numbers alone
    try:
        _all_jobs()
    except Ended as ended:
        return _say([Failure(line) for line in ended.lines]) or None
    except (HydraException, OmegaConfBaseException, UserError) as error:
        if debugging:
            raise
        return _report(error)
    except (TypeError, ValueError) as error:
        if debugging or not is_hydras(error):
            raise
        return _report(error)
    except OSError as error:  # Hydra makes the job's directory before the job begins
        if debugging or error.filename is None:
            raise
        return _report(UserError(f"paths.outputs: {error.strerror} ({error.filename})"), by_all=False)
    return None


def _all_jobs() -> None:
    """All jobs. Where a launcher gives up, as joblib does when a worker is killed, a table of what has ended."""
    try:
        _job()
    except (HydraException, OmegaConfBaseException, UserError):
        raise
    except Exception as error:
        if not any(is_launched(config.hydra) for config in sweep.running):
            raise
        _say([Failure(f"the launcher gave up: {type(error).__name__}: {one_line(error)}", foreseen=False)], error)
        sweep.finish()


def _report(error: Exception, *, by_all: bool = True) -> str:
    """Say what went wrong outside of the jobs."""
    return _say([Failure(one_line(error))], error, by_all=by_all)


def _report_job(error: Exception, *, by_all: bool = True) -> None:
    """Say what went wrong in a job, and keep it in the job's directory for the table over a sweep."""
    context, foreseen = HydraConfig.get(), isinstance(error, UserError)
    run_dir = Path(context.runtime.output_dir)
    sweeping = context.mode is RunMode.MULTIRUN
    line = f"{job_name(context.job.num, context.overrides.task, words())}: " if sweeping else ""
    line += one_line(error) if foreseen else f"{type(error).__name__}: {one_line(error)}"
    told = line if foreseen else f"{line} (not foreseen; its traceback is in {run_dir / failures.FILE})"
    logging.getLogger("edgemin").info("error: %s", told)  # the job's log; on the terminal it is said below
    if failures.keep(run_dir, Failure(told, foreseen), error):
        _say([Failure(told, foreseen)], error, by_all=by_all)
    else:
        _say([Failure(line, foreseen)], error, by_all=by_all, with_traceback=not foreseen)


def _say(
    found: Sequence[Failure], error: Exception | None = None, *, by_all: bool = True, with_traceback: bool = False
) -> str:
    """A line for each: once, where all processes know of it; else here, and end, so that the launcher ends all."""
    here = launch.place()
    alone = here.world > 1 and not by_all
    failures.seen.extend(found)
    if alone or here.rank == 0:
        for failure in found:
            print(f"error: {failure.line}", file=sys.stderr, flush=True)
        if error is not None and (with_traceback or os.environ.get("EDGEMIN_TRACEBACK")):
            traceback.print_exception(error)
    if alone:
        sys.exit(2)
    return "; ".join(failure.line for failure in found)


def _run(cfg: DictConfig) -> None:
    from edgemin.processes import ranks
    from edgemin.study.job import plan_job, run_job
    from edgemin.study.tree import print_plans

    plain, job, transfer = ranks.together(lambda: read(cfg))
    if plain["plan"]:  # else printed before any job, see edgemin/ahead.py
        print_plans([""], [ranks.together(lambda: plan_job(plain, job, transfer, timed=True))], whole=True)
    else:
        run_job(plain, job, transfer)


if __name__ == "__main__":
    main()
