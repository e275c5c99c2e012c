"""Distillation in two fits: first on what happens inside the models, then on their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import ClassVar

from edgemin.encoder.outline import Outline
from edgemin.errors import UserError
from edgemin.training.distillation import Distillation, DistillSettings
from edgemin.training.fit import Fit
from edgemin.training.stage import Effect, Place


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
        settings: all other settings of [`Distillation`][edgemin.training.distillation.Distillation].
    """

    def __init__(self, *, prediction_share: float, prediction_learning_rate: float, settings: DistillSettings) -> None:
        super().__init__(settings=settings)
        if not 0 <= prediction_share < 1:
            raise UserError(f"prediction_share: expected a share in [0, 1), given {prediction_share}")
        share = prediction_share if self.corpus is None else 0.0
        inside, answers = _divided(self.settings, share)
        self._prediction = self._second_fit(answers, prediction_learning_rate)
        self.settings = replace(inside, patience=None)

    def _second_fit(self, budget: Fit, learning_rate: float) -> Fit | None:
        try:
            fit = _PredictionFit(**{**asdict(budget), "learning_rate": learning_rate})
        except UserError as error:
            raise UserError(f"prediction_{error}") from error
        if fit.patience is not None and not fit.trains:
            raise UserError(f"patience: expected null without a fit of the predictions, given {fit.patience}")
        return fit if fit.trains else None

    def effect(self, model: Outline, teachers: Sequence[Outline], place: Place) -> Effect:
        """The head is trained, and the teacher's is read, where the teacher's answers are learnt."""
        found = super().effect(model, teachers, place)
        answers = self._prediction is not None
        return replace(found, trains_head=answers, reads_answers=answers)

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
