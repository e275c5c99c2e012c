"""`task.labelled_examples`: few labels, much text. Who reads labels sees the few; who reads none sees all texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import studies
import tiny
import torch

from edgemin import artifact
from edgemin.data.examples import Examples
from edgemin.data.splits import load
from edgemin.data.task import find_kind
from edgemin.errors import UserError
from edgemin.study.nodes import Node

FEW = "task.labelled_examples=32"
EPOCHS = ("+distill@learn=logits", "learn.epochs=1", "learn.steps=null", "learn.batch_size=8")


_SPLITS = load(tiny.task(max_train_examples=96, max_evaluation_examples=40, labelled_examples=32))
LABELLED, TEXTS = _SPLITS.fingerprint("train"), _SPLITS.without_labels.fingerprint("train")


CUT = "student/finetune/cut"


def node(*overrides: str, path: str = "student/finetune/learn") -> Node:
    return next(node for node in studies.plan("stages=[finetune,learn]", *overrides).nodes if node.path == path)


def test_the_labelled_are_a_stratified_part_of_all_texts_whose_other_labels_are_gone() -> None:
    whole = load(tiny.task(max_train_examples=96, holdout=0.25))
    few = load(tiny.task(max_train_examples=96, holdout=0.25, labelled_examples=20))
    assert whole.texts is None and whole.without_labels is whole
    texts = few.without_labels.train
    assert texts.texts == whole.train.texts and few.holdout is not None and whole.holdout is not None
    assert few.holdout.fingerprint == whole.holdout.fingerprint
    assert few.evaluation["validation"].fingerprint == whole.evaluation["validation"].fingerprint
    kept = texts.labels >= 0
    assert kept.sum() == len(few.train) == 20 and set(texts.labels[~kept]) == {-1}
    assert np.array_equal(texts.labels[kept], whole.train.labels[kept])
    assert [texts.texts[row] for row in np.flatnonzero(kept)] == few.train.texts
    assert abs(few.train.labels.mean() - whole.train.labels.mean()) < 0.05
    assert load(tiny.task(max_train_examples=96, labelled_examples=96)).texts is None


def test_no_loss_can_be_formed_of_a_label_that_is_gone() -> None:
    splits = load(tiny.task(max_train_examples=96, labelled_examples=20))
    labels = torch.from_numpy(splits.without_labels.train.labels)
    with pytest.raises(IndexError):
        splits.kind.loss(torch.zeros(len(labels), 2), labels)
    for kind, numbers in (("regression", np.ones(3, np.float32)), ("multi_label", np.ones((3, 2), np.float32))):
        few = Examples([("a",), ("b",), ("c",)], numbers).labelled_at(np.array([1]))
        assert few.labels[1].tolist() == numbers[1].tolist() and np.isnan(few.labels[[0, 2]]).all()
        assert find_kind(kind).loss(torch.zeros(3, numbers[0].size), torch.from_numpy(few.labels)).isnan()


def test_a_vocabulary_of_the_labelled_texts_alone_is_another_one() -> None:
    plans = [
        node(FEW, "+prune@cut=vocab", f"cut.epochs={epochs}", "stages=[finetune,cut]", path=CUT) for epochs in (0, 1)
    ]
    tokenizers = {plan.outline.tokenizer for plan in plans}
    assert len(tokenizers) == 2


@pytest.mark.parametrize("count", [0, 97, 2.5])
def test_a_number_that_cannot_be_is_refused(count: float) -> None:
    with pytest.raises(UserError, match=rf"^task\.labelled_examples: expected [^\n]+, given {count}$"):
        load(tiny.task(max_train_examples=96, labelled_examples=count))


@pytest.mark.parametrize(
    ("overrides", "reads_labels"),
    [
        ((*EPOCHS, "learn.alpha=1.0"), False),
        ((*EPOCHS, "learn.alpha=0.5"), True),
        (("+distill@learn=minilmv2", "learn.task_weight=0"), False),
        (("+distill@learn=minilmv2", "learn.task_weight=1"), True),
        (("+distill@learn=mlkd",), True),
        (("+distill@learn=mlkd", "learn.contrastive_weight=0"), False),
        (("+distill@learn=tinybert",), False),
        (("+distill@learn=multi", "learn.methods.answers.alpha=1.0"), False),
        (("+distill@learn=multi", "learn.methods.answers.alpha=0.5"), True),
        (("+distill@learn=none",), True),
    ],
)
def test_a_distillation_that_reads_no_label_is_given_all_texts(overrides: tuple[str, ...], reads_labels: bool) -> None:
    found = node(FEW, *overrides)
    assert found.step is not None and found.step.planned.reads_labels is reads_labels
    assert found.content["data"]["train"] == (LABELLED if reads_labels else TEXTS)
    if "learn.epochs=1" in overrides:
        assert found.step.planned.steps == (32 if reads_labels else 96) // 8


@pytest.mark.parametrize(
    ("stage", "overrides", "reads_labels"),
    [
        ("quantize", ("quantize=static",), False),
        ("quantize", ("quantize=reconstruct",), False),
        ("quantize", ("quantize=qat",), True),
        ("quantize", ("quantize=qat", "quantize.steps=0"), False),
        ("quantize", ("quantize=qat_distill",), False),
        ("prune", ("prune.criterion=taylor", "prune.steps=0"), True),
        ("prune", ("prune.criterion=ziplm", "prune.steps=0"), False),
        ("prune", ("prune.criterion=ziplm", "prune.steps=2"), True),
        ("prune", ("prune.criterion=ziplm", "prune.teacher=parent"), False),
        ("prune", ("prune.criterion=taylor", "prune.teacher=parent"), True),
        ("cut", ("+prune@cut=vocab", "cut.epochs=0"), False),
        ("cut", ("+prune@cut=vocab", "cut.epochs=1"), True),
    ],
)
def test_so_are_other_stages_that_read_none(stage: str, overrides: tuple[str, ...], reads_labels: bool) -> None:
    found = node(FEW, f"stages=[finetune,{stage}]", *overrides, path=f"student/finetune/{stage}")
    assert found.step is not None and found.step.planned.reads_labels is reads_labels
    assert found.content["data"]["train"] == (LABELLED if reads_labels else TEXTS)


def test_a_fine_tuning_on_few_labels_is_that_of_so_few_examples() -> None:
    assert node(FEW, "stages=[finetune]", path="student/finetune").content["data"]["train"] == LABELLED


def test_a_student_learns_from_texts_that_have_no_label(tmp_path: Path) -> None:
    given = (FEW, *EPOCHS, "learn.alpha=1.0", "finetune.steps=2", "stages=[finetune,learn]")
    done = studies.run(tmp_path, *given)
    assert done["task"]["train_examples"] == 32 and done["task"]["train_texts"] == 96
    (row,) = [row for row in done["rows"] if row["stages"] == ["finetune", "learn"]]
    assert artifact.read_provenance(tmp_path / "store" / row["artifact"])["steps"] == 96 // 8
