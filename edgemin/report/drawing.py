"""What all figures share: their look, and how they become files."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib
from matplotlib import rcParamsDefault
from matplotlib.figure import Figure

_STYLE: Mapping[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.labelcolor": "#222222",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "svg.hashsalt": "edgemin",
    "svg.fonttype": "path",
}
DPI = 200


class Drawing(NamedTuple):
    """A figure's file stem and its bytes by suffix."""

    name: str
    files: dict[str, bytes]


@contextmanager
def style() -> Iterator[None]:
    """The look of all figures, whatever the user's matplotlibrc says."""
    with matplotlib.rc_context(rcParamsDefault):
        matplotlib.rcParams.update(_STYLE)
        yield


def saved(figure: Figure, kind: str) -> bytes:
    """The figure as `png` or `svg`, without dates and versions, so that equal figures are equal bytes."""
    data = io.BytesIO()
    metadata = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    figure.savefig(data, format=kind, dpi=DPI, metadata=metadata)
    return data.getvalue()


def literal(name: str) -> str:
    """The name, written so that matplotlib does not take it for mathematics."""
    return name.replace("$", r"\$")
