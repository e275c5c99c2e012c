"""How long a model would take, by a table of its parts: what a stage that is to reach a latency reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from edgemin.encoder.outline import Outline
from edgemin.errors import UserError

Precision = Literal["fp32", "int8", "int4"]  # of a deployed model


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of the parts of an encoder, as they were measured in one runtime.

    Attributes:
        heads_ms: of one layer's attention, by the heads that it keeps.
        ffn_ms: of one layer's feed-forward network, by the units that it keeps.
        rest_ms: of all that is outside the layers.
        runtime: in which they were measured.
        precision: of weights and activations there.
        threads: that it ran on.
        device: the processor that they were measured on.
        family: of the model.
        hidden: its H.
        joint_ms: how much less than the sum of both a layer saves that loses all of its heads and all of its FFN units;
            of one that loses some of both, the product of these shares of it.
    """

    heads_ms: Mapping[int, float]
    ffn_ms: Mapping[int, float]
    rest_ms: float
    runtime: str
    precision: str
    threads: int
    device: str
    family: str
    hidden: int
    joint_ms: float = 0.0

    def ms(self, outline: Outline) -> float:
        """What a model takes, the sum of its parts.

        Between two measured widths it lies on the line that connects them; fewer units than were measured take as long
        as the fewest that were.
        """
        found = self.rest_ms
        for layer in outline.layers:
            found += _between(self.heads_ms, layer.heads) + _between(self.ffn_ms, layer.ffn)
            found += self.joint_ms * _gone(self.heads_ms, layer.heads) * _gone(self.ffn_ms, layer.ffn)
        return found

    def check_fits(self, outline: Outline) -> None:
        """Refuse a model of other layers, or with more units in one than were measured.

        Raises:
            UserError: it is; the message says what was measured.
        """
        own, given = (self.family, self.hidden), (outline.family, outline.hidden)
        if own != given:
            raise UserError(
                f"target.measure: expected a model of family {own[0]} and hidden size {own[1]}, as the student starts "
                f"with and the latency table was measured for, given {given[0]} and {given[1]}"
            )
        for measured, name in ((self.heads_ms, "heads"), (self.ffn_ms, "ffn")):
            widest = max((getattr(layer, name) or 0 for layer in outline.layers), default=0)
            if widest > max(measured):
                what = "heads" if name == "heads" else "FFN units"
                raise UserError(
                    f"target.measure: expected at most {max(measured)} {what} in a layer, as many as the latency table "
                    f"goes up to, given a model with {widest}"
                )

    def written(self) -> dict[str, Any]:
        """The table as JSON can hold it, for `read`."""
        return asdict(self)

    @classmethod
    def read(cls, kept: Mapping[str, Any]) -> LatencyTable:
        """The table that `written` gave, after a way through JSON, which makes texts of the widths."""
        widths = {name: {int(width): ms for width, ms in kept[name].items()} for name in ("heads_ms", "ffn_ms")}
        return cls(**{**kept, **widths})


def _between(measured: Mapping[int, float], kept: int | None) -> float:
    widths = sorted(measured)
    assert kept is not None and kept <= widths[-1], f"{kept} is outside of what was measured, {widths}"
    return float(np.interp(kept, widths, [measured[width] for width in widths]))


def _gone(measured: Mapping[int, float], kept: int | None) -> float:
    """The share of the units that were there that a layer has lost."""
    assert kept is not None
    return 1 - kept / max(measured)
