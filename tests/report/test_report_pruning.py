"""What was removed, drawn: a cell of a heat map per head, histograms of FFN units."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import run_json
from matplotlib.patches import Rectangle
from report_tables import study

from edgemin.errors import UserError
from edgemin.report import drawing, pruning_figure, schema

HEADS: dict[str, Any] = {
    "criterion": "taylor",
    "scores": [[0.1, 0.5, 0.2], [0.9, 0.01, 0.3]],
    "gone": [[1, 0, 0], [0, 1, 2]],
}
FFN: dict[str, Any] = {
    "criterion": "taylor",
    "edges": [0.01, 0.1, 1.0],
    "left": [[0, 40], [8, 40]],
    "gone": [[24, 0], [16, 0]],
}


def pruned(seed: int = 42, **found: Any) -> dict[str, Any]:
    data = run_json.run(seed=seed)
    data["rows"][3]["findings"] = {"pruning": found}
    return data


def test_rows_that_removed_nothing_have_no_figure() -> None:
    assert pruning_figure.prunings(study(run_json.run())) == []


@pytest.mark.parametrize("scores", [HEADS["scores"], [[0.0, 0.5, 0.2], [0.9, -0.01, 0.3]], [[1.0] * 3] * 2])
def test_every_head_is_a_cell_and_what_went_is_crossed_out(scores: list[list[float]]) -> None:
    run = schema.parse(Path("run.json"), pruned(heads=HEADS | {"scores": scores}, ffn=FFN))
    with drawing.style():
        figure = pruning_figure.draw(run.rows[3].findings.pruning, "T")
        assert drawing.saved(figure, "svg") == drawing.saved(figure, "svg")
    heat, _, first, second = figure.axes
    assert heat.collections[0].get_array().size == 6  # type: ignore[union-attr]
    crossed = [line for line in heat.lines if line.get_gid() == "gone"]
    places = [(line.get_xdata()[0], line.get_ydata()[0]) for line in crossed]  # type: ignore[index]
    assert places == [(0.5, 0.5), (1.5, 1.5), (2.5, 1.5)]
    bars = [
        [bar.get_height() for bar in axes.patches if isinstance(bar, Rectangle) and bar.get_gid() == "gone"]
        for axes in (first, second)
    ]
    assert bars == FFN["gone"]


def test_seeds_are_told_of_and_rows_numbered() -> None:
    folded = study(pruned(1, heads=HEADS), pruned(2, heads=HEADS))
    assert [drawn.name for drawn in pruning_figure.prunings(folded)] == ["pruning"]


def test_a_score_that_is_no_number_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^[^\n]*findings\.pruning\.heads[^\n]*$"):
        schema.parse(Path("run.json"), pruned(heads=HEADS | {"scores": [["a"]]}))
