"""Linear maps from a student's hidden states to its teacher's width, learnt beside it, and what they begin with.

Between equal widths a map begins as the identity: a student cut from its teacher has its coordinates already. Between
different widths it begins as the best map there is for the student as it is, by ridge regression on some sentences:

    W = argmin Σ_l Σ_t ‖W h_S,l,t - h_T,g(l),t‖² + λ ‖W‖²,    λ a thousandth of the student's mean square

over the tokens t and the matched states l that the map serves. A map of random entries would take thousands of steps
to become as good, as a step of AdamW moves an entry by about the learning rate, and meanwhile teach the student noise.

Shapes: B batch, T tokens, Hs and Ht hidden sizes of student and teacher.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from edgemin.encoder.taps import Reading

_RIDGE = 1e-3


class Projection(NamedTuple):
    """A learnt map of hidden states.

    Attributes:
        linear: from the student's width to the teacher's, without a bias.
        pairs: the states that it is for: after so many layers of the student, and of the teacher.
    """

    linear: nn.Linear
    pairs: tuple[tuple[int, int], ...]


def asked(projections: Sequence[Projection]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The hidden states of student and teacher that `start` has to see: none where widths are equal."""
    pairs = [pair for linear, pairs in projections if linear.in_features != linear.out_features for pair in pairs]
    return tuple(sorted({mine for mine, _ in pairs})), tuple(sorted({theirs for _, theirs in pairs}))


def start(projections: Sequence[Projection], readings: Iterable[tuple[Reading, Reading, Tensor]]) -> None:
    """Give maps what they begin with (above).

    Args:
        projections: changed in place.
        readings: of student and teacher, with the mask `[B, T]`; looked at only where widths differ.
    """
    sums = {}
    for index, (linear, _) in enumerate(projections):
        if linear.in_features == linear.out_features:
            nn.init.eye_(linear.weight)
        else:
            size = (linear.in_features, linear.in_features + linear.out_features)
            sums[index] = torch.zeros(size, dtype=torch.float64, device=linear.weight.device)
    if not sums:
        return
    for student, teacher, mask in readings:
        for index, total in sums.items():
            for mine, theirs in projections[index].pairs:
                inner, outer = (side[mask.bool()].to(total) for side in (student.hidden[mine], teacher.hidden[theirs]))
                total += inner.T @ torch.cat([inner, outer], dim=1)
    for index, total in sums.items():
        linear = projections[index].linear
        squares, products = total.split([linear.in_features, linear.out_features], dim=1)
        squares.diagonal().add_(_RIDGE * squares.diagonal().mean().clamp(min=torch.finfo(total.dtype).tiny))
        with torch.no_grad():
            linear.weight.copy_(torch.linalg.solve(squares, products).T)
