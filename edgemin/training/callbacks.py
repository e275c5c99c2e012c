"""What happens between the batches of a fit: checkpoints, training curves, scores of the hold-out."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from edgemin.data.batches import Batches
from edgemin.errors import SharedError, UserError
from edgemin.evaluate import evaluate
from edgemin.processes import ranks, stopping
from edgemin.progress import live_line
from edgemin.store.disk import replacing, write_atomically
from edgemin.training.stage import Stage

_TRAIN_ANEW = "delete its directory to train the stage from its start"


def read_saved(path: Path) -> dict[str, Any]:
    """Read what torch saved: tensors and plain values; code in it is never run.

    Raises:
        UserError: it is missing, damaged or of another kind.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(f"checkpoint {path}: damaged ({type(error).__name__}); {_TRAIN_ANEW}") from error
    if not isinstance(saved, dict):
        raise UserError(f"checkpoint {path}: damaged (expected a mapping); {_TRAIN_ANEW}")
    return saved


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read the checkpoint that a stopped run left of a stage, in the directory named after the stage's key.

    Raises:
        UserError: it is damaged, or of something else.
    """
    saved = read_saved(path)
    place = saved.get("edgemin")
    numbers = ("phase", "batch", "steps", "steps_before", "seconds")
    if (
        not isinstance(place, dict)
        or place.get("key") != path.parent.name
        or not all(isinstance(place.get(name), int | float) for name in numbers)
        or not isinstance(place.get("points"), list)
    ):
        raise UserError(f"checkpoint {path}: of another stage, or none of EdgeMIN's; {_TRAIN_ANEW}")
    return saved


def restore(stage: Stage, saved: dict[str, Any], path: Path) -> None:
    """Bring a stage to where a checkpoint has it.

    Raises:
        UserError: it does not fit the stage.
    """
    try:
        stage.on_load_checkpoint(saved)
        stage.load_state_dict(saved["state_dict"])
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:  # torch's is a RuntimeError
        raise UserError(f"checkpoint {path}: does not fit the stage ({type(error).__name__}); {_TRAIN_ANEW}") from error


RECORD_STEPS = 10  # between two points of a curve
# Between two votes of several processes on whether to save or to stop, as each makes all wait for the slowest. Not
# more: of the half minute that a scheduler gives a job to stop (SLURM's 30 s), some must be left for the checkpoint.
VOTE_STEPS = 5
HOLDOUT = "holdout_"

# One point of a stage's curves: the fit, its optimizer step, what was logged there.
Point = tuple[str, int, dict[str, float]]
Send = Callable[[str, Mapping[str, float], int], None]


@dataclass
class Spent:
    """What a stage has cost so far, kills included: its beginning on a clock moved back, its earlier fits' steps."""

    began: float
    steps: int = 0


def check_losses(stage: Stage) -> None:
    """Refuse a loss that is not finite, of the batches since the last call; of several processes all call it together.

    To look at a loss is to wait for its device and for the other processes. So a fit looks where it waits anyway:
    before it records, scores or saves anything, and after its last batch.

    Raises:
        SharedError: the first such loss, by its step and batch.
    """
    if not stage.losses:
        return
    batches, losses = list(stage.losses), ranks.mean(torch.stack(list(stage.losses.values())))
    stage.losses = {}
    wrong = torch.nonzero(~torch.isfinite(losses))
    if not len(wrong):
        return
    batch, value = batches[int(wrong[0])], float(losses[wrong[0]])
    step = batch // stage.trainer.accumulate_grad_batches + 1
    name, fits = stage.name.rpartition("/")[2], stage.fits()
    fit = fits[stage.phase]
    where = f"step {step}, batch {batch + 1}" + (f", of fit {stage.phase + 1}" if len(fits) > 1 else "")
    raise SharedError(
        f"{name}.{fit.learning_rate_key}: the loss of {stage.name} became {value} at {where}; try less than "
        f"{fit.learning_rate:g}, a longer {name}.warmup or trainer.precision=32; what was computed before is kept"
    )


class Checkpoint(pl.Callback):
    """Saves between optimizer steps, never inside an accumulation, replacing the file atomically.

    With several processes the first decides by its clock when, and all take part, as Lightning requires.
    """

    def __init__(self, path: Path, seconds: float, batches: Batches, spent: Spent, points: list[Point]) -> None:
        self.path, self.seconds, self.batches, self.spent, self.points = path, seconds, batches, spent, points
        self.batch = 0
        self.done = False
        self._last = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to let a signal wait for the end of its step."""
        stopping.hold()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is time to, or when the run was told to stop; in the second case end it."""
        assert isinstance(pl_module, Stage)
        self.batch = batch_idx + 1
        if self.batch == len(self.batches):
            check_losses(pl_module)  # the fit saves at its end
        step, inside = divmod(self.batch, trainer.accumulate_grad_batches)
        if self.batch == len(self.batches) or inside or (ranks.world() > 1 and step % VOTE_STEPS):
            return
        stop, due = ranks.from_main(lambda: (code := stopping.asked(), self._is_due(pl_module, code)))
        if due:
            self.save(trainer, pl_module, done=False)
        if stop is not None:  # also where another process alone got the signal
            raise stopping.Stopped(stop)

    def _is_due(self, stage: pl.LightningModule, stop: int | None) -> bool:
        if time.monotonic() - self._last < self.seconds and stop is None:
            return False
        # What has become not-a-number will stop at its next loss; the last good checkpoint must survive that.
        return all(bool(parameter.isfinite().all()) for parameter in stage.parameters())

    def save(self, trainer: pl.Trainer, stage: Stage, *, done: bool) -> None:
        """Save now, unless a loss was not finite; `done` says that the fit has had its last batch."""
        check_losses(stage)
        self.done = done
        with replacing(self.path) if ranks.is_main() else nullcontext(self.path) as temporary:
            trainer.save_checkpoint(temporary)  # all take part, the first writes
        self._last = time.monotonic()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what a resumed run needs besides the model: batch, position in a corpus, time spent and curves."""
        checkpoint.setdefault("edgemin", {}).update(
            key=self.path.parent.name,
            batch=self.batch,
            stream=self.batches.state_dict(),
            done=self.done,
            seconds=time.monotonic() - self.spent.began,
            steps_before=self.spent.steps,
            steps=self.spent.steps + int(trainer.global_step),
            points=list(self.points),
        )


class Record(pl.Callback):
    """A stage's curves: at the first and every tenth optimizer step, and where the hold-out was scored.

    Beside what the stage logs, `learning_rate` (of the first group of parameters) and `gradient_norm` (L2, of all,
    before clipping; at the first and every tenth step alone, as it takes a pass over all gradients).

    Args:
        points: what was recorded so far; added to.
        send: told of each point at once.
    """

    def __init__(self, points: list[Point], send: Send | None) -> None:
        self.points, self.send = points, send
        self._of_step: dict[str, float] = {}

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Record the norm of the gradient, before clipping and after the loss scale was taken out."""
        self._of_step = {"learning_rate": float(optimizer.param_groups[0]["lr"])}
        step = trainer.global_step + 1
        if step == 1 or step % RECORD_STEPS == 0:
            gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
            self._of_step["gradient_norm"] = float(torch.nn.utils.get_total_norm(gradients))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Keep the point of a step that is due, with the values that its last forward pass logged."""
        assert isinstance(pl_module, Stage)
        logged, pl_module.recorded = pl_module.recorded, {}
        of_step, self._of_step = self._of_step, {}
        if "gradient_norm" in of_step or any(name.startswith(HOLDOUT) for name in logged):
            check_losses(pl_module)
            values = {name: float(read()) for name, read in logged.items()}
            self.points.append((pl_module.fit_name, int(trainer.global_step), values | of_step))
            if self.send is not None:
                self.send(pl_module.fit_name, values | of_step, int(trainer.global_step))


class EarlyStop(pl.Callback):
    """Scores the hold-out after every epoch with the very code that scores the tables; keeps the best weights.

    A last epoch that is cut short by the budget is scored as well, so that what was trained last can be the best.
    Without `patience` the score is for the curves alone.

    Args:
        every: batches of an epoch.
        batches: batches of the whole fit.
        patience: epochs without a better score after which the fit ends; `None` never ends it.
        device: where the hold-out is scored.
        path: where the best weights are kept meanwhile.
    """

    def __init__(self, every: int, batches: int, patience: int | None, device: str, path: Path) -> None:
        self.every, self.batches, self.patience = every, batches, patience
        self.device, self.path = device, path
        self.best, self.bad = float("-inf"), 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop at once if early stopping was decided before the run was killed."""
        trainer.should_stop = self.patience is not None and self.bad >= self.patience

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At the end of an epoch or of the fit, score the hold-out; stop if it has not improved for too long."""
        if (batch_idx + 1) % self.every and batch_idx + 1 < self.batches:
            return
        assert isinstance(pl_module, Stage)
        check_losses(pl_module)
        name = pl_module.data.splits.metrics[0]
        score = ranks.from_main(lambda: self._score(pl_module, name))
        pl_module.log(f"{HOLDOUT}{name}", score)
        if self.patience is None:
            return
        if score > self.best:
            self.best, self.bad = score, 0
        else:
            self.bad += 1
            trainer.should_stop = self.bad >= self.patience

    def _score(self, stage: Stage, name: str) -> float:
        """Score the hold-out; keep the weights where they are better than any before."""
        data = stage.data
        assert data.holdout is not None
        with live_line("scoring the hold-out"):
            found = evaluate(
                stage.model,
                data.holdout,
                data.kind,
                len(data.labels),
                data.splits.metrics,
                device=self.device,
            )
        score = found.metrics[name]
        if self.patience is not None and score > self.best:
            content = io.BytesIO()  # torch.save to a full disk raises RuntimeError, a write OSError
            torch.save(stage.state_dict(), content)
            write_atomically(self.path, content.getvalue())
        return score

    def restore(self, stage: Stage) -> None:
        """Go back to the best weights."""
        if self.best > float("-inf"):
            stage.load_state_dict(read_saved(self.path))

    def state_dict(self) -> dict[str, Any]:
        """The best score so far and for how many epochs it has not improved, for a resumed fit."""
        return {"best": self.best, "bad": self.bad}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.best, self.bad = state_dict["best"], state_dict["bad"]
