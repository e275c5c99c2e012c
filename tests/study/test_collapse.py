"""One answer to everything: found, said beside the majority class, and no base for a share of anything."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import run_json
import studies
from report_tables import cell, notes, study

from edgemin import toy
from edgemin.errors import UserError
from edgemin.report import render, schema, tables
from edgemin.study import collapse
from edgemin.study.results import difference
from edgemin.tasks.classification import Classification
from edgemin.tasks.regression import Regression

NAMES = ("good", "poor", "odd")


def find(guess: np.ndarray, truth: list[int], **changes: Any) -> dict[str, Any] | None:
    settings: dict[str, Any] = {"kind": Classification(), "names": NAMES, "metrics": ("accuracy", "matthews")}
    return collapse.find(guess.astype(np.float32), np.array(truth), **(settings | changes))


def test_one_class_for_all_is_found_beside_the_majority_class() -> None:
    guess = np.eye(3)[[1] * 10]
    found = find(guess, [0] * 6 + [1] * 3 + [2])
    assert found is not None and found["prediction"] == "poor"
    assert found["majority"] == {"class": "good", "metrics": {"accuracy": pytest.approx(0.6), "matthews": 0.0}}
    said = collapse.sentence(found, "accuracy", 0.3, "reviews validation")
    assert said == (
        'always answers "poor" on reviews validation: accuracy 30.00, the majority class "good" alone scores 60.00'
    )
    found["prediction"] = "good"
    said = collapse.sentence(found, "accuracy", 0.6, "reviews validation")
    assert said == 'always answers "good", the majority class, on reviews validation: accuracy 60.00'


def test_f1_of_the_majority_class_is_that_of_index_1() -> None:
    found = find(np.eye(2)[[0] * 10], [1] * 6 + [0] * 4, names=("no", "yes"), metrics=("f1",))
    assert found is not None and found["majority"]["metrics"]["f1"] == pytest.approx(2 * 6 / (6 + 10))


def test_answers_that_differ_or_labels_that_do_not_are_no_collapse() -> None:
    guess = np.eye(3)[[1] * 9 + [2]]
    assert find(guess, [0] * 6 + [1] * 4) is None
    assert find(np.eye(3)[[1] * 10], [1] * 10) is None, "one answer may be right"
    assert find(np.eye(3)[[1] * 10], [0] * 10) is None


def test_a_head_of_more_classes_than_the_task_is_called_by_number() -> None:
    found = find(np.eye(4)[[3] * 4], [0, 1, 2, 0])
    assert found is not None and found["prediction"] == "3" and found["majority"]["class"] == "good"


def test_one_number_for_all_is_found_whatever_rounding_makes_of_it() -> None:
    labels = np.linspace(0, 5, 20, dtype=np.float32)
    near = np.full((20, 1), 0.3, dtype=np.float32)
    near[::2] = np.nextafter(near[::2], np.float32(1))
    asked: dict[str, Any] = {"kind": Regression(), "names": ("score",), "metrics": ("pearson",)}
    found = collapse.find(near, labels, **asked)
    assert found is not None and found["prediction"] == pytest.approx(0.3) and "majority" not in found
    said = collapse.sentence(found, "pearson", 0.0, "own validation")
    assert said == "always answers 0.3 on own validation: its correlations count as 0"
    near[0] += 1e-3
    assert collapse.find(near, labels, **asked) is None


def rare(directory: Path) -> Path:
    """A task whose positive class is so rare that a few steps learn nothing but the other."""
    directory.mkdir()
    for split, count, seed in (("train", 64, 1), ("validation", 40, 2)):
        texts = [text.replace(",", " ") for text in toy.generate(count, seed)[0]]
        lines = [f"{text},{'yes' if row < 2 else 'no'}" for row, text in enumerate(texts)]
        (directory / f"{split}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    return directory


def test_a_run_says_that_its_models_give_one_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["task=custom", f"task.path={rare(tmp_path / 'rare')}", "task.metrics=[accuracy,matthews]"]
    asked += ["task.max_train_examples=null", "task.max_evaluation_examples=null", "task.max_length=24"]
    asked += ["quantize=weight_only", "evaluate.max_drop=1", "stages=[finetune,quantize]"]
    with caplog.at_level(logging.WARNING):
        found = studies.run(tmp_path / "0", *asked, store=tmp_path / "store")
    said = 'always answers "no", the majority class, on custom validation: accuracy 95.00'
    paths = ["teacher/finetune", "student/finetune", "student/finetune/quantize"]
    for row, path in zip(found["rows"], paths, strict=True):
        assert row["metrics"]["custom"]["validation"]["matthews"] == 0.0
        assert row["collapsed"]["custom"]["validation"]["prediction"] == "no"
        assert [note for note in row["notes"] if note.startswith(said)]
        assert [line for line in found["warnings"] if line.startswith(f"{path} {said}")]
        assert all("metric_retained" not in (delta or {}) for delta in row["delta"].values())
        assert row["delta"]["teacher"]["metric"] == 0.0
    gate = found["rows"][-1]["gate"]
    assert (gate["passed"], gate["collapsed"], gate["drop"]) == (False, True, 0.0)
    shown = " ".join(capsys.readouterr().out.split())
    assert said in shown and "no share: the teacher gives one answer to every example" in shown
    assert shown.count("quality gate not passed: quantize left one answer to every example") == 1
    # what comes from the store says the same
    again = studies.run(tmp_path / "1", *asked, store=tmp_path / "store")
    assert again["warnings"] == found["warnings"]
    assert [row["notes"] for row in again["rows"]] == [row["notes"] for row in found["rows"]]


def test_a_constant_regression_is_said_too(tmp_path: Path) -> None:
    for split in ("train", "validation"):  # the same text everywhere gets the same answer
        (tmp_path / f"{split}.csv").write_text("text,score\n" + "".join(f"good,{row % 5}\n" for row in range(20)))
    asked = ["task=custom", f"task.path={tmp_path}", "task.label_column=score", "task.kind=regression"]
    row = studies.run(tmp_path / "run", *asked, "order.stages=[finetune]", "stages=[finetune]")["rows"][-1]
    assert isinstance(row["collapsed"]["custom"]["validation"]["prediction"], float)
    assert [note for note in row["notes"] if note.endswith("its correlations count as 0")]
    assert row["metrics"]["custom"]["validation"]["pearson"] == 0.0


def collapsed(seed: int = 42, rows: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """A run whose teacher always says the same, as the pipeline writes it."""
    data = run_json.run(seed=seed, overrides=(f"seed={seed}",))
    for number in rows:
        data["rows"][number]["collapsed"] = {"sst2": {"validation": {"prediction": "positive"}}}
    for row in data["rows"]:
        row["delta"]["teacher"].pop("metric_retained")
    return data


KEY = "metric_retained_of_teacher_fraction"
SHARE = "no share: the teacher gives one answer to every example"


def test_no_share_of_a_collapsed_teacher_is_printed_and_a_note_says_why() -> None:
    table = tables.stage_table(study(collapsed()))
    assert table is not None
    for name in ("Teacher", "Student baseline", "Pruned + quantized"):
        shown = cell(table, name, KEY)
        assert shown.value is None and notes(table, shown.marks) == [SHARE]
        assert cell(table, name, "metric_retained_of_student_fraction").value is not None
    (line,) = (line for line in render.markdown(table).splitlines() if line.startswith("| Student baseline"))
    assert " -<sup>" in line


def test_seeds_whose_teacher_collapsed_are_left_out_of_the_mean() -> None:
    table = tables.stage_table(study(collapsed(1), run_json.run(seed=2, overrides=("seed=2",))))
    shown = cell(table, "Student baseline", KEY)
    assert notes(table, shown.marks) == [SHARE, "known for 1 of 2 seeds"]


def test_no_share_of_a_metric_that_is_not_above_zero() -> None:
    data = run_json.run()
    data["task"]["metric"] = "matthews"
    for number, row in enumerate(data["rows"]):
        row["metrics"]["sst2"]["validation"]["matthews"] = 0.5 * number - 0.1
        row["delta"]["teacher"].pop("metric_retained")
    table = tables.stage_table(study(data))
    shown = cell(table, "Student baseline", KEY)
    assert notes(table, shown.marks) == ["no share: Matthews of the teacher is not above 0"]


def test_collapsed_is_an_object_where_it_is_there(tmp_path: Path) -> None:
    data = run_json.run()
    data["rows"][0]["collapsed"] = []
    with pytest.raises(UserError, match=r"rows\[0\]\.collapsed: expected an object, given a list"):
        schema.read(run_json.save(tmp_path, data))


def test_a_share_is_formed_only_of_what_is_a_result() -> None:
    def row(value: float, **more: Any) -> dict[str, Any]:
        cost = {"params": 1.0, "flops": 1.0, "runtimes": {"torch": {"size_bytes": 2.0}}}
        return {"metrics": {"t": {"v": {"matthews": value}}}, "cost": cost, **more}

    primary = ("t", "v", "matthews")
    assert difference(row(0.4), row(0.8), primary)["metric_retained"] == 0.5
    for theirs in (0.0, -0.2):
        found = difference(row(0.4), row(theirs), primary)
        assert "metric_retained" not in found and math.isclose(found["metric"], 0.4 - theirs)
    assert "metric_retained" not in difference(row(0.4), row(0.8, collapsed={"t": {"v": {}}}), primary)
    assert "metric_retained" in difference(row(0.4), row(0.8, collapsed={"t": {"other": {}}}), primary)
