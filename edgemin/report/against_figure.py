"""The figure "against its control": what each row differs by from its control and the row it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from edgemin.report.comparisons import Comparison
from edgemin.report.drawing import DPI, Drawing, fitted, headline, literal, saved, style
from edgemin.report.titles import metric_word

_WIDTH, _LEFT, _LINE, _GAP = 6.6, 2.5, 0.12, 0.1
"""Inches: of the figure, of the names, of a line of a name, from one pair to the next."""
_ABOVE, _BELOW = 0.72, 0.62
_NOISE, _WORSE, _BETTER = "#9a9a9a", "#D55E00", "#0072B2"
_FONT: dict[str, Any] = {"fontsize": 7.0}
_OTHERS = {"control": "its control", "parent": "its parent", "declared": "the row that the order compares it with"}


def against(compared: Sequence[Comparison]) -> list[Drawing]:
    """Draws `against`: every row less its controls and the row it was made from; none where nothing was compared."""
    shown = [one for one in compared if one.role != "teacher"]
    if not shown:
        return []
    with style():
        figure = draw(shown)
        return [Drawing("against", {kind: saved(figure, kind) for kind in ("png", "svg")})]


def draw(shown: Sequence[Comparison]) -> Figure:
    """Draws the figure; call it inside `style`.

    Args:
        shown: the pairs from top to bottom.
    """
    figure = Figure(figsize=(_WIDTH, _ABOVE + _BELOW), dpi=DPI)
    FigureCanvasAgg(figure)
    names = [fitted(figure, _name(one), _LEFT - 0.2, **_FONT) for one in shown]
    heights = [_GAP + _LINE * (1 + name.count("\n")) for name in names]
    places = [sum(heights[:number]) + heights[number] / 2 for number in range(len(shown))]
    height = _ABOVE + _BELOW + sum(heights)
    figure.set_size_inches(_WIDTH, height)
    axes = figure.add_axes(
        (_LEFT / _WIDTH, _BELOW / height, 0.97 - _LEFT / _WIDTH, 1 - (_ABOVE + _BELOW) / height),
    )
    margin = max(one.margin for one in shown)
    axes.axvspan(-100 * margin, 100 * margin, color="#eef3f7", linewidth=0, zorder=0)
    axes.axvline(0, color="#444444", linewidth=0.9, zorder=1)
    for place, one in zip(places, shown, strict=True):
        _pair(axes, place, one)
    every = [100 * end for one in shown for end in (-margin, margin, one.low, one.high, *one.differences)]
    room = 0.04 * (max(every) - min(every))
    axes.set_xlim(min(every) - room, max(every) + room)
    axes.set_ylim(sum(heights), 0)
    axes.set_yticks(places, [literal(name) for name in names], **_FONT)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    metrics = list(dict.fromkeys(one.metric for one in shown))
    words = " and ".join(map(metric_word, metrics))
    axes.set_xlabel(literal(f"difference of {words} (points)"), fontsize=8)
    roles = {one.role for one in shown}
    title = f"Each row against {' and '.join(said for role, said in _OTHERS.items() if role in roles)}: {words}"
    headline(figure, title)
    _legend(figure, shown, margin, height)
    return figure


def _pair(axes: Axes, place: float, one: Comparison) -> None:
    """The interval of a pair with its estimate, and below it the difference of every seed."""
    colour = _NOISE if one.is_noise else _BETTER if one.estimate > 0 else _WORSE
    axes.plot([100 * one.low, 100 * one.high], [place] * 2, color=colour, linewidth=1.6, zorder=2)
    if len(one.differences) > 1:
        values = [100 * value for value in one.differences]
        axes.plot(values, [place + 0.08] * len(values), ".", color=colour, markersize=3.5, zorder=3, gid="seed")
    axes.plot(100 * one.estimate, place, "o", color=colour, markersize=5.5, markeredgecolor="white", zorder=4)


def _name(one: Comparison) -> str:
    labels = f" ({', '.join(one.labels)})" if one.labels else ""
    return f"{one.row}{labels}\nless {one.other}"


def _legend(figure: Figure, shown: Sequence[Comparison], margin: float, height: float) -> None:
    """What the colours, the small dots and the band stand for; of the colours those that are there."""
    kinds = [
        (_BETTER, "better", any(not one.is_noise and one.estimate > 0 for one in shown)),
        (_WORSE, "worse", any(not one.is_noise and one.estimate <= 0 for one in shown)),
        (_NOISE, "within the noise", any(one.is_noise for one in shown)),
    ]
    handles: list[Line2D | Patch] = [
        Line2D([], [], marker="o", color=colour, markersize=5, linewidth=1.6, label=label)
        for colour, label, there in kinds
        if there
    ]
    if any(len(one.differences) > 1 for one in shown):
        handles.append(Line2D([], [], marker=".", linestyle="none", color="#444444", markersize=4, label="a seed"))
    handles.append(Patch(color="#dde7ef", label=f"margin, {100 * margin:g} point{'' if margin == 0.01 else 's'}"))
    where = (0.012, 1 - 0.45 / height)
    figure.legend(
        handles=handles, loc="center left", bbox_to_anchor=where, ncols=len(handles), frameon=False, fontsize=7
    )
    counts = sorted({one.examples for one in shown})
    examples = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    said = f"bars: 95 % intervals; {examples} examples; coloured: more than noise, corrected for the number of pairs"
    figure.text(0.98, 0.08 / height, said, ha="right", va="bottom", fontsize=6.5, color="#666666")
