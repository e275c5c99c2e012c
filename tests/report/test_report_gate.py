"""Quality gates and simulated arithmetic: rows that lost too much, and rows whose time means little."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
import run_json
from report_tables import cell, mean, notes, study

from edgemin.errors import UserError
from edgemin.report import measures, render, schema, tables
from edgemin.report.findings import Findings
from edgemin.report.fold import fold
from edgemin.report.footnotes import SIMULATED, UNSTABLE
from edgemin.report.gate import gate_details
from edgemin.report.grid import CORE
from edgemin.report.page import page
from edgemin.report.points import points
from edgemin.report.schema import parse

ROW = "Pruned + quantized"


def gated(*, passed: bool = False, seed: int = 42, **changes: Any) -> dict[str, Any]:
    data = run_json.run(seed=seed, overrides=(f"seed={seed}",))
    data["rows"][5]["gate"] = run_json.gate(data, 5, parent=3, passed=passed, **changes)
    return data


def flagged(*runs: dict[str, Any]) -> list[str]:
    table = tables.stage_table(study(*runs))
    return notes(table, cell(table, ROW, "name").marks)


def test_a_gate_that_did_not_pass_is_flagged_at_the_rows_name_in_every_table() -> None:
    data = gated(drop=0.0321)
    said = 'quality gate not passed: quantize cost 3.2 points of accuracy (95 %: 2.0 to 4.5) against "+ Head pruning"'
    said = f"{said} (1.0 allowed)"
    assert flagged(data) == [said] and len(said) <= 120
    for table in tables.tables(study(data)):
        assert notes(table, cell(table, ROW, "name").marks) == [said], table.name
        assert not cell(table, "+ Head pruning", "name").marks


def test_a_gate_that_passed_or_was_not_set_says_nothing_on_the_page() -> None:
    assert flagged(gated(passed=True)) == flagged(run_json.run()) == []
    shown = render.markdown(tables.stage_table(study(gated(passed=True))))  # type: ignore[arg-type]
    assert shown == render.markdown(tables.stage_table(study(run_json.run(overrides=("seed=42",)))))  # type: ignore[arg-type]


def test_csv_holds_the_numbers_of_every_gate() -> None:
    table = tables.stage_table(study(gated(passed=True)))
    assert table is not None
    found = {row["name"]: row for row in csv.DictReader(io.StringIO(render.comma_separated(table)))}
    assert float(found[ROW]["agreement_with_parent_fraction"]) == 1 - 41 / 872
    assert found[ROW]["predictions_changed"] == "41"
    assert float(found[ROW]["gate_drop_fraction"]) == 0.9071 - 0.8980
    assert float(found[ROW]["gate_drop_from_fraction"]) == 0.9071 - 0.8980 - 0.012
    assert float(found[ROW]["gate_drop_to_fraction"]) == 0.9071 - 0.8980 + 0.013
    assert found[ROW]["gate_max_drop_fraction"] == "0.01"
    assert found["Teacher"]["agreement_with_parent_fraction"] == ""


def test_seeds_that_failed_are_counted_and_their_worst_layers_added_up() -> None:
    def worst(**damage: float) -> list[dict[str, Any]]:
        return [{"layer": name, "damage": value} for name, value in damage.items()]

    runs = [
        gated(seed=1, passed=False, drop=0.021, flips=30, worst=worst(a=0.3, b=0.2)),
        gated(seed=2, passed=True, drop=0.001, flips=3),
        gated(seed=3, passed=False, drop=0.032, flips=41, worst=worst(c=0.25, b=0.2)),
    ]
    assert flagged(*runs) == [
        "quality gate not passed in 2 of 3 seeds: quantize cost 2.1 to 3.2 points of accuracy against "
        '"+ Head pruning" (1.0 allowed)'
    ]
    (detail,) = gate_details(study(*runs))
    assert detail.endswith("(1.0 allowed), 30 to 41 of 872 predictions changed; worst layers: b, a, c")
    assert mean(tables.stage_table(study(*runs)), ROW, "predictions_changed") == pytest.approx((30 + 3 + 41) / 3)


def test_a_parent_without_a_row_is_named_by_its_path_and_another_split_by_its_name() -> None:
    data = gated(parent_artifact="elsewhere", split="holdout", worst=[], metric="pearson", max_drop=0.0005)
    data["rows"][5]["gate"] |= {"parent": "student/finetune/recover", "agreement": None, "flips": None}
    assert flagged(data) == [
        "quality gate not passed: quantize cost 0.91 points of Pearson on holdout (95 %: -0.29 to 2.21) against "
        "student/finetune/recover (0.05 allowed)"
    ]
    assert gate_details(study(data)) == [f"{ROW}: {flagged(data)[0]}"], "no predictions to count, no layers"


def test_all_stages_between_a_row_and_the_row_it_was_made_from_are_named() -> None:
    data = gated(drop=0.0321)
    data["rows"][5]["gate"] |= {"parent": "student/finetune", "parent_artifact": data["rows"][1]["artifact"]}
    (said,) = flagged(data)
    assert said.startswith("quality gate not passed: distill, prune, quantize cost 3.2 points of accuracy")
    assert 'against "Student baseline"' in said


def test_what_is_left_with_one_answer_says_so() -> None:
    assert flagged(gated(drop=0.4, collapsed=True)) == [
        "quality gate not passed: quantize left one answer to every example (cost 40.0 points of accuracy)"
    ]


def test_the_page_has_every_gate_with_its_worst_layers_once() -> None:
    data = gated(drop=0.0321)
    shown = page(study(data), tables.tables(study(data)), [], [], [])
    assert shown.count("41 of 872 predictions changed; worst layers: ") == 1
    assert "## Quality gates not passed" in shown
    assert "Quality gates" not in page(study(gated(passed=True)), [], [], [], [])


def test_a_drop_is_told_from_the_limit_it_exceeds() -> None:
    assert "1.04 points of accuracy" in flagged(gated(drop=0.0104))[0]
    assert "(1.00 allowed)" in flagged(gated(drop=0.0104))[0]


def test_tasks_side_by_side_say_which_of_them_failed() -> None:
    runs = [run_json.run(task=task, overrides=(f"task={task}",)) for task in ("sst2", "qqp")]
    runs[1]["rows"][5]["gate"] = run_json.gate(runs[1], 5, parent=3, passed=False)
    table = tables.accuracy(study(*runs))
    (said,) = notes(table, cell(table, ROW, "name").marks)
    assert said.startswith("quality gate not passed on QQP: quantize cost 0.9 points")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"passed": None}, "passed: expected true or false, given nothing"),
        ({"worst": [{"layer": "a"}]}, "worst[0].damage: expected a number, given nothing"),
        ({"drop": "big"}, "drop: expected a number, given a text"),
    ],
)
def test_a_gate_of_another_form_is_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    data = gated()
    data["rows"][5]["gate"] |= changes
    with pytest.raises(UserError) as caught:
        schema.read(run_json.save(tmp_path, data))
    assert str(caught.value) == f"{tmp_path / 'run.json'}: rows[5].gate.{expected}"


@pytest.mark.parametrize(("key", "absent"), [("gate", None), ("findings", Findings())])
def test_gate_and_findings_are_objects_where_they_are_there(tmp_path: Path, key: str, absent: Findings | None) -> None:
    data = run_json.run()
    data["rows"][0][key] = None
    assert getattr(schema.read(run_json.save(tmp_path, data)).rows[0], key) == absent
    data["rows"][0][key] = []
    with pytest.raises(UserError, match=rf"rows\[0\]\.{key}: expected an object, given a list"):
        schema.read(run_json.save(tmp_path, data))


def simulated() -> dict[str, Any]:
    data = run_json.run()
    data["rows"][4]["findings"] = {"quantization": run_json.QUANTIZATION}
    return data


def test_times_of_rounded_floats_are_footnoted_and_sizes_are_not() -> None:
    data = simulated()
    run_json.in_torch(data["rows"][4])["latency_ms"]["padded"]["unstable"] = True
    table = tables.stage_table(study(data))
    row = "Quantized (not pruned)"
    timed = ["latency_task_p50_ms", "speed_up_task_to_teacher", "throughput_task_per_s", "energy_mj", "power_w"]
    for key in [*timed, "peak_memory_bytes"]:
        assert notes(table, cell(table, row, key).marks) == [SIMULATED], key
        assert not cell(table, "Pruned + quantized", key).marks
    assert sorted(notes(table, cell(table, row, "latency_padded_p50_ms").marks)) == sorted([UNSTABLE, SIMULATED])
    for key in ("size_bytes", "compression_ratio_to_teacher", "accuracy_fraction", "threads"):
        assert not cell(table, row, key).marks, key


def test_without_times_there_is_nothing_to_warn_of() -> None:
    data = simulated()
    for row in data["rows"]:
        row["cost"]["runtimes"] = {"torch": {"size_bytes": run_json.in_torch(row)["size_bytes"]}}
        row["delta"] = {}
    table = tables.stage_table(study(data))
    assert table is not None and SIMULATED not in {text for _, text in table.footnotes}


def test_the_figure_of_latency_names_simulated_points_and_that_of_size_does_not() -> None:
    folded = fold([parse(Path("run.json"), simulated())])
    name = "Quantized (not pruned)"
    assert f"{name} (simulated)" in {
        one.name for one in points(folded, "sst2", measures.latency("padded", "p50", CORE))
    }
    assert name in {one.name for one in points(folded, "sst2", measures.SIZE)}
