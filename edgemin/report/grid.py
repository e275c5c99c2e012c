"""A table as data: columns with units, cells with raw numbers, footnotes with their marks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from edgemin.report.fold import Statistic

CORE, MAIN, PAGE, FULL = range(4)
"""Where a column is shown: CORE everywhere, MAIN where there is room, PAGE where a file has room, FULL in CSV alone."""
MOST = 8
"""A table for people has at most so many columns; the CSV has all of them."""


@dataclass(frozen=True)
class Column:
    """One column.

    Args:
        key: its name in CSV, with the unit that the raw numbers have there.
        title: its heading.
        unit: the unit that is displayed, if any.
        factor: displayed number = raw number x factor.
        digits: decimals displayed.
        fine: small numbers get more decimals, so that a tiny model does not become 0.00.
        exact: follows from the architecture; a standard deviation of zero is not worth showing.
        level: CORE, MAIN, PAGE or FULL.
        text: holds text, not numbers.
        marks: its footnotes.
        group: neighbouring columns of the same group stay in one table when a page needs several.
        in_csv: False where other columns hold its numbers one by one.
    """

    key: str
    title: str
    unit: str = ""
    factor: float = 1.0
    digits: int = 2
    fine: bool = False
    exact: bool = False
    level: int = MAIN
    text: bool = False
    marks: tuple[str, ...] = ()
    group: str = ""
    in_csv: bool = True


@dataclass(frozen=True)
class Cell:
    """One cell: a text, a folded number, or nothing; and its footnotes."""

    value: Statistic | str | None
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        name: stem of its files.
        title: its caption.
        columns: the columns.
        rows: the cells, as many in each row as there are columns.
        sections: numbers of the rows that begin a new section (never 0).
        footnotes: `(mark, text)`; the mark is empty for a note on the whole table.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    sections: tuple[int, ...] = ()
    footnotes: tuple[tuple[str, str], ...] = ()

    def upto(self, level: int) -> Table:
        """The table without the columns beyond a level."""
        return self.only([place for place, column in enumerate(self.columns) if column.level <= level])

    @property
    def leading(self) -> int:
        """How many columns say what a row is, before its first number."""
        return next((place for place, column in enumerate(self.columns) if not column.text), len(self.columns))

    def for_people(self) -> Table:
        """The table as a page shows it: the most important columns, with those that are equal in all rows last."""
        table = self.upto(PAGE)
        kept = [place for place, column in enumerate(table.columns) if column.text or column.level == CORE]
        rest = [place for place in range(len(table.columns)) if place not in kept]
        rest.sort(key=lambda place: (table._all_alike(place), table.columns[place].level, place))
        return table.only(sorted(kept + rest[: max(MOST - len(kept), 0)]))

    def _all_alike(self, place: int) -> bool:
        values = {row[place].value for row in self.rows}
        return len(self.rows) > 1 and len(values) == 1

    def parts(self, most: int = MOST) -> list[Sequence[int]]:
        """Divides the columns among tables that stand below one another, none wider than a page.

        Args:
            most: how many columns each has at most, unless the leading columns or a group are more.

        Returns:
            For each of these tables the places of its columns, the leading ones included.
        """
        leading = range(self.leading)
        room = max(most - len(leading), most // 2)
        parts: list[list[int]] = [[]]
        for group in self._groups():
            if parts[-1] and len(parts[-1]) + len(group) > room:
                parts.append([])
            parts[-1] += group
        return [[*leading, *part] for part in parts]

    def _groups(self) -> list[list[int]]:
        """The places of the columns after the leading ones, those together that are not to be torn apart."""
        groups: list[list[int]] = []
        for place in range(self.leading, len(self.columns)):
            group = self.columns[place].group
            if groups and group and group == self.columns[groups[-1][0]].group:
                groups[-1].append(place)
            else:
                groups.append([place])
        return groups

    def part(self, places: Sequence[int]) -> Table:
        """The table with only some columns, with all its footnotes."""
        columns = tuple(self.columns[place] for place in places)
        return replace(self, columns=columns, rows=tuple(tuple(row[place] for place in places) for row in self.rows))

    def only(self, places: Sequence[int]) -> Table:
        """The table with only some columns; the footnotes still referred to are lettered anew."""
        chosen = self.part(places)
        columns, rows = chosen.columns, chosen.rows
        marked = [column.marks for column in columns] + [cell.marks for row in rows for cell in row]
        texts = dict(self.footnotes)
        letters = Footnotes(general=[text for mark, text in self.footnotes if not mark])

        def anew(marks: tuple[str, ...]) -> tuple[str, ...]:
            return letters.mark([texts[mark] for mark in marks])

        for marks in marked:
            anew(marks)
        columns = tuple(replace(column, marks=anew(column.marks)) for column in columns)
        rows = tuple(tuple(replace(cell, marks=anew(cell.marks)) for cell in row) for row in rows)
        return replace(self, columns=columns, rows=rows, footnotes=letters.listed())

    def bounded(self, place: int) -> bool:
        """Whether any number of a column has an interval."""
        values = (row[place].value for row in self.rows)
        return any(isinstance(value, Statistic) and value.low is not None for value in values)

    @property
    def folded(self) -> bool:
        """Whether any number was folded from several seeds."""
        return any(isinstance(cell.value, Statistic) and cell.value.n > 1 for row in self.rows for cell in row)


@dataclass
class Footnotes:
    """Gives each distinct note a letter, in the order of their first use."""

    letters: dict[str, str] = field(default_factory=dict)
    general: list[str] = field(default_factory=list)

    def mark(self, notes: Sequence[str]) -> tuple[str, ...]:
        """The letters of these notes, new ones for notes that have none yet."""
        for note in notes:
            self.letters.setdefault(note, _letter(len(self.letters)))
        return tuple(sorted({self.letters[note] for note in notes}, key=lambda letter: (len(letter), letter)))

    def listed(self) -> tuple[tuple[str, str], ...]:
        """All notes with their letters, those on the whole table last."""
        return tuple((letter, note) for note, letter in self.letters.items()) + tuple(
            ("", note) for note in self.general
        )


def _letter(number: int) -> str:
    first, last = divmod(number, 26)
    return (_letter(first - 1) if first else "") + "abcdefghijklmnopqrstuvwxyz"[last]


def decimals(table: Table, place: int) -> int:
    """Decimals of a column: as declared, up to 3 more where its smallest number needs them."""
    column = table.columns[place]
    if not column.fine:
        return column.digits
    values = [row[place].value for row in table.rows]
    sizes = [abs(value.mean * column.factor) for value in values if isinstance(value, Statistic) and value.mean]
    if not sizes:
        return column.digits
    return min(max(column.digits, 1 - math.floor(math.log10(min(sizes)))), column.digits + 3)


def written(value: Statistic | str | None, column: Column, digits: int) -> str:
    """A value as people read it: `90.02`, `90.02 ± 0.31` (half its interval), a text, or a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    mean = f"{value.mean * column.factor:z.{digits}f}"
    if value.half is None or (column.exact and value.half == 0):
        return mean
    return f"{mean} ± {value.half * column.factor:.{digits}f}"
