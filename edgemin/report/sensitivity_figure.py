"""The sensitivity figure: a line per layer, a mark per bits on a logarithmic axis of damage, the chosen bits filled."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from edgemin.report.drawing import Drawing, headline, literal, saved, style
from edgemin.report.fold import Study
from edgemin.report.sensitivity import Layer, Sensitivity, found

# Okabe and Ito's colours again, and a shape for each: most bits first.
_LOOKS = (("o", "#0072B2"), ("s", "#E69F00"), ("^", "#CC3311"), ("D", "#009E73"), ("v", "#CC79A7"), ("P", "#56B4E9"))
_WIDTH = 7.0
_LINE = 0.15
"""Inches from one layer to the next."""
_ABOVE, _BELOW = 0.85, 0.65
_DECADES = 8
"""Damage below the greatest by more than this is drawn at the left edge."""
_EDGE = 1.6
"""The left edge lies below the least damage by at least this factor."""


def sensitivities(study: Study) -> list[Drawing]:
    """Draws a figure for every row that has sensitivities: `sensitivity`, or `sensitivity_1` ... for several."""
    every = [one for one in found(study) if any(layer.damage for layer in one.layers)]
    made = []
    for number, one in enumerate(every, 1):
        labels = ", ".join(f"{key}={label}" for key, label in zip(study.keys, one.labels, strict=True))
        with style():
            figure = draw(one, f"Sensitivity of {one.name}{f' ({labels})' if labels else ''}")
            name = "sensitivity" if len(every) == 1 else f"sensitivity_{number}"
            made.append(Drawing(name, {kind: saved(figure, kind) for kind in ("png", "svg")}))
    return made


def draw(shown: Sensitivity, title: str) -> Figure:
    """Draws one figure; call it inside `style`.

    Args:
        shown: the layers, of which at least one has a damage.
        title: what stands above it.
    """
    height = _ABOVE + _BELOW + _LINE * len(shown.layers)
    figure = Figure(figsize=(_WIDTH, height), dpi=200)
    FigureCanvasAgg(figure)
    names = _short([layer.name for layer in shown.layers])
    left = min(0.052 * max(map(len, names)) + 0.1, 0.5 * _WIDTH) / _WIDTH
    axes = figure.add_axes((left, _BELOW / height, 0.92 - left, 1 - (_ABOVE + _BELOW) / height))
    looks = {bits: _LOOKS[number % len(_LOOKS)] for number, bits in enumerate(shown.candidates)}
    floor = _floor(shown.layers)
    _bands(axes, shown.layers)
    for number, layer in enumerate(shown.layers):
        _layer(axes, number, layer, looks, floor)
    _axes(axes, shown, names, floor)
    headline(figure, title)
    _legend(figure, axes, looks, height)
    every = [value for layer in shown.layers for value in layer.damage.values()]
    remarks = [f"mean over {shown.seeds} seeds"] if shown.seeds > 1 else []
    remarks += ["◂ at the left edge: less than the axis shows"] if any(value.mean < floor for value in every) else []
    figure.text(0.98, 0.1 / height, "; ".join(remarks), ha="right", fontsize=6.5, color="#666666")
    return figure


def _floor(layers: Sequence[Layer]) -> float:
    """The least damage that is drawn where it is; zero has no place on a logarithmic axis."""
    values = [value.mean for layer in layers for value in layer.damage.values() if value.mean > 0]
    return max(min(values), max(values) * 10.0**-_DECADES) if values else 1e-9


def _layer(axes: Axes, number: int, layer: Layer, looks: dict[int, tuple[str, str]], floor: float) -> None:
    """The marks of one layer on a thin line; the bits that any seed chose are filled, and repeated at the right."""
    places = {bits: value.mean if value.mean >= floor else floor / _EDGE for bits, value in layer.damage.items()}
    if places:
        axes.plot([min(places.values()), max(places.values())], [number] * 2, color="#b8b8b8", linewidth=0.7, zorder=2)
    for bits, place in places.items():
        marker, colour = looks[bits]
        chosen = bits in layer.chosen
        cut = layer.damage[bits].mean < floor
        axes.plot(
            place,
            number,
            marker="<" if cut else marker,
            markersize=5.2 if chosen else 4.0,
            markerfacecolor=colour if chosen else "white",
            markeredgecolor=colour,
            markeredgewidth=0.9,
            linestyle="none",
            clip_on=False,
            zorder=4 if chosen else 3,
            gid="chosen" if chosen else "tried",
        )
    colour = looks[next(iter(layer.chosen))][1] if set(layer.chosen) & set(looks) else "#444444"
    axes.annotate(
        "/".join(map(str, sorted(layer.chosen, reverse=True))) or "-",
        xy=(1, number),
        xycoords=("axes fraction", "data"),
        xytext=(9, 0),
        textcoords="offset points",
        va="center",
        fontsize=6.5,
        color=colour,
        fontweight="bold",
        gid="bits",
    )


def _bands(axes: Axes, layers: Sequence[Layer]) -> None:
    """A grey band behind every other block, so that the eye finds its line."""
    for number, (first, last) in enumerate(_blocks(layers)):
        if number % 2:
            axes.axhspan(first - 0.5, last + 0.5, color="#f3f3f3", linewidth=0, zorder=0)


def _blocks(layers: Sequence[Layer]) -> Iterator[tuple[int, int]]:
    """The first and the last layer of each of the encoder's blocks, and of what stands outside of them."""
    numbers = [next(iter(re.findall(r"\.(\d+)\.", layer.name)), "") for layer in layers]
    first = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[first]:
            yield first, place - 1
            first = place


def _axes(axes: Axes, shown: Sensitivity, names: Sequence[str], floor: float) -> None:
    top = max(value.mean for layer in shown.layers for value in layer.damage.values())
    top = max(top, floor)
    room = max((top / floor) ** 0.04, 1.3)
    axes.set_xscale("log")
    axes.set_xlim(floor / max(room, _EDGE), top * room)
    decades = math.log10(top / floor)
    subs = (1.0,) if decades > 2 else (1.0, 2.0, 5.0)
    axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    what = "mean squared difference of outputs" if shown.squared else "mean KL, nats"
    axes.set_xlabel(f"damage of this layer alone quantized ({what}; logarithmic)", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), [literal(name) for name in names], fontsize=6.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def _legend(figure: Figure, axes: Axes, looks: dict[int, tuple[str, str]], height: float) -> None:
    def mark(marker: str, colour: str, filled: bool, label: str) -> Line2D:
        face = colour if filled else "white"
        return Line2D(
            [], [], marker=marker, linestyle="none", markersize=5, color=colour, markerfacecolor=face, label=label
        )

    marks = [mark(marker, colour, False, f"{bits} bits") for bits, (marker, colour) in looks.items()]
    marks.append(mark("o", "#444444", True, "filled: chosen"))
    figure.legend(
        handles=marks,
        loc="center left",
        bbox_to_anchor=(0.012, 1 - 0.46 / height),
        ncols=len(marks),
        frameon=False,
        fontsize=7.5,
        handletextpad=0.1,
        columnspacing=1.2,
    )
    axes.annotate(
        "bits",
        xy=(1, 1),
        xycoords="axes fraction",
        xytext=(9, 4),
        textcoords="offset points",
        va="bottom",
        fontsize=6.5,
        color="#444444",
    )


def _short(names: Sequence[str]) -> list[str]:
    """The names without the modules that all of them lie in, but for those that lie in none (a classifier)."""
    paths = [name.split(".")[:-1] for name in names]
    inside = [path for path in paths if path]
    depth = 0
    while inside and all(depth < len(path) and path[depth] == inside[0][depth] for path in inside):
        depth += 1
    return [name.split(".", depth)[-1] if path else name for name, path in zip(names, paths, strict=True)]
