"""The table of rows by runtime."""

from __future__ import annotations

import copy
import io
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import run_json
from report_tables import cell, column_keys, mean, notes, study

from edgemin.report import batches, drawing, profile, published, render, runtimes, runtimes_figure, tables, write
from edgemin.report.fold import Statistic
from edgemin.report.footnotes import SIMULATED
from edgemin.report.grid import MAIN, Table

ROW = "Pruned + quantized"
FASTER = {"Teacher": 0.8, ROW: 0.25}


def run(seed: int = 42) -> dict[str, Any]:
    """All rows but one also in ONNX Runtime, where the last gains most."""
    data = run_json.run(seed=seed, overrides=(f"seed={seed}",))
    teacher = data["rows"][0]
    for one in data["rows"]:
        if one["name"] == "Quantized (not pruned)":
            one["notes"] = ["not in onnxruntime: torch's dynamic INT8 runs in torch alone"]
            continue
        cost = copy.deepcopy(run_json.in_torch(one))
        cost["latency_ms"]["padded"]["p50"] *= FASTER.get(one["name"], 0.5)
        scores = {name: value - 0.001 for name, value in one["metrics"]["sst2"]["validation"].items()}
        cost |= {"metrics": {"sst2": {"validation": scores}}, "agreement": 0.9977, "largest_difference": 0.0125}
        one["cost"]["runtimes"]["onnxruntime"] = cost
        theirs = teacher["cost"]["runtimes"]["onnxruntime"]["latency_ms"]["padded"]["p50"]
        one["delta"]["teacher"]["runtimes"]["onnxruntime"] = {
            "compression_ratio": 2.0,
            "speed_up": {"padded": theirs / cost["latency_ms"]["padded"]["p50"]},
        }
    data["rows"][5]["findings"] = {"quantization": run_json.QUANTIZATION}
    return data


def number(table: Table, row: str, runtime: str, key: str) -> Any:
    keys = column_keys(table)
    (cells,) = (cells for cells in table.rows if (cells[0].value, cells[keys.index("runtime")].value) == (row, runtime))
    value = cells[keys.index(key)].value
    return value.mean if isinstance(value, Statistic) else value


def test_each_row_stands_once_for_each_runtime_with_that_runtimes_numbers() -> None:
    table = runtimes.table(study(run()))
    assert table is not None
    assert [row[1].value for row in table.rows].count("onnxruntime") == 5
    assert [row[1].value for row in table.rows].count("torch") == 6
    assert number(table, ROW, "torch", "accuracy_fraction") == 0.8980
    assert number(table, ROW, "onnxruntime", "accuracy_fraction") == pytest.approx(0.8970)
    assert number(table, ROW, "torch", "latency_padded_p50_ms") == 25.1
    assert number(table, ROW, "onnxruntime", "latency_padded_p50_ms") == 25.1 / 4
    assert number(table, ROW, "torch", "speed_up_padded_to_teacher") == pytest.approx(62.7 / 25.1)
    assert number(table, ROW, "onnxruntime", "speed_up_padded_to_teacher") == pytest.approx(0.8 * 62.7 / (25.1 / 4))
    assert number(table, ROW, "onnxruntime", "agreement_with_torch_fraction") == 0.9977
    assert number(table, ROW, "torch", "agreement_with_torch_fraction") is None


def test_only_torch_simulates_and_a_row_that_no_other_runtime_takes_says_so() -> None:
    data = run()
    costs = data["rows"][5]["cost"]["runtimes"]
    costs["torch_compiled"] = costs["torch"]
    table = runtimes.table(study(data))
    assert table is not None
    place = column_keys(table).index("latency_padded_p50_ms")
    marked = {(row[0].value, row[1].value): notes(table, row[place].marks) for row in table.rows}
    assert [where for where, said in marked.items() if SIMULATED in said] == [(ROW, "torch"), (ROW, "torch_compiled")]
    name = cell(table, "Quantized (not pruned)", "name")
    assert notes(table, name.marks) == ["not in onnxruntime: torch's dynamic INT8 runs in torch alone"]


def test_torch_alone_has_no_such_table() -> None:
    assert runtimes.table(study(run_json.run())) is None
    assert "runtimes" not in [table.name for table in tables.tables(study(run_json.run()))]


def test_the_stage_table_has_the_times_of_the_one_runtime_that_serves_every_row() -> None:
    served = run_json.with_runtimes(run_json.run(), {"openvino": 0.25})
    stages = tables.stage_table(study(served))
    assert stages is not None
    assert mean(stages, ROW, "openvino_latency_padded_p50_ms") == 25.1 / 4
    assert mean(stages, ROW, "openvino_speed_up_padded_to_teacher") == pytest.approx(62.7 / 25.1)
    shown = column_keys(stages.for_people())
    assert "openvino_latency_padded_p50_ms" in shown and "latency_padded_p50_ms" not in shown
    assert mean(stages, ROW, "latency_padded_p50_ms") == 25.1, "torch's is in the CSV"
    for other in (
        run(),
        run_json.with_runtimes(run_json.run(), {"openvino": 0.25, "onnxruntime": 0.5}),
        run_json.run(),
    ):
        table = tables.stage_table(study(other))
        assert table is not None and "latency_padded_p50_ms" in column_keys(table.for_people())


def test_it_is_written_in_every_form_and_printed(tmp_path: Path) -> None:
    written = write.of_job(run_json.save(tmp_path, run())).write()
    assert {f"tables/runtimes.{suffix}" for suffix in render.FORMATS} <= set(written)
    page = (tmp_path / "report.md").read_text()
    assert "Every row in every runtime" in page and "89.70" in page and "99.77" in page
    shown = io.StringIO()
    write.of_job(tmp_path).show(shown)
    assert "Every row in every runtime" in shown.getvalue() and "onnxruntime" in shown.getvalue()


def test_seeds_are_folded_inside_a_runtime() -> None:
    table = runtimes.table(study(run(1), run(2)))
    assert table is not None and len(table.rows) == 11
    place = column_keys(table).index("accuracy_fraction")
    values = [row[place].value for row in table.rows]
    assert all(isinstance(value, Statistic) and value.n == 2 for value in values)


def everything() -> dict[str, Any]:
    """Two runtimes beside torch, with all that they may have measured."""
    return run_json.with_runtimes(run_json.run(), {"onnxruntime": 0.55, "openvino": 0.4})


def test_people_see_eight_columns_and_speed_ups_with_the_interval_of_their_rounds() -> None:
    table = runtimes.table(study(everything()))
    assert table is not None
    assert column_keys(table.upto(MAIN)) == column_keys(table.for_people())
    assert len(table.for_people().columns) == 8
    place = column_keys(table).index("speed_up_padded_to_teacher")
    value = next(row[place].value for row in table.rows if (row[0].value, row[1].value) == (ROW, "openvino"))
    assert isinstance(value, Statistic) and value.low is not None and value.high is not None
    assert value.low < value.mean < value.high
    assert f"2.50 ± {(value.high - value.low) / 2:.2f}" in render.markdown(table)
    said = [note for _, note in tables.explained(table).footnotes]
    assert "± is half of the 95 % interval: of speed-ups for the median over further rounds" in said


def test_memory_and_energy_are_less_than_the_teachers_in_the_same_runtime() -> None:
    data = everything()
    data["rows"][0]["cost"]["runtimes"]["openvino"]["model_memory_bytes"] = 4 * (1.2 * 68_252_000 + 5e6)
    table = runtimes.table(study(data))
    assert table is not None
    assert number(table, ROW, "openvino", "model_memory_less_than_teacher_fraction") == pytest.approx(0.75)
    assert number(table, ROW, "torch", "model_memory_less_than_teacher_fraction") != 0.75
    assert number(table, ROW, "openvino", "energy_less_than_teacher_fraction") == pytest.approx(1 - 25.1 / 62.7)
    stages = tables.stage_table(study(data))
    assert mean(stages, ROW, "energy_less_than_teacher_fraction") == pytest.approx(1 - 25.1 / 62.7)
    assert mean(stages, "Teacher", "peak_memory_less_than_teacher_fraction") == 0.0
    column = next(column for column in table.columns if column.key == "energy_less_than_teacher_fraction")
    assert "an estimate: CPU time x a stated number of watts" in notes(table, column.marks)
    del data["rows"][0]["cost"]["runtimes"]["torch"]["energy_mj"]
    assert cell(tables.stage_table(study(data)), ROW, "energy_mj").value is not None
    assert "energy_less_than_teacher_fraction" not in column_keys(tables.stage_table(study(data)))


def test_each_runtime_has_a_noise_floor_of_its_own() -> None:
    data = everything()
    data["rows"][2]["cost"]["runtimes"]["openvino"]["latency_ms"]["padded"] |= {"p50": 20.0, "rounds": []}
    table = runtimes.table(study(data))
    assert table is not None
    (foot,) = [text for mark, text in table.footnotes if "same graph" in text]
    assert "22.2 % (openvino, padded)" in foot and "22.2 % (torch" not in foot


def test_batches_stand_by_length_in_a_grid_and_csv_has_their_spread() -> None:
    data = everything()
    data["rows"][5]["findings"] = {"quantization": run_json.QUANTIZATION}
    table = batches.table(study(data))
    assert table is not None and len(table.rows) == 6 * 3 * 3
    (row,) = [row for row in table.rows if [one.value for one in row[:3]] == [ROW, "openvino", "8"]]
    values = dict(zip(column_keys(table), row, strict=True))
    found = values["latency_length_64_p50_ms"].value
    assert isinstance(found, Statistic) and found.mean == pytest.approx(0.4 * 25.1 / 2 * 8**0.9)
    found = values["throughput_length_64_sentences_per_s"].value
    assert isinstance(found, Statistic) and found.mean == pytest.approx(8000 / (0.4 * 25.1 / 2 * 8**0.9))
    assert {"latency_length_16_p10_ms", "latency_length_16_p90_ms", "length_16_timed_batches"} <= set(values)
    assert [notes(table, row[1].marks) for row in table.rows if row[0].value == ROW][::3] == [[SIMULATED], [], []]
    assert batches.table(study(run_json.run())) is None


def test_the_costliest_operators_stand_by_row_with_the_file_that_has_all() -> None:
    table = profile.table(study(everything()))
    assert table is not None and len(table.rows) == 6 * 4
    assert table.sections == (4, 8, 12, 16, 20)
    first = dict(zip(column_keys(table), table.rows[0], strict=True))
    assert first["operator"].value == "aten::addmm"
    assert isinstance(first["share_fraction"].value, Statistic) and first["share_fraction"].value.mean == 0.6
    assert "profile/0.json.gz" in notes(table, first["name"].marks)[0]
    assert profile.table(study(run_json.run())) is None


def test_all_of_it_is_written_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = write.of_job(run_json.save(tmp_path, everything())).write()
    assert {"tables/grid.csv", "tables/profile.md", "figures/latency_runtimes.png"} <= set(written)
    write.of_job(tmp_path).show()
    printed = capsys.readouterr().out
    assert "Batches: latency" in printed and "The costliest operators in torch" in printed


def test_bars_stand_by_row_and_runtime_and_nothing_overlaps() -> None:
    data = everything()
    data["rows"][5]["findings"] = {"quantization": run_json.QUANTIZATION}
    run_json.in_torch(data["rows"][0])["latency_ms"]["padded"]["unstable"] = True
    rows = runtimes_figure.rows(study(data), "sst2")
    assert [(row.name, len(row.bars)) for row in rows][-1] == (ROW, 3)
    with drawing.style():
        figure = runtimes_figure.draw(rows, "T", "R")
        drawing.saved(figure, "png")
    (axes,) = figure.axes
    assert len(axes.patches) == 18
    values = [text for text in axes.texts if text.get_gid() == "value"]
    assert [text.get_text() for text in values[:2]] == ["62.7 (unstable)", "34.5"]
    boxes = [text.get_window_extent() for text in (*values, *axes.get_yticklabels())]
    assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    assert all(box.x1 <= axes.get_window_extent().x1 and box.x0 >= 0 for box in boxes)
    assert [patch.get_hatch() for patch in axes.patches][-3:] == ["////", None, None]
    assert runtimes_figure.latencies(study(run_json.run())) == []


def test_published_latencies_stand_beside_ours_in_the_runtimes_that_the_file_names(tmp_path: Path) -> None:
    file = tmp_path / "published.yaml"
    file.write_text(
        "runtimes: [torch, openvino, tvm]\nrows:\n  Pruned + quantized: {latency_ms: {sst2: 25.9}, size_mib: 65.09}\n"
    )
    table = published.compare(study(everything()), published.read(file))
    keys = column_keys(table)
    assert mean(table, ROW, "latency_ms_sst2_openvino_published") == 25.9
    assert mean(table, ROW, "sst2_latency_padded_mean_ms_openvino") == pytest.approx(0.4 * 25.1 * 1.01)
    assert mean(table, ROW, "sst2_latency_padded_mean_ms_torch") == pytest.approx(25.1 * 1.01)
    assert len(keys) == len(set(keys)) and keys.count("size_bytes") == 1
    assert table is not None and ("", "not measured in tvm") in table.footnotes


def test_without_a_teacher_speed_ups_are_against_the_model_that_a_study_begins_with() -> None:
    data = run()
    data["rows"] = [row for row in data["rows"] if row["model"] == "student"]
    begun, last = (
        row["cost"]["runtimes"]["onnxruntime"]["latency_ms"]["padded"]["p50"]
        for row in (data["rows"][0], data["rows"][-1])
    )
    data["rows"][-1]["delta"]["student"]["runtimes"]["onnxruntime"] = {"speed_up": {"padded": begun / last}}
    table = runtimes.table(study(data))
    assert table is not None
    assert number(table, ROW, "onnxruntime", "speed_up_padded_to_student") == pytest.approx(begun / last)
    assert any("against the student baseline in the same runtime" in text for _, text in table.footnotes)
