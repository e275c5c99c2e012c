"""Rows are compared on the same examples: estimates by hand, seeds aligned, verdicts, marks on other tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import run_json
from report_tables import cell, mean, notes
from safetensors.numpy import save_file
from scipy import stats

from edgemin.errors import UserError
from edgemin.report import comparisons_table, paired, render, schema, tables, write
from edgemin.report import statistics as st
from edgemin.report.__main__ import main
from edgemin.report.comparisons import Comparison, comparisons
from edgemin.report.entries import ALL, entries
from edgemin.report.fields import Costs
from edgemin.report.fold import Line, Statistic, Study, fold
from edgemin.report.paired import Score

N = 400
LABELS = np.random.default_rng(9).integers(2, size=N)
SCORE = Score("sst2", "validation", "accuracy")


def answers(wrong: Sequence[int]) -> dict[str, Any]:
    """Logits that are right but for some examples."""
    right = np.ones(N, dtype=bool)
    right[list(wrong)] = False
    return {"logits": np.eye(2, dtype=np.float16)[np.where(right, LABELS, 1 - LABELS)]}


def job(directory: Path, wrong: Sequence[Sequence[int]], *, seed: int = 1, **changes: Any) -> schema.Run:
    """A job with stored predictions: of each row, the examples that it gets wrong. The teacher is that of all seeds."""
    data = run_json.run(seed=seed, overrides=(f"seed={seed}",))
    data["rows"] = data["rows"][: len(wrong)]
    data["rows"][0]["artifact"] = "teacher"
    examples = {"labels": LABELS, "rows": np.arange(N, dtype=np.int32), "tokens": np.ones(N, dtype=np.int16)}
    (directory / "predictions").mkdir(parents=True)
    save_file(examples, directory / "predictions/examples.sst2.validation.safetensors")
    for number, (row, places) in enumerate(zip(data["rows"], wrong, strict=True)):
        row["predictions"] = f"predictions/{number}"
        (directory / row["predictions"]).mkdir()
        save_file(answers(places), directory / row["predictions"] / "sst2.validation.safetensors")
        row["metrics"]["sst2"]["validation"] = {"accuracy": 1 - len(places) / N, "n": N}
    run_json.fill_deltas(data)
    scores = {row["name"]: row["metrics"]["sst2"]["validation"]["accuracy"] for row in data["rows"]}
    for row in data["rows"]:
        if row["made_from"] in scores:
            row["delta"]["parent"] = {"metric": scores[row["name"]] - scores[row["made_from"]]}
    return schema.read(run_json.save(directory, data | changes))


def line(*runs: schema.Run, row: int) -> Line:
    return Line(runs, tuple(run.rows[row] for run in runs))


def of(found: Sequence[Comparison], row: str, role: str) -> Comparison:
    (one,) = [one for one in found if one.row == row and one.role == role]
    return one


def test_one_pair_of_models_by_hand(tmp_path: Path) -> None:
    run = job(tmp_path, [range(20), range(10, 40), range(30, 40)])
    found = paired.estimate([(1.0, line(run, row=2)), (-1.0, line(run, row=1))], SCORE)
    assert found is not None and found.value == pytest.approx(20 / N) and found.test == paired.MCNEMAR
    assert found.p == pytest.approx(st.mcnemar_mid_p(0, 20)) and found.examples == N
    centre, spread = st.paired_proportions(0, 20, N)
    assert (found.low, found.high) == pytest.approx(spread.around(centre))
    one = paired.estimate([(1.0, line(run, row=0))], SCORE)
    assert one is not None and (one.low, one.high) == pytest.approx(st.proportion_interval(N - 20, N))


def test_seeds_are_aligned_and_each_is_compared_with_itself(tmp_path: Path) -> None:
    wrong = [[range(9), range(40), range(20 + 5 * seed)] for seed in range(3)]
    runs = [job(tmp_path / str(seed), own, seed=seed) for seed, own in enumerate(wrong)]
    shuffled = line(*reversed(runs), row=1)
    found = paired.estimate([(1.0, line(*runs, row=2)), (-1.0, shuffled)], SCORE)
    assert found is not None and found.values == pytest.approx([20 / N, 15 / N, 10 / N])
    assert found.test == paired.OVER_SEEDS and found.p == pytest.approx(found.spread.p(15 / N))
    alone = stats.ttest_1samp(found.values, 0).confidence_interval(0.95)
    assert found.low < 15 / N < found.high and found.high - found.low != pytest.approx(alone[1] - alone[0])


def test_a_teacher_that_all_seeds_share_is_one_model(tmp_path: Path) -> None:
    runs = [job(tmp_path / str(seed), [range(9), range(40, 50 + seed)], seed=seed) for seed in range(3)]
    found = paired.estimate([(1.0, line(*runs, row=0))], SCORE)
    assert found is not None and found.values == pytest.approx([1 - 9 / N])
    assert (found.low, found.high) == pytest.approx(st.proportion_interval(N - 9, N))
    table = tables.stage_table(fold(runs))
    teacher = cell(table, "Teacher", "accuracy_fraction").value
    assert isinstance(teacher, Statistic) and teacher.n == 1 and teacher.sd is None
    assert table is not None and "one model for all seeds" in notes(table, cell(table, "Teacher", "name").marks)


def test_other_metrics_are_bootstrapped_and_weights_add_up(tmp_path: Path) -> None:
    run = job(tmp_path, [range(20), range(10, 40), range(30, 40), range(5)])
    score = Score("sst2", "validation", "f1")
    found = paired.estimate([(1.0, line(run, row=2)), (-1.0, line(run, row=1))], score)
    assert found is not None and found.test == paired.BOOTSTRAP and found.low < found.value < found.high
    weights = (1.0, -1.0, -1.0, 1.0)
    four = [(weight, line(run, row=row)) for row, weight in enumerate(weights)]
    interaction = paired.estimate(four, SCORE)
    assert interaction is not None and interaction.value == pytest.approx((-20 + 30 + 10 - 5) / N)


def study(directory: Path, **changes: Any) -> Study:
    """The student loses 60, distillation mends 40 of these, pruning changes nothing."""
    return fold([job(directory, [range(10), range(60), range(40, 60), range(40, 60), range(39, 60)], **changes)])


def test_every_row_has_its_parent_and_the_teacher_and_a_verdict(tmp_path: Path) -> None:
    found = comparisons(study(tmp_path))
    assert [(one.row, one.other, one.role) for one in found] == [
        ("Student baseline", "Teacher", "teacher"),
        ("+ Distillation", "Student baseline", "parent"),
        ("+ Distillation", "Teacher", "teacher"),
        ("+ Head pruning", "+ Distillation", "parent"),
        ("+ Head pruning", "Teacher", "teacher"),
        ("Quantized (not pruned)", "+ Distillation", "parent"),
        ("Quantized (not pruned)", "Teacher", "teacher"),
    ]
    better, pruned, quantized = (one for one in found if one.role == "parent")
    assert better.verdict == "better" and not better.is_noise
    assert better.corrected == pytest.approx(3 * better.p) == pytest.approx(3 * st.mcnemar_mid_p(0, 40))
    assert all(one.corrected is None for one in found if one.role == "teacher")
    assert pruned.estimate == 0 and pruned.verdict == quantized.verdict == "equivalent"
    assert of(found, "Student baseline", "teacher").verdict == "worse"


def test_a_margin_that_cannot_be_shown_is_said_to_need_more(tmp_path: Path) -> None:
    wrong = [range(10), range(60), [*range(30), *range(60, 91)]]
    runs = [job(tmp_path / "one", wrong)]
    one = of(comparisons(fold(runs), 0.01), "+ Distillation", "parent")
    assert one.verdict == "too few examples to tell" and one.is_noise
    assert of(comparisons(fold(runs), 0.09), "+ Distillation", "parent").verdict == "equivalent"
    assert of(comparisons(fold(runs), 0.034), "+ Distillation", "parent").verdict == "no difference detected"
    spread = [job(tmp_path / str(n), [range(10), range(100), range(100 - 50 * n)], seed=n) for n in range(2)]
    assert of(comparisons(fold(spread), 0.03), "+ Distillation", "parent").verdict == "too few seeds to tell"


def test_a_control_stands_beside_the_row_that_it_controls(tmp_path: Path) -> None:
    run = job(tmp_path, [range(10), range(60), range(40, 60), range(30, 60), range(50), range(33)])
    config = {
        "distill": {"_target_": "edgemin.distillation.minilmv2.MiniLMv2"},
        "no_teacher": {"_target_": "edgemin.finetune.Finetune"},
        "prune": {"_target_": "edgemin.pruning.stage.Pruning"},
        "random_prune": {"_target_": "edgemin.pruning.stage.Pruning"},
    }
    controls = {4: ["finetune", "no_teacher"], 5: ["finetune", "distill", "random_prune"]}
    rows = [
        row.model_copy(
            update={"control": True, "stages": controls[place], "made_from": None} if place in controls else {}
        )
        for place, row in enumerate(run.rows)
    ]
    found = comparisons(fold([run.model_copy(update={"rows": rows, "config": config})]))
    assert [(one.row, one.other) for one in found if one.role == "control"] == [
        ("+ Distillation", rows[4].name),
        ("+ Head pruning", rows[5].name),
    ]


def test_an_order_declares_its_own_family(tmp_path: Path) -> None:
    order = {"name": "x", "stages": [], "comparisons": [["+ Head pruning", "Student baseline"]]}
    found = comparisons(study(tmp_path, order=order))
    declared = of(found, "+ Head pruning", "declared")
    assert declared.other == "Student baseline" and declared.corrected == declared.p
    assert [one for one in found if one.corrected is not None] == [declared]


def test_a_job_that_declares_nothing_has_the_default_family(tmp_path: Path) -> None:
    """Whatever another job of the sweep declares."""
    wrong = [range(10), range(60), range(40, 60), range(40, 60)]
    order = {"name": "x", "stages": [], "comparisons": [["+ Head pruning", "Student baseline"]]}
    x, y = ({"overrides": [f"order={name}"]} for name in "xy")
    runs = [job(tmp_path / "0", wrong, seed=1, order=order, job=x), job(tmp_path / "1", wrong, seed=2, job=y)]
    found = [one for one in comparisons(fold(runs)) if one.corrected is not None]
    assert [(one.labels, one.row, one.other) for one in found] == [
        (("x",), "+ Head pruning", "Student baseline"),
        (("y",), "+ Distillation", "Student baseline"),
        (("y",), "+ Head pruning", "+ Distillation"),
    ]


CONTROL = "Control: no teacher"


def with_control(run: schema.Run, place: int | None, order: str) -> schema.Run:
    """The job as one of a sweep over orders; the row at a place is a control that is the same in all jobs."""
    config = {
        "distill": {"_target_": "edgemin.distillation.minilmv2.MiniLMv2"},
        "no_teacher": {"_target_": "edgemin.finetune.Finetune"},
    }
    control = {"name": CONTROL, "stages": ["finetune", "no_teacher"], "control": True, "artifact": "control"}
    rows = list(run.rows)
    if place is not None:
        rows[place] = rows[place].model_copy(update={**control, "made_from": None, "cost": Costs()})
    asked = run.job.model_copy(update={"overrides": [f"order={order}"]})
    return run.model_copy(update={"rows": rows, "config": config, "job": asked})


def test_a_control_that_orders_share_is_one_row_and_one_comparison(tmp_path: Path) -> None:
    short = job(tmp_path / "0", [range(10), range(60), range(40, 60), range(50)])
    long = job(tmp_path / "1", [range(10), range(60), range(40, 60), range(30, 60), range(50)])
    runs = [with_control(short, 3, "short"), with_control(long, 4, "long")]
    folded = fold(runs)
    assert [one.labels for one in entries(folded) if one.name == CONTROL] == [(ALL,)]
    (one,) = [one for one in comparisons(folded) if one.other == CONTROL]
    assert (one.row, one.labels, one.role) == ("+ Distillation", (ALL,), "control")


@pytest.mark.parametrize("first", [0, 1])
def test_a_shared_row_is_compared_with_a_control_that_only_one_job_has(tmp_path: Path, first: int) -> None:
    wrong = [range(10), range(60), range(40, 60), range(50)]
    runs = [
        with_control(job(tmp_path / "0", wrong[:3]), None, "without"),
        with_control(job(tmp_path / "1", wrong), 3, "with"),
    ]
    (one,) = [one for one in comparisons(fold([runs[first], runs[1 - first]])) if one.other == CONTROL]
    assert (one.row, one.labels, one.role) == ("+ Distillation", (ALL,), "control")


def test_a_published_metric_beside_ours_has_the_interval_of_our_answers(tmp_path: Path) -> None:
    wrong = [[range(9), range(40), range(20 + 5 * seed)] for seed in range(3)]
    runs = [job(tmp_path / str(seed), own, seed=seed) for seed, own in enumerate(wrong)]
    file = tmp_path / "published.yaml"
    file.write_text("rows: {Teacher: {accuracy_percent: {sst2: 98}}, + Distillation: {accuracy_percent: {sst2: 94}}}")
    runs = [run.model_copy(update={"published": str(file)}) for run in runs]
    (table,) = [table for table in write.Report(tmp_path, runs).tables if table.name == "published"]
    ours = tables.stage_table(fold(runs))
    for row in ("Teacher", "+ Distillation"):
        value = cell(table, row, "sst2_accuracy_fraction").value
        assert isinstance(value, Statistic) and value.examples == N
        assert value == cell(ours, row, "accuracy_fraction").value
    assert table.footnotes[-1][1].startswith(
        f"± is half of the 95 % interval: of metrics for other examples like these {N}"
    )


def test_the_table_and_the_marks_that_it_leaves(tmp_path: Path) -> None:
    known = study(tmp_path)
    found = comparisons(known)
    table = comparisons_table.table(known, found)
    assert table is not None and len(table.for_people().columns) <= 8
    row = next(row for row in table.rows if row[1].value == "Student baseline (parent)")
    assert row[2].value == Statistic(pytest.approx(0.1), None, 1)
    for form in render.FORMATS.values():
        assert "equivalent" in form(table)
    assert "| 95 % |" in render.markdown(table)
    header = render.comma_separated(table).splitlines()[0].split(",")
    assert "interval" not in header and {"low_fraction", "high_fraction"} <= set(header)
    stages = tables.stage_table(known, found)
    assert stages is not None
    (mark,) = notes(stages, cell(stages, "+ Head pruning", "accuracy_fraction").marks)
    assert mark.startswith("no more than noise away from the row it was made from: McNemar's mid-p, p above 0.05 after")
    assert "400 examples" in mark and not cell(stages, "+ Distillation", "accuracy_fraction").marks
    value = cell(stages, "+ Distillation", "accuracy_fraction").value
    assert isinstance(value, Statistic) and (value.low, value.high) == pytest.approx(st.proportion_interval(380, N))
    contributed = tables.contributed(known, found)
    change = cell(contributed, "+ Distillation", "metric_less_parent_fraction").value
    assert isinstance(change, Statistic) and change.low == of(found, "+ Distillation", "parent").low
    assert contributed is not None
    assert mark in notes(contributed, cell(contributed, "+ Head pruning", "metric_less_parent_fraction").marks)
    assert mean(contributed, "+ Head pruning", "metric_less_parent_fraction") == 0
    csv = render.comma_separated(stages).splitlines()[0].split(",")
    assert csv[1:4] == ["accuracy_fraction", "accuracy_fraction_low", "accuracy_fraction_high"]


def test_what_is_written_and_shown_is_compared_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study(tmp_path)
    asked: list[float | None] = []

    def counted(known: Study, margin: float | None) -> list[Comparison]:
        asked.append(margin)
        return comparisons(known, margin)

    monkeypatch.setattr(write, "comparisons", counted)
    written, report = write.rebuild(tmp_path, margin=0.02)
    report.show()
    assert asked == [0.02]
    assert {"tables/comparisons.csv", "figures/against.png"} <= set(written)
    assert "Which differences of accuracy are more than noise" in capsys.readouterr().out


def test_a_row_that_jobs_share_is_compared_with_nothing_that_they_do_not_share(tmp_path: Path) -> None:
    one, other = (job(tmp_path / name, [range(10), range(60)]) for name in ("one", "other"))
    shared, own = (line(one, other, row=row) for row in (0, 1))
    assert [[row.name for _, row in models] for models in paired.distinct([shared])] == [["Teacher"]]
    assert len(paired.distinct([shared, own])) == 1, "the same artifact in both jobs is one model"
    changed = other.rows[1].model_copy(update={"artifact": "another"})
    assert paired.distinct([shared, Line(own.runs, (own.rows[0], changed))]) == []


def test_one_seed_has_intervals_for_other_examples_alone_and_the_foot_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody can ask for two levels of it: what an interval is for follows from how many seeds there are."""
    wrong = [range(10), range(60), range(40, 60)]
    job(tmp_path / "study/0", wrong, seed=1)
    assert main([f"study={tmp_path}/study"]) == 0
    alone = " ".join(capsys.readouterr().out.split())  # a narrow terminal breaks lines
    assert "one pair of models: McNemar's mid-p, and Bonett and Price's interval, for other examples (400 ex" in alone
    assert "of metrics for other examples like these 400 " in alone and "other seeds" not in alone
    job(tmp_path / "study/1", [range(10), range(50), range(30, 60)], seed=2)
    assert main([f"study={tmp_path}/study"]) == 0
    both = " ".join(capsys.readouterr().out.split())
    assert "for other seeds and other examples (400 examples, 2 seeds)" in both


def test_rows_that_have_one_seed_in_common_are_one_pair_of_models(tmp_path: Path) -> None:
    one = job(tmp_path / "0", [range(10), range(60)], seed=1)
    other = job(tmp_path / "1", [range(10), range(50), range(30, 60)], seed=2)
    found = of(comparisons(fold([one, other])), "+ Distillation", "parent")
    assert (found.test, len(found.differences)) == (paired.MCNEMAR, 1)


def test_the_margin_is_that_of_the_job_or_of_the_command(tmp_path: Path) -> None:
    config = {"evaluate": {"margin": 0.02}}
    assert {one.margin for one in comparisons(study(tmp_path / "0", config=config))} == {0.02}
    assert {one.margin for one in comparisons(study(tmp_path / "1", config=config), 0.03)} == {0.03}
    assert {one.margin for one in comparisons(study(tmp_path / "2"))} == {0.01}
    with pytest.raises(UserError, match="margin: expected a fraction above 0 and below 1"):
        write.rebuild(tmp_path / "0", margin=1.0)
    assert not (tmp_path / "0/tables").exists()


def test_predictions_that_are_missing_are_said_once_and_the_tables_are_built(tmp_path: Path) -> None:
    known = study(tmp_path)
    (tmp_path / "predictions/3/sst2.validation.safetensors").unlink()
    assert not [one for one in comparisons(known) if one.row == "+ Head pruning"]
    write.rebuild(tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert f"no predictions in {tmp_path / 'predictions'} of + Head pruning; expected those" in page.replace("\\_", "_")


def test_predictions_of_another_length_than_the_data_are_refused(tmp_path: Path) -> None:
    run = job(tmp_path, [range(10), range(60)])
    run.rows[0].metrics["sst2"]["validation"]["n"] = 872
    with pytest.raises(UserError, match=r"predictions: expected predictions of the 872 examples .* given 400"):
        comparisons(fold([run]))


def test_rows_of_different_tasks_are_not_compared(tmp_path: Path) -> None:
    one, other = (job(tmp_path / number, [range(10), range(9)]) for number in "01")
    other = other.model_copy(update={"task": other.task.model_copy(update={"name": "qqp"})})
    with pytest.raises(
        UserError, match='expected rows of one task to compare, given "Teacher" of sst2 and "Teacher" of qqp'
    ):
        paired.estimate([(1.0, line(one, row=0)), (-1.0, line(other, row=0))], SCORE)


def test_seeds_of_different_examples_are_not_folded(tmp_path: Path) -> None:
    runs = [job(tmp_path / str(seed), [range(9), range(40)], seed=seed) for seed in range(2)]
    file = tmp_path / "1/predictions/examples.sst2.validation.safetensors"
    save_file({"labels": 1 - LABELS, "rows": np.arange(N, dtype=np.int32), "tokens": np.ones(N, dtype=np.int16)}, file)
    with pytest.raises(UserError, match="expected the same examples of sst2 in all seeds"):
        paired.estimate([(1.0, line(*runs, row=1))], SCORE)
