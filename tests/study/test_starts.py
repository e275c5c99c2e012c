"""Teacher and student together: whose tokens, whose layers, and what contradicts itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from edgemin import artifact, toy
from edgemin.data.splits import load
from edgemin.encoder import building, parts, shapes, slicing
from edgemin.errors import UserError
from edgemin.quantization import torch_layers as dynamic
from edgemin.store.artifacts import Store
from edgemin.store.content import content_key
from edgemin.study import starts
from edgemin.study.nodes import Plan, Study
from edgemin.study.order import RowSpec
from edgemin.study.pipeline import Pipeline
from edgemin.study.plan import build
from edgemin.study.roots import Root
from edgemin.tracking import Tracker
from edgemin.training.fitting import Trainer

SHAPE: dict[str, Any] = {"layers": 2, "hidden": 32, "heads": 4, "intermediate": 48}
FINETUNE: dict[str, Any] = tiny.node("finetune", "default") | {"epochs": None, "steps": 2, "learning_rate": 1e-2}


@pytest.fixture
def batch(tmp_path: Path) -> Any:
    return tiny.data(tmp_path / "data").train.batch(range(5))


def start(name: str, root: Root, tokenizer: Any) -> starts.Start:
    config = shapes.configure("bert", vocabulary=90, **SHAPE)
    return starts.Start(name, root, config, None, tokenizer, building.outline(building.build(config)), False)


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


def written(folder: Path, family: str = "bert", *, layers: int = 2) -> Path:
    """A Hugging Face checkpoint with the toy tokenizer and a head."""
    tiny.model(family, layers=layers).save_pretrained(folder)
    toy.tokenizer().save_pretrained(folder)
    return folder


def study_of(teacher: Root, student: Root, stages: tuple[str, ...] = ("finetune",), seed: int = 1) -> Study:
    """A study of two roots on the toy task, with a row for the trained teacher and one for the student."""
    settings = {"finetune": FINETUNE, "quantize": tiny.node("quantize", "dynamic")}
    settings |= {"prune": tiny.node("prune", "heads")} if "prune" in stages else {}
    rows = [RowSpec("T", "teacher", tuple(teacher.stages)), RowSpec("S", "student", stages)]
    trainer, task = Trainer(accelerator="cpu", precision=32), tiny.task()
    return Study(settings, task, load(task), {"teacher": teacher, "student": student}, rows, trainer, seed)


def keys(plan: Plan) -> dict[str, str]:
    return {node.path: node.key for node in plan.nodes}


def made(source: str, folder: Path) -> tuple[PreTrainedModel, dict[str, PreTrainedModel]]:
    """Run a study of two roots; the student, and every node by its path."""
    teacher = Root("t", source=str(written(folder / "hub", layers=6)), stages=("finetune",))
    student = Root("s", source=source, layers=2, layer_choice="first")
    study = study_of(teacher, student)
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
        slicing.slice_layers(model, [0, 1])
    assert torch.equal(tiny.logits(student, batch), tiny.logits(expected[of], batch))
    other = next(model for path, model in expected.items() if path != of)
    assert not torch.equal(tiny.logits(student, batch), tiny.logits(other, batch))


@pytest.mark.parametrize(
    ("teacher", "student", "key"),
    [
        (Root("t", source="teacher"), Root("s"), "teacher.source"),
        (Root("t", family="bert", tokenizer="toy", **SHAPE), Root("s", source="teacher.source"), "student.source"),
        (Root("t", family="bert", tokenizer="toy", **SHAPE), Root("s", stages=("finetune",)), "student.stages"),
        (Root("t", tokenizer="toy"), Root("s"), "teacher.family"),
        (Root("t", family="bert"), Root("s"), "teacher.tokenizer"),
        (Root("t", family="bert", tokenizer="toy", **SHAPE), Root("s", source="./nowhere"), "student.source"),
        (Root("t", family="bert", tokenizer="toy", **SHAPE), Root("s", **SHAPE | {"heads": 5}), "student.heads"),
    ],
)
def test_roots_that_contradict_each_other_are_refused_in_one_line(teacher: Root, student: Root, key: str) -> None:
    with pytest.raises(UserError, match=f"^{key}: expected [^\n]*$"):
        starts.read_starts({"teacher": teacher, "student": student}, load(tiny.task()))


# What is in a root's key


def content(folder: Path, seed: int = 1, **settings: Any) -> dict[str, Any]:
    root = Root("t", source=str(folder), seed=seed, **settings)
    splits = load(tiny.task())
    return starts.read_starts({"teacher": root}, splits)["teacher"].content(splits, None)


def without_head(folder: Path, model: PreTrainedModel) -> Path:
    weights = load_file(folder / "model.safetensors")
    encoders = {name: tensor for name, tensor in weights.items() if not name.startswith(parts.head_prefixes(model))}
    save_file(encoders, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_seed_is_in_the_key_of_a_checkpoint_only_where_its_head_is_drawn(family: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "source", family)
    assert content(folder, seed=1) == content(folder, seed=2) and "seed" not in content(folder)
    without_head(folder, tiny.model(family))
    assert content(folder, seed=1) == content(folder, seed=1)
    first, second = content(folder, seed=1), content(folder, seed=2)
    assert {key for key in first if first[key] != second[key]} == {"seed"}


def test_the_seed_of_random_weights_is_in_their_key() -> None:
    splits = load(tiny.task())

    def key(seed: int) -> str:
        root = Root("t", family="bert", tokenizer="toy", seed=seed, **SHAPE)
        return content_key(starts.read_starts({"teacher": root}, splits)["teacher"].content(splits, None))

    assert key(1) == key(1) != key(2)


def test_two_tokenizers_of_the_teacher_are_two_students_of_its_source(tmp_path: Path) -> None:
    folder = written(tmp_path / "hub")
    changed_tokenizer("ids swapped").save_pretrained(tmp_path / "swapped")
    toy.tokenizer().save_pretrained(tmp_path / "same")

    def found(tokenizer: str | None) -> dict[str, str]:
        teacher = Root("t", source=str(folder), tokenizer=tokenizer, stages=("finetune",))
        return keys(build(study_of(teacher, Root("s", source="teacher.source", layers=1))))

    first, same, other = found(None), found(str(tmp_path / "same")), found(str(tmp_path / "swapped"))
    assert first == same
    assert len({*first.values(), *other.values()}) == 2 * len(first) == 8


# A source that can only be run


def quantized(folder: Path) -> Path:
    model = tiny.model(layers=2)
    dynamic.quantize(model)
    folder.mkdir()
    artifact.save(folder, model, toy.tokenizer(), {"head_trained": True})
    return folder


def test_a_quantized_artifact_is_scored_as_it_is(tmp_path: Path) -> None:
    teacher = Root("t", source=str(quantized(tmp_path / "artifact")))
    plan = build(study_of(teacher, Root("s", **SHAPE)))
    node = next(node for node in plan.nodes if node.path == "teacher")
    assert node.final and node.head_trained
    assert not any(node.final for node in plan.nodes if node.path != "teacher")


@pytest.mark.parametrize("stage", ["finetune", "prune", "quantize"])
def test_nothing_follows_a_student_that_starts_quantized(stage: str, tmp_path: Path) -> None:
    teacher = Root("t", family="bert", tokenizer="toy", stages=("finetune",), **SHAPE)
    student = Root("s", source=str(quantized(tmp_path / "artifact")))
    with pytest.raises(UserError, match=f"^stages: expected nothing after student, [^\n]* given {stage}$"):
        build(study_of(teacher, student, (stage,)))


def test_nothing_follows_a_teacher_that_starts_quantized(tmp_path: Path) -> None:
    folder = str(quantized(tmp_path / "artifact"))
    with pytest.raises(UserError, match=r"^[^\n]*stages: expected nothing after teacher, [^\n]* given finetune$"):
        build(study_of(Root("t", source=folder, stages=("finetune",)), Root("s", **SHAPE)))
    with pytest.raises(UserError, match=r"^student\.source: expected a model that can be cut and trained, [^\n]*$"):
        build(study_of(Root("t", source=folder), Root("s", source="teacher.source")))
    with pytest.raises(UserError, match=r"^student\.source: expected a model that can be cut and trained, [^\n]*$"):
        build(study_of(Root("t", source=folder), Root("s", source="teacher")))


# How much a model takes


def test_more_tokens_than_the_positions_hold_are_refused_by_the_number_that_fits(tmp_path: Path) -> None:
    tokenizer = toy.tokenizer()
    tokenizer.model_max_length = 10**30  # as many on the Hub have it
    splits = load(tiny.task(max_length=24))
    for family, fits in (("bert", 20), ("roberta", 18), ("distilbert", 20), ("modernbert", 20)):
        config = tiny.model(family, layers=1).config
        config.max_position_embeddings = 20
        config.pad_token_id = 1
        building.build(config).save_pretrained(tmp_path / family)
        tokenizer.save_pretrained(tmp_path / family)
        root = Root("t", source=str(tmp_path / family))
        line = f"^task.max_length: expected at most {fits}, what the teacher takes, given 24$"
        with pytest.raises(UserError, match=line):
            starts.read_starts({"teacher": root}, splits)
