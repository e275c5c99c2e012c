"""`python -m edgemin.report study=<directory>`: all tables, figures and pages again, from run.json alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from edgemin.errors import UserError
from edgemin.plain_text import printable

_USAGE = """\
python -m edgemin.report study=<directory>

Builds every table, figure and page again from run.json alone, and prints the main table.

  study=<directory>   a job's directory, a sweep's (all jobs below it), or any directory above these

Each job gets tables/ (Markdown, CSV, LaTeX), figures/ (PNG, SVG) and report.md in its own directory;
a sweep gets those over all its jobs, seeds folded into mean and standard deviation.
"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit code.

    Args:
        arguments: what follows the command on the command line.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        print(_USAGE, end="")
        return 0
    try:
        directory = _study(arguments)
        # Loaded only now, so that --help and mistakes answer at once.
        from edgemin.report.write import print_study, rebuild

        written = rebuild(directory)
        print_study(directory)
        pages = [str(path) for name, path in written.items() if name.endswith("report.md")]
        print(f"{len(written)} files written; start with {pages[-1]}")
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {printable(f'{error.filename or directory}: {error.strerror}')}", file=sys.stderr)
        return 2
    return 0


def _study(arguments: Sequence[str]) -> str:
    given: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key != "study":
            raise UserError(f"expected study=<directory>, given {argument} (see --help)")
        if key in given:
            raise UserError(f"study: expected one directory, given {given[key]} and {value} (see --help)")
        given[key] = value.strip("'\"")
    if not given.get("study"):
        raise UserError("study: expected a directory, given nothing (see --help)")
    return given["study"]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
