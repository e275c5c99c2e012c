"""The settings of one training run, shared by all stages that train."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from edgemin.config import Checked, Count, NonNegative, Positive, Share, Whole
from edgemin.errors import UserError

Decay = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True)
class Fit(Checked):
    """One training run of a stage.

    Attributes:
        epochs: passes over the training examples. Either this or `steps` is given; 0 trains nothing.
        steps: optimizer steps. Either this or `epochs` is given; 0 trains nothing.
        batch_size: examples per forward pass, over all processes together.
        accumulate: forward passes per optimizer step.
        learning_rate: peak of AdamW's learning rate (betas 0.9 and 0.999, eps 1e-6).
        warmup: share of the optimizer steps over which the learning rate rises from 0.
        decay: its course after that: linear or cosine to 0, or constant.
        weight_decay: weight decay of AdamW, on weight matrices only (not on biases and LayerNorms).
        gradient_clip: largest L2 norm of the gradient; 0 turns clipping off.
        patience: stop after this many epochs without a better score on `task.holdout` and keep the best weights (a last
            epoch that the budget cuts short is scored too); `None` never stops early.
    """

    learning_rate_key: ClassVar[str] = "learning_rate"  # of the stage's settings, for messages

    epochs: NonNegative | None = None
    steps: Whole | None = None
    batch_size: Count = 16
    accumulate: Count = 1
    learning_rate: Positive = 3e-5
    warmup: Share = 0.1
    decay: Decay = "linear"
    weight_decay: NonNegative = 0.01
    gradient_clip: NonNegative = 1.0
    patience: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.epochs is None) == (self.steps is None):
            raise UserError(
                f"epochs: expected either epochs or steps, given epochs={self.epochs} and steps={self.steps}"
            )

    @property
    def trains(self) -> bool:
        """Whether there is anything to train."""
        return bool(self.epochs or self.steps)

    def batches(self, examples: int) -> int:
        """Forward passes of the whole fit over a training set of so many examples."""
        if self.steps is not None:
            return self.steps * self.accumulate
        assert self.epochs is not None
        # rounded first: 0.07 of 100 batches are 7, and 0.07 * 100 is a little more
        return math.ceil(round(self.epochs * math.ceil(examples / self.batch_size), 6))

    def optimizer_steps(self, examples: int) -> int:
        """Optimizer steps of the whole fit; a last incomplete accumulation counts as one."""
        return math.ceil(self.batches(examples) / self.accumulate)
