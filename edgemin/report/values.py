"""The types of the numbers and texts that the report reads: each with its bounds."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator

Text = str | None
_Check = Callable[[Any], bool]


def refuse_unless(fits: _Check, expected: str) -> AfterValidator:
    """A check of a value that says what was expected."""

    def check(value: Any) -> Any:
        if not fits(value):
            raise ValueError(expected)
        return value

    return AfterValidator(check)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# NaN and infinity are not refused: what they stand in place of is not known, and not shown.
Bounded = Annotated[float, refuse_unless(lambda value: not 1e30 < abs(value) < math.inf, "a number below 1e30")]
_NotTiny = refuse_unless(lambda value: value == 0 or not value < 1e-12, "0 or a number above 1e-12")
_Positive = refuse_unless(lambda value: not value < 1e-12, "a number above 1e-12")
Number = Annotated[Bounded | None, AfterValidator(_finite)]
Cost = Annotated[Annotated[Bounded, _NotTiny] | None, AfterValidator(_finite)]
Time = Annotated[Annotated[Bounded, _Positive] | None, AfterValidator(_finite)]
Count = Annotated[int, refuse_unless(lambda value: value >= 1, "a whole number of at least 1")]
Metrics = dict[str, dict[str, dict[str, Number]]]  # by task, split and name
Pair = Annotated[list[str], refuse_unless(lambda value: len(value) == 2, "the names of two rows")]
Bits = Annotated[str, refuse_unless(lambda value: re.fullmatch("[0-9]{1,2}", value) is not None, "bits as names")]
