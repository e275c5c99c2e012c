"""How long a model would take, by a table of its parts: what a stage that is to reach a latency reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgemin.encoder.outline import Outline


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
    """

    heads_ms: Mapping[int, float]
    ffn_ms: Mapping[int, float]
    rest_ms: float
    runtime: str
    precision: str
    threads: int

    def ms(self, outline: Outline) -> float:
        """What a model takes, the sum of its parts; between two measured widths on the line that connects them."""
        layers = outline.layers
        attention = sum(_between(self.heads_ms, layer.heads) for layer in layers)
        return self.rest_ms + attention + sum(_between(self.ffn_ms, layer.ffn) for layer in layers)


def _between(measured: Mapping[int, float], kept: int | None) -> float:
    widths = sorted(measured)
    assert kept is not None and widths[0] <= kept <= widths[-1], f"{kept} is outside of what was measured, {widths}"
    return float(np.interp(kept, widths, [measured[width] for width in widths]))
