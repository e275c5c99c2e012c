"""run.json: what is read, and what is refused in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import run_json

from edgemin.errors import UserError
from edgemin.report import measures as m
from edgemin.report import schema
from edgemin.report.__main__ import main
from edgemin.report.footnotes import SIMULATED, UNSTABLE, timing_notes

WHAT_TO_DO = ": run the job again with this EdgeMIN, or build its report with the one that wrote it"


def broken(tmp_path: Path, **changes: Any) -> Path:
    return run_json.save(tmp_path, {**run_json.run(), **changes})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schema": 1}, f"schema: expected 2, given 1, written by EdgeMIN 0.1.0{WHAT_TO_DO}"),
        ({"schema": 3, "edgemin": "0.9.0"}, f"schema: expected 2, given 3, written by EdgeMIN 0.9.0{WHAT_TO_DO}"),
        ({"schema": None}, f"schema: expected 2, given None, written by EdgeMIN 0.1.0{WHAT_TO_DO}"),
        ({"rows": {}}, "rows: expected a list, given an object"),
        ({"seed": True}, "seed: expected a whole number, given true or false"),
        ({"rows": [7]}, "rows[0]: expected an object, given a whole number"),
        ({"rows": [{"model": "x", "stages": []}]}, "rows[0].name: expected a text, given nothing"),
        ({"schema": True}, f"schema: expected 2, given True, written by EdgeMIN 0.1.0{WHAT_TO_DO}"),
        ({"order": {"ablation": {"stages": []}}}, "order.ablation.name: expected a text, given nothing"),
        ({"nodes": [{"path": "teacher"}]}, "nodes[0].model: expected a text, given nothing"),
        ({"job": {"overrides": 5}}, "job.overrides: expected a list, given a whole number"),
        ({"warnings": ["a", 5]}, "warnings[1]: expected a text, given a whole number"),
        ({"task": {"splits": "validation"}}, "task.splits: expected a list, given a text"),
        ({"versions": {"torch": 2}}, "versions.torch: expected a text, given a whole number"),
        ({"nodes": [None]}, "nodes[0]: expected an object, given nothing"),
        ({"seed": float("nan")}, "seed: expected a whole number, given a number"),
        ({"threads": [2.5]}, "threads[0]: expected a whole number, given a number"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line_that_names_it(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    directory = broken(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        schema.read(directory)
    assert str(caught.value) == f"{directory / 'run.json'}: {expected}"


@pytest.mark.parametrize("text", ["", '{"schema": 2', "not json", '["a"]'])
def test_a_corrupt_file_is_refused_in_one_line_that_names_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"run\.json: expected (a )?JSON") as caught:
        schema.read(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_text_in_the_place_of_a_number_is_named(tmp_path: Path) -> None:
    data = run_json.run()
    run_json.in_torch(data["rows"][0])["size_bytes"] = "large"
    with pytest.raises(
        UserError, match=r"rows\[0\]\.cost\.runtimes\.torch\.size_bytes: expected a number, given a text"
    ):
        schema.read(run_json.save(tmp_path, data))


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("metrics.sst2.validation.accuracy", 10**400, "a number, given a number that is too large"),
        ("metrics.sst2.validation.accuracy", [[]], "a number, given a list"),
        ("metrics.sst2", 5, "an object, given a whole number"),
        ("cost.runtimes.torch.size_bytes", 1e308, "a number below 1e30, given 1e+308"),
        ("cost.runtimes.torch.size_bytes", -1, "0 or a number above 1e-12, given -1"),
        ("cost.flops", True, "a number, given true or false"),
        ("cost.runtimes.torch.latency_ms.padded.p50", 0, "a number above 1e-12, given 0"),
        ("cost.runtimes", [], "an object, given a list"),
        ("cost.runtimes.torch.latency_ms.padded", [], "an object, given a list"),
        ("delta.teacher", 1.5, "an object, given a number"),
        ("notes", "one", "a list, given a text"),
        ("control", 1, "true or false, given a whole number"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_its_place(tmp_path: Path, path: str, value: Any, expected: str) -> None:
    data = run_json.run()
    *above, last = path.split(".")
    place: Any = data["rows"][1]
    for key in above:
        place = place[key]
    place[last] = value
    with pytest.raises(UserError) as caught:
        schema.read(run_json.save(tmp_path, data))
    assert str(caught.value) == f"{tmp_path / 'run.json'}: rows[1].{path}: expected {expected}"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("latency_ms", {"padded": {"rounds": [0]}}, ".padded.rounds[0]: expected a number above 1e-12, given 0"),
        ("grid", [{"batch": 0, "length": 16}], "[0].batch: expected a whole number of at least 1, given 0"),
        ("grid", [{"batch": 1}], "[0].length: expected a whole number, given nothing"),
        ("cold_start_ms", 5, ": expected an object, given a whole number"),
        ("profile", {"operators": [{}]}, ".operators[0].name: expected a text, given nothing"),
    ],
)
def test_what_a_runtime_measured_is_checked_too(tmp_path: Path, key: str, value: Any, expected: str) -> None:
    data = run_json.run()
    run_json.in_torch(data["rows"][1])[key] = value
    with pytest.raises(UserError) as caught:
        schema.read(run_json.save(tmp_path, data))
    assert str(caught.value) == f"{tmp_path / 'run.json'}: rows[1].cost.runtimes.torch.{key}{expected}"


@pytest.mark.parametrize(
    "text",
    [
        '{"schema": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"schema": 2, "seed": ' + "1" * 5000 + "}",
        "\ud800",
        "[" * 900,
    ],
    ids=["nested", "digits", "surrogate", "torn"],
)
def test_what_cannot_be_read_ends_in_one_line(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert main([f"study={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path / 'run.json'}: expected ") and said.count("\n") == 1 and len(said) < 400


def test_what_a_terminal_acts_on_is_written_out_when_a_file_is_read(tmp_path: Path) -> None:
    data = run_json.run(overrides=("study=\x1b]0;x\x07",))
    data["rows"][0]["name"] = "Teacher\x1b[31m\n\ud800"
    data["rows"][0]["metrics"] = {"sst2": {"\x1b": {"accuracy": 0.5}}}
    run = schema.read(run_json.save(tmp_path, data))
    assert run.rows[0].name == r"Teacher\x1b[31m \ud800"
    assert list(run.rows[0].metrics["sst2"]) == [r"\x1b"]
    assert run.overrides == {"study": r"\x1b]0;x\x07"}


def test_missing_null_and_infinite_numbers_are_missing(tmp_path: Path) -> None:
    data = run_json.run()
    data["rows"][0]["cost"] |= {"macs": None, "flops": float("nan"), "params": float("inf")}
    del data["rows"][0]["cost"]["params_visible"]
    data["rows"][0]["metrics"]["sst2"]["validation"] = {"accuracy": float("-inf"), "f1": None}
    run = schema.read(run_json.save(tmp_path, data))
    cost = run.rows[0].cost
    assert (cost.macs, cost.flops, cost.params, cost.params_visible) == (None, None, None, None)
    missing = [
        m.FLOPS,
        m.own_metric("accuracy"),
        m.own_metric("f1"),
        m.own_metric("matthews"),
        m.ratio("flops", "parent", 0),
    ]
    assert [measure.read(run, run.rows[0]) for measure in missing] == [None] * 5


def test_a_number_is_read_in_its_own_runtime_and_only_torch_computes_quantized_layers_in_float() -> None:
    data = run_json.run()
    row = data["rows"][4]
    row["findings"] = {"quantization": run_json.QUANTIZATION}
    other = json.loads(json.dumps(run_json.in_torch(row)))
    other["size_bytes"], other["latency_ms"]["padded"] = 5.0, {"p50": 2.0, "unstable": True}
    row["cost"]["runtimes"]["another"] = other
    row["delta"]["teacher"]["runtimes"]["another"] = {"compression_ratio": 7.0, "speed_up": {"padded": 3.0}}
    run = schema.parse(Path("run.json"), data)
    latency, speed_up = m.latency("padded", "p50", 0), m.speed_up("padded", "teacher", 0)
    own = [m.SIZE, latency, m.ratio("compression", "teacher", 0), speed_up]
    cost, ratios = run_json.in_torch(row), row["delta"]["teacher"]["runtimes"]["torch"]
    assert [measure.read(run, run.rows[4]) for measure in own] == [
        cost["size_bytes"],
        cost["latency_ms"]["padded"]["p50"],
        ratios["compression_ratio"],
        ratios["speed_up"]["padded"],
    ]
    there = [replace(measure, runtime="another") for measure in own]
    assert [measure.read(run, run.rows[4]) for measure in there] == [5.0, 2.0, 7.0, 3.0]
    assert [measure.read(run, run.rows[0]) for measure in there] == [None] * 4
    assert timing_notes(latency, run, run.rows[4]) == timing_notes(speed_up, run, run.rows[4]) == [SIMULATED]
    assert timing_notes(there[1], run, run.rows[4]) == timing_notes(there[3], run, run.rows[4]) == [UNSTABLE]


def test_a_name_used_twice_is_made_unique(tmp_path: Path) -> None:
    data = run_json.run()
    data["rows"][1]["name"] = "Teacher"
    assert [row.name for row in schema.read(run_json.save(tmp_path, data)).rows][:2] == [
        "Teacher",
        "Teacher (2)",
    ]


def test_jobs_are_found_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 2, 0):
        run_json.save(tmp_path / str(number), run_json.run(number=number))
    assert [file.parent.name for file in schema.find(tmp_path)] == ["0", "2", "10"]
    assert schema.find(tmp_path / "2") == [tmp_path / "2" / "run.json"]


def test_overrides_are_read_with_their_signs_and_quotes_removed(tmp_path: Path) -> None:
    data = run_json.run(overrides=("+a.b='x'", "++c=1", "task=sst2"))
    run = schema.read(run_json.save(tmp_path, data))
    assert run.overrides == {"a.b": "x", "c": "1", "task": "sst2"}
    assert [run.setting(key) for key in ("c", "prune.ratio", "order", "no.such")] == [
        "1",
        "0.2",
        "default",
        "default",
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["studdy=x"],
            "error: expected study=<directory> or devices=<files> or margin=<fraction>, given studdy=x (see --help)",
        ),
        (["x"], "error: expected study=<directory> or devices=<files> or margin=<fraction>, given x (see --help)"),
        ([], "error: study: expected a directory, given nothing (see --help)"),
        (["study="], "error: study: expected a directory, given nothing (see --help)"),
        (["study=a", "study=b"], "error: study: expected one directory, given a and b (see --help)"),
        (
            ["study=\x1b[31m"],
            r"error: study: expected a directory with run.json in or below it, given \x1b[31m (a path "
            "that is not a directory)",
        ),
    ],
)
def test_a_wrong_argument_ends_in_one_line(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err == expected + "\n"


def test_a_directory_without_runs_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"study={tmp_path}"]) == 2
    assert main([f"study={tmp_path / 'no'}"]) == 2
    (tmp_path / "file").touch()
    assert main([f"study={tmp_path / 'file'}"]) == 2
    (tmp_path / "job" / "run.json").mkdir(parents=True)
    assert main([f"study={tmp_path / 'job'}"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4
    assert all(str(tmp_path) in line and line.startswith("error: study: expected") for line in errors)


def test_the_report_loads_neither_torch_nor_transformers(tmp_path: Path) -> None:
    directory = run_json.save(tmp_path, run_json.run())
    program = (
        "import sys; from edgemin.report.__main__ import main; "
        f"assert 'matplotlib' not in sys.modules; assert main(['study={directory}']) == 0; "
        "assert not {'torch', 'transformers', 'datasets', 'pytorch_lightning'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_answers_without_loading_matplotlib() -> None:
    program = (
        "import sys; from edgemin.report.__main__ import main; assert main(['--help']) == 0; "
        "assert 'matplotlib' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "study=<directory>" in done.stdout


def test_every_field_of_the_synthetic_run_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "run_json.md").read_text(encoding="utf-8")
    data = json.loads(json.dumps(run_json.run()))
    keys = {
        *data,
        *data["task"],
        *data["rows"][0],
        *data["rows"][0]["cost"],
        *run_json.in_torch(data["rows"][0]),
        *data["rows"][0]["delta"]["teacher"],
        *data["rows"][0]["delta"]["teacher"]["runtimes"]["torch"],
        *data["order"],
    }
    keys |= {
        "findings",
        "gate",
        *run_json.gate(run_json.run(), 1, parent=0, passed=False),
        *run_json.sensitivity(),
        *run_json.QUANTIZATION,
    }
    keys |= set(data["nodes"][0]) | set(run_json.in_torch(data["rows"][0])["latency_ms"]["padded"])
    assert not {key for key in keys if key not in page}
