"""The settings of one training run, shared by all stages that train."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, TypedDict, get_type_hints

from edgemin.errors import UserError

Decay = Literal["linear", "cosine", "constant"]


class FitSettings(TypedDict, total=False):
    """The settings of every training stage; see [`Fit`][edgemin.training.fit.Fit]."""

    epochs: float | None
    steps: int | None
    batch_size: int
    accumulate: int
    learning_rate: float
    warmup: float
    decay: Decay
    weight_decay: float
    gradient_clip: float
    patience: int | None


@dataclass(frozen=True)
class Fit:
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
        patience: stop after this many epochs without a better score on `task.holdout` and keep the best weights;
            `None` never stops early.
    """

    learning_rate_key: ClassVar[str] = "learning_rate"  # of the stage's settings, for messages

    epochs: float | None = None
    steps: int | None = None
    batch_size: int = 16
    accumulate: int = 1
    learning_rate: float = 3e-5
    warmup: float = 0.1
    decay: Decay = "linear"
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    patience: int | None = None

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise UserError(
                f"epochs: expected either epochs or steps, given epochs={self.epochs} and steps={self.steps}"
            )
        rules: dict[str, tuple[bool, str]] = {
            "epochs": (
                self.epochs is None or (math.isfinite(self.epochs) and self.epochs >= 0),
                "a number of at least 0",
            ),
            "steps": (self.steps is None or self.steps >= 0, "a whole number of at least 0"),
            "batch_size": (self.batch_size >= 1, "a whole number of at least 1"),
            "accumulate": (self.accumulate >= 1, "a whole number of at least 1"),
            "learning_rate": (math.isfinite(self.learning_rate) and self.learning_rate > 0, "a number above 0"),
            "warmup": (0 <= self.warmup <= 1, "a share in [0, 1]"),
            "weight_decay": (self.weight_decay >= 0, "a number of at least 0"),
            "gradient_clip": (self.gradient_clip >= 0, "a number of at least 0"),
            "patience": (self.patience is None or self.patience >= 1, "null or a whole number of at least 1"),
        }
        for name, (holds, expected) in rules.items():
            if not holds:
                raise UserError(f"{name}: expected {expected}, given {getattr(self, name)!r}")

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


assert {field.name for field in fields(Fit)} == set(get_type_hints(FitSettings))
