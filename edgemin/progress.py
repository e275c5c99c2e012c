"""Progress: a line per node of the plan; while something goes on a live line on a terminal, elsewhere one now and then.

All that is said here goes to the job's log too, through the logger of this module.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, cast

import pytorch_lightning as pl
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from edgemin.plain_text import inert

EVERY_SECONDS = 30.0  # between two lines where there is no terminal

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Line:
    """One thing that goes on: what it is, and how much of it is done where that is known.

    Args:
        text: what it says; may be changed while it goes on.
        total: how much there is to do; `done` counts up to it.
        clock: seconds from any fixed moment; for tests.
    """

    def __init__(self, text: str, total: int | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.text, self.total, self.done = text, total, 0
        self._clock = clock
        self._began = clock()

    @property
    def seconds(self) -> float:
        """How long it has gone on."""
        return self._clock() - self._began

    def __str__(self) -> str:
        return f"{self.text}  {duration(self.seconds) if self.total is None else f'{self.done}/{self.total}'}"


class _Board:
    """All that goes on at this moment, shown as one line: the outermost thing first, its parts behind it."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.live: Live | None = None
        self._said = time.monotonic()
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()

    def open(self, line: Line, console: Console | None, every_seconds: float) -> None:
        self.lines.append(line)
        if len(self.lines) > 1:
            return
        console = console or Console()
        if is_live(console):
            self.live = Live(console=console, get_renderable=self._drawn, refresh_per_second=4, transient=True)
            self.live.start()
        else:
            self._ended.clear()
            self._thread = threading.Thread(target=self._repeat, args=(console, every_seconds), daemon=True)
            self._thread.start()

    def close(self, line: Line) -> None:
        if len(self.lines) > 1:
            self.lines.remove(line)
            return
        if self.live is not None:
            live, self.live = self.live, None
            live.stop()
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            self._thread = None
        self.lines.clear()

    def say(self, line: str, console: Console | None) -> None:
        """Print a line that stays; above the live one, where there is one."""
        self._said = time.monotonic()
        console = console or (self.live.console if self.live is not None else Console())
        # As Text: a path may hold square brackets, which rich would take for markup.
        console.print(Text(inert(line)), soft_wrap=True, highlight=False)

    def _repeat(self, console: Console, every_seconds: float) -> None:
        # Counted from the last line, whoever said it: many short things are as silent as a long one.
        while not self._ended.wait(max(0.0, self._said + every_seconds - time.monotonic())):
            if time.monotonic() - self._said >= every_seconds:
                _say(self._text(), console)

    def _text(self) -> str:
        return inert("  ".join(map(str, list(self.lines))))

    def _drawn(self) -> RenderableType:
        lines = list(self.lines)
        if not lines:
            return ""
        grid = Table.grid(padding=(0, 2))
        counted = next((line for line in reversed(lines) if line.total is not None), lines[-1])
        grid.add_row(Text(self._text()), ProgressBar(counted.total, counted.done, width=20))
        return grid


_board = _Board()


@contextmanager
def live_line(
    text: str,
    total: int | None = None,
    *,
    beside_bars: bool = False,
    console: Console | None = None,
    every_seconds: float | None = None,
) -> Iterator[Line]:
    """Say what goes on for as long as it does: live on a terminal, elsewhere in a plain line every half minute.

    Inside another one it stands behind that, so that a loop deep inside need not know what it is part of:

        student/finetune  evaluating  sst2 validation  batch  3/14

    Args:
        text: what it says.
        total: how much there is to do, where that is known.
        beside_bars: something else draws bars on a terminal meanwhile (a download): nothing is drawn there.
        console: where to write; standard output if None. What is inside another follows that.
        every_seconds: seconds between two plain lines; [`EVERY_SECONDS`][edgemin.progress.EVERY_SECONDS] if None.

    Yields:
        The line; its `text`, `done` and `total` may be changed.
    """
    line = Line(text, total)
    if beside_bars and is_live(console or Console()):
        yield line
        return
    _board.open(line, console, EVERY_SECONDS if every_seconds is None else every_seconds)
    try:
        yield line
    finally:
        _board.close(line)


def counted(items: Iterable[T], text: str, total: int | None = None) -> Iterator[T]:
    """Go through items, and say in a [`live_line`][edgemin.progress.live_line] how many are done.

    Args:
        items: what is gone through.
        text: what is done with them, or what one of them is.
        total: how many there are; their `len()` where they have one, if None.
    """
    if total is None and hasattr(items, "__len__"):
        total = len(cast("Any", items))
    with live_line(text, total) as line:
        for item in items:
            yield item
            line.done += 1


class _Fit(Line):
    """The line of a fit: before its first step, then step by step."""

    def __init__(self, path: str, clock: Callable[[], float]) -> None:
        super().__init__(path, None, clock)
        self.first: int | None = None  # the step it began at

    def start(self, step: int, total: int | None) -> None:
        self.first = self.done = step
        self.total, self._began = total, self._clock()

    def __str__(self) -> str:
        if self.first is None:
            return f"{self.text}  preparing  {duration(self.seconds)}"
        return training_line(self.text, self.done, self.total, self.done - self.first, self.seconds)


class Named(Protocol):
    """A module that says what its present fit is called."""

    @property
    def fit_name(self) -> str:
        """Such as `student/finetune/distill`, or `student/finetune/distill/phase 2`."""


class NodeProgress(pl.Callback):
    """Shows how far a node's training is: steps done, steps per second, time left.

    A [`live_line`][edgemin.progress.live_line] while it goes on; one line stays when it ends:

        student/finetune/distill  training  step 120/500  3.4 steps/s  1 min 52 s left
        student/finetune/distill  trained  500 steps  2 min 27 s

    Args:
        console: Where to write; standard output if None.
        every_seconds: Seconds between two plain lines.
        clock: Seconds from any fixed moment; for tests.
    """

    def __init__(
        self,
        *,
        console: Console | None = None,
        every_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console, self._clock = console, clock
        self._every_seconds = EVERY_SECONDS if every_seconds is None else every_seconds
        self._line: _Fit | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """A fit begins; before its first step it may compute for long."""
        if trainer.is_global_zero:
            self._line = _Fit(cast(Named, pl_module).fit_name, self._clock)
            _board.open(self._line, self._console, self._every_seconds)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock; a resumed stage starts at the step it was killed at."""
        if self._line is not None:
            asked = trainer.estimated_stepping_batches
            total = int(asked) if math.isfinite(asked) and asked >= 0 else None
            self._line.start(trainer.global_step, total)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Count the step on the line that shows this fit."""
        if self._line is not None:
            self._line.done = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave one line: how many steps were done, in how long."""
        line = self._line
        self._close()
        if line is not None:
            _say(f"{line.text}  trained  {trainer.global_step} steps  {duration(line.seconds)}", self._console)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """End the line of a fit that had no step too, for which Lightning calls no other hook."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the terminal back before the error is shown."""
        self._close()

    def _close(self) -> None:
        if self._line is not None:
            _board.close(self._line)
            self._line = None


def training_line(path: str, step: int, total_steps: int | None, done: int, seconds: float) -> str:
    """The line of a node in training.

    Args:
        path: The node.
        step: Steps done, those before a resume included.
        total_steps: Steps of the whole fit, None if unknown.
        done: Steps done in the last `seconds`, from which speed and time left follow.
        seconds: How long these took.

    Returns:
        One line; what cannot be known yet is left out.
    """
    parts = [path, "training", f"step {step}" + (f"/{total_steps}" if total_steps is not None else "")]
    if done > 0 and seconds > 0:
        per_second = done / seconds
        parts.append(f"{per_second:.1f} steps/s" if per_second >= 0.1 else f"{1 / per_second:.1f} s/step")
        if total_steps is not None and step < total_steps:
            parts.append(f"{duration((total_steps - step) / per_second)} left")
    return "  ".join(parts)


def node_line(path: str, status: str, detail: str = "", console: Console | None = None) -> None:
    """Print the line of a node that is not in training.

    Args:
        path: The node, such as `student/finetune`.
        status: One word: `cached`, `done`, `waiting` ...
        detail: What else is worth knowing.
        console: Where to write; standard output if None.
    """
    _say("  ".join(part for part in (path, status, detail) if part), console)


def duration(seconds: float) -> str:
    """Seconds as a person says them: `41 s`, `1 min 52 s`, `3 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def is_live(console: Console) -> bool:
    """Whether a bar can be drawn: a real terminal, whatever FORCE_COLOR and the like pretend."""
    return console.file.isatty() and not console.is_dumb_terminal


class ConsoleHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Puts warnings above the live line, on standard output; a plain handler's would be overwritten by that line."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a log record as a line that stays."""
        _board.say(self.format(record), None)


def _say(line: str, console: Console | None = None) -> None:
    _board.say(line, console)
    _log.info(inert(line))
