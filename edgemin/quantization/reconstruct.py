"""Reconstruction: block by block, a quantized model learns to reproduce the outputs of the full-precision one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from edgemin.config import Share
from edgemin.data.batches import Batches
from edgemin.data.module import DataModule
from edgemin.encoder import building, parts, taps
from edgemin.encoder.outline import Outline, QuantizedLayers
from edgemin.errors import UserError
from edgemin.progress import counted
from edgemin.quantization import model as quantization
from edgemin.quantization.settings import CALIBRATION_BATCH, Quantization, quantize_given
from edgemin.training.fit import Fit
from edgemin.training.hidden_states import hidden_mse
from edgemin.training.stage import Effect, Place, Stage

# At most so many calibration sentences tell how near each block came.
SCORED = 256


class Reconstruction(Stage):
    r"""Train a quantized model one block at a time on calibration sentences, without labels.

    In cost this lies between rounding and quantization-aware training. It begins with post-training quantization. Then,
    for each layer n in order, that layer's weights and scales (LSQ) minimize

    $$
    \| f_n(x_{n-1}) - \hat f_n(\tilde x_{n-1}) \|^2, \qquad
    \tilde x_{n-1} = \lambda_t x_{n-1} + (1 - \lambda_t) \hat x_{n-1}, \quad \lambda_t = max(1 - t / T_0, 0)
    $$

    averaged over sequences, in each over tokens and hidden units, x what the full-precision model's layers give and x̂
    what the quantized ones do (MREM with annealed teacher forcing, arXiv 2109.15082; the first phase of EfficientQAT,
    arXiv 2407.11062). Last comes what follows the layers, by the squared error of the logits, on the quantized model's
    own hidden states. Embeddings are only rounded. There is no dropout.

    `findings["reconstruction"]` has each block's error before and after (`head`: that of the logits), the quantized
    model running on its own hidden states throughout.

    Args:
        teacher_forcing: T_0, as a share of the steps of a block; 0: none.
        quantization: which layers, and how.
        fit: of each block; an epoch is all calibration sentences.
    """

    def __init__(self, *, teacher_forcing: Share = 0.5, quantization: Quantization, fit: Fit) -> None:
        super().__init__()
        self.settings, self.quantization = fit, quantization
        if fit.patience is not None:
            raise UserError(f"patience: expected null, as blocks are not scored on task.holdout, given {fit.patience}")
        self.teacher_forcing = teacher_forcing
        self.forced = 1.0  # the part of the full-precision model's hidden states, at this step
        # a list, so that it is no submodule: neither trained nor checkpointed
        self._float: list[PreTrainedModel] = []
        self._rows: NDArray[np.int64] | None = None
        self._annealed = 0.0  # T_0 in batches
        self._before: list[float] = []

    def effect(self, model: Outline, teachers: Sequence[Outline], place: Place) -> Effect:
        """In each fit one block learns; an epoch of each is the calibration sentences."""
        self.quantization.check(model)
        drawn = min(self.quantization.calibration_examples, place.examples)
        return replace(
            super().effect(replace(model, quantized=QuantizedLayers("integers")), teachers, place),
            quantizes="integers",
            reaches_all=False,
            steps=(len(model.layers) + 1) * self.settings.optimizer_steps(drawn),
        )

    def prepare(
        self, model: PreTrainedModel, data: DataModule | None, teachers: Sequence[PreTrainedModel] = ()
    ) -> None:
        """Keep a copy of the model in full precision, and quantize the model."""
        super().prepare(model, data, teachers)
        self._float = [copy.deepcopy(model).eval().requires_grad_(False)]
        quantize_given(self, self.quantization, data)
        quantization.follow(model, "learned")
        self._unround()
        self._rows = self.data.drawn(self.quantization.calibration_examples, self.seed)
        self._before = self._errors()

    def fits(self) -> list[Fit]:
        """A fit for each layer and one for what follows; before `prepare`, when layers are unknown, only one."""
        return [self.settings] * (parts.num_layers(self.model) + 1 if self._float else 1)

    def batches(self, fit: Fit) -> Batches:
        """All batches of a fit, on the calibration sentences."""
        return self.task_batches(fit, self._rows)

    def setup(self, stage: str) -> None:
        """Freeze all but the block that learns, before Lightning collects the parameters."""
        self.model.requires_grad_(False)
        for parameter in parts.parameters_by_depth(self.model)[self.phase + 1]:
            parameter.requires_grad_(True)

    def on_fit_start(self) -> None:
        """Put the full-precision model on the device, and settle the blocks that have finished learning."""
        nn.Module.to(self._float[0], self.device)
        self._annealed = self.teacher_forcing * self.batch_count
        done = {"embeddings", *(str(n) for n in range(1, self.phase + 1))}
        matrices = building.outline(self.model).matrices
        for path, layer in quantization.quantized_layers(self.model).items():
            if matrices[path].place in done:
                layer.settle()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Reduce the share of the full-precision model's hidden states in the block's input (λ_t above)."""
        super().on_train_batch_start(batch, batch_idx)
        self.forced = max(1.0 - batch_idx / self._annealed, 0.0) if self._annealed else 0.0

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The squared error of the block's output or, in the last fit, of the logits."""
        self.model.eval()
        block = self.phase
        if block == parts.num_layers(self.model):
            with torch.no_grad():
                wanted = taps.logits(self._float[0], batch)
            return functional.mse_loss(taps.logits(self.model, batch).float(), wanted.float())
        with torch.no_grad():
            read = taps.read(self._float[0], batch, hidden=[block, block + 1], logits=False).hidden
        forced = self.forced

        def mixed(own: Tensor) -> Tensor:
            return (forced * read[block] + (1 - forced) * own.detach()).to(own.dtype)

        with taps.changed_input(self.model, block, mixed):
            found = taps.read(self.model, batch, hidden=[block + 1], logits=False).hidden[block + 1]
        return hidden_mse(read[block + 1], found, batch["attention_mask"])

    def finish(self) -> PreTrainedModel:
        """Return the quantized model with all its parameters trainable again."""
        names = [*range(1, parts.num_layers(self.model) + 1), "head"]
        found = zip(names, self._before, self._errors(), strict=True)
        self.findings["reconstruction"] = [{"block": n, "before": before, "after": after} for n, before, after in found]
        return super().finish().requires_grad_(True)

    @torch.no_grad()
    def _unround(self) -> None:
        """Let weights begin where they were, not at their rounded values, which do not tell how near the next step is.

        The integers are the same. From its rounded value, every weight would be equally far from either neighbour.
        """
        for path, layer in quantization.quantized_layers(self.model).items():
            layer.weight.copy_(cast(Tensor, self._float[0].get_submodule(path).weight))
            layer.train().eval()  # no longer what it is rounded to

    @torch.no_grad()
    def _errors(self) -> list[float]:
        """The mean squared error of each layer's output, and of the logits."""
        full, own = self._float[0], self.model
        nn.Module.to(own, full.device).eval()  # Lightning leaves it on the CPU after a fit
        depths = range(1, parts.num_layers(own) + 1)
        scored = min(SCORED, self.quantization.calibration_examples)
        errors: list[Tensor] = []
        sizes: list[int] = []
        batches = self.data.calibration(scored, CALIBRATION_BATCH, self.seed)
        for batch in counted(batches, "comparing with full precision"):
            here = {name: tensor.to(full.device) for name, tensor in batch.items()}
            wanted, found = (taps.read(model, here, hidden=depths, logits=True) for model in (full, own))
            assert wanted.logits is not None and found.logits is not None
            of_layers = [hidden_mse(wanted.hidden[n], found.hidden[n], here["attention_mask"]) for n in depths]
            errors.append(torch.stack([*of_layers, functional.mse_loss(found.logits, wanted.logits)]).double().cpu())
            sizes.append(len(here["input_ids"]))
        means: list[float] = (torch.tensor(sizes).double() @ torch.stack(errors) / sum(sizes)).tolist()
        return means
