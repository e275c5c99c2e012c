"""What `ablate=interaction` prints: the 2x2 rows found by their stages, differences and ratios, folded over seeds."""

from __future__ import annotations

import csv
import io
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import run_json
from report_tables import cell, mean, notes, study
from safetensors.numpy import save_file

from edgemin.report import interaction, paired, render, schema, tables, write
from edgemin.report.fold import Statistic, fold
from edgemin.report.footnotes import SIMULATED, UNSTABLE
from edgemin.report.paired import Score
from edgemin.study.order import Ablation, Interaction, LeaveOneOut, Single

# the rows of run_json.PAPER: + Distillation, + Head pruning, Quantized (not pruned), Pruned + quantized
NEITHER, PRUNED, QUANTIZED, BOTH = 2, 3, 4, 5


def crossed(accuracies: tuple[float, float, float, float] = (0.92, 0.90, 0.91, 0.86), **given: Any) -> dict[str, Any]:
    data = run_json.run(**given)
    data["order"]["ablation"] = Interaction(["prune", "quantize"]).described(data["order"]["stages"])
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
    start = "interaction of prune and quantize: accuracy changes by prune -"
    assert folded.low is not None and folded.high is not None
    interval = f"95 % interval for other seeds alone {100 * folded.low:.2f} to {100 * folded.high:.2f}"
    difference = f"{100 * folded.mean:.2f} points ({interval}, which may be chance alone); "
    assert said.startswith(start) and f" together; the difference is {difference}" in said
    assert "±" not in said.partition("; what both gain")[0]
    assert "0.98 x compression" in said


def test_a_seed_that_lacks_one_of_the_four_is_left_out_and_said() -> None:
    runs = [crossed(seed=n, overrides=(f"seed={n}",)) for n in range(3)]
    del runs[1]["rows"][QUANTIZED]
    table = interaction.table(study(*runs))
    value = cell(table, "Interaction", "accuracy_difference_fraction").value
    assert isinstance(value, Statistic) and value.n == 2
    assert table is not None
    assert "formed from the 2 of 3 seeds that have all these rows" in [text for _, text in table.footnotes]


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
    assert "is 0.00 points" in said[0] and "is -10.00 points" in said[1]


def test_other_stages_of_the_order_stay_in_place_in_all_four() -> None:
    data = crossed()
    data["order"]["stages"] = ["finetune", "prune", "distill", "quantize"]
    paths = (["finetune", "distill"], data["order"]["stages"][:3], ["finetune", "distill", "quantize"])
    for place, stages in zip((NEITHER, PRUNED, QUANTIZED, BOTH), (*paths, data["order"]["stages"]), strict=True):
        data["rows"][place]["stages"] = stages
    assert mean(interaction.table(study(data)), "Only prune", "accuracy_difference_fraction") == pytest.approx(-0.02)


def test_the_latency_that_counts_is_that_of_the_runtimes_beside_torch() -> None:
    data = run_json.with_runtimes(crossed(), {"onnxruntime": 0.5, "openvino": 0.25})
    data["rows"][BOTH]["cost"]["runtimes"]["openvino"]["latency_ms"]["padded"]["p50"] /= 3
    table = interaction.table(study(data))
    assert table is not None
    shown = [column.key for column in table.for_people().columns if "speed_up" in column.key]
    forms = ("speed_up_padded", "speed_up_task")
    assert shown == [f"{runtime}_{form}" for runtime in ("onnxruntime", "openvino") for form in forms]
    in_torch = mean(table, "Interaction", "speed_up_padded")
    assert mean(table, "Interaction", "onnxruntime_speed_up_padded") == pytest.approx(in_torch)
    assert mean(table, "Interaction", "openvino_speed_up_padded") == pytest.approx(3 * in_torch)
    (said,) = below(data)
    assert "x speed-up, padded, openvino" in said and said.count("x speed-up") == 4


def test_torchs_times_stay_where_a_row_runs_in_torch_alone() -> None:
    data = run_json.with_runtimes(crossed(), {"openvino": 0.25})
    for place in (QUANTIZED, BOTH):
        del data["rows"][place]["cost"]["runtimes"]["openvino"]
    table = interaction.table(study(data))
    assert table is not None
    shown = [column.key for column in table.for_people().columns if "speed_up" in column.key]
    assert shown == ["speed_up_padded", "speed_up_task"]
    assert "x speed-up, padded" in below(data)[0]


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
    written = write.of_job(job).write()
    assert {f"tables/interaction.{suffix}" for suffix in render.FORMATS} < set(written)
    rows = list(csv.DictReader(io.StringIO(written["tables/interaction.csv"].read_text())))
    assert float(rows[-1]["accuracy_difference_fraction"]) == pytest.approx(-0.03)
    assert "What stages do by themselves and together" in written["report.md"].read_text()
    write.of_job(job).show()
    assert "interaction of prune and quantize: " in capsys.readouterr().out


# --- more than two stages ---------------------------------------------------------------------------------

STAGES = ["distill", "prune", "quantize"]
MANY = 1000
LEFT_OUT = {stage: [other for other in STAGES if other != stage] for stage in STAGES}


def ablated(ablation: Ablation, accuracies: tuple[float, ...], sizes: tuple[int, ...], seed: int = 1) -> dict[str, Any]:
    """The rows with none of three stages, with (or without) each, and with all."""
    data = run_json.run(seed=seed, overrides=(f"seed={seed}",))
    data["order"]["ablation"] = ablation.described(data["order"]["stages"])
    alone = {stage: [stage] for stage in STAGES}
    each = LEFT_OUT if isinstance(ablation, LeaveOneOut) else alone
    _, *rows = data["rows"]
    for row, having, accuracy, size in zip(rows, ([], *each.values(), STAGES), accuracies, sizes, strict=True):
        row |= {"name": "+".join(having) or "none", "stages": ["finetune", *having], "made_from": None}
        row["artifact"] = f"{row['name']} {seed}"
        row["metrics"]["sst2"]["validation"]["accuracy"] = accuracy
        run_json.in_torch(row)["size_bytes"] = size
    return data


def test_single_losses_beside_the_combined_one() -> None:
    """Alone -1, -2 and +0.5 points, in sum -2.5, together -4: -1.5 more than the sum."""
    data = ablated(Single(), (0.9, 0.89, 0.88, 0.905, 0.86), (1200, 1200, 600, 400, 150))
    table = interaction.table(study(data))
    expected = {
        "Only distill": (-0.01, 1),
        "Only prune": (-0.02, 2),
        "Only quantize": (0.005, 3),
        "All of distill, prune, quantize": (-0.04, 8),
        "All, if they did not interact": (-0.025, 6),
        "Interaction": (-0.015, 8 / 6),
    }
    for name, (points, ratio) in expected.items():
        assert mean(table, name, "accuracy_difference_fraction") == pytest.approx(points)
        assert mean(table, name, "compression_ratio") == pytest.approx(ratio)
    assert below(data)[0].startswith(
        "interaction of distill, prune, quantize: accuracy changes by distill -1.00, prune -2.00, quantize +0.50 "
        "alone: -2.50 in sum, -4.00 together; the difference is -1.50 points; what all gain is, of the product of what "
        "each gains, 1.33 x compression"
    )


def test_stages_left_out_of_the_whole() -> None:
    """Beside the others -3, -3 and -1 points, in sum -7, together -4: 3 less than the sum."""
    data = ablated(LeaveOneOut(), (0.9, 0.89, 0.89, 0.87, 0.86), (1200, 150, 300, 600, 150))
    table = interaction.table(study(data))
    expected = {
        "distill, beside the others": (-0.03, 1),
        "prune, beside the others": (-0.03, 2),
        "quantize, beside the others": (-0.01, 4),
        "All of distill, prune, quantize": (-0.04, 8),
        "All, if they did not interact": (-0.07, 8),
        "Interaction": (0.03, 1),
    }
    for name, (points, ratio) in expected.items():
        assert mean(table, name, "accuracy_difference_fraction") == pytest.approx(points)
        assert mean(table, name, "compression_ratio") == pytest.approx(ratio)
    assert "beside the others: -7.00 in sum, -4.00 together; the difference is +3.00 points" in below(data)[0]


@pytest.mark.parametrize("ablation", [Single(), LeaveOneOut()], ids=["single", "leave_one_out"])
@pytest.mark.parametrize("seeds", [1, 3])
def test_with_kept_answers_the_difference_has_an_interval(tmp_path: Path, ablation: Ablation, seeds: int) -> None:
    """Every stage loses examples of its own, so that what they lose adds up; or all lose far more than that."""
    labels = np.zeros(MANY, dtype=np.int64)
    own = {"distill": range(20), "prune": range(20, 60), "quantize": range(60, 90)}
    each = LEFT_OUT if isinstance(ablation, LeaveOneOut) else {stage: [stage] for stage in STAGES}
    for more, chance in ((range(0), True), (range(200, 300), False)):
        runs = []
        for seed in range(seeds):
            place = tmp_path / f"{len(more)} {seed}"
            right = []
            for having in ([], *each.values(), STAGES):
                wrong = {example + seed for stage in having for example in own[stage]}
                wrong |= {*more} if having == STAGES else set()
                right.append([example not in wrong for example in range(MANY)])
            accuracies = tuple(sum(one) / MANY for one in right)
            data = ablated(ablation, accuracies, (9, 9, 9, 9, 9), seed)
            (place / "predictions").mkdir(parents=True)
            kept = {"labels": labels, "rows": labels.astype(np.int32), "tokens": labels.astype(np.int16)}
            save_file(kept, place / "predictions/examples.sst2.validation.safetensors")
            for number, one in enumerate(right, 1):
                data["rows"][number]["predictions"] = f"predictions/{number}"
                data["rows"][number]["metrics"]["sst2"]["validation"]["n"] = MANY
                (place / f"predictions/{number}").mkdir()
                logits = np.stack([one, np.logical_not(one)], 1).astype(np.float16)
                save_file({"logits": logits}, place / f"predictions/{number}/sst2.validation.safetensors")
            runs.append(schema.read(run_json.save(place, data)))
        (said,) = interaction.sentences(fold(runs))
        assert "(95 % interval " in said and ("which may be chance alone" in said) is chance
        assert "for other seeds alone" not in said
        alone = isinstance(ablation, Single)
        one, less = ("distill", "none") if alone else ("+".join(STAGES), "prune+quantize")
        terms = [(sign, fold(runs).groups[0].lines[name]) for sign, name in ((1.0, one), (-1.0, less))]
        expected = paired.estimate(terms, Score("sst2", "validation", "accuracy"))
        name = "Only distill" if alone else "distill, beside the others"
        effect = cell(interaction.table(fold(runs)), name, "accuracy_difference_fraction").value
        assert expected is not None and isinstance(effect, Statistic)
        assert (effect.low, effect.high, effect.examples) == (expected.low, expected.high, MANY)
