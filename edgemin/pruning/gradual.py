"""What gradual masks have in common: gates learn during a fine-tuning which parts go; then surgery and recovery.

The first fit trains the model under its gates; then these close for good, are folded into the weights, and what is
closed is sliced off; a second fit with a learning-rate schedule of its own trains what is left.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgemin.config import Checked, Count, NonNegative, Part, Positive, Share, Whole
from edgemin.data.module import DataModule
from edgemin.encoder import building, families, gates, parts
from edgemin.encoder.gates import Gates
from edgemin.encoder.outline import Outline
from edgemin.errors import UserError
from edgemin.pruning import findings, settling
from edgemin.pruning.layer_match import LayerMatch
from edgemin.pruning.structures import MULTIPLE
from edgemin.pruning.taught import idle, taught
from edgemin.training.distillation import TaskWeight
from edgemin.training.fit import Fit
from edgemin.training.method_sum import MethodSum
from edgemin.training.stage import Effect, Place
from edgemin.training.teaching import Teaching

# Adam's epsilon for gates: their gradients can be as small as 1e-8, which an epsilon of 1e-6 would drown.
_EPSILON = 1e-12
# Settings that decide nothing where nothing goes.
_MASKING = ("multiple", "mask_epochs", "mask_steps", "mask_learning_rate", "sparsity_warmup")
_CONSTANT = "constant"  # marks a group of the optimizer's parameters whose learning rate has no schedule


@dataclass(frozen=True)
class Masking(Checked):
    """How much goes, and how the masks learn it.

    Attributes:
        sparsity: share of the weights in the layers' matrices that goes, in [0, 1). 0 only fine-tunes.
        multiple: FFN and hidden units that are left are rounded up to a multiple of this.
        mask_epochs: passes over the training examples under the masks. Either this or `mask_steps` is given.
        mask_steps: optimizer steps under the masks.
        mask_learning_rate: AdamW's learning rate for what decides the masks: constant, without weight decay.
        sparsity_warmup: share of the training under masks in which the sparsity asked for rises from 0 to the target.
    """

    sparsity: Part
    multiple: Count = MULTIPLE
    mask_epochs: NonNegative | None = None
    mask_steps: Whole | None = None
    mask_learning_rate: Positive = 0.01
    sparsity_warmup: Share = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.mask_epochs is None) == (self.mask_steps is None):
            given = f"mask_epochs={self.mask_epochs} and mask_steps={self.mask_steps}"
            raise UserError(f"mask_epochs: expected either mask_epochs or mask_steps, given {given}")
        key = "mask_steps" if self.mask_epochs is None else "mask_epochs"
        if self.sparsity > 0 and not getattr(self, key):
            raise UserError(f"{key}: expected above 0, as it is then that masks learn what goes, given 0")

    def fit(self, recovery: Fit) -> Fit:
        """The settings of the training under masks: those of the recovery with another length, 0 if nothing goes."""
        if self.sparsity == 0:
            return replace(recovery, epochs=None, steps=0, patience=None)
        return replace(recovery, epochs=self.mask_epochs, steps=self.mask_steps, patience=None)


class GradualPruning(MethodSum):
    """Let gates learn what goes while the model is fine-tuned under them, remove it, fine-tune what is left.

    A subclass says which parameters decide the gates (`deciders`), what the gates are at each step (`drawn`) and in the
    end (`chosen`), and what is added to the loss (`penalty`).

    Args:
        masking: how much goes, and how the masks learn it.
        methods: with a teacher, what both fine-tunings learn from it, as in
            [`MethodSum`][edgemin.training.method_sum.MethodSum].
        task_weight: with a teacher, weight of the task loss; `auto` is 0 where a method trains the head.
        fit: the fine-tuning of what is left; 0 epochs only prune. The one under masks is as this but for its length,
            and without patience.
        teaching: with a `teacher` both are distillations from it; `parent` is the model before pruning.
    """

    name_of_scores: ClassVar[str]  # in run.json and figures
    trains_embeddings: ClassVar[bool] = True

    def __init__(
        self,
        *,
        masking: Masking,
        methods: Mapping[str, dict[str, Any]] | None = None,
        task_weight: TaskWeight = "auto",
        fit: Fit,
        teaching: Teaching,
    ) -> None:
        under_masks = masking.fit(fit)
        learnt = taught(methods, task_weight, teaching, under_masks.trains or fit.trains)
        if teaching.corpus is not None:
            _check_streamed({"mask_epochs": masking.mask_epochs, "epochs": fit.epochs})
        first = under_masks if under_masks.trains else fit
        super().__init__(methods=learnt, task_weight=task_weight, fit=first, teaching=teaching)
        self.teachers, self._untaught = self.teachers if learnt else (), idle(teaching, learnt)
        self.masking, self.under_masks, self.recovery = masking, under_masks, fit
        self.before: Outline  # of the model it is given
        self.gating: nn.Module  # what decides of the gates
        self.batch = 0  # of the fit under masks
        self.gone: Gates | None = None  # the gates that were folded in, once they were
        self._drawn: Gates | None = None
        self._chosen: Gates | None = None  # of this step, where somebody has asked
        self._hooks = ExitStack()

    # -- what a subclass says ----------------------------------------------------------------------

    @abstractmethod
    def deciders(self, outline: Outline) -> nn.Module:
        """Make the parameters that decide the gates of a model with this outline, such as a score for each gate."""

    @abstractmethod
    def drawn(self) -> Gates:
        """The gates of one training step, with a gradient to the deciders."""

    @abstractmethod
    def chosen(self) -> Gates:
        """The gates if the training under masks ended now: at the target sparsity, such that the model can be cut."""

    @abstractmethod
    def importance(self) -> dict[str, Sequence[Tensor]]:
        """By structure the score of each unit of each group, for results and figures: the lowest were removed."""

    def penalty(self) -> Tensor | float:
        """What is added to the loss under masks."""
        return 0.0

    def rising(self) -> Sequence[nn.Parameter]:
        """Those of the deciders that ascend the loss instead of descending it."""
        return ()

    # -- planning ----------------------------------------------------------------------------------

    def effect(self, model: Outline, teachers: Sequence[Outline], place: Place) -> Effect:
        """Refuse a model without such parts; how many heads and FFN units a layer keeps only the training decides."""
        families.check_hidden(model.family, model.hidden)
        families.check_ffn(model.family, max(layer.networks for layer in model.layers))
        if model.quantized is not None:
            raise UserError(
                "sparsity: expected a model in full precision, as gates become part of its weights, given a quantized "
                "one; prune first"
            )
        after = model
        if self.masking.sparsity > 0:
            unknown = [None] * len(model.layers)
            after = model.with_heads(unknown).with_ffn(unknown)
            if model.is_known:
                self.check_reachable(model)
        found = super().effect(after, teachers, place)
        unmasked = () if self.masking.sparsity > 0 else _MASKING
        return replace(found, reaches_all=False, idle=(*found.idle, *unmasked, *self._untaught))

    @abstractmethod
    def check_reachable(self, model: Outline) -> None:
        """Refuse a sparsity at which not enough would be left of a model whose widths are known."""

    # -- training ----------------------------------------------------------------------------------

    def prepare(
        self, model: PreTrainedModel, data: DataModule | None, teachers: Sequence[PreTrainedModel] = ()
    ) -> None:
        """Take the model, and make what decides its gates."""
        super().prepare(model, data, teachers)
        self.before = building.outline(model)
        if self.masking.sparsity == 0:
            self.notes.append(f"sparsity {self.masking.sparsity} removes nothing")
        else:
            self.check_reachable(self.before)  # planning may not have known the widths
        self.gating = self.deciders(self.before)

    def fits(self) -> list[Fit]:
        """The fine-tuning under masks, and that of what is left."""
        return [self.under_masks, self.recovery]

    def begin(self, phase: int) -> None:
        """Before the recovery: remove what is closed, and match layers with the teacher's again."""
        if phase == 1 and self.masking.sparsity > 0:
            self.gone = self.chosen()
            settling.cut(self.model, self.gone)
            self.notes.append(self.says(self.gone))
            self.prepare_teaching()

    def setup(self, stage: str) -> None:
        """Choose which parameters learn in this fit, before Lightning collects them."""
        for parameter in parts.parameters_by_depth(self.model)[0]:
            parameter.requires_grad_(self.trains_embeddings)
        self.gating.requires_grad_(self.phase == 0)

    def on_fit_start(self) -> None:
        """Put the gates in place; the hold-out is scored under the gates as they would be chosen at that moment."""
        super().on_fit_start()
        if self.phase == 0:
            self._hooks.enter_context(gates.gated(self.model, self._gates))

    def on_fit_end(self) -> None:
        """Take the gates away."""
        self._hooks.close()

    def _gates(self) -> Gates:
        if self.model.training:
            assert self._drawn is not None, "a step has drawn them"
            return self._drawn
        if self._chosen is None:
            with torch.no_grad():
                self._chosen = self.chosen()
        return self._chosen

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Remember which step it is: a resumed run begins in the middle."""
        super().on_train_batch_start(batch, batch_idx)
        self.batch = batch_idx

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The task loss or the distillation; under masks with the gates of this step, and the penalty."""
        if self.phase == 1:
            return super().loss(batch)
        self._chosen, self._drawn = None, self.drawn()
        for part in self._parts.values():
            if isinstance(part, LayerMatch):
                part.is_open = (self._drawn.ffn > 0).tolist()
        return super().loss(batch) + self.penalty()

    def grouped(self, groups: list[dict[str, Any]], fit: Fit) -> list[dict[str, Any]]:
        """Give what decides the gates a learning rate of its own, and let some of it ascend."""
        if self.phase == 1:
            return groups
        apart, rising = {id(own) for own in self.gating.parameters()}, {id(own) for own in self.rising()}
        for group in groups:
            group["params"] = [own for own in group["params"] if id(own) not in apart]
        own_settings = {"lr": self.masking.mask_learning_rate, "weight_decay": 0.0, "eps": _EPSILON, _CONSTANT: True}
        for ascends in (False, True):
            found = [own for own in self.gating.parameters() if (id(own) in rising) == ascends]
            groups.append({"params": found, "maximize": ascends, **own_settings})
        return groups

    def configure_optimizers(self) -> Any:
        """As for any stage, except that the learning rate of what decides the gates is constant."""
        found = super().configure_optimizers()
        schedule = found["lr_scheduler"]["scheduler"]
        for index, group in enumerate(found["optimizer"].param_groups):
            if group.get(_CONSTANT):
                schedule.lr_lambdas[index] = _one
                group["lr"] = group["initial_lr"]
        return found

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by the norm of all but the gates' gradients, which would otherwise decide how fast weights learn."""
        kept = {own: own.grad for own in self.gating.parameters()}
        for own in kept:
            own.grad = None
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        for own, gradient in kept.items():
            own.grad = gradient

    # -- what is left ------------------------------------------------------------------------------

    def says(self, closed: Gates) -> str:
        """A note that says how much is gone, and the widths that are left."""
        left = building.outline(self.model)
        found = [
            f"{settling.sparsity(self.before, left):.1%} of the weights of the layers' matrices are gone, "
            f"{self.masking.sparsity:.1%} were to go",
            f"{len(left.layers)} of {len(self.before.layers)} layers are left",
            f"heads per layer {[layer.heads for layer in left.layers]}",
            f"FFN units per layer {[layer.ffn for layer in left.layers]}",
            f"{left.hidden} of {self.before.hidden} hidden units",
        ]
        return "; ".join(found)

    def finish(self) -> PreTrainedModel:
        """Keep the scores, and return the smaller encoder with all its parameters trainable again."""
        if self.gone is not None:
            went = {"heads": self.gone.heads, "ffn": self.gone.units, "hidden": [self.gone.hidden]}
            for name, scores in self.importance().items():
                scores = [group.detach().double().cpu() for group in scores]
                gone = [(group == 0).long().cpu() for group in went[name]]
                summary = findings.summary(self.name_of_scores, scores, gone)
                self.findings.setdefault("pruning", {})[name] = summary
                self.scores |= {f"{name}.{number}": group for number, group in enumerate(scores, start=1)}
        return super().finish().requires_grad_(True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save which gates were folded in."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["edgemin"]["gone"] = None if self.gone is None else list(self.gone)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what `on_save_checkpoint` saved; the checkpoint's structure restores the smaller model."""
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint["edgemin"]
        self.gone = None if saved["gone"] is None else Gates(*saved["gone"])
        if self.gone is not None:
            self.take_model(self.model)
            self.pair_models()  # what learns beside the student, whose weights are read next
            self.notes = list(saved["notes"])


def _check_streamed(epochs: Mapping[str, float | None]) -> None:
    for key, given in epochs.items():
        if given is not None:
            steps = key.replace("epochs", "steps")
            raise UserError(f"{key}: expected null and {steps} instead, as a corpus is streamed, given {given}")


def _one(_step: int) -> float:
    return 1.0
