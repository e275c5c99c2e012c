"""A job in a process of its own, where a launcher runs several at once: one that is killed takes no other with it.

Where a worker of joblib's dies, joblib ends all the others; where one of submitit's does, the sweep no longer waits for
the rest. So a worker only waits here, without torch, for the process that does the work, and that is the one to be
killed where memory runs out.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any, TextIO

from hydra.core.utils import configure_log
from omegaconf import OmegaConf

from edgemin.errors import UserError
from edgemin.processes import stopping


def run_job(settings: Mapping[str, Any], job: Mapping[str, Any], transfer: Mapping[str, Any], logging: Any) -> None:
    """Run [`job.run_job`][edgemin.study.job.run_job] in a new process, and wait for it.

    What that process prints begins with the job's number, line by line.

    Args:
        settings: the resolved configuration.
        job: what Hydra says of the job, as `run_job` there takes it.
        transfer: settings of the tasks that rows are also scored on, by name.
        logging: Hydra's `job_logging`, as plain dictionaries.

    Raises:
        UserError: a mistake of the user's, or the process was killed.
        Exception: what was not foreseen, under the name of its class there; the traceback from there is its note.
    """
    here, there = multiprocessing.Pipe()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "edgemin.study.own_process", str(there.fileno()), f"job={job['number']}"],
        pass_fds=[there.fileno()],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    there.close()
    try:
        here.send((settings, job, transfer, logging))
        failure = here.recv()
    except (EOFError, OSError):
        code = process.wait()
        raise UserError(
            f"its process ended without a result ({signal.Signals(-code).name if code < 0 else f'exit code {code}'}); "
            "what it had trained is kept, run the same command again to go on"
        ) from None
    except BaseException:  # this worker is to end, and the process with it
        process.terminate()
        raise
    finally:
        process.wait()
        here.close()
    if failure is not None:
        raise _raised(*failure)


def _raised(kind: str, text: str, trace: str) -> Exception:
    if kind == UserError.__name__:
        return UserError(text)
    error: Exception = type(kind, (Exception,), {})(text)
    error.add_note(trace)
    return error


def main() -> None:
    """The new process: it is told what to do, and tells what went wrong."""
    for number in (signal.SIGUSR1, signal.SIGUSR2):  # SLURM sends them to all; the worker then ends this process
        signal.signal(number, signal.SIG_IGN)
    with stopping.handled():
        _work()


def _work() -> None:
    worker: Connection[Any, Any] = Connection(int(sys.argv[1]))
    settings, job, transfer, logging = worker.recv()
    threading.Thread(target=_end_with, args=[worker], daemon=True).start()
    sys.stdout, sys.stderr = Numbered(sys.stdout, job["number"]), Numbered(sys.stderr, job["number"])
    configure_log(OmegaConf.create(logging))
    from edgemin.study.job import run_job

    failure = None
    try:
        run_job(settings, job, transfer)
    except Exception as error:  # as texts: not every exception can be pickled
        kind = UserError if isinstance(error, UserError) else type(error)
        failure = kind.__name__, str(error), traceback.format_exc()
    worker.send(failure)


def _end_with(worker: Connection[Any, Any]) -> None:
    """A worker that is killed ends this process too: after a last step and a checkpoint, where it trains."""
    try:
        worker.recv()
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGTERM)


class Numbered(io.TextIOBase):
    """A stream whose lines begin with a job's number, each written whole, so that those of several jobs do not mix.

    Args:
        stream: where the lines go.
        number: of the job.
    """

    def __init__(self, stream: TextIO, number: int) -> None:
        self._stream, self._prefix, self._begun = stream, f"[job {number}] ", ""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the stream behind."""
        return self._stream.encoding

    def write(self, text: str) -> int:
        """Write the lines that are complete; the rest waits for its end."""
        *lines, self._begun = (self._begun + text).split("\n")
        if lines:
            self._stream.write("".join(f"{self._prefix}{line}\n" for line in lines))
            self._stream.flush()
        return len(text)

    def fileno(self) -> int:
        """The file descriptor of the stream behind, for libraries that write past Python."""
        return self._stream.fileno()


if __name__ == "__main__":
    main()
