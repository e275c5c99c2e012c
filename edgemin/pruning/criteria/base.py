"""The contract of a pruning criterion: what data it needs, for which structures it exists, and its scores.

A criterion that looks at examples scores each of them alone and takes the mean over examples. The loss is a sum over
examples, never a mean: so an example's gradient is its own, and the batch size changes nothing.

Shapes: B batch, T tokens, U units of a group, S size of a unit, C classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from edgemin.encoder import taps
from edgemin.progress import counted
from edgemin.pruning.structures import StructureName, Units, Watch

Batch = Mapping[str, Tensor]
Needs = Literal["nothing", "sentences", "gradients"]


class Given(NamedTuple):
    """What a criterion may look at.

    Attributes:
        model: a sequence classifier that `encoder` knows.
        structure: the units to score: of one structure, or of several in one pass
            ([`Several`][edgemin.pruning.several.Several]).
        batches: inputs and `labels`, in batches of any size; only the examples in them matter.
        losses: from logits `[B, C]` and labels to the loss of each example `[B]`, for a criterion that needs gradients.
        seed: for a criterion that draws random numbers.
    """

    model: PreTrainedModel
    structure: Units
    batches: Iterable[Batch] = ()
    losses: Callable[[Tensor, Tensor], Tensor] | None = None
    seed: int = 0


class Criterion(ABC):
    """How much each unit of a structure matters.

    Attributes:
        needs: `nothing` but the model; `sentences` of the training split; or `gradients` of the task loss on them.
            Gradients come through the model's head, so it should have been trained already, unless they are collected
            while the model is trained (`importance=training`).
        structures: the structures whose units it can score.
        comparable: among which units scores can be added up and compared as they are: `everywhere` (estimates of how
            much the loss rises without a unit), within a `structure`, or within a `group` (errors of what this one
            group writes). A search within a budget compares all units, so it divides scores of the last two kinds by
            their sum over the structure or the group.
        changes_weights: whether `compensate` changes weights; quantized models are then refused.
    """

    needs: ClassVar[Needs] = "nothing"
    structures: ClassVar[tuple[StructureName, ...]] = ("heads", "ffn")
    comparable: ClassVar[Literal["everywhere", "structure", "group"]] = "structure"
    changes_weights: ClassVar[bool] = False

    @abstractmethod
    def scores(self, given: Given) -> list[Tensor]:
        """One number per unit, over a fixed set of examples.

        The model runs without dropout, gets no parameter gradients, and is left in the mode it was in.

        Returns:
            `[U_g]` per group, float64, on CPU; more is more important.
        """

    def ranked(self, scores: list[Tensor]) -> list[Tensor]:
        """The scores of one structure as a ratio ranks them, `[U_g]` per group; by default unchanged."""
        return scores

    def compensate(self, given: Given, keep: list[list[int]]) -> list[list[int]]:
        """Change the weights of units that stay, so that the model loses least without the others.

        The stage calls it between the choice by `scores` and the cut; most criteria leave the weights alone.

        Args:
            given: as for `scores`; the model still has all its units, and is changed in place.
            keep: the units of each group that were chosen to stay, ascending.

        Returns:
            The units of each group that shall stay instead, as many, ascending.
        """
        return keep


class Seen(NamedTuple):
    """One batch of a fixed set of examples: what units hand on, and the gradient of each example's own loss there.

    Attributes:
        values: `[B, T, U_g*S]` of every group.
        gradients: in the same shapes; `None` where they were not asked for.
        mask: `[B, T]`, non-zero where there is a token.
    """

    values: list[Tensor]
    gradients: Sequence[Tensor | None]
    mask: Tensor


def passes(given: Given, watch: Callable[[], Watch], *, by_gradient: bool) -> Iterator[Seen]:
    """Run the model on all batches, without dropout; afterwards it is in the mode it was in.

    Args:
        given: model, batches and losses.
        watch: opens a structure's `outputs`, or the like, for one forward.
        by_gradient: whether to form gradients too.
    """
    model = given.model
    was_training = model.training
    model.eval()
    try:
        for batch in counted(given.batches, f"ranking {given.structure.what}"):
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            with torch.set_grad_enabled(by_gradient), watch() as outputs:
                logits = taps.logits(model, batch)
                values = outputs.values()
                gradients: Sequence[Tensor | None] = [None] * len(values)
                if by_gradient:
                    assert given.losses is not None
                    losses = given.losses(logits, batch["labels"])
                    assert losses.shape == logits.shape[:1], "one loss per example: reduction='none'"
                    # Not backward(): it would add to the gradients of the parameters, and take the time to form them.
                    gradients = outputs.gradients(torch.autograd.grad(losses.sum(), outputs.points()))
            yield Seen(values, gradients, batch["attention_mask"])
    finally:
        model.train(was_training)


class ByExample(Criterion):
    """A criterion that is a mean over examples: a subclass says what one example adds."""

    needs: ClassVar[Needs] = "sentences"

    @abstractmethod
    def per_example(self, outputs: Tensor, gradient: Tensor | None, mask: Tensor, units: int) -> Tensor:
        """What each example adds to the units of one group.

        Args:
            outputs: `[B, T, U*S]`, what the units hand on.
            gradient: `[B, T, U*S]`, of each example's own loss; `None` unless `needs` is `gradients`.
            mask: `[B, T]`, non-zero where there is a token.
            units: U.

        Returns:
            `[B, U]`, at least float32.
        """

    def watch(self, structure: Units, model: PreTrainedModel) -> Watch:
        """What `per_example` gets as `outputs`: by default what the structure's units hand on."""
        return structure.outputs(model)

    def scores(self, given: Given) -> list[Tensor]:
        """The mean over all examples."""
        accumulator = Accumulator(self)
        units = given.structure.units(given.model)

        def watch() -> Watch:
            return self.watch(given.structure, given.model)

        for seen in passes(given, watch, by_gradient=self.needs == "gradients"):
            accumulator.update(seen.values, seen.gradients, seen.mask, units)
        return accumulator.scores()


class Accumulator:
    """Mean over examples of what a criterion finds in each, batch after batch, also during training.

    Example:
        >>> from edgemin.pruning.criteria.gradients import Taylor
        >>> accumulator = Accumulator(Taylor())
        >>> outputs = torch.tensor([[[1.0, 2.0]], [[3.0, -4.0]]])  # two examples, two units
        >>> accumulator.update([outputs], [torch.ones(2, 1, 2)], torch.ones(2, 1), [2])
        >>> accumulator.scores()
        [tensor([2., 3.], dtype=torch.float64)]
    """

    def __init__(self, criterion: ByExample) -> None:
        """Start at no example."""
        self.criterion = criterion
        self.examples = 0
        self._sums: list[Tensor] = []

    @torch.no_grad()
    def update(
        self,
        outputs: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        mask: Tensor,
        units: Sequence[int],
        loss_weight: float | Tensor = 1.0,
    ) -> None:
        """Add the examples of one batch.

        Args:
            outputs: what units hand on, `[B, T, U_g*S]` of every group, as a structure's `outputs` has the values.
            gradients: of what was differentiated, in the same shapes. `None` for a criterion that needs none.
            mask: `[B, T]`, non-zero where there is a token; where units hand on at several places, T of `outputs` is
                that many times as long.
            units: U_g of every group.
            loss_weight: what an example's own loss was multiplied by in what was differentiated, a number or
                `[B]`: 1 for a sum, 1 / B for a mean, times a loss scale, over the number of accumulated
                batches. It is divided out of the gradients.
        """
        assert len(outputs) == len(gradients) == len(units)
        groups = zip(outputs, gradients, units, strict=True)
        masks = (mask.repeat(1, output.shape[1] // mask.shape[1]) for output in outputs)
        found = [
            self.criterion.per_example(output, _of_own_loss(gradient, loss_weight), seen, count)
            for (output, gradient, count), seen in zip(groups, masks, strict=True)
        ]
        per_example = torch.cat(found, dim=1).cpu().double()  # [B, all units]: one transfer from the device
        self.add(per_example.sum(0).split(list(units)), len(mask))

    def add(self, sums: Sequence[Tensor], examples: int) -> None:
        """Add what was summed elsewhere: `[U_g]` per group, over so many examples."""
        before = self._sums or [torch.zeros_like(part) for part in sums]
        self._sums = [done + new for done, new in zip(before, sums, strict=True)]
        self.examples += examples

    def scores(self) -> list[Tensor]:
        """The score of every unit so far: `[U_g]` per group, float64, on CPU."""
        assert self.examples, "no example was seen"
        return [total / self.examples for total in self._sums]

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on from here."""
        return {"criterion": type(self.criterion).__name__, "examples": self.examples, "sums": list(self._sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; it must be of the same criterion."""
        assert state["criterion"] == type(self.criterion).__name__
        self.examples = state["examples"]
        self._sums = list(state["sums"])


def _of_own_loss(gradient: Tensor | None, loss_weight: float | Tensor) -> Tensor | None:
    """The gradient of each example's own loss, at least float32: without its loss scale float16 may underflow."""
    if gradient is None:
        return None
    if isinstance(loss_weight, Tensor):
        loss_weight = loss_weight.to(gradient.device).reshape(-1, 1, 1)
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32)) / loss_weight


def by_unit(tensor: Tensor, mask: Tensor, units: int) -> Tensor:
    """`[B, T, U*S]` to `[B, T, U, S]`, at least float32, 0 on padding."""
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    batch, tokens, width = wide.shape
    return wide.masked_fill(~mask.bool()[..., None], 0.0).reshape(batch, tokens, units, width // units)
