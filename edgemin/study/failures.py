"""Why a job has no result: kept in its directory, so that the table over a sweep can say it."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path

from edgemin.cli import Failure
from edgemin.errors import UserError

FILE, RESULT = "error.txt", "run.json"


def keep(run_dir: Path, failure: Failure, error: Exception) -> bool:
    """Write the job's `error.txt`, with the traceback where the failure was not foreseen; returns whether it could."""
    text = [failure.line, "\n"] + ([] if failure.foreseen else ["\n", *traceback.format_exception(error)])
    try:
        (run_dir / FILE).write_text("".join(text), encoding="utf-8", errors="backslashreplace")
    except OSError:  # the full disk may be what is being told of
        return False
    return True


def check_alone(directory: Path, jobs: int) -> None:
    """Refuse a sweep's directory in which an earlier sweep of more jobs left results: one table would mix them.

    Raises:
        UserError: names the first of them.
    """
    left = sorted(int(job.parent.name) for job in directory.glob(f"*/{RESULT}") if job.parent.name.isdecimal())
    others = [number for number in left if number >= jobs]
    if others:
        raise UserError(
            f"hydra.sweep.dir: expected a directory without results of other jobs than the {jobs} of this command, "
            f"given {directory}, which has {directory / str(others[0]) / RESULT}"
        )


def below(directory: Path, names: Sequence[str] = ()) -> list[Failure]:
    """The failures of a sweep's jobs, by number; a job without result or message counts as ended from outside.

    Args:
        directory: the sweep's.
        names: of all its jobs, where they are known.
    """
    begun = {int(job.name) for job in directory.glob("*") if job.is_dir() and job.name.isdecimal()}
    called = dict(enumerate(names))
    numbers = sorted(begun | called.keys())
    found = [_of(directory / str(number), called.get(number, f"job {number}")) for number in numbers]
    return [failure for failure in found if failure is not None]


def _of(job: Path, name: str) -> Failure | None:
    if (job / FILE).is_file():
        line, _, more = (job / FILE).read_text(encoding="utf-8", errors="replace").partition("\n")
        return Failure(line, foreseen=not more)
    if (job / RESULT).is_file():
        return None
    why = "ended without a result or a message (was it killed?)" if job.is_dir() else "never begun"
    return Failure(f"{name}: {why}", foreseen=False)
