"""SIGTERM and SIGINT: a run ends with the exit code that shells expect, and says how to go on.

A signal ends the run where it stands: what is finished is in the store. Where a stage trains, it waits until the step
is done and a checkpoint is written (see [`hold`][edgemin.processes.stopping.hold]). A second signal ends the process
without waiting for anything. Nothing is loaded here, so that a command line can install it before all else.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GO_ON = "; run the same command again to go on from the last checkpoint"
# A terminal and a launcher (torchrun, srun) may both pass on one and the same wish: that is no second signal.
_TOGETHER_S = 1.0


class Stopped(SystemExit):
    """The process was asked to end; its `code` is 128 and the signal's number.

    It is no `Exception`, so that a sweep does not go on to its next job; `finally` blocks still run.
    """


@dataclass
class _State:
    installed: bool = False
    asked: int | None = None  # the first signal
    since: float = 0.0
    held: bool = False
    advice: str = GO_ON


_state = _State()


def install(advice: str = GO_ON) -> bool:
    """Take the two signals from now on; not outside of a process's first thread, where Python allows no handlers.

    Args:
        advice: what is said behind the name of the signal.

    Returns:
        Whether they were taken now.
    """
    if _state.installed or threading.current_thread() is not threading.main_thread():
        return False
    for number in SIGNALS:
        signal.signal(number, _handle)
    _state.installed, _state.asked, _state.held, _state.advice = True, None, False, advice
    return True


@contextmanager
def handled(advice: str = GO_ON) -> Iterator[None]:
    """Inside, the two signals end the run as this module says; nothing where they already do."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    mine = install(advice)
    try:
        yield
    finally:
        if mine:
            _state.installed, _state.asked, _state.held = False, None, False
            for number, handler in before.items():
                signal.signal(number, handler)


def asked() -> int | None:
    """The exit code to end with, if a signal has come."""
    return None if _state.asked is None else 128 + _state.asked


def check() -> None:
    """End the run if a signal has come that was put off, or that a library has swallowed."""
    if (code := asked()) is not None:
        raise Stopped(code)


def hold() -> None:
    """From now on a signal waits for the next [`check`][edgemin.processes.stopping.check].

    The handlers are set anew: Lightning puts one of its own before them when a fit begins, which ends with exit code 0.
    """
    if _state.installed:
        _state.held = True
        for number in SIGNALS:
            signal.signal(number, _handle)


def release() -> None:
    """From now on a signal ends the run where it stands."""
    _state.held = False


def _handle(number: int, frame: FrameType | None) -> None:
    name, now = signal.Signals(number).name, time.monotonic()
    if _state.asked is None:
        _state.asked, _state.since = number, now
        _say(f"stopped by {name}{_state.advice}")
        if not _state.held:
            raise Stopped(128 + number)
    elif now - _state.since >= _TOGETHER_S:
        _say(f"stopped at once by a second signal, {name}")
        os._exit(128 + number)


def _say(line: str) -> None:
    """Write to standard error, past whatever the interrupted code was about to write; one process speaks for all."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        os.write(2, f"{os.linesep if os.isatty(2) else ''}{line}{os.linesep}".encode())
