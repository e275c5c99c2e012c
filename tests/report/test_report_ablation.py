"""What `ablate=interaction` prints: the 2x2 rows found by their stages, differences and ratios, folded over seeds."""

from __future__ import annotations

import csv
import io
import statistics
from pathlib import Path
from typing import Any

import pytest
import run_json
from report_tables import cell, mean, notes, study

from edgemin.report import interaction, render, tables, write
from edgemin.report.fold import Statistic
from edgemin.report.footnotes import SIMULATED, UNSTABLE
from edgemin.study.order import Interaction

# the rows of run_json.PAPER: + Distillation, + Head pruning, Quantized (not pruned), Pruned + quantized
NEITHER, PRUNED, QUANTIZED, BOTH = 2, 3, 4, 5


def crossed(accuracies: tuple[float, float, float, float] = (0.92, 0.90, 0.91, 0.86), **given: Any) -> dict[str, Any]:
    data = run_json.run(**given)
    data["order"]["ablation"] = Interaction(["prune", "quantize"]).described
    for place, accuracy in zip((NEITHER, PRUNED, QUANTIZED, BOTH), accuracies, strict=True):
        data["rows"][place]["metrics"]["sst2"]["validation"]["accuracy"] = accuracy
    run_json.fill_deltas(data)
    return data


def below(*runs: dict[str, Any]) -> list[str]:
    table = tables.stage_table(study(*runs))
    assert table is not None
    return [text for mark, text in table.footnotes if not mark and text.startswith("interaction of")]


def test_without_the_ablation_there_is_none() -> None:
    plain, other = run_json.run(), run_json.run()
    other["order"]["ablation"] = {"name": "other", "question": "of somebody's own"}
    other["config"]["ablate"] = {"_target_": "edgemin.study.order.Interaction", "stages": ["prune", "quantize"]}
    for data in (plain, other):
        assert interaction.table(study(data)) is None and below(data) == []


def test_differences_of_the_metric_and_ratios_of_costs_are_those_of_the_four_rows() -> None:
    data = crossed()
    table = interaction.table(study(data))
    costs = [run_json.in_torch(data["rows"][place]) for place in (NEITHER, PRUNED, QUANTIZED, BOTH)]
    time = [cost["latency_ms"]["padded"]["p50"] for cost in costs]
    none, one, other, both = (cost["size_bytes"] for cost in costs)
    key = "accuracy_difference_fraction"
    expected = {
        "Only prune": (-0.02, none / one, time[0] / time[1]),
        "Only quantize": (-0.01, none / other, time[0] / time[2]),
        "Both prune and quantize": (-0.06, none / both, time[0] / time[3]),
        "Both, if they did not interact": (-0.03, none**2 / one / other, time[0] ** 2 / time[1] / time[2]),
    }
    for name, (points, ratio, speed) in expected.items():
        assert mean(table, name, key) == pytest.approx(points)
        assert mean(table, name, "compression_ratio") == pytest.approx(ratio)
        assert mean(table, name, "speed_up_padded") == pytest.approx(speed)
    assert mean(table, "Interaction", key) == pytest.approx((0.86 - 0.90) - (0.91 - 0.92))
    joint, alone = expected["Both prune and quantize"], expected["Both, if they did not interact"]
    assert mean(table, "Interaction", "compression_ratio") == pytest.approx(joint[1] / alone[1])
    assert mean(table, "Interaction", "speed_up_padded") == pytest.approx(joint[2] / alone[2])
    assert table is not None and ("", 'neither stage: the row "+ Distillation"') in table.footnotes


def test_stages_that_add_up_and_multiply_do_not_interact() -> None:
    data = crossed((0.92, 0.90, 0.91, 0.89))
    for place, size in zip((NEITHER, PRUNED, QUANTIZED, BOTH), (1200, 600, 400, 200), strict=True):
        run_json.in_torch(data["rows"][place])["size_bytes"] = size
    table = interaction.table(study(data))
    assert mean(table, "Interaction", "accuracy_difference_fraction") == pytest.approx(0, abs=1e-15)
    assert mean(table, "Interaction", "compression_ratio") == pytest.approx(1)


def test_the_interaction_is_formed_in_each_seed_and_then_folded() -> None:
    numbers = [(0.92, 0.90, 0.91, 0.86), (0.93, 0.92, 0.90, 0.90), (0.91, 0.90, 0.90, 0.88)]
    runs = [crossed(four, seed=n, overrides=(f"seed={n}",)) for n, four in enumerate(numbers)]
    values = [(both - one) - (other - none) for none, one, other, both in numbers]
    folded = cell(interaction.table(study(*runs)), "Interaction", "accuracy_difference_fraction").value
    assert isinstance(folded, Statistic) and folded.n == 3
    assert folded.mean == pytest.approx(statistics.mean(values))
    assert folded.sd == pytest.approx(statistics.stdev(values))
    (said,) = below(*runs)
    start = "interaction of prune and quantize: (both - only prune) - (only quantize - neither) is "
    assert said.startswith(f"{start}{100 * folded.mean:.2f} ± {100 * (folded.half or 0):.2f} points of accuracy; ")
    assert "0.98 x compression" in said


def test_a_seed_that_lacks_one_of_the_four_is_left_out_and_said() -> None:
    runs = [crossed(seed=n, overrides=(f"seed={n}",)) for n in range(3)]
    del runs[1]["rows"][QUANTIZED]
    table = interaction.table(study(*runs))
    value = cell(table, "Interaction", "accuracy_difference_fraction").value
    assert isinstance(value, Statistic) and value.n == 2
    assert table is not None
    assert "formed from the 2 of 3 seeds that have all four rows" in [text for _, text in table.footnotes]


def test_swept_values_get_a_block_and_a_sentence_each() -> None:
    runs = [
        crossed(four, number=n, overrides=(f"prune.ratio={ratio}",))
        for n, (ratio, four) in enumerate([("0.1", (0.9, 0.9, 0.9, 0.9)), ("0.3", (0.9, 0.8, 0.9, 0.7))])
    ]
    table = interaction.table(study(*runs))
    assert table is not None and len(table.rows) == 10 and table.sections == (5,)
    assert mean(table, "Interaction", "accuracy_difference_fraction", ("0.3",)) == pytest.approx(-0.1)
    said = below(*runs)
    assert [text.partition(":")[0] for text in said] == [
        "interaction of prune and quantize (prune.ratio=0.1)",
        "interaction of prune and quantize (prune.ratio=0.3)",
    ]
    assert "is 0.00 points of accuracy" in said[0] and "is -10.00 points of accuracy" in said[1]


def test_other_stages_of_the_order_stay_in_place_in_all_four() -> None:
    data = crossed()
    data["order"]["stages"] = ["finetune", "prune", "distill", "quantize"]
    paths = (["finetune", "distill"], data["order"]["stages"][:3], ["finetune", "distill", "quantize"])
    for place, stages in zip((NEITHER, PRUNED, QUANTIZED, BOTH), (*paths, data["order"]["stages"]), strict=True):
        data["rows"][place]["stages"] = stages
    assert mean(interaction.table(study(data)), "Only prune", "accuracy_difference_fraction") == pytest.approx(-0.02)


def test_times_that_mean_little_are_marked() -> None:
    data = crossed()
    data["rows"][BOTH]["findings"] = {"quantization": run_json.QUANTIZATION}
    run_json.in_torch(data["rows"][PRUNED])["latency_ms"]["task"]["unstable"] = True
    table = interaction.table(study(data))
    assert table is not None
    marks = {column.key: notes(table, column.marks) for column in table.columns}
    assert marks["speed_up_padded"] == [SIMULATED]
    assert sorted(marks["speed_up_task"]) == sorted([UNSTABLE, SIMULATED])
    assert marks["compression_ratio"] == marks["accuracy_difference_fraction"] == []
    (said,) = below(data)
    assert "speed-up, padded (simulated, within the noise floor)" in said
    assert "own length (unstable, simulated, within the noise floor)" in said


def test_without_times_or_task_what_is_known_is_shown() -> None:
    data = crossed(measured=False)
    table = interaction.table(study(data))
    assert table is not None and [column.key for column in table.columns][1:] == [
        "accuracy_difference_fraction",
        "compression_ratio",
    ]
    data["task"] = None
    for row in data["rows"]:
        row["metrics"] = {}
    table = interaction.table(study(data))
    assert table is not None and [column.key for column in table.columns][1:] == ["compression_ratio"]
    assert below(data)[0].startswith("interaction of prune and quantize: what both gain is")


def test_a_program_can_read_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = run_json.save(tmp_path, crossed())
    written = write.write_job(job)
    assert {f"tables/interaction.{suffix}" for suffix in render.FORMATS} < set(written)
    rows = list(csv.DictReader(io.StringIO(written["tables/interaction.csv"].read_text())))
    assert float(rows[-1]["accuracy_difference_fraction"]) == pytest.approx(-0.03)
    assert "What two stages do alone and together" in written["report.md"].read_text()
    write.print_job(job)
    assert "interaction of prune and quantize: " in capsys.readouterr().out
