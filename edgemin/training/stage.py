"""The contract of a stage: what it tells planning, and the hooks `prepare`, `loss` and `finish`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, get_scheduler

from edgemin.data.batches import Batches, TrainBatches
from edgemin.data.module import DataModule
from edgemin.encoder import building, parts, quantized
from edgemin.encoder.quantized import Kind
from edgemin.processes import ranks
from edgemin.training.fit import Fit


class Shape(NamedTuple):
    """What planning knows about an encoder before its weights exist."""

    family: str
    layers: int
    hidden: int
    heads: int  # per layer
    pruned: bool = False  # whether an earlier stage may have narrowed its layers
    inner: int | None = None  # width of queries, keys and values, where it is not the hidden size
    matrices: Mapping[str, parts.Matrix] = MappingProxyType({})  # by path; widths before any pruning
    quantized: Kind | None = None  # the kind of quantized layers that an earlier stage, or its checkpoint, gave it

    @property
    def width(self) -> int:
        """Width of queries, keys and values."""
        return self.hidden if self.inner is None else self.inner


class Stage(pl.LightningModule):
    """One step of a path: takes an encoder, gives an encoder.

    A stage is constructed from its configuration alone. Then, in order: `prepare` takes the encoder; for every phase
    `begin` may operate on it (surgery happens only between fits) and Lightning fits it by `loss`; `finish` returns a
    plain encoder with the change made real. A stage that trains nothing has no fit.
    """

    # Layers may come out narrower than the hidden size.
    narrows: ClassVar[bool] = False
    # Teacher and student must read the same tokens.
    same_tokens: ClassVar[bool] = False
    # The kind of quantized layers that its result has. It chooses their ranges itself; after any other stage that
    # changes such a model they are chosen again.
    quantizes: ClassVar[Kind | None] = None

    model: PreTrainedModel

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []
        # what was logged since the last batch ended; of several processes all must read a value, to form its mean
        self.recorded: dict[str, Callable[[], Tensor]] = {}
        self.losses: dict[int, Tensor] = {}  # by batch, since `edgemin.training.callbacks.check_losses` looked
        self.findings: dict[str, Any] = {}  # what it found out besides the model, for run.json
        self.max_drop: float | None = None  # how much worse than what it was given its result may be, as a fraction
        self.name = type(self).__name__  # in messages; a run gives its path
        self.seed = 0
        self.phase = 0
        self._data: DataModule | None = None
        self._share: Tensor | None = None  # of this process's part of a batch in the whole, times their number

    # -- what planning asks ------------------------------------------------------------------------

    @property
    def trains_head(self) -> bool:
        """Whether the classification head has been trained on the task when the stage is over."""
        return False

    @property
    def leaves_head_stale(self) -> bool:
        """Whether it trains the encoder and not the head."""
        return False

    @property
    def reads_head(self) -> bool:
        """Whether what it does depends on what the head has learnt."""
        return False

    @property
    def needs_task(self) -> bool:
        """Whether the result depends on the task's training data."""
        return True

    @property
    def trains(self) -> bool:
        """Whether any of its fits trains. Asked before `prepare`, as all that planning asks."""
        return any(fit.trains for fit in self.phases())

    @property
    def reaches_all(self) -> bool:
        """Whether every loss depends on every parameter. Several processes must look for those without a gradient."""
        return True

    @property
    def stops_early(self) -> bool:
        """Whether any of its fits looks at `task.holdout`."""
        return any(fit.patience for fit in self.phases())

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """The models it learns from: `teacher`, `teacher.source` or another model of the study."""
        return ()

    @property
    def needs_trained_teacher(self) -> bool:
        """Whether a teacher's head must have been trained on the task."""
        return False

    def check_data(self) -> None:
        """Raise a `UserError` (key first) where what it reads besides the task's data cannot be read."""

    @property
    def data_content(self) -> Mapping[str, Any] | None:
        """What the stage reads besides the task's data, by its content, for the key."""
        return None

    @property
    def input_length(self) -> int | None:
        """Tokens of its longest input, where it does not read the task's sentences."""
        return None

    @property
    def code_modules(self) -> tuple[str, ...]:
        """The modules whose code decides its result; what they import counts by itself."""
        return (type(self).__module__,)

    def key_settings(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """The settings that decide the result, without those whose content is in the key already."""
        return settings

    def check(self, model: Shape, teachers: Sequence[Shape]) -> None:
        """Raise a `UserError` (key first, no stage name) for settings that cannot work with these models."""

    def resolve(self, config: dict[str, Any], head_trained: bool, finetuned_later: bool) -> dict[str, Any]:
        """Settings that depend on the neighbours in the path (`auto`), decided once in planning.

        Args:
            config: the stage's own settings.
            head_trained: an earlier stage trained the head.
            finetuned_later: a later fine-tuning will train the head.
        """
        return config

    # -- the three hooks ---------------------------------------------------------------------------

    def prepare(
        self, model: PreTrainedModel, data: DataModule | None, teachers: Sequence[PreTrainedModel] = ()
    ) -> None:
        """Take the previous encoder and build what the stage needs; give it a head for the task where it has none."""
        self.model = model
        self._data = data
        if data is not None and self.needs_task:
            ensure_head(model, data.labels, regression=data.regression)

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The training loss of one batch: a scalar. The only training code."""
        raise NotImplementedError(f"{type(self).__name__} trains nothing")

    def finish(self) -> PreTrainedModel:
        """Return a plain encoder with the change made real."""
        return self.model

    # -- fits --------------------------------------------------------------------------------------

    def phases(self) -> list[Fit]:
        """The fits of this stage in order; a fit that trains nothing still begins its phase."""
        return []

    def planned_steps(self, examples: int, model: Shape) -> int:
        """Optimizer steps of all fits, as far as planning knows; stopping early makes them fewer.

        Args:
            examples: of the training split.
            model: what it trains.
        """
        return sum(fit.optimizer_steps(examples) for fit in self.phases())

    @property
    def learning_rate_key(self) -> str:
        """The name of the setting that has the learning rate of the fit that runs."""
        return "learning_rate"

    @property
    def fit_name(self) -> str:
        """The name of the fit that runs: the stage's and, where there are several fits, its number."""
        return f"{self.name}/phase {self.phase + 1}" if len(self.phases()) > 1 else self.name

    def begin(self, phase: int) -> None:
        """Change the model before the fit of a phase: the only place where its shape may change."""

    def training_batches(self, fit: Fit) -> Batches:
        """All batches of a fit: of the task's training split, unless a stage is trained on something else."""
        steps = fit.batches(self.training_examples())
        return TrainBatches(
            self.data.train,
            fit.batch_size,
            seed=self.seed + self.phase,
            steps=steps,
            rank=ranks.rank(),
            world=ranks.world(),
            rows=self.training_rows(),
        )

    def training_rows(self) -> NDArray[np.int64] | None:
        """Which examples of the training split it is trained on; `None`: all."""
        return None

    def training_examples(self) -> int:
        """How many examples an epoch has."""
        rows = self.training_rows()
        return len(self.data.train) if rows is None else len(rows)

    @property
    def data(self) -> DataModule:
        """The data that `prepare` was given; a stage without data must not ask for it."""
        assert self._data is not None
        return self._data

    # -- Lightning ---------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Each step's randomness depends on (seed, phase, step) alone, so a resumed run repeats an unbroken one.

        Of several processes each draws its own, as each has other examples.
        """
        drawn = self.seed * 1_000_003 + self.phase * 998_244_353 + batch_idx + ranks.rank() * 1_000_000_000_039
        torch.manual_seed(drawn % 2**63)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Lightning's hook around `loss`; of several processes, the mean of what they return is that of the batch."""
        own = dict(batch)
        self._share = own.pop("share", None)
        loss = self.loss(own)
        if self._share is not None:
            loss = self._share * loss
        own_loss = self.losses[batch_idx] = loss.detach()
        self.recorded["loss"] = lambda: ranks.mean(own_loss)
        return loss

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Log for the training curves; [`Record`][edgemin.training.callbacks.Record] keeps every tenth step."""
        own = torch.as_tensor(value).detach()
        self.recorded[name] = lambda: own

    def record(self, name: str, value: Tensor) -> None:
        """Log a mean over the examples of a batch; of several processes, each gives that of its part."""
        own = value.detach() if self._share is None else self._share * value.detach()
        self.recorded[name] = lambda: ranks.mean(own)

    def configure_optimizers(self) -> Any:
        """AdamW without weight decay on vectors and scales, with warm-up and decay per optimizer step."""
        fit = self.phases()[self.phase]
        groups: list[dict[str, Any]]
        groups = [{"params": [], "weight_decay": fit.weight_decay}, {"params": [], "weight_decay": 0.0}]
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups[parameter.ndim < 2 or name.endswith("_scale")]["params"].append(parameter)
        # Fused is several times faster on a CPU; under fp16's loss scaling it would unscale too late for clipping.
        fused = self.trainer.precision != "16-mixed"
        optimizer = torch.optim.AdamW(groups, lr=fit.learning_rate, betas=(0.9, 0.999), eps=1e-6, fused=fused)
        total = fit.optimizer_steps(self.training_examples())
        name = "constant_with_warmup" if fit.decay == "constant" else fit.decay
        scheduler = get_scheduler(
            name, optimizer, num_warmup_steps=math.ceil(fit.warmup * total), num_training_steps=total
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by the norm; Lightning's own clipping refuses a fused optimizer although nothing is scaled."""
        if gradient_clip_val and self.trainer.precision != "16-mixed":
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
        else:
            self.clip_gradients(
                optimizer, gradient_clip_val=gradient_clip_val, gradient_clip_algorithm=gradient_clip_algorithm
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the model's structure with its weights, so that a run can be resumed at any moment."""
        checkpoint.setdefault("edgemin", {}).update(
            phase=self.phase, structure=quantized.structure(self.model), notes=list(self.notes)
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give the model the checkpoint's shape before Lightning fills in its weights."""
        saved = checkpoint["edgemin"]
        self.phase, self.notes = saved["phase"], list(saved["notes"])
        if saved["structure"] != quantized.structure(self.model):
            device = self.model.device
            self.model = quantized.build(self.model.config, saved["structure"])
            nn.Module.to(self.model, device)


def task_loss(logits: Tensor, labels: Tensor, *, regression: bool, reduction: str = "mean") -> Tensor:
    """Cross-entropy (`logits [B, C]`, `labels [B]` indices) or squared error (regression, `logits [B, 1]`)."""
    if regression:
        return functional.mse_loss(logits.squeeze(-1).float(), labels.float(), reduction=reduction)
    return functional.cross_entropy(logits.float(), labels, reduction=reduction)


def ensure_head(model: PreTrainedModel, labels: Sequence[str], *, regression: bool) -> None:
    """Keep a head that has the task's labels, else attach a fresh one (drawn from torch's generator)."""
    if parts.label_names(model) != tuple(labels) or (model.config.problem_type == "regression") != regression:
        building.attach_head(model, list(labels), regression=regression)
