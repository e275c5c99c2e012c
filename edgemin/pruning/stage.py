"""Structured pruning of attention heads: rank, remove physically, fine-tune."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from edgemin.config import Count, Part
from edgemin.data.module import DataModule
from edgemin.encoder import parts, slicing, taps
from edgemin.encoder.outline import Outline
from edgemin.errors import UserError
from edgemin.processes import ranks
from edgemin.pruning.criteria.base import Accumulator, ByExample, Criterion, Given
from edgemin.pruning.selection import removal_count, select_heads
from edgemin.pruning.structures import HEADS, Outputs, Watch
from edgemin.training.fit import Fit
from edgemin.training.stage import Effect, Place, Stage

# Imported by name, so that a new criterion in the table changes no key; the chosen criterion's module is in its key.
TABLE = "edgemin.pruning.criteria.table"


class HeadPruning(Stage):
    """Remove the least important attention heads, then fine-tune; once, or in several prune-then-finetune rounds.

    A later relation distillation re-splits the narrower layers into fewer relation heads where it must, and says so in
    a note. Removing 20 % of the heads removes 6.7 % of a BERT layer's weights: do not expect more speed than that.

    Args:
        criterion: how heads are ranked, a name in [`CRITERIA`][edgemin.pruning.criteria.table.CRITERIA]. `random` is
            the control.
        ratio: share of the heads at the start to remove, in [0, 1); the count is int(ratio x heads). 0 removes nothing.
        scope: `layer` removes that share of every layer, `global` ranks all heads together and keeps at least one
            per layer.
        importance: `calibration` ranks on a fixed set of training examples (deterministic, no dropout); `training`
            accumulates the ranking during a brief fine-tuning, as the EdgeMIN paper has it.
        calibration_examples: how many training examples rank the heads (`importance=calibration`).
        training_steps: optimizer steps of that brief fine-tuning (`importance=training`).
        rounds: prune-then-finetune rounds; the ratio is reached in equal steps.
        fit: the fine-tuning after each round; 0 epochs only prune.
    """

    def __init__(
        self,
        *,
        criterion: str = "gradient_norm",
        ratio: Part,
        scope: Literal["layer", "global"] = "layer",
        importance: Literal["calibration", "training"] = "calibration",
        calibration_examples: Count = 512,
        training_steps: Count = 100,
        rounds: Count = 1,
        fit: Fit,
    ) -> None:
        super().__init__()
        self.criterion = cast(Criterion, importlib.import_module(TABLE).find(criterion, HEADS.name))
        if importance == "training" and self.criterion.needs != "gradients":
            raise UserError(
                f"importance: expected calibration for the criterion {criterion}, which takes no gradients, given "
                "training"
            )
        self.ratio, self.scope = ratio, scope
        self.importance, self.rounds = importance, rounds
        self.calibration_examples = calibration_examples
        self.recovery = fit
        # Ranking during training uses the recovery's batch size and learning rate, but for so many steps.
        self.ranking = replace(self.recovery, epochs=None, steps=training_steps, patience=None)
        self.initial: list[int] = []
        self.removed: list[list[list[int]]] = []
        self._accumulator: Accumulator | None = None
        self._capture: Watch | None = None
        self._outputs: Outputs | None = None
        self._batch: Mapping[str, Tensor] = {}

    def effect(self, model: Outline, teachers: Sequence[Outline], place: Place) -> Effect:
        """Refuse a ratio that does not leave one head in every layer."""
        found = super().effect(model.with_heads(self._left(model)), teachers, place)
        return replace(
            found,
            code=(*found.code, type(self.criterion).__module__),
            trains_head=self.recovery.trains or self.importance == "training",
            reads_task=self.criterion.needs != "nothing" or self.recovery.trains,
            # the gradient of the task loss comes through the head
            reads_head=self.criterion.needs == "gradients" and self.importance == "calibration",
        )

    def _left(self, model: Outline) -> list[int | None]:
        """How many heads each layer has afterwards; `None` where that is seen when it runs."""
        before = [layer.heads for layer in model.layers]
        if self.scope == "layer":
            return [None if heads is None else heads - self._gone([heads]) for heads in before]
        known = [heads for heads in before if heads is not None]
        return [None] * len(before) if len(known) < len(before) or self._gone(known) else before

    def _gone(self, heads: Sequence[int]) -> int:
        """How many heads are removed of layers with so many, each of which keeps one."""
        gone = removal_count(sum(heads), self.ratio)
        if gone > sum(heads) - len(heads):
            layers = f"all {len(heads)} layers" if len(heads) > 1 else "every layer"
            raise UserError(f"ratio: expected one that leaves a head in {layers}, given {self.ratio} of {sum(heads)}")
        return gone

    def prepare(
        self, model: PreTrainedModel, data: DataModule | None, teachers: Sequence[PreTrainedModel] = ()
    ) -> None:
        """Remember the head counts at the start: the ratio is a share of them."""
        super().prepare(model, data, teachers)
        self.initial = parts.heads(model)
        counts = self.initial if self.scope == "layer" else [sum(self.initial)]
        if self.ratio > 0 and not any(removal_count(count, self.ratio) for count in counts):
            self.notes.append(
                f"ratio {self.ratio} removes nothing: int(ratio x heads) is 0 "
                + (
                    f"for every layer (heads: {self.initial}); scope=global may remove some"
                    if self.scope == "layer"
                    else ""
                )
            )

    def fits(self) -> list[Fit]:
        """For each round the ranking fit, with `importance=training`, and the fine-tuning."""
        one_round = [self.ranking, self.recovery] if self.importance == "training" else [self.recovery]
        return one_round * self.rounds

    def begin(self, phase: int) -> None:
        """Before a ranking fit, start collecting importance; before a fine-tuning, remove heads."""
        ranking_phases = self.importance == "training"
        if ranking_phases and phase % 2 == 0:
            self._accumulator = self._new_accumulator()
        else:
            self._cut(phase // 2 if ranking_phases else phase)

    def _new_accumulator(self) -> Accumulator:
        assert isinstance(self.criterion, ByExample)
        return Accumulator(self.criterion)

    def _cut(self, completed_rounds: int) -> None:
        if self._accumulator is not None:
            importance = self._accumulator.scores()
            self._accumulator = None
        else:
            batches = (
                self.data.calibration(self.calibration_examples, self.recovery.batch_size, self.seed)
                if self.planned.reads_task
                else []
            )
            given = Given(self.model, HEADS, batches, self._example_losses, self.seed + completed_rounds)
            importance = self.criterion.scores(given)
        removed = select_heads(
            importance,
            self.ratio,
            self.scope,
            initial=self.initial,
            completed_rounds=completed_rounds,
            rounds=self.rounds,
        )
        for layer, gone in enumerate(removed):
            if gone:
                kept = [head for head in range(len(importance[layer])) if head not in gone]
                slicing.slice_heads(self.model, layer, kept)
        self.removed.append(removed)

    def _example_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.data.kind.loss(logits, labels, "none")

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The task loss; in a ranking fit the outputs of the heads are captured on the way."""
        if self._accumulator is not None:
            self._batch = batch
            self._capture = HEADS.outputs(self.model)
            self._outputs = self._capture.__enter__()
        return self.data.kind.loss(taps.logits(self.model, batch), batch["labels"])

    def on_after_backward(self) -> None:
        """Add this batch's examples to the ranking, those of all processes to the ranking of each."""
        if self._accumulator is None or self._capture is None or self._outputs is None:
            return
        mask, heads = self._batch["attention_mask"], parts.heads(self.model)
        share = 1.0 if self._share is None else float(self._share)
        # The loss is a mean over the batch, divided by the accumulation, under fp16 multiplied by the scaler's factor.
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = float(scaler.get_scale()) if scaler is not None else 1.0
        weight = share * scale / (len(mask) * self.ranking.accumulate)
        found = [point.grad for point in self._outputs.points()]
        gradients = [gradient for gradient in found if gradient is not None]
        finite = len(gradients) == len(found) and all(bool(gradient.isfinite().all()) for gradient in gradients)
        own = self._new_accumulator()
        own.add([torch.zeros(count, dtype=torch.float64) for count in heads], 0)
        if finite and share > 0:  # else no example of this batch was left for this process
            gradients = self._outputs.gradients(gradients)
            own.update(self._outputs.values(), gradients, mask, heads, loss_weight=weight)
        seen = own.state_dict()
        counts = torch.tensor([seen["examples"], float(finite)], dtype=torch.float64)
        total = ranks.total(torch.cat([*seen["sums"], counts]))
        if total[-1] == ranks.world():  # else fp16 overflowed: the scaler skips this step too
            self._accumulator.add(total[:-2].split(heads), int(total[-2]))
        self._capture.__exit__(None, None, None)
        self._capture, self._outputs, self._batch = None, None, {}

    def finish(self) -> PreTrainedModel:
        """Note how many heads are gone and return the smaller encoder."""
        gone = sum(len(layer) for one_round in self.removed for layer in one_round)
        self.notes.append(f"removed {gone} of {sum(self.initial)} heads; left per layer: {parts.heads(self.model)}")
        return self.model

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save which heads were removed, and the importance collected so far."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["edgemin"] |= {
            "removed": self.removed,
            "ranking": self._accumulator.state_dict() if self._accumulator is not None else None,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what `on_save_checkpoint` saved; the checkpoint's structure restores the smaller model."""
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint["edgemin"]
        self.removed = saved["removed"]
        self._accumulator = None
        if saved["ranking"] is not None:
            self._accumulator = self._new_accumulator()
            self._accumulator.load_state_dict(saved["ranking"])
