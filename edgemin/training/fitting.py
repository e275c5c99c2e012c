"""Runs a stage: its phases in order, with Lightning, so that it can be killed at any moment and resumed exactly.

Every step's randomness is a function of (seed, phase, step) and every step's batch of (seed, step), so a checkpoint
of weights and optimizer is all that a resumed run needs to end with the same weights as an unbroken one.

Several processes (see [`ranks`][edgemin.processes.ranks]) each take their part of every batch, so that their gradients,
averaged by torch's DDP, are those of the whole batch: losses are those of one process but for rounding, dropout, and
terms that compare the examples of a batch with each other, which compare within each part.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import pytorch_lightning as pl
import torch
from annotated_types import Ge, Le
from pytorch_lightning.plugins.environments import (  # type: ignore[attr-defined]
    LightningEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from edgemin.config import Checked, NonNegative
from edgemin.data.batches import TrainBatches
from edgemin.data.module import DataModule
from edgemin.errors import UserError
from edgemin.processes import launch, ranks, stopping
from edgemin.progress import live_line
from edgemin.training import rounding
from edgemin.training.callbacks import Checkpoint, EarlyStop, Point, Record, Send, Spent, read_checkpoint, restore
from edgemin.training.fit import Fit
from edgemin.training.stage import Stage

CHECKPOINT = "last.ckpt"
_MOST_THREADS = 1024  # torch starts as many as it is told, whatever the machine has


@dataclass(frozen=True)
class Trainer(Checked):
    """Where and how stages are trained (`trainer=`).

    Attributes:
        accelerator: `auto` takes a GPU where there is one, else the CPU.
        precision: `auto` is bf16 mixed where the hardware has it (GPU, or a CPU with AMX or AVX512-BF16), fp16
            mixed with loss scaling on older GPUs, else fp32. Relation scores are always in fp32.
        threads: CPU threads of torch; `None` is torch's choice.
        checkpoint_seconds: at most so much training is lost when a run is killed.
        processes: how many train together, as torchrun or srun started them; `None` takes as many as there are.
    """

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    precision: Literal["auto", "bf16", 32, 16] = "auto"
    threads: Annotated[int, Ge(1), Le(_MOST_THREADS)] | None = None
    checkpoint_seconds: NonNegative = 60.0
    processes: int | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accelerator == "gpu" and not torch.cuda.is_available():
            raise UserError("accelerator: expected cpu or auto on a machine without a GPU, given gpu")
        self._check_processes()
        if self.precision == 16 and self.device == "cpu":
            raise UserError("precision: expected auto, 32 or bf16 on a CPU, given 16")

    def _check_processes(self) -> None:
        started, here = ranks.world(), launch.place().local_world
        if self.processes == 1 and started > 1:
            raise UserError(f"processes: expected {started}, as many as were started (trainer=ddp), given 1")
        if self.processes not in (None, started):
            raise UserError(
                f"processes: expected {started}, as many as were started, given {self.processes}; start them by "
                f"torchrun --nproc-per-node={self.processes} -m edgemin.train trainer=ddp ..."
            )
        if self.device == "cuda" and here > torch.cuda.device_count():
            raise UserError(
                f"processes: expected at most one for each of {torch.cuda.device_count()} GPUs, given {here}"
            )

    @property
    def device(self) -> str:
        """The device that `accelerator` comes to on this machine: `cpu` or `cuda`."""
        return "cuda" if self.accelerator != "cpu" and torch.cuda.is_available() else "cpu"

    @property
    def lightning_precision(self) -> Literal["32-true", "bf16-mixed", "16-mixed"]:
        """The precision that `auto` comes to on this machine, by Lightning's name."""
        if self.precision == "auto":
            if self.device == "cuda":
                return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
            return "bf16-mixed" if cpu_has_bf16() else "32-true"
        if self.precision == 32:
            return "32-true"
        return "bf16-mixed" if self.precision == "bf16" else "16-mixed"

    @property
    def content(self) -> dict[str, Any]:
        """The settings that decide results, for their keys.

        Several processes are part of it: each draws its own dropout, and compares only its own examples where a loss
        compares the examples of a batch.
        """
        several = {"processes": ranks.world()} if ranks.world() > 1 else {}
        return {"device": self.device, "precision": self.lightning_precision, **several}


_torchs_choice: list[int] = []  # while a job has threads of its own


def use_threads(threads: int | None) -> None:
    """Compute with as many threads as a job asks for, also after one in the same process that asked for others."""
    if threads is not None:
        _torchs_choice[:] = _torchs_choice or [torch.get_num_threads()]
        torch.set_num_threads(threads)
    elif _torchs_choice:
        torch.set_num_threads(_torchs_choice.pop())


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware; without that autocast is twice slower than fp32."""
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, probe)()) for probe in probes if hasattr(torch.cpu, probe))


@dataclass
class Fitted:
    """What is left when a stage has run: the encoder and how it was trained."""

    model: PreTrainedModel
    steps: int
    seconds: float
    notes: list[str] = field(default_factory=list)
    findings: dict[str, Any] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)  # its training curves
    state: Mapping[str, Tensor] = field(default_factory=dict)  # what later stages can go on from beside it
    scores: Mapping[str, Tensor] = field(default_factory=dict)  # numbers that it found, too many for run.json
    tokenizer: PreTrainedTokenizerBase | None = None  # where it reads other tokens than the previous encoder


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
    send: Send | None = None,
    inherited: Mapping[str, Tensor] = MappingProxyType({}),
) -> Fitted:
    """Prepare, fit every phase, finish; resumes from `work` where a checkpoint lies there.

    Args:
        stage: freshly constructed.
        model: the previous encoder; changed in place.
        data: the task's data (`None` for an architecture without data).
        teachers: the models the stage learns from.
        seed: the seed of this stage in this path.
        trainer: device, precision and so on.
        work: directory for checkpoints.
        name: the name of this node, for messages.
        callbacks: Lightning's, such as a progress bar.
        send: called with every point of the training curves; when resumed, first with those from before the kill.
        inherited: the training state beside the previous encoder.
    """
    began = time.monotonic()
    stage.seed, stage.name, stage.inherited = seed, name or stage.name, inherited
    torch.manual_seed(seed)
    nn.Module.to(model, trainer.device)
    with live_line(f"{stage.name}  preparing"):
        rounding.take_up(stage, model)
        ranks.together(lambda: stage.prepare(model, data, teachers))
    spent, points = _fit_phases(stage, trainer, work, began, callbacks, send if ranks.is_main() else None)
    state = {key: tensor.detach().cpu().clone() for key, tensor in stage.training_state().items()}
    with live_line(f"{stage.name}  finishing"):
        finished = ranks.together(lambda: rounding.finish(stage, state)).cpu().eval()
    seconds = time.monotonic() - spent.began
    notes, findings = list(stage.notes), stage.findings
    return Fitted(finished, spent.steps, seconds, notes, findings, points, state, stage.scores, stage.tokenizer)


def _fit_phases(
    stage: Stage,
    trainer: Trainer,
    work: Path,
    began: float,
    callbacks: Sequence[pl.Callback],
    send: Send | None,
) -> tuple[Spent, list[Point]]:
    """Fit every phase that an earlier try has not done; gives the costs and the training curves of both together."""
    saved, spent, points = _earlier_try(work, began)
    if send is not None:
        for at, step, values in points:
            send(at, values, step)
    for phase, fit in enumerate(stage.fits()):
        resumed = saved["edgemin"] if saved is not None else None
        if resumed is not None and phase < resumed["phase"]:
            continue
        start, stream = 0, None
        if resumed is not None and phase == resumed["phase"]:
            assert saved is not None
            restore(stage, saved, work / CHECKPOINT)  # Lightning does so again; its errors have many lines
            if resumed["done"]:
                spent.steps = resumed["steps"]
                continue
            start, stream = resumed["batch"], resumed["stream"]
        else:
            saved = None
            stage.phase = phase
            nn.Module.to(stage, trainer.device)  # Lightning leaves it on the CPU after a fit
            with live_line(f"{stage.fit_name}  preparing"):
                ranks.together(partial(rounding.begin, stage, phase))
        if fit.trains:
            _fit(stage, fit, start, trainer, work, spent, callbacks, Record(points, send), stream)
    return spent, points


def _earlier_try(work: Path, began: float) -> tuple[dict[str, Any] | None, Spent, list[Point]]:
    """The checkpoint of a try that was killed, if there is one; what was spent before counts, and so do its curves."""
    saved = ranks.together(lambda: read_checkpoint(work / CHECKPOINT) if (work / CHECKPOINT).exists() else None)
    _check_same(work, saved)
    if saved is None:
        return None, Spent(began), []
    kept = saved["edgemin"]
    return saved, Spent(began - kept["seconds"], kept["steps_before"]), list(kept["points"])


def _check_same(work: Path, saved: dict[str, Any] | None) -> None:
    """Refuse processes that would go on from different checkpoints."""

    def place() -> tuple[int, int, bool] | None:
        return None if saved is None else tuple(saved["edgemin"][name] for name in ("phase", "batch", "done"))

    if ranks.from_main(place) != place():
        raise UserError(f"paths.store: expected a directory that all processes see, given {work} seen by some alone")


def _processes(stage: Stage) -> dict[str, Any]:
    """Lightning's settings for the processes that there are; it is not left to detect them by itself."""
    if ranks.world() == 1:
        return {"devices": 1, "plugins": [LightningEnvironment()]}
    here = launch.place().local_world
    strategy = DDPStrategy(find_unused_parameters=not stage.planned.reaches_all, broadcast_buffers=False)
    plugins = [TorchElasticEnvironment()]
    return {"devices": here, "num_nodes": ranks.world() // here, "strategy": strategy, "plugins": plugins}


def _fit(
    stage: Stage,
    fit: Fit,
    start: int,
    trainer: Trainer,
    work: Path,
    spent: Spent,
    callbacks: Sequence[pl.Callback],
    record: Record,
    stream: dict[str, Any] | None,
) -> None:
    """One Lightning fit, from batch `start` on; `stream` is the position in a corpus."""
    batches = ranks.together(lambda: stage.batches(fit))
    batches.start, stage.batch_count = start, len(batches)
    if stream is not None:
        batches.load_state_dict(stream)
    checkpoint = Checkpoint(work / CHECKPOINT, trainer.checkpoint_seconds, batches, spent, record.points)
    own: list[pl.Callback] = [record, checkpoint]
    if fit.patience is not None:
        assert isinstance(batches, TrainBatches)
        if stage.data.holdout is None:
            raise UserError("patience: expected task.holdout above 0, on which to stop early, given 0")
    asked = fit.patience is not None or stage.planned.trains_head  # an untrained head has no score worth a curve
    if asked and isinstance(batches, TrainBatches) and stage.data.holdout is not None:
        # before the others: they keep the score of the epoch that its batch ends
        per_epoch, best = batches.batches_per_epoch, work / "best.ckpt"
        own.insert(0, EarlyStop(per_epoch, len(batches), fit.patience, trainer.device, best))
    _quiet_lightning()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric|torch.optim.lr_scheduler")
        runner = pl.Trainer(
            accelerator="gpu" if trainer.device == "cuda" else "cpu",
            **_processes(stage),
            precision=trainer.lightning_precision,
            max_epochs=1,
            accumulate_grad_batches=fit.accumulate,
            gradient_clip_val=fit.gradient_clip or None,
            callbacks=[*callbacks, *own],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,  # the batches know their part
        )
        stage.train()
        try:
            runner.fit(
                stage, train_dataloaders=batches, ckpt_path=str(work / CHECKPOINT) if start else None, weights_only=True
            )
            for callback in own:
                if isinstance(callback, EarlyStop):
                    callback.restore(stage)
            checkpoint.save(runner, stage, done=True)
        finally:
            stopping.release()
    stopping.check()
    spent.steps += int(runner.global_step)


def _quiet_lightning() -> None:
    """Lightning announces devices and tips at every fit; a run has one line per node instead."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
