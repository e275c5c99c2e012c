"""Reads run.json: finds the files of a study, and refuses in one line what is none, or not of this schema."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edgemin.errors import UserError
from edgemin.plain_text import printable
from edgemin.report.fields import Content, Row

SCHEMA = 2
FILE = "run.json"

_EXPECTED = {
    "string_type": "a text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
}
_NAMES = {str: "a text", bool: "true or false", list: "a list", dict: "an object", int: "a whole number"}


class Run(Content):
    """One job: its run.json, and what follows from it.

    `file` is where it was read from.
    """

    file: Path

    @cached_property
    def overrides(self) -> Mapping[str, str]:
        """What the user changed on the command line: `{key: value}`."""
        found = {}
        for text in self.job.overrides:
            key, _, value = text.lstrip("+~").partition("=")
            found[key] = value.strip("'\"")
        return found

    @property
    def when(self) -> str:
        """When it ended (or else started), as ISO 8601; empty where the file does not say."""
        return self.ended or self.started

    @cached_property
    def splits(self) -> tuple[str, ...]:
        """The task's reported splits; differences and figures use the first."""
        scored = (split for row in self.rows for split in row.metrics.get(self.task.name or "", {}))
        return tuple(self.task.splits or dict.fromkeys(scored))

    @property
    def first_split(self) -> str | None:
        """The split that differences and figures use."""
        return self.splits[0] if self.splits else None

    def chosen(self, *keys: str) -> Any:
        """What lies at a path of keys of the configuration, or None where any of them is missing."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def setting(self, key: str) -> str:
        """A setting as a table shows it: the override, else what the configuration holds, else `default`."""
        if key == "study":
            return self.study
        if key in self.overrides:
            return self.overrides[key] or "-"
        value = self.chosen(*key.split("."))
        if isinstance(value, Mapping):
            value = value.get("name")
        return "default" if value is None else str(value)

    def reference(self, name: str, row: Row) -> Row | None:
        """What a row is compared with: its `parent`, or the first row of the model `teacher` or `student`.

        A row that was measured on another device is compared with rows of that device.
        """
        rows = (other for other in self.rows if other.device == row.device)
        if name == "parent":
            return next((other for other in rows if other.name == row.made_from), None)
        return next((other for other in rows if other.model == name), None)

    def score(self, row: Row) -> float | None:
        """A row's primary metric on the first split."""
        return row.score(self.task.name, self.first_split, self.task.metric)


def read(path: Path | str) -> Run:
    """Reads one run.json.

    Args:
        path: the file, or the job directory that holds it.

    Raises:
        UserError: there is no such file, it is not JSON, not this schema, or a field has the wrong type.
    """
    file = Path(path)
    file = file / FILE if file.is_dir() else file
    return parse(file, load(file, "a job's run.json"))


def load(file: Path, what: str) -> Any:
    """Reads a JSON file, with all texts as lines that no terminal acts on.

    Args:
        file: the file.
        what: what is expected there.

    Raises:
        UserError: there is no such file, or it is not JSON.
    """
    try:
        return _printable(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{file}: expected {what}, given a path that does not exist") from None
    except OSError as error:
        raise UserError(f"{file}: expected a readable file, given {error.strerror}") from None
    except RecursionError:
        raise UserError(f"{file}: expected {what}, given JSON that is nested too deeply") from None
    except ValueError as error:
        raise UserError(
            f"{file}: expected JSON, given a corrupt or incomplete file ({printable(str(error))})"
        ) from None


def parse(file: Path, data: Any) -> Run:
    """Checks what was read from a run.json; a row's name that is used twice gets a number behind it.

    Raises:
        UserError: it is not this schema, or a field has the wrong type.
    """
    if not isinstance(data, dict):
        raise UserError(f"{file}: expected a JSON object, given another value")
    schema = data.get("schema")
    if schema != SCHEMA or isinstance(schema, bool):
        by = f", written by EdgeMIN {data['edgemin']}" if isinstance(data.get("edgemin"), str) else ""
        raise UserError(
            f"{file}: schema: expected {SCHEMA}, given {str(schema)[:40]}{by}: run the job again with this EdgeMIN, or "
            "build its report with the one that wrote it"
        )
    try:
        run = Run.model_validate({**data, "file": file})
    except ValidationError as found:
        raise UserError(f"{file}: {wrong(found)}") from None
    seen: Counter[str] = Counter()
    rows = []
    for row in run.rows:
        seen[row.name] += 1
        again = {"name": f"{row.name} ({seen[row.name]})"} if seen[row.name] > 1 else {}
        rows.append(row.model_copy(update=again))
    return run.model_copy(update={"rows": rows})


def _printable(value: Any) -> Any:
    """The same with all texts as lines that no terminal acts on."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(key): _printable(one) for key, one in value.items()}
    return [_printable(one) for one in value] if isinstance(value, list) else value


def wrong(found: ValidationError) -> str:
    """The first field that is not as it must be: where it is, what was expected, what was given."""
    error = found.errors(include_url=False)[0]
    if error["type"] == "value_error":
        expected, given = error["ctx"]["error"], error["input"]
    else:
        expected, given = _EXPECTED[error["type"]], _kind(error["input"])
    named = [part for part in error["loc"] if part != "[key]"]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in named).removeprefix(".")
    return f"{where}: expected {expected}, given {given}"


def _kind(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 1024:
        return "a number that is too large"
    return "nothing" if value is None else _NAMES.get(type(value), "a number")


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
