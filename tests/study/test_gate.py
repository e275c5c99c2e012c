"""The quality gate: what is compared, who is blamed, what a run says."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import studies
import tiny
import torch

from edgemin import toy
from edgemin.data.module import DataModule
from edgemin.quantization import model as quantization
from edgemin.quantization import torch_layers
from edgemin.quantization.ranges import Calibration
from edgemin.quantization.sensitivity import damage
from edgemin.quantization.weights import Spec
from edgemin.study import gate
from edgemin.tasks.classification import Classification
from edgemin.tasks.regression import Regression

KIND, NUMBERS = Classification(), Regression()


def accuracy(labels: np.ndarray) -> gate.Metric:
    return lambda answers, chosen=...: float((answers.argmax(1) == labels[chosen]).mean())


def answers(classes: list[int], known: int = 2) -> gate.Answers:
    return np.eye(known, dtype=np.float32)[classes]


def mean(answers: gate.Answers, chosen: Any = ...) -> float:
    return float(answers.mean())


def test_agreement_and_flips_are_counted_over_answers() -> None:
    before = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [0.0, 3.0]], dtype=np.float32)
    after = np.array([[0.0, 1.0], [0.0, 1.0], [2.0, 1.9], [0.0, 3.0]], dtype=np.float32)
    scored = accuracy(np.array([0, 1, 0, 1]))
    found = gate.compare(KIND, scored, before, after, 0.249)
    assert (found["agreement"], found["flips"], found["examples"]) == (0.75, 1, 4)
    assert found["drop"] == 0.25 and found["chance"] is None and found["passed"], "one answer is no evidence"
    assert gate.chance(scored, before, after) > 0.4
    assert gate.compare(KIND, scored, after, before, 0.0)["chance"] is None
    one = gate.compare(NUMBERS, mean, before[:, :1], before[:, :1], 0.0)
    assert one["agreement"] is None and one["flips"] is None and one["passed"]


@pytest.mark.parametrize("classes", [2, 3])
def test_comparing_equals_counting_one_sentence_after_the_other(classes: int) -> None:
    drawn = np.random.default_rng(classes)
    before, after = (drawn.normal(size=(97, classes)).astype(np.float32) for _ in range(2))
    labels = drawn.integers(classes, size=97)
    found = gate.compare(KIND, accuracy(labels), before, after, 1.0)
    flips = right = 0
    for one, other, label in zip(before.tolist(), after.tolist(), labels.tolist(), strict=True):
        flips += one.index(max(one)) != other.index(max(other))
        right += (one.index(max(one)) == label) - (other.index(max(other)) == label)
    assert 0 < flips < 97
    assert (found["flips"], found["agreement"]) == (flips, pytest.approx(1 - flips / 97, abs=1e-12))
    assert found["drop"] == pytest.approx(right / 97) and found["drop"] == found["parent_value"] - found["value"]


def test_a_loss_of_just_what_is_allowed_passes_whatever_single_precision_makes_of_it() -> None:
    for right in range(10, 101, 9):
        before, just, more = (answers([0] * (right - fewer) + [1] * (100 - right + fewer)) for fewer in (0, 9, 10))

        def scored(answers: gate.Answers, chosen: Any = ...) -> float:
            return torch.tensor((answers.argmax(1) == 0).mean(), dtype=torch.float32).item()

        assert gate.compare(KIND, scored, before, just, 0.09)["passed"], right
        assert not gate.compare(KIND, scored, before, more, 0.09)["passed"], right
        assert not gate.compare(KIND, scored, before, just, 0.0)["passed"], right


@pytest.mark.parametrize(("worse", "better", "rings"), [(2, 0, False), (4, 0, False), (5, 0, True), (6, 5, False)])
def test_a_loss_that_few_answers_make_does_not_ring(worse: int, better: int, rings: bool) -> None:
    before = answers([0] * 300 + [1] * 100)
    after = answers([1] * worse + [0] * (300 - worse) + [0] * better + [1] * (100 - better))
    found = gate.compare(KIND, accuracy(np.zeros(400)), before, after, 0.0)
    assert found["flips"] == worse + better and found["passed"] == (not rings)
    if not better:
        assert gate.chance(accuracy(np.zeros(400)), before, after) == pytest.approx(0.5**worse, abs=0.02)


@pytest.mark.parametrize(("worse", "better"), [(30, 10), (5, 0), (60, 60)])
def test_the_interval_of_an_accuracy_is_that_of_the_mean_of_paired_differences(worse: int, better: int) -> None:
    before = answers([0] * 300 + [1] * 100)
    after = answers([1] * worse + [0] * (300 - worse) + [0] * better + [1] * (100 - better))
    differences = np.array([1] * worse + [-1] * better + [0] * (400 - worse - better), dtype=np.float64)
    low, high = gate.compare(KIND, accuracy(np.zeros(400)), before, after, 1.0)["interval"]
    half = 1.96 * differences.std(ddof=1) / 20
    assert low == pytest.approx(differences.mean() - half, abs=0.25 * half)
    assert high == pytest.approx(differences.mean() + half, abs=0.25 * half)


def test_the_interval_draws_both_models_answers_to_the_same_sentences() -> None:
    drawn = np.random.default_rng(3)
    labels = drawn.integers(2, size=200)
    before = answers(list(np.where(drawn.random(200) < 0.7, labels, 1 - labels)))
    same = before.copy()
    same[:8] = same[:8, ::-1]
    low, high = gate.interval(accuracy(labels), before, same) or (1.0, -1.0)
    assert 0 < high - low < 0.1, "unpaired, it would be 0.18 wide, by the spread of the sentences"
    assert gate.compare(KIND, accuracy(labels), before, before, 0.0)["interval"] == [0.0, 0.0]
    assert gate.interval(mean, before, np.full_like(before, math.nan)) is None


def test_a_rare_class_that_is_lost_rings_although_as_many_answers_are_better() -> None:
    labels = np.array([1] * 40 + [0] * 360)
    before = answers([1] * 24 + [0] * 16 + [1] * 22 + [0] * 338)
    after = answers([0] * 39 + [1] + [0] * 360)

    def f1(answers: gate.Answers, chosen: Any = ...) -> float:
        guess, right = answers.argmax(1), labels[chosen]
        return float(2 * (guess & right).sum() / (guess.sum() + right.sum()))

    found = gate.compare(KIND, f1, before, after, 0.01)
    assert found["drop"] > 0.4 and not found["passed"] and found["chance"] < 0.01
    assert gate.compare(KIND, accuracy(labels), before, after, 0.01)["passed"]


def test_a_regression_is_judged_by_exchanges_too() -> None:
    before, after = np.ones((50, 1), dtype=np.float32), np.full((50, 1), 0.5, dtype=np.float32)
    assert not gate.compare(NUMBERS, mean, before, after, 0.1)["passed"]
    assert not gate.compare(NUMBERS, mean, before, np.full_like(after, math.nan), 1.0)["passed"], "no number is no pass"


def test_one_answer_to_everything_never_passes() -> None:
    logits = answers([0] * 400)
    found = gate.compare(KIND, accuracy(np.zeros(400)), logits, logits, 1.0, collapsed=True)
    assert (found["passed"], found["collapsed"], found["flips"]) == (False, True, 0)


def test_the_worst_layer_is_the_one_that_does_most_alone(data: DataModule) -> None:
    parent, changed = tiny.model(), tiny.model()
    bits = {"bert.encoder.layer.0.output.dense": 2, "bert.encoder.layer.1.output.dense": 8}
    quantization.quantize(changed, {path: Spec(many, "tensor") for path, many in bits.items()}, "minmax", Calibration())
    batches = data.calibration(12, 5, seed=1)
    modules = dict(parent.named_modules())
    found = gate.blame(parent, changed, batches, KIND)
    assert [entry["layer"] for entry in found] == list(bits)
    assert all(module is modules[path] for path, module in parent.named_modules())
    reference = torch.cat([tiny.logits(parent, batch) for batch in batches])
    parent.set_submodule(
        "bert.encoder.layer.0.output.dense", changed.get_submodule("bert.encoder.layer.0.output.dense")
    )
    alone = torch.cat([tiny.logits(parent, batch) for batch in batches])
    assert found[0]["damage"] == pytest.approx(damage(reference, alone, KIND), abs=1e-9)


def test_torchs_dynamic_layers_are_blamed_too(data: DataModule) -> None:
    changed = tiny.model()
    torch_layers.quantize(changed)
    found = gate.blame(tiny.model(), changed, data.calibration(4, 4, seed=1), KIND)
    assert len(found) == 20 and found[0]["damage"] >= found[-1]["damage"] >= 0


def test_a_layer_without_a_place_of_its_shape_is_not_blamed(data: DataModule) -> None:
    narrow, changed = tiny.model(), tiny.model()
    path = "bert.encoder.layer.0.intermediate.dense"
    inner = narrow.get_submodule("bert.encoder.layer.0")
    inner.intermediate.dense, inner.output.dense = torch.nn.Linear(32, 16), torch.nn.Linear(16, 32)
    torch_layers.quantize(changed)
    found = {entry["layer"] for entry in gate.blame(narrow, changed, data.calibration(4, 4, seed=1), KIND)}
    assert len(found) == 18 and path not in found and path.replace("layer.0", "layer.1") in found


def test_layers_of_a_parent_that_is_quantized_itself_are_blamed_for_what_the_stage_added(data: DataModule) -> None:
    parent, changed = tiny.model(), tiny.model()
    first, second = "bert.encoder.layer.0.output.dense", "bert.encoder.layer.1.output.dense"
    for model, bits in ((parent, {first: 4}), (changed, {first: 4, second: 2})):
        specs = {path: Spec(many, "tensor") for path, many in bits.items()}
        quantization.quantize(model, specs, "minmax", Calibration())
    found = gate.blame(parent, changed, data.calibration(12, 5, seed=1), KIND)
    assert [entry["layer"] for entry in found] == [second, first]
    assert found[0]["damage"] > 0 and found[1]["damage"] == pytest.approx(0, abs=1e-12)


def test_a_run_says_what_was_lost_once_and_the_page_names_the_layers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["quantize=weight_only", "quantize.bits=2", "quantize.granularity=tensor", "quantize.weight_range=minmax"]
    asked += ["quantize.embedding_bits=2", "finetune.steps=300", "stages=[finetune,quantize]"]
    asked += ["task.max_train_examples=400", "seed=1"]
    with caplog.at_level(logging.WARNING):
        first = studies.run(tmp_path / "0", *asked, "evaluate.max_drop=0", store=tmp_path / "store")
    row = first["rows"][-1]
    found = row["gate"]
    assert not found["passed"] and found["drop"] > 0 and found["flips"] > 0
    assert (found["parent"], found["parent_artifact"]) == ("student/finetune", first["rows"][-2]["artifact"])
    assert 0 < len(found["worst"]) <= 5 and found["worst"][0]["damage"] > 0
    said = " ".join((capsys.readouterr().out + caplog.text).split())
    assert said.count("quality gate") == 1
    assert f"quantize cost {100 * found['drop']:.1f} points of accuracy" in said and "(0.0 allowed)" in said
    page = (tmp_path / "0/report.md").read_text()
    assert f"{found['flips']} of 40 predictions changed; worst layers" in page
    assert found["worst"][0]["layer"].replace("_", r"\_") in page
    # another bound judges the same artifact otherwise, and nothing is computed again
    kept = sorted(path.name for path in (tmp_path / "store/.results").rglob("*") if path.is_file())
    again = studies.run(tmp_path / "1", *asked, "evaluate.max_drop=1", store=tmp_path / "store")
    assert again["rows"][-1]["gate"]["passed"] and "worst" not in again["rows"][-1]["gate"]
    assert again["rows"][-1]["artifact"] == row["artifact"]
    assert sorted(path.name for path in (tmp_path / "store/.results").rglob("*") if path.is_file()) == kept
    assert json.loads((tmp_path / "1/run.json").read_text())["rows"][-1]["gate"]["max_drop"] == 1


def test_without_a_bound_nothing_is_judged(tmp_path: Path) -> None:
    found = studies.run(tmp_path, "quantize=weight_only", "evaluate.max_drop=null", "stages=[finetune,quantize]")
    assert "gate" not in found["rows"][-1] and found["rows"][-1]["findings"]["quantization"]


def test_a_parent_that_is_no_row_is_scored_all_the_same(tmp_path: Path) -> None:
    rows = "order.rows=[{name: Whole, stages: [finetune]}, {name: Small, stages: [finetune, quantize]}]"
    asked = ("quantize=dynamic", "order.stages=[finetune,quantize]")
    both = studies.run(tmp_path / "both", *asked, rows, "evaluate.max_drop=0")
    alone = studies.run(
        tmp_path / "alone", *asked, rows.replace("{name: Whole, stages: [finetune]}, ", ""), "evaluate.max_drop=0"
    )
    assert [row["name"] for row in alone["rows"]] == ["Small"]
    found, whole = alone["rows"][0]["gate"], both["rows"][0]
    assert found == both["rows"][1]["gate"] and found["parent_artifact"] == whole["artifact"]
    assert found["parent_value"] == whole["metrics"]["toy"]["validation"]["accuracy"]
    logits = [studies.predictions(tmp_path / "both", row, "toy.validation")["logits"] for row in both["rows"]]
    assert found["flips"] == int((logits[0].argmax(1) != logits[1].argmax(1)).sum()) and found["examples"] == 40


def test_a_regression_is_judged_without_counting_answers(tmp_path: Path) -> None:
    for split, count, seed in (("train", 64, 1), ("validation", 20, 2)):
        lines = [f"{text.replace(',', ';')},{len(text) / 40:.3f}" for text in toy.generate(count, seed)[0]]
        (tmp_path / f"{split}.csv").write_text("\n".join(["text,score", *lines]) + "\n")
    own = ("task=custom", f"task.path={tmp_path}", "task.label_column=score", "task.kind=regression")
    asked = ("task.max_length=48", "quantize=dynamic", "evaluate.max_drop=1", "stages=[finetune,quantize]")
    found = studies.run(tmp_path / "run", *own, *asked)["rows"][-1]["gate"]
    assert (found["metric"], found["agreement"], found["flips"], found["examples"]) == ("pearson", None, None, 20)


def test_a_model_made_from_one_with_a_stale_head_is_not_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "[{name: Stale, stages: [finetune, distill]}, {name: All, stages: [finetune, distill, quantize, again]}]"
    asked = ["+finetune@again=short", "again.epochs=null", "again.steps=2", "quantize=weight_only"]
    asked += ["order.stages=[finetune,distill,quantize,again]", f"order.rows={rows}", "order.controls=[]"]
    found = studies.run(tmp_path, *asked, "evaluate.max_drop=0")
    assert not [row for row in found["rows"] if "gate" in row]
    said = "no quality gate: the head of the model it was made from is not up to date"
    assert capsys.readouterr().out.count(said) == 1 and said in found["rows"][-1]["notes"]


def test_a_model_made_from_one_whose_head_was_never_trained_has_nothing_to_lose(tmp_path: Path) -> None:
    asked = ("quantize=qat", "quantize.epochs=null", "quantize.steps=2", "evaluate.max_drop=0", "stages=[quantize]")
    found = studies.run(tmp_path, *asked)
    assert found["rows"][-1]["stages"] == ["quantize"] and not [row for row in found["rows"] if "gate" in row]


def test_every_stage_is_judged_against_the_row_it_was_made_from_and_only_quantized_rows_have_layers_to_blame(
    tmp_path: Path,
) -> None:
    rows = [("Whole", "finetune"), ("Small", "finetune, distill, prune"), ("All", "finetune, distill, prune, quantize")]
    listed = ", ".join(f"{{name: {name}, stages: [{stages}]}}" for name, stages in rows)
    asked = ["quantize=weight_only", "quantize.bits=2", "quantize.granularity=tensor", "finetune.steps=300"]
    asked += ["quantize.weight_range=minmax", "quantize.embedding_bits=2", "task.max_train_examples=400", "seed=1"]
    asked += ["distill.learning_rate=0.1", "distill.steps=20", "order.stages=[finetune,distill,prune,quantize]"]
    found = studies.run(tmp_path, *asked, f"order.rows=[{listed}]", "order.controls=[]", "evaluate.max_drop=0")
    whole, small, last = found["rows"]
    assert "gate" not in whole
    assert small["gate"]["parent"] == "student/finetune" and small["gate"]["parent_artifact"] == whole["artifact"]
    assert last["gate"]["parent_artifact"] == small["artifact"]
    for row, parent in ((small, whole), (last, small)):
        scores = [one["metrics"]["toy"]["validation"]["accuracy"] for one in (parent, row)]
        assert row["gate"]["drop"] == pytest.approx(scores[0] - scores[1])
        low, high = row["gate"]["interval"]
        assert low <= row["gate"]["drop"] <= high
    assert not small["gate"]["passed"] and "worst" not in small["gate"]
    assert "quality gate not passed: distill, prune " in (tmp_path / "tables/stages.md").read_text()
