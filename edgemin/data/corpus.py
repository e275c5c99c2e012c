"""Text without labels: where it lies, what of it decides a result, and its documents one after the other."""

from __future__ import annotations

import functools
import glob
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import huggingface_hub
import pyarrow as pa
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.packaged_modules.text.text import Text
from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]

from edgemin.errors import UserError
from edgemin.progress import live_line
from edgemin.store.content import file_digest
from edgemin.tasks.base import listed

SHORTEST = 8
BROKEN = (OSError, HTTPError)  # HTTPError: of the HTTP library that the Hub's client is built on


class _JsonColumn(Json):  # type: ignore[misc]
    """JSON of which one column is read: the others may differ from file to file, or from row to row."""

    column: str

    def _cast_table(self, pa_table: pa.Table, *args: Any, **named: Any) -> pa.Table:
        if self.column in pa_table.column_names:
            pa_table = pa_table.select([self.column])
            if pa.types.is_null(pa_table.schema.field(0).type):  # no text so far
                pa_table = pa_table.cast(pa.schema([(self.column, pa.string())]))
        elif self.info.features is not None and self.column in self.info.features:
            pa_table = pa.table({self.column: pa.nulls(len(pa_table), pa.string())})
        return super()._cast_table(pa_table, *args, **named)


FORMATS: dict[str, tuple[type[datasets.DatasetBuilder], dict[str, Any]]] = {  # by suffix
    ".txt": (Text, {}),
    ".jsonl": (_JsonColumn, {}),
    ".json": (_JsonColumn, {}),
    ".csv": (Csv, {"sep": ","}),
    ".tsv": (Csv, {"sep": "\t"}),
    ".parquet": (Parquet, {}),
}
_FOUND_ELSEWHERE = ("name", "version", "data_dir", "data_files", "description")
_NAMES = re.compile(r"available[^\[]*\[([^\]]*)\]", re.IGNORECASE)


def refusal(key: str, expected: str, given: object) -> UserError:
    """The error for one of a corpus's keys: what was expected and what was given, in one line."""
    shown = " ".join(str(given).split()) if given is not None else "null"
    return UserError(f"{key}: expected {expected}, given {shown}")


@dataclass(frozen=True)
class Corpus:
    """Documents without labels, for distillation that depends on no task.

    A local directory is read whole, the directories below it included, in the order of the names; where files are
    called after the split (`train.txt`, `train-00000-of-00005.parquet`) only these. A directory with the Hub's
    layout (a `README.md` that lists its configurations) is read as the Hub's data set would be. In `.txt` files
    every line is a document, so that a file of any size can be streamed.

    Attributes:
        path: Hub id, or a local directory or file: `.txt`, `.jsonl`, `.json`, `.csv`, `.tsv` (each also
            with `.gz`) or `.parquet`.
        subset: The configuration inside a Hub data set.
        split: The split that is read.
        column: The column of the texts; `text` in `.txt` files.
        length: Tokens of each packed sequence, special ones included.

    Raises:
        UserError: If a value is of the wrong type or out of range.
    """

    path: str
    subset: str | None = None
    split: str = "train"
    column: str = "text"
    length: int = 512

    def __post_init__(self) -> None:
        names = {"corpus": self.path, "corpus_split": self.split, "corpus_column": self.column}
        if self.subset is not None:
            names["corpus_subset"] = self.subset
        for key, value in names.items():
            if not isinstance(value, str) or not value.strip():
                raise refusal(key, "a name", value)
        if not re.fullmatch(r"\w+(\.\w+)*", self.split):
            raise refusal("corpus_split", "the name of one split", self.split)
        if type(self.length) is not int or self.length < SHORTEST:
            raise refusal("corpus_length", f"a whole number of at least {SHORTEST}", self.length)

    def fingerprint(self) -> dict[str, Any]:
        """What decides the documents, for the key of a result; never a path.

        Returns:
            Of local files their format and the SHA-256 of each in reading order; of a Hub data set its id, the commit
            that it resolves to (offline: of the copy in the cache), subset and split.

        Raises:
            UserError: If there is no such corpus, subset or split.
        """
        source = self._source()
        if source.commit is not None:
            return {"id": self.path, "commit": source.commit, "subset": self.subset, "split": self.split}
        config = source.builder.config
        usual = type(config)()
        return {
            "format": type(config).__name__.removesuffix("Config").lower(),
            "settings": {
                key: repr(value)
                for key, value in vars(config).items()
                if key not in _FOUND_ELSEWHERE and value != getattr(usual, key)
            },
            "files": [_digest(Path(file)) for file in config.data_files[self.split]],
        }

    def open(self) -> datasets.IterableDataset:
        """The documents as a stream of rows with one column, checked up to the first row.

        Raises:
            UserError: If there is no such corpus, subset, split or column, or its beginning cannot be read.
        """
        builder = self._source().builder
        with _as_user_errors(self):
            rows = builder.as_streaming_dataset(self.split)
            columns = rows.column_names or list(next(iter(rows), {}))
            if columns and self.column not in columns:
                raise refusal("corpus_column", f"a column of {self.path} ({listed(columns)})", self.column)
            if type(builder) is Parquet:  # files of the user's own: other columns may differ from file to file
                builder = self._source().builder
                builder.config.columns = [self.column]
                rows = builder.as_streaming_dataset(self.split)
            return rows.select_columns([self.column])

    def _source(self) -> _Source:
        path = Path(self.path).expanduser()
        with _as_user_errors(self):
            source = _Source(_local(self, path), None) if path.exists() else _hub(self)
        splits = [str(split) for split in source.builder.config.data_files or source.builder.info.splits or ()]
        if self.split not in splits:
            raise refusal("corpus_split", f"a split of {self.path} ({listed(splits)})", self.split)
        return source


class _Source(NamedTuple):
    builder: datasets.DatasetBuilder
    commit: str | None  # of a Hub data set


def _local(corpus: Corpus, path: Path) -> datasets.DatasetBuilder:
    path = path.absolute()
    if path.is_dir() and (corpus.subset is not None or _lists_configurations(path / "README.md")):
        return _laid_out(corpus, path)
    if corpus.subset is not None:
        raise refusal("corpus_subset", "null for a file", corpus.subset)
    files = _files(corpus, path)
    examples = {repr(FORMATS[_suffix(file)]): file for file in files}
    if len(examples) > 1:
        given = ", ".join(str(file.relative_to(path)) for file in examples.values())
        raise refusal("corpus", f"files of one format in {corpus.path}", given)
    # The readers themselves: load_dataset, given one's name, would tell a server that it is used.
    reader, settings = FORMATS[_suffix(files[0])]
    if reader is Csv:  # cells stay what they are: NA is a word, and 01 is not 1
        settings = {**settings, "keep_default_na": False, "converters": {corpus.column: str}}
    names = [glob.escape(str(file)) for file in files]
    builder = reader(cache_dir=_cache(), data_files={corpus.split: names}, **settings)
    if isinstance(builder, _JsonColumn):
        builder.column = corpus.column
    return builder


def _laid_out(corpus: Corpus, directory: Path) -> datasets.DatasetBuilder:
    """A directory laid out like the Hub's data sets."""
    return datasets.load_dataset_builder(str(directory), corpus.subset, cache_dir=_cache())


def _cache() -> str:
    """A cache of its own, in which nothing is ever prepared: in the usual one `datasets` may find stale tables."""
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "streamed")


def _lists_configurations(card: Path) -> bool:
    return card.is_file() and "configs" in (huggingface_hub.metadata_load(card) or {})


def _files(corpus: Corpus, path: Path) -> list[Path]:
    """A corpus's own files, those without a byte left out, in the order of their names."""
    found = [path] if path.is_file() else sorted(path.rglob("*"))
    there = [file for file in found if file.is_file() and not _is_hidden(file.relative_to(path))]
    files = [file for file in there if _suffix(file) in FORMATS and file.stat().st_size]
    if not files:
        given = listed(file.name + ("" if file.stat().st_size else " (empty)") for file in there) or "nothing"
        raise refusal("corpus", f"text in {corpus.path} ({', '.join(FORMATS)}; or .gz of them)", given)
    named = [file for file in files if re.match(rf"{re.escape(corpus.split)}[.-]", file.name)]
    if not named and corpus.split != "train":
        raise refusal("corpus_split", f"train, or files called {corpus.split} in {corpus.path}", corpus.split)
    return files if path.is_file() else named or files


def _is_hidden(file: Path) -> bool:
    return any(part.startswith(".") for part in file.parts)


def _suffix(file: Path) -> str:
    suffix = file.suffix.lower()
    if suffix != ".gz":
        return suffix
    inner = Path(file.stem).suffix.lower()
    return "" if inner == ".parquet" else inner  # parquet is read from its end, which a compressed stream forbids


def _digest(file: Path) -> str:
    with live_line(f"corpus  reading {file.name} for its checksum"):
        return file_digest(file)


def _hub(corpus: Corpus) -> _Source:
    try:
        huggingface_hub.utils.validate_repo_id(corpus.path)  # type: ignore[attr-defined]
    except HFValidationError as error:
        raise refusal("corpus", "an existing directory or file, or a Hub id", corpus.path) from error
    try:
        builder = _hub_builder(corpus.path, corpus.subset)
    except ConnectionError as unreachable:
        try:
            copy = huggingface_hub.snapshot_download(corpus.path, repo_type="dataset", local_files_only=True)
        except FileNotFoundError as error:
            expected = "an existing directory or file, or a data set that is cached or can be reached"
            raise refusal("corpus", expected, f"{corpus.path} ({unreachable})") from error
        return _Source(_laid_out(corpus, Path(copy)), Path(copy).name)
    assert builder.hash is not None
    return _Source(builder, builder.hash)  # the commit it was resolved to, of which all files are read


@functools.cache  # one commit for a whole process, whatever is pushed meanwhile
def _hub_builder(path: str, subset: str | None) -> datasets.DatasetBuilder:
    return datasets.load_dataset_builder(path, subset)


@contextmanager
def _as_user_errors(corpus: Corpus) -> Iterator[None]:
    """What `datasets` raises when a corpus cannot be opened, as one line."""
    try:
        yield
    except UserError:
        raise
    except datasets.exceptions.DatasetNotFoundError as error:
        raise refusal("corpus", "an existing directory or file, or a data set of the Hub", corpus.path) from error
    except (
        *BROKEN,
        ValueError,
        TypeError,
        StopIteration,
        pa.ArrowException,
        datasets.exceptions.DatasetsError,
    ) as error:
        names = _NAMES.search(str(error))
        if names is not None:
            raise refusal("corpus_subset", f"one of {listed(_unquoted(names[1]))}", corpus.subset) from error
        reason = str(error) or "it is empty"  # a StopIteration: the first file has no row
        raise refusal("corpus", "a data set that can be read", f"{corpus.path} ({reason[:300]})") from error


def _unquoted(names: str) -> Sequence[str]:
    return names.replace("'", "").split(", ")
