"""The metric against the bits of the weights: one line for each method and each sharing of scales."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from edgemin.plain_text import file_name
from edgemin.report import measures as m
from edgemin.report.drawing import Drawing, ends, fitted, literal, saved, style
from edgemin.report.findings import Quantization
from edgemin.report.fold import Group, Statistic, Study
from edgemin.report.titles import metric_title, task_title

_METHOD = "quantize"
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC3311", "#CC79A7", "#56B4E9", "#666666")
_MARKS = {"tensor": "v", "channel": "o", "group": "s"}
_LINES = {"tensor": ":", "channel": "--", "group": "-"}


@dataclass(frozen=True)
class Mark:
    """One artifact, folded over seeds.

    Args:
        method: the value of `quantize` in the sweep where one row ends in that stage; else the row's name, and that
            value behind it where the row has the stage.
        granularity: what shares a scale.
        bits: of the weights of its Linears.
        value: the primary metric, a fraction.
    """

    method: str
    granularity: str
    bits: int
    value: Statistic


def bits_figures(study: Study) -> list[Drawing]:
    """Draws `<metric>_bits` for every task with a method whose rows have weights of different bits."""
    made = []
    for task in study.tasks:
        groups = [group for group in study.groups if group.task == task]
        marks = list(dict.fromkeys(mark for group in groups for mark in _marks(study, group)))
        methods = {(mark.method, mark.granularity) for mark in marks}
        if len({(mark.method, mark.granularity, mark.bits) for mark in marks}) == len(methods):
            continue  # no line has a second point: that one method has fewer bits than another says nothing of bits
        metric = groups[0].runs[0].task.metric or "accuracy"
        before = {value for group in groups for value in _before(group)}
        with style():
            one = before.pop() if len(before) == 1 else None
            figure = draw(marks, one, metric_title(metric), task_title(task))
            name = file_name(f"{metric}_bits" if len(study.tasks) == 1 else f"{metric}_bits_{task}")
            made.append(Drawing(name, {kind: saved(figure, kind) for kind in ("png", "svg")}))
    return made


def draw(marks: Sequence[Mark], before: float | None, metric: str, task: str) -> Figure:
    """Draws one figure; call it inside `style`.

    Args:
        marks: at least one.
        before: the metric of what was quantized, if it is one model.
        metric: as titles name it.
        task: likewise.
    """
    figure = Figure(figsize=(6.6, 4.2), dpi=200)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.1, 0.13, 0.56, 0.76))
    places = {bits: place for place, bits in enumerate(sorted({mark.bits for mark in marks}, reverse=True))}
    methods = list(dict.fromkeys(mark.method for mark in marks))
    series = list(dict.fromkeys((mark.method, mark.granularity) for mark in marks))
    for number, (method, granularity) in enumerate(series):
        own = sorted((mark for mark in marks if (mark.method, mark.granularity) == (method, granularity)), key=_falling)
        shift = 0.05 * (number - (len(series) - 1) / 2)
        axes.errorbar(
            [places[mark.bits] + shift for mark in own],
            [100 * mark.value.mean for mark in own],
            yerr=_bars(own),
            color=_COLOURS[methods.index(method) % len(_COLOURS)],
            marker=_MARKS.get(granularity, "D"),
            linestyle=_LINES.get(granularity, "-"),
            markersize=4.5,
            linewidth=1.2,
            capsize=2,
            label=literal(fitted(figure, f"{method}, {granularity}", 1.4, fontsize=7)),
        )
    if before is not None:
        axes.axhline(100 * before, color="#333333", linewidth=0.8)
        axes.text(1.01, 100 * before, "before", transform=axes.get_yaxis_transform(), va="center", fontsize=7)
    axes.set_xticks(list(places.values()), [str(bits) for bits in places])
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.set_xlabel("Bits of the weights of Linears")
    axes.set_ylabel(literal(f"{metric} (%)"))
    title = fitted(figure, f"{metric} against bits of the weights, {task}", 5.8, fontsize=10, fontweight="bold")
    axes.set_title(literal(title), loc="left", fontsize=10, fontweight="bold")
    figure.legend(loc="center left", bbox_to_anchor=(0.72, 0.5), fontsize=7, frameon=False)
    return figure


def _bars(marks: Sequence[Mark]) -> list[list[float]]:
    """How far the bars reach below and above the marks."""
    every = [(mark.value.mean, ends(mark.value) or (mark.value.mean,) * 2) for mark in marks]
    return [[100 * (mean - low) for mean, (low, _) in every], [100 * (high - mean) for mean, (_, high) in every]]


def _falling(mark: Mark) -> int:
    return -mark.bits


def _marks(study: Study, group: Group) -> list[Mark]:
    """The marks of rows whose weights have uniform bits; mixed ones have no place on this axis."""
    found: list[tuple[Mark, list[str]]] = []
    for name, line in group.lines.items():
        metric = line.runs[0].task.metric or "accuracy"
        findings, value = line.rows[0].findings, m.own_metric(metric).fold(line)
        if findings.quantization is None or findings.sensitivity is not None or value is None:
            continue
        bits = _bits(findings.quantization)
        if bits is not None:
            found.append((Mark(name, str(findings.quantization.granularity), bits, value), line.rows[0].stages))
    label = dict(zip(study.keys, group.labels, strict=True)).get(_METHOD)
    alone = sum(stages[-1:] == [_METHOD] for _, stages in found) == 1

    def method(name: str, stages: list[str]) -> str:
        if label is None or _METHOD not in stages:
            return name
        return label if alone and stages[-1] == _METHOD else f"{name}, {label}"

    return [replace(mark, method=method(mark.method, stages)) for mark, stages in found]


def _bits(quantization: Quantization) -> int | None:
    """The bits that most layers have, embeddings apart."""
    counted = Counter(bits for path, bits in quantization.bits.items() if "embeddings" not in path)
    return counted.most_common(1)[0][0] if counted else None


def _before(group: Group) -> list[float]:
    """The metric of the models that the quantized rows were made from, where these were not quantized themselves."""
    found = []
    for line in group.lines.values():
        for run, row in zip(line.runs, line.rows, strict=True):
            parent = run.reference("parent", row)
            again = parent is not None and parent.findings.quantization is not None
            if row.gate is not None and row.findings.quantization is not None and not again:
                found.append(row.gate.parent_value)
    return [value for value in found if value is not None]
