"""CoFi (Xia et al. 2022): gates on blocks, heads, FFN units and hidden units learn together what a model keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from edgemin.encoder.gates import Gates
from edgemin.encoder.outline import Outline
from edgemin.errors import UserError
from edgemin.pruning import hard_concrete, settling
from edgemin.pruning.gradual import GradualPruning


class LogAlphas(nn.Module):
    """log α of every gate, all open at first, and the multipliers λ1 and λ2."""

    def __init__(self, outline: Outline) -> None:
        super().__init__()

        def start(count: int | None) -> nn.Parameter:
            return nn.Parameter(torch.full((count or 0,), hard_concrete.LARGEST))

        self.attention, self.ffn = start(len(outline.layers)), start(len(outline.layers))
        self.heads = nn.ParameterList(start(layer.heads) for layer in outline.layers)
        self.units = nn.ParameterList(start(layer.ffn) for layer in outline.layers)
        self.hidden = start(outline.hidden)
        self.multipliers = nn.Parameter(torch.zeros(2))

    def gates(self) -> Gates:
        """All log α, in the form of gates."""
        return Gates(self.attention, list(self.heads), self.ffn, list(self.units), self.hidden)


class JointPruning(GradualPruning):
    r"""CoFi (arXiv 2204.00408): hard concrete gates on whole blocks, heads, FFN units and hidden units.

    With the sparsity s that is expected of the gates (see [`hard_concrete`][edgemin.pruning.hard_concrete]) and the
    target t, which rises linearly at first, the training under masks finds

    $$ \min_{\theta, \alpha} \max_\lambda \; L + \lambda_1 (s - t) + \lambda_2 (s - t)^2 $$

    Embeddings do not learn, in neither fine-tuning. docs/pruning.md says how gates close in the end, and what differs
    from the published code.
    """

    name_of_scores: ClassVar[str] = "log α"
    trains_embeddings: ClassVar[bool] = False
    gating: LogAlphas

    def check_reachable(self, model: Outline) -> None:
        """Refuse a sparsity at which not even one layer with one head and the fewest units would be left."""
        multiple, asked = self.masking.multiple, self.masking.sparsity
        greatest = settling.greatest_sparsity(model, multiple)
        if asked > greatest:
            at_most = math.floor(greatest * 10_000) / 10_000  # rounded up it would be refused again
            raise UserError(
                f"sparsity: expected at most {at_most}, at which one layer of one head, {multiple} FFN units and "
                f"{multiple} hidden units is left, given {asked}"
            )

    def deciders(self, outline: Outline) -> LogAlphas:
        """All log α and the multipliers."""
        return LogAlphas(outline)

    def rising(self) -> Sequence[nn.Parameter]:
        """The multipliers λ: they ascend."""
        return [self.gating.multipliers]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Clamp log α to where a gate can still open or close."""
        super().on_train_batch_start(batch, batch_idx)
        for name, parameter in self.gating.named_parameters():
            if name != "multipliers":
                hard_concrete.limit(parameter)

    def drawn(self) -> Gates:
        """Gates for fresh noise."""
        return _made(self.gating.gates(), lambda gate: hard_concrete.sample(gate, torch.rand_like(gate)))

    def penalty(self) -> Tensor:
        """The Lagrangian of the expected sparsity, whose target rises during the warm-up."""
        expected = settling.expected_sparsity(_made(self.gating.gates(), hard_concrete.open_probability), self.before)
        warmup = round(self.masking.sparsity_warmup * self.batch_count)
        target = hard_concrete.target_sparsity(self.masking.sparsity, self.batch, warmup)
        self.log("expected_sparsity", expected)
        self.log("target_sparsity", target)
        return hard_concrete.lagrangian(expected, target, *self.gating.multipliers)

    def chosen(self) -> Gates:
        """The gates at the target sparsity."""
        return settling.settled(
            _made(self.gating.gates(), Tensor.detach), self.before, self.masking.sparsity, self.masking.multiple
        )

    def importance(self) -> dict[str, Sequence[Tensor]]:
        """Log α of heads, FFN units and hidden units; whole blocks are not ranked."""
        found = self.gating.gates()
        return {"heads": found.heads, "ffn": found.units, "hidden": [found.hidden]}


def _made(gates: Gates, change: Callable[[Tensor], Tensor]) -> Gates:
    """Gates of which each vector is changed."""
    return Gates(
        change(gates.attention),
        [change(gate) for gate in gates.heads],
        change(gates.ffn),
        [change(gate) for gate in gates.units],
        change(gates.hidden),
    )
