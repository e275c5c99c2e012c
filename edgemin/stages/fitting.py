"""Runs a stage: its phases in order, with Lightning, so that it can be killed at any moment and resumed exactly.

Every step's randomness is a function of (seed, phase, step) and every step's batch of (seed, step), so a checkpoint
of weights and optimiser
is all that a resumed run needs to end with the same weights as an unbroken one.
"""

from __future__ import annotations

import io
import logging
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from torch import nn
from transformers import PreTrainedModel

from edgemin.data import CorpusBatches, DataModule, TrainBatches
from edgemin.errors import UserError
from edgemin.evaluate import evaluate, primary_metric
from edgemin.stages.base import Stage
from edgemin.stages.fit import Fit
from edgemin.store import write_atomically

CHECKPOINT = "last.ckpt"


@dataclass(frozen=True)
class Trainer:
    """Where and how stages are trained (``trainer=``).

    Attributes:
        accelerator: ``auto`` takes a GPU where there is one, else the CPU.
        precision: ``auto`` is bf16 mixed where the hardware has it (GPU, or a CPU with AMX or AVX512-BF16), fp16
            mixed with loss scaling on older
            GPUs, else fp32. Relation scores are always in fp32.
        threads: CPU threads of torch; ``None`` leaves torch's choice.
        checkpoint_seconds: at most so much training is lost when a run is killed.
    """

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    precision: Literal["auto", "bf16", 32, 16] = "auto"
    threads: int | None = None
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.accelerator == "gpu" and not torch.cuda.is_available():
            raise UserError("accelerator: expected cpu or auto on a machine without a GPU, given gpu")
        if self.precision == 16 and self.device == "cpu":
            raise UserError("precision: expected auto, 32 or bf16 on a CPU, given 16")
        if self.threads is not None and self.threads < 1:
            raise UserError(f"threads: expected null or a whole number of at least 1, given {self.threads}")
        if self.checkpoint_seconds < 0:
            raise UserError(f"checkpoint_seconds: expected a number of at least 0, given {self.checkpoint_seconds}")

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``."""
        return "cuda" if self.accelerator != "cpu" and torch.cuda.is_available() else "cpu"

    @property
    def lightning_precision(self) -> Literal["32-true", "bf16-mixed", "16-mixed"]:
        """Lightning's name of the precision that ``auto`` came to."""
        if self.precision == "auto":
            if self.device == "cuda":
                return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
            return "bf16-mixed" if cpu_has_bf16() else "32-true"
        if self.precision == 32:
            return "32-true"
        return "bf16-mixed" if self.precision == "bf16" else "16-mixed"


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware; without that autocast is twice slower than fp32."""
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, probe)()) for probe in probes if hasattr(torch.cpu, probe))


@dataclass
class Fitted:
    """What running a stage left behind."""

    model: PreTrainedModel
    steps: int
    seconds: float
    notes: list[str] = field(default_factory=list)


def run(
    stage: Stage,
    model: PreTrainedModel,
    data: DataModule | None,
    teachers: Sequence[PreTrainedModel],
    *,
    seed: int,
    trainer: Trainer,
    work: Path,
    name: str | None = None,
    callbacks: Sequence[pl.Callback] = (),
    logger: Callable[[int], Logger] | None = None,
) -> Fitted:
    """Prepare, fit every phase, finish; resumes from ``work`` where a checkpoint lies there.

    Args:
        stage: freshly constructed.
        model: the previous encoder; changed in place.
        data: the task's data (``None`` for an architecture without data).
        teachers: the models the stage learns from.
        seed: of this stage in this path.
        trainer: device, precision and so on.
        work: directory for checkpoints.
        name: of this node, for messages.
        callbacks: progress, for example.
        logger: gives for each phase where its losses go.
    """
    began = time.monotonic()
    stage.seed, stage.name = seed, name or stage.name
    torch.manual_seed(seed)
    nn.Module.to(model, trainer.device)
    stage.prepare(model, data, teachers)
    saved = _read_checkpoint(work / CHECKPOINT)
    spent = _Spent(began)
    if saved is not None:  # what was spent before the kill counts
        spent = _Spent(began - saved["edgemin"]["seconds"], saved["edgemin"]["steps_before"])
    for phase, fit in enumerate(stage.phases()):
        resumed = saved["edgemin"] if saved is not None else None
        if resumed is not None and phase < resumed["phase"]:
            continue
        if resumed is not None and phase == resumed["phase"] and resumed["done"]:
            assert saved is not None
            stage.on_load_checkpoint(saved)
            stage.load_state_dict(saved["state_dict"])
            spent.steps = resumed["steps"]
            continue
        start, stream = 0, None
        if resumed is not None and phase == resumed["phase"]:
            start, stream = resumed["batch"], resumed["stream"]
            stage.phase = phase
        else:
            saved = None
            stage.phase = phase
            nn.Module.to(stage, trainer.device)  # Lightning leaves it on the CPU after a fit
            stage.begin(phase)
        if fit.trains:
            log = logger(phase) if logger is not None else None
            _fit(stage, fit, start, trainer, work, spent, callbacks, log, stream)
    finished = stage.finish().cpu().eval()
    return Fitted(finished, spent.steps, time.monotonic() - spent.began, list(stage.notes))


@dataclass
class _Spent:
    """What a stage has cost so far, kills included: its beginning on a clock moved back, its earlier fits' steps."""

    began: float
    steps: int = 0


def _read_checkpoint(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(
            f"checkpoint {path}: damaged ({type(error).__name__}); delete it to train the stage from its start"
        ) from error
    assert isinstance(saved, dict)
    return saved


def _fit(
    stage: Stage,
    fit: Fit,
    start: int,
    trainer: Trainer,
    work: Path,
    spent: _Spent,
    callbacks: Sequence[pl.Callback],
    logger: Logger | None,
    stream: dict[str, Any] | None,
) -> None:
    """One Lightning fit, from batch ``start`` on; ``stream`` is where a corpus stood."""
    batches = stage.training_batches(fit)
    batches.start = start
    if stream is not None:
        assert isinstance(batches, CorpusBatches)
        batches.load_state_dict(stream)
    checkpoint = _Checkpoint(work / CHECKPOINT, trainer.checkpoint_seconds, batches, spent)
    own: list[pl.Callback] = [checkpoint]
    if fit.patience is not None:
        assert isinstance(batches, TrainBatches)
        if stage.data.holdout is None:
            raise UserError("patience: expected task.holdout above 0, on which to stop early, given 0")
        # before the checkpoint, which holds the score of the epoch that its batch ends
        own.insert(0, _EarlyStop(batches.batches_per_epoch, fit.patience, trainer.device, work / "best.ckpt"))
    _quiet_lightning()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric|torch.optim.lr_scheduler")
        runner = pl.Trainer(
            accelerator="gpu" if trainer.device == "cuda" else "cpu",
            devices=1,
            precision=trainer.lightning_precision,
            max_epochs=1,
            accumulate_grad_batches=fit.accumulate,
            gradient_clip_val=fit.gradient_clip or None,
            callbacks=[*callbacks, *own],
            logger=logger if logger is not None else False,
            log_every_n_steps=10,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        stage.train()
        runner.fit(
            stage, train_dataloaders=batches, ckpt_path=str(work / CHECKPOINT) if start else None, weights_only=True
        )
    for callback in own:
        if isinstance(callback, _EarlyStop):
            callback.restore(stage)
    checkpoint.save(runner, stage, done=True)
    spent.steps += int(runner.global_step)


class _Checkpoint(pl.Callback):
    """Saves between optimiser steps, never inside an accumulation, replacing the file atomically."""

    def __init__(self, path: Path, seconds: float, batches: TrainBatches | CorpusBatches, spent: _Spent) -> None:
        self.path, self.seconds, self.batches, self.spent = path, seconds, batches, spent
        self.batch = 0
        self.done = False
        self._last = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batch = batch_idx + 1
        stepped = self.batch % trainer.accumulate_grad_batches == 0
        if stepped and self.batch < len(self.batches) and time.monotonic() - self._last >= self.seconds:
            assert isinstance(pl_module, Stage)
            # What has become not-a-number will stop at its next loss; the last good checkpoint must survive that.
            if all(bool(parameter.isfinite().all()) for parameter in pl_module.parameters()):
                self.save(trainer, pl_module, done=False)

    def save(self, trainer: pl.Trainer, stage: Stage, *, done: bool) -> None:
        self.done = done
        temporary = self.path.with_suffix(".tmp")
        trainer.save_checkpoint(temporary)
        os.replace(temporary, self.path)
        self._last = time.monotonic()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint.setdefault("edgemin", {}).update(
            batch=self.batch,
            stream=self.batches.state_dict() if isinstance(self.batches, CorpusBatches) else None,
            done=self.done,
            seconds=time.monotonic() - self.spent.began,
            steps_before=self.spent.steps,
            steps=self.spent.steps + int(trainer.global_step),
        )


class _EarlyStop(pl.Callback):
    """Scores the hold-out after every epoch with the very code that scores the tables; keeps the best weights."""

    def __init__(self, every: int, patience: int, device: str, path: Path) -> None:
        self.every, self.patience, self.device, self.path = every, patience, device, path
        self.best, self.bad = float("-inf"), 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = self.bad >= self.patience  # decided before a kill

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % self.every:
            return
        assert isinstance(pl_module, Stage)
        data, classes = pl_module.data, len(pl_module.data.labels)
        assert data.holdout is not None
        name = primary_metric(data.regression, classes, data.splits.task.metrics)
        scores = evaluate(
            pl_module.model, data.holdout, regression=data.regression, classes=classes, device=self.device
        ).metrics
        pl_module.log(f"holdout_{name}", scores[name])
        if scores[name] > self.best:
            self.best, self.bad = scores[name], 0
            content = io.BytesIO()  # torch.save to a full disk raises RuntimeError, a write OSError
            torch.save(pl_module.state_dict(), content)
            write_atomically(self.path, content.getvalue())
        else:
            self.bad += 1
            trainer.should_stop = self.bad >= self.patience

    def restore(self, stage: Stage) -> None:
        if self.best > float("-inf"):
            stage.load_state_dict(torch.load(self.path, map_location=stage.device, weights_only=True))

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "bad": self.bad}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.bad = state_dict["best"], state_dict["bad"]


def _quiet_lightning() -> None:
    """Lightning announces devices and tips at every fit; a run has one line per node instead."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
