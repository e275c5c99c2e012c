"""How much each attention head matters: four criteria.

With a_h(x) the output of head h for example x, all tokens of it (its "context": what it hands to the output
projection), and L(x) the loss of that example alone:

- `gradient_norm` (EdgeMIN, equation 2): I_h = E_x ‖∂L(x) / ∂a_h(x)‖₂, one norm over tokens and dimensions.
  It says how steep the loss is at the head's output, not what removing the head costs: with W_V multiplied
  and W_O divided by c the model is the same, and I_h is divided by c. Layers are not brought to one scale.
- `taylor` (Michel et al. 2019, arXiv 1905.10650): I_h = E_x |a_h(x)ᵀ ∂L(x) / ∂a_h(x)|, then divided by the
  l2 norm of its layer. The first-order estimate of what removing the head costs; no rescaling changes it.
- `magnitude`: I_h = √(‖W_V,h‖² + ‖W_O,h‖²), rows of W_V and columns of W_O. Needs no data.
- `random`: the control that every other criterion has to beat.

Norm and absolute value are taken per example, and the loss is a sum over examples, never a mean: so an
example's gradient is its own and the batch size changes nothing. Published codes take them per token (Michel
et al.'s own) or per batch (run_bertology), which rank heads differently.

Shapes: B batch, T tokens, H width, A heads of a layer, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from edgemin.encoder import parts, taps
from edgemin.encoder.parts import Layer, layers
from edgemin.errors import UserError
from edgemin.progress import counted

CRITERIA = ("gradient_norm", "taylor", "magnitude", "random")


def gradient_norm(gradient: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Norm of each example's gradient at each head's output, over tokens and dimensions together.

    Args:
        gradient: `[B, T, A*D]`, of each example's own loss.
        mask: `[B, T]`, non-zero where there is a token.
        heads: A.

    Returns:
        `[B, A]`, at least float32.
    """
    return _by_head(gradient, mask, heads).square().sum((1, 3)).sqrt()


def taylor(context: Tensor, gradient: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Absolute value of each example's product of head output and gradient.

    The product is summed over tokens and dimensions before the absolute value is taken.

    Args:
        context: `[B, T, A*D]`, head outputs.
        gradient: `[B, T, A*D]`, of each example's own loss.
        mask: `[B, T]`, non-zero where there is a token.
        heads: A.

    Returns:
        `[B, A]`, at least float32.
    """
    return (_by_head(context, mask, heads) * _by_head(gradient, mask, heads)).sum((1, 3)).abs()


def magnitude(value: Tensor, output: Tensor, heads: int) -> Tensor:
    """Norm of the weights that are a head's alone in W_V and W_O.

    Args:
        value: `[A*D, H]`, weight of the value projection.
        output: `[H, A*D]`, weight of the output projection.
        heads: A.

    Returns:
        `[A]`, float64, on CPU.
    """
    own = torch.cat([value.detach(), output.detach().T], dim=1).cpu().double()  # [A*D, 2 H]
    return own.reshape(heads, -1).square().sum(1).sqrt()


def random(heads: Sequence[int], seed: int) -> list[Tensor]:
    """Uniform numbers in [0, 1), `[A_l]` per layer, float64, on CPU: independent of the model's device."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(count, generator=generator, dtype=torch.float64) for count in heads]


class ImportanceAccumulator:
    """Mean over examples of `gradient_norm` or `taylor`, batch after batch, also during training.

    Example:
        >>> accumulator = ImportanceAccumulator("taylor")
        >>> context = torch.tensor([[[1.0, 2.0]], [[3.0, -4.0]]])  # two examples, two heads
        >>> accumulator.update([context], [torch.ones(2, 1, 2)], torch.ones(2, 1), [2])
        >>> accumulator.importance()  # means 2 and 3, then the layer's norm
        [tensor([0.5547, 0.8321], dtype=torch.float64)]
    """

    def __init__(self, criterion: str) -> None:
        """Start at no example; `criterion` is `gradient_norm` or `taylor`, the two that need data.

        Raises:
            UserError: another criterion.
        """
        if criterion not in ("gradient_norm", "taylor"):
            raise UserError(f"criterion: expected gradient_norm or taylor, the two that see data, given {criterion!r}")
        self.criterion = criterion
        self.examples = 0
        self._sums: list[Tensor] = []

    @torch.no_grad()
    def update(
        self,
        contexts: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        mask: Tensor,
        heads: Sequence[int],
        loss_weight: float | Tensor = 1.0,
    ) -> None:
        """Add the examples of one batch.

        Args:
            contexts: head outputs `[B, T, A_l*D]` of every layer, as
                [`head_contexts`][edgemin.encoder.taps.head_contexts] yields them.
            gradients: of what was differentiated; after `backward()`, `[c.grad for c in contexts]`.
            mask: `[B, T]`, non-zero where there is a token.
            heads: A_l of every layer.
            loss_weight: what an example's own loss was multiplied by in what was differentiated, a number or
                `[B]`: 1 for a sum, 1 / B for a mean, times a loss scale, over the number of accumulated
                batches. It is divided out.
        """
        assert len(contexts) == len(gradients) == len(heads)
        scores = []
        for context, gradient, count in zip(contexts, gradients, heads, strict=True):
            assert gradient is not None, "no gradient has reached this layer's heads"
            if self.criterion == "taylor":
                scores.append(taylor(context, gradient, mask, count))
            else:
                scores.append(gradient_norm(gradient, mask, count))
        per_example = torch.cat(scores, dim=1).cpu().double()  # [B, all heads]: one transfer from the device
        if isinstance(loss_weight, Tensor):
            total = (per_example / loss_weight.cpu().double().reshape(-1, 1)).sum(0)
        else:
            total = per_example.sum(0) / loss_weight
        self.add(total.split(list(heads)), len(mask))

    def add(self, sums: Sequence[Tensor], examples: int) -> None:
        """Add what was summed elsewhere: `[A_l]` per layer, over so many examples."""
        before = self._sums or [torch.zeros_like(part) for part in sums]
        self._sums = [done + new for done, new in zip(before, sums, strict=True)]
        self.examples += examples

    def importance(self) -> list[Tensor]:
        """Importance of every head so far: `[A_l]` per layer, float64, on CPU; `taylor` normalized."""
        assert self.examples, "no example was seen"
        means = [total / self.examples for total in self._sums]
        if self.criterion == "taylor":
            means = [F.normalize(mean, dim=0, eps=1e-20) for mean in means]
        return means

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on from here."""
        return {"criterion": self.criterion, "examples": self.examples, "sums": list(self._sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; it must be of the same criterion."""
        assert state["criterion"] == self.criterion
        self.examples = state["examples"]
        self._sums = list(state["sums"])


def head_importance(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    criterion: str,
    loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """Importance of every head of a model by one of `CRITERIA`, over a fixed set of examples.

    The model runs without dropout, gets no parameter gradients, and is left in the mode it was in.
    `magnitude` and `random` look at no batch.

    Args:
        model: a sequence classifier that `encoder` knows.
        batches: inputs and `labels`, in batches of any size; only the examples in them matter.
        criterion: one of `CRITERIA`.
        loss_fn: from logits `[B, C]` and labels `[B]` to the loss of each example `[B]`; if not given,
            cross-entropy, or the squared error for floating-point labels.
        seed: of `random`.

    Returns:
        `[A_l]` per layer, float64, on CPU; more is more important.

    Raises:
        UserError: an unknown criterion.
    """
    if criterion not in CRITERIA:
        raise UserError(f"criterion: expected one of {', '.join(CRITERIA)}, given {criterion!r}")
    heads = parts.heads(model)
    if criterion == "random":
        return random(heads, seed)
    if criterion == "magnitude":
        return [_layer_magnitude(layer) for layer in layers(model)]
    accumulator = ImportanceAccumulator(criterion)
    was_training = model.training
    model.eval()
    try:
        for batch in counted(batches, "ranking heads"):
            _add_batch(accumulator, model, batch, heads, loss_fn or example_losses)
    finally:
        model.train(was_training)
    return accumulator.importance()


def example_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The task loss of each example `[B]`: squared error for floating-point labels, else cross-entropy."""
    if labels.is_floating_point():
        return F.mse_loss(logits.squeeze(-1), labels, reduction="none")
    return F.cross_entropy(logits, labels, reduction="none")


def _add_batch(
    accumulator: ImportanceAccumulator,
    model: PreTrainedModel,
    batch: Mapping[str, Tensor],
    heads: Sequence[int],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
) -> None:
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    with torch.enable_grad(), taps.head_contexts(model) as contexts:
        losses = loss_fn(taps.logits(model, batch), batch["labels"])
        assert losses.shape == batch["labels"].shape, "one loss per example: reduction='none'"
        # Not backward(): it would add to the gradients of the parameters, and take the time to form them.
        gradients = torch.autograd.grad(losses.sum(), contexts)
        accumulator.update(contexts, gradients, batch["attention_mask"], heads)


def _layer_magnitude(layer: Layer) -> Tensor:
    last, output = layer.projections[-1].weight, layer.output.weight
    assert isinstance(last, Tensor) and isinstance(output, Tensor)
    value = last.chunk(layer.fused)[-1]  # values come last where one projection holds all three
    return magnitude(value, output, layer.heads)


def _by_head(tensor: Tensor, mask: Tensor, heads: int) -> Tensor:
    """`[B, T, A*D]` to `[B, T, A, D]`, at least float32, 0 on padding."""
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    batch, tokens, width = wide.shape
    return wide.masked_fill(~mask.bool()[..., None], 0.0).reshape(batch, tokens, heads, width // heads)
