"""Pruning by a ratio: how many units of each structure are left, which ones go, and the notes about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import Tensor

from edgemin.encoder.outline import Outline
from edgemin.errors import UserError
from edgemin.pruning.amount import Amount, Scores, went
from edgemin.pruning.criteria.base import Criterion
from edgemin.pruning.selection import Schedule, removal_count, rounded, select_units
from edgemin.pruning.structures import MULTIPLE, Ffn, Heads, Hidden, Layers, Structure

if TYPE_CHECKING:
    from edgemin.training.latency import LatencyTable

Removable = Literal["heads", "ffn", "heads_ffn", "layers", "hidden"]


class Share(NamedTuple):
    """A structure, and how much of it goes.

    Attributes:
        structure: the one whose units are removed.
        ratio: the share of its units that is removed, in [0, 1).
        key: the setting that gave the ratio, for messages.
        scope: `layer` removes the share of each group, `global` of all groups together.
    """

    structure: Structure
    ratio: float
    key: str
    scope: str

    @property
    def _apart(self) -> bool:
        """Whether each group loses the same share."""
        return self.scope == "layer" or self.structure.one_group

    def left(self, model: Outline) -> list[int | None]:
        """How many units each group has afterwards; `None` where only the scores of a run decide that.

        Raises:
            UserError: the ratio does not leave the least number of units in each.
        """
        before = self.structure.counts(model)
        if self._apart:
            return [None if count is None else count - self._gone([count]) for count in before]
        known = [count for count in before if count is not None]
        return [None] * len(before) if len(known) < len(before) or self._gone(known) else before

    def _gone(self, counts: Sequence[int]) -> int:
        """How many units go of groups that are ranked together; of several groups, before they are rounded."""
        total, structure = sum(counts), self.structure
        gone = removal_count(total, self.ratio)
        if gone > total - structure.least * len(counts):
            layers = f"all {len(counts)} layers" if len(counts) > 1 else "every layer"
            raise UserError(
                f"{self.key}: expected one that leaves {structure.least} of the {structure.what}"
                f"{'' if structure.one_group else f' in {layers}'}, given {self.ratio} of {total}"
            )
        return rounded(total, gone, structure.multiple) if len(counts) == 1 else gone

    def check_removes(self, counts: Sequence[int]) -> list[str]:
        """A note where a ratio above 0 removes nothing of groups with so many units."""
        what = self.structure.what
        each = counts if self._apart else [sum(counts)]
        asked = [removal_count(count, self.ratio) for count in each]
        if self.ratio == 0 or (not self._apart and any(asked)):
            return []
        if not any(asked):
            more = f" for every layer ({what}: {list(counts)}); scope=global may remove some"
            more = more if self.scope == "layer" else ""
            return [f"{self.key} {self.ratio} removes nothing: int({self.key} x {what}) is 0{more}"]
        if not any(rounded(count, gone, self.structure.multiple) for count, gone in zip(each, asked, strict=True)):
            return [
                f"{self.key} {self.ratio} removes nothing: {what} are left in multiples of {self.structure.multiple}"
            ]
        return []

    def says(self, rounds_gone: Sequence[Tensor]) -> str:
        """A note that says how much is gone, from the round in which each unit was removed, or 0."""
        counts = [len(group) for group in rounds_gone]
        each = counts if self._apart else [sum(counts)]
        return went(self.structure, rounds_gone, sum(removal_count(count, self.ratio) for count in each))


class ByRatio(Amount):
    """Removes a share of the units that each structure has at the start.

    Args:
        shares: one for each structure.
        rounds: in how many rounds they are removed.
        schedule: how many in which round, as in [`round_targets`][edgemin.pruning.selection.round_targets].
    """

    idle = ("target",)

    def __init__(self, shares: Sequence[Share], rounds: int, schedule: Schedule) -> None:
        self.shares, self.rounds, self.schedule = list(shares), rounds, schedule
        self.structures = [share.structure for share in self.shares]
        self._initial: list[list[int]] = []

    def after(self, model: Outline, latency: LatencyTable | None) -> Outline:
        """What the ratio leaves of each group; not known of several groups that are ranked together."""
        for share in self.shares:
            model = share.structure.shaped(model, share.left(model))
        return model

    def start(self, model: Outline) -> list[str]:
        """Remember how many units there are: the ratio is a share of them."""
        for share in self.shares:
            share.left(model)  # refuses what planning could not, as it did not know the counts
        self._initial = [[count or 0 for count in structure.counts(model)] for structure in self.structures]
        pairs = zip(self.shares, self._initial, strict=True)
        return [note for share, counts in pairs for note in share.check_removes(counts)]

    def weighed(self, criterion: Criterion, scores: Scores) -> list[list[Tensor]]:
        """The scores as the criterion ranks them for a ratio."""
        return [criterion.ranked(list(groups)) for groups in scores]

    def removed(self, model: Outline, weighed: Scores, completed_rounds: int) -> list[list[int]]:
        """The least important units of each group, or of all groups together."""
        gone: list[list[int]] = []
        for share, scores, initial in zip(self.shares, weighed, self._initial, strict=True):
            gone += select_units(
                scores,
                share.ratio,
                share.scope,
                what=share.structure.what,
                minimum=share.structure.least,
                multiple=share.structure.multiple,
                initial=initial,
                completed_rounds=completed_rounds,
                rounds=self.rounds,
                schedule=self.schedule,
            )
        return gone

    def says(self, model: Outline, rounds_gone: Scores) -> list[str]:
        """A note for each structure."""
        return [share.says(gone) for share, gone in zip(self.shares, rounds_gone, strict=True)]


def structures(structure: Removable, multiple: int | None) -> list[Structure]:
    """The structures that `prune.structure` names; `multiple` is that of FFN and hidden units, `None` the default.

    Raises:
        UserError: a multiple for heads or layers, of which any number is as good.
    """
    if multiple is not None and structure in ("heads", "layers"):
        raise UserError(f"multiple: expected null for {structure}, of which any number is as good, given {multiple}")
    of_units = multiple or MULTIPLE
    made: dict[str, Structure] = {
        "heads": Heads(),
        "ffn": Ffn(of_units),
        "layers": Layers(),
        "hidden": Hidden(of_units),
    }
    return [made[structure]] if structure in made else [made["heads"], made["ffn"]]


def shares(found: Sequence[Structure], ratio: float, ffn_ratio: float | None, scope: str) -> list[Share]:
    """Each structure with its ratio; `ffn_ratio` is that of the second structure, `None` gives it `ratio`.

    Raises:
        UserError: a setting that these structures do not have.
    """
    first, *others = found
    if ffn_ratio is not None and not others:
        raise UserError(f"ffn_ratio: expected null but for heads_ffn, given {ffn_ratio} for {first.name}; set ratio")
    if first.one_group and scope == "layer":
        raise UserError(f"scope: expected global for {first.what}, which are ranked together, given layer")
    of_ffn = (ratio, "ratio") if ffn_ratio is None else (ffn_ratio, "ffn_ratio")
    return [Share(first, ratio, "ratio", scope), *(Share(other, *of_ffn, scope) for other in others)]
