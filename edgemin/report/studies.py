"""All studies of a folder again, and the tables in their pages: `python -m edgemin.report.studies folder=<it>`."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from edgemin import cli
from edgemin.errors import UserError
from edgemin.report.grid import CORE, Table
from edgemin.report.render import markdown
from edgemin.report.schema import FILE, find
from edgemin.report.write import PAGE as REPORT
from edgemin.report.write import Report, of_study, rebuild

PAGE = "README.md"
_BEGIN, _END = "<!-- result:", "<!-- end of result -->"
_BLOCK = re.compile(rf"{_BEGIN}(?P<asked>[^>]*)-->\n.*?{_END}", re.DOTALL)

_FOLDER = Field(title="directory", description="of studies, each with its jobs in or below it and a README.md")


def rebuild_all(folder: Annotated[str, _FOLDER]) -> None:
    """Builds every study of a folder again from its run.json files and predictions, and fills the tables in its page.

    Where jobs of a sweep have pages, these are made again too; where none has one, none is made.

    A page, and the README.md beside the folder, says in a comment which table of which run it wants, and which of its
    columns if not those that the run's own page shows:

        <!-- result: run runtimes | name, runtime, size_mib -->
        <!-- end of result -->

    Studies whose page has no run.json yet are listed.
    """
    top = Path(folder)
    if not top.is_dir():
        raise UserError(f"folder: expected a directory of studies, given {folder}, which is none")
    later, files = [], 0
    built: dict[Path, list[Table]] = {}
    for study in sorted(entry for entry in top.iterdir() if entry.is_dir()):
        found = runs(study)
        for run in found:
            written, report = _built(run)
            files += len(written)
            built[run.resolve()] = report.tables
        if not found and (study / PAGE).is_file():
            later.append(study.name)
    pages = [page for page in (top.absolute().parent / PAGE, *sorted(top.glob(f"*/{PAGE}"))) if page.is_file()]
    for page in pages:
        page.write_text(filled(page, built), encoding="utf-8")
    print(f"{top}: {files} files and {len(pages)} pages written")
    if later:
        print(f"no {FILE} yet, to be computed again: {', '.join(later)}")


def runs(study: Path) -> list[Path]:
    """The jobs and sweeps of a study: itself, or those of its folders that have a run.json in or below them."""
    if (study / FILE).is_file():
        return [study]
    return sorted(entry for entry in study.iterdir() if entry.is_dir() and next(entry.rglob(FILE), None) is not None)


def _built(run: Path) -> tuple[dict[str, Path], Report]:
    if (run / FILE).is_file() or any((file.parent / REPORT).is_file() for file in find(run)):
        return rebuild(run)
    report = of_study(run, with_pages=False)
    return report.write(), report


def filled(page: Path, built: Mapping[Path, Sequence[Table]]) -> str:
    """A page with the tables that it asks for.

    Args:
        page: the file.
        built: the tables of runs that have just been built, by their directories.

    Raises:
        UserError: there is no such run, table or column, or a block has no end.
    """
    text = page.read_text(encoding="utf-8")
    made = _BLOCK.sub(lambda block: _block(page, block["asked"].strip(), built), text)
    if text.count(_BEGIN) != len(_BLOCK.findall(text)):
        raise UserError(f"{page}: expected {_END} behind every {_BEGIN} ... -->")
    return made


def _block(page: Path, asked: str, built: Mapping[Path, Sequence[Table]]) -> str:
    where, _, columns = asked.partition("|")
    run, name = where.split() if len(where.split()) == 2 else ("", "")
    if not run:
        raise UserError(f"{page}: result: expected <run> <table>, given {where.strip() or 'nothing'}")
    directory = (page.parent / run).resolve()
    tables = {table.name: table for table in built.get(directory) or of_study(directory).tables}
    if name not in tables:
        raise UserError(f"{page}: result: expected a table of {run} ({', '.join(tables)}), given {name}")
    table = tables[name]
    if columns:
        table = _with_columns(page, table, [key.strip() for key in columns.split(",")])
    return f"{_BEGIN} {asked} -->\n{markdown(table)}{_END}"


def _with_columns(page: Path, table: Table, keys: Sequence[str]) -> Table:
    """The table with these columns alone, in this order."""
    places = {column.key: place for place, column in enumerate(table.columns)}
    for key in keys:
        if key not in places:
            raise UserError(f"{page}: result: expected columns of {table.name} ({', '.join(places)}), given {key}")
    chosen = table.only([places[key] for key in keys])
    return replace(chosen, columns=tuple(replace(column, level=CORE) for column in chosen.columns))


if __name__ == "__main__":
    sys.exit(cli.run("python -m edgemin.report.studies", rebuild_all, sys.argv[1:]))
