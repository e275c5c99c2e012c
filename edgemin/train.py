"""``python -m edgemin.train``: from one configuration to the stage table. The only reader of ``DictConfig``.

Only Hydra is imported at the top, so that ``--help`` and ``--cfg job`` answer at once; everything that loads torch is
imported when a job
starts, or when several processes do.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from edgemin import stopping

if __name__ == "__main__":
    stopping.install()  # before all that takes time to load

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from edgemin import launch
from edgemin.errors import UserError
from edgemin.plain_text import printable

_failed: list[str] = []


def conf_directory() -> str:
    """``conf/``: inside the installed package, or beside it in a clone."""
    package = Path(__file__).parent
    inside = package / "conf"
    return str(inside if inside.is_dir() else package.parent / "conf")


@hydra.main(version_base="1.3", config_path=conf_directory(), config_name="train")
def _job(cfg: DictConfig) -> None:
    """One job of a run or sweep. What the user did wrong is said in one line, and the other jobs of a sweep go on."""
    with stopping.handled():  # in a launcher's process, which did not come through main()
        _one_job(cfg)


def _one_job(cfg: DictConfig) -> None:
    from edgemin import ranks

    try:
        ranks.agree()  # Hydra has brought all processes here
    except UserError as error:
        _report(error, by_all=False)
    try:
        _run(cfg)
    except ranks.SharedError as error:
        _report(error)
    except UserError as error:
        _report(error, by_all=False)


def main() -> None:
    """The command line: exit code 0, or 2 after one line per mistake of the user's.

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
        from edgemin import ranks

        ranks.start()
        with nullcontext() if here.rank == 0 else _aside():
            mistake = _command_line()
        ranks.finish(mistake)
    if _failed:
        sys.exit(2)


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
    try:
        _job()
    except (HydraException, OmegaConfBaseException, UserError) as error:
        if debugging:
            raise
        return _report(error)
    except ValueError as error:
        if debugging or "Config group override must be" not in str(error):
            raise
        return _report(UserError(f"{_null_group()}: expected the name of a choice, given null"))
    except OSError as error:  # Hydra makes the job's directory before the job begins
        if debugging or error.filename is None:
            raise
        return _report(UserError(f"paths.outputs: {error.strerror} ({error.filename})"), by_all=False)
    return None


def _null_group() -> str:
    """The group that the command line sets to null; Hydra's error does not name it."""
    nulls = (word.partition("=")[0] for word in sys.argv[1:] if word.endswith("=null"))
    return next((key for key in nulls if "." not in key), "a group")


def _report(error: Exception, *, by_all: bool = True) -> str:
    """Say what went wrong: once, where all processes know of it; else here, and end, so that the launcher ends all."""
    here = launch.place()
    alone = here.world > 1 and not by_all
    line = one_line(error)
    _failed.append(line)
    if alone or here.rank == 0:
        print(f"error: {line}", file=sys.stderr, flush=True)
        if os.environ.get("EDGEMIN_TRACEBACK"):
            traceback.print_exception(error)
    if alone:
        sys.exit(2)
    return line


def one_line(error: Exception) -> str:
    """A mistake of the user's as one line: the key, what was expected, what was given."""
    text = printable(str(error))
    if unknown := re.search(r"Could not override '([^']*)'", text):
        key = getattr(error.__cause__, "full_key", None) or unknown[1]
        return f"{key}: unknown key (to add one of your own write +{key}=...)"
    if choice := re.search(
        r"Could not find '([^']*)' Available options in '([^']*)': (.*?)(?: Config search path|$)", text
    ):
        options = [option for option in choice[3].split() if not option.startswith("_")]
        return f"{choice[2]}: expected one of {', '.join(options)}, given {choice[1].rpartition('/')[2]}"
    return text.removesuffix(" Set the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace.")


def _run(cfg: DictConfig) -> None:
    from edgemin import ranks
    from edgemin.job import plan_job, run_job

    plain, job, transfer = ranks.together(lambda: _read(cfg))
    if plain["plan"]:
        ranks.together(lambda: plan_job(plain, job, transfer))
    else:
        run_job(plain, job, transfer)


def _read(cfg: DictConfig) -> tuple[dict[str, Any], dict[str, Any], dict[str, dict[str, Any]]]:
    """The settings, what Hydra says of the job, and the tasks that are only scored."""
    try:
        settings = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(one_line(error)) from error
    assert isinstance(settings, dict)
    context = HydraConfig.get()
    chosen = {override.partition("=")[0].lstrip("+~") for override in context.overrides.task}
    plain: dict[str, Any] = {str(key): value for key, value in settings.items()}
    if plain.get("stages") is not None and "order" in chosen:
        raise UserError("stages: expected either stages=[...] or order=<name>, given both")
    job = {
        "number": context.job.num if context.mode is RunMode.MULTIRUN else 0,
        "overrides": list(context.overrides.task),
        "experiment": context.runtime.choices.get("experiment"),
        "given": _given(cfg, context.overrides.task),
        "run_dir": Path(context.runtime.output_dir),
    }
    for key in ("outputs", "store"):
        if not isinstance(plain["paths"].get(key), str):
            raise UserError(f"paths.{key}: expected a directory, given {plain['paths'].get(key)!r}")
    if not isinstance(plain["plan"], bool):
        raise UserError(f"plan: expected true or false, given {plain['plan']!r}")
    if set(plain["evaluate"]) != {"transfer"} or not _are_names(plain["evaluate"]["transfer"]):
        raise UserError(f"evaluate.transfer: expected a list of tasks such as [mnli, qqp], given {plain['evaluate']}")
    return plain, job, {name: _task(name, plain["task"]) for name in plain["evaluate"]["transfer"]}


def _given(cfg: DictConfig, overrides: Iterable[str]) -> dict[str, list[str]]:
    """The keys that the command line sets, each with the nodes that take values from it by interpolation.

    A choice of a group is the key that it is put under: ``quantize@qat=qat`` sets ``qat``.
    """
    written = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(written, dict)
    references = [
        (str(reader), reference)
        for reader, node in written.items()
        for reference in re.findall(r"\$\{([^${}:]+)\}", str(node))
    ]
    keys = dict.fromkeys(word.partition("=")[0].lstrip("+~").rpartition("@")[2] for word in overrides)
    return {key: [reader for reader, reference in references if _meets(key, reference)] for key in keys}


def _meets(key: str, reference: str) -> bool:
    """Whether a reference takes the value of a key, or one inside or around it."""
    return f"{key}.".startswith(f"{reference}.") or ("." in key and f"{reference}.".startswith(f"{key}."))


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _task(name: str, own: dict[str, Any]) -> dict[str, Any]:
    """The configuration of another task, read where this task is read from."""
    loader = GlobalHydra.instance().config_loader()
    overrides = [f"task={name}", f"task.max_evaluation_examples={own['max_evaluation_examples'] or 'null'}"]
    if own["subset"] is not None and own["path"] is not None:
        overrides.append(f"task.path='{own['path']}'")
    try:
        composed = loader.load_configuration("train", overrides, run_mode=RunMode.RUN)
    except HydraException as error:
        raise UserError(f"evaluate.transfer: {one_line(error)}") from error
    found = OmegaConf.to_container(composed.task, resolve=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


if __name__ == "__main__":
    main()
