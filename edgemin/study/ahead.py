"""Planning before the first job runs: every job is composed and planned, so that all that cannot work is told at once.

Hydra makes a run's directory only afterwards, so what is refused here, or was to be planned alone, leaves none. The
configuration is read for `edgemin.train`, as Hydra has it; nothing is trained, locked or written.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.utils import get_class
from omegaconf import OmegaConf, open_dict, read_write

from edgemin.errors import UserError
from edgemin.plain_text import printable
from edgemin.study.settings import mistake, read

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from edgemin.study.tree import Planned

# Launchers whose jobs find this machine's data and devices; those of any other are planned when they start.
_HERE = ("BasicLauncher", "JoblibLauncher", "LocalLauncher")


class Job(NamedTuple):
    """A job that is to be planned: its name for people, empty for a run alone, and its configuration."""

    name: str
    compose: Callable[[], DictConfig]


def is_here(config: DictConfig) -> bool:
    """Whether the jobs of a sweep are to run where this command runs. Others are planned when they start."""
    return get_class(config.hydra.launcher._target_).__name__ in _HERE


def jobs(config: DictConfig) -> list[Job]:
    """Every job of a sweep, as the sweeper expands it; none if the sweeper chooses jobs only as it goes."""
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
        Job(job_name(number, chosen, fixed), functools.partial(compose, number, chosen))
        for number, chosen in enumerate(jobs)
    ]


def job_name(number: int, overrides: Sequence[str], command: Sequence[str]) -> str:
    """A job of a sweep by its number and the overrides that it does not share with all jobs of the command."""
    parser, fixed = OverridesParser.create(), set[str]()
    for word in command:
        if "=" in word:
            with suppress(HydraException):  # no override
                parsed = parser.parse_override(word)
                (fixed.discard if parsed.is_sweep_override() else fixed.add)(parsed.get_key_element())
    own = printable(" ".join(word for word in overrides if word.partition("=")[0] not in fixed))
    return f"job {number} ({own})" if own else f"job {number}"


def plan(jobs: Sequence[Job], *, alone: bool) -> None:
    """Plan all jobs, in each process where there are several, and print what is to do.

    Args:
        jobs: of a run or a sweep.
        alone: whether nothing else was asked for; then every stage is printed.

    Raises:
        UserError: a line for each job that cannot work.
    """
    from edgemin.processes import ranks
    from edgemin.study.tree import print_plans

    ranks.agree()  # Hydra has brought all processes here
    planned = ranks.together(lambda: _planned(jobs, timed=alone))
    print_plans([job.name for job in jobs], planned, whole=alone)


def _planned(jobs: Sequence[Job], *, timed: bool) -> list[Planned]:
    from edgemin.study.job import plan_job

    planned, broken = [], []
    for job in jobs:
        try:
            with _as_hydra_has_it(job.compose()) as config:
                planned.append(plan_job(*read(config), timed=timed))
        except Exception as error:
            if (found := mistake(error)) is None:
                error.add_note(f"met in planning {job.name or 'the job'}")
                raise
            broken.append(": ".join(filter(None, (job.name, printable(str(found))))))
    if broken:
        raise UserError(*broken)
    return planned


@contextmanager
def _as_hydra_has_it(config: DictConfig) -> Iterator[DictConfig]:
    """Give a job's configuration as the job will find it, with Hydra's own node where Hydra then has it."""
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
