"""Where rows come from: a Hugging Face data set (Hub id or local copy) or the user's own files."""

from __future__ import annotations

import csv
import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq

from edgemin.data.task import Task
from edgemin.errors import UserError
from edgemin.store.content import digest
from edgemin.tab_separated import quoting
from edgemin.tasks.base import listed, refusal

log = logging.getLogger(__name__)

FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
SPLIT_COLUMN = "split"
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Table:
    """The rows of one split, column by column; `class_names` has columns whose integers, or lists, stand for names."""

    columns: Mapping[str, Sequence[Any]]
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))


def read_tables(task: Task) -> dict[str, Table]:
    """Read train and every evaluation split of a task.

    Args:
        task: The task; its `path` is a Hub id, a local copy of one, or own data.

    Returns:
        One table for each split the task names.

    Raises:
        UserError: If the path, the subset or a split is not there, or a file cannot be read.
    """
    wanted = (task.train_split, *task.evaluation_splits)
    if task.path is None:
        raise refusal("path", "a directory, a file or a Hub id", None)
    path = Path(task.path).expanduser()
    own = path.is_file() or (path.is_dir() and _is_own_data(path, task, wanted))
    if own and task.subset not in (None, path.name):  # a data set's directory of one subset may be read by itself
        raise refusal("subset", f"null for files of your own ({path})", task.subset)
    if path.is_file():
        return _one_file(path, wanted)
    if own:
        return {split: read_file(_split_file(path, split)) for split in wanted}
    if not path.is_dir() and not _HUB_ID.fullmatch(task.path):
        raise refusal("path", "an existing directory or file, or a Hub id", task.path)
    return _data_set(task, str(path) if path.is_dir() else task.path, wanted)


def local_files(path: str | None) -> list[Path]:
    """The files that a task may be read from, where they are on this machine."""
    place = Path(path).expanduser() if path is not None else None
    if place is None or not place.exists():
        return []
    found = [place] if place.is_file() else sorted(file for level in ("*", "*/*") for file in place.glob(level))
    return [file.resolve() for file in found if file.is_file()]


def _is_own_data(path: Path, task: Task, wanted: Sequence[str]) -> bool:
    if any((path / f"{split}{suffix}").is_file() for split in wanted for suffix in FORMATS):
        return True
    return task.subset is None and not (path / "README.md").is_file()


def _split_file(directory: Path, split: str) -> Path:
    found = [path for suffix in FORMATS if (path := directory / f"{split}{suffix}").is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise refusal("path", f"one file for the split '{split}'", ", ".join(path.name for path in found))
    there = listed(sorted(entry.name for entry in directory.iterdir())) or "nothing"
    expected = f"a file for the split '{split}' ({split}.csv, .tsv, .jsonl, .json or .parquet) in {directory}"
    raise refusal("path", expected, there)


def _one_file(path: Path, wanted: Sequence[str]) -> dict[str, Table]:
    table = read_file(path)
    if SPLIT_COLUMN not in table.columns:
        expected = f"a directory with one file per split, or a file with a column '{SPLIT_COLUMN}'"
        raise refusal("path", expected, f"{path} with the columns {', '.join(table.columns)}")
    rows: dict[str, list[int]] = {split: [] for split in wanted}
    names = [str(value).strip() for value in table.columns[SPLIT_COLUMN]]
    for row, name in enumerate(names):
        if name in rows:
            rows[name].append(row)
    for split, members in rows.items():
        if not members:
            raise refusal("path", f"rows of the split '{split}' in {path}", listed(sorted(set(names))))
    return {
        split: Table(
            {name: [column[row] for row in members] for name, column in table.columns.items()},
            table.class_names,
        )
        for split, members in rows.items()
    }


def read_file(path: Path) -> Table:
    """Read one CSV, TSV, JSON, JSONL or parquet file.

    CSV cells stay the strings they are: `NA` and `null` are words, and `01` is not 1.

    Raises:
        UserError: If the format is none of these, or the file is not what its name says.
    """
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _json, ".json": _json, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise refusal("path", f"a file that ends in {', '.join(FORMATS)}", path)
    try:
        return reader(path)
    except RecursionError as error:
        raise refusal("path", f"a readable {path.suffix} file", f"{path} (nested too deeply)") from error
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        if isinstance(error, UserError):
            raise
        raise refusal("path", f"a readable {path.suffix} file in UTF-8", f"{path} ({error})") from error


def _csv(path: Path) -> Table:
    # The default limit, 128 KiB a cell, is a guard against hostile streams, and long documents exceed it.
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as file:
        separator = "\t" if path.suffix.lower() == ".tsv" else ","
        how = quoting(path) if separator == "\t" else csv.QUOTE_MINIMAL
        if how == csv.QUOTE_NONE:
            log.warning("%s: quotation marks are taken for characters, as every line is whole without them", path)
        rows = csv.reader(file, delimiter=separator, quoting=how, strict=True)
        header = [name.strip() for name in next(rows, [])]
        _check_separator(path, header, separator)
        if len(set(header)) < len(header):
            raise refusal("path", f"distinct column names in {path}", listed(header))
        columns: dict[str, list[Any]] = {name: [] for name in header}
        for number, cells in enumerate(filter(None, rows), start=1):
            if len(cells) != len(header):
                raise refusal("path", f"{len(header)} cells in row {number} of {path}", len(cells))
            for name, cell in zip(header, cells, strict=True):
                columns[name].append(cell)
    return Table(columns)


def _check_separator(path: Path, header: Sequence[str], separator: str) -> None:
    """Say so where a header of one column is really one of several, separated by something else."""
    names = {",": "commas", "\t": "tabs", ";": "';'", "|": "'|'"}
    other = next((mark for mark in names if mark != separator and len(header) == 1 and mark in header[0]), None)
    if other is not None:
        expected = f"columns separated by {names[separator]}"
        raise refusal("path", expected, f"{path}, whose columns are separated by {names[other]}")


def _json(path: Path) -> Table:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise refusal("path", f"an object per row in {path}", f"row {number}: {str(row)[:60]}")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Table({name: [row.get(name) for row in rows] for name in names})


def _parquet(path: Path) -> Table:
    return _table(datasets.Dataset(pq.read_table(path)))


def _table(rows: datasets.Dataset) -> Table:
    classes = {
        name: tuple(named.names)
        for name, feature in rows.features.items()
        if isinstance(named := getattr(feature, "feature", feature), datasets.ClassLabel)
    }
    return Table({name: rows.data.column(name).to_pylist() for name in rows.column_names}, classes)


def _data_set(task: Task, path: str, wanted: Sequence[str]) -> dict[str, Table]:
    loaded = _load_data_set(task, path)
    for split in wanted:
        if split not in loaded:
            key = "train_split" if split == task.train_split else "evaluation_splits"
            raise refusal(key, f"splits of {path} ({listed(map(str, loaded))})", split)
    return {split: _table(loaded[split]) for split in wanted}


def _load_data_set(task: Task, path: str) -> datasets.DatasetDict:
    try:
        with _quiet_unless_terminal():
            return datasets.load_dataset(path, task.subset, cache_dir=_cache_directory(path))
    except ConnectionError as error:
        expected = "an existing directory or file, or a data set that is cached or can be downloaded"
        raise refusal("path", expected, f"{path} ({error}); offline give task.path=<local copy>") from error
    except datasets.exceptions.DatasetNotFoundError as error:
        raise refusal("path", "an existing directory or file, or a data set of the Hub", path) from error
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        configurations = re.search(r"[Aa]vailable[^\[]*\[([^\]]*)\]", str(error))
        if configurations is None:
            raise refusal("path", "a data set that can be read", f"{path} ({error})") from error
        names = configurations[1].replace("'", "").split(", ")
        raise refusal("subset", f"one of {listed(names)}", task.subset) from error


def _cache_directory(path: str) -> str | None:
    """Where `datasets` keeps the tables of a local directory.

    Its own cache knows the directory's name alone, and would serve the rows of files that have changed since.
    """
    directory = Path(path)
    if not directory.is_dir():
        return None
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    states = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return str(Path(datasets.config.HF_DATASETS_CACHE) / f"local-{digest(repr(states))[:20]}")


@contextmanager
def _quiet_unless_terminal() -> Iterator[None]:
    """Hide the progress bars and notes of `datasets` where no terminal shows them."""
    if sys.stderr.isatty():
        yield
        return
    verbosity, hub_verbosity = datasets.logging.get_verbosity(), huggingface_hub.logging.get_verbosity()
    bars = datasets.is_progress_bar_enabled()
    datasets.logging.set_verbosity(logging.ERROR)
    huggingface_hub.logging.set_verbosity(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        huggingface_hub.logging.set_verbosity(hub_verbosity)
        if bars:
            datasets.enable_progress_bars()
