"""Structured pruning: rank the units of one or two structures, remove the least important physically, fine-tune."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

from torch import Tensor
from transformers import PreTrainedModel

from edgemin.config import Count, Part
from edgemin.data.batches import Batches
from edgemin.data.module import DataModule
from edgemin.encoder import quantized, taps
from edgemin.encoder.outline import Outline
from edgemin.errors import UserError
from edgemin.pruning import findings
from edgemin.pruning.amount import Amount
from edgemin.pruning.criteria.base import ByExample, Criterion, Given
from edgemin.pruning.importance import importance_of
from edgemin.pruning.ranking import Ranking
from edgemin.pruning.selection import Schedule, others
from edgemin.pruning.several import Several
from edgemin.pruning.shares import ByRatio, Removable, shares, structures
from edgemin.pruning.taught import idle, taught
from edgemin.training.distillation import TaskWeight
from edgemin.training.fit import Fit
from edgemin.training.method_sum import MethodSum
from edgemin.training.stage import Effect, Place
from edgemin.training.teaching import Teaching

# Imported by name, so that a new criterion in the table changes no key; the chosen criterion's module is in its key.
TABLE = "edgemin.pruning.criteria.table"
# Likewise: a change of the search within a budget changes no key of a stage with a ratio.
BY_TARGET = "edgemin.pruning.by_target"


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
        target: instead of a ratio, what the model may cost: the fields of [`Target`][edgemin.pruning.target.Target].
            Each group then keeps as many units as lose least in all within that budget.
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
        target: Mapping[str, Any] | None = None,
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
        self.teachers, self._untaught = self.teachers if learnt else (), idle(teaching, learnt)
        self.units = Several(structures(structure, multiple))
        names = [of.name for of in self.units.structures]
        self.criterion = cast(Criterion, importlib.import_module(TABLE).find(criterion, *names))
        self.criterion_name = criterion
        made = importlib.import_module(BY_TARGET).by_target(target or {}, self.units.structures, rounds, schedule)
        self.amount = cast(Amount | None, made) or ByRatio(
            shares(self.units.structures, ratio, ffn_ratio, scope), rounds, schedule
        )
        if importance == "training" and (self.criterion.needs != "gradients" or self.criterion.changes_weights):
            what = "solves for weights on fixed examples" if self.criterion.changes_weights else "takes no gradients"
            raise UserError(
                f"importance: expected calibration for the criterion {criterion}, which {what}, given training"
            )
        if importance == "training" and structure in ("layers", "hidden"):
            raise UserError(f"importance: expected calibration for {self.units.what}, given training")
        self.importance, self.rounds = importance, rounds
        self.calibration_examples = calibration_examples
        self.recovery = fit
        # Ranking during training uses the recovery's batch size and learning rate, but for so many steps.
        self.ranking = replace(self.recovery, epochs=None, steps=training_steps, patience=None)
        self.initial: list[int] = []
        self.removed: list[list[list[int]]] = []  # by round and group
        self.first_scores: list[Tensor] = []  # of the first round, by group, as they were compared
        self._collected: Ranking | None = None  # while it ranks during training

    # -- planning ----------------------------------------------------------------------------------

    def effect(self, model: Outline, teachers: Sequence[Outline], place: Place) -> Effect:
        """Refuse a model without such units, and a ratio that does not leave one in every layer."""
        if self.criterion.changes_weights and model.quantized is not None:
            raise UserError(
                f"criterion: expected one that leaves a quantized model's weights alone, given {self.criterion_name}, "
                "which solves for them; prune first"
            )
        for structure in self.units.structures:
            structure.check(model)
        after = self.amount.after(model, place.latency)
        found = super().effect(after, teachers, place)
        return replace(
            found,
            code=(*found.code, type(self.criterion).__module__, type(self.amount).__module__),
            trains_head=found.trains_head or self.importance == "training",
            reads_task=self.criterion.needs != "nothing" or (self.recovery.trains and self.corpus is None),
            # the gradient of the task loss comes through the head
            reads_head=self.criterion.needs == "gradients" and self.importance == "calibration",
            reaches_all=not self._parts,
            reads_latency=self.amount.reads_latency,
            decided={**found.decided, **self.amount.decided},
            idle=(*found.idle, *self._idle()),
        )

    @property
    def reads_labels(self) -> bool:
        """Whether the recovery does, or the gradients that rank."""
        return (self.recovery.trains and super().reads_labels) or self.criterion.needs == "gradients"

    def _idle(self) -> tuple[str, ...]:
        """Settings that decide nothing beside the others."""
        in_training = self.importance == "training"
        return (
            *self.amount.idle,
            *(() if self.rounds > 1 else ("schedule",)),
            *(() if in_training else ("training_steps",)),
            *(("calibration_examples",) if in_training or self.criterion.needs == "nothing" else ()),
            *self._untaught,
        )

    # -- training ----------------------------------------------------------------------------------

    def prepare(
        self, model: PreTrainedModel, data: DataModule | None, teachers: Sequence[PreTrainedModel] = ()
    ) -> None:
        """Remember how many units there are at the start: a ratio is a share of them."""
        super().prepare(model, data, teachers)
        self.initial = self.units.units(model)
        self.notes += self.amount.start(quantized.outline(model))

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
            self._collected = self._new_ranking()
        else:
            self._cut(phase // 2 if ranking_phases else phase)

    def batches(self, fit: Fit) -> Batches:
        """All batches of a fit; a ranking fit reads the task's examples, even if the fine-tuning reads a corpus."""
        return self.task_batches(fit) if fit is self.ranking else super().batches(fit)

    def _new_ranking(self) -> Ranking:
        assert isinstance(self.criterion, ByExample)
        return Ranking(self.criterion, self.units)

    def _cut(self, completed_rounds: int) -> None:
        given = self._given(completed_rounds)
        scores = self.units.split(self.model, self._importance(given))
        weighed = self.amount.weighed(self.criterion, scores)
        importance = [group for groups in weighed for group in groups]
        if not completed_rounds:
            self.first_scores = importance
        removed = self.amount.removed(quantized.outline(self.model), weighed, completed_rounds)
        counts = [len(scores) for scores in importance]
        keep = self.criterion.compensate(given, others(removed, counts))
        for structure, kept in zip(self.units.structures, self.units.split(self.model, keep), strict=True):
            structure.cut(self.model, kept)
        self.removed.append(others(keep, counts))
        self.prepare_teaching()

    def _importance(self, given: Given) -> list[Tensor]:
        if self._collected is None:
            return importance_of(self.criterion, given, self._data)
        scores = self._collected.accumulator.scores()
        self._collected = None
        return scores

    def _given(self, completed_rounds: int) -> Given:
        looks = self._collected is None and self.criterion.needs != "nothing"
        batches = self.data.calibration(self.calibration_examples, self.recovery.batch_size, self.seed) if looks else []
        return Given(self.model, self.units, batches, self._example_losses, self.seed + completed_rounds)

    def _example_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.data.kind.loss(logits, labels, "none")

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The task loss or the distillation; in a ranking fit the task loss, and what units hand on is captured."""
        if self._collected is None and self._parts:
            return super().loss(batch)
        if self._collected is not None:
            self._collected.watch(self.model, batch)
        return self.data.kind.loss(taps.logits(self.model, batch), batch["labels"])

    def on_after_backward(self) -> None:
        """Add this batch's examples to the ranking."""
        if self._collected is not None:
            share = 1.0 if self._share is None else float(self._share)
            # The loss is a mean over the batch, divided by the accumulation, under fp16 times the scaler's factor.
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            scale = float(scaler.get_scale()) if scaler is not None else 1.0
            self._collected.collect(self.model, share, share * scale / self.ranking.accumulate)

    def finish(self) -> PreTrainedModel:
        """Note how much is gone, keep the scores, and return the smaller encoder."""
        went = findings.rounds_gone(self.initial, self.removed)
        by_structure = [self.units.split(self.model, of_all) for of_all in (self.first_scores, went)]
        self.notes += self.amount.says(quantized.outline(self.model), by_structure[1])
        for structure, scores, gone in zip(self.units.structures, *by_structure, strict=True):
            name = structure.name
            self.findings.setdefault("pruning", {})[name] = findings.summary(self.criterion_name, scores, gone)
            self.scores |= {f"{name}.{number}": group for number, group in enumerate(scores, start=1)}
        self.findings |= self.amount.found()
        return super().finish()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save which units were removed, and the importance collected so far."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["edgemin"] |= {
            "removed": self.removed,
            "scores": self.first_scores,
            "ranking": self._collected.accumulator.state_dict() if self._collected is not None else None,
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
        self._collected = None
        if saved["ranking"] is not None:
            self._collected = self._new_ranking()
            self._collected.accumulator.load_state_dict(saved["ranking"])
