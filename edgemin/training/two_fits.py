"""Distillation in two fits: first on what happens inside the models, then on their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import ClassVar

from edgemin.config import Part, Positive
from edgemin.encoder.outline import Outline
from edgemin.errors import UserError
from edgemin.training.distillation import Distillation
from edgemin.training.fit import Fit
from edgemin.training.stage import Effect, Place
from edgemin.training.teaching import Teaching


class _PredictionFit(Fit):
    learning_rate_key: ClassVar[str] = "prediction_learning_rate"


class TwoFits(Distillation):
    """A method whose budget is divided: its first fit trains the encoder, its second encoder and head.

    Args:
        prediction_share: part of the steps (or epochs) that goes to the second fit, in [0, 1); 0 leaves it out and
            makes a method of one fit, which `multi` takes. With a corpus, which has nothing to answer, all goes to
            the first.
        prediction_learning_rate: peak learning rate of the second fit. All else is as in the first, except `patience`,
            which applies to the second alone: before it there is nothing to score.
        fit: the whole budget, and the optimizer of the first fit.
        teaching: as for any [`Distillation`][edgemin.training.distillation.Distillation].
    """

    # Settings that only the fit on the answers reads.
    of_answers: ClassVar[tuple[str, ...]] = ("prediction_learning_rate", "temperature")

    def __init__(
        self, *, prediction_share: Part, prediction_learning_rate: Positive, fit: Fit, teaching: Teaching
    ) -> None:
        super().__init__(fit=fit, teaching=teaching)
        share = prediction_share if self.corpus is None else 0.0
        inside, answers = _divided(self.settings, share)
        if answers.patience is not None and not answers.trains:
            raise UserError(f"patience: expected null without a fit of the predictions, given {answers.patience}")
        second = _PredictionFit(**asdict(answers) | {"learning_rate": prediction_learning_rate})
        self._prediction = second if second.trains else None
        self.settings = replace(inside, patience=None)

    def effect(self, model: Outline, teachers: Sequence[Outline], place: Place) -> Effect:
        """The head is trained, and the teacher's is read, where the teacher's answers are learnt."""
        found = super().effect(model, teachers, place)
        answers = self._prediction is not None
        share = () if self.corpus is None else ("prediction_share",)
        idle = (*found.idle, *share, *(() if answers else self.of_answers))
        return replace(found, trains_head=answers, reads_answers=answers, idle=idle)

    def fits(self) -> list[Fit]:
        """The fit on the inside and, if there is one, the fit on the answers."""
        return [self.settings] if self._prediction is None else [self.settings, self._prediction]


def _divided(whole: Fit, share: float) -> tuple[Fit, Fit]:
    """Divide a budget in two: the rest for the first fit, the share for the second."""
    if whole.steps is not None:
        second = round(share * whole.steps)
        return replace(whole, steps=whole.steps - second), replace(whole, steps=second)
    assert whole.epochs is not None
    return replace(whole, epochs=(1 - share) * whole.epochs), replace(whole, epochs=share * whole.epochs)
