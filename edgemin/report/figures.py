"""Figures 2 and 3: the metric against size and against latency, every point with its name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from edgemin.plain_text import file_name
from edgemin.report import measures as m
from edgemin.report.drawing import BARS, DPI, Drawing, ends, fitted, literal, saved, style
from edgemin.report.entries import entries
from edgemin.report.fold import Statistic, Study
from edgemin.report.grid import CORE
from edgemin.report.labels import Box, Segment, Spot, around, nearest, place
from edgemin.report.measure import Measure
from edgemin.report.noise import Floor, Noise
from edgemin.report.points import Point, points
from edgemin.report.titles import metric_column, metric_title, metric_word, split_title, task_title

# Okabe and Ito's colours, which the colour-blind can tell apart.
_LOOKS = {"teacher": ("s", "#D55E00"), "student": ("o", "#0072B2"), "control": ("D", "#777777")}
_MARKER_POINTS = 6.5
_TITLE: dict[str, Any] = {"fontsize": 10, "fontweight": "bold"}
_LOG_FROM = 12.0
"""Costs that span a wider ratio than this get a logarithmic axis."""
_ROOM = 0.14
"""Free space beyond the outermost points as a share of what they span; twice that on the left."""
_LEADER_POINTS = 16.0
"""A label whose edge is further from its point than this gets a leader line."""


def figures(study: Study) -> tuple[list[Drawing], list[str]]:
    """Draws figures 2 and 3 of every task of the study.

    Returns:
        The drawings, and a note for each figure that could not be drawn, with the reason.
    """
    latency, *_ = m.served([m.latency("padded", "p50", CORE)], study)
    costs = (
        ("accuracy_size", "Figure 2: {} against size", m.SIZE),
        ("accuracy_latency", "Figure 3: {} against latency", latency),
    )
    drawn: list[Drawing] = []
    skipped: list[str] = []
    for stem, title, cost in costs:
        if not study.tasks:
            skipped.append(f"{title.format('accuracy')}: not drawn, as task=none has no scores")
        for task in study.tasks:
            shown = points(study, task, cost)
            above = f"{title.format(metric_word(_metric(study, task)))}, {task_title(task)}"
            if not shown:
                skipped.append(f"{above}: not drawn, as {_missing(study, task, cost)}")
                continue
            name = stem if len(study.tasks) == 1 else f"{stem}_{file_name(task)}"
            floor = Noise(entries(study)).floor(replace(cost, job_task=task))
            with style():
                figure = draw(shown, above, _vertical(study, task), cost, floor)
                drawn.append(Drawing(name, {kind: saved(figure, kind) for kind in ("png", "svg")}))
    return drawn, skipped


def _missing(study: Study, task: str, cost: Measure) -> str:
    """Why a figure has no point, and what to do about it."""
    runs = [run for run in study.runs if run.task.name == task]
    if any(cost.read(run, row) is not None for run in runs for row in run.rows):
        return "no row has a score"
    if cost.form is not None and not any(run.chosen("measure") for run in runs):
        return "measure=none took no latencies: run the same command without it, which trains nothing again"
    return f"no row has a {cost.column.title.partition(',')[0].lower()}"


def draw(shown: Sequence[Point], title: str, vertical: str, cost: Measure, floor: Floor | None = None) -> Figure:
    """Draws one figure; call it inside `style`.

    Args:
        shown: the points.
        title: what stands above it.
        vertical: what the vertical axis says.
        cost: the horizontal axis.
        floor: the noise floor of the costs. Points that it does not tell apart get grey bars, which overlap.
    """
    figure = Figure(figsize=(6.6, 4.3), dpi=DPI)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.105, 0.15, 0.875, 0.765))
    xs = [point.x.mean * cost.column.factor for point in shown]
    ys = [point.y.mean * 100 for point in shown]
    _axes(axes, shown, cost)
    axes.set_ylabel(vertical)
    head = fitted(figure, title, 0.7 * figure.get_figwidth() * axes.get_position().width, **_TITLE)
    axes.set_title(literal(head), loc="left", **_TITLE)
    axes.set_title("↖ better: up and left", loc="right", fontsize=8.5, color="#009E73")
    _paths(axes, shown, xs, ys)
    blurred = _blur(axes, xs, ys, floor)
    for point, x, y in zip(shown, xs, ys, strict=True):
        marker, colour = _LOOKS[point.kind]
        axes.errorbar(
            x,
            y,
            xerr=_bar(point.x, cost.column.factor),
            yerr=_bar(point.y, 100),
            fmt=marker,
            markersize=_MARKER_POINTS,
            markerfacecolor="white" if point.kind == "control" else colour,
            markeredgecolor=colour if point.kind == "control" else "white",
            ecolor=colour,
            elinewidth=0.9,
            capsize=2.5,
            zorder=4,
        )
    _labels(figure, axes, shown, xs, ys)
    remarks = ["arrows: each model to what was made of it"] if any(point.origin is not None for point in shown) else []
    if any(ends(value) for point in shown for value in (point.x, point.y)):
        remarks.append(BARS)
    if floor is not None and blurred:
        remarks.append(f"overlapping grey bars: no difference, noise floor {floor.percent}")
    figure.text(0.98, 0.012, "; ".join(remarks), ha="right", fontsize=6.5, color="#666666")
    return figure


def _blur(axes: Axes, xs: Sequence[float], ys: Sequence[float], floor: Floor | None) -> bool:
    """Draws grey bars as wide as the noise floor at points that it does not tell apart; returns whether there are any.

    Two such bars overlap just where the floor covers the ratio of their points.
    """
    if floor is None:
        return False
    covered = {
        x for number, x in enumerate(xs) for other in (*xs[:number], *xs[number + 1 :]) if floor.covers(x / other)
    }
    half = math.sqrt(floor.ratio)
    for x, y in zip(xs, ys, strict=True):
        if x in covered:
            bar = (x / half, x * half)
            axes.plot(bar, (y, y), color="#b5b5b5", linewidth=5, solid_capstyle="butt", zorder=3, gid="noise")
    return bool(covered)


def _metric(study: Study, task: str) -> str:
    return metric_title(next(run.task.metric for run in study.runs if run.task.name == task) or "accuracy").lower()


def _vertical(study: Study, task: str) -> str:
    run = next(run for run in study.runs if run.task.name == task)
    metric = run.task.metric or "accuracy"
    unit = metric_column(metric, metric, "", CORE).unit or "x100"
    split = f", {split_title(run.splits[0])}" if run.splits else ""
    return f"{metric_title(metric)}{split} ({unit})"


def _axes(axes: Axes, shown: Sequence[Point], cost: Measure) -> None:
    """Sets limits that leave room for bars and names, and a logarithmic scale where the costs span too much."""
    axes.set_xlabel(f"{cost.column.title} ({cost.column.unit})")
    low, high = _span([point.x for point in shown], cost.column.factor)
    if low > 0 and high / low > _LOG_FROM:
        axes.set_xscale("log")
        subs = (1.0, 2.0, 5.0) if high / low < 200 else (1.0,)
        axes.xaxis.set_major_locator(LogLocator(subs=subs))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        room = (high / low) ** _ROOM
        axes.set_xlim(low / room**2, high * room)
    else:
        room = (high - low) * _ROOM or max(abs(high), 1e-9) * 0.1
        axes.set_xlim(max(low - 2 * room, 0), high + room)
    low, high = _span([point.y for point in shown], 100)
    room = max((high - low) * _ROOM, 0.2)
    axes.set_ylim(low - room, high + room)


def _span(values: Sequence[Statistic], factor: float) -> tuple[float, float]:
    """The least and the greatest, bars included."""
    every = [end for value in values for end in (value.mean, *(ends(value) or ()))]
    return min(every) * factor, max(every) * factor


def _bar(value: Statistic, factor: float) -> list[list[float]] | None:
    """How far a point's bar reaches below and above it."""
    bar = ends(value)
    return None if bar is None else [[(value.mean - bar[0]) * factor], [(bar[1] - value.mean) * factor]]


def _paths(axes: Axes, shown: Sequence[Point], xs: Sequence[float], ys: Sequence[float]) -> None:
    """An arrow from each point to every point that was made from it; dashed to controls."""
    for number, point in enumerate(shown):
        if point.origin is None:
            continue
        ends = [axes.transData.transform((xs[place], ys[place])) for place in (point.origin, number)]
        if math.dist(*ends) < 2.5 * _MARKER_POINTS * DPI / 72:
            continue
        axes.annotate(
            "",
            xy=(xs[number], ys[number]),
            xytext=(xs[point.origin], ys[point.origin]),
            arrowprops={
                "arrowstyle": "-|>",
                "mutation_scale": 9,
                "color": "#9aa5ad",
                "linewidth": 1.0,
                "linestyle": "dashed" if point.kind == "control" else "solid",
                "shrinkA": _MARKER_POINTS * 0.75,
                "shrinkB": _MARKER_POINTS * 0.75,
            },
            zorder=2,
        )


def _labels(figure: Figure, axes: Axes, shown: Sequence[Point], xs: Sequence[float], ys: Sequence[float]) -> None:
    """Writes every point's name where none covers another."""
    points_per_pixel = 72 / DPI
    spots: list[Spot] = []
    for x, y in zip(xs, ys, strict=True):
        across, up = axes.transData.transform((x, y))
        spots.append((float(across), float(up)))
    font = 8.0 if len(shown) <= 10 else 7.0 if len(shown) <= 20 else 5.5
    sizes = [_extent(figure, point.name, font) for point in shown]
    segments: list[Segment] = [
        (spots[point.origin], spots[number]) for number, point in enumerate(shown) if point.origin is not None
    ]
    segments += [bar for point, x, y in zip(shown, xs, ys, strict=True) for bar in _bars(axes, point, x, y)]
    window = axes.get_window_extent()
    bounds = Box(window.x0 + 2, window.y0 + 2, window.x1 - 2, window.y1 - 2)
    centres = place(spots, sizes, segments, bounds, _MARKER_POINTS / 2 / points_per_pixel + 3)
    for point, x, y, spot, centre, size in zip(shown, xs, ys, spots, centres, sizes, strict=True):
        end = nearest(around(centre, size), spot)
        if math.dist(end, spot) * points_per_pixel > _LEADER_POINTS:
            axes.annotate(
                "",
                xy=(x, y),
                xytext=_offset(end, spot),
                textcoords="offset points",
                arrowprops={
                    "arrowstyle": "-",
                    "color": "#777777",
                    "linewidth": 0.6,
                    "shrinkA": 0,
                    "shrinkB": 3,
                },
                zorder=3,
            )
        axes.annotate(
            literal(point.name),
            xy=(x, y),
            xytext=_offset(centre, spot),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=font,
            color="#222222",
            gid="label",
            path_effects=[Stroke(linewidth=2.0, foreground="white"), Normal()],
            zorder=5,
        )


def _offset(to: Spot, spot: Spot) -> tuple[float, float]:
    """From a point to a place, in typographic points."""
    return (to[0] - spot[0]) * 72 / DPI, (to[1] - spot[1]) * 72 / DPI


def _bars(axes: Axes, point: Point, x: float, y: float) -> list[Segment]:
    """The error bars of a point, in pixels."""
    bars = []
    factor = x / point.x.mean if point.x.mean else 0.0
    across = [(end * factor, y) for end in ends(point.x) or ()]
    for bar in (across, [(x, end * 100) for end in ends(point.y) or ()]):
        if bar:
            (left, low), (right, high) = axes.transData.transform(bar)
            bars.append(((float(left), float(low)), (float(right), float(high))))
    return bars


def _extent(figure: Figure, name: str, font: float) -> tuple[float, float]:
    """Width and height of a label in pixels, a little air included."""
    text = figure.text(0, 0, literal(name), fontsize=font)
    box = text.get_window_extent()
    text.remove()
    return box.width + 6, box.height + 4
