"""The figure of latencies by row and runtime: grouped bars of the median, with whiskers from p10 to p90."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from edgemin.plain_text import file_name
from edgemin.report import measures as m
from edgemin.report.drawing import Drawing, headline, literal, saved, style
from edgemin.report.entries import Entry, entries
from edgemin.report.fold import TASK, Study
from edgemin.report.footnotes import BESIDE, SIMULATED, UNSTABLE, timing_notes
from edgemin.report.grid import CORE
from edgemin.report.measure import Measure
from edgemin.report.noise import Noise
from edgemin.report.runtimes import line_of, runtimes_of
from edgemin.report.titles import task_title

# Okabe and Ito's colours, which the colour-blind can tell apart.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_WIDTH, _BAR, _GAP = 7.0, 0.17, 0.12
"""Inches: of the figure, of a bar, between rows."""
_ABOVE, _BELOW = 0.75, 0.85
_WORDS = {UNSTABLE: "unstable", BESIDE: "beside other work"}
"""What stands behind a bar, by the footnote that a table would have."""


@dataclass(frozen=True)
class Bar:
    """The latency of one row in one runtime, in milliseconds."""

    runtime: str
    p50: float
    p10: float
    p90: float
    simulated: bool
    remark: str


class Bars(NamedTuple):
    """The bars of one row."""

    name: str
    bars: list[Bar]


def latencies(study: Study) -> list[Drawing]:
    """Draws a figure for every task of the study; none where no runtime but torch was timed."""
    made = []
    for task in study.tasks or (None,):
        shown = rows(study, task)
        if all(bar.runtime == m.TORCH for row in shown for bar in row.bars):
            continue
        title = "Latency by runtime" + (f", {task_title(task)}" if task else "")
        name = "latency_runtimes" if len(study.tasks) < 2 else f"latency_runtimes_{file_name(task or '')}"
        with style():
            figure = draw(shown, title, _remarks(study, task, shown))
            made.append(Drawing(name, {kind: saved(figure, kind) for kind in ("png", "svg")}))
    return made


def rows(study: Study, task: str | None) -> list[Bars]:
    """The bars of every row of one task that was timed."""
    return [row for entry in _entries(study, task) if (row := _row(study, entry)).bars]


def _entries(study: Study, task: str | None) -> list[Entry]:
    return [entry for entry in entries(study) if task is None or task in entry.lines]


def _timed(runtime: str, statistic: str) -> Measure:
    return m.in_runtime(m.latency("padded", statistic, CORE), runtime)


def _row(study: Study, entry: Entry) -> Bars:
    swept = [(key, label) for key, label in zip(study.keys, entry.labels, strict=True) if key != TASK]
    labels = ", ".join(f"{key.rpartition('.')[2]}={label}" for key, label in swept)
    line, bars = line_of(entry), []
    for runtime in runtimes_of(entry):
        p10, p50, p90 = (_timed(runtime, name).fold(line) for name in ("p10", "p50", "p90"))
        if p50 is None:
            continue
        timed = _timed(runtime, "p50")
        notes = [note for run, row in zip(line.runs, line.rows, strict=True) for note in timing_notes(timed, run, row)]
        remark = ", ".join(word for note, word in _WORDS.items() if note in notes)
        ends = [p50.mean if end is None else end.mean for end in (p10, p90)]
        bars.append(Bar(runtime, p50.mean, min(ends[0], p50.mean), max(ends[1], p50.mean), SIMULATED in notes, remark))
    return Bars(f"{entry.name} ({labels})" if labels else entry.name, bars)


def _remarks(study: Study, task: str | None, shown: Sequence[Bars]) -> str:
    """What the whiskers are, and the noise floor of each runtime."""
    said = ["bars: median; whiskers: p10 to p90"]
    noise = Noise(_entries(study, task))
    runtimes = dict.fromkeys(bar.runtime for row in shown for bar in row.bars)
    floors = {name: noise.floor(_timed(name, "p50")) for name in runtimes}
    known = [f"{name} {floor.percent}" for name, floor in floors.items() if floor is not None]
    said += [f"noise floor: {', '.join(known)}; differences within it are none"] if known else []
    return "\n".join(said)


def draw(shown: Sequence[Bars], title: str, remarks: str) -> Figure:
    """Draws one figure; call it inside `style`.

    Args:
        shown: the rows from top to bottom, each with its bars.
        title: what stands above it.
        remarks: what stands below it.
    """
    bars = sum(len(row.bars) for row in shown)
    height = _ABOVE + _BELOW + bars * _BAR + len(shown) * _GAP
    figure = Figure(figsize=(_WIDTH, height), dpi=200)
    FigureCanvasAgg(figure)
    left = min(max(_inches(figure, row.name) for row in shown) + 0.15, 0.45 * _WIDTH) / _WIDTH
    axes = figure.add_axes((left, _BELOW / height, 0.97 - left, 1 - (_ABOVE + _BELOW) / height))
    runtimes = list(dict.fromkeys(bar.runtime for row in shown for bar in row.bars))
    colours = {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(runtimes)}
    longest = max(bar.p90 for row in shown for bar in row.bars)
    place, middles = 0.0, []
    for row in shown:
        middles.append(place + (len(row.bars) - 1) * _BAR / 2)
        for bar in row.bars:
            _bar(axes, place, bar, colours[bar.runtime])
            place += _BAR
        place += _GAP
    axes.set_xlim(0, longest * (1.28 if any(bar.remark for row in shown for bar in row.bars) else 1.14))
    axes.set_ylim(place - _GAP / 2 - _BAR / 2, -_GAP / 2 - _BAR / 2)
    axes.set_yticks(middles, [literal(row.name) for row in shown], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("latency of one sentence, padded (ms)", fontsize=8)
    headline(figure, title)
    figure.text(0.98, 0.1 / height, remarks, ha="right", va="bottom", fontsize=6.5, color="#666666")
    patches = [Patch(facecolor=colour, label=literal(name)) for name, colour in colours.items()]
    if any(bar.simulated for row in shown for bar in row.bars):
        patches.append(Patch(facecolor="white", edgecolor="#666666", hatch="////", label="simulated in float"))
    figure.legend(
        handles=patches,
        loc="center left",
        bbox_to_anchor=(0.012, 1 - 0.48 / height),
        ncols=len(patches),
        frameon=False,
        fontsize=7.5,
        handlelength=1.3,
        columnspacing=1.4,
    )
    return figure


def _bar(axes: Axes, place: float, bar: Bar, colour: str) -> None:
    """A bar, its whisker, and the median in figures behind both."""
    face = "white" if bar.simulated else colour
    hatch = "////" if bar.simulated else None
    axes.barh(place, bar.p50, height=_BAR * 0.86, facecolor=face, edgecolor=colour, hatch=hatch, linewidth=0.7)
    axes.errorbar(
        bar.p50,
        place,
        xerr=[[bar.p50 - bar.p10], [bar.p90 - bar.p50]],
        fmt="none",
        ecolor="#333333",
        elinewidth=0.9,
        capsize=1.8,
    )
    axes.annotate(
        f"{bar.p50:#.3g}".rstrip(".") + (f" ({bar.remark})" if bar.remark else ""),
        xy=(bar.p90, place),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=6.5,
        color="#222222",
        gid="value",
    )


def _inches(figure: Figure, name: str) -> float:
    """The width of a row's name."""
    text = figure.text(0, 0, literal(name), fontsize=8)
    width: float = text.get_window_extent().width / figure.dpi
    text.remove()
    return width
