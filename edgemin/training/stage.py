"""The contract of a stage: what it tells planning, and the hooks `prepare`, `loss` and `finish`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from edgemin.data.batches import Batches, TrainBatches
from edgemin.data.module import DataModule
from edgemin.encoder import quantized, structure_file
from edgemin.encoder.outline import Outline, ProviderName
from edgemin.processes import ranks
from edgemin.training.fit import Fit

if TYPE_CHECKING:
    from edgemin.data.corpus import Corpus
    from edgemin.data.mixture import Mixture
    from edgemin.training.latency import LatencyTable


@dataclass(frozen=True)
class Place:
    """Where a stage stands: what comes before it on its path, and whether a row goes on from it to a fine-tuning.

    Attributes:
        head_trained: whether an earlier stage trained the classification head.
        finetuned_later: whether a later fine-tuning will train it, in any of the rows.
        examples: how many of the training split have a label.
        texts: how many the training split has in all.
        latency: how long models take, for a stage that is to reach a latency; `None` where nobody measured.
    """

    head_trained: bool = False
    finetuned_later: bool = False
    examples: int = 0
    texts: int = 0
    latency: LatencyTable | None = None

    def given(self, reads_labels: bool) -> int:
        """How many of the training split a stage is given, which reads labels or none."""
        return self.examples if reads_labels else self.texts


@dataclass(frozen=True)
class Effect:
    """What planning knows of a stage in its place; what a stage does not say is as most stages have it.

    Attributes:
        outline: what comes out of it.
        code: the modules that decide its result; what they import counts by itself.
        trains_head: whether the classification head has been trained on the task when the stage is over.
        moves_encoder: whether its training moves the encoder away from a head that is not trained with it.
        reads_task: whether the result depends on the task's training data.
        reads_labels: whether it reads the labels of that; else it is given all training texts, where few have a label.
        reads_holdout: whether any of its fits looks at `task.holdout`.
        reads_head: whether what it does depends on what the head has learnt.
        reads_answers: whether it learns from its teachers' logits, so that their heads must have been trained.
        same_tokens: whether teacher and student must read the same tokens.
        reads_latency: whether its result depends on the table of latencies.
        corpus: what it reads in the place of the task's sentences.
        quantizes: the kind of quantized layers that it makes. It chooses their ranges itself; after any other stage
            that changes such a model they are chosen again.
        reaches_all: whether every loss depends on every parameter; else several processes look for those without a
            gradient.
        steps: optimizer steps of all its fits; stopping early makes them fewer.
        decided: settings that depended on the place (`auto`), as they were decided.
        not_keyed: settings that decide nothing beside what is in the key already.
        idle: settings that decide nothing beside the others; who sets them is told so.
    """

    outline: Outline
    code: tuple[str, ...]
    trains_head: bool = False
    moves_encoder: bool = False
    reads_task: bool = True
    reads_labels: bool = True
    reads_holdout: bool = False
    reads_head: bool = False
    reads_answers: bool = False
    same_tokens: bool = False
    reads_latency: bool = False
    corpus: Corpus | Mixture | None = None
    quantizes: ProviderName | None = None
    reaches_all: bool = True
    steps: int = 0
    decided: Mapping[str, Any] = field(default_factory=dict)
    not_keyed: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()

    @property
    def leaves_head_stale(self) -> bool:
        """Whether the encoder has been trained since the head was."""
        return self.moves_encoder and self.steps > 0 and not self.trains_head


class Stage(pl.LightningModule):
    """One step of a path: takes an encoder, gives an encoder.

    A stage is constructed from its configuration alone, once for a node. Planning asks it for its `effect`. Then, in
    order: `prepare` takes the encoder; before each of its `fits`, `begin` may operate on it (surgery happens only
    between fits) and Lightning fits it by `loss`; `training_state` is what is kept beside the model, and `finish`
    returns a plain encoder with the change made real. A stage that trains nothing has no fit. These are all that a
    stage overrides, and `batches` where it is trained on something else than the task's training split; one with
    optimizers of its own takes Lightning's hooks.
    """

    model: PreTrainedModel

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []
        # what was logged since the last batch ended; of several processes all must read a value, to form its mean
        self.recorded: dict[str, Callable[[], Tensor]] = {}
        self.losses: dict[int, Tensor] = {}  # by batch, since `edgemin.training.callbacks.check_losses` looked
        self.findings: dict[str, Any] = {}  # what it found out besides the model, for run.json
        self.scores: dict[str, Tensor] = {}  # numbers too many for run.json, by name; a file beside the model
        self.teachers: tuple[str, ...] = ()  # whom it learns from: `teacher`, `teacher.source` or another model's name
        self.planned: Effect  # set where it is planned, before it is prepared
        self.inherited: Mapping[str, Tensor] = {}  # the training state beside the model that it is given
        self.tokenizer: PreTrainedTokenizerBase | None = None  # of what comes out, where that reads other tokens
        self.keeps_latent = False  # whether latent weights of a quantized model are left beside it: who has them, does
        self.scale_learning_rates: Mapping[str, float] = {}  # of a quantized model's scales, where a stage trains them
        self.name = type(self).__name__  # in messages; a run gives its path
        self.seed = 0
        self.phase = 0  # the number of the fit that runs
        self.batch_count = 0  # of that fit, in all
        self._data: DataModule | None = None
        self._share: Tensor | None = None  # of this process's part of a batch in the whole, times their number

    # -- what planning asks ------------------------------------------------------------------------

    def effect(self, model: Outline, teachers: Sequence[Outline], place: Place) -> Effect:
        """Say what the stage does in its place, and decide what depends on it.

        Args:
            model: what it will be given.
            teachers: those that `teachers` names, in this order.
            place: where it stands.

        Raises:
            UserError: everything that can be known to be impossible; its key first, without the stage's name.
        """
        fits = self.fits()
        return Effect(
            model,
            (type(self).__module__,),
            reads_holdout=any(fit.patience for fit in fits),
            steps=sum(fit.optimizer_steps(place.examples) for fit in fits),
        )

    # -- the three hooks ---------------------------------------------------------------------------

    def prepare(
        self, model: PreTrainedModel, data: DataModule | None, teachers: Sequence[PreTrainedModel] = ()
    ) -> None:
        """Take the previous encoder and build what the stage needs; give it a head for the task where it has none."""
        self.model = model
        self._data = data
        if data is not None and self.planned.reads_task:
            data.kind.ensure_head(model, data.labels)

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The training loss of one batch: a scalar. The only training code."""
        raise NotImplementedError(f"{type(self).__name__} trains nothing")

    def finish(self) -> PreTrainedModel:
        """Return a plain encoder with the change made real."""
        return self.model

    def training_state(self) -> Mapping[str, Tensor]:
        """What a later stage can go on from besides the model, by name; asked for after the last fit.

        It is kept beside the model in `training_state.safetensors`, and the next stage has it as `inherited`. A stage
        that does not return it again drops it; by default a stage has none.
        """
        return {}

    # -- fits --------------------------------------------------------------------------------------

    def fits(self) -> list[Fit]:
        """The fits of this stage in order; one that trains nothing is begun all the same."""
        return []

    @property
    def fit_name(self) -> str:
        """The name of the fit that runs: the stage's and, where there are several fits, its number."""
        return f"{self.name}/phase {self.phase + 1}" if len(self.fits()) > 1 else self.name

    def begin(self, phase: int) -> None:
        """Change the model before the fit of this number: the only place where its shape may change."""

    def batches(self, fit: Fit) -> Batches:
        """All batches of a fit: of the task's training split, unless a stage is trained on something else."""
        return self.task_batches(fit)

    def task_batches(self, fit: Fit, rows: NDArray[np.int64] | None = None) -> TrainBatches:
        """All batches of a fit on the task's training split, or on some examples of it alone."""
        return TrainBatches(
            self.data.train,
            fit.batch_size,
            seed=self.seed + self.phase,
            steps=fit.batches(len(self.data.train) if rows is None else len(rows)),
            rank=ranks.rank(),
            world=ranks.world(),
            rows=rows,
        )

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
        """AdamW without weight decay on vectors and scales, with warm-up and decay per optimizer step.

        Scales of a quantized model have a rate of their own: a step of AdamW is absolute, and they are small.
        """
        fit = self.fits()[self.phase]
        groups: list[dict[str, Any]]
        groups = [{"params": [], "weight_decay": fit.weight_decay}, {"params": [], "weight_decay": 0.0}]
        scales = {owner: [own for own in of if own.requires_grad] for owner, of in quantized.scales(self).items()}
        apart = {id(scale) for of in scales.values() for scale in of}
        for parameter in self.parameters():
            if parameter.requires_grad and id(parameter) not in apart:
                groups[parameter.ndim < 2]["params"].append(parameter)
        for owner, own in scales.items():
            if own:  # a stage that lets scales learn says how fast
                groups.append({"params": own, "weight_decay": 0.0, "lr": self.scale_learning_rates[owner]})
        groups = self.grouped(groups, fit)
        # Fused is several times faster on a CPU; under fp16's loss scaling it would unscale too late for clipping.
        fused = self.trainer.precision != "16-mixed"
        optimizer = torch.optim.AdamW(groups, lr=fit.learning_rate, betas=(0.9, 0.999), eps=1e-6, fused=fused)
        total = math.ceil(self.batch_count / fit.accumulate)
        name = "constant_with_warmup" if fit.decay == "constant" else fit.decay
        warmup = min(math.ceil(fit.warmup * total), total - 1)  # a single step in it would have a rate of 0
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def grouped(self, groups: list[dict[str, Any]], fit: Fit) -> list[dict[str, Any]]:
        """The optimizer's groups of parameters; a stage may divide them and give some a rate (`lr`) of their own."""
        return groups

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
            phase=self.phase, structure=self._structure(), notes=list(self.notes)
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give the model the checkpoint's shape before Lightning fills in its weights."""
        saved = checkpoint["edgemin"]
        self.phase, self.notes = saved["phase"], list(saved["notes"])
        if saved["structure"] != self._structure():
            device = self.model.device
            outline = structure_file.parsed(saved["structure"], "checkpoint")
            self.model = quantized.build(self.model.config, outline)
            nn.Module.to(self.model, device)

    def _structure(self) -> dict[str, Any]:
        """The model's outline as its file would have it."""
        return structure_file.written(quantized.outline(self.model))
