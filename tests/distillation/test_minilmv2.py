"""Relation distillation: what it computes, what it leaves alone, which layers and relation heads it takes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from edgemin import config
from edgemin.data.module import DataModule
from edgemin.distillation.minilmv2 import MiniLMv2
from edgemin.distillation.relation import relations_loss
from edgemin.encoder import parts, slicing
from edgemin.errors import UserError
from edgemin.study import roots
from edgemin.study.roots import Root
from edgemin.toy import LABELS, vocabulary

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")
QKV = {"qq": 1.0, "kk": 1.0, "vv": 1.0}
BASE = tiny.outline("bert", 12, 768, 12)


def distillation(**settings: Any) -> MiniLMv2:
    given: dict[str, Any] = {"relations": QKV, "steps": 2, "batch_size": 8, "task_weight": 0.0, "learning_rate": 1e-3}
    return tiny.stage(MiniLMv2, **(given | settings))


def projections(of: PreTrainedModel, batch: dict[str, Tensor], layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of a BERT's layer (from 1), from the hidden states that enter it; no hooks."""
    of.eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        hidden = of(**inputs, output_hidden_states=True).hidden_states[layer - 1]
        attention = of.get_submodule(f"bert.encoder.layer.{layer - 1}.attention.self")
        return attention.query(hidden), attention.key(hidden), attention.value(hidden)


# What the loss is


@pytest.mark.parametrize("weight", [0.0, 0.7])
@pytest.mark.parametrize(
    ("settings", "pairs"),
    [
        ({}, {3: 4}),
        ({"teacher_layer": 2}, {3: 2}),
        ({"student_layer": 1, "teacher_layer": 3}, {1: 3}),
        ({"layer_map": "layer_to_layer"}, {1: 2, 2: 3, 3: 4}),
        ({"layer_map": {1: 4, 3: 1}}, {1: 4, 3: 1}),
        ({"relations": {"qk": 2.0, "vv": 0.5}, "relation_heads": 4}, {3: 4}),
    ],
)
def test_the_loss_is_the_mean_relation_loss_of_the_pairs_plus_the_weighted_task_loss(
    settings: Any, pairs: dict[int, int], weight: float, data: DataModule, batch: dict[str, Tensor]
) -> None:
    student, teacher = tiny.model(), tiny.model(layers=4, hidden=64, seed=5)
    stage = tiny.prepared(
        distillation(**{"relation_heads": 8, "task_weight": weight} | settings), student, teacher, data
    )
    given = {"relations": QKV, "relation_heads": 8} | settings
    by_pair = [
        relations_loss(
            projections(teacher, batch, of),
            projections(student, batch, layer),
            batch["attention_mask"],
            given["relation_heads"],
            given["relations"],
        )
        for layer, of in pairs.items()
    ]
    expected = torch.stack(by_pair).mean()
    if weight:
        expected = expected + weight * functional.cross_entropy(tiny.logits(student, batch), batch["labels"])
    torch.testing.assert_close(stage.loss(batch).detach(), expected, atol=1e-6, rtol=1e-5)


def test_pitfall_e_the_teacher_layer_read_is_the_one_asked_for(data: DataModule, batch: dict[str, Tensor]) -> None:
    student, teacher = tiny.model(), tiny.model(layers=4, hidden=64, seed=5)
    losses = [
        tiny.prepared(distillation(relation_heads=8, teacher_layer=layer), student, teacher, data).loss(batch).item()
        for layer in (1, 2, 3, 4)
    ]
    mine = projections(student, batch, 3)
    expected = [
        relations_loss(projections(teacher, batch, layer), mine, batch["attention_mask"], 8, QKV).item()
        for layer in (1, 2, 3, 4)
    ]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert len({round(loss, 4) for loss in losses}) == 4, "layers must differ for the test to mean anything"


def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(data: DataModule, batch: dict[str, Tensor]) -> None:
    student = tiny.model()
    stage = tiny.prepared(distillation(relation_heads=8), student, copy.deepcopy(student), data)
    loss = stage.loss(batch)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert all(p.grad is None or p.grad.abs().max() < 1e-6 for p in student.parameters())


def test_distillation_brings_the_relations_closer(data: DataModule, tmp_path: Path, batch: dict[str, Tensor]) -> None:
    teacher, student = tiny.model(hidden=64, seed=5), tiny.model(dropout=0.0)
    measure = tiny.prepared(distillation(relation_heads=8), student, teacher, data)
    before = measure.loss(batch).item()
    stage = distillation(relation_heads=8, steps=30, learning_rate=5e-3)
    tiny.fit(stage, student, data, [teacher], work=tmp_path / "w")
    after = measure.loss(batch).item()
    assert after < 0.8 * before


# What it leaves alone


def watch(model: PreTrainedModel) -> list[tuple[str, bool]]:
    """Names of the modules that run, and whether they did so in training mode."""
    seen: list[tuple[str, bool]] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda module, _, name=name: seen.append((name, module.training)))
    return seen


def test_pitfall_f_the_teacher_runs_in_eval_without_gradients_and_is_not_trained(
    data: DataModule, tmp_path: Path, batch: dict[str, Tensor]
) -> None:
    teacher = tiny.model(layers=4, hidden=64, seed=5, dropout=0.5).train()
    before, seen = tiny.weights(teacher), watch(teacher)
    student = tiny.model(dropout=0.0)
    stage = tiny.prepared(distillation(relation_heads=8), student, teacher, data)
    stage.train()
    first, second = stage.loss(batch), stage.loss(batch)
    assert torch.equal(first, second), "a teacher with live dropout is another one each time"
    first.backward()
    assert seen and not any(training for _, training in seen)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    assert not any(parameter is of for of in teacher.parameters() for parameter in stage.parameters())

    seen.clear()
    tiny.fit(distillation(relation_heads=8, weight_decay=0.5), student, data, [teacher.train()], work=tmp_path / "w")
    assert seen and not any(training for _, training in seen)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def layers_run(seen: Sequence[tuple[str, bool]]) -> list[int]:
    names = {name for name, _ in seen if name.startswith("bert.encoder.layer.") and name.count(".") == 3}
    return sorted(int(name.rpartition(".")[2]) + 1 for name in names)


@pytest.mark.parametrize(
    ("weight", "student_layer", "of_student", "of_teacher"),
    [(0.0, 2, [1, 2], [1]), (0.0, None, [1, 2, 3], [1]), (1.0, 1, [1, 2, 3], [1])],
)
def test_what_is_not_needed_is_not_run(
    weight: float,
    student_layer: int | None,
    of_student: list[int],
    of_teacher: list[int],
    data: DataModule,
    batch: dict[str, Tensor],
) -> None:
    student, teacher = tiny.model(), tiny.model(layers=4, seed=5)
    stage = tiny.prepared(
        distillation(relation_heads=8, task_weight=weight, student_layer=student_layer, teacher_layer=1),
        student,
        teacher,
        data,
    )
    mine, theirs = watch(student), watch(teacher)
    stage.loss(batch)
    assert (layers_run(mine), layers_run(theirs)) == (of_student, of_teacher)
    deepest = f"bert.encoder.layer.{(student_layer or 3) - 1}."
    ran = {name for name, _ in mine}
    assert deepest + "attention.self.value" in ran
    assert (deepest + "attention.output.dense" in ran) == (weight > 0), "stops right after the projections"
    assert ("classifier" in ran) == (weight > 0)


def test_layers_above_the_one_that_learns_keep_their_weights(data: DataModule, tmp_path: Path) -> None:
    student = tiny.model()
    before = tiny.weights(student)
    stage = distillation(relation_heads=8, student_layer=2, weight_decay=0.5)
    tiny.fit(stage, student, data, [tiny.model(seed=5)], work=tmp_path / "w")
    for name, was in before.items():
        above = "layer.2." in name or "pooler" in name or "classifier" in name
        assert torch.equal(student.state_dict()[name], was) or not above, name
    assert not torch.equal(
        student.get_submodule("bert.encoder.layer.0.output.dense").weight,
        before["bert.encoder.layer.0.output.dense.weight"],
    )


# Families and shapes


def test_pitfall_h_the_published_student_shape_has_an_ffn_of_four_times_its_width() -> None:
    node = tiny.node("student", "shape") | {"seed": 1}
    root = config.construct(node, "student")
    assert isinstance(root, Root)
    shape = roots.random_config(root, "bert", vocabulary=100, padding_id=0)
    found = roots.outline(shape, None, root)
    assert (found.hidden, len(found.layers)) == (384, 6)
    assert {layer.ffn for layer in found.layers} == {1536}
    assert {(layer.heads, layer.head_size) for layer in found.layers} == {(12, 32)}


def test_pitfall_i_a_distilbert_teacher_without_token_types_teaches_a_bert_student(
    data: DataModule, tmp_path: Path, batch: dict[str, Tensor]
) -> None:
    assert "token_type_ids" in batch
    teacher, student = tiny.model("distilbert", layers=2, hidden=64, seed=5), tiny.model()
    before = tiny.weights(student)
    fitted = tiny.fit(distillation(relation_heads=16), student, data, [teacher], work=tmp_path / "w")
    assert fitted.steps == 2
    name = "bert.encoder.layer.2.attention.self.value.weight"
    assert not torch.equal(student.state_dict()[name], before[name])


@pytest.mark.parametrize("of_teacher", tiny.FAMILIES)
@pytest.mark.parametrize("of_student", tiny.FAMILIES)
def test_any_family_teaches_any_other(of_teacher: str, of_student: str, data: DataModule, batch: Any) -> None:
    teacher, student = tiny.model(of_teacher, layers=2, hidden=64, seed=5), tiny.model(of_student, layers=1)
    loss = tiny.prepared(distillation(), student, teacher, data).loss(batch)
    loss.backward()
    assert torch.isfinite(loss) and loss.item() > 0
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())


# Layers and relation heads


def test_the_default_is_the_published_layer_and_number_of_heads_for_the_teacher() -> None:
    stage = distillation()
    assert stage.pairs(6, BASE) == {6: 12}
    assert stage.pairs(6, tiny.outline("bert", 24, 1024, 16)) == {6: 21}
    assert stage.pairs(12, tiny.outline("roberta", 24, 1024, 16)) == {12: 19}
    assert stage.pairs(12, tiny.outline("distilbert", 6, 768, 12)) == {12: 6}


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"teacher_layer": 13}, "teacher_layer"),
        ({"teacher_layer": 0}, "teacher_layer"),
        ({"student_layer": 7}, "student_layer"),
        ({"layer_map": {7: 1}}, "layer_map"),
        ({"layer_map": {1: 13}}, "layer_map"),
        ({"relation_heads": 5}, "relation_heads"),
        ({"relation_heads": 768}, "relation_heads"),
    ],
)
def test_a_layer_or_a_number_of_heads_the_models_do_not_have_is_refused_in_planning(settings: Any, key: str) -> None:
    with pytest.raises(UserError, match=f"^{key}: expected [^\n]* given [^\n]*$"):
        distillation(**settings).match(tiny.outline("bert", 6, 384, 12), [BASE])


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"relation_heads": 0}, "relation_heads"),
        ({"layer_map": "layer_to_layer", "teacher_layer": 1}, "layer_map"),
        ({"relations": {"qx": 1.0}}, "relations"),
        ({"relations": {"qq": 0.0}}, "relations"),
        ({"relations": {"qq": -1.0}}, "relations.qq"),
        ({"task_weight": -1.0}, "task_weight"),
        ({"task_weight": "some"}, "task_weight"),
        ({"layer_map": "layers"}, "layer_map"),
    ],
)
def test_a_distillation_that_cannot_be_is_refused_with_its_key(settings: Any, key: str) -> None:
    with pytest.raises(UserError, match=f"^distill.{key}: [^\n]*$"):
        config.construct(tiny.node("distill", "minilmv2") | settings, "distill")


def test_relation_heads_shrink_where_the_matched_layer_was_pruned_and_it_says_so(
    data: DataModule, batch: dict[str, Tensor]
) -> None:
    student, teacher = tiny.model(), tiny.model(layers=4, hidden=64, seed=5)
    slicing.slice_heads(student, 2, [0, 1, 3])  # width 24; 64 and 24 share 8
    stage = distillation(relation_heads=16, layer_map={1: 2, 3: 4})
    stage.match(tiny.outline("bert", 3, 32, None), [tiny.outline("bert", 4, 64, 4)])
    tiny.prepared(stage, student, teacher, data)
    (note,) = stage.notes
    assert "student layer 3" in note and "teacher layer 4" in note and "8 instead of 16" in note
    expected = [
        relations_loss(
            projections(teacher, batch, of), projections(student, batch, layer), batch["attention_mask"], heads, QKV
        )
        for layer, of, heads in ((1, 2, 16), (3, 4, 8))
    ]
    torch.testing.assert_close(stage.loss(batch).detach(), torch.stack(expected).mean(), atol=1e-6, rtol=1e-5)


def test_relation_heads_of_the_preset_say_so_too_where_the_layer_was_pruned(data: DataModule) -> None:
    student, teacher = tiny.model(), tiny.model(layers=4, hidden=64, seed=5)
    slicing.slice_heads(student, 2, [0, 1, 3])
    stage = tiny.prepared(distillation(), student, teacher, data)
    assert any("student layer 3" in note for note in stage.notes)


def test_relation_heads_as_asked_leave_no_note(data: DataModule) -> None:
    student, teacher = tiny.model(), tiny.model(layers=4, hidden=64, seed=5)
    narrow = tiny.model()
    slicing.slice_hidden(narrow, range(8))  # its layers keep their width, more than the hidden size would divide into
    assert tiny.prepared(distillation(), narrow, teacher, data).notes == []
    assert tiny.prepared(distillation(relation_heads=16), student, teacher, data).notes == []
    assert tiny.prepared(distillation(), student, teacher, data).notes == []


WIDE = tiny.outline("bert", 3, 384, 12)


@pytest.mark.parametrize(
    ("head_trained", "finetuned_later", "weight"),
    [(True, False, 1.0), (True, True, 0.0), (False, True, 0.0), (False, False, 0.0)],
)
def test_the_task_weight_auto_is_on_where_a_trained_head_would_go_stale(
    head_trained: bool, finetuned_later: bool, weight: float
) -> None:
    node = tiny.node("distill", "minilmv2")
    stage = config.construct(node, "distill")
    place = {"head_trained": head_trained, "finetuned_later": finetuned_later}
    effect = tiny.effect(stage, WIDE, **place)
    assert effect.decided == {"task_weight": weight} and type(effect.decided["task_weight"]) is float
    assert effect.trains_head == (weight > 0) and stage.task_weight == weight
    by_hand = config.construct(node | {"task_weight": 0.25}, "distill")
    assert tiny.effect(by_hand, WIDE, **place).decided == {} and by_hand.task_weight == 0.25


def test_a_head_goes_stale_where_the_encoder_is_trained_without_it() -> None:
    assert (
        tiny.effect(distillation(task_weight=0.0)).leaves_head_stale
        and not tiny.effect(distillation(task_weight=0.0)).trains_head
    )
    assert (
        not tiny.effect(distillation(task_weight=0.5)).leaves_head_stale
        and tiny.effect(distillation(task_weight=0.5)).trains_head
    )
    assert not tiny.effect(distillation(task_weight=0.0, steps=0)).leaves_head_stale, "nothing is trained at all"


@pytest.mark.parametrize("weight", [-0.5, "none"])
def test_a_task_weight_that_is_no_weight_is_refused(weight: Any) -> None:
    with pytest.raises(UserError, match=r"^task_weight: expected auto or a number of at least 0, given [^\n]*$"):
        distillation(task_weight=weight)


def test_the_toy_head_of_these_tests_is_the_tasks(data: DataModule) -> None:
    assert parts.label_names(tiny.model()) == LABELS and len(vocabulary()) < 200
