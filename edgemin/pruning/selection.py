"""Which units go: the ratio's arithmetic, and the choice among units by importance.

Groups and units count from 0 here. "At the start" means before the first round of pruning: every ratio is a
ratio of that count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from edgemin.errors import UserError

SCOPES = ("global", "layer")
Schedule = Literal["linear", "cubic"]

_ROUNDING = 1e-9
"""More than a product loses in float64 (0.29 * 100 is 28.999999999999996), too little to matter for any real ratio."""


def removal_count(count: int, ratio: float) -> int:
    """`int(ratio x count)` as on paper: `floor(ratio * count + 1e-9)`.

    0.2 of 144 is 28, and 0.29 of 100 is 29, which plain `int` makes 28.

    Raises:
        UserError: `ratio` is not in [0, 1).
    """
    assert count >= 0
    if not 0 <= ratio < 1:
        raise UserError(f"ratio: expected a number in [0, 1), given {ratio}")
    return math.floor(ratio * count + _ROUNDING)


def round_targets(count: int, ratio: float, rounds: int, schedule: Schedule = "linear") -> list[int]:
    """How many of `count` are gone after each round.

    `linear` takes steps as equal as whole numbers allow: `round_targets(144, 0.2, 4)` is `[7, 14, 21, 28]`. `cubic`
    removes most at first, where units are redundant: after t of n rounds the share s (1 - (1 - t/n)^3) is gone (Zhu and
    Gupta 2017, arXiv 1710.01878). The last is exactly `removal_count(count, ratio)`. With more rounds than removals
    some rounds remove nothing.

    Raises:
        UserError: `ratio` is not in [0, 1), or `rounds` is below 1.
    """
    if rounds < 1:
        raise UserError(f"rounds: expected at least 1, given {rounds}")
    total = removal_count(count, ratio)
    if schedule == "linear":
        return [total * done // rounds for done in range(1, rounds + 1)]
    return [total * (rounds**3 - (rounds - done) ** 3) // rounds**3 for done in range(1, rounds + 1)]


def select_units(
    importance: Sequence[Tensor],
    ratio: float,
    scope: str,
    *,
    what: str = "heads",
    minimum: int = 1,
    multiple: int = 1,
    initial: Sequence[int] | None = None,
    completed_rounds: int = 0,
    rounds: int = 1,
    schedule: Schedule = "linear",
) -> list[list[int]]:
    """The units to remove now, least important first.

    With scope `layer` each group, such as a layer's heads, loses `int(ratio x units)` of the units it had at the start;
    with `global` all groups together lose `int(ratio x all units)`, wherever importance is lowest. A group that is down
    to `minimum` units loses no more: the next candidates of other groups go instead. Among units of equal importance
    that of the lower group goes first, then the lower unit. Ratio 0 removes nothing, and a ratio near 1 leaves
    `minimum` units a group or is refused. Where the number left has to be a `multiple`, it is rounded up to one: the
    most important of those to be removed stay.

    In rounds, give the counts at the start, and after each round the importance of the units that are left: each call
    removes what is missing to `round_targets`. With importance that never changes, and multiple 1, any number of rounds
    removes the same units.

    Args:
        importance: one `[U_g]` per group, of the units that are there now.
        ratio: share of the units at the start to be gone after the last round, in [0, 1).
        scope: `global` or `layer`.
        what: the units, in messages.
        minimum: units that each group keeps.
        multiple: a group that loses units keeps a number of them that is rounded up to a multiple of this.
        initial: units of each group at the start; as many as there are now if not given.
        completed_rounds: rounds done before this one.
        rounds: rounds in all.
        schedule: `linear` or `cubic`.

    Returns:
        For each group the units to remove, ascending, indices into its `importance`.

    Raises:
        UserError: ratio, scope, minimum or rounds out of range, an importance that is not a finite number, or
            a ratio that cannot be reached with `minimum` units left in each group.
    """
    if scope not in SCOPES:
        raise UserError(f"scope: expected one of {', '.join(SCOPES)}, given {scope!r}")
    if minimum < 1:
        raise UserError(f"minimum: expected at least 1 unit per layer, given {minimum}")
    assert completed_rounds >= 0
    scores = [group.tolist() for group in importance]
    _check_finite(scores)
    present = [len(group) for group in scores]
    start = present if initial is None else list(initial)
    assert len(start) == len(present) and all(now <= before for now, before in zip(present, start, strict=True))
    spare = [max(0, now - minimum) for now in present]
    every = range(len(scores))
    removed: list[list[int]] = []
    for ranked in [every] if scope == "global" else [range(group, group + 1) for group in every]:
        before = sum(start[group] for group in ranked)
        gone = before - sum(present[group] for group in ranked)
        wanted = round_targets(before, ratio, rounds, schedule)[completed_rounds] - gone
        if wanted > sum(spare[group] for group in ranked):
            raise UserError(
                f"ratio: expected one that leaves {minimum} of the {what} of every layer, given {ratio}: "
                f"{gone + wanted} of {before} to remove, {gone + sum(spare[group] for group in ranked)} can go"
            )
        removed += _lowest(scores, ranked, wanted, spare, multiple)
    return removed


def gone_after(done: int, rounds: int, schedule: Schedule) -> float:
    """The share of all removals that is done after `done` rounds, on the schedules of `round_targets`."""
    left = 1 - done / rounds
    return 1 - (left if schedule == "linear" else left**3)


def least_important(importance: Sequence[Tensor], keep: Sequence[int]) -> list[list[int]]:
    """The units of each group to remove so that `keep` of them stay: ascending; among equals the lower one goes.

    Raises:
        UserError: an importance that is not a finite number.
    """
    scores = [group.tolist() for group in importance]
    _check_finite(scores)
    return [
        sorted(sorted(range(len(row)), key=row.__getitem__)[: len(row) - kept])
        for row, kept in zip(scores, keep, strict=True)
    ]


def rounded(present: int, gone: int, multiple: int) -> int:
    """How many of `gone` units to remove from `present` ones if the number left is rounded up to a multiple."""
    return max(0, present - -(-(present - gone) // multiple) * multiple)


def others(units: Sequence[Sequence[int]], counts: Sequence[int]) -> list[list[int]]:
    """For each group all units but the given ones, ascending; `counts` says how many units it has."""
    return [sorted({*range(count)} - {*own}) for own, count in zip(units, counts, strict=True)]


def _lowest(scores: list[list[float]], ranked: range, wanted: int, spare: list[int], multiple: int) -> list[list[int]]:
    """The `wanted` least important units of some groups, from each at most as many as it can spare."""
    candidates = [(score, group, unit) for group in ranked for unit, score in enumerate(scores[group])]
    chosen: dict[int, list[int]] = {group: [] for group in ranked}
    for _, group, unit in sorted(candidates):
        if wanted > 0 and len(chosen[group]) < spare[group]:
            chosen[group].append(unit)
            wanted -= 1
    return [sorted(units[: rounded(len(scores[group]), len(units), multiple)]) for group, units in chosen.items()]


def _check_finite(scores: list[list[float]]) -> None:
    for group, row in enumerate(scores, start=1):
        for score in row:
            if not math.isfinite(score):
                raise UserError(f"importance: expected finite numbers, given {score} in layer {group}")
