"""Whether quotation marks in a file of tab-separated values enclose cells, or are but characters."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Literal


def quoting(path: Path) -> Literal[0, 3]:
    """How `csv` is to read a TSV file: `QUOTE_MINIMAL`, or `QUOTE_NONE` where marks can enclose nothing.

    That is where there are several columns and every line by itself has as many cells as the header, but by its
    quotation marks a row would span lines, or be malformed: the TSV files of many data sets (GLUE's among them) quote
    nothing, and a sentence may begin with a mark that the next one ends.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        tabs = next(file, "").count("\t")
        if not tabs or any(line.count("\t") != tabs for line in file if line.strip("\r\n")):
            return csv.QUOTE_MINIMAL
        file.seek(0)
        rows = csv.reader(file, delimiter="\t", strict=True)
        try:
            spans = any(number != rows.line_num for number, _ in enumerate(rows, start=1))
        except csv.Error:
            spans = True
    return csv.QUOTE_NONE if spans else csv.QUOTE_MINIMAL
