"""The weights of the terms of a loss, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping

from edgemin.errors import UserError


def check_weight(key: str, weight: float) -> None:
    """Refuse a weight that is negative or not finite.

    Args:
        key: the setting to name.
        weight: its value.

    Raises:
        UserError: it is below 0, infinite or not a number.
    """
    if not 0 <= weight < math.inf:
        raise UserError(f"{key}: expected a number of at least 0, given {weight}")


def check_term_weights(weights: Mapping[str, float]) -> None:
    """Refuse the first such weight of terms by name, each set by `<name>_weight`."""
    for name, weight in weights.items():
        check_weight(f"{name}_weight", weight)
