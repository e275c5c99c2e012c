"""Made-up runs as a study, and cells and footnotes of the tables made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgemin.report.fold import Statistic, Study, fold
from edgemin.report.grid import Cell, Table
from edgemin.report.schema import parse


def study(*runs: dict[str, Any]) -> Study:
    return fold([parse(Path(f"{number}/run.json"), data) for number, data in enumerate(runs)])


def cell(table: Table | None, row: str, key: str, labels: tuple[str, ...] = ()) -> Cell:
    assert table is not None
    keys = [column.key for column in table.columns]
    name = keys.index("name")
    for cells in table.rows:
        if cells[name].value == row and tuple(one.value for one in cells[:name]) == labels:
            return cells[keys.index(key)]
    raise AssertionError(f"no row {row} {labels}")


def mean(table: Table | None, row: str, key: str, labels: tuple[str, ...] = ()) -> float:
    value = cell(table, row, key, labels).value
    assert isinstance(value, Statistic)
    return value.mean


def notes(table: Table | None, marks: tuple[str, ...]) -> list[str]:
    assert table is not None
    return [text for mark, text in table.footnotes if mark in marks]


def column_keys(table: Table | None) -> list[str]:
    assert table is not None
    return [column.key for column in table.columns]
