"""The process that asks for measurements, and how it talks to a process that measures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from edgemin.errors import UserError

_TERMINATE_S = 2.0
_LAST_WORDS = 300  # characters


class WorkerProcess:
    """`python -m edgemin.measure.worker` as a context manager: the process is gone when the block is left.

    Args:
        name: The variant's name, for messages.
        threads: Number of threads, put into the environment, where OpenMP and MKL look for it before Python runs.
    """

    def __init__(self, name: str, threads: int) -> None:
        self.name, self.threads = name, threads

    def __enter__(self) -> WorkerProcess:
        # A file, not a pipe: a full pipe that nobody reads would stop the worker.
        self._stderr = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "edgemin.measure.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=_environment(self.threads),
            encoding="utf-8",
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(_TERMINATE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._stderr.close()

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends a message as one line of JSON, without waiting for an answer."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the process has ended: whoever waits for the answer is told so
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Sends a message and waits for its answer.

        Raises:
            UserError: The process has ended instead.
        """
        self.send(message)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Waits for one answer of the process.

        Raises:
            UserError: The process has ended instead.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise self._death()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _death(self) -> UserError:
        code = self._process.wait()
        self._stderr.seek(0)
        words = self._stderr.read().decode(errors="replace").strip()
        last = words.splitlines()[-1].strip()[:_LAST_WORDS] if words else "no message"
        how = f"was killed by signal {-code} (out of memory?)" if code < 0 else f"ended with exit code {code}"
        error = UserError(f"measure: the process that measured {self.name!r} {how}: {last}")
        error.__cause__ = RuntimeError(words)
        return error


def _environment(threads: int) -> dict[str, str]:
    """This process's environment, with threads fixed, no network, and this very edgemin on the path."""
    path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
    }
