"""Teacher and student together: whose tokens, whose layers, and what contradicts itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from edgemin import artifact, encoder, starts, toy
from edgemin.data import load
from edgemin.errors import UserError
from edgemin.order import RowSpec
from edgemin.pipeline import Pipeline
from edgemin.plan import Study, build
from edgemin.roots import Root
from edgemin.stages.fitting import Trainer
from edgemin.store import Store
from edgemin.tracking import Tracker


@pytest.fixture
def batch(tmp_path: Path) -> Any:
    return tiny.data(tmp_path / "data").train.batch(range(5))


def start(name: str, root: Root, tokenizer: Any) -> starts.Start:
    return starts.Start(name, root, None, tokenizer, "bert", False)


def changed_tokenizer(change: str) -> PreTrainedTokenizerFast:
    content = json.loads(toy.tokenizer().backend_tokenizer.to_str())
    if change == "a word less":
        del content["model"]["vocab"]["zzz" if "zzz" in content["model"]["vocab"] else "witty"]
    if change == "ids swapped":
        words = content["model"]["vocab"]
        words["good"], words["bad"] = words["bad"], words["good"]
    backend = Tokenizer.from_str(json.dumps(content))
    if change == "no separator":
        backend.post_processor = TemplateProcessing(
            single="[CLS] $A", pair="[CLS] $A $B", special_tokens=[("[CLS]", 2)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


@pytest.mark.parametrize("change", ["a word less", "ids swapped", "no separator"])
def test_pitfall_j_a_teacher_of_other_tokens_is_refused_in_planning(change: str) -> None:
    splits = load(tiny.task())
    student = start("student", Root("little"), toy.tokenizer())
    teacher = start("teacher", Root("large"), changed_tokenizer(change))
    line = r"^distill\.teacher: expected a teacher with the student's tokenizer, [^\n]* given large and little, [^\n]*$"
    with pytest.raises(UserError, match=line):
        starts.check_same_tokens("distill", student, teacher, splits)


def test_a_teacher_of_the_same_tokens_by_another_object_is_taken() -> None:
    splits = load(tiny.task())
    student, teacher = (start(name, Root(name), toy.tokenizer()) for name in ("student", "teacher"))
    assert student.tokenizer is not teacher.tokenizer
    starts.check_same_tokens("distill", student, teacher, splits)
    starts.check_same_tokens("distill", student, start("teacher", Root("t"), None), splits)


def made(source: str, folder: Path) -> tuple[PreTrainedModel, dict[str, PreTrainedModel]]:
    """Run a study of two roots; the student, and every node by its path."""
    tiny.model(layers=6).save_pretrained(folder / "hub")
    toy.tokenizer().save_pretrained(folder / "hub")
    teacher = Root("t", source=str(folder / "hub"), stages=("finetune",))
    student = Root("s", source=source, layers=2, layer_choice="first")
    settings = {"finetune": tiny.node("finetune", "default") | {"epochs": None, "steps": 2, "learning_rate": 1e-2}}
    task = tiny.task()
    rows = [RowSpec("T", "teacher", ("finetune",)), RowSpec("S", "student", ("finetune",))]
    trainer = Trainer(accelerator="cpu", precision=32)
    study = Study(settings, task, load(task), {"teacher": teacher, "student": student}, rows, trainer, seed=1)
    store, tracker = Store(folder / "store"), Tracker()
    tracker.start(folder / "job", "study", "job", {})
    try:
        plan = build(study)
        Pipeline(study, plan, store, tracker).train()
    finally:
        tracker.close(failed=False)
    found = {node.path: artifact.load(store.path(node.key))[0] for node in plan.nodes}
    return found["student"], found


@pytest.mark.parametrize(("source", "of"), [("teacher.source", "teacher"), ("teacher", "teacher/finetune")])
def test_a_student_is_cut_from_the_teachers_weights_as_they_came_or_as_trained(
    source: str, of: str, tmp_path: Path, batch: Any
) -> None:
    student, found = made(source, tmp_path)
    expected = {path: found[path] for path in ("teacher", "teacher/finetune")}
    for model in expected.values():
        encoder.slice_layers(model, [0, 1])
    assert torch.equal(tiny.logits(student, batch), tiny.logits(expected[of], batch))
    other = next(model for path, model in expected.items() if path != of)
    assert not torch.equal(tiny.logits(student, batch), tiny.logits(other, batch))


@pytest.mark.parametrize(
    ("teacher", "student", "key"),
    [
        (Root("t", source="teacher"), Root("s"), "teacher.source"),
        (Root("t", family="bert", tokenizer="toy"), Root("s", source="teacher.source"), "student.source"),
        (Root("t", family="bert", tokenizer="toy"), Root("s", stages=("finetune",)), "student.stages"),
        (Root("t", tokenizer="toy"), Root("s"), "teacher.family"),
        (Root("t", family="bert"), Root("s"), "teacher.tokenizer"),
        (Root("t", family="bert", tokenizer="toy"), Root("s", source="./nowhere"), "student.source"),
    ],
)
def test_roots_that_contradict_each_other_are_refused_in_one_line(teacher: Root, student: Root, key: str) -> None:
    with pytest.raises(UserError, match=f"^{key}: expected [^\n]*$"):
        starts.read_starts({"teacher": teacher, "student": student}, load(tiny.task()))
