"""Importance collected while a model is trained, batch after batch, instead of on a fixed set of examples."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from edgemin.processes import ranks
from edgemin.pruning.criteria.base import Accumulator, ByExample
from edgemin.pruning.structures import Outputs, Units, Watch


class Ranking:
    """What a criterion finds in the batches of a fit: `watch` before each forward, `collect` after its backward.

    Args:
        criterion: gives the scores.
        units: those that are scored.
    """

    def __init__(self, criterion: ByExample, units: Units) -> None:
        self.units = units
        self.accumulator = Accumulator(criterion)
        self._criterion = criterion
        self._watched: tuple[Watch, Outputs, Mapping[str, Tensor]] | None = None

    def watch(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> None:
        """Capture what units hand on in the next forward, of this batch."""
        capture = self.units.outputs(model)
        self._watched = capture, capture.__enter__(), batch

    def collect(self, model: PreTrainedModel, share: float, weight: float) -> None:
        """Add the batch's examples to the ranking, those of all processes to the ranking of each.

        Args:
            model: the one that was watched.
            share: this process's share of the whole batch, times the number of processes; 0 without any example.
            weight: what was differentiated is this many times the mean of the examples' own losses.
        """
        if self._watched is None:
            return
        capture, handed, batch = self._watched
        mask, units = batch["attention_mask"], self.units.units(model)
        found = [point.grad for point in handed.points()]
        gradients = [gradient for gradient in found if gradient is not None]
        finite = len(gradients) == len(found) and all(bool(gradient.isfinite().all()) for gradient in gradients)
        own = Accumulator(self._criterion)
        own.add([torch.zeros(count, dtype=torch.float64) for count in units], 0)
        if finite and share > 0:
            own.update(handed.values(), handed.gradients(gradients), mask, units, loss_weight=weight / len(mask))
        seen = own.state_dict()
        counts = torch.tensor([seen["examples"], float(finite)], dtype=torch.float64)
        total = ranks.total(torch.cat([*seen["sums"], counts]))
        if total[-1] == ranks.world():  # else fp16 overflowed: the scaler skips this step too
            self.accumulator.add(total[:-2].split(units), int(total[-2]))
        capture.__exit__(None, None, None)
        self._watched = None
