"""`python -m edgemin.report study=<directory>`: all tables, figures and pages again, from run.json alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from edgemin import cli

_STUDY = Field(
    title="directory", description="a job's directory, a sweep's (all jobs below it), or any directory above these"
)


_DEVICES = Field(
    title="files",
    description="device.json of a bundle's bench.py, or directories with some below, as [a,b]; the rows measured there",
)


_MARGIN = Field(
    title="fraction",
    description="a difference of the main metric below it counts as none; by default the jobs' evaluate.margin",
)


def report(
    study: Annotated[str, _STUDY],
    devices: Annotated[str, _DEVICES] = "",
    margin: Annotated[float | None, _MARGIN] = None,
) -> None:
    """Builds every table, figure and page again from run.json and the predictions beside it, and prints the main table.

    Each job gets tables/ (Markdown, CSV, LaTeX), figures/ (PNG, SVG) and report.md in its own directory;
    a sweep gets those over all its jobs, seeds folded into a mean with its interval. What devices measured stands in
    the tables of runtimes, as rows named <row> on <device>.
    """
    from edgemin.report.devices import find, read
    from edgemin.report.write import rebuild

    measured = [read(file) for file in find(devices)] if devices else []
    written, shown = rebuild(study, measured, margin)
    shown.show()
    pages = [str(path) for name, path in written.items() if name.endswith("report.md")]
    print(f"{len(written)} files written; start with {pages[-1]}")


def main(words: Sequence[str]) -> int:
    """Runs the command as the words behind it ask; returns its exit code."""
    return cli.run("python -m edgemin.report", report, words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
