"""From Hydra's configuration to plain settings, and Hydra's errors as lines that name a key.

This is what `edgemin.train` reads its configuration with; from here on, settings are plain dictionaries.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.default_element import ConfigDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from edgemin.config import KEYS, hint, unknown
from edgemin.errors import UserError, check_name
from edgemin.plain_text import printable
from edgemin.tracking import launch_group

# The extra of edgemin that has to be installed for each launcher.
_EXTRAS = {"joblib": "joblib", "submitit_slurm": "slurm", "submitit_local": "slurm", "ray": "ray"}
_PUBLISHED = "_published"


def conf_directory() -> str:
    """`conf/`: inside the installed package, or beside it in a clone."""
    package = Path(__file__).parents[1]
    inside = package / "conf"
    return str(inside if inside.is_dir() else package.parent / "conf")


def read(cfg: DictConfig) -> tuple[dict[str, Any], dict[str, Any], dict[str, dict[str, Any]]]:
    """A job's settings, what Hydra says of the job, and the tasks that are only scored.

    Raises:
        UserError: what is wrong in the configuration and can be told before any class is constructed.
    """
    try:
        plain = resolved(cfg)
    except OmegaConfBaseException as error:
        raise UserError(one_line(error)) from error
    check_paths(cfg)
    context, references = HydraConfig.get(), _references(cfg)
    _check_keys(plain, references)
    given = _given(context.overrides.task, references)
    for key in given:
        group = key.partition(".")[0]
        if group != key and group in plain and plain[group] is None:
            raise UserError(_turned_off(key))
    of_order = [key for key in given if key.partition(".")[0] == "order"]
    if plain.get("stages") is not None and of_order:
        raise UserError(f"stages: expected no keys of order beside stages=[...], given {', '.join(of_order)}")
    job = {
        "number": context.job.num if context.mode is RunMode.MULTIRUN else 0,
        # what launches a sweep makes no difference to its results
        "overrides": [word for word in context.overrides.task if not word.startswith("launcher=")],
        "command": " ".join(["python -m edgemin.train", *words()]),
        "experiment": context.runtime.choices.get("experiment"),
        "given": given,
        "set_by": _set_by(context.runtime.choices),
        "run_dir": Path(context.runtime.output_dir),
        "group": _group(plain["study"], context),
    }
    if not isinstance(plain.get("plan"), bool):
        raise UserError(f"plan: expected true or false, given {plain.get('plan')!r}")
    evaluate = plain.get("evaluate")
    if (
        not isinstance(evaluate, dict)
        or set(evaluate) != {"transfer", "max_drop", "margin"}
        or not _are_names(evaluate["transfer"])
    ):
        raise UserError(f"evaluate.transfer: expected a list of tasks such as [mnli, qqp], given {evaluate}")
    return plain, job, {name: _task(name, plain["task"]) for name in evaluate["transfer"]}


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain values; None for `measure` where its choice, `none`, has settings but no class.

    Raises:
        OmegaConfBaseException: a value is missing, or refers to one that there is not.
    """
    found = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(found, dict)
    plain = {str(key): node for key, node in found.items()}
    if isinstance(plain.get("measure"), dict) and plain["measure"].get("_target_", "") is None:
        plain["measure"] = None
    return plain


def is_launched(context: Any) -> bool:
    """Whether jobs run at once, in processes of a launcher (joblib's, submitit's, Ray's), given the node `hydra`."""
    return context.mode is RunMode.MULTIRUN and not context.launcher._target_.endswith(".BasicLauncher")


def words() -> list[str]:
    """The words behind `python -m edgemin.train`; a launcher's process has them from the sweep's `multirun.yaml`."""
    context = HydraConfig.get()
    kept = Path(context.sweep.dir) / "multirun.yaml"
    if not (is_launched(context) and kept.is_file()):  # there is none yet where the jobs are planned ahead
        return sys.argv[1:]
    overrides = OmegaConf.load(kept).hydra.overrides
    return ["-m", *(word for word in (*overrides.hydra, *overrides.task) if word != "hydra.mode=MULTIRUN")]


def check_paths(cfg: DictConfig) -> None:
    """Refuse a study's name and paths if no directory can be called so.

    Raises:
        UserError: `study` is no name of a directory, or a path is no text.
    """
    try:
        found = {key: OmegaConf.select(cfg, key) for key in ("study", "paths.outputs", "paths.store")}
    except OmegaConfBaseException as error:
        raise UserError(one_line(error)) from error
    check_name(found.pop("study"), "study")
    for key, path in found.items():
        if not isinstance(path, str) or not path.strip() or not path.isprintable():
            raise UserError(f"{key}: expected a directory, given {path!r}")


def _check_keys(plain: Mapping[str, Any], references: Sequence[tuple[str, str]]) -> None:
    """Refuse keys that nothing reads: no study has them, no class is named in them, no other value refers to them."""
    values = {key for key, node in plain.items() if not (isinstance(node, dict) and "_target_" in node)}
    for key in sorted((values | {f"paths.{name}" for name in plain["paths"]}) - KEYS):
        if not any(_meets(key, reference) for _, reference in references):
            raise UserError(f"{key}: unknown key{hint(key, KEYS)}")


def _references(cfg: DictConfig) -> list[tuple[str, str]]:
    """Every interpolation of the configuration: the node that has it, and the key that it takes its value from."""
    written = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(written, dict)
    hydra: Any = HydraConfig.get()
    directories = {key: OmegaConf.to_container(hydra[key], resolve=False) for key in ("run", "sweep", "job")}
    return [
        (str(reader), reference)
        for reader, node in [*written.items(), *directories.items()]
        for reference in re.findall(r"\$\{([^${}:]+)\}", str(node))
    ]


def _given(overrides: Iterable[str], references: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """The keys that the command line sets, each with the nodes that take values from it by interpolation.

    A choice of a group is the key that it is put under: `quantize@qat=qat` sets `qat`.
    """
    keys = dict.fromkeys(word.partition("=")[0].lstrip("+~").rpartition("@")[2] for word in overrides)
    return {key: [reader for reader, reference in references if _meets(key, reference)] for key in keys}


def _set_by(choices: Mapping[str, str | None]) -> dict[str, str]:
    """The keys that the chosen experiment and order set themselves, each with the choice: `experiment=demo`."""
    loader: Any = GlobalHydra.instance().config_loader()  # whose interface lacks its repository of files
    found: dict[str, str] = {}
    for group in ("order", "experiment"):
        if (choice := choices.get(group)) is not None:
            found |= dict.fromkeys(_written(loader.repository, f"{group}/{choice}"), f"{group}={choice}")
    return found


def _written(repository: Any, name: str) -> Iterator[str]:
    """The full keys of what a file sets, with what it includes to be set (`/prune/_random@random_prune`)."""
    file = repository.load_config(name)
    if file is None:
        return
    yield from _keys(OmegaConf.to_container(file.config))
    for entry in file.defaults_list or ():
        if isinstance(entry, ConfigDefault) and entry.path not in (None, "_self_"):
            path = entry.path if entry.path.startswith("/") else f"{name.rpartition('/')[0]}/{entry.path}"
            below = f"{entry.package}." if entry.package not in (None, "_here_") else ""
            yield from (f"{below}{key}" for key in _written(repository, path.lstrip("/")))


def _keys(node: Any, above: str = "") -> Iterator[str]:
    """The full keys of all values in a node."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _keys(value, f"{above}.{name}" if above else str(name))
    else:
        yield above


def _meets(key: str, reference: str) -> bool:
    """Whether a reference takes the value of a key, or one inside or around it."""
    return f"{key}.".startswith(f"{reference}.") or ("." in key and f"{reference}.".startswith(f"{key}."))


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _task(name: str, own: dict[str, Any]) -> dict[str, Any]:
    """The configuration of another task, read where this task is read from."""
    loader = GlobalHydra.instance().config_loader()
    overrides = [f"task={name}", f"task.max_evaluation_examples={own['max_evaluation_examples'] or 'null'}"]
    try:
        composed = loader.load_configuration("train", overrides, run_mode=RunMode.RUN)
    except HydraException as error:
        raise UserError(f"evaluate.transfer: {one_line(error)}") from error
    if own["subset"] is not None and own["path"] is not None:
        composed.task.path = own["path"]
    found = OmegaConf.to_container(composed.task, resolve=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def mistake(error: Exception) -> UserError | None:
    """The mistake of the user's that an exception stands for, whoever raised it; None for what was not foreseen."""
    if isinstance(error, UserError):
        return error
    foreseen = isinstance(error, HydraException | OmegaConfBaseException)
    foreseen = foreseen or (isinstance(error, TypeError | ValueError) and _is_hydras(error))
    return UserError(one_line(error)) if foreseen else None


def one_line(error: Exception) -> str:
    """What Hydra refuses as one line: the key, what was expected, what was given."""
    text = printable(str(error))
    if isinstance(error, TypeError) or "Config group override must be" in text:
        return _wrong_choice()  # a number, null or the like, or a list of such, in the place of a choice
    if wanted := re.search(r"Missing mandatory value: (\S+)", text):
        return f"{wanted[1]}: expected a value, as there is no default, given none"
    if named := re.search(r"Could not override '([^']*)'", text):
        key = getattr(error.__cause__, "full_key", None) or named[1]
        group, above = key.partition(".")[0], getattr(error.__cause__, "parent_node", None)
        if (
            isinstance(above, DictConfig)
            and not above
            and key.count(".") == 1
            and Path(conf_directory(), group).is_dir()
        ):
            return _turned_off(key)
        return unknown(key, f" (to add one of your own write +{key}=...)")
    if choice := re.search(
        r"Could not find '([^']*)' Available options in '([^']*)': (.*?)(?: Config search path|$)", text
    ):
        options = [option for option in choice[3].split() if not option.startswith("_")]
        group, _, name = choice[1].rpartition("/")
        if choice[2] == "hydra/launcher" and name in _EXTRAS:
            return f"launcher: expected one that is installed (pip install 'edgemin[{_EXTRAS[name]}]'), given {name}"
        if name.endswith(_PUBLISHED):
            there = ", ".join(option for option in options if option.endswith(_PUBLISHED))
            return f"{choice[2]}: expected a method with a published budget ({there}), given {name}, which has none"
        own = re.search(r"provider=command-line, path=file://(\S+)", text)
        if own and Path(own[1], f"{name}.yaml").is_file():
            return f"--config-dir: expected the directory that holds {group}/, given {own[1]}, which is {group}/ itself"
        return f"{choice[2]}: expected one of {', '.join(options)}, given {choice[1].rpartition('/')[2]}"
    if absent := re.search(r"Interpolation key '(\w+)\.(\S+)' not found.*full_key: (\w+)", text, re.DOTALL):
        group, key, reader = absent.groups()
        return f"{group}: expected a choice with the setting {key}, which {reader} takes from it, given one without"
    return text.removesuffix(" Set the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace.")


def _turned_off(key: str) -> str:
    """The line for a setting of a group that is not used."""
    group = key.partition(".")[0]
    return f"{key}: expected no settings of {group}, which is turned off ({group}=none or null), given one"


def _is_hydras(error: Exception) -> bool:
    """Whether Hydra itself raised it, to refuse what the command line says."""
    return "hydra" in Path(traceback.extract_tb(error.__traceback__)[-1].filename).parts


def _wrong_choice() -> str:
    """The line for a choice that there is not, found among the words of the command: Hydra's error does not name it."""
    for word in sys.argv[1:]:
        key, _, value = word.partition("=")
        files = (
            sorted(file.stem for file in Path(conf_directory(), key).glob("[!_]*.yaml")) if key.isidentifier() else []
        )
        if wrong := [choice for choice in value.split(",") if files and choice not in files]:
            return f"{key}: expected one of {', '.join(files)}, given {wrong[0]}"
    return "a group: expected the name of a choice"


def _group(study: Any, context: Any) -> str:
    """The name that the jobs of one launch share, see [`launch_group`][edgemin.tracking.launch_group]."""
    run_dir = Path(context.runtime.output_dir)
    if context.mode is RunMode.MULTIRUN:
        return launch_group(study, Path(context.sweep.dir))
    return launch_group(study, run_dir.parent if run_dir.name == "0" else run_dir)
