"""What was removed: scores by layer and head as a heat map, those of FFN and hidden units as histograms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from edgemin.report.drawing import Drawing, literal, saved, style
from edgemin.report.entries import entries
from edgemin.report.findings import Pruned
from edgemin.report.fold import Study

_LEFT, _GONE = "#0072B2", "#E69F00"
_UNITS = {"heads": "head", "ffn": "FFN units", "layers": "layer", "hidden": "hidden units"}
_WIDTH, _ABOVE, _BETWEEN, _ROW, _BARS = 7.0, 0.55, 0.8, 0.22, 0.42


def prunings(study: Study) -> list[Drawing]:
    """Draws a figure for every row whose stage has removed something: `pruning`, or `pruning_1` ... for several."""
    every = []
    for entry in entries(study):
        line = next(iter(entry.lines.values())).first_of_each_seed
        if line.rows[0].findings.pruning:
            labels = ", ".join(f"{key}={label}" for key, label in zip(study.keys, entry.labels, strict=True))
            seeds = f"; the first of {len(line.rows)} seeds" if len(line.rows) > 1 else ""
            title = f"Scores of {entry.name}{f' ({labels})' if labels else ''}{seeds}"
            every.append((line.rows[0].findings.pruning, title))
    made = []
    for number, (found, title) in enumerate(every, 1):
        with style():
            figure = draw(found, title)
            name = "pruning" if len(every) == 1 else f"pruning_{number}"
            made.append(Drawing(name, {kind: saved(figure, kind) for kind in ("png", "svg")}))
    return made


def draw(found: Mapping[str, Pruned], title: str) -> Figure:
    """Draws one figure; call it inside `style`.

    Args:
        found: by structure, what was removed.
        title: what stands above it.
    """
    heights = [len(one.gone) * (_ROW if one.scores else _BARS) for one in found.values()]
    height = _ABOVE + sum(heights) + _BETWEEN * len(heights)
    figure = Figure(figsize=(_WIDTH, height), dpi=200)
    FigureCanvasAgg(figure)
    figure.text(0.02, 1 - 0.2 / height, literal(title), fontsize=10, fontweight="bold", va="center")
    top = height - _ABOVE
    for (structure, one), own in zip(found.items(), heights, strict=True):
        (_heat_map if one.scores else _histograms)(figure, structure, one, (top - own) / height, own / height)
        top -= own + _BETWEEN
    return figure


def _heat_map(figure: Figure, structure: str, one: Pruned, bottom: float, height: float) -> None:
    """A cell per unit, coloured by its score, with the round in which it went if it went."""
    axes = figure.add_axes((0.1, bottom, 0.74, height))
    cells = np.full((len(one.scores), max(map(len, one.scores))), np.nan)
    for row, scores in enumerate(one.scores):
        cells[row, : len(scores)] = scores
    low, high = float(np.nanmin(cells)), float(np.nanmax(cells))
    norm: Any = LogNorm(low, high) if 0 < low < high else Normalize(low, high)
    drawn = axes.pcolormesh(cells, cmap="viridis", norm=norm, edgecolors="white", linewidth=0.5)
    for row, rounds in enumerate(one.gone):
        for unit, number in enumerate(rounds):
            if number:
                axes.plot(unit + 0.5, row + 0.5, "x", color="white", markersize=6.5, markeredgewidth=2.6)
                axes.plot(unit + 0.5, row + 0.5, "x", color="#CC3311", markersize=6, markeredgewidth=1.2, gid="gone")
    axes.set_ylim(len(one.scores), 0)
    axes.set_xticks(np.arange(cells.shape[1]) + 0.5, [str(unit + 1) for unit in range(cells.shape[1])])
    layers = len(one.scores) if structure != "layers" else 0
    axes.set_yticks(np.arange(layers) + 0.5, [str(layer + 1) for layer in range(layers)])
    _label(axes, structure, f"{_UNITS[structure]} (×: removed)")
    bar = figure.colorbar(drawn, cax=figure.add_axes((0.86, bottom, 0.02, height)))
    bar.set_label(one.criterion, fontsize=7)
    bar.ax.tick_params(labelsize=6.5)


def _histograms(figure: Figure, structure: str, one: Pruned, bottom: float, height: float) -> None:
    """For each layer how many units have which score, those that went on top of those that are left."""
    edges = np.array(one.edges)
    logarithmic = bool(edges[0] > 0)
    own = height / len(one.gone)
    for number, (left, gone) in enumerate(zip(one.left, one.gone, strict=True)):
        axes = figure.add_axes((0.1, bottom + height - (number + 1) * own, 0.85, 0.9 * own))
        if logarithmic:
            axes.set_xscale("log")
        axes.bar(edges[:-1], left, np.diff(edges), align="edge", color=_LEFT, gid="left")
        axes.bar(edges[:-1], gone, np.diff(edges), left, align="edge", color=_GONE, gid="gone")
        axes.set_xlim(edges[0], edges[-1])
        axes.set_yticks([])
        axes.grid(visible=False)
        if structure != "hidden":
            axes.set_ylabel(str(number + 1), rotation=0, fontsize=7, va="center", labelpad=8)
        if number < len(one.gone) - 1:
            axes.tick_params(axis="x", which="both", labelbottom=False)
    _label(axes, "hidden", f"{one.criterion} of {_UNITS[structure]}")
    figure.legend(
        handles=[Patch(color=_LEFT, label="left"), Patch(color=_GONE, label="removed")],
        loc="lower right",
        bbox_to_anchor=(0.96, bottom + height),
        ncols=2,
        frameon=False,
        fontsize=7,
    )


def _label(axes: Axes, structure: str, text: str) -> None:
    axes.set_xlabel(text, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(visible=False)
    if structure not in ("hidden", "layers"):
        axes.set_ylabel("layer", fontsize=8)
