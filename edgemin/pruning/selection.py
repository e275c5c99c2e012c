"""Which heads go: the ratio's arithmetic, and the choice among heads by importance.

Layers and heads count from 0 here. "At the start" means before the first round of pruning: every ratio is a
ratio of that count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from edgemin.errors import UserError

SCOPES = ("global", "layer")

_ROUNDING = 1e-9
"""More than float64 loses in a product (0.29 * 100 is 28.999999999999996), less than any ratio that someone writes."""


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


def round_targets(count: int, ratio: float, rounds: int) -> list[int]:
    """How many of `count` are gone after each round, in steps as equal as whole numbers allow.

    The last is exactly `removal_count(count, ratio)`: `round_targets(144, 0.2, 4)` is `[7, 14, 21, 28]`. With more
    rounds than removals some rounds remove nothing.

    Raises:
        UserError: `ratio` is not in [0, 1), or `rounds` is below 1.
    """
    if rounds < 1:
        raise UserError(f"rounds: expected at least 1, given {rounds}")
    total = removal_count(count, ratio)
    return [total * done // rounds for done in range(1, rounds + 1)]


def select_heads(
    importance: Sequence[Tensor],
    ratio: float,
    scope: str,
    *,
    minimum: int = 1,
    initial: Sequence[int] | None = None,
    completed_rounds: int = 0,
    rounds: int = 1,
) -> list[list[int]]:
    """The heads to remove now, least important first.

    With scope `layer` each layer loses `int(ratio x heads)` of the heads it had at the start; with `global` the whole
    encoder loses `int(ratio x all heads)`, wherever importance is lowest. A layer that is down to `minimum` heads loses
    no more: the next candidates of other layers go instead. Among heads of equal importance the lower layer goes first,
    then the lower head. Ratio 0 removes nothing, and a ratio near 1 leaves `minimum` heads a layer or is refused.

    In rounds, give the counts at the start, and after each round the importance of the heads that are left:
    each call removes what is missing to `round_targets`. With importance that never changes, any number of
    rounds removes the same heads.

    Args:
        importance: one `[A_l]` per layer, of the heads that are there now.
        ratio: share of the heads at the start to be gone after the last round, in [0, 1).
        scope: `global` or `layer`.
        minimum: heads that each layer keeps.
        initial: heads of each layer at the start; as many as there are now if not given.
        completed_rounds: rounds done before this one.
        rounds: rounds in all.

    Returns:
        For each layer the heads to remove, ascending, indices into its `importance`.

    Raises:
        UserError: ratio, scope, minimum or rounds out of range, an importance that is not a finite number, or
            a ratio that cannot be reached with `minimum` heads left in each layer.
    """
    if scope not in SCOPES:
        raise UserError(f"scope: expected one of {', '.join(SCOPES)}, given {scope!r}")
    if minimum < 1:
        raise UserError(f"minimum: expected at least 1 head per layer, given {minimum}")
    assert completed_rounds >= 0
    scores = [layer.tolist() for layer in importance]
    _check_finite(scores)
    present = [len(layer) for layer in scores]
    start = present if initial is None else list(initial)
    assert len(start) == len(present) and all(now <= before for now, before in zip(present, start, strict=True))
    spare = [max(0, now - minimum) for now in present]
    every_layer = range(len(scores))
    removed: list[list[int]] = []
    for group in [every_layer] if scope == "global" else [range(layer, layer + 1) for layer in every_layer]:
        before = sum(start[layer] for layer in group)
        gone = before - sum(present[layer] for layer in group)
        wanted = round_targets(before, ratio, rounds)[completed_rounds] - gone
        if wanted > sum(spare[layer] for layer in group):
            raise UserError(
                f"ratio: expected one that leaves {minimum} of the heads of every layer, given {ratio}: "
                f"{gone + wanted} of {before} to remove, {gone + sum(spare[layer] for layer in group)} can go"
            )
        removed += _lowest(scores, group, wanted, spare)
    return removed


def _lowest(scores: list[list[float]], group: range, wanted: int, spare: list[int]) -> list[list[int]]:
    """The `wanted` least important heads of a group of layers, from each layer at most as many as it can spare."""
    candidates = [(score, layer, head) for layer in group for head, score in enumerate(scores[layer])]
    chosen: dict[int, list[int]] = {layer: [] for layer in group}
    for _, place, head in sorted(candidates):
        if wanted > 0 and len(chosen[place]) < spare[place]:
            chosen[place].append(head)
            wanted -= 1
    return [sorted(heads) for heads in chosen.values()]


def _check_finite(scores: list[list[float]]) -> None:
    for layer, row in enumerate(scores, start=1):
        for score in row:
            if not math.isfinite(score):
                raise UserError(f"importance: expected finite numbers, given {score} in layer {layer}")
