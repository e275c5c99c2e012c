"""Reconstruction: block by block, a quantized model learns to reproduce the outputs of the full-precision one."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, cast, get_args

import numpy as np
import torch
from annotated_types import Gt, Lt
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from edgemin.config import Share
from edgemin.data.batches import Batches
from edgemin.data.module import DataModule
from edgemin.encoder import building, parts, quantized, taps
from edgemin.encoder.outline import Outline
from edgemin.errors import UserError
from edgemin.processes import ranks
from edgemin.quantization import model as quantization
from edgemin.quantization.model import ScaleOwner
from edgemin.quantization.scales import ScaleTraining
from edgemin.quantization.settings import CALIBRATION_BATCH, Quantization, quantize_given
from edgemin.training.fit import Fit
from edgemin.training.hidden_states import hidden_mse
from edgemin.training.stage import Effect, Place, Stage

# The learning rates of scales, as shares of that of weights, found by trial (benchmarks/README.md). They differ because
# AdamW's step does not depend on a scale's size: an input's is about 0.03 whatever the weights' bits, a weight's 0.02
# at 4 bits and 0.002 at 8.
SCALE_SHARES: dict[ScaleOwner, float] = {"weights": 0.1, "inputs": 1.0}
Aside = Annotated[float, Gt(0), Lt(1)]
# How often a fit looks at the sentences kept aside, its end apart.
LOOKS = 5


class Reconstruction(Stage):
    r"""Train a quantized model one block at a time on calibration sentences, without labels.

    In cost this lies between rounding and quantization-aware training. It begins with post-training quantization. Then,
    for each layer n in order, that layer's weights and scales (with LSQ's gradient, see
    [`affine`][edgemin.quantization.affine]) minimize

    $$
    \| f_n(x_{n-1}) - \hat f_n(\tilde x_{n-1}) \|^2, \qquad
    \tilde x_{n-1} = \lambda_t x_{n-1} + (1 - \lambda_t) \hat x_{n-1}, \quad \lambda_t = max(1 - t / T_0, 0)
    $$

    Here $x$ are the hidden states of the full-precision model, $\hat x$ those of the quantized one; squared errors are
    averaged over hidden units and tokens, then over sequences (MREM with annealed teacher forcing, arXiv 2109.15082;
    the first phase of EfficientQAT, arXiv 2407.11062). Last comes what follows the layers, by the squared error of the
    logits, on the quantized model's own hidden states. Embeddings are only rounded. There is no dropout.

    Some calibration sentences are kept aside: nothing learns from them. A block keeps, of its states at its start, at
    its end and four times in between, the one with the least error on them. `findings["reconstruction"]` has each
    block's error on them before and after (`head`: that of the logits), the quantized model running on its own hidden
    states throughout.

    Args:
        teacher_forcing: T_0, as a share of the steps of a block; 0: none.
        aside: share of the calibration sentences that is kept aside, at least one.
        quantization: which layers, and how.
        scaling: what the scales do: `fixed` or `learned`.
        fit: of each block; an epoch is all calibration sentences but those kept aside.
    """

    def __init__(
        self,
        *,
        teacher_forcing: Share = 0.5,
        aside: Aside = 0.25,
        quantization: Quantization,
        scaling: ScaleTraining,
        fit: Fit,
    ) -> None:
        super().__init__()
        self.settings, self.quantization, self.scaling = fit, quantization, scaling
        if fit.patience is not None:
            raise UserError(f"patience: expected null, as blocks are not scored on task.holdout, given {fit.patience}")
        if scaling.scales == "moving":
            raise UserError("scales: expected fixed or learned, given moving")
        scaling.check({"embeddings": False, "inputs": quantization.activations == "static"})
        self.teacher_forcing, self.aside = teacher_forcing, aside
        self.scale_learning_rates = scaling.learning_rates(SCALE_SHARES, fit.learning_rate)
        self.forced = 1.0  # the part of the full-precision model's hidden states, at this step
        # a list, so that it is no submodule: neither trained nor checkpointed
        self._float: list[PreTrainedModel] = []
        self._rows: NDArray[np.int64] | None = None
        self._unseen: list[dict[str, Tensor]] = []  # the batches kept aside
        self._wanted: list[list[Tensor]] = []  # what the block that learns gives for them in full precision
        self._annealed = 0.0  # T_0 in batches
        self._before: list[float] = []
        self._least, self._best = math.inf, dict[str, Tensor]()  # the least error so far and the block's state then

    def effect(self, model: Outline, teachers: Sequence[Outline], place: Place) -> Effect:
        """Plan one fit per block, whose epoch is the calibration sentences that are not kept aside."""
        after = self.quantization.after(model)
        if self.quantization.changes_nothing(model):
            raise UserError(
                "_target_: expected a model in full precision or quantized in another way, as its outputs are learnt, "
                "given one that is quantized in this very way already"
            )
        drawn = min(self.quantization.calibration_examples, place.texts)
        if drawn == 1:
            raise UserError("calibration_examples: expected at least 2, one of them to be kept aside, given 1")
        return replace(
            super().effect(after, teachers, place),
            reads_labels=False,
            quantizes="integers",
            reaches_all=False,
            idle=self.quantization.idle(model, draws=True),
            steps=(len(model.layers) + 1) * self.settings.optimizer_steps(drawn - self._kept_aside(drawn)),
        )

    def _kept_aside(self, drawn: int) -> int:
        return min(max(1, round(self.aside * drawn)), drawn - 1)

    def prepare(
        self, model: PreTrainedModel, data: DataModule | None, teachers: Sequence[PreTrainedModel] = ()
    ) -> None:
        """Keep a copy of the model in full precision, and quantize the model."""
        super().prepare(model, data, teachers)
        self._float = [copy.deepcopy(model).eval().requires_grad_(False)]
        quantized.settle(self._float[0])  # where it was quantized before: rounded once
        quantize_given(self, self.quantization, data)
        self.scaling.begin(model, get_args(ScaleOwner))
        drawn = self.data.drawn(self.quantization.calibration_examples, self.seed)
        self._rows, aside = np.split(drawn, [len(drawn) - self._kept_aside(len(drawn))])
        aside = aside[np.argsort(self.data.train.lengths[aside], kind="stable")]
        starts = range(0, len(aside), CALIBRATION_BATCH)
        self._unseen = [self.data.train.batch(aside[at : at + CALIBRATION_BATCH]) for at in starts]
        self._before = self._errors(range(parts.num_layers(model) + 1))

    def fits(self) -> list[Fit]:
        """A fit for each layer and one for what follows; before `prepare`, when layers are unknown, only one."""
        return [self.settings] * (parts.num_layers(self.model) + 1 if self._float else 1)

    def batches(self, fit: Fit) -> Batches:
        """All batches of a fit, on the calibration sentences that are not kept aside."""
        return self.task_batches(fit, self._rows)

    def begin(self, phase: int) -> None:
        """Begin a block, which has no best state yet."""
        self._least, self._best = math.inf, {}

    def setup(self, stage: str) -> None:
        """Freeze all but the block that learns, before Lightning collects the parameters."""
        self.model.requires_grad_(False)
        for parameter in parts.parameters_by_depth(self.model)[self.phase + 1]:
            parameter.requires_grad_(True)

    def on_fit_start(self) -> None:
        """Put the full-precision model on the device, and round the blocks that have finished learning for good."""
        nn.Module.to(self._float[0], self.device)
        self._annealed = self.teacher_forcing * self.batch_count
        done = {"embeddings", *(str(n) for n in range(1, self.phase + 1))}
        matrices = building.outline(self.model).matrices
        for path, layer in quantization.quantized_layers(self.model).items():
            if matrices[path].place in done:
                layer.hold()
        self._wanted = [self._outputs(self._float[0], batch, [self.phase]) for batch in self._unseen]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Look at the sentences kept aside if it is time to, and reduce λ_t."""
        if batch_idx in {at * self.batch_count // LOOKS for at in range(LOOKS)}:
            self._look()
        super().on_train_batch_start(batch, batch_idx)
        self.forced = max(1.0 - batch_idx / self._annealed, 0.0) if self._annealed else 0.0

    def on_train_end(self) -> None:
        """Go back to the block's best state."""
        self._look()
        with torch.no_grad():
            for name, tensor in self._best.items():
                self.model.get_parameter(name).copy_(tensor)

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
        head = parts.num_layers(self.model)
        nn.Module.to(self.model, self._float[0].device)  # Lightning leaves it on the CPU after a fit
        after = self._errors(range(head + 1))
        found = zip([*range(1, head + 1), "head"], self._before, after, strict=True)
        self.findings["reconstruction"] = [{"block": n, "before": before, "after": after} for n, before, after in found]
        return super().finish().requires_grad_(True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the block's best state too."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["edgemin"] |= {"least": self._least, "best": self._best}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what `on_save_checkpoint` saved."""
        super().on_load_checkpoint(checkpoint)
        self._least, self._best = checkpoint["edgemin"]["least"], checkpoint["edgemin"]["best"]

    def _look(self) -> None:
        """Keep the block's state if its error on the sentences kept aside is the least so far."""
        error = ranks.from_main(lambda: self._errors([self.phase], self._wanted)[0])
        if error < self._least:
            learning = {name: own for name, own in self.model.named_parameters() if own.requires_grad}
            self._least, self._best = error, {name: own.detach().clone() for name, own in learning.items()}

    @torch.no_grad()
    def _errors(self, blocks: Sequence[int], wanted: Sequence[list[Tensor]] = ()) -> list[float]:
        """The mean squared error of what blocks give for the sentences kept aside; `wanted` if it is known."""
        full, own = self._float[0], self.model.eval()
        errors: list[Tensor] = []
        for number, batch in enumerate(self._unseen):
            target = wanted[number] if wanted else self._outputs(full, batch, blocks)
            pairs = zip(blocks, target, self._outputs(own, batch, blocks), strict=True)
            errors.append(torch.tensor([self._error(*pair, batch["attention_mask"]) for pair in pairs]).double())
        sizes = torch.tensor([len(batch["input_ids"]) for batch in self._unseen]).double()
        means: list[float] = (sizes @ torch.stack(errors) / sizes.sum()).tolist()
        return means

    def _error(self, block: int, wanted: Tensor, found: Tensor, mask: Tensor) -> float:
        is_head = block == parts.num_layers(self.model)
        return float(functional.mse_loss(found, wanted) if is_head else hidden_mse(wanted, found, mask))

    @torch.no_grad()
    def _outputs(self, model: PreTrainedModel, batch: Mapping[str, Tensor], blocks: Sequence[int]) -> list[Tensor]:
        """What blocks of a model give for a batch, on its own hidden states: layers' outputs, and last the logits."""
        head = parts.num_layers(model)
        here = {name: tensor.to(model.device) for name, tensor in batch.items()}
        read = taps.read(model, here, hidden=[block + 1 for block in blocks if block < head], logits=head in blocks)
        return [(read.hidden[block + 1] if block < head else cast(Tensor, read.logits)).cpu() for block in blocks]
