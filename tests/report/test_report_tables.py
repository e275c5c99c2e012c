"""The tables as data: folding, ratios, columns that come and go, footnotes; published numbers beside ours."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import run_json
from report_tables import cell, column_keys, mean, notes, study

from edgemin.errors import UserError
from edgemin.report import published, render, tables
from edgemin.report.fields import Row
from edgemin.report.fold import Statistic, statistic
from edgemin.report.footnotes import BESIDE, UNSTABLE, row_notes

PAPER = Path(__file__).parents[2] / "experiments" / "paper" / "published.yaml"


def test_seeds_are_folded_into_mean_and_sample_standard_deviation() -> None:
    shifts = (-0.011, 0.002, 0.0034)
    runs = [run_json.run(seed=n, overrides=(f"seed={n}",), shift=shift) for n, shift in enumerate(shifts)]
    table = tables.stage_table(study(*runs))
    values = [0.9071 + shift for shift in shifts]
    folded = cell(table, "+ Head pruning", "accuracy_fraction").value
    assert isinstance(folded, Statistic)
    assert folded.mean == pytest.approx(statistics.mean(values), abs=1e-15)
    assert folded.sd == pytest.approx(statistics.stdev(values), abs=1e-15)
    assert folded.n == 3
    assert cell(table, "Teacher", "seeds").value == "3"
    assert table is not None and len(table.rows) == 6


def test_a_single_value_has_no_standard_deviation_and_nothing_no_statistic() -> None:
    assert statistic([0.5]) == Statistic(0.5, None, 1)
    assert statistic([0.1, 0.1, 0.1]) == Statistic(0.1, 0.0, 3, 0.1, 0.1)
    assert statistic([]) is None


def test_a_row_that_only_some_seeds_have_is_folded_over_those() -> None:
    first, second = run_json.run(seed=1, overrides=("seed=1",)), run_json.run(seed=2, overrides=("seed=2",))
    del second["rows"][5]
    del run_json.in_torch(second["rows"][4])["energy_mj"]
    table = tables.stage_table(study(first, second))
    assert cell(table, "Pruned + quantized", "seeds").value == "1"
    assert cell(table, "Teacher", "seeds").value == "2"
    energy = cell(table, "Quantized (not pruned)", "energy_mj")
    assert notes(table, energy.marks) == ["known for 1 of 2 seeds"]


def test_the_newer_of_two_equal_jobs_counts() -> None:
    old, new = run_json.run(shift=0.0), run_json.run(shift=0.01)
    new["ended"] = "2026-01-02T11:00:00+00:00"
    for runs in ((old, new), (new, old)):
        folded = study(*runs)
        table = tables.stage_table(folded)
        assert folded.superseded == 1
        assert mean(table, "Teacher", "accuracy_fraction") == pytest.approx(0.9194)
        assert table is not None and any("1 older job(s)" in text for _, text in table.footnotes)


def test_ratios_are_given_to_the_teacher_and_to_the_student_baseline() -> None:
    table = tables.stage_table(study(run_json.run()))
    row = "Pruned + quantized"
    assert mean(table, row, "compression_ratio_to_teacher") == 267_820_040 / 68_252_000
    assert mean(table, row, "compression_ratio_to_student") == 133_460_000 / 68_252_000
    assert mean(table, row, "speed_up_padded_to_teacher") == pytest.approx(62.7 / 25.1)
    assert mean(table, row, "speed_up_task_to_student") == pytest.approx(40.9 / 25.1)
    assert mean(table, row, "metric_retained_of_teacher_fraction") == 0.8980 / 0.9094
    assert mean(table, row, "metric_retained_of_student_fraction") == 0.8980 / 0.9209
    assert mean(table, "Student baseline", "compression_ratio_to_student") == 1.0


def test_swept_overrides_become_leading_columns_and_the_rest_does_not() -> None:
    runs = [
        run_json.run(number=n, overrides=("trainer=cpu", f"prune.ratio={ratio}", f"seed={seed}"), seed=seed)
        for n, (ratio, seed) in enumerate([(0.1, 1), (0.1, 2), (0.3, 1), (0.3, 2)])
    ]
    table = tables.stage_table(study(*runs))
    assert column_keys(table)[:3] == ["prune.ratio", "name", "seeds"]
    assert table is not None and len(table.rows) == 8 and table.sections == (4, 6)
    assert cell(table, "+ Head pruning", "seeds", ("0.3",)).value == "2"


def test_a_row_that_the_swept_key_does_not_touch_is_printed_once() -> None:
    ratios = ("0.1", "0.2", "0.3")
    runs = [run_json.run(number=n, overrides=(f"prune.ratio={ratio}",)) for n, ratio in enumerate(ratios)]
    for data, p50 in zip(runs, (60.0, 63.0, 66.0), strict=True):
        run_json.in_torch(data["rows"][0])["latency_ms"]["padded"]["p50"] = p50
    table = tables.stage_table(study(*runs))
    assert table is not None
    names = [(row[0].value, row[1].value) for row in table.rows]
    shared = ("Teacher", "Student baseline", "+ Distillation", "Quantized (not pruned)")
    pruned = ("+ Head pruning", "Pruned + quantized")
    assert names == [("all", name) for name in shared] + [(ratio, name) for ratio in ratios for name in pruned]
    assert cell(table, "Teacher", "latency_padded_p50_ms", ("all",)).value == Statistic(63.0, None, 1)
    assert any(note.startswith("all: one model for all these jobs") for mark, note in table.footnotes if not mark)


def test_rows_that_say_something_else_in_another_job_stay_apart() -> None:
    def rows(**second: Any) -> int:
        one, two = (run_json.run(number=n, overrides=(f"x={n}",)) for n in range(2))
        two["rows"][0] |= second
        table = tables.stage_table(study(one, two))
        assert table is not None
        return len(table.rows)

    metrics = run_json.run(shift=0.01)["rows"][0]["metrics"]
    measured = "latency in openvino, int8: 4.20 ms measured, 4.00 asked (+5.0 %), 3.95 predicted"
    assert rows() == rows(predictions="predictions/7") == rows(notes=[measured]) == 6
    for change in ({"artifact": "another"}, {"artifact": None}, {"metrics": metrics}, {"notes": ["x"]}):
        assert rows(**change) == 7, change
    threads = [run_json.run(number=n, overrides=(f"measure.threads={n + 1}",)) for n in range(2)]
    for n, data in enumerate(threads):
        data["config"]["measure"] = {"threads": n + 1}
    table = tables.stage_table(study(*threads))
    assert table is not None and len(table.rows) == 12


def test_a_shared_row_is_not_compared_with_students_that_are_not_shared() -> None:
    runs = [run_json.run(number=n, overrides=(f"student.layers={n}",)) for n in (3, 6)]
    for data in runs:
        for row in data["rows"][1:]:
            row["artifact"] += str(data["job"]["number"])
            run_json.in_torch(row)["size_bytes"] += data["job"]["number"] * 1000
        run_json.fill_deltas(data)
    table = tables.stage_table(study(*runs))
    assert cell(table, "Teacher", "compression_ratio_to_student", ("all",)).value is None
    assert mean(table, "Teacher", "compression_ratio_to_teacher", ("all",)) == 1.0


def test_a_gate_of_a_shared_row_counts_its_seeds_once() -> None:
    runs = []
    for number, (ratio, seed) in enumerate([("0.1", 1), ("0.1", 2), ("0.2", 1), ("0.2", 2)]):
        data = run_json.run(number=number, seed=seed, overrides=(f"prune.ratio={ratio}", f"seed={seed}"))
        data["rows"][4]["gate"] = run_json.gate(data, 4, parent=2, passed=seed == 2)
        runs.append(data)
    table = tables.stage_table(study(*runs))
    said = notes(table, cell(table, "Quantized (not pruned)", "name", ("all",)).marks)
    assert len(said) == 1 and "in 1 of 2 seeds" in said[0]


def test_a_job_without_the_override_takes_its_value_from_the_config() -> None:
    table = tables.stage_table(study(run_json.run(), run_json.run(overrides=("prune.ratio=0.3",))))
    assert cell(table, "+ Head pruning", "size_bytes", ("0.2",)).value is not None
    assert cell(table, "+ Head pruning", "size_bytes", ("0.3",)).value is not None


def test_two_tasks_stand_side_by_side_where_the_other_overrides_match() -> None:
    runs = [
        run_json.run(task=task, shift=shift, overrides=(f"task={task}", f"prune.ratio={ratio}"))
        for task, shift in (("sst2", 0.0), ("qqp", -0.05))
        for ratio in (0.1, 0.2)
    ]
    table = tables.accuracy(study(*runs))
    assert column_keys(table)[:2] == ["prune.ratio", "name"]
    assert table is not None and len(table.rows) == 8
    for ratio, row, value in (("all", "Teacher", 0.9094), ("0.1", "+ Head pruning", 0.9071)):
        assert mean(table, row, "sst2_validation_accuracy_fraction", (ratio,)) == value
        assert mean(table, row, "qqp_validation_accuracy_fraction", (ratio,)) == pytest.approx(value - 0.05)
    latency = tables.latency(study(*runs))
    assert {"sst2_latency_padded_p50_ms", "qqp_latency_padded_p50_ms"} < set(column_keys(latency))


def test_zero_shot_transfer_is_footnoted_and_kept_apart_from_training() -> None:
    source = run_json.run(task="sst2", overrides=("task=sst2",))
    for row in source["rows"]:
        row["metrics"]["mnli"] = {"validation_matched": {"accuracy": 0.33, "n": 9815}}
        row["transfer"] = ["mnli"]
    trained = run_json.run(task="mnli", split="validation_matched", overrides=("task=mnli",))
    for runs in ((source,), (source, trained)):
        table = tables.accuracy(study(*runs))
        key = "mnli_validation_matched_accuracy_zero_shot_from_sst2_fraction"
        assert mean(table, "Teacher", key) == 0.33
        assert table is not None
        column = next(column for column in table.columns if column.key == key)
        assert "label spaces mapped by index" in notes(table, column.marks)[0]
    assert mean(table, "Teacher", "mnli_validation_matched_accuracy_fraction") == 0.9094


def test_missing_measures_lose_their_column_and_empty_tables_vanish() -> None:
    bare = run_json.run(measured=False)
    built = {table.name: table for table in tables.tables(study(bare))}
    assert set(built) == {"stages", "table1_accuracy", "table3_size", "table4_flops", "contributions"}
    assert not [key for key in column_keys(built["stages"]) if "latency" in key or "energy" in key]
    for row in bare["rows"]:
        row["metrics"] = {}
        row["delta"] = {"teacher": None, "student": None}
    bare["task"] = None
    built = {table.name: table for table in tables.tables(study(bare))}
    assert set(built) == {"stages", "table3_size", "table4_flops", "contributions"}
    assert column_keys(built["table4_flops"]) == ["name", "flops", "macs"]


def test_estimates_unstable_timings_and_notes_are_footnoted() -> None:
    data = run_json.run()
    run_json.in_torch(data["rows"][3])["latency_ms"]["padded"]["unstable"] = True
    data["rows"][4]["notes"] = ["evaluated on the first 100 examples"]
    table = tables.stage_table(study(data))
    assert table is not None
    energy = next(column for column in table.columns if column.key == "energy_mj")
    assert "estimate" in notes(table, energy.marks)[0]
    assert notes(table, cell(table, "+ Head pruning", "latency_padded_p50_ms").marks) == [UNSTABLE]
    assert notes(table, cell(table, "+ Head pruning", "speed_up_padded_to_student").marks) == [UNSTABLE]
    assert not cell(table, "+ Head pruning", "latency_task_p50_ms").marks
    assert notes(table, cell(table, "Quantized (not pruned)", "name").marks) == data["rows"][4]["notes"]


def test_what_was_measured_beside_other_work_is_footnoted() -> None:
    data = run_json.run()
    run_json.in_torch(data["rows"][3])["measured_beside_other_work"] = True
    table = tables.stage_table(study(data))
    for key in ("latency_padded_p50_ms", "latency_task_p50_ms", "speed_up_padded_to_student", "energy_mj"):
        assert BESIDE in notes(table, cell(table, "+ Head pruning", key).marks)
        assert BESIDE not in notes(table, cell(table, "+ Distillation", key).marks)
    assert not cell(table, "+ Head pruning", "size_bytes").marks


def test_speed_ups_to_an_unstable_reference_are_flagged_too() -> None:
    data = run_json.run()
    run_json.in_torch(data["rows"][0])["latency_ms"]["task"]["unstable"] = True
    table = tables.stage_table(study(data))
    assert notes(table, cell(table, "+ Distillation", "speed_up_task_to_teacher").marks) == [UNSTABLE]
    assert UNSTABLE not in notes(table, cell(table, "+ Distillation", "speed_up_task_to_student").marks)


def test_rows_of_one_graph_are_named_with_the_noise_between_them() -> None:
    table = tables.latency(study(run_json.run()))
    assert table is not None
    said = [text for mark, text in table.footnotes if "same graph" in text]
    assert len(said) == 1
    assert said[0].startswith("Student baseline and + Distillation are the same graph")
    assert "3.8 %" in said[0]


def test_tables_from_two_machines_say_so() -> None:
    one, two = run_json.run(overrides=("a=1",)), run_json.run(overrides=("a=2",))
    two["host"] = {"cpu": "Other CPU"}
    table = tables.latency(study(one, two))
    assert table is not None and any("different machines" in text for _, text in table.footnotes)


def test_footnotes_are_lettered_anew_when_columns_go() -> None:
    table = tables.stage_table(study(run_json.run()))
    assert table is not None
    places = [place for place, key in enumerate(column_keys(table)) if key in ("name", "energy_mj")]
    small = table.only(places)
    assert small.columns[1].marks == ("a",)
    assert small.footnotes[0][0] == "a" and "estimate" in small.footnotes[0][1]


def test_published_figures_stand_beside_ours() -> None:
    table = published.compare(study(run_json.run()), published.read(PAPER))
    assert mean(table, "Teacher", "accuracy_percent_sst2_published") == 90.94
    assert mean(table, "Teacher", "sst2_accuracy_fraction") == 0.9094
    assert mean(table, "Teacher", "accuracy_percent_sst2_difference_pp") == pytest.approx(0, abs=1e-9)
    assert mean(table, "Pruned + quantized", "size_mib_published") == 65.09
    assert abs(mean(table, "Pruned + quantized", "size_mib_difference_percent")) < 0.5
    estimated = cell(table, "Pruned + quantized", "accuracy_percent_sst2_published")
    assert "estimated" in notes(table, estimated.marks)[0]
    assert cell(table, "Teacher", "flops_g_published").value is None
    assert mean(table, "Teacher", "flops") == 11_174_000_000


def test_published_figures_of_architectures_need_no_task() -> None:
    data = run_json.run(measured=False)
    data["task"] = None
    for row in data["rows"]:
        row["metrics"] = {}
    table = published.compare(study(data), published.read(PAPER))
    assert not [key for key in column_keys(table) if "accuracy" in key or "speed" in key]
    assert mean(table, "+ Head pruning", "params_visible_m_published") == 32.18


def test_a_range_stands_beside_ours_and_what_lies_in_it_differs_by_nothing(tmp_path: Path) -> None:
    file = tmp_path / "published.yaml"
    promised = "retained_percent: {sst2: [95, 99]}, compression_to_teacher: {value: [5, 10], note: of the teacher}"
    file.write_text(f"rows: {{Pruned + quantized: {{{promised}, peak_memory_mib: [0, 200]}}}}")
    read = published.read(file)
    copied = tmp_path / "copy.yaml"
    copied.write_text(published.text(read))
    assert published.read(copied).rows == read.rows
    table = published.compare(study(run_json.run()), read)
    row = "Pruned + quantized"
    assert cell(table, row, "retained_percent_sst2_published").value == "95 to 99"
    assert mean(table, row, "retained_percent_sst2_difference_pp") == 0.0  # 89.80 of 90.94 is 98.7 %
    assert notes(table, cell(table, row, "compression_to_teacher_published").marks) == ["of the teacher"]
    ours = mean(table, row, "compression_ratio_to_teacher")
    assert ours == pytest.approx(3.924, abs=1e-3)
    assert mean(table, row, "compression_to_teacher_difference_percent") == pytest.approx(100 * (ours - 5) / 5)
    ours = mean(table, row, "peak_memory_bytes") / 2**20
    assert mean(table, row, "peak_memory_mib_difference_percent") == pytest.approx(100 * (ours - 200) / 200)
    assert table is not None and table.footnotes[-1][1] == "difference from a range: from its nearer end, 0 within it"
    assert "95 to 99" in render.markdown(table) and "95 to 99" in render.comma_separated(table)


def test_the_proposals_promises_are_read_and_stand_beside_the_measures_they_speak_of() -> None:
    data = run_json.with_runtimes(run_json.run(), {})
    data["rows"][5]["name"] = "+ Fine-tuning"
    table = published.compare(study(data), published.read(PAPER.with_name("proposal.yaml")))
    shown = {column.group for column in table.columns if column.group} if table is not None else set()
    assert shown == {
        "accuracy_percent_sst2",
        "retained_percent_sst2",
        "latency_ms_sst2",
        "latency_ms_sst2_own_length",
        "speed_up_to_teacher_sst2",
        "size_mib",
        "compression_to_teacher",
        "peak_memory_mib",
        "less_peak_memory_percent",
        "less_model_memory_percent",
        "less_power_percent",
        "less_energy_percent",
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rows: {A: {sizes: 1}}", "rows.A: expected one of accuracy_percent"),
        ("rows: {A: {size_mib: big}}", "rows.A.size_mib: expected a number, a range"),
        ("rows: {A: {size_mib: [2, 1]}}", "(two numbers that rise) or null, given [2, 1]"),
        ("rows: {A: {size_mib: [1, 2, 3]}}", "(two numbers that rise) or null, given [1, 2, 3]"),
        (
            "rows: {A: {accuracy_percent: 90}}",
            "rows.A.accuracy_percent: expected an object of tasks, given 90",
        ),
        ("rows: [", "expected YAML"),
        ("sauce: x\nrows: {}", "expected source, notes, runtimes and rows, given sauce"),
        ("runtimes: torch\nrows: {}", "runtimes: expected a list of texts, given 'torch'"),
    ],
)
def test_a_wrong_published_file_is_refused_in_one_line(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "published.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        published.read(file)
    assert expected in str(caught.value) and str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_first_metric_of_a_task_leads_its_table() -> None:
    data = run_json.run()
    data["task"]["metric"] = "f1"
    shown = [key for key in column_keys(tables.accuracy(study(data))) if "sst2" in key]
    assert shown == ["sst2_validation_f1_fraction", "sst2_validation_accuracy_fraction"]
    assert column_keys(tables.stage_table(study(data)))[1:5] == [
        "f1_fraction",
        "metric_retained_of_teacher_fraction",
        "size_bytes",
        "latency_padded_p50_ms",
    ]


def test_notes_of_several_seeds_that_differ_in_numbers_alone_are_one() -> None:
    runs = [run_json.run(seed=n, overrides=(f"seed={n}",)) for n in range(3)]
    for run, (points, left) in zip(runs, (("+2.6", 9), ("-0.4", 10), ("+3.8", 9)), strict=True):
        run["rows"][-1]["notes"] = [
            f"removed 2 of 12 heads; left per layer: [{left}, 8]",
            "removed 1 of 4 FFN units",
            "removed 3 of 4 FFN units",
            f"INT8 in runtime2: {points} %",
        ]
    name = runs[0]["rows"][-1]["name"]
    table = tables.stage_table(study(*runs))
    assert table is not None
    said = notes(table, cell(table, name, "name").marks)
    assert said[:4] == [
        "removed 2 of 12 heads; left per layer: [9 to 10, 8]",
        "removed 1 of 4 FFN units",
        "removed 3 of 4 FFN units",
        "INT8 in runtime2: -0.4 to +3.8 %",
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["3.35 ms, -0.0 %", "3.5 ms, 0.0 %"], ["3.35 to 3.5 ms, -0.0 %"]),
        (["[9, 8], 1 layer", "[10, 8], 1 layer"], ["[9 to 10, 8], 1 layer"]),
        (["layer 3: 4 heads", "layer 5: 6 heads"], ["layer 3: 4 heads", "layer 5: 6 heads"]),
        (["torch 2.9.0", "torch 2.13.0"], ["torch 2.9.0", "torch 2.13.0"]),
        (["1e-05 off", "1e-06 off"], ["1e-05 off", "1e-06 off"]),
        (["1,234 of them", "2,100 of them"], ["1,234 of them", "2,100 of them"]),
        (["gains 3.5x", "gains 12.5x"], ["gains 3.5x", "gains 12.5x"]),
        (["a 64-Core machine", "a 96-Core machine"], ["a 64-Core machine", "a 96-Core machine"]),
    ],
)
def test_only_whole_numbers_of_a_note_become_ranges(given: list[str], said: list[str]) -> None:
    rows = [Row.model_validate({**run_json.run()["rows"][0], "notes": [note]}) for note in given]
    assert row_notes(rows) == said
