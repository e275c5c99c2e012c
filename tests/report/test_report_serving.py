"""From a run to its bundle: which row is named, by which commands, and what a card says was measured."""

from __future__ import annotations

import copy
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import run_json

from edgemin.errors import UserError
from edgemin.report.serving import commands, measured

FASTEST = "Pruned + quantized"


def served(directory: Path, **changed: Any) -> Path:
    """A run in torch and OpenVINO, where the last row is the fastest; `changed` are fields of that row."""
    content = run_json.run()
    content["config"] = {"paths": {"store": "out puts/store"}, "task": {"text_columns": ["premise", "hypothesis"]}}
    for row in content["rows"]:
        torch = row["cost"]["runtimes"]["torch"]
        row["cost"]["runtimes"]["openvino"] = copy.deepcopy({**torch, "metrics": row["metrics"], "agreement": 0.995})
    content["rows"][-2]["cost"]["runtimes"]["openvino"]["latency_ms"]["padded"]["p50"] *= 1.2  # more than noise
    content["rows"][-1] |= changed
    directory.mkdir(parents=True)
    (directory / "run.json").write_text(json.dumps(content))
    return directory


def test_the_fastest_row_that_passed_is_named_with_commands_to_copy(tmp_path: Path) -> None:
    title, export, predict = commands(served(tmp_path / "0"))
    assert FASTEST in title and "25.10 ms at 128 tokens" in title and "in openvino" in title
    given = dict(word.split("=", 1) for word in shlex.split(export)[3:])
    assert given["artifact"].startswith("out puts/store/student/finetune/distill/prune/quantize")
    assert (given["deploy"], given["study"]) == ("openvino", str(tmp_path / "0"))
    asked = dict(word.split("=", 1) for word in shlex.split(predict)[3:])
    assert asked["model"] == given["out"] and set(asked) == {"model", "text", "text_pair"}


def timed(directory: Path, noise: float, last: float, accuracy: float) -> str:
    """What is said where the two rows that are one graph differ by a share, and the last one is so much slower."""
    content = json.loads((served(directory) / "run.json").read_text())
    rows = {row["name"]: row["cost"]["runtimes"]["openvino"] for row in content["rows"]}
    for name, p50 in (("Student baseline", 90.0), ("+ Distillation", 90 * noise), ("Quantized (not pruned)", 30.0)):
        rows[name]["latency_ms"]["padded"]["p50"] = p50
    rows[FASTEST]["latency_ms"]["padded"]["p50"] = 30 * last
    rows[FASTEST]["metrics"]["sst2"]["validation"]["accuracy"] = accuracy
    (directory / "run.json").write_text(json.dumps(content))
    return commands(directory)[0]


def test_of_rows_that_are_as_fast_within_the_noise_the_most_accurate_is_named(tmp_path: Path) -> None:
    for number, (noise, last) in enumerate([(1.05, 1.04), (1.05, 0.96)]):
        said = timed(tmp_path / f"better {number}", noise, last, 0.95)
        assert said.startswith(f"To serve {FASTEST}, ") and "accuracy 0.9500" in said
        assert said.endswith("; as fast within the noise, and no more accurate: Quantized (not pruned)):")
        worse = timed(tmp_path / f"worse {number}", noise, last, 0.5)
        assert worse.startswith("To serve Quantized (not pruned), ") and f"no more accurate: {FASTEST})" in worse
    beyond = timed(tmp_path / "beyond", 1.02, 1.04, 0.95)
    assert beyond.startswith("To serve Quantized (not pruned), ") and "within the noise" not in beyond
    equal = timed(tmp_path / "equal", 1.05, 1.04, 0.91)
    assert equal.startswith(f"To serve {FASTEST}, "), "of equally accurate rows the smaller one"


def test_rows_whose_rounds_leave_open_which_is_faster_are_as_fast(tmp_path: Path) -> None:
    content = json.loads((served(tmp_path / "0") / "run.json").read_text())
    last, before = (row["cost"]["runtimes"]["openvino"] for row in content["rows"][:-3:-1])
    last["latency_ms"]["padded"] |= {"p50": 10.0, "rounds": [10.0, 10.1, 9.9, 10.0, 10.2]}
    before["latency_ms"]["padded"] |= {"p50": 11.0, "rounds": [11.0, 11.2, 9.8, 11.0, 11.1]}
    before["metrics"]["sst2"]["validation"]["accuracy"] = 0.99
    (tmp_path / "0" / "run.json").write_text(json.dumps(content))
    assert commands(tmp_path / "0")[0].startswith("To serve Quantized (not pruned), ")
    before["latency_ms"]["padded"]["rounds"] = [11.0, 11.2, 10.8, 11.0, 11.1]
    (tmp_path / "0" / "run.json").write_text(json.dumps(content))
    assert commands(tmp_path / "0")[0].startswith(f"To serve {FASTEST}, ")


@pytest.mark.parametrize(
    "changed",
    [{"gate": {"passed": False}}, {"control": True}, {"collapsed": {"sst2": {"validation": {}}}}],
    ids=["failed", "control", "collapsed"],
)
def test_a_row_that_should_not_be_served_is_not_named(tmp_path: Path, changed: dict[str, Any]) -> None:
    assert "Quantized (not pruned)" in commands(served(tmp_path / "0", **changed))[0]


@pytest.mark.parametrize(("accuracy", "named"), [(0.909, True), (0.85, False)], ids=["recovered", "still lost"])
def test_after_a_row_that_failed_the_loss_counts_from_the_last_one_that_passed(
    accuracy: float, named: bool, tmp_path: Path
) -> None:
    content = json.loads((served(tmp_path / "0") / "run.json").read_text())
    rows = {row["name"]: row for row in content["rows"]}
    last, pruned = rows[FASTEST], rows[rows[FASTEST]["made_from"]]
    rows[pruned["made_from"]]["metrics"]["sst2"]["validation"]["accuracy"] = 0.91
    last["metrics"]["sst2"]["validation"]["accuracy"] = accuracy
    pruned["gate"] = {"passed": False, "max_drop": 0.01}
    last["gate"] = {"passed": True, "max_drop": 0.01}
    (tmp_path / "0" / "run.json").write_text(json.dumps(content))
    said = commands(tmp_path / "0")[0]
    assert (FASTEST in said) == named and "of the rows that passed the quality gate the fastest" in said


def test_without_a_gate_none_was_passed(tmp_path: Path) -> None:
    assert "of the rows that can be exported the fastest" in commands(served(tmp_path / "0"))[0]


def test_of_a_sweep_one_row_is_named_and_of_torch_alone_none(tmp_path: Path) -> None:
    served(tmp_path / "sweep" / "0")
    served(tmp_path / "sweep" / "1", gate={"passed": False})
    title, export, _ = commands(tmp_path / "sweep")
    assert FASTEST in title and f"study={tmp_path / 'sweep' / '0'}" in export
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "run.json").write_text(json.dumps(run_json.run()))
    assert commands(tmp_path / "alone") == []


def test_the_table_of_a_card_has_a_line_for_each_runtime_and_says_where(tmp_path: Path) -> None:
    study = served(tmp_path / "0")
    key = json.loads((study / "run.json").read_text())["rows"][-1]["artifact"]
    table = measured(study, key).splitlines()
    assert table[0].startswith("| runtime | accuracy | size, MiB | p50, ms |")
    assert [line.split(" | ")[0] for line in table[2:4]] == ["| torch", "| openvino"]
    assert table[3] == "| openvino | 0.8980 | 65.1 | 25.10 | 24.35 - 26.36 | 11.41 | 99.5 |"
    assert table[-1].startswith("Measured on ") and "batch 1, 128 tokens" in table[-1]
    with pytest.raises(UserError, match=r"artifact none, given .*, which has none"):
        measured(study, "none")


def test_paths_below_the_current_directory_are_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served(tmp_path / "0")
    monkeypatch.chdir(tmp_path)
    _, export, predict = commands(tmp_path / "0")
    assert "study=0 " in export and export.endswith("out=0/bundle") and "model=0/bundle" in predict
