"""Fine-tuning on the task's labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from edgemin.encoder import taps
from edgemin.encoder.outline import Outline
from edgemin.training.fit import Fit
from edgemin.training.stage import Effect, Place, Stage


class Finetune(Stage):
    """The task's own loss (cross-entropy, or a regression's squared error) on its training split.

    Also the control of a distillation (`distill=none`): the same student, equally many further steps, no teacher.

    Args:
        fit: its budget and optimizer.
    """

    def __init__(self, *, fit: Fit) -> None:
        super().__init__()
        self.settings = fit

    def effect(self, model: Outline, teachers: Sequence[Outline], place: Place) -> Effect:
        """Head and encoder are trained, whenever anything is."""
        return replace(super().effect(model, teachers, place), trains_head=self.settings.trains)

    def fits(self) -> list[Fit]:
        """The one fit on the task's labels."""
        return [self.settings]

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The task loss of the batch."""
        return self.data.kind.loss(taps.logits(self.model, batch), batch["labels"])
