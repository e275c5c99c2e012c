"""The figure of differences: what is drawn of a comparison, and that nothing leaves the picture."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from edgemin.report.against_figure import against, draw
from edgemin.report.comparisons import Comparison
from edgemin.report.drawing import fitted, headline, style

ONE = Comparison(
    labels=(),
    row="+ Distillation",
    other="Control: no teacher",
    role="control",
    metric="accuracy",
    differences=(0.012, 0.02, 0.031),
    estimate=0.021,
    low=0.004,
    high=0.038,
    p=0.01,
    corrected=0.03,
    p_equivalent=0.8,
    margin=0.01,
    share=0.5,
    examples=872,
    test="t",
    verdict="better",
)
NOISE = replace(ONE, row="Pruned", estimate=-0.002, low=-0.02, high=0.016, differences=(-0.002,), verdict="equivalent")
LONG = replace(NOISE, row="A row whose name says everything about its stages and settings", labels=("a_value",) * 4)


def test_every_pair_has_its_interval_and_its_seeds_and_noise_is_grey() -> None:
    with style():
        axes = draw([ONE, NOISE]).axes[0]
    bars = [line for line in axes.lines if line.get_linewidth() == 1.6]
    assert [list(line.get_xdata()) for line in bars] == [pytest.approx([0.4, 3.8]), pytest.approx([-2.0, 1.6])]
    assert [to_hex(str(line.get_color())) for line in bars] == ["#0072b2", "#9a9a9a"]
    seeds = [line for line in axes.lines if line.get_gid() == "seed"]
    assert [list(line.get_xdata()) for line in seeds] == [pytest.approx([1.2, 2.0, 3.1])]
    assert axes.get_yticklabels()[0].get_text() == "+ Distillation\nless Control: no teacher"
    assert axes.get_xlim()[0] < -2.0 and axes.get_xlim()[1] > 3.8


def test_nothing_leaves_the_picture_whatever_the_names_are() -> None:
    with style():
        figure = draw([ONE, LONG, LONG, NOISE])
        canvas = figure.canvas
        assert isinstance(canvas, FigureCanvasAgg)
        canvas.draw()
        boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
        assert min(box.x0 for box in boxes) >= 0
        assert all(upper.y0 >= lower.y1 - 1 for upper, lower in pairwise(boxes))
        boxes += [text.get_window_extent() for text in figure.texts] + [figure.legends[0].get_window_extent()]
        assert max(box.x1 for box in boxes) <= figure.bbox.x1 and max(box.y1 for box in boxes) <= figure.bbox.y1


def test_the_teacher_is_no_control_and_without_a_pair_there_is_no_figure() -> None:
    assert against([replace(ONE, role="teacher")]) == []
    assert [drawing.name for drawing in against([ONE])] == ["against"]
    assert against([ONE])[0].files == against([ONE])[0].files


def test_a_title_of_any_length_fits() -> None:
    with style():
        figure = Figure(figsize=(7, 3))
        FigureCanvasAgg(figure)
        title = "Sensitivity of Quantized (quantize=weight_only, quantize.bits=2, quantize.granularity=channel, seed=1)"
        headline(figure, title)
        box = figure.texts[-1].get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert fitted(figure, "short", 3.0, fontsize=8) == "short"
