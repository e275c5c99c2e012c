"""The settings of scales that learn: which of them, and how fast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from edgemin.config import Checked, Positive
from edgemin.errors import UserError
from edgemin.quantization import model as quantization
from edgemin.quantization.base import Scales
from edgemin.quantization.model import ScaleOwner


@dataclass(frozen=True)
class ScaleTraining(Checked):
    """What the scales of a quantized model do while it is trained.

    Attributes:
        scales: `fixed` at their calibrated values; `moving`: those of weights keep their share of the largest weight,
            those of activations follow a moving average of their range (padding included, momentum 0.99); `learned`,
            from their calibrated values on.
        learned_scales: whose scales learn (`scales=learned`): the `weights` of Linears, their static `inputs`, the
            `embeddings`; `auto`: what the stage says.
        scale_learning_rate: peak learning rate of all scales; its course is that of `learning_rate`. `auto`: shares of
            `learning_rate`, which the stage says, by whose they are.
    """

    scales: Scales = "learned"
    learned_scales: Literal["auto"] | Sequence[ScaleOwner] = "auto"
    scale_learning_rate: Literal["auto"] | Positive = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("learned_scales", "scale_learning_rate"):
            given: Any = getattr(self, key)
            if self.scales != "learned" and given != "auto":
                raise UserError(f"{key}: expected auto, as no scale learns (scales={self.scales}), given {given}")
        if not self.learned_scales:
            raise UserError("learned_scales: expected auto or at least one of weights, inputs, embeddings, given none")

    def check(self, can_learn: Mapping[ScaleOwner, bool]) -> None:
        """Refuse to let scales learn that a stage does not have, or leaves as they are."""
        asked: Sequence[ScaleOwner] = () if self.learned_scales == "auto" else self.learned_scales
        if any(not can_learn.get(owner, True) for owner in asked):
            able = [owner for owner in get_args(ScaleOwner) if can_learn.get(owner, True)]
            raise UserError(
                f"learned_scales: expected scales that this stage can train, of {', '.join(able)}, given {list(asked)}"
            )

    def begin(self, model: nn.Module, owners: Sequence[ScaleOwner]) -> None:
        """Let the scales of a quantized model do so; with `auto`, those of these owners learn."""
        which = owners if self.learned_scales == "auto" or self.scales != "learned" else self.learned_scales
        quantization.follow(model, self.scales, which)

    def learning_rates(self, shares: Mapping[ScaleOwner, float], learning_rate: float) -> dict[str, float]:
        """The learning rates of scales by whose they are: the one given, else shares of that of the weights."""
        given = self.scale_learning_rate
        return {owner: share * learning_rate if given == "auto" else given for owner, share in shares.items()}
