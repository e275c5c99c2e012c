"""The noise floor: what same graphs differ by, and speed-ups that are no more than that."""

from __future__ import annotations

from math import comb
from pathlib import Path
from typing import Any

import pytest
import run_json
from report_tables import cell, column_keys, mean, notes, study

from edgemin.medians import around_median
from edgemin.report import drawing, figures, interaction, published, tables
from edgemin.report import measures as m
from edgemin.report.entries import entries
from edgemin.report.grid import CORE
from edgemin.report.noise import OVER_ROUNDS, Noise
from edgemin.report.points import points

P50 = m.latency("padded", "p50", CORE)


def rounds(data: dict[str, Any], number: int, times: list[float]) -> None:
    run_json.in_torch(data["rows"][number])["latency_ms"]["padded"]["rounds"] = times


def floor(*runs: dict[str, Any]) -> float:
    found = Noise(entries(study(*runs))).floor(P50)
    assert found is not None
    return found.ratio


def test_the_floor_is_the_largest_ratio_between_rows_that_are_the_same_graph() -> None:
    assert floor(run_json.run()) == pytest.approx(40.9 / 39.4)
    data = run_json.run()
    del data["rows"][2]
    assert Noise(entries(study(data))).floor(P50) is None


def test_the_floor_is_what_the_rounds_leave_open_where_that_is_larger() -> None:
    data = run_json.run()
    rounds(data, 1, [40.0] * 5)
    rounds(data, 2, [40.0, 38.0, 36.0, 32.0, 20.0])
    assert floor(data) == pytest.approx(2.0)
    rounds(data, 1, [40.0] * 10)
    rounds(data, 2, [40.0, 40.0, 40.0, 40.0, 40.0, 40.0, 38.0, 36.0, 32.0, 20.0])
    assert floor(data) == pytest.approx(40 / 32), "of ten rounds the outermost one says nothing of the median"
    rounds(data, 2, [40.0, 40.1, 40.0, 39.9, 40.0])
    assert floor(data) == pytest.approx(40.9 / 39.4)
    rounds(data, 2, [40.0])  # not the same rounds: nothing can be paired
    assert floor(data) == pytest.approx(40.9 / 39.4)


def test_rows_whose_activations_are_rounded_otherwise_are_not_the_same_graph() -> None:
    data = run_json.run()
    for number, activations in ((1, "static"), (2, "none")):
        data["rows"][number]["findings"] = {"quantization": {**run_json.QUANTIZATION, "activations": activations}}
    assert Noise(entries(study(data))).floor(P50) is None


@pytest.mark.parametrize("count", [1, 2, 5, 8, 9, 12, 15, 40])
def test_the_interval_of_a_median_is_that_of_the_binomial_distribution(count: int) -> None:
    inner = around_median(list(range(count)))
    low, high = inner[0], inner[-1]
    assert high == count - 1 - low
    # The median lies below the value at `low` if at most so many values lie below the median.
    missed = [2 * sum(comb(count, few) for few in range(int(low) + 1 + more)) / 2**count for more in (0, 1)]
    assert missed[0] <= 1 / 16 or count < 5, "as sure as five values can be"
    assert missed[1] > 1 / 16, "no narrower interval is"


def test_a_speed_up_within_the_floor_is_not_claimed_whatever_it_is_compared_with() -> None:
    data = run_json.run()
    run_json.in_torch(data["rows"][3])["latency_ms"]["padded"]["p50"] = 61.0
    run_json.fill_deltas(data)
    table = tables.stage_table(study(data))
    said = "within the noise floor of 3.8 %: no speed-up"
    assert notes(table, cell(table, "+ Head pruning", "speed_up_padded_to_teacher").marks) == [said]
    assert notes(table, cell(table, "+ Distillation", "speed_up_padded_to_student").marks) == [said]
    assert not cell(table, "+ Distillation", "speed_up_padded_to_teacher").marks
    assert not cell(table, "Teacher", "speed_up_padded_to_teacher").marks, "it is compared with itself"
    assert table is not None
    foot = next(text for mark, text in table.footnotes if "same graph" in text)
    assert foot.endswith("Noise floor: 3.8 % (padded), 3.8 % (own length); no speed-up within it is claimed")


def test_a_speed_up_whose_rounds_do_not_agree_on_its_side_of_one_is_not_claimed() -> None:
    data = run_json.run()
    del data["rows"][2]
    rounds(data, 0, [60.0, 61.0, 62.0, 63.0, 64.0])
    rounds(data, 1, [40.0, 41.0, 42.0, 90.0, 95.0])
    table = tables.stage_table(study(data))
    doubtful = cell(table, "Student baseline", "speed_up_padded_to_teacher")
    assert notes(table, doubtful.marks) == [OVER_ROUNDS]
    assert mean(table, "Student baseline", "speed_up_padded_to_teacher_p10") == pytest.approx(64 / 95 * 0.6 + 0.28)
    assert mean(table, "Student baseline", "speed_up_padded_to_teacher_p90") == pytest.approx(
        0.4 * 60 / 40 + 0.6 * 61 / 41, abs=0.01
    )
    rounds(data, 1, [40.0, 41.0, 42.0, 43.0, 44.0])
    table = tables.stage_table(study(data))
    assert not cell(table, "Student baseline", "speed_up_padded_to_teacher").marks
    assert "speed_up_padded_to_teacher_p10" in column_keys(tables.latency(study(data)))


def test_each_task_has_a_floor_of_its_own() -> None:
    runs = [run_json.run(task=task, overrides=(f"task={task}",)) for task in ("sst2", "qqp")]
    run_json.in_torch(runs[1]["rows"][2])["latency_ms"]["padded"]["p50"] = 50.0
    table = tables.latency(study(*runs))
    assert table is not None
    foot = next(text for mark, text in table.footnotes if "same graph" in text)
    assert "3.8 % (SST-2, padded)" in foot and "22.2 % (QQP, padded)" in foot


def test_an_interaction_of_latencies_within_the_floor_is_said_to_be() -> None:
    data = run_json.run()
    data["order"] |= {"stages": ["finetune", "distill", "prune", "quantize"]}
    data["order"]["ablation"] = {"name": "interaction", "stages": ["prune", "quantize"]}
    table = interaction.table(study(data))
    marked = cell(table, "Interaction", "speed_up_padded")
    assert notes(table, marked.marks) == ["within the noise floor of 3.8 %: no speed-up"]
    assert "x speed-up, padded (within the noise floor)" in interaction.sentences(study(data))[0]


def test_the_published_table_claims_no_more(tmp_path: Path) -> None:
    file = tmp_path / "published.yaml"
    file.write_text("rows: {+ Distillation: {speed_up_to_student: {sst2: 1.13}}}")
    table = published.compare(study(run_json.run()), published.read(file))
    ours = cell(table, "+ Distillation", "sst2_speed_up_padded_to_student")
    assert notes(table, ours.marks) == ["within the noise floor of 3.8 %: no speed-up"]


def test_points_within_the_floor_of_one_another_have_bars_that_overlap_and_no_others_do() -> None:
    folded = study(run_json.run())
    shown = points(folded, "sst2", P50)
    found = Noise(entries(folded)).floor(P50)
    with drawing.style():
        figure = figures.draw(shown, "T", "Accuracy (%)", P50, found)
        bare = figures.draw(shown, "T", "Accuracy (%)", P50)
    bars = [tuple(line.get_xdata()) for line in figure.axes[0].lines if line.get_gid() == "noise"]
    times = [40.9, 39.4, 38.1, 25.5, 25.1]
    assert [(start * end) ** 0.5 for start, end in bars] == pytest.approx(times)
    overlap = {
        (times[one], times[other])
        for one in range(5)
        for other in range(one + 1, 5)
        if bars[other][1] >= bars[one][0] * (1 - 1e-12)
    }
    assert overlap == {(40.9, 39.4), (39.4, 38.1), (25.5, 25.1)}
    assert any("grey bars" in text.get_text() and "3.8 %" in text.get_text() for text in figure.texts)
    seeds = study(*(run_json.run(seed=n, overrides=(f"seed={n}",), shift=0.003 * n) for n in range(2)))
    with drawing.style():
        folded_too = figures.draw(points(seeds, "sst2", P50), "T", "Accuracy (%)", P50, found)
    assert all(text.get_window_extent().x0 >= 0 for text in folded_too.texts), "all remarks at once fit below"
    assert not [line for line in bare.axes[0].lines if line.get_gid() == "noise"]
