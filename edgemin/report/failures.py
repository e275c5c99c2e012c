"""Why a job has no result: a line in this process, and a file in the job's directory for the sweep's table."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import NamedTuple

FILE, RESULT = "error.txt", "run.json"


class Failure(NamedTuple):
    """What is said of it, and whether it was foreseen: a mistake of the user's, not one of the program's."""

    line: str
    foreseen: bool = True


#: Of this process, in the order in which they were met.
seen: list[Failure] = []


def keep(run_dir: Path, failure: Failure, error: BaseException) -> bool:
    """Write it as the job's ``error.txt``, with the traceback where it was not foreseen; gives whether that worked."""
    text = [failure.line, "\n"] + ([] if failure.foreseen else ["\n", *traceback.format_exception(error)])
    try:
        (run_dir / FILE).write_text("".join(text), encoding="utf-8", errors="backslashreplace")
    except OSError:  # the full disk may be what is being told of
        return False
    return True


def forget(run_dir: Path) -> None:
    """Remove what an earlier run of the same job left."""
    (run_dir / FILE).unlink(missing_ok=True)


def below(directory: Path) -> list[Failure]:
    """Those of a sweep's jobs by number. A job that left neither a result nor a word was ended from outside."""
    jobs = [job for job in directory.iterdir() if job.is_dir() and job.name.isdecimal()] if directory.is_dir() else []
    found = [_of(job) for job in sorted(jobs, key=lambda job: int(job.name))]
    return [failure for failure in found if failure is not None]


def _of(job: Path) -> Failure | None:
    if (job / FILE).is_file():
        line, _, more = (job / FILE).read_text(encoding="utf-8", errors="replace").partition("\n")
        return Failure(line, foreseen=not more)
    if (job / RESULT).is_file():
        return None
    return Failure(f"job {job.name}: ended without a result or a message (was it killed?)", foreseen=False)
