"""Reads run.json and gives typed access to it; docs/run_json.md documents every field."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from edgemin.errors import UserError
from edgemin.plain_text import printable
from edgemin.report.fields import wrong

SCHEMA = 2
FILE = "run.json"


@dataclass(frozen=True)
class Row:
    """One row of the stage table: an evaluated, measured artifact.

    Args:
        file: the run.json it was read from.
        name: its name, made unique within the run.
        data: the row as the file has it.
    """

    file: Path
    name: str
    data: Mapping[str, Any]

    @property
    def model(self) -> str:
        """The model its path starts at: `teacher`, `student`, or one that the study added."""
        return str(self.data["model"])

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages behind it, in order."""
        return _strings(self.data, "stages")

    @property
    def control(self) -> bool:
        """Whether it is there only to be compared with."""
        return bool(self.data.get("control"))

    @property
    def artifact(self) -> str | None:
        """Its directory below `paths.store`."""
        return self.data.get("artifact")

    @property
    def made_from(self) -> str | None:
        """The name of the row whose artifact it was made from."""
        return self.data.get("made_from")

    @property
    def transfer(self) -> tuple[str, ...]:
        """Tasks it was scored on without having been trained for them."""
        return _strings(self.data, "transfer")

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader of its numbers must know."""
        return _strings(self.data, "notes")

    @property
    def quantized(self) -> bool:
        """Whether it has quantized layers of our own, whose file is small but which torch computes in float."""
        return bool(self.get("findings", "quantization"))

    @property
    def runtimes(self) -> Mapping[str, Mapping[str, Any]]:
        """What depends on the runtime, by its name."""
        return self.get("cost", "runtimes") or {}

    @property
    def metrics(self) -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
        """`{task: {split: {metric: value}}}`, fractions."""
        return self.data.get("metrics") or {}

    def get(self, *keys: str | None) -> Any:
        """What lies at a path of keys, or None where any of them is missing."""
        return _at(self.data, keys)

    def number(self, *keys: str | None) -> float | None:
        """The number at a path of keys; None where it is missing or not finite."""
        value = self.get(*keys)
        return float(value) if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class Run:
    """One job: its run.json.

    Args:
        file: where it was read from.
        data: all of it.
    """

    file: Path
    data: Mapping[str, Any]

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The rows in the order the study prints them; a name used twice gets a number behind it."""
        seen: dict[str, int] = {}
        rows = []
        for row in self.data["rows"]:
            name = row["name"]
            seen[name] = seen.get(name, 0) + 1
            rows.append(Row(self.file, name if seen[name] == 1 else f"{name} ({seen[name]})", row))
        return tuple(rows)

    @property
    def study(self) -> str:
        """The name of the study it belongs to."""
        return str(self.data["study"])

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.data["seed"])

    @property
    def overrides(self) -> Mapping[str, str]:
        """What the user changed on the command line: `{key: value}`."""
        found = {}
        for text in _strings(self.data["job"], "overrides"):
            key, _, value = text.lstrip("+~").partition("=")
            found[key] = value.strip("'\"")
        return found

    @property
    def when(self) -> str:
        """When it ended (or else started), as ISO 8601; empty where the file does not say."""
        return str(self.data.get("ended") or self.data.get("started") or "")

    @property
    def task(self) -> str | None:
        """The task's name; None for a run of architectures alone."""
        return (self.data.get("task") or {}).get("name")

    @property
    def metric(self) -> str | None:
        """The task's primary metric."""
        return (self.data.get("task") or {}).get("metric")

    @property
    def splits(self) -> tuple[str, ...]:
        """The task's reported splits; the first is the one that deltas and figures use."""
        named = _strings(self.data.get("task") or {}, "splits")
        found = dict.fromkeys(split for row in self.rows for split in row.metrics.get(self.task or "", {}))
        return named or tuple(found)

    @property
    def first_split(self) -> str | None:
        """The split that differences and figures use."""
        return self.splits[0] if self.splits else None

    @property
    def processor(self) -> str | None:
        """The model of the CPU it was measured on."""
        return (self.data.get("host") or {}).get("cpu")

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the run warned about."""
        return _strings(self.data, "warnings")

    @property
    def order(self) -> Mapping[str, Any]:
        """The order of stages: its `name`, its `stages`, and the `ablation` that expanded it."""
        return self.data.get("order") or {}

    @property
    def nodes(self) -> tuple[Mapping[str, Any], ...]:
        """The plan's nodes, in the order they ran."""
        return tuple(node for node in self.data.get("nodes") or () if isinstance(node, Mapping))

    def config(self, *keys: str) -> Any:
        """What lies at a path of keys of the configuration, or None where any of them is missing."""
        return _at(self.data.get("config"), keys)

    def setting(self, key: str) -> str:
        """A setting as a table shows it: the override, else what the config holds, else `default`."""
        if key == "study":
            return self.study
        if key in self.overrides:
            return self.overrides[key] or "-"
        value = self.config(*key.split("."))
        if isinstance(value, Mapping):
            value = value.get("name")
        return "default" if value is None else str(value)

    def reference(self, name: str, row: Row) -> Row | None:
        """What a row is compared with: its `parent`, or the first row of the model `teacher` or `student`."""
        if name == "parent":
            return next((other for other in self.rows if other.name == row.made_from), None)
        return next((other for other in self.rows if other.model == name), None)

    def score(self, row: Row) -> float | None:
        """A row's primary metric on the first split."""
        known = self.task and self.first_split and self.metric
        return row.number("metrics", self.task, self.first_split, self.metric) if known else None


def read(path: Path | str) -> Run:
    """Reads one run.json.

    Args:
        path: the file, or the job directory that holds it.

    Raises:
        UserError: there is no such file, it is not JSON, not this schema, or a field has the wrong type.
    """
    file = Path(path)
    file = file / FILE if file.is_dir() else file
    try:
        data = _printable(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{file}: expected a job's run.json, given a path that does not exist") from None
    except OSError as error:
        raise UserError(f"{file}: expected a readable file, given {error.strerror}") from None
    except RecursionError:
        raise UserError(f"{file}: expected a job's run.json, given JSON that is nested too deeply") from None
    except ValueError as error:
        raise UserError(
            f"{file}: expected JSON, given a corrupt or incomplete file ({printable(str(error))})"
        ) from None
    if not isinstance(data, dict):
        raise UserError(f"{file}: expected a JSON object, given another value")
    schema = data.get("schema")
    if schema != SCHEMA or isinstance(schema, bool):
        by = f", written by EdgeMIN {data['edgemin']}" if isinstance(data.get("edgemin"), str) else ""
        raise UserError(
            f"{file}: schema: expected {SCHEMA}, given {str(schema)[:40]}{by}: run the job again with this EdgeMIN, or "
            "build its report with the one that wrote it"
        )
    if problem := wrong(data):
        raise UserError(f"{file}: {problem}")
    return Run(file, data)


def _printable(value: Any) -> Any:
    """The same with all texts as lines that no terminal acts on."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(key): _printable(one) for key, one in value.items()}
    return [_printable(one) for one in value] if isinstance(value, list) else value


def find(directory: Path | str) -> list[Path]:
    """The run.json files of a study: the directory's own, or else all those below it, in job order.

    Raises:
        UserError: there is none.
    """
    top = Path(directory)
    if (top / FILE).is_file():
        return [top / FILE]
    found = sorted(
        (file for file in top.rglob(FILE) if file.is_file()), key=lambda file: _natural(file.relative_to(top))
    )
    if not found:
        what = "one that has none" if top.is_dir() else "a path that is not a directory"
        raise UserError(f"study: expected a directory with run.json in or below it, given {top} ({what})")
    return found


def _natural(path: Path) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", path.as_posix())
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _at(value: Any, keys: Sequence[str | None]) -> Any:
    for key in keys:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def _strings(data: Mapping[str, Any], key: str) -> tuple[str, ...]:
    return tuple(str(item) for item in data.get(key) or ())
