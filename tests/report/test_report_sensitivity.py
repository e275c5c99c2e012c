"""Sensitivity: damage by layer and bits as a table and as a figure, folded over seeds."""

from __future__ import annotations

import csv
import io
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import run_json
from matplotlib.figure import Figure
from report_tables import notes, study

from edgemin.errors import UserError
from edgemin.report import drawing, render, schema, sensitivity, sensitivity_figure, write
from edgemin.report.fold import Statistic, Study
from edgemin.report.grid import Table


def looked(seed: int = 42, overrides: tuple[str, ...] = (), **given: Any) -> dict[str, Any]:
    data = run_json.run(seed=seed, overrides=overrides)
    data["rows"][4]["findings"] = {"sensitivity": run_json.sensitivity(**given)}
    return data


def entries(data: dict[str, Any]) -> list[dict[str, Any]]:
    found = data["rows"][4]["findings"]["sensitivity"]["layers"]
    assert isinstance(found, list)
    return found


def made(*runs: dict[str, Any]) -> Table:
    table = sensitivity.table(study(*runs))
    assert table is not None
    return table


def rows(table: Table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(render.comma_separated(table))))


def drawn(folded: Study) -> Figure:
    with drawing.style():
        figure = sensitivity_figure.draw(sensitivity.found(folded)[0], "T")
        drawing.saved(figure, "png")
    return figure


def test_rows_that_did_not_look_have_neither_table_nor_figure() -> None:
    assert sensitivity.table(study(run_json.run())) is None
    assert sensitivity_figure.sensitivities(study(run_json.run())) == []


def test_the_table_holds_every_layer_in_its_order_with_raw_numbers() -> None:
    data = looked(layers=2)
    written = rows(made(data))
    assert [row["layer"] for row in written] == [entry["name"] for entry in entries(data)]
    for entry, row in zip(entries(data), written, strict=True):
        assert row["name"] == "Quantized (not pruned)" and row["weights"] == str(entry["weights"])
        for bits, damage in entry["damage"].items():
            assert float(row[f"damage_{bits}_bits_nats"]) == damage
        assert row["bits"] == str(entry["bits"])


def test_the_budget_and_what_was_looked_at_are_footnotes() -> None:
    table = made(looked(layers=1))
    said = notes(table, table.rows[0][0].marks)
    assert said == [
        "on 256 examples, what one layer quantized alone does to the full-precision model's answers: "
        "the mean KL of them",
        "the chosen bits make 13.70 MiB, the budget was 14.00 MiB",
    ]
    free = made(looked(layers=1, budget=None))
    assert notes(free, free.rows[0][0].marks)[1] == "the chosen bits make 13.70 MiB; no budget was set"


def test_seeds_are_folded_by_mean_and_differing_choices_counted() -> None:
    runs = [looked(seed=n, overrides=(f"seed={n}",), layers=1, factor=1 + n) for n in range(3)]
    for data, bits in zip(runs, (4, 8, 4), strict=True):
        entries(data)[1]["bits"] = bits
    table = made(*runs)
    assert len(table.rows) == len(entries(runs[0]))
    place = [column.key for column in table.columns].index("damage_4_bits_nats")
    value = table.rows[1][place].value
    values = [entries(data)[1]["damage"]["4"] for data in runs]
    assert isinstance(value, Statistic)
    assert (value.mean, value.sd, value.n) == pytest.approx((statistics.mean(values), statistics.stdev(values), 3))
    assert [row["bits"] for row in rows(table)][:2] == ["8", "4 (2 of 3), 8 (1 of 3)"]


def test_a_regression_is_damaged_in_squared_differences() -> None:
    data = looked(layers=1)
    data["task"]["metric"] = "pearson"
    table = made(data)
    assert "damage_8_bits_squared_difference" in [column.key for column in table.columns]
    assert "mean squared difference" in notes(table, table.rows[0][0].marks)[0]
    axes = drawn(study(data)).axes[0]
    assert "mean squared difference" in axes.get_xlabel()


def test_several_rows_are_sections_of_the_table_and_figures_of_their_own() -> None:
    runs = [looked(overrides=(f"quantize.budget={mib}",), layers=1, budget=float(mib)) for mib in (10, 12)]
    folded = study(*runs)
    table = made(*runs)
    assert table.sections == (len(entries(runs[0])),)
    assert [row["quantize.budget"] for row in rows(table)] == ["10"] * 10 + ["12"] * 10
    assert [one.name for one in sensitivity_figure.sensitivities(folded)] == ["sensitivity_1", "sensitivity_2"]


@pytest.mark.parametrize("layers", [1, 6, 12], ids=["10 lines", "40 lines", "76 lines"])
def test_every_layer_has_a_line_of_its_own_and_its_chosen_bits(layers: int) -> None:
    data = looked(layers=layers)
    axes = drawn(study(data)).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [entry["name"].removeprefix("bert.") for entry in entries(data)]
    boxes = sorted((label.get_window_extent() for label in axes.get_yticklabels()), key=lambda box: -box.y0)
    assert all(lower.y1 <= upper.y0 + 2 for upper, lower in pairwise(boxes)), "names stand apart"
    assert min(box.x0 for box in boxes) >= 0
    chosen = {
        (round(float(line.get_ydata()[0])), float(line.get_xdata()[0]))  # type: ignore[index,arg-type]
        for line in axes.lines
        if line.get_gid() == "chosen"
    }
    assert chosen == {(place, entry["damage"][str(entry["bits"])]) for place, entry in enumerate(entries(data))}
    bits = [text.get_text() for text in axes.texts if text.get_gid() == "bits"]
    assert bits == [str(entry["bits"]) for entry in entries(data)]
    assert axes.get_xscale() == "log"


def test_no_damage_at_all_is_drawn_at_the_edge_and_said() -> None:
    data = looked(layers=1)
    entries(data)[0]["damage"]["8"] = 0.0
    figure = drawn(study(data))
    assert any("less than the axis shows" in text.get_text() for text in figure.texts)
    for entry in entries(data):
        entry["damage"] = {"8": 0.0}
    assert drawn(study(data)).axes


def test_bits_beyond_the_candidates_and_layers_left_alone_are_shown() -> None:
    data = looked(layers=1)
    entries(data)[0] |= {"bits": 32, "damage": {}}
    entries(data)[1]["bits"] = None
    assert [row["bits"] for row in rows(made(data))][:2] == ["32", ""]
    texts = [text.get_text() for text in drawn(study(data)).axes[0].texts if text.get_gid() == "bits"]
    assert texts[:2] == ["32", "-"]


def test_files_are_written_equal_twice_and_a_long_table_opens_on_a_click(tmp_path: Path) -> None:
    job = run_json.save(tmp_path, looked(layers=12))
    written = {name: path.read_bytes() for name, path in write.of_job(job).write().items()}
    again = {name: path.read_bytes() for name, path in write.of_job(job).write().items()}
    assert written == again
    assert written["figures/sensitivity.png"].startswith(b"\x89PNG")
    assert ElementTree.fromstring(written["figures/sensitivity.svg"]).tag.endswith("svg")
    page = written["report.md"].decode()
    assert "(76 rows)</summary>" in page and page.count("<details>") == page.count("</details>") == 1
    assert "![sensitivity](figures/sensitivity.png)" in page


@pytest.mark.parametrize(
    ("finding", "expected"),
    [
        ({"layers": {}}, "layers: expected a list, given an object"),
        ({"layers": [{"name": "a"}]}, "layers[0].weights: expected a number, given nothing"),
        ({"layers": ["a"]}, "layers[0]: expected an object, given a text"),
        (
            {"layers": [{"name": "a", "weights": 1, "damage": {"x": 1}}]},
            "layers[0].damage.x: expected bits as names, given x",
        ),
    ],
)
def test_a_finding_of_another_form_is_refused_in_one_line(
    tmp_path: Path, finding: dict[str, Any], expected: str
) -> None:
    data = looked()
    data["rows"][4]["findings"]["sensitivity"] = finding
    with pytest.raises(UserError) as caught:
        schema.read(run_json.save(tmp_path, data))
    assert str(caught.value) == f"{tmp_path / 'run.json'}: rows[4].findings.sensitivity.{expected}"
