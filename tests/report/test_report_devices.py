"""device.json: rows by device in the tables of runtimes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import run_json
from report_tables import cell, mean, notes

from edgemin.report import batches, devices, runtimes, tables
from edgemin.report.__main__ import main
from edgemin.report.fold import Study, fold
from edgemin.report.schema import parse

DATA = run_json.run()
TEACHER, LAST = DATA["rows"][0]["artifact"], DATA["rows"][5]["artifact"]
ROW = "Pruned + quantized on pi5, 4 threads"


def written(directory: Path, **content: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "device.json"
    file.write_text(json.dumps(content))
    return file


def merged(*files: Path) -> Study:
    run = parse(Path("run.json"), run_json.run())
    return fold(devices.merged([run], [devices.read(file) for file in files]))


def test_a_row_that_a_device_measured_stands_behind_its_row_against_the_teacher_there(tmp_path: Path) -> None:
    one = written(tmp_path / "a", **run_json.device(TEACHER, 200.0))
    other = written(tmp_path / "b", **run_json.device(LAST, 50.0))
    study = merged(one, other)
    table = runtimes.table(study)
    assert table is not None
    names = [row[0].value for row in table.rows]
    assert names[:2] == ["Teacher", "Teacher on pi5, 4 threads"] and names[-2:] == ["Pruned + quantized", ROW]
    assert cell(table, ROW, "runtime").value == "onnxruntime"
    assert mean(table, ROW, "latency_padded_p50_ms") == 50.0
    assert mean(table, ROW, "speed_up_padded_to_teacher") == 4.0
    assert mean(table, ROW, "threads") == 4
    assert mean(table, ROW, "peak_memory_less_than_teacher_fraction") == 0.0, "both took as much there"
    (said,) = notes(table, cell(table, ROW, "name").marks)
    assert "Cortex-A76" in said and "batch 1, 128 tokens" in said
    grid = batches.table(study)
    assert grid is not None
    assert [(row[0].value, row[2].value) for row in grid.rows][-2:] == [(ROW, "1"), (ROW, "8")]


def test_other_tables_know_nothing_of_devices_and_no_teacher_there_means_no_speed_up(tmp_path: Path) -> None:
    study = merged(written(tmp_path, **run_json.device(LAST, 50.0)))
    built = {
        table.name: table
        for table in tables.tables(fold([parse(Path("run.json"), run_json.run())]), with_devices=study)
    }
    assert [row[0].value for row in built["stages"].rows].count(ROW) == 0
    assert cell(built["runtimes"], ROW, "speed_up_padded_to_teacher").value is None
    assert cell(built["runtimes"], ROW, "accuracy_fraction").value is None


def test_the_length_nearest_to_the_tables_is_shown_and_named(tmp_path: Path) -> None:
    content = run_json.device(LAST, 50.0)
    content["latency"] = [run_json.grid_cell(1, length, 50.0) | {"p50_ms": length} for length in (16, 64)]
    table = runtimes.table(merged(written(tmp_path, **content)))
    assert mean(table, ROW, "latency_padded_p50_ms") == 64.0
    assert "batch 1, 64 tokens" in notes(table, cell(table, ROW, "name").marks)[0]


def test_the_command_takes_files_and_directories(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    job = run_json.save(tmp_path / "job", run_json.run())
    one = written(tmp_path / "a", **run_json.device(TEACHER, 200.0))
    written(tmp_path / "b" / "bundle", **run_json.device(LAST, 50.0))
    assert main([f"study={job}", f"devices=[{one},{tmp_path / 'b'}]"]) == 0
    assert f"{ROW}" in capsys.readouterr().out
    assert "Teacher on pi5, 4 threads" in (job / "tables" / "runtimes.csv").read_text()
    assert (job / "figures" / "latency_runtimes.png").is_file()
    assert main([f"study={job}"]) == 0
    assert "pi5" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"artifact": "nobody's"}, "artifact: expected that of a row of the study, given nobody's"),
        ({"schema": 2}, "schema: expected 1, given 2"),
        ({"runtime": None}, "runtime: expected a text, given nothing"),
        ({"threads": 0}, "threads: expected a whole number of at least 1, given 0"),
        ({"device": {}}, "device.name: expected a text, given nothing"),
        ({"latency": []}, "latency: expected timings of batch 1, given none"),
        ({"latency": [{"batch": 1, "length": 8, "p50_ms": -1}]}, "latency[0].p50_ms: expected a number above 1e-12, "),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    job = run_json.save(tmp_path / "job", run_json.run())
    file = written(tmp_path / "a", **{**run_json.device(LAST, 50.0), **changes})
    assert main([f"study={job}", f"devices={file}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {file}: {expected}") and said.count("\n") == 1
    assert not (job / "report.md").exists()


def test_paths_without_measurements_and_measurements_given_twice_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = run_json.save(tmp_path / "job", run_json.run())
    (tmp_path / "empty").mkdir()
    one, two = (written(tmp_path / name, **run_json.device(LAST, 50.0)) for name in "ab")
    (tmp_path / "torn.json").write_text('{"schema": 1')
    for given, expected in (
        (tmp_path / "empty", f"devices: expected files device.json or directories with some, given {tmp_path}/empty"),
        (f"[{one},]", "devices: expected files device.json or directories with some, given nothing"),
        (
            tmp_path / "no.json",
            f"{tmp_path}/no.json: expected a bundle's device.json, given a path that does not exist",
        ),
        (tmp_path / "torn.json", f"{tmp_path}/torn.json: expected JSON, given a corrupt or incomplete file"),
        (f"{one},{two}", f"{two}: expected one file of each artifact, device and runtime, given {one} too"),
    ):
        assert main([f"study={job}", f"devices={given}"]) == 2
        assert capsys.readouterr().err.startswith(f"error: {expected}")
