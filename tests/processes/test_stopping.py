"""SIGTERM and SIGINT: the exit code, the line, and a rerun that ends with the table of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import studies
import tiny
import torch

from edgemin.finetune import Finetune
from edgemin.processes import stopping
from edgemin.training import fitting

REPOSITORY = Path(__file__).parents[2]
LINE = "stopped by {}; run the same command again to go on from the last checkpoint\n"


def environment(**more: str) -> dict[str, str]:
    given = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    return {**os.environ, **given, **more}


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


# --- where the signal comes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_signal_ends_the_run_where_it_stands(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(one) for one in stopping.SIGNALS]
    with pytest.raises(stopping.Stopped) as left, stopping.handled():
        send(number)
    assert left.value.code == 128 + number
    assert capfd.readouterr().err == LINE.format(number.name)
    assert [signal.getsignal(one) for one in stopping.SIGNALS] == before


def test_what_a_library_swallows_ends_the_run_at_the_next_check(capfd: pytest.CaptureFixture[str]) -> None:
    with stopping.handled():
        with pytest.raises(stopping.Stopped):
            send(signal.SIGTERM)
        send(signal.SIGINT)  # at once after the first: a launcher that passes the same wish on
        with pytest.raises(stopping.Stopped) as left:
            stopping.check()
    assert left.value.code == 143
    assert capfd.readouterr().err == LINE.format("SIGTERM")
    with stopping.handled():
        stopping.check()  # forgotten


STUCK = """
import time
from edgemin.processes import stopping
stopping.install()
stopping.hold()
print("ready", flush=True)
while True:
    time.sleep(0.01)
"""


def test_a_second_signal_forces() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline() == LINE.format("SIGTERM")
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
    assert process.returncode == 130
    assert process.stderr.read() == "stopped at once by a second signal, SIGINT\n"
    process.stdout.close()
    process.stderr.close()


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_signal_while_modules_are_loaded_is_answered_alike(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "hydra.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(100)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "edgemin.train"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(PYTHONPATH=os.pathsep.join([str(tmp_path), str(REPOSITORY)])),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    process.send_signal(number)
    assert process.communicate()[1] == LINE.format(number.name)
    assert process.returncode == 128 + number


# --- in training ------------------------------------------------------------------------------------------


class Signal(pl.Callback):
    """Sends a signal in the middle of a batch, counted from 1."""

    def __init__(self, batch: int, number: signal.Signals) -> None:
        self.batch, self.number = batch, number

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 == self.batch:
            send(self.number)


@pytest.mark.parametrize(
    ("number", "batch", "kept"),
    [(signal.SIGTERM, 3, 4), (signal.SIGINT, 4, 4), (signal.SIGTERM, 8, 8)],
    ids=["inside an accumulation", "at its end", "in the last batch"],
)
def test_the_step_is_finished_and_kept_before_the_run_is_left(
    number: signal.Signals, batch: int, kept: int, tmp_path: Path
) -> None:
    def run(work: Path, callbacks: Sequence[pl.Callback] = ()) -> fitting.Fitted:
        stage = tiny.stage(Finetune, steps=4, accumulate=2, batch_size=8, learning_rate=1e-3)
        return tiny.fit(stage, tiny.model(dropout=0.1), tiny.data(tmp_path), work=work, callbacks=callbacks)

    whole = run(tmp_path / "whole")
    with pytest.raises(stopping.Stopped) as left, stopping.handled():
        run(tmp_path / "work", [Signal(batch, number)])
    assert left.value.code == 128 + number
    saved = torch.load(tmp_path / "work" / fitting.CHECKPOINT, weights_only=True)["edgemin"]
    assert (saved["batch"], saved["done"]) == (kept, kept == 8)
    assert tiny.same_weights(run(tmp_path / "work").model, whole.model)


# --- each kind of stage, in a process of its own ------------------------------------------------------------

# Runs the command line, with a signal to itself when a function is called for the n-th time.
INTERRUPTED = """
import importlib, os, sys
where, count, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
del sys.argv[1:4]
module, _, path = where.rpartition(":")
*names, last = path.split(".")
owner = importlib.import_module(module)
for name in names:
    owner = getattr(owner, name)
original, calls = getattr(owner, last), []
def interrupted(*args, **named):
    calls.append(1)
    if len(calls) == count:
        os.kill(os.getpid(), number)
    return original(*args, **named)
setattr(owner, last, interrupted)
from edgemin.train import main
main()
"""
BASE = ("stages=[finetune,distill,prune,quantize]", "distill.steps=5", "prune.steps=5", "evaluate.transfer=[]")
TRAINED = ("quantize=qat", "quantize.epochs=null", "quantize.steps=5")
BLOCKS = ("quantize=reconstruct", "quantize.epochs=null", "quantize.steps=3", "quantize.calibration_examples=16")
MIXED = ("quantize=static", "quantize.sensitivity=true", "quantize.calibration_examples=16")
MEASURED = ("measure=default", "measure.runs=4", "measure.rounds=2", "measure.max_rounds=2", "measure.wait_minutes=0")
KINDS: dict[str, tuple[str, tuple[int, int], tuple[str, ...]]] = {
    "planning": ("edgemin.study.plan:build", (1, 1), TRAINED),
    "fine-tuning": ("edgemin.finetune:Finetune.loss", (4, 5), TRAINED),
    "distillation": ("edgemin.training.distillation:Distillation.loss", (2, 2), TRAINED),
    "pruning": ("edgemin.pruning.stage:Pruning.loss", (2, 2), TRAINED),
    "QAT": ("edgemin.quantization.qat:QuantizationAware.loss", (2, 2), TRAINED),
    "reconstruction": ("edgemin.quantization.reconstruct:Reconstruction.loss", (2, 3), BLOCKS),
    "sensitivity": ("edgemin.quantization.sensitivity:damage", (1, 2), MIXED),
    "calibration": ("edgemin.quantization.model:fit_inputs", (1, 1), MIXED),
    "evaluation": ("edgemin.study.scoring:evaluate", (1, 2), TRAINED),
    "measuring": ("edgemin.measure.process:WorkerProcess.ask", (2, 5), (*TRAINED, *MEASURED)),
}


def table(directory: Path) -> list[dict[str, Any]]:
    """The rows of the last job, without what the clock and the machine decide."""
    path = max(directory.rglob("run.json"))
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    for row in rows:
        row["cost"]["runtimes"]["torch"] = {"size_bytes": row["cost"]["runtimes"]["torch"]["size_bytes"]}
        for difference in filter(None, row["delta"].values()):
            difference["runtimes"]["torch"].pop("speed_up", None)
    return rows


def shell(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    cwd.mkdir(exist_ok=True)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, ...]], list[dict[str, Any]]]:
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}

    def rows(settings: tuple[str, ...]) -> list[dict[str, Any]]:
        if settings not in found:
            cwd = tmp_path_factory.mktemp("undisturbed")
            done = shell(cwd, "-m", "edgemin.train", *studies.TINY, *BASE, *settings)
            assert (done.returncode, done.stderr) == (0, "")
            found[settings] = table(cwd)
        return found[settings]

    return rows


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_stage_ends_after_both_signals_with_the_undisturbed_table(
    kind: str, undisturbed: Callable[[tuple[str, ...]], list[dict[str, Any]]], tmp_path: Path
) -> None:
    where, counts, settings = KINDS[kind]
    arguments = [*studies.TINY, *BASE, *settings]
    for number, count in zip(stopping.SIGNALS, counts, strict=True):
        stopped = shell(tmp_path, "-c", INTERRUPTED, where, str(count), str(int(number)), *arguments)
        assert (stopped.returncode, stopped.stderr) == (128 + number, LINE.format(number.name)), stopped.stdout
        assert not list(tmp_path.rglob("run.json"))
    again = shell(tmp_path, "-m", "edgemin.train", *arguments)
    assert again.returncode == 0, again.stderr
    assert table(tmp_path) == undisturbed(tuple(one for one in settings if one not in MEASURED))
    if kind == "measuring":
        assert '"latency_ms"' in max(tmp_path.rglob("run.json")).read_text()


@pytest.mark.slow
def test_a_signal_ends_the_whole_sweep(tmp_path: Path) -> None:
    arguments = [*studies.TINY, "stages=[finetune]", "finetune.steps=1,2"]
    where = "edgemin.finetune:Finetune.loss"
    stopped = shell(tmp_path, "-c", INTERRUPTED, where, "1", str(int(signal.SIGTERM)), "-m", *arguments)
    assert (stopped.returncode, stopped.stderr) == (143, LINE.format("SIGTERM"))
    assert not list(tmp_path.rglob("run.json"))
