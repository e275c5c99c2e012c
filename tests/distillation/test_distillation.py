"""What distillation methods share: kept teacher outputs, teachers with another tokenizer, sums of methods, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import studies
import tiny
import torch

from edgemin import config, toy
from edgemin.data.module import DataModule
from edgemin.distillation.logits import LogitsDistillation
from edgemin.distillation.minilmv2 import MiniLMv2
from edgemin.distillation.multi import Multi
from edgemin.encoder import taps
from edgemin.errors import UserError
from edgemin.store.cache import Cache
from edgemin.training.distillation import Distillation
from edgemin.training.fit import Fit
from edgemin.training.stage import Stage
from edgemin.training.teacher_outputs import teacher_outputs

FIT: dict[str, Any] = {"steps": 4, "batch_size": 8, "learning_rate": 1e-3}
RELATIONS = {"qq": 1.0, "kk": 1.0, "vv": 1.0}
METHODS: dict[str, dict[str, Any]] = {
    "relations": {
        "_target_": "edgemin.distillation.minilmv2.MiniLMv2",
        "weight": 2.0,
        "relations": RELATIONS,
        "relation_heads": 4,
    },
    "answers": {
        "_target_": "edgemin.distillation.logits.LogitsDistillation",
        "weight": 0.5,
        "temperature": 2.0,
        "alpha": 0.75,
    },
}


@pytest.fixture
def data(tmp_path: Path) -> DataModule:
    return tiny.data(tmp_path / "data")


def prepared(stage: Distillation, data: DataModule, *teachers: Any) -> Distillation:
    student, taught_by = tiny.model(dropout=0.0), teachers or [tiny.model(layers=4, seed=5)]
    tiny.plan(stage, student, taught_by)
    stage.prepare(student, data, taught_by)
    stage.log = lambda *_, **__: None  # type: ignore[method-assign]
    return stage


# Kept teacher outputs


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_kept_outputs_are_what_the_teacher_says_of_any_batch(family: str, data: DataModule) -> None:
    teacher = tiny.model(family)
    kept = teacher_outputs(teacher, data.train, projections=[2, 0], hidden=[1, 0], logits=True, cache=data.cache)
    batch = data.train.batch([7, 3, 40])
    with torch.no_grad():
        live = taps.read(teacher, batch, projections=[0, 2], hidden=[0, 1], logits=True)
    found = kept.batch(torch.tensor([7, 3, 40]), batch["input_ids"].shape[1], torch.device("cpu"))
    assert live.logits is not None and found.logits is not None
    torch.testing.assert_close(found.logits, live.logits, atol=1e-5, rtol=0)
    mask = batch["attention_mask"].bool()
    assert list(found.projections) == [1, 3] and list(found.hidden) == [0, 1]  # layers count from 1
    for layer, expected in live.projections.items():
        for mine, wanted in zip(found.projections[layer + 1], expected, strict=True):
            torch.testing.assert_close(mine[mask], wanted[mask], atol=1e-5, rtol=0)
            assert not mine[~mask].any()
    for layer, stream in live.hidden.items():
        torch.testing.assert_close(found.hidden[layer][mask], stream[mask], atol=1e-5, rtol=0)


def test_outputs_are_computed_once_for_all_jobs_and_again_for_another_teacher(
    data: DataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    read = taps.read
    monkeypatch.setattr(taps, "read", lambda *given, **named: runs.append(1) or read(*given, **named))

    def files() -> int:
        return len(list(data.cache.first.rglob("teacher-*.safetensors")))

    for seed, hidden, kept, computes in ((0, [], 1, True), (0, [], 1, False), (1, [], 2, True), (1, [0], 3, True)):
        runs.clear()
        teacher_outputs(tiny.model(seed=seed), data.train, hidden=hidden, logits=True, cache=data.cache)
        assert (files(), bool(runs)) == (kept, computes)


@pytest.mark.parametrize("method", ["logits", "relations"])
def test_a_student_learns_the_same_from_kept_outputs(method: str, tmp_path: Path) -> None:
    def trained(cache: bool) -> Any:
        stage: Stage = (
            tiny.stage(LogitsDistillation, temperature=2.0, alpha=0.5, teacher_cache=cache, **FIT)
            if method == "logits"
            else tiny.stage(
                MiniLMv2, relations=RELATIONS, relation_heads=4, task_weight=1.0, teacher_cache=cache, **FIT
            )
        )
        teacher, work = tiny.model(layers=4, seed=5), tmp_path / str(cache)
        return tiny.fit(stage, tiny.model(), tiny.data(tmp_path / "data"), [teacher], work=work).model

    live, kept = trained(False), trained(True)
    for name, tensor in live.state_dict().items():
        torch.testing.assert_close(kept.state_dict()[name], tensor, atol=1e-5, rtol=0)


def test_outputs_too_large_to_keep_are_refused(data: DataModule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgemin.training.teacher_outputs.LIMIT_BYTES", 1000)
    with pytest.raises(UserError, match=r"^teacher_cache: expected outputs of at most [^\n]* given [^\n]*$"):
        teacher_outputs(tiny.model(), data.train, hidden=[0], logits=False, cache=data.cache)


# Teachers with tokens of their own


def test_a_teacher_of_answers_may_read_tokens_of_its_own(tmp_path: Path, data: DataModule) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    studies.tokenizer(folder)
    theirs = DataModule(data.splits, toy.tokenizer().from_pretrained(folder), Cache(tmp_path / "theirs"))
    both = DataModule(data.splits, data.tokenizer, data.cache, [theirs])
    teacher = tiny.model(seed=5)
    stage = prepared(tiny.stage(LogitsDistillation, alpha=1.0, temperature=1.0, **FIT), both, teacher)
    rows = torch.arange(12)
    batch = {**data.train.batch(rows.numpy()), "index": rows}
    (reading,) = [stage._taught(0, batch)]
    wanted = tiny.logits(teacher, theirs.train.batch(rows.numpy()))
    assert reading.logits is not None and torch.equal(reading.logits, wanted)
    assert not torch.equal(wanted, tiny.logits(teacher, batch))


# Several methods at once


def test_a_sum_of_methods_is_the_weighted_sum_of_their_losses(data: DataModule) -> None:
    whole = prepared(tiny.stage(Multi, methods=METHODS, task_weight=0.0, **FIT), data)
    parts = [
        prepared(tiny.stage(MiniLMv2, relations=RELATIONS, relation_heads=4, task_weight=0.0, **FIT), data),
        prepared(tiny.stage(LogitsDistillation, temperature=2.0, alpha=0.75, **FIT), data),
    ]
    batch = next(iter(whole.batches(Fit(**FIT))))
    losses = [part.loss(batch).item() for part in parts]
    assert whole.loss(batch).item() == pytest.approx(2.0 * losses[0] + 0.5 * losses[1], rel=1e-6)
    assert tiny.effect(whole).trains_head and tiny.effect(whole).reads_answers
    assert {"edgemin.distillation.minilmv2", "edgemin.distillation.logits", "edgemin.distillation.multi"} == set(
        tiny.effect(whole).code
    )


def test_a_sum_adds_no_task_loss_of_its_own_where_a_method_brings_one() -> None:
    node = {"_target_": "edgemin.distillation.multi.Multi", "methods": METHODS, "task_weight": "auto", **FIT}
    stage = config.construct(node, "distill")
    assert tiny.effect(stage, head_trained=True).decided == {"task_weight": 0.0}
    alone = node | {"methods": {"relations": METHODS["relations"]}}
    assert tiny.effect(config.construct(alone, "distill"), head_trained=True).decided == {"task_weight": 1.0}
    by_hand = config.construct(node | {"task_weight": 0.5}, "distill")
    assert tiny.effect(by_hand, head_trained=True).decided == {}
    assert by_hand.task_weight == pytest.approx(0.5 + 0.5 * 0.25)


def test_methods_of_a_sum_may_have_any_name_and_the_patience_is_of_the_whole() -> None:
    inside = {"_target_": "edgemin.distillation.tinybert.TinyBERT", "weight": 1.0, "prediction_share": 0.0}
    stage = tiny.stage(Multi, methods={"values": inside, "a.b": METHODS["answers"]}, task_weight=0.0, patience=2, **FIT)
    assert tiny.effect(stage).reads_holdout and not any(
        tiny.effect(part).reads_holdout for part in stage._parts.values()
    )


def test_what_methods_learn_beside_the_student_is_trained_and_dropped(data: DataModule, tmp_path: Path) -> None:
    methods = {"tiny": {"_target_": "edgemin.distillation.tinybert.TinyBERT", "weight": 1.0, "prediction_share": 0.0}}
    stage = tiny.stage(Multi, methods=methods, task_weight=0.0, **FIT)
    start = tiny.model()
    names = set(start.state_dict())
    fitted = tiny.fit(stage, start, data, [tiny.model(layers=3, hidden=64, seed=5)], work=tmp_path / "work")
    learnt = [name for name in stage.state_dict() if name.startswith("parts.") and "projections" in name]
    assert learnt and not any("parts" in name and "model." in name for name in stage.state_dict())
    assert set(fitted.model.state_dict()) == names


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"methods": {}}, "methods: expected at least one"),
        (
            {"methods": {"a": {"_target_": "edgemin.distillation.logits.LogitsDistillation"}}},
            r"methods\.a\.weight: expected a",
        ),
        ({"methods": {"a": METHODS["answers"] | {"weight": 0.0}}}, r"methods\.a\.weight: expected a number above 0"),
        ({"methods": {"a": METHODS["answers"] | {"steps": 3}}}, r"methods\.a\.steps: expected beside methods"),
        ({"methods": {"a": METHODS["answers"] | {"tempo": 3}}}, r"methods\.a\.tempo: unknown key"),
        ({"methods": {"a": {"_target_": "edgemin.finetune.Finetune", "weight": 1.0}}}, r"methods\.a\._target_"),
        ({"teacher": ["teacher", "other"]}, r"methods\.relations\.teacher: expected one model"),
        ({"corpus": "text"}, r"methods\.answers\.corpus: expected null"),
    ],
)
def test_a_sum_that_cannot_be_is_refused_in_one_line(changes: dict[str, Any], line: str) -> None:
    node = {"_target_": "edgemin.distillation.multi.Multi", "methods": METHODS, **FIT} | changes
    with pytest.raises(UserError, match=rf"^distill\.{line}[^\n]*$"):
        config.construct(node, "distill")


# Settings of all methods


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"teacher": []}, "teacher: expected distinct models"),
        ({"teacher": ["teacher", "teacher"]}, "teacher: expected distinct models"),
        ({"teacher": ["teacher", "other"]}, "teacher: expected one model"),
        ({"corpus": "text", "steps": None, "epochs": 1.0}, "epochs: expected null and steps"),
        ({"corpus": "text", "patience": 1}, "patience: expected null"),
        ({"layer_map": {}}, "layer_map: expected null"),
        ({"corpus": "text", "task_weight": 1.0}, "task_weight: expected 0"),
        ({"corpus": "text", "teacher_cache": True}, "teacher_cache: expected false"),
        ({"task_weight": -1.0}, "task_weight: expected auto or"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=rf"^{line}[^\n]* given [^\n]*$"):
        tiny.stage(MiniLMv2, **({"relations": RELATIONS, **FIT} | settings))


def test_answers_are_not_learnt_from_text_without_labels() -> None:
    with pytest.raises(UserError, match=r"^corpus: expected null, as this method needs the task's labels"):
        tiny.stage(LogitsDistillation, temperature=2.0, alpha=0.5, corpus="text", **FIT)


def test_the_teacher_is_the_trained_one_on_a_task_and_its_weights_as_they_came_with_a_corpus() -> None:
    assert tiny.stage(MiniLMv2, relations=RELATIONS, **FIT).teachers == ("teacher",)
    assert tiny.stage(MiniLMv2, relations=RELATIONS, corpus="text", **FIT).teachers == ("teacher.source",)
    several = tiny.stage(LogitsDistillation, temperature=2.0, alpha=0.5, teacher=["teacher", "other"], **FIT)
    assert several.teachers == ("teacher", "other")


# Models that a study adds


ASSISTANT = (
    "order=assistant",
    "teacher.layers=4",
    "assistant.source=null",
    "assistant.layers=2",
    "assistant.hidden=32",
    "assistant.heads=4",
    "assistant.intermediate=48",
    "student.layers=1",
    "distill_assistant.relation_heads=4",
    "distill_direct.relation_heads=4",
)


def test_an_assistant_learns_from_the_teacher_and_teaches_the_student() -> None:
    plan = studies.plan(*ASSISTANT)
    nodes = {node.path: node for node in plan.nodes}
    assert [row.spec.name for row in plan.rows][:2] == ["Teacher", "Assistant"]
    assistant = nodes["assistant/finetune/distill_assistant"]
    assert [teacher.path for teacher in assistant.teachers] == ["teacher/finetune"]
    assert [teacher.path for teacher in nodes["student/finetune/distill"].teachers] == [assistant.path]
    assert [teacher.path for teacher in nodes["student/finetune/distill_direct"].teachers] == ["teacher/finetune"]
    order = [node.path for node in plan.nodes]
    assert order.index(assistant.path) < order.index("student/finetune/distill")


def test_the_assistant_is_a_row_of_the_table(tmp_path: Path) -> None:
    rows = studies.run(tmp_path / "run", *ASSISTANT)["rows"]
    assert [row["model"] for row in rows] == ["teacher", "assistant", *["student"] * 4]
    assert all(0 <= row["metrics"]["toy"]["validation"]["accuracy"] <= 1 for row in rows)


def test_models_that_learn_from_each_other_are_refused() -> None:
    with pytest.raises(UserError, match=r"^[^\n]*stages: expected no model that learns from itself, given [^\n]*$"):
        studies.plan(*ASSISTANT, "assistant.stages=[finetune,distill]")
    with pytest.raises(UserError, match=r"^assistant\.source: expected models that do not start from one another"):
        studies.plan("order=assistant", "assistant.source=assistant", "assistant.layers=1")


def test_a_student_may_be_cut_from_the_assistant(tmp_path: Path) -> None:
    plan = studies.plan(
        *ASSISTANT,
        "student.source=assistant",
        "student.hidden=null",
        "student.heads=null",
        "student.intermediate=null",
    )
    root = next(node for node in plan.nodes if node.path == "student")
    assert root.parent is not None and root.parent.path == "assistant/finetune/distill_assistant"
    assert root.head_trained and root.outline.layers[1:] == ()


def test_an_unknown_teacher_is_refused_by_name() -> None:
    known = r"teacher, teacher\.source, student, student\.source, parent"
    line = rf"^distill\.teacher: expected one of {known}, given 'tutor'$"
    with pytest.raises(UserError, match=line):
        studies.plan("stages=[finetune,distill]", "distill.teacher=tutor")


def test_answers_of_a_teacher_without_a_trained_head_are_refused() -> None:
    with pytest.raises(UserError, match=r"^logits\.teacher: expected a model whose head was trained on toy"):
        studies.plan("order=methods", "stages=[finetune,logits]", "logits.teacher=teacher.source")


# A corpus in the task's place


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "text.txt").write_text("\n".join(toy.generate(200, 3)[0]))
    return folder


def on_corpus(corpus: Path, **settings: Any) -> MiniLMv2:
    given = {"relations": RELATIONS, "relation_heads": 4, "corpus": str(corpus), "corpus_length": 16, "steps": 7}
    given["task_weight"] = 0.0
    return tiny.stage(MiniLMv2, **(given | {"batch_size": 4, "learning_rate": 1e-3} | settings))


def test_a_run_on_a_corpus_killed_and_resumed_ends_with_the_same_weights(corpus: Path, tmp_path: Path) -> None:
    def run(work: str, *kill: tiny.Kill) -> Any:
        teacher = tiny.model(layers=4, seed=5)
        data = DataModule(None, toy.tokenizer(), Cache(tmp_path / "tokens"))
        return tiny.fit(
            on_corpus(corpus), tiny.model(), data, [teacher], work=tmp_path / work, seconds=0, callbacks=kill
        ).model

    unbroken = run("unbroken")
    with pytest.raises(tiny.KilledError):
        run("broken", tiny.Kill(4))
    assert (tmp_path / "broken" / "last.ckpt").is_file()
    assert tiny.same_weights(run("broken"), unbroken)


CORPUS = ("stages=[distill,finetune]", "distill.corpus_length=16")


def test_what_is_learnt_from_a_corpus_depends_on_no_task(corpus: Path, tmp_path: Path) -> None:
    folder = studies.checkpoint(tmp_path / "teacher")
    given = (*CORPUS, f"distill.corpus={corpus}", f"teacher.source={folder}", "teacher.family=null")
    given += tuple(f"teacher.{key}=null" for key in ("layers", "hidden", "heads", "intermediate"))
    first = {node.path: node for node in studies.plan(*given).nodes}
    other = {node.path: node for node in studies.plan(*given, "task.max_train_examples=64", "task.seed=3").nodes}
    node = first["student/distill"]
    assert [teacher.path for teacher in node.teachers] == ["teacher"]
    assert node.key == other["student/distill"].key
    assert first["student/distill/finetune"].key != other["student/distill/finetune"].key
    (corpus / "text.txt").rename(corpus / "renamed.txt")
    assert {node.path: node for node in studies.plan(*given).nodes}["student/distill"].key == node.key
    (corpus / "renamed.txt").write_text("other words\n" * 50)
    assert {node.path: node for node in studies.plan(*given).nodes}["student/distill"].key != node.key


def test_a_corpus_without_the_column_is_refused_before_training(corpus: Path) -> None:
    with pytest.raises(UserError, match=r"^distill\.corpus_column: expected a column of [^\n]* given body$"):
        studies.plan(*CORPUS, f"distill.corpus={corpus}", "distill.corpus_column=body", "distill.teacher=teacher")


def test_sequences_longer_than_a_model_takes_are_refused_before_training(corpus: Path) -> None:
    given = ("stages=[distill,finetune]", f"distill.corpus={corpus}", "distill.teacher=teacher")
    with pytest.raises(UserError, match=r"^distill\.corpus_length: expected at most \d+ tokens, what student takes"):
        studies.plan(*given, "distill.corpus_length=4096")


def test_a_student_that_inherits_embeddings_alone_has_no_trained_head() -> None:
    cut = ("student.source=teacher", "student.family=null", "student.vocabulary=null", "student.truncate=first")
    given = ("stages=[finetune]", *cut)
    for inherit, trained in (("all", True), ("embeddings", False)):
        nodes = {node.path: node for node in studies.plan(*given, f"student.inherit={inherit}").nodes}
        assert nodes["student"].head_trained is trained and nodes["student"].outline.hidden == 16
