"""Structured pruning: rank the units of one or two structures, remove the least important physically, fine-tune."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from edgemin.config import Count, Part
from edgemin.data.batches import Batches
from edgemin.data.module import DataModule
from edgemin.encoder import taps
from edgemin.encoder.outline import Outline
from edgemin.errors import UserError
from edgemin.processes import ranks
from edgemin.pruning import findings
from edgemin.pruning.criteria.base import Accumulator, ByExample, Criterion, Given
from edgemin.pruning.selection import Schedule, others, select_units
from edgemin.pruning.several import Several
from edgemin.pruning.shares import Removable, shares
from edgemin.pruning.structures import Outputs, Watch
from edgemin.pruning.taught import taught
from edgemin.training.distillation import TaskWeight
from edgemin.training.fit import Fit
from edgemin.training.method_sum import MethodSum
from edgemin.training.stage import Effect, Place
from edgemin.training.teaching import Teaching

# Imported by name, so that a new criterion in the table changes no key; the chosen criterion's module is in its key.
TABLE = "edgemin.pruning.criteria.table"


class Pruning(MethodSum):
    """Remove the least important units of an encoder, then fine-tune; once, or in several prune-then-finetune rounds.

    Heads alone are a third of a layer's weights: without a fifth of them it is 6.7 % smaller, and hardly faster. A
    later relation distillation re-splits narrower layers into fewer relation heads where it must, and says so in a
    note.

    Args:
        structure: what is removed: `heads`, `ffn` units, both (`heads_ffn`), whole `layers`, or units of the `hidden`
            size.
        criterion: how units are ranked, a name in [`CRITERIA`][edgemin.pruning.criteria.table.CRITERIA]. `random` is
            the control.
        ratio: share of the units at the start to remove, in [0, 1); the count is int(ratio x units). 0 removes nothing.
        ffn_ratio: with `heads_ffn` the share of the FFN units; `None` is that of the heads.
        multiple: FFN and hidden units that are left are rounded up to a multiple of this, as kernels take several at a
            time; `None` is 8.
        scope: `layer` removes that share of every layer, `global` ranks all layers together and keeps at least one unit
            of each; heads and FFN units are ranked apart. Layers and hidden units are one group, thus `global`.
        importance: `calibration` ranks on a fixed set of training examples (deterministic, no dropout); `training`
            accumulates the ranking of heads or FFN units during a brief fine-tuning, as the EdgeMIN paper has it.
        calibration_examples: how many training examples rank the units (`importance=calibration`).
        training_steps: optimizer steps of that brief fine-tuning (`importance=training`).
        rounds: prune-then-finetune rounds.
        schedule: how the ratio is reached in them: in equal steps (`linear`), or in ever smaller ones (`cubic`).
        methods: with a teacher, what the fine-tuning learns from it, as in
            [`MethodSum`][edgemin.training.method_sum.MethodSum].
        task_weight: with a teacher, weight of the task loss; `auto` is 0 where a method trains the head.
        fit: the fine-tuning after each round, each with a learning-rate schedule of its own; 0 epochs only prune.
        teaching: with a `teacher` the fine-tuning is a distillation from it; `parent` is the model before pruning.
    """

    def __init__(
        self,
        *,
        structure: Removable = "heads",
        criterion: str = "gradient_norm",
        ratio: Part,
        ffn_ratio: Part | None = None,
        multiple: Count | None = None,
        scope: Literal["layer", "global"] = "layer",
        importance: Literal["calibration", "training"] = "calibration",
        calibration_examples: Count = 512,
        training_steps: Count = 100,
        rounds: Count = 1,
        schedule: Schedule = "linear",
        methods: Mapping[str, dict[str, Any]] | None = None,
        task_weight: TaskWeight = "auto",
        fit: Fit,
        teaching: Teaching,
    ) -> None:
        learnt = taught(methods, task_weight, teaching, fit.trains)
        super().__init__(methods=learnt, task_weight=task_weight, fit=fit, teaching=teaching)
        self.teachers = self.teachers if learnt else ()
        self.shares = shares(structure, ratio, ffn_ratio, multiple, scope)
        self.units = Several([share.structure for share in self.shares])
        names = [share.structure.name for share in self.shares]
        self.criterion = cast(Criterion, importlib.import_module(TABLE).find(criterion, *names))
        self.criterion_name = criterion
        if importance == "training" and (self.criterion.needs != "gradients" or self.criterion.changes_weights):
            what = "solves for weights on fixed examples" if self.criterion.changes_weights else "takes no gradients"
            raise UserError(
                f"importance: expected calibration for the criterion {criterion}, which {what}, given training"
            )
        if importance == "training" and structure in ("layers", "hidden"):
            raise UserError(f"importance: expected calibration for {self.units.what}, given training")
        self.scope, self.importance = scope, importance
        self.rounds, self.schedule = rounds, schedule
        self.calibration_examples = calibration_examples
        self.recovery = fit
        # Ranking during training uses the recovery's batch size and learning rate, but for so many steps.
        self.ranking = replace(self.recovery, epochs=None, steps=training_steps, patience=None)
        self.initial: list[int] = []
        self.removed: list[list[list[int]]] = []  # by round and group
        self.first_scores: list[Tensor] = []  # of the first round, by group
        self._accumulator: Accumulator | None = None
        self._capture: Watch | None = None
        self._outputs_seen: Outputs | None = None
        self._batch: Mapping[str, Tensor] = {}

    # -- planning ----------------------------------------------------------------------------------

    def effect(self, model: Outline, teachers: Sequence[Outline], place: Place) -> Effect:
        """Refuse a family without such units, and a ratio that does not leave one in every layer."""
        if self.criterion.changes_weights and model.quantized is not None:
            raise UserError(
                f"criterion: expected one that leaves a quantized model's weights alone, given {self.criterion_name}, "
                "which solves for them; prune first"
            )
        after = model
        for share in self.shares:
            share.structure.check(model)
            after = share.structure.shaped(after, share.left(model))
        found = super().effect(after, teachers, place)
        return replace(
            found,
            code=(*found.code, type(self.criterion).__module__),
            trains_head=found.trains_head or self.importance == "training",
            reads_task=self.criterion.needs != "nothing" or (self.recovery.trains and self.corpus is None),
            # the gradient of the task loss comes through the head
            reads_head=self.criterion.needs == "gradients" and self.importance == "calibration",
            reaches_all=not self._parts,
            not_keyed=found.not_keyed if self._parts else (*found.not_keyed, "methods"),
        )

    def auto_task_weight(self, place: Place) -> float:
        """1 without a teacher: labels are then all there is to learn from."""
        return super().auto_task_weight(place) if self._parts else 1.0

    # -- training ----------------------------------------------------------------------------------

    def prepare(
        self, model: PreTrainedModel, data: DataModule | None, teachers: Sequence[PreTrainedModel] = ()
    ) -> None:
        """Remember how many units there are at the start: the ratio is a share of them."""
        super().prepare(model, data, teachers)
        self.initial = self.units.units(model)
        for share, counts in zip(self.shares, self.units.split(model, self.initial), strict=True):
            self.notes += share.check_removes(counts)

    def prepare_teaching(self) -> None:
        """Match layers with the teachers' once the student has its shape: after every cut."""
        if self.removed:
            super().prepare_teaching()

    def fits(self) -> list[Fit]:
        """For each round the ranking fit, with `importance=training`, and the fine-tuning."""
        one_round = [self.ranking, self.recovery] if self.importance == "training" else [self.recovery]
        return one_round * self.rounds

    def begin(self, phase: int) -> None:
        """Before a ranking fit, start collecting importance; before a fine-tuning, remove units."""
        ranking_phases = self.importance == "training"
        if ranking_phases and phase % 2 == 0:
            self._accumulator = self._new_accumulator()
        else:
            self._cut(phase // 2 if ranking_phases else phase)

    def batches(self, fit: Fit) -> Batches:
        """All batches of a fit; a ranking one reads the task, whatever the fine-tuning learns on."""
        return self.task_batches(fit) if fit is self.ranking else super().batches(fit)

    def _new_accumulator(self) -> Accumulator:
        assert isinstance(self.criterion, ByExample)
        return Accumulator(self.criterion)

    def _cut(self, completed_rounds: int) -> None:
        given = self._given(completed_rounds)
        importance = self._importance(given)
        if not completed_rounds:
            self.first_scores = importance
        by_structure = [self.units.split(self.model, of_all) for of_all in (importance, self.initial)]
        removed: list[list[int]] = []
        for share, scores, initial in zip(self.shares, *by_structure, strict=True):
            structure = share.structure
            gone = select_units(
                scores,
                share.ratio,
                self.scope,
                what=structure.what,
                minimum=structure.least,
                multiple=structure.multiple,
                initial=initial,
                completed_rounds=completed_rounds,
                rounds=self.rounds,
                schedule=self.schedule,
            )
            removed += gone
        counts = [len(scores) for scores in importance]
        keep = self.criterion.compensate(given, others(removed, counts))
        for share, kept in zip(self.shares, self.units.split(self.model, keep), strict=True):
            share.structure.cut(self.model, kept)
        self.removed.append(others(keep, counts))
        self.prepare_teaching()

    def _importance(self, given: Given) -> list[Tensor]:
        if self._accumulator is None:
            return self.criterion.scores(given)
        importance = self._accumulator.scores()
        self._accumulator = None
        return importance

    def _given(self, completed_rounds: int) -> Given:
        looks = self._accumulator is None and self.criterion.needs != "nothing"
        batches = self.data.calibration(self.calibration_examples, self.recovery.batch_size, self.seed) if looks else []
        return Given(self.model, self.units, batches, self._example_losses, self.seed + completed_rounds)

    def _example_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.data.kind.loss(logits, labels, "none")

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The task loss or the distillation; in a ranking fit the task loss, and what units hand on is captured."""
        if self._accumulator is None and self._parts:
            return super().loss(batch)
        if self._accumulator is not None:
            self._batch = batch
            self._capture = self.units.outputs(self.model)
            self._outputs_seen = self._capture.__enter__()
        return self.data.kind.loss(taps.logits(self.model, batch), batch["labels"])

    def on_after_backward(self) -> None:
        """Add this batch's examples to the ranking, those of all processes to the ranking of each."""
        if self._accumulator is None or self._capture is None or self._outputs_seen is None:
            return
        mask, units = self._batch["attention_mask"], self.units.units(self.model)
        share = 1.0 if self._share is None else float(self._share)
        # The loss is a mean over the batch, divided by the accumulation, under fp16 multiplied by the scaler's factor.
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = float(scaler.get_scale()) if scaler is not None else 1.0
        weight = share * scale / (len(mask) * self.ranking.accumulate)
        found = [point.grad for point in self._outputs_seen.points()]
        gradients = [gradient for gradient in found if gradient is not None]
        finite = len(gradients) == len(found) and all(bool(gradient.isfinite().all()) for gradient in gradients)
        own = self._new_accumulator()
        own.add([torch.zeros(count, dtype=torch.float64) for count in units], 0)
        if finite and share > 0:  # else no example of this batch was left for this process
            handed = self._outputs_seen
            own.update(handed.values(), handed.gradients(gradients), mask, units, loss_weight=weight)
        seen = own.state_dict()
        counts = torch.tensor([seen["examples"], float(finite)], dtype=torch.float64)
        total = ranks.total(torch.cat([*seen["sums"], counts]))
        if total[-1] == ranks.world():  # else fp16 overflowed: the scaler skips this step too
            self._accumulator.add(total[:-2].split(units), int(total[-2]))
        self._capture.__exit__(None, None, None)
        self._capture, self._outputs_seen, self._batch = None, None, {}

    def finish(self) -> PreTrainedModel:
        """Note how much is gone, keep the scores, and return the smaller encoder."""
        went = findings.rounds_gone(self.initial, self.removed)
        by_structure = (self.units.split(self.model, of_all) for of_all in (self.first_scores, went))
        for share, scores, gone in zip(self.shares, *by_structure, strict=True):
            self.notes.append(share.says(gone))
            name = share.structure.name
            self.findings.setdefault("pruning", {})[name] = findings.summary(self.criterion_name, scores, gone)
            self.scores |= {f"{name}.{number}": group for number, group in enumerate(scores, start=1)}
        return super().finish()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save which units were removed, and the importance collected so far."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["edgemin"] |= {
            "removed": self.removed,
            "scores": self.first_scores,
            "ranking": self._accumulator.state_dict() if self._accumulator is not None else None,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what `on_save_checkpoint` saved; the checkpoint's structure restores the smaller model."""
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint["edgemin"]
        self.removed, self.first_scores = saved["removed"], saved["scores"]
        if self._parts and self.removed:
            self.take_model(self.model)
            self.pair_models()  # what learns beside the student, whose weights are read next
            self.notes = list(saved["notes"])
        self._accumulator = None
        if saved["ranking"] is not None:
            self._accumulator = self._new_accumulator()
            self._accumulator.load_state_dict(saved["ranking"])
