"""Files of rows, read and written a few rows at a time, so that a large file needs little memory."""

from __future__ import annotations

import csv
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from edgemin.errors import UserError, first_line
from edgemin.plain_text import is_text
from edgemin.tab_separated import quoting

FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")
CHUNK = 1024
Row = dict[str, Any]
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def check_format(path: Path, key: str) -> None:
    """Refuse a file that is none of `FORMATS`.

    Raises:
        UserError: names the key.
    """
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{key}: expected a file that ends in {', '.join(FORMATS)}, given {path}")


def read(path: Path) -> Iterator[list[Row]]:
    """The rows of a file, in its order, at most `CHUNK` at a time; cells of CSV stay the texts that they are.

    Raises:
        UserError: the file is not there, or is not what its name says; that may show only when some rows were given.
    """
    check_format(path, "input")
    if not path.is_file():
        raise UserError(f"input: expected a file, given {path}, which does not exist")
    suffix = path.suffix.lower()
    rows = _parquet(path) if suffix == ".parquet" else _jsonl(path) if suffix == ".jsonl" else _csv(path)
    try:
        while chunk := list(islice(rows, CHUNK)):
            yield chunk
    except (OSError, ValueError, RecursionError, csv.Error, pa.ArrowException) as error:
        if isinstance(error, UserError):
            raise
        expected = f"a {suffix} file" if suffix == ".parquet" else f"a {suffix} file in UTF-8"
        raise UserError(f"input: expected {expected}, given {path} ({first_line(error)})") from error


def schema(path: Path) -> pa.Schema | None:
    """The columns' types, which parquet alone has."""
    return pq.read_schema(path) if path.suffix.lower() == ".parquet" else None


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # long documents exceed the default, a guard against hostile streams
    with path.open(encoding="utf-8-sig", newline="") as file:
        delimiter = _DELIMITERS[path.suffix.lower()]
        how = quoting(path) if delimiter == "\t" else csv.QUOTE_MINIMAL
        cells = csv.reader(file, delimiter=delimiter, quoting=how, strict=True)
        header = [name.strip() for name in next(cells, [])]
        if len(set(header)) < len(header):
            raise UserError(f"input: expected distinct column names in {path}, given {', '.join(header)}")
        for number, row in enumerate(filter(None, cells), start=1):
            if len(row) != len(header):
                raise UserError(f"input: expected {len(header)} cells in row {number} of {path}, given {len(row)}")
            yield dict(zip(header, row, strict=True))


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(filter(str.strip, file), start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"input: expected JSON in row {number} of {path}, given {line.strip()[:60]}") from error
            if not isinstance(row, dict):
                raise UserError(f"input: expected an object in row {number} of {path}, given {str(row)[:60]}")
            yield row


def _parquet(path: Path) -> Iterator[Row]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(CHUNK):
            yield from batch.to_pylist()


class Writer(ABC):
    """Writes rows to a file that appears, whole, when all of them were written.

    Args:
        path: of the file.
        columns: of every row, in order.
        types: of those columns that a parquet file was read from.
    """

    def __init__(self, path: Path, columns: Sequence[str], types: Mapping[str, pa.DataType]) -> None:
        self.path, self.columns, self.types = path, columns, types
        self.unfinished = path.with_name(f".{path.name}.unfinished")

    def __enter__(self) -> Writer:
        self.begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.end()
            if error is None:
                self.unfinished.replace(self.path)
        finally:
            self.unfinished.unlink(missing_ok=True)

    @abstractmethod
    def begin(self) -> None:
        """Create the file."""

    @abstractmethod
    def write(self, rows: Sequence[Row]) -> None:
        """Add rows.

        Raises:
            UserError: a row does not fit the columns.
        """

    @abstractmethod
    def end(self) -> None:
        """Close the file."""

    def _check(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if any(isinstance(cell, str) and not is_text(cell) for cell in row.values()):
                expected = "expected .jsonl, as a cell has half a character (a lone surrogate)"
                raise UserError(f"output: {expected}, given {self.path}")
            if more := row.keys() - set(self.columns):
                raise UserError(
                    f"output: expected .jsonl, as not all rows have the same columns ({', '.join(sorted(more))} only "
                    f"later), given {self.path}"
                )


class CSV(Writer):
    """Commas, or tabs in `.tsv`; a list or an object in a cell is written as JSON."""

    def begin(self) -> None:
        """Create the file, with a line of the columns' names."""
        self.file = self.unfinished.open("w", encoding="utf-8", newline="")
        delimiter = _DELIMITERS[self.path.suffix.lower()]
        self.rows = csv.DictWriter(self.file, self.columns, delimiter=delimiter, lineterminator="\n")
        self.rows.writeheader()

    def write(self, rows: Sequence[Row]) -> None:
        """Add a line for each row, or several where a text has line breaks."""
        self._check(rows)
        self.rows.writerows(
            {name: _json(cell) if isinstance(cell, list | dict) else cell for name, cell in row.items()} for row in rows
        )

    def end(self) -> None:
        """Close the file, with whatever is still to be written."""
        self.file.close()


class JSONL(Writer):
    """One object a line; every row keeps the columns that it has."""

    def begin(self) -> None:
        """Open the file; a JSONL file has no head line."""
        self.file = self.unfinished.open("w", encoding="utf-8")

    def write(self, rows: Sequence[Row]) -> None:
        """Add a line for each row."""
        self.file.writelines(f"{_json(row)}\n" for row in rows)

    def end(self) -> None:
        """Close the file, with whatever is still to be written."""
        self.file.close()


class Parquet(Writer):
    """Columns keep the types they were read with; of other files, the types are those of the first rows."""

    file: pq.ParquetWriter | None = None

    def begin(self) -> None:
        """Nothing yet: the first rows decide the types of the columns, so `write` creates the file."""

    def write(self, rows: Sequence[Row]) -> None:
        """Add the rows as one row group."""
        self._check(rows)
        try:
            if self.file is None:
                self.file = pq.ParquetWriter(self.unfinished, self._schema(rows))
            self.file.write_table(pa.Table.from_pylist(list(rows), self.file.schema))
        except (pa.ArrowException, TypeError, ValueError) as error:
            expected = "expected .jsonl, as the columns do not have one type each"
            raise UserError(f"output: {expected} ({first_line(error)}), given {self.path}") from error

    def end(self) -> None:
        """Close the file, with whatever is still to be written."""
        if self.file is not None:
            self.file.close()

    def _schema(self, rows: Sequence[Row]) -> pa.Schema:
        names = {name: [row.get(name) for row in rows] for name in self.columns}
        types = {name: self.types.get(name) or pa.array(values).type for name, values in names.items()}
        return pa.schema([(name, pa.string() if pa.types.is_null(kind) else kind) for name, kind in types.items()])


def writer(path: Path, columns: Sequence[str], types: Mapping[str, pa.DataType]) -> Writer:
    """A writer for a file of this name: its ending decides the format."""
    suffix = path.suffix.lower()
    kind = Parquet if suffix == ".parquet" else JSONL if suffix == ".jsonl" else CSV
    return kind(path, columns, types)


def _json(value: Any) -> str:
    found = json.dumps(value, ensure_ascii=False, default=str)
    return found if is_text(found) else json.dumps(value, default=str)  # half a character stays the escape that it was
