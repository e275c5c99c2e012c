"""Between which of some values the median of all such values lies."""

from __future__ import annotations

import math
from collections.abc import Sequence


def around_median(values: Sequence[float]) -> Sequence[float]:
    """Those values between which the median of all such values lies with a probability of at least 94 %, in order.

    Each value lies on either side of that median with equal chance, so it is as surely within all of five. Of up to
    eight values they are all, of 9 all but one on either side, of 12 all but two, of 15 all but three.
    """
    ordered, count, outer = sorted(values), len(values), 0  # outer: how many are left out on either side
    while sum(math.comb(count, few) for few in range(outer + 2)) / 2**count <= 1 / 2**5:
        outer += 1
    return ordered[outer : count - outer]
