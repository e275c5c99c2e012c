"""The Hydra callback that comes before any job: names are checked, a plan is printed, every job of a sweep is planned.

Hydra makes a run's directory only after it, so what is refused here, or was to be planned alone, leaves none.
"""

from __future__ import annotations

import functools
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from hydra.utils import get_class
from omegaconf import OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from edgemin.errors import UserError
from edgemin.plain_text import printable
from edgemin.report import failures
from edgemin.study.settings import check_paths, is_wrong_choice, one_line, read

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from edgemin.study.tree import Planned

#: Launchers whose jobs find this machine's data and devices. Elsewhere a job is planned when it starts.
_HERE = ("BasicLauncher", "JoblibLauncher", "LocalLauncher")


class Ended(BaseException):
    """Ends the command before any job. No ``Exception``, as Hydra makes a warning of any that a callback raises.

    Args:
        lines: what went wrong; none where all that was asked for is done.
    """

    def __init__(self, lines: Sequence[str] = ()) -> None:
        super().__init__(*lines)
        self.lines = lines


class PlanAhead(Callback):
    """Before a run or a sweep. It trains, locks and writes nothing."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuses what would lead out of `paths.outputs`; with `plan=true` prints the plan and ends."""
        _check(config)
        if (launcher := config.hydra.runtime.choices.get("launcher")) is not None:
            raise Ended([f"launcher: expected the jobs of a sweep (-m), given one job and {launcher}"])
        if config.get("plan") is True:
            _plan([_Job("", lambda: config)], alone=True)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Plans every job, and ends where one cannot work; with `plan=true` prints one tree of all and ends."""
        _check(config)
        alone, jobs = config.get("plan") is True, _jobs(config)
        failures.jobs[:] = [job.name for job in jobs]
        if jobs and (alone or get_class(config.hydra.launcher._target_).__name__ in _HERE):
            _plan(jobs, alone=alone)


class _Job(NamedTuple):
    name: str  #: for people; empty for a run alone
    compose: Callable[[], DictConfig]


def _check(config: DictConfig) -> None:
    try:
        check_paths(config)
    except UserError as error:
        raise Ended(str(error).splitlines()) from error


def _jobs(config: DictConfig) -> list[_Job]:
    """Every job of a sweep, as the sweeper expands it; none where it decides as it goes."""
    sweeper = get_class(config.hydra.sweeper._target_)
    if not hasattr(sweeper, "split_arguments"):  # the basic sweeper's; Optuna's asks for one job after another
        return []
    loader = GlobalHydra.instance().config_loader()
    fixed = list(config.hydra.overrides.task)
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    try:
        overrides = OverridesParser.create(config_loader=loader).parse_overrides([*params, *fixed])
        (jobs,) = sweeper.split_arguments(overrides, None)
    except HydraException:  # the sweeper is about to say so itself
        return []

    def compose(number: int, chosen: Sequence[str]) -> DictConfig:
        job = loader.load_sweep_config(config, list(chosen))
        with read_write(job), open_dict(job):
            job.hydra.job.id = job.hydra.job.num = number
        return job

    return [
        _Job(job_name(number, chosen, fixed), functools.partial(compose, number, chosen))
        for number, chosen in enumerate(jobs)
    ]


def job_name(number: int, overrides: Sequence[str], command: Sequence[str]) -> str:
    """A job of a sweep by its number and what the sweep gave it: all that is not one value in the whole command."""
    parser, fixed = OverridesParser.create(), set[str]()
    for word in command:
        if "=" in word:
            with suppress(HydraException):  # no override
                parsed = parser.parse_override(word)
                (fixed.discard if parsed.is_sweep_override() else fixed.add)(parsed.get_key_element())
    own = printable(" ".join(word for word in overrides if word.partition("=")[0] not in fixed))
    return f"job {number} ({own})" if own else f"job {number}"


def _plan(jobs: Sequence[_Job], *, alone: bool) -> None:
    """Plan all jobs, of several processes in each; where nothing else was asked for, print the plan and end."""
    from edgemin.processes import ranks
    from edgemin.study.tree import print_plans

    try:
        ranks.agree()  # Hydra has brought all processes here
        planned = ranks.together(lambda: _planned(jobs, timed=alone))
    except UserError as error:
        raise Ended(str(error).splitlines()) from error
    print_plans([job.name for job in jobs], planned, whole=alone)
    if alone:
        raise Ended


def _planned(jobs: Sequence[_Job], *, timed: bool) -> list[Planned]:
    """The plans of all jobs.

    Raises:
        UserError: a line for each job that cannot work.
    """
    from edgemin.study.job import plan_job

    planned, broken = [], []
    for job in jobs:
        try:
            with _as_hydra_has_it(job.compose()) as config:
                planned.append(plan_job(*read(config), timed=timed))
        except Exception as error:
            foreseen = isinstance(error, HydraException | OmegaConfBaseException | UserError)
            line = one_line(error)
            if not foreseen and not is_wrong_choice(error):
                traceback.print_exception(error)
                line = f"{type(error).__name__}: {line} (not foreseen)"
            broken.append(": ".join(filter(None, (job.name, line))))
    if broken:
        raise UserError("\n".join(broken))
    return planned


@contextmanager
def _as_hydra_has_it(config: DictConfig) -> Iterator[DictConfig]:
    """A configuration beside Hydra's own node, both as a job finds them."""
    before = HydraConfig.instance().cfg
    try:
        HydraConfig.instance().set_config(config)  # what the directory's name may refer to
        directory = config.hydra.run.dir if config.hydra.mode is RunMode.RUN else config.hydra.sweep.dir
        with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
            config.hydra.runtime.output_dir = os.path.abspath(directory)
        HydraConfig.instance().set_config(config)
        yield OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    finally:
        HydraConfig.instance().cfg = before
