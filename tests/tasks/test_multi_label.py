"""Examples of any number of labels: read, learnt by every stage, scored, and loaded as transformers' own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import studies
import tiny
import torch
from transformers import pipeline

import edgemin
from edgemin import toy
from edgemin.data.splits import load
from edgemin.data.task import Task
from edgemin.errors import UserError
from edgemin.tasks.base import LabelColumn
from edgemin.tasks.multi_label import MultiLabel

KIND = MultiLabel()
NAMES = ("calm", "glad", "sad")


def task(directory: Path, **settings: Any) -> Task:
    given: dict[str, Any] = {"text_columns": ["text"], "evaluation_splits": ["validation"], "kind": "multi_label"}
    return Task(name="custom", path=str(directory), **(given | settings))


def column(values: list[Any], **more: Any) -> LabelColumn:
    return LabelColumn("moods", "train", values, **more)


# Labels


def test_a_list_and_a_text_with_bars_say_the_same(tmp_path: Path) -> None:
    rows = [["sad"], [], ["glad", "calm"], ["calm"]]
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(f"x,{' | '.join(row)}\n" for row in rows))
    lines = [json.dumps({"text": "x", "label": row}) for row in rows]
    (tmp_path / "validation.jsonl").write_text("\n".join(lines))
    datasets.Dataset.from_dict({"text": ["x"] * 4, "label": rows}).to_parquet(tmp_path / "test.parquet")
    splits = load(task(tmp_path, evaluation_splits=["validation", "test"]))
    assert splits.labels == NAMES and splits.metrics == ("micro_f1", "macro_f1", "accuracy")
    assert splits.train.labels.tolist() == [[0, 0, 1], [0, 0, 0], [1, 1, 0], [1, 0, 0]]
    assert splits.train.labels.dtype == np.float32
    assert len({splits.fingerprint(split) for split in ("train", "validation", "test")}) == 1
    other = load(task(tmp_path, labels=["sad", "calm", "glad"]))
    assert other.train.labels.tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 1], [0, 1, 0]]


def test_numbers_of_a_data_sets_own_classes_are_their_names(tmp_path: Path) -> None:
    features = {"text": datasets.Value("string"), "label": datasets.List(datasets.ClassLabel(names=["sad", "glad"]))}
    rows = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [[0, 1], []]}, datasets.Features(features))
    for split in ("train", "validation"):
        rows.to_parquet(tmp_path / f"{split}.parquet")
    splits = load(task(tmp_path))
    assert splits.labels == ("sad", "glad") and splits.train.labels.tolist() == [[1, 1], [0, 0]]
    with pytest.raises(UserError, match=r"^task\.labels: expected the data's class names \(sad, glad\), given"):
        load(task(tmp_path, labels=["sad", "happy"]))


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (
            None,
            "label_column: expected a list of labels in moods, or a text of labels with | between, given null in row 2",
        ),
        ({"sad": 1}, "given a dict in row 2 of train"),
        (
            "sad||glad",
            "label_column: expected distinct labels, none of them empty, given sad, , glad in row 2",
        ),
        (["sad", "sad"], "expected distinct labels, none of them empty, given sad, sad in row 2 of train"),
        (float("nan"), "none of them empty, given nan in row 2"),
        ("sad|angry", "label_column: expected labels out of calm, glad, sad, given angry in row 2 of train"),
    ],
)
def test_what_is_no_set_of_labels_is_refused(value: Any, line: str) -> None:
    with pytest.raises(UserError) as caught:
        KIND.read(column([["sad"], value]), NAMES)
    assert str(caught.value).startswith("task.") and line in str(caught.value)


def test_train_must_have_two_labels_and_examples_that_differ(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^task\.label_column: expected at least two labels in train, given sad$"):
        KIND.names(column(["sad", ""]))
    with pytest.raises(UserError, match=r"^task\.labels: expected at least two labels, given"):
        task(tmp_path, labels=["sad"])
    same = KIND.read(column(["sad|glad", "glad|sad"]), NAMES)
    with pytest.raises(UserError, match=r"expected examples of different labels in train, given only glad\|sad$"):
        KIND.check_train(same, NAMES)
    assert KIND.check_train(KIND.read(column(["sad", ""]), NAMES), NAMES) == ["calm", "glad"]


def test_draws_keep_the_share_of_each_set_of_labels() -> None:
    labels = KIND.read(column(["sad", "", "glad|sad", "sad|glad", ""]), NAMES)
    found = KIND.strata(labels)
    assert found[1] == found[4] and found[2] == found[3] and len(set(found.tolist())) == 3


# Losses and metrics


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def test_losses_equal_a_loop_over_examples_and_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = (torch.rand(5, 3, generator=generator) > 0.5).float()
    entropy = kl = cross = distance = 0.0
    for row in range(5):
        for label in range(3):
            z, truth = one[row, label].item(), labels[row, label].item()
            entropy -= math.log(sigmoid(z) if truth else 1 - sigmoid(z)) / 15
            p, q = (sigmoid(logits[row, label].item() / 2) for logits in (one, other))
            cross -= 4 * (p * math.log(q) + (1 - p) * math.log(1 - q)) / 15
            kl += 4 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))) / 15
            p, q = (sigmoid(logits[row, label].item()) for logits in (one, other))
            distance += (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))) / 5
    assert KIND.loss(one, labels).item() == pytest.approx(entropy)
    assert KIND.soft_loss(one, other, 2.0).item() == pytest.approx(kl)
    assert KIND.soft_loss(one, other, 2.0, entropy=True).item() == pytest.approx(cross)
    assert KIND.distance(one, other) == pytest.approx(distance)
    far = torch.tensor([[500.0, -500.0]], dtype=torch.float64)
    assert math.isfinite(KIND.distance(far, -far)) and KIND.distance(far, far) == 0


def test_metrics_equal_counts_over_labels_and_examples() -> None:
    generator = np.random.default_rng(0)
    truth, guess = (generator.random((40, 3)) > 0.6 for _ in range(2))
    logits = torch.from_numpy(np.where(guess, 1.0, -1.0))
    found = KIND.score(logits, torch.from_numpy(truth.astype(np.float32)), KIND.metrics(3), 3)
    hit, there, said = (truth & guess).sum(0), truth.sum(0), guess.sum(0)
    assert found["micro_f1"] == pytest.approx(2 * hit.sum() / (there.sum() + said.sum()))
    assert found["macro_f1"] == pytest.approx(np.mean(2 * hit / (there + said)))
    assert found["accuracy"] == pytest.approx(np.mean((truth == guess).all(1)))
    assert KIND.flips(logits, -logits) == 40 and KIND.flips(logits, logits * 2) == 0
    nothing = KIND.score(-torch.ones(4, 3), torch.zeros(4, 3), KIND.metrics(3), 3)
    assert nothing == {"micro_f1": 0.0, "macro_f1": 0.0, "accuracy": 1.0}


def test_the_most_frequent_set_of_labels_is_the_majority() -> None:
    labels = torch.from_numpy(KIND.read(column(["sad", "glad|sad", "sad|glad", ""]), NAMES))
    always = KIND.majority(labels, 3)
    assert KIND.answers(always).tolist() == [[False, True, True]] * 4
    assert KIND.shown(KIND.answers(always)[0], NAMES) == "glad|sad" and KIND.shown(labels[3], NAMES) == "no label"


# Studies


@pytest.fixture
def own(tmp_path: Path) -> tuple[str, ...]:
    """Reviews with labels that follow from their words, and from their number."""
    for split, count, seed in (("train", 64, 1), ("validation", 24, 2)):
        texts, labels = toy.generate(count, seed)
        sets = [
            "|".join([label] * (label == "positive") + ["odd"] * (row % 3 == 0)) for row, label in enumerate(labels)
        ]
        lines = [f"{text.replace(',', ';')},{found}" for text, found in zip(texts, sets, strict=True)]
        (tmp_path / f"{split}.csv").write_text("\n".join(["text,moods", *lines]) + "\n")
    of_task = (f"task.path={tmp_path}", "task.label_column=moods", "task.kind=multi_label", "task.max_length=48")
    return ("task=custom", *of_task, "task.max_train_examples=60", "task.holdout=0.1")


@pytest.mark.parametrize(
    ("method", "others"),
    [
        ("logits", ["prune", "quantize", "quantize=static", "quantize.sensitivity=true"]),
        ("mlkd", ["prune", "quantize", "prune.criterion=taylor", "quantize=qat", "quantize.epochs=null"]),
        ("tinybert", []),
    ],
)
def test_every_stage_runs_on_sets_of_labels(
    own: tuple[str, ...], method: str, others: list[str], tmp_path: Path
) -> None:
    stages = ",".join(["finetune", "taught", *(word for word in others if "=" not in word)])
    asked = [f"+distill@taught={method}", "+taught.steps=4", "+taught.epochs=null", "evaluate.max_drop=0"]
    asked += ["finetune.patience=3", *(word for word in others if "=" in word)]
    asked += ["quantize.steps=2"] if "quantize=qat" in others else []
    run = studies.run(tmp_path / "run", *own, *asked, f"stages=[{stages}]")
    assert run["task"]["metric"] == "micro_f1" and run["task"]["labels"] == ["odd", "positive"]
    for row in run["rows"]:
        scores = row["metrics"]["custom"]["validation"]
        assert set(scores) == {"micro_f1", "macro_f1", "accuracy", "loss", "n"} and scores["n"] == 24
        kept = studies.predictions(tmp_path / "run", row, "custom.validation")
        assert kept["logits"].shape == kept["labels"].shape == (24, 2)
        right = ((kept["logits"] > 0) == (kept["labels"] > 0)).all(1).mean()
        assert scores["accuracy"] == pytest.approx(right)
    last = run["rows"][-1]
    if others:
        assert last["gate"]["metric"] == "micro_f1" and last["gate"]["flips"] is not None
    if "quantize.sensitivity=true" in others:
        layers = last["findings"]["sensitivity"]["layers"]
        assert min(damage for layer in layers for damage in layer["damage"].values()) >= 0
    assert "Micro-F1" in (tmp_path / "run" / "report.md").read_text()


def test_a_head_whose_configuration_does_not_say_what_it_is_for_is_refused_with_the_reason(
    own: tuple[str, ...], tmp_path: Path
) -> None:
    model = tiny.model()
    model.config.id2label, model.config.problem_type = {0: "odd", 1: "positive"}, None
    model.save_pretrained(tmp_path / "source")
    toy.tokenizer().save_pretrained(tmp_path / "source")
    shape = ("student.hidden=null", "student.layers=null", "student.heads=null", "student.intermediate=null")
    asked = (*own, f"student.source={tmp_path / 'source'}", *shape, "stages=[quantize]")
    with pytest.raises(UserError) as refused:
        studies.plan(*asked)
    said = "has the labels odd, positive and, in its config.json, the problem_type null instead of multi_label_cla"
    assert said in str(refused.value)


def test_an_artifact_answers_as_transformers_multi_label_models_do(own: tuple[str, ...], tmp_path: Path) -> None:
    run = studies.run(tmp_path / "run", *own, "stages=[finetune]", store=tmp_path / "store")
    path = tmp_path / "store" / run["rows"][-1]["artifact"]
    model, tokenizer = edgemin.load(path)
    assert model.config.problem_type == "multi_label_classification"
    answers = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)("a good film")
    inputs = tokenizer("a good film", return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits[0].sigmoid()
    assert {found["label"]: found["score"] for found in answers[0]} == pytest.approx(
        {model.config.id2label[place]: value for place, value in enumerate(expected.tolist())}, abs=1e-6
    )
    # and it is a model of this task again, without training, and of no other kind
    shape = [f"teacher.{key}=null" for key in ("family", "layers", "hidden", "heads", "intermediate")]
    given = (f"teacher.source={path}", *shape, "teacher.stages=[]")
    again = studies.run(tmp_path / "again", *own, *given, "stages=[finetune]")
    assert again["rows"][0]["metrics"]["custom"]["validation"] == pytest.approx(
        run["rows"][-1]["metrics"]["custom"]["validation"]
    )
