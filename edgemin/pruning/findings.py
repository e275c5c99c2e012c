"""What pruning found out besides the smaller model: scores, and when each unit went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

BINS = 24  # of scores, where there are too many units to list each
WHOLE = 64  # a structure lists each unit if no group of it has more than this


def rounds_gone(initial: Sequence[int], removed: Sequence[Sequence[Sequence[int]]]) -> list[Tensor]:
    """The round, from 1, in which each unit of each group was removed; 0 for one that is left.

    Args:
        initial: how many units each group had.
        removed: by round and group, indices among those that were left before that round.
    """
    found = [torch.zeros(count, dtype=torch.long) for count in initial]
    for number, groups in enumerate(removed, start=1):
        for group, units in zip(found, groups, strict=True):
            group[(group == 0).nonzero().flatten()[list(units)]] = number
    return found


def summary(criterion: str, scores: Sequence[Tensor], gone: Sequence[Tensor]) -> dict[str, Any]:
    """What run.json has of one structure: the scores of the first round, and the round in which units were removed.

    Where groups have many units: how many of each group are left and gone in each bin of the score. Bins are equally
    wide, on a logarithmic scale where all scores are above 0.

    Args:
        criterion: the name of what gave the scores.
        scores: `[U_g]` of each group.
        gone: as `rounds_gone` gives it.
    """
    if max(len(group) for group in scores) <= WHOLE:
        return {
            "criterion": criterion,
            "scores": [[_short(score) for score in group.tolist()] for group in scores],
            "gone": [group.tolist() for group in gone],
        }
    joined = torch.cat(list(scores)).double().numpy()
    least, most = float(joined.min()), float(joined.max())
    edges = np.geomspace(least, most, BINS + 1) if least > 0 else np.linspace(least, most, BINS + 1)
    edges[0], edges[-1] = least, most  # not a rounding above the least and below the most
    return {
        "criterion": criterion,
        "edges": [_short(edge) for edge in edges.tolist()],
        "left": [_counts(group[when == 0], edges) for group, when in zip(scores, gone, strict=True)],
        "gone": [_counts(group[when > 0], edges) for group, when in zip(scores, gone, strict=True)],
    }


def _counts(scores: Tensor, edges: Any) -> list[int]:
    found: list[int] = np.histogram(scores.double().numpy(), edges)[0].tolist()
    return found


def _short(score: float) -> float:
    return float(f"{score:.4g}")
