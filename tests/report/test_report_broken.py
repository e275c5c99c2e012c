"""What compression broke: counted from stored answers, checked by hand and against torchmetrics."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import run_json
import torch
from numpy.typing import NDArray
from report_tables import cell, column_keys, mean, notes
from safetensors.numpy import save_file
from torchmetrics.classification import MulticlassCalibrationError

from edgemin.errors import UserError
from edgemin.report import broken, hardest, schema, write
from edgemin.report.answered import Answered, calibration_error
from edgemin.report.fold import Statistic, Study, fold
from edgemin.report.statistics import over_seeds, shared_by_seeds
from edgemin.report.stored import Examples

# of run_json.PAPER: Teacher, Student baseline, + Distillation (made from it), + Head pruning (made from that)
TEACHER, BASELINE, DISTILLED, PRUNED = range(4)
MANY = 200
LABELS = np.arange(MANY) % 2
LOST = ((151,), (151, 153), (151, 153, 155))
TOKENS = 3 + np.arange(MANY) // 10  # quartiles: 3-7, 8-12, 13-17, 18-22 tokens, 50 examples each


def logits(wrong: tuple[int, ...] = (), labels: NDArray[Any] = LABELS) -> NDArray[np.float16]:
    """Answers that are right, but for these examples."""
    said = labels.copy()
    said[list(wrong)] = 1 - said[list(wrong)]
    return np.stack([1.0 - said, said], 1).astype(np.float16) * 4


def job(place: Path, wrong: dict[int, tuple[int, ...]], seed: int = 1, **changed: NDArray[Any]) -> dict[str, Any]:
    """A job with kept answers: by the number of its row, the examples that it gets wrong."""
    data = run_json.run(seed=seed, overrides=(f"seed={seed}",))
    examples = {"labels": LABELS, "rows": np.arange(MANY, dtype=np.int32) * 3, "tokens": TOKENS.astype(np.int16)}
    keep(place / "predictions/examples.sst2.validation.safetensors", {**examples, **changed})
    for number, row in enumerate(data["rows"]):
        row["predictions"] = f"predictions/{number}"
        row["metrics"]["sst2"]["validation"]["n"] = MANY
        if number in wrong:
            keep(place / f"predictions/{number}/sst2.validation.safetensors", {"logits": logits(wrong[number])})
    data["rows"][TEACHER]["artifact"] = "one teacher for all seeds"
    run_json.save(place, data)
    return data


def keep(file: Path, tensors: dict[str, NDArray[Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file)


def study(*places: Path) -> Study:
    return fold([schema.read(place) for place in places])


def answered(logits: NDArray[Any], labels: NDArray[Any]) -> Answered:
    examples = Examples(labels, np.arange(len(labels), dtype=np.int32), np.ones(len(labels), dtype=np.int16))
    return Answered(examples, logits.astype(np.float32))


# --- numbers ----------------------------------------------------------------------------------------------


def test_the_calibration_error_is_the_one_of_torchmetrics() -> None:
    rng = np.random.default_rng(0)
    for classes, scale in ((2, 1.0), (3, 4.0), (7, 0.2)):
        given, labels = scale * rng.normal(size=(500, classes)), rng.integers(classes, size=500)
        theirs = MulticlassCalibrationError(classes, n_bins=15, norm="l1")
        theirs.update(torch.tensor(given).softmax(1), torch.tensor(labels))
        assert calibration_error(answered(given, labels)) == pytest.approx(float(theirs.compute()), abs=1e-6)


def test_the_calibration_error_by_hand() -> None:
    """Of confidence 0.8 half is right, of confidence 0.95 all: (0.3 + 0.05) / 2."""
    given = np.array([[math.log(4), 0], [math.log(4), 0], [math.log(19), 0], [0, math.log(19)]])
    assert calibration_error(answered(given, np.array([0, 1, 0, 1]))) == pytest.approx(0.175, abs=1e-6)
    sure = np.array([[1e4, 0.0], [0.0, -1e4]])
    assert calibration_error(answered(sure, np.array([0, 0]))) == 0


def test_agreement_lost_and_gained_by_hand() -> None:
    labels = np.array([0, 1, 2, 2])
    one, other = (answered(np.eye(3)[said], labels) for said in ([0, 1, 0, 1], [0, 0, 2, 0]))
    assert one.agreement(other) == 0.25, "a wrong answer is another one where it is another class"
    assert (one.lost(other), other.lost(one)) == (1, 1)


def test_of_several_labels_all_must_be_right() -> None:
    labels = np.array([[1, 0, 1], [0, 0, 0]], dtype=np.float32)
    own = answered(np.array([[2, -1, 1], [-1, 0.5, -3]]), labels)
    other = answered(np.array([[2, -1, -1], [-1, 0.1, -3]]), labels)
    assert own.right.tolist() == [True, False] and not own.one_class
    assert (own.agreement(other), own.lost(other), other.lost(own)) == (0.5, 0, 1)


def test_slices_are_quartiles_of_length_and_labels_with_enough_examples() -> None:
    examples = Examples(LABELS, np.arange(MANY, dtype=np.int32), TOKENS.astype(np.int16))
    found = broken.masks(examples, ["negative"])
    assert {name: int(mask.sum()) for name, mask in found.items()} == {
        "3-7 tokens": 50,
        "8-12 tokens": 50,
        "13-17 tokens": 50,
        "18-22 tokens": 50,
        "label negative": 100,
        "label 1": 100,
    }
    few = Examples(*(part[:150] for part in examples))
    assert list(broken.masks(few, ["negative"])) == ["label negative", "label 1"]
    assert broken.masks(Examples(*(part[:98] for part in examples)), []) == {}
    alike = examples._replace(tokens=np.full(MANY, 9, dtype=np.int16))
    assert list(broken.masks(alike, [])) == ["9-9 tokens", "label 0", "label 1"]


# --- the table --------------------------------------------------------------------------------------------


def test_a_row_of_the_table_by_hand(tmp_path: Path) -> None:
    """Pruning loses ten of the longest examples, all of one label, and gains the one that its parent had wrong."""
    lost = tuple(range(151, 171, 2))
    job(tmp_path, {TEACHER: (0, 2), DISTILLED: (0,), PRUNED: lost})
    table = broken.table(study(tmp_path))
    row = "+ Head pruning"
    assert mean(table, row, "agreement_with_parent_fraction") == 1 - 11 / MANY
    assert mean(table, row, "agreement_with_teacher_fraction") == 1 - 12 / MANY
    assert (mean(table, row, "lost_against_parent_examples"), mean(table, row, "gained_against_parent_examples")) == (
        10,
        1,
    )
    assert (mean(table, row, "lost_against_teacher_examples"), mean(table, row, "gained_against_teacher_examples")) == (
        10,
        2,
    )
    worst = cell(table, row, "worst_slice")
    assert worst.value == "18-22 tokens: 80.0 %, -20.00 pp" and not worst.marks
    assert mean(table, row, "accuracy_18_22_tokens_fraction") == 0.8
    assert mean(table, row, "change_label_positive_fraction") == -0.1
    # of two slices with mid-p 2 / 2^10 - 1 / 2^10, Holm's correction multiplies both by the six slices that there are
    for name in ("18_22_tokens", "label_positive"):
        assert mean(table, row, f"change_{name}_holm_p") == pytest.approx(6 / 2**10)
    assert cell(table, "Teacher", "worst_slice").value == "3-7 tokens: 96.0 %", "it has no parent to lose against"
    assert cell(table, "Teacher", "agreement_with_teacher_fraction").value is None
    assert table is not None and [one[0].value for one in table.rows] == ["Teacher", "+ Distillation", row]


def test_a_slice_whose_change_may_be_chance_is_marked(tmp_path: Path) -> None:
    job(tmp_path, {BASELINE: (), DISTILLED: (151, 153, 155)})
    table = broken.table(study(tmp_path))
    worst = cell(table, "+ Distillation", "worst_slice")
    assert worst.value == "18-22 tokens: 94.0 %, -6.00 pp"
    (note,) = notes(table, worst.marks)
    assert note.endswith("McNemar's mid-p test")
    assert mean(table, "+ Distillation", "change_18_22_tokens_holm_p") == pytest.approx(6 / 2**3)


def test_seeds_are_means_and_a_teacher_that_they_share_is_one_model(tmp_path: Path) -> None:
    for seed, lost in enumerate(LOST, 1):
        job(tmp_path / str(seed), {TEACHER: (0,), BASELINE: (), DISTILLED: lost}, seed)
    table = broken.table(study(*(tmp_path / str(seed) for seed in (1, 2, 3))))
    lost_by = cell(table, "+ Distillation", "lost_against_parent_examples").value
    assert isinstance(lost_by, Statistic) and (lost_by.mean, lost_by.sd, lost_by.n) == (2, 1, 3)
    calibrated = cell(table, "Teacher", "calibration_error_fraction").value
    assert isinstance(calibrated, Statistic) and calibrated.n == 1
    worst = cell(table, "+ Distillation", "worst_slice")
    assert worst.value == "18-22 tokens: 96.0 %, -4.00 pp"
    change = cell(table, "+ Distillation", "change_18_22_tokens_fraction").value
    assert isinstance(change, Statistic) and change.examples == 50
    per_example = -np.array([[151 + 2 * place in lost for place in range(50)] for lost in LOST], dtype=float)
    spread = over_seeds(list(per_example.mean(1)), shared_by_seeds(per_example))
    assert (change.low, change.high) == pytest.approx(spread.around(-0.04))
    assert notes(table, worst.marks)[0].endswith("a t test over seeds and examples")
    assert table is not None and any("200 examples, means over seeds" in text for _, text in table.footnotes)


def test_nothing_is_said_of_what_has_no_right_answers(tmp_path: Path) -> None:
    job(tmp_path, {number: () for number in range(4)})
    kept = tmp_path / "predictions/examples.sst2.validation.safetensors"
    shared = {"rows": np.arange(MANY, dtype=np.int32), "tokens": TOKENS.astype(np.int16)}
    keep(kept, {"labels": np.linspace(0, 5, MANY, dtype=np.float32), **shared})
    assert broken.table(study(tmp_path)) is hardest.table(study(tmp_path)) is None, "a number is not right or wrong"
    keep(kept, {"labels": np.stack([1 - LABELS, LABELS], 1).astype(np.float32), **shared})
    table = broken.table(study(tmp_path))
    assert mean(table, "+ Distillation", "agreement_with_parent_fraction") == 1
    keys = column_keys(table)
    assert "calibration_error_fraction" not in keys and not any("label" in key for key in keys)
    assert table is not None and any("an answer is right if all are" in text for _, text in table.footnotes)


def test_without_answers_there_is_no_table(tmp_path: Path) -> None:
    run_json.save(tmp_path, run_json.run())
    assert broken.table(study(tmp_path)) is hardest.table(study(tmp_path)) is None


def test_seeds_that_answered_other_examples_are_refused_in_one_line(tmp_path: Path) -> None:
    job(tmp_path / "1", {BASELINE: ()}, 1)
    job(tmp_path / "2", {BASELINE: ()}, 2, rows=np.arange(MANY, dtype=np.int32))
    with pytest.raises(UserError) as caught:
        broken.table(study(tmp_path / "1", tmp_path / "2"))
    start = f"{tmp_path / '2' / 'run.json'}: expected predictions on the same examples as those of the other seeds of "
    assert str(caught.value) == f"{start}'Student baseline', given others"


# --- the hardest examples ---------------------------------------------------------------------------------


def test_the_hardest_examples_are_those_that_most_models_break(tmp_path: Path) -> None:
    """Distillation breaks 7 in both seeds and 9 in one; 11 the teacher has wrong; 7 was wrong before pruning."""
    for seed, lost in ((1, (7, 9, 11)), (2, (7, 11))):
        job(tmp_path / str(seed), {TEACHER: (11,), BASELINE: (), DISTILLED: lost, PRUNED: (7,)}, seed)
    table = hardest.table(study(tmp_path / "1", tmp_path / "2"))
    assert table is not None
    numbers = [[one.value.mean if isinstance(one.value, Statistic) else one.value for one in row] for row in table.rows]
    assert numbers == [
        ["SST-2 validation", "21", "positive", 3.0, 2.0, 2.0],
        ["SST-2 validation", "27", "positive", 3.0, 1.0, 3.0],
    ], "pruned models are counted only for what their parents have right"
    assert table.footnotes[0][1].startswith("of 4 models on SST-2 validation")


def test_rows_of_other_data_are_other_examples(tmp_path: Path) -> None:
    for name in "ab":
        data = job(tmp_path / name, {TEACHER: (), BASELINE: (), DISTILLED: (5,)})
        data["task"]["path"] = f"data/{name}"
        data["job"]["overrides"] = [f"task.path=data/{name}"]
        for row in data["rows"]:
            row["artifact"] += name
        run_json.save(tmp_path / name, data)
    table = hardest.table(study(tmp_path / "a", tmp_path / "b"))
    assert table is not None
    assert [(row[0].value, row[1].value) for row in table.rows] == [
        ("SST-2 validation of data/a", "15"),
        ("SST-2 validation of data/b", "15"),
    ]


def test_at_most_ten_are_listed(tmp_path: Path) -> None:
    job(tmp_path, {TEACHER: (), BASELINE: (), DISTILLED: tuple(range(40))})
    table = hardest.table(study(tmp_path))
    assert table is not None and [row[1].value for row in table.rows] == [str(3 * place) for place in range(10)]


def test_both_are_written_beside_the_others(tmp_path: Path) -> None:
    job(tmp_path, {TEACHER: (), BASELINE: (), DISTILLED: (4,)})
    written = write.of_job(tmp_path).write()
    for name in ("broken", "hardest"):
        assert {f"tables/{name}.{suffix}" for suffix in ("md", "csv", "tex")} < set(written)
    rows = list(csv.DictReader(io.StringIO(written["tables/broken.csv"].read_text())))
    assert [row["lost_against_parent_examples"] for row in rows] == ["", "", "1"]
    assert "What compression broke beside the mean" in written["report.md"].read_text()
