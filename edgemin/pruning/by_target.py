"""How much goes to stay within a budget: the search decides how many units each group keeps, their scores which."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from edgemin import config
from edgemin.encoder.outline import Outline
from edgemin.errors import UserError
from edgemin.pruning.amount import Amount, Scores, went
from edgemin.pruning.budget import Levels, choose, least, removal_losses
from edgemin.pruning.criteria.base import Criterion
from edgemin.pruning.selection import Schedule, gone_after, least_important
from edgemin.pruning.structures import Structure
from edgemin.pruning.target import Cost, Target
from edgemin.training.latency import LatencyTable


class ByTarget(Amount):
    """Removes as much as it takes to stay within a budget.

    The search adds up costs over groups. That is exact for size and operations, but not for latency: where heads and
    FFN units of a layer save less together than each alone, the search is repeated with a smaller budget until the
    model itself is within the one asked for. Layers and hidden units are one group each, of which as many are kept as
    the budget allows.

    Args:
        target: the budget.
        structures: those whose units are removed.
        rounds: in how many rounds the cost falls from that of the whole model to the budget.
        schedule: how fast it falls, as in [`round_targets`][edgemin.pruning.selection.round_targets].

    Raises:
        UserError: a cost that the latency table does not tell.
    """

    def __init__(self, target: Target, structures: Sequence[Structure], rounds: int, schedule: Schedule) -> None:
        if target.reads_latency and structures[0].name == "hidden":
            raise UserError(
                "target.measure: expected size_mib or macs for hidden units, as the latency table has widths of heads "
                "and FFN units alone, given latency_ms"
            )
        if target.factors is not None:
            raise UserError(
                f"target.factors: expected null on the path of a model that others start from or learn from, given "
                f"{list(target.factors)}; set target.factor"
            )
        self.target, self.structures, self.rounds, self.schedule = target, list(structures), rounds, schedule
        self.idle = ("ratio", "ffn_ratio", "scope", *(f"target.{name}" for name in target.idle))
        self.decided = {"target": target.content}
        self.reads_latency = target.reads_latency
        self._latency: LatencyTable | None = None
        self._whole = self._budget = self._spent = 0.0

    @property
    def _cost(self) -> Cost:
        return self.target.cost(self._latency)

    def after(self, model: Outline, latency: LatencyTable | None) -> Outline:
        """Planning counts layers and hidden units; how many heads and FFN units a layer keeps depends on scores."""
        self._latency = latency if self.reads_latency else None
        one_group = self.structures[0].one_group
        if one_group:
            self._check_alike(model)
        if (self._latency is None and self.reads_latency) or not self.target.is_known(model):
            after = model
        else:
            self.start(model)
            after = self._largest_within(model, self._budget) if one_group else model
        for structure in () if one_group else self.structures:
            after = structure.shaped(after, [None for _ in structure.counts(after)])
        return after

    def _check_alike(self, model: Outline) -> None:
        """Refuse to count what depends on which units go, or on what is not known."""
        alike = len({(layer.heads, layer.ffn) for layer in model.layers}) == 1
        if not self.target.is_known(model) or not (alike or self.structures[0].name == "hidden"):
            raise UserError(
                f"target.measure: expected null, and a ratio, for {self.structures[0].what} of a model whose layers "
                f"differ or are cut as the run goes on, given {self.target.measure}; prune {self.structures[0].what} "
                "first"
            )

    def start(self, model: Outline) -> list[str]:
        """Form the budget, and refuse one that no pruning of these structures reaches."""
        if self._latency is not None:
            self._latency.check_fits(model)
        target, smallest = self.target, model
        self._whole = self._cost(model)
        self._budget = target.budget(self._whole)
        for structure in self.structures:
            fewest = [_kept(count, structure)[0] for count in structure.counts(model) if count is not None]
            smallest = structure.shaped(smallest, fewest)
        if self._budget < (reached := self._cost(smallest)) * (1 - 1e-9):  # less than a sum of floats is off by
            key, given = ("value", target.value) if target.value is not None else ("factor", target.factor)
            least_given = reached if target.value is not None else reached / self._whole
            raise UserError(
                f"target.{key}: expected at least {_rounded_up(least_given)}, what removing "
                f"{' and '.join(structure.what for structure in self.structures)} can reach, given {given:g}"
            )
        if self._budget >= self._whole:
            return [f"target {target.says(self._budget)} removes nothing: the model has {target.says(self._whole)}"]
        return []

    def _largest_within(self, model: Outline, budget: float) -> Outline:
        """The model with as many units of its one group as the budget allows."""
        (structure,) = self.structures
        (count,) = structure.counts(model)
        shapes = [structure.shaped(model, [kept]) for kept in reversed(_kept(count, structure))]
        return next((shape for shape in shapes if self._cost(shape) <= budget), shapes[-1])

    def weighed(self, criterion: Criterion, scores: Scores) -> list[list[Tensor]]:
        """Divided by their sum where the criterion does not make them comparable."""
        if criterion.comparable == "everywhere":
            return [list(groups) for groups in scores]
        if criterion.comparable == "group":
            return [[_over(group, group.sum()) for group in groups] for groups in scores]
        return [[_over(group, sum(each.sum() for each in groups)) for group in groups] for groups in scores]

    def removed(self, model: Outline, weighed: Scores, completed_rounds: int) -> list[list[int]]:
        """The least important of each group, down to as many as the search leaves it."""
        share = gone_after(completed_rounds + 1, self.rounds, self.schedule)
        budget = self._whole - max(self._whole - self._budget, 0.0) * share
        if self.structures[0].one_group:
            keep = [[count or 0 for count in self.structures[0].counts(self._largest_within(model, budget))]]
        else:
            keep = self._counts(model, weighed, budget)
        pairs = zip(weighed, keep, strict=True)
        return [gone for groups, counts in pairs for gone in least_important(groups, counts)]

    def _counts(self, model: Outline, weighed: Scores, budget: float) -> list[list[int]]:
        """How many units each group keeps so that the least importance goes."""
        whole, parts = self._cost(model), list[Levels]()
        for structure, groups in zip(self.structures, weighed, strict=True):
            present = structure.counts(model)
            for group, units in enumerate(groups):
                losses, kept = removal_losses(units), _kept(len(units), structure)
                shapes = [structure.shaped(model, [*present[:group], count, *present[group + 1 :]]) for count in kept]
                parts.append(Levels(kept, [self._cost(shape) - whole for shape in shapes], [losses[c] for c in kept]))
        spend, fewest = budget - whole, least(parts)
        while True:
            chosen = iter(choose(parts, max(spend, fewest)))
            counts = [[next(chosen) for _ in groups] for groups in weighed]
            after = model
            for structure, kept in zip(self.structures, counts, strict=True):
                after = structure.shaped(after, kept)
            over = self._cost(after) - budget
            if over <= 0 or spend <= fewest:
                return counts
            # groups of one layer save less together than each alone; not by less than a choice can tell apart
            spend -= max(over, whole / 10_000)

    def says(self, model: Outline, rounds_gone: Scores) -> list[str]:
        """A note for each structure, and one with the budget and the cost that was reached."""
        target, self._spent = self.target, self._cost(model)
        notes = [went(structure, gone) for structure, gone in zip(self.structures, rounds_gone, strict=True)]
        asked = f"target {target.says(self._budget)}"
        if target.factor is not None:
            asked += (
                f" ({target.factor:g} of {self._whole:.4g})" if target.measure != "macs" else f" ({target.factor:g})"
            )
        if self._latency is None:
            return [*notes, f"{asked}, now {target.says(self._spent)}"]
        where = f"{self._latency.precision} in {self._latency.runtime}, by the table of {self._latency.device}"
        return [*notes, f"{asked}, predicted {target.says(self._spent)}: {where}"]

    def found(self) -> dict[str, Any]:
        """The budget, and the model's cost before and afterwards; a latency is that of the table."""
        costs = {"before": self._whole, "asked": self._budget, "predicted": self._spent}
        table = self._latency
        where = {} if table is None else {"threads": table.threads, "device": table.device}
        return {"target": {**self.target.content, **where, **costs}}


def by_target(
    settings: Mapping[str, Any], structures: Sequence[Structure], rounds: int, schedule: Schedule
) -> ByTarget | None:
    """The amount that the settings `prune.target` ask for; `None` where they name no measure.

    Raises:
        UserError: settings that contradict each other; the key first.
    """
    target = config.construct({"_target_": f"{Target.__module__}.{Target.__name__}", **settings}, "target", Target)
    return None if target.measure is None else ByTarget(target, structures, rounds, schedule)


def _kept(units: int | None, structure: Structure) -> list[int]:
    """How many of so many units a group may keep, ascending."""
    assert units is not None, "the model is known"
    step = structure.multiple
    fewest = -(-structure.least // step) * step
    return sorted({*range(fewest, units, step), units})


def _over(scores: Tensor, total: Tensor | int) -> Tensor:
    return scores / total if float(total) > 0 else scores


def _rounded_up(number: float) -> str:
    """Three digits, never below the number itself, so that what the message says is enough."""
    step = 10.0 ** (math.floor(math.log10(number)) - 2)
    return f"{math.ceil(number / step - 1e-9) * step:.3g}"
