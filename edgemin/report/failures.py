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


#: The names of a sweep's jobs by number, where they are known before the first begins.
jobs: list[str] = []
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
    begun = [job for job in directory.iterdir() if job.is_dir() and job.name.isdecimal()] if directory.is_dir() else []
    numbers = sorted({int(job.name) for job in begun} | set(range(len(jobs))))
    found = [_of(directory / str(number), number) for number in numbers]
    return [failure for failure in found if failure is not None]


def _of(job: Path, number: int) -> Failure | None:
    if (job / FILE).is_file():
        line, _, more = (job / FILE).read_text(encoding="utf-8", errors="replace").partition("\n")
        return Failure(line, foreseen=not more)
    if (job / RESULT).is_file():
        return None
    name = jobs[number] if number < len(jobs) else f"job {number}"
    if not job.is_dir():
        return Failure(f"{name}: never begun", foreseen=False)
    return Failure(f"{name}: ended without a result or a message (was it killed?)", foreseen=False)
