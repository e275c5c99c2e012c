"""A structure with the share of it that goes: what is left by planning's arithmetic, and how it is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from edgemin.encoder.outline import Outline
from edgemin.errors import UserError
from edgemin.pruning.selection import removal_count, rounded
from edgemin.pruning.structures import MULTIPLE, Ffn, Heads, Hidden, Layers, Structure

Removable = Literal["heads", "ffn", "heads_ffn", "layers", "hidden"]


class Share(NamedTuple):
    """A structure, and how much of it goes.

    Attributes:
        structure: of which units are removed.
        ratio: the share, in [0, 1).
        key: of the ratio, for messages.
        scope: `layer`, of each group, or `global`, of all groups together.
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
        """How many units each group has afterwards; `None` where that is seen when it runs.

        Raises:
            UserError: the ratio does not leave some in each.
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
        """How much is gone, of groups whose units have the round in which they went, or 0."""
        structure, counts = self.structure, [len(group) for group in rounds_gone]
        left = [int((group == 0).sum()) for group in rounds_gone]
        gone, total = sum(counts) - sum(left), sum(counts)
        each = counts if self._apart else [total]
        asked = sum(removal_count(count, self.ratio) for count in each)
        fewer = f" (not {asked}: {structure.multiple} are kept at a time)" if gone < asked else ""
        if structure.name == "layers":
            kept = ", ".join(str(number) for number, when in enumerate(rounds_gone[0].tolist(), start=1) if not when)
            return f"removed {gone} of {total} layers; left: {kept}"
        where = f"; left: {left[0]}" if structure.one_group else f"; left per layer: {left}"
        return f"removed {gone} of {total} {structure.what}{fewer}{where}"


def shares(
    structure: Removable, ratio: float, ffn_ratio: float | None, multiple: int | None, scope: str
) -> list[Share]:
    """What `prune=` names, each structure with its ratio.

    Raises:
        UserError: a setting that this structure does not have.
    """
    if ffn_ratio is not None and structure != "heads_ffn":
        raise UserError(f"ffn_ratio: expected null but for heads_ffn, given {ffn_ratio} for {structure}; set ratio")
    if multiple is not None and structure in ("heads", "layers"):
        raise UserError(f"multiple: expected null for {structure}, of which any number is as good, given {multiple}")
    of_units = multiple or MULTIPLE
    made: dict[str, Structure] = {
        "heads": Heads(),
        "ffn": Ffn(of_units),
        "layers": Layers(),
        "hidden": Hidden(of_units),
    }
    if structure != "heads_ffn":
        found = made[structure]
        if found.one_group and scope == "layer":
            raise UserError(f"scope: expected global for {found.what}, which are ranked together, given layer")
        return [Share(found, ratio, "ratio", scope)]
    of_ffn = (ratio, "ratio") if ffn_ratio is None else (ffn_ratio, "ffn_ratio")
    return [Share(made["heads"], ratio, "ratio", scope), Share(made["ffn"], *of_ffn, scope)]
