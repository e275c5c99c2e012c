"""What all figures share: their look, and how they become files."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib
from matplotlib import rcParamsDefault
from matplotlib.figure import Figure

from edgemin.report.fold import Statistic

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


BARS = "bars: 95 % intervals"
"""What the bars that `ends` gives stand for."""


def ends(value: Statistic) -> tuple[float, float] | None:
    """Where the bar of a folded number begins and ends; None where it has none."""
    if value.low is None or value.high is None:
        return None
    return min(value.low, value.mean), max(value.high, value.mean)  # of a perfect score, rounding may leave it outside


def fitted(figure: Figure, text: str, inches: float, **font: Any) -> str:
    """A text broken into lines that are no wider than this many inches, whatever stands in it."""

    def width(line: str) -> float:
        drawn = figure.text(0, 0, literal(line), **font)
        found: float = drawn.get_window_extent().width / figure.dpi
        drawn.remove()
        return found

    lines: list[str] = []
    for line in text.split("\n"):
        shown, room = [line], len(line)
        while max(map(width, shown)) > inches and room > 1:
            room -= 1
            shown = textwrap.wrap(line, room)
        lines += shown
    return "\n".join(lines)


def headline(figure: Figure, title: str) -> None:
    """Writes a title at the top of a figure that leaves 0.35 inches for it: smaller where it takes two lines."""
    wide = 0.96 * figure.get_figwidth()
    one = fitted(figure, title, wide, fontsize=10, fontweight="bold")
    size = 10 if "\n" not in one else 7.5
    shown = one if size == 10 else fitted(figure, title, wide, fontsize=size, fontweight="bold")
    place = 1 - 0.2 / figure.get_figheight()
    figure.text(0.02, place, literal(shown), fontsize=size, fontweight="bold", va="center", linespacing=1.1)


def literal(name: str) -> str:
    """The name, written so that matplotlib does not take it for mathematics."""
    return name.replace("$", r"\$")
