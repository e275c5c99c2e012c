"""What a stage does about a quantized model: where its weights begin, ranges that fit it, what is left of it."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedModel

from edgemin.encoder import quantized
from edgemin.training.stage import Stage


def take_up(stage: Stage, model: PreTrainedModel) -> None:
    """Let a quantized model begin where the stage before ended, not at its rounded weights, if that has left the way.

    Raises:
        UserError: what it has left does not fit the model.
    """
    stage.keeps_latent = quantized.take_up(model, stage.inherited)
    if quantized.kind_of(model) is not None and not stage.keeps_latent and stage.planned.steps:
        stage.notes.append("begins at rounded weights: no latent ones lie beside the quantized model it is given")


def begin(stage: Stage, phase: int) -> None:
    """Begin a fit; the ranges of a quantized model that it has cut fit before anything is trained or scored."""
    stage.begin(phase)
    _fit_ranges(stage, stage.model)


def finish(stage: Stage, state: dict[str, Tensor]) -> PreTrainedModel:
    """The result of a stage, a quantized one as its file will bring it back; what that leaves out goes to `state`."""
    model = stage.finish()
    if quantized.kind_of(model) is None:
        return model
    _fit_ranges(stage, model)
    if stage.keeps_latent:
        state |= {key: tensor.cpu().clone() for key, tensor in quantized.latents(model).items()}
    quantized.settle(model)
    if (summary := quantized.summary(model)) is not None:
        stage.findings["quantization"] = summary
    return model


def _fit_ranges(stage: Stage, model: PreTrainedModel) -> None:
    """Calibrate a quantized model again if the stage, or one before that saw no data, has cut it."""
    nn.Module.to(model, stage.model.device)
    draw = partial(_drawn, stage) if stage.planned.reads_task else None
    stage.notes += [note for note in quantized.recalibrate(model, draw, stage.name) if note not in stage.notes]


def _drawn(stage: Stage, examples: int) -> list[dict[str, Tensor]]:
    return stage.data.calibration(examples, 32, stage.seed)
