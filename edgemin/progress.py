"""Progress: one line per node of the plan, and a live bar only where there is a terminal to draw it on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from edgemin.plain_text import inert


class NodeProgress(pl.Callback):
    """Shows how far a node's training is: steps done, steps per second, time left.

    On a terminal a bar follows every step and vanishes at the end; elsewhere a plain line appears every
    ``every_seconds``. Either way one line stays when training ends::

        student/finetune/distill  training  step 120/500  3.4 steps/s  1 min 52 s left
        student/finetune/distill  trained  500 steps  2 min 27 s

    Args:
        path: The node, such as ``student/finetune/distill``.
        total_steps: Optimiser steps of the whole fit; asked of the trainer if None.
        every_seconds: Seconds between two plain lines.
        console: Where to write; standard output if None.
        clock: Seconds from any fixed moment; for tests.
    """

    def __init__(
        self,
        path: str,
        *,
        total_steps: int | None = None,
        every_seconds: float = 30.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._total = total_steps
        self._every_seconds = every_seconds
        self._console = console or Console()
        self._clock = clock
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._began = self._printed = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock; a resumed stage starts at the step it was killed at."""
        if self._total is None:
            asked = trainer.estimated_stepping_batches
            self._total = int(asked) if math.isfinite(asked) and asked >= 0 else None
        self._first_step = trainer.global_step
        self._began = self._printed = self._clock()
        if trainer.is_global_zero and is_live(self._console):
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task(self._line(self._first_step), total=self._total)
            self._bar.start()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Move the bar, or print a line when it is time to."""
        step = trainer.global_step
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, description=self._line(step))
        elif trainer.is_global_zero and self._clock() - self._printed >= self._every_seconds:
            self._printed = self._clock()
            _print(self._console, self._line(step))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave one line: how many steps were done, in how long."""
        self._stop_bar()
        if trainer.is_global_zero:
            seconds = duration(self._clock() - self._began)
            _print(self._console, f"{self._path}  trained  {trainer.global_step} steps  {seconds}")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the terminal back before the error is shown."""
        self._stop_bar()

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _line(self, step: int) -> str:
        seconds = self._clock() - self._began
        return training_line(self._path, step, self._total, step - self._first_step, seconds)


def training_line(path: str, step: int, total_steps: int | None, done: int, seconds: float) -> str:
    """The line of a node in training.

    Args:
        path: The node.
        step: Steps done, those before a resume included.
        total_steps: Steps of the whole fit, None if unknown.
        done: Steps done in the last ``seconds``, from which speed and time left follow.
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
        path: The node, such as ``student/finetune``.
        status: One word: ``cached``, ``done``, ``waiting`` ...
        detail: What else is worth knowing.
        console: Where to write; standard output if None.
    """
    _print(console or Console(), "  ".join(part for part in (path, status, detail) if part))


@contextmanager
def live_line(text: str, console: Console | None = None) -> Iterator[Callable[[str], None]]:
    """A line that shows what goes on and vanishes at the end; nothing where there is no terminal.

    Args:
        text: What it says at first.
        console: Where to write; standard output if None.

    Yields:
        A function that changes the text.
    """
    console = console or Console()
    if not is_live(console):
        yield lambda changed: None
        return
    with console.status(Text(text)) as status:
        yield lambda changed: status.update(Text(changed))


def duration(seconds: float) -> str:
    """Seconds as a person says them: ``41 s``, ``1 min 52 s``, ``3 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def is_live(console: Console) -> bool:
    """Whether a bar can be drawn: a real terminal, whatever FORCE_COLOR and the like pretend."""
    return console.file.isatty() and not console.is_dumb_terminal


def _print(console: Console, line: str) -> None:
    # As Text: a path may hold square brackets, which rich would take for markup.
    console.print(Text(inert(line)), soft_wrap=True, highlight=False)
