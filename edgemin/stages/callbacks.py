"""What happens between the batches of a fit: checkpoints, and scores to stop early by."""

from __future__ import annotations

import io
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from edgemin import ranks
from edgemin.data import CorpusBatches, TrainBatches
from edgemin.evaluate import evaluate, primary_metric
from edgemin.stages.base import Stage
from edgemin.store import write_atomically


@dataclass
class Spent:
    """What a stage has cost so far, kills included: its beginning on a clock moved back, its earlier fits' steps."""

    began: float
    steps: int = 0


class Checkpoint(pl.Callback):
    """Saves between optimiser steps, never inside an accumulation, replacing the file atomically.

    Of several processes the first says when, by its clock; all take part, as Lightning wants it.
    """

    def __init__(self, path: Path, seconds: float, batches: TrainBatches | CorpusBatches, spent: Spent) -> None:
        self.path, self.seconds, self.batches, self.spent = path, seconds, batches, spent
        self.batch = 0
        self.done = False
        self._last = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where it is time to."""
        self.batch = batch_idx + 1
        stepped = self.batch % trainer.accumulate_grad_batches == 0
        if stepped and self.batch < len(self.batches) and ranks.from_main(lambda: self._is_due(pl_module)):
            assert isinstance(pl_module, Stage)
            self.save(trainer, pl_module, done=False)

    def _is_due(self, stage: pl.LightningModule) -> bool:
        if time.monotonic() - self._last < self.seconds:
            return False
        # What has become not-a-number will stop at its next loss; the last good checkpoint must survive that.
        return all(bool(parameter.isfinite().all()) for parameter in stage.parameters())

    def save(self, trainer: pl.Trainer, stage: Stage, *, done: bool) -> None:
        """Save now; ``done`` after the last batch of the fit."""
        self.done = done
        temporary = self.path.with_suffix(".tmp")
        trainer.save_checkpoint(temporary)
        if ranks.is_main():
            os.replace(temporary, self.path)
        self._last = time.monotonic()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add where to go on."""
        checkpoint.setdefault("edgemin", {}).update(
            batch=self.batch,
            stream=self.batches.state_dict() if isinstance(self.batches, CorpusBatches) else None,
            done=self.done,
            seconds=time.monotonic() - self.spent.began,
            steps_before=self.spent.steps,
            steps=self.spent.steps + int(trainer.global_step),
        )


class EarlyStop(pl.Callback):
    """Scores the hold-out after every epoch with the very code that scores the tables; keeps the best weights."""

    def __init__(self, every: int, patience: int, device: str, path: Path) -> None:
        self.every, self.patience, self.device, self.path = every, patience, device, path
        self.best, self.bad = float("-inf"), 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop at once where that was decided before a kill."""
        trainer.should_stop = self.bad >= self.patience

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At the end of an epoch, keep the weights or lose patience."""
        if (batch_idx + 1) % self.every:
            return
        assert isinstance(pl_module, Stage)
        data, classes = pl_module.data, len(pl_module.data.labels)
        name = primary_metric(data.regression, classes, data.splits.task.metrics)
        score = ranks.from_main(lambda: self._score(pl_module, name))
        pl_module.log(f"holdout_{name}", score)
        if score > self.best:
            self.best, self.bad = score, 0
        else:
            self.bad += 1
            trainer.should_stop = self.bad >= self.patience

    def _score(self, stage: Stage, name: str) -> float:
        """Score the hold-out; keep the weights where they are better than any before."""
        data = stage.data
        assert data.holdout is not None
        found = evaluate(
            stage.model, data.holdout, regression=data.regression, classes=len(data.labels), device=self.device
        )
        score = found.metrics[name]
        if score > self.best:
            content = io.BytesIO()  # torch.save to a full disk raises RuntimeError, a write OSError
            torch.save(stage.state_dict(), content)
            write_atomically(self.path, content.getvalue())
        return score

    def restore(self, stage: Stage) -> None:
        """Go back to the best weights."""
        if self.best > float("-inf"):
            stage.load_state_dict(torch.load(self.path, map_location=stage.device, weights_only=True))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed fit must know."""
        return {"best": self.best, "bad": self.bad}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Know it again."""
        self.best, self.bad = state_dict["best"], state_dict["bad"]
