"""The table of rows by runtime."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import run_json
from report_tables import cell, column_keys, notes, study

from edgemin.report import render, runtimes, tables, write
from edgemin.report.fold import Statistic
from edgemin.report.footnotes import SIMULATED
from edgemin.report.grid import Table

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
    table = runtimes.table(study(run()))
    assert table is not None
    place = column_keys(table).index("latency_padded_p50_ms")
    marked = {(row[0].value, row[1].value): notes(table, row[place].marks) for row in table.rows}
    assert [where for where, said in marked.items() if SIMULATED in said] == [(ROW, "torch")]
    name = cell(table, "Quantized (not pruned)", "name")
    assert notes(table, name.marks) == ["not in onnxruntime: torch's dynamic INT8 runs in torch alone"]


def test_torch_alone_has_no_such_table() -> None:
    assert runtimes.table(study(run_json.run())) is None
    assert "runtimes" not in [table.name for table in tables.tables(study(run_json.run()))]


def test_it_is_written_in_every_form_and_printed(tmp_path: Path) -> None:
    written = write.write_job(run_json.save(tmp_path, run()))
    assert {f"tables/runtimes.{suffix}" for suffix in render.FORMATS} <= set(written)
    page = (tmp_path / "report.md").read_text()
    assert "Every row in every runtime" in page and "89.70" in page and "99.77" in page
    shown = io.StringIO()
    write.print_job(tmp_path, shown)
    assert "Every row in every runtime" in shown.getvalue() and "onnxruntime" in shown.getvalue()


def test_seeds_are_folded_inside_a_runtime() -> None:
    table = runtimes.table(study(run(1), run(2)))
    assert table is not None and len(table.rows) == 11
    place = column_keys(table).index("accuracy_fraction")
    values = [row[place].value for row in table.rows]
    assert all(isinstance(value, Statistic) and value.n == 2 for value in values)
