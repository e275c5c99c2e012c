"""The lines a person sees while a node trains, on a terminal and in a log file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from rich.console import Console

from edgemin.progress import NodeProgress, duration, node_line, training_line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Model(pl.LightningModule):
    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.fails_at = fails_at

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if batch_idx == self.fails_at:
            raise ZeroDivisionError
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
    """A clock that moves on by ``each`` second whenever it is read."""
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


def test_a_log_file_gets_a_line_now_and_then_and_one_at_the_end(tmp_path: Path) -> None:
    log = io.StringIO()
    progress = NodeProgress("student/finetune", every_seconds=30, console=Console(file=log), clock=seconds_pass(5.0))
    fit(progress, tmp_path)
    lines = log.getvalue().splitlines()
    assert 1 < len(lines) < 8
    assert all(line.startswith("student/finetune  training  step ") and "/8" in line for line in lines[:-1])
    assert lines[-1].startswith("student/finetune  trained  8 steps  ")
    assert "\x1b" not in log.getvalue()


def test_steps_are_optimiser_steps(tmp_path: Path) -> None:
    log = io.StringIO()
    progress = NodeProgress("node", every_seconds=0, console=Console(file=log), clock=seconds_pass(1.0))
    fit(progress, tmp_path, accumulate_grad_batches=4)
    lines = log.getvalue().splitlines()
    assert "step 2/2" in lines[-2]
    assert "trained  2 steps" in lines[-1]


def test_a_terminal_gets_a_bar_that_leaves_one_line(tmp_path: Path) -> None:
    terminal = Terminal()
    progress = NodeProgress("node", console=Console(file=terminal, force_terminal=True, width=100), every_seconds=0)
    fit(progress, tmp_path)
    shown = terminal.getvalue()
    assert "\x1b[" in shown
    assert "node  training  step" in shown
    assert shown.count("trained  8 steps") == 1
    assert shown.rstrip().splitlines()[-1].find("trained  8 steps") >= 0


def test_force_color_draws_no_bar_into_a_log_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    log = io.StringIO()
    fit(NodeProgress("node", console=Console(file=log)), tmp_path)
    assert log.getvalue().splitlines() == ["node  trained  8 steps  0 s"]


def test_a_failing_stage_gives_the_terminal_back(tmp_path: Path) -> None:
    terminal = Terminal()
    progress = NodeProgress("node", console=Console(file=terminal, force_terminal=True, width=100))
    with pytest.raises(ZeroDivisionError):
        fit(progress, tmp_path, Model(fails_at=3))
    assert terminal.getvalue().endswith("\x1b[?25h") or "\x1b[?25h" in terminal.getvalue(), "the cursor is back"
    assert "trained" not in terminal.getvalue()


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
