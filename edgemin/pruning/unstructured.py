"""Unstructured magnitude pruning: single weights set to zero, as the control of what is removed physically."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from edgemin.config import Part
from edgemin.data.module import DataModule
from edgemin.encoder import parts, quantized, taps
from edgemin.encoder.outline import Outline
from edgemin.pruning.selection import removal_count
from edgemin.training.fit import Fit
from edgemin.training.stage import Effect, Place, Stage

_MIB = 2**20


class UnstructuredPruning(Stage):
    """Set the weights of the layers' Linears that are smallest by magnitude to zero, then fine-tune the others.

    Zeros stay zeros: they get no gradient, and AdamW leaves a weight at zero that never had one. Neither the file nor
    the model gets smaller or faster by it, which is what this row is there to show. A later stage that trains moves the
    zeros again.

    Args:
        ratio: share of the weights, in [0, 1). 0 changes nothing.
        scope: `layer` takes that share of every Linear, `global` ranks the weights of all together.
        fit: the fine-tuning afterwards; 0 epochs only prune.
    """

    def __init__(self, *, ratio: Part, scope: Literal["layer", "global"] = "layer", fit: Fit) -> None:
        super().__init__()
        self.ratio, self.scope, self.recovery = ratio, scope, fit

    def effect(self, model: Outline, teachers: Sequence[Outline], place: Place) -> Effect:
        """Zeros change no width; the head is trained if a fine-tuning follows."""
        found = super().effect(model, teachers, place)
        return replace(found, trains_head=self.recovery.trains, reads_task=self.recovery.trains)

    def prepare(
        self, model: PreTrainedModel, data: DataModule | None, teachers: Sequence[PreTrainedModel] = ()
    ) -> None:
        """Set the smallest weights to zero."""
        super().prepare(model, data, teachers)
        weights = [weight.data.view(-1) for weight in _weights(model)]
        if self.scope == "layer":
            for weight in weights:
                weight[smallest(weight, self.ratio)] = 0
        else:
            gone = torch.zeros(sum(map(len, weights)), dtype=torch.bool, device=model.device)
            gone[smallest(torch.cat(weights), self.ratio)] = True
            for weight, part in zip(weights, gone.split([len(weight) for weight in weights]), strict=True):
                weight[part] = 0

    def fits(self) -> list[Fit]:
        """One fit: the fine-tuning of the weights that are left."""
        return [self.recovery]

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The task loss of the fine-tuning."""
        return self.data.kind.loss(taps.logits(self.model, batch), batch["labels"])

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Give the zeros no gradient; before clipping, whose norm they then do not count in."""
        for weight in _weights(self.model):
            if weight.grad is not None:
                weight.grad.masked_fill_(weight == 0, 0)

    def finish(self) -> PreTrainedModel:
        """Note how many weights are zero, and what that does to the file."""
        weights = _weights(self.model)
        if self.ratio == 0:
            self.notes.append(f"ratio {self.ratio} sets no weight to zero")
        zeros, count = sum(int((weight == 0).sum()) for weight in weights), sum(weight.numel() for weight in weights)
        tensors = [tensor.cpu().numpy().tobytes() for tensor in quantized.tensors(self.model).values()]
        size, packed = sum(map(len, tensors)), sum(len(zlib.compress(content)) for content in tensors)
        self.notes.append(
            f"{zeros} of {count} weights of the layers' Linears are zero; its weights take {size / _MIB:.1f} MiB as "
            f"before and no runtime skips the zeros; gzip would bring them to {packed / _MIB:.1f} MiB"
        )
        return self.model


def smallest(weights: Tensor, ratio: float) -> Tensor:
    """Positions of the int(ratio x n) smallest of n weights by magnitude; of equal ones the first."""
    return weights.abs().argsort(stable=True)[: removal_count(len(weights), ratio)]


def _weights(model: PreTrainedModel) -> list[Tensor]:
    """The weight matrices of all Linears in the layers; of quantized ones those that training moves."""
    modules = (module for layer in parts.layers(model) for module in layer.module.modules())
    return [module.weight for module in modules if isinstance(module, nn.Linear)]
