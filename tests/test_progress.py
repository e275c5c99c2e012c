"""The lines a person sees while a node trains, on a terminal and in a log file."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from rich.console import Console

from edgemin.progress import ConsoleHandler, NodeProgress, counted, duration, live_line, node_line, training_line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Model(pl.LightningModule):
    def __init__(self, fit_name: str = "node", at: Callable[[int], None] = lambda batch: None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.fit_name, self.at = fit_name, at

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.at(batch_idx)
        return (self.weight - batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(progress: NodeProgress, root: Path, model: Model | None = None, **settings: Any) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[progress],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        **settings,
    )
    trainer.fit(model or Model(), torch.utils.data.DataLoader(torch.ones(8, 1), batch_size=1))


def seconds_pass(each: float) -> Any:
    """A clock that moves on by `each` second whenever it is read."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += each
        return now

    return clock


def test_a_training_line_tells_step_speed_and_time_left() -> None:
    line = training_line("student/finetune/distill", 120, 500, done=120, seconds=120 / 3.4)
    assert line == "student/finetune/distill  training  step 120/500  3.4 steps/s  1 min 52 s left"


def test_a_resumed_stage_is_as_fast_as_the_steps_it_did_now() -> None:
    assert training_line("a", 450, 500, done=50, seconds=50) == "a  training  step 450/500  1.0 steps/s  50 s left"


def test_what_is_not_known_is_left_out() -> None:
    assert training_line("a", 0, 500, done=0, seconds=0.0) == "a  training  step 0/500"
    assert training_line("a", 7, None, done=7, seconds=3.5) == "a  training  step 7  2.0 steps/s"
    assert training_line("a", 5, 5, done=5, seconds=100) == "a  training  step 5/5  20.0 s/step"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (112, "1 min 52 s"),
        (3599.7, "1 h 0 min"),
        (11100, "3 h 5 min"),
    ],
)
def test_durations_are_said_in_two_units_at_most(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def patiently(log: io.StringIO, text: str) -> None:
    """Wait until a text was written by the thread that speaks."""
    end = time.monotonic() + 30
    while text not in log.getvalue():
        assert time.monotonic() < end, log.getvalue()
        time.sleep(0.001)


def test_a_log_file_gets_a_line_now_and_then_and_one_at_the_end(tmp_path: Path) -> None:
    log = io.StringIO()
    progress = NodeProgress(every_seconds=0.001, console=Console(file=log), clock=seconds_pass(1.0))
    fit(progress, tmp_path, Model("student/finetune", lambda step: patiently(log, f"step {step}/8") if step else None))
    lines = log.getvalue().splitlines()
    assert all(line.startswith("student/finetune  ") for line in lines)
    assert lines[-1].startswith("student/finetune  trained  8 steps  ")
    assert "\x1b" not in log.getvalue()


def test_a_fit_that_prepares_for_long_says_so(tmp_path: Path) -> None:
    log = io.StringIO()
    model = Model("student/quantize/phase 2")
    model.on_fit_start = lambda: patiently(log, "student/quantize/phase 2  preparing")  # type: ignore[method-assign]
    fit(NodeProgress(every_seconds=0.001, console=Console(file=log)), tmp_path, model)


def test_steps_are_optimizer_steps_of_this_fit(tmp_path: Path) -> None:
    log = io.StringIO()
    progress = NodeProgress(every_seconds=0.001, console=Console(file=log))
    for accumulate, total in ((4, 2), (2, 4)):
        fit(
            progress,
            tmp_path,
            Model("node", lambda _: patiently(log, f"/{total}")),  # noqa: B023 - called before the next
            accumulate_grad_batches=accumulate,
        )
        assert f"trained  {total} steps" in log.getvalue().splitlines()[-1]


def test_a_terminal_gets_a_bar_that_leaves_one_line(tmp_path: Path) -> None:
    terminal = Terminal()
    fit(NodeProgress(console=Console(file=terminal, force_terminal=True, width=100)), tmp_path)
    shown = terminal.getvalue()
    assert "\x1b[" in shown
    assert "node  training  step 8/8" in shown
    assert shown.count("trained  8 steps") == 1
    assert shown.rstrip().splitlines()[-1].find("trained  8 steps") >= 0


def test_force_color_draws_no_bar_into_a_log_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    log = io.StringIO()
    fit(NodeProgress(console=Console(file=log)), tmp_path)
    assert log.getvalue().splitlines() == ["node  trained  8 steps  0 s"]


def test_a_failing_stage_gives_the_terminal_back(tmp_path: Path) -> None:
    terminal = Terminal()
    progress = NodeProgress(console=Console(file=terminal, force_terminal=True, width=100))

    def fail(step: int) -> None:
        if step == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(progress, tmp_path, Model("node", fail))
    assert terminal.getvalue().endswith("\x1b[?25h") or "\x1b[?25h" in terminal.getvalue(), "the cursor is back"
    assert "trained" not in terminal.getvalue()


def test_in_a_pipe_whatever_goes_on_is_said_with_what_it_consists_of() -> None:
    log = io.StringIO()
    with live_line("student  evaluating on sst2", console=Console(file=log), every_seconds=0.001):
        for number in counted([1, 2, 3], "batch"):
            patiently(log, f"student  evaluating on sst2  0 s  batch  {number - 1}/3")
        patiently(log, "student  evaluating on sst2  0 s\n")
    said = log.getvalue()
    assert "\x1b" not in said
    time.sleep(0.01)
    assert log.getvalue() == said, "nothing is said when nothing goes on"


def test_many_short_things_are_not_silent_together() -> None:
    log = io.StringIO()
    end = time.monotonic() + 30
    while "short" not in log.getvalue():  # each ends long before its own first line would come
        assert time.monotonic() < end
        with live_line("short", console=Console(file=log), every_seconds=0.05):
            time.sleep(0.001)


def test_what_draws_bars_of_its_own_is_left_alone_on_a_terminal() -> None:
    terminal = Terminal()
    with live_line("downloading", beside_bars=True, console=Console(file=terminal, force_terminal=True)):
        pass
    assert terminal.getvalue() == ""


def test_a_warning_is_not_overwritten_by_the_live_line() -> None:
    terminal = Terminal()
    console = Console(file=terminal, force_terminal=True, width=100)
    with live_line("calibrating", console=console):
        ConsoleHandler().emit(logging.LogRecord("edgemin", logging.WARNING, "", 0, "few examples", None, None))
    assert "few examples\n" in terminal.getvalue(), "in the console that knows of the live line"


def test_lines_that_stay_go_to_the_log_too(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="edgemin"):
        node_line("student/finetune", "note", "removed 2 heads")
    assert caplog.messages == ["student/finetune  note  removed 2 heads"]


def test_a_node_that_is_not_trained_gets_one_line_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    node_line("student/finetune", "cached", "key 3f2a")
    node_line("student/prune[0.2]", "done")
    node_line("x" * 200, "cached")
    assert capsys.readouterr().out.splitlines() == [
        "student/finetune  cached  key 3f2a",
        "student/prune[0.2]  done",
        "x" * 200 + "  cached",
    ]


def test_a_terminal_acts_on_nothing_in_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    node_line("student/\x1b[31mred", "done")
    assert capsys.readouterr().out == "student/\\x1b[31mred  done\n"
