"""MiniLM: its two losses against a float64 loop and Hugging Face's own attentions, and its stage."""

from __future__ import annotations

import copy
import math
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
from edgemin.distillation.minilm import MiniLM
from edgemin.distillation.relation import attention_kl, value_kl
from edgemin.encoder import building, slicing, taps
from edgemin.encoder.outline import Outline
from edgemin.errors import UserError
from edgemin.training.attention import attention_outputs, attention_scores

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")

LENGTHS = [5, 7, 1, 3]  # of 7
MASK = (torch.arange(7) < torch.tensor(LENGTHS)[:, None]).long()
HEADS = 3
Side = tuple[Tensor, Tensor, Tensor]


def side(seed: int, width: int, dtype: torch.dtype = torch.float64) -> Side:
    """Random queries, keys and values of one side."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(4, 7, width, generator=generator, dtype=torch.float64) for _ in range(3))
    return query.to(dtype), key.to(dtype), value.to(dtype)


def distribution(row: Sequence[float], columns: Sequence[Sequence[float]]) -> list[float]:
    """softmax(row · columns / √d), one number at a time."""
    scores = [sum(a * b for a, b in zip(row, column, strict=True)) / math.sqrt(len(row)) for column in columns]
    exponentials = [math.exp(score - max(scores)) for score in scores]
    return [value / sum(exponentials) for value in exponentials]


def reference(teacher: tuple[Tensor, Tensor], student: tuple[Tensor, Tensor]) -> float:
    """Rows of the first, columns of the second; in Python's float64."""
    sequences = []
    for example, length in enumerate(LENGTHS):
        total = 0.0
        for head in range(HEADS):
            parts = []
            for rows, columns in (teacher, student):
                size = rows.shape[-1] // HEADS
                cut = slice(head * size, (head + 1) * size)
                parts.append([x[example, :length, cut].double().tolist() for x in (rows, columns)])
            for token in range(length):
                p, q = (distribution(rows[token], columns) for rows, columns in parts)
                total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
        sequences.append(total / (HEADS * length))
    return sum(sequences) / len(sequences)


# The losses


@pytest.mark.parametrize(("teacher_width", "student_width"), [(24, 24), (24, 12), (6, 15)])
def test_both_losses_equal_a_float64_loop_over_the_equations(teacher_width: int, student_width: int) -> None:
    teacher, student = side(0, teacher_width), side(1, student_width)
    attention = reference((teacher[0], teacher[1]), (student[0], student[1]))
    value = reference((teacher[2], teacher[2]), (student[2], student[2]))
    assert attention > 0.01 and value > 0.01
    assert attention_kl(teacher, student, MASK, HEADS).item() == pytest.approx(attention, rel=1e-10)
    assert value_kl(teacher, student, MASK, HEADS).item() == pytest.approx(value, rel=1e-10)


def eager(of: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The attention distributions [B, A, T, T] of every layer, as Hugging Face itself computes them."""
    of = copy.deepcopy(of).eval()
    of.set_attn_implementation("eager")
    names = ("input_ids", "attention_mask", "token_type_ids")
    with torch.no_grad():
        found = of(**{name: batch[name] for name in names}, output_attentions=True).attentions
    assert isinstance(found, tuple)
    return found


def last_projections(of: PreTrainedModel, batch: dict[str, Tensor], layer: int) -> Side:
    with torch.no_grad():
        return tuple(taps.read(of, batch, projections=[layer - 1], logits=False).projections[layer - 1])


def test_the_attention_compared_is_the_one_that_the_models_run_with(data: DataModule) -> None:
    batch = data.train.batch(range(6))
    teacher, student = tiny.model(layers=2, hidden=64, seed=5), tiny.model(layers=2)
    p, q = eager(teacher, batch)[-1].double(), eager(student, batch)[-1].double()
    rows = torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum(-1)  # padding columns have no probability
    tokens = batch["attention_mask"].bool()
    per_sequence = [rows[i][:, tokens[i]].mean() for i in range(len(rows))]
    found = attention_kl(last_projections(teacher, batch, 2), last_projections(student, batch, 2), tokens, 4)
    assert found.item() == pytest.approx(torch.stack(per_sequence).mean().item(), rel=1e-4)


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "mobilebert"])
def test_rebuilt_scores_and_outputs_are_those_inside_the_model(family: str, data: DataModule) -> None:
    batch, model = data.train.batch(range(6)), tiny.model(family, layers=2)
    heads = building.outline(model).layers[1].heads
    query, key, value = last_projections(model, batch, 2)
    with torch.no_grad(), taps.head_contexts(model) as contexts:
        taps.logits(model, batch)
    tokens = batch["attention_mask"].bool()
    found = attention_outputs(query, key, value, batch["attention_mask"], heads)
    torch.testing.assert_close(found[tokens], contexts[1][tokens], rtol=1e-4, atol=1e-5)
    scores = attention_scores(query, key, heads).masked_fill(~tokens[:, None, None], -torch.inf)
    rebuilt = scores.softmax(-1) @ value.unflatten(-1, (heads, -1)).transpose(1, 2)
    torch.testing.assert_close(rebuilt.transpose(1, 2).flatten(2)[tokens], found[tokens], rtol=1e-4, atol=1e-5)


def test_attention_outputs_of_a_sequence_without_tokens_are_numbers() -> None:
    query, key, value = (part.requires_grad_() for part in side(0, 12))
    mask = MASK.clone()
    mask[1] = 0
    found = attention_outputs(query, key, value, mask, HEADS)
    found[mask.bool()].sum().backward()
    assert found.isfinite().all() and query.grad is not None and query.grad.isfinite().all()


@pytest.mark.parametrize("loss", [attention_kl, value_kl])
def test_a_student_equal_to_its_teacher_has_no_loss_and_padding_changes_nothing(loss: Any) -> None:
    teacher, student = side(0, 24), side(1, 12)
    assert loss(teacher, teacher, MASK, HEADS).item() == pytest.approx(0, abs=1e-12)
    padded = [tuple(functional.pad(x, (0, 0, 0, 4), value=9.0) for x in of) for of in (teacher, student)]
    found = loss(teacher, student, MASK, HEADS)
    torch.testing.assert_close(loss(*padded, functional.pad(MASK, (0, 4)), HEADS), found)
    alone = [
        loss(*(tuple(x[[i], :n] for x in of) for of in (teacher, student)), MASK[[i], :n], HEADS)
        for i, n in enumerate(LENGTHS)
    ]
    torch.testing.assert_close(torch.stack(alone).mean(), found)


# The stage


def distillation(**settings: Any) -> MiniLM:
    given: dict[str, Any] = {"steps": 2, "batch_size": 8, "task_weight": 0.0, "learning_rate": 1e-3}
    return tiny.stage(MiniLM, **(given | settings))


@pytest.mark.parametrize(
    ("settings", "student_layer", "teacher_layer"),
    [
        ({}, 3, 4),
        ({"teacher_layer": 2, "student_layer": 1}, 1, 2),
        ({"attention_weight": 0.5, "value_weight": 2.0}, 3, 4),
        ({"attention_weight": 0.0}, 3, 4),
        ({"value_weight": 0.0, "task_weight": 0.7}, 3, 4),
    ],
)
def test_the_loss_is_the_weighted_sum_on_what_both_layers_hold(
    settings: Any, student_layer: int, teacher_layer: int, data: DataModule, batch: dict[str, Tensor]
) -> None:
    student, teacher = tiny.model(), tiny.model(layers=4, hidden=64, seed=5)
    stage = tiny.prepared(distillation(**settings), student, teacher, data)
    sides = last_projections(teacher, batch, teacher_layer), last_projections(student, batch, student_layer)
    given = {"attention_weight": 1.0, "value_weight": 1.0, "task_weight": 0.0} | settings
    expected = given["attention_weight"] * attention_kl(*sides, batch["attention_mask"], 4)
    expected += given["value_weight"] * value_kl(*sides, batch["attention_mask"], 4)
    if given["task_weight"]:
        expected += given["task_weight"] * functional.cross_entropy(tiny.logits(student, batch), batch["labels"])
    torch.testing.assert_close(stage.loss(batch).detach(), expected, rtol=1e-5, atol=1e-6)


def test_what_is_below_the_layer_learns_and_nothing_above_it(data: DataModule, batch: dict[str, Tensor]) -> None:
    student = tiny.model()
    tiny.prepared(distillation(student_layer=2), student, tiny.model(seed=5), data).loss(batch).backward()
    learns = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    wanted = {f"bert.encoder.layer.1.attention.self.{part}.weight" for part in ("query", "key", "value")}
    assert wanted <= learns and "bert.embeddings.word_embeddings.weight" in learns
    assert not {name for name in learns if "layer.2." in name or "layer.1.output" in name or "classifier" in name}


@pytest.mark.parametrize("of_teacher", ["bert", "distilbert", "mobilebert"])
@pytest.mark.parametrize("of_student", ["roberta", "distilbert"])
def test_families_with_plain_attention_teach_one_another(
    of_teacher: str, of_student: str, data: DataModule, tmp_path: Path
) -> None:
    teacher, student = tiny.model(of_teacher, layers=2, hidden=64, seed=5), tiny.model(of_student, layers=1)
    before = tiny.weights(student)
    fitted = tiny.fit(distillation(), student, data, [teacher], work=tmp_path / "w")
    assert fitted.steps == 2 and fitted.notes == []
    assert any(not torch.equal(tensor, before[name]) for name, tensor in fitted.model.state_dict().items())


BASE = tiny.outline("bert", 12, 768, 12)


@pytest.mark.parametrize(
    ("settings", "student", "key"),
    [
        ({"teacher_layer": 13}, tiny.outline("bert", 6, 384, 12), "teacher_layer"),
        ({"teacher_layer": 0}, tiny.outline("bert", 6, 384, 12), "teacher_layer"),
        ({"student_layer": 7}, tiny.outline("bert", 6, 384, 12), "student_layer"),
        ({}, tiny.outline("bert", 6, 384, 6), "student_layer"),
        ({}, tiny.outline("modernbert", 6, 384, 12), "attention_weight"),
    ],
)
def test_models_that_cannot_be_matched_are_refused_in_planning(settings: Any, student: Outline, key: str) -> None:
    with pytest.raises(UserError, match=f"^{key}: expected [^\n]* given [^\n]*$"):
        distillation(**settings).match(student, [BASE])


def test_a_modernbert_teacher_is_refused_for_attention_and_taken_for_values(data: DataModule, batch: Any) -> None:
    teacher = tiny.model("modernbert", layers=2, seed=5)
    with pytest.raises(UserError, match=r"^attention_weight: expected 0 with a teacher of family modernbert"):
        tiny.prepared(distillation(), tiny.model(), teacher, data)
    stage = distillation(attention_weight=0.0)
    stage.match(tiny.outline("bert", 3, 32, 4), [tiny.outline("modernbert", 2, 32, 4)])
    assert tiny.prepared(stage, tiny.model(), teacher, data).loss(batch).item() > 0


def test_a_pruned_layer_is_refused_when_its_heads_are_known(data: DataModule) -> None:
    student = tiny.model()
    slicing.slice_heads(student, 2, [0, 1, 3])
    stage = distillation()
    stage.match(tiny.outline("bert", 3, 32, None), [tiny.outline("bert", 3, 32, 4)])
    with pytest.raises(UserError, match=r"^student_layer: .* given 3 heads in the student and 4 in the teacher$"):
        tiny.prepared(stage, student, tiny.model(seed=5), data)
    tiny.prepared(distillation(student_layer=2), student, tiny.model(seed=5), data)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"attention_weight": -1.0}, "attention_weight"),
        ({"value_weight": math.inf}, "value_weight"),
        ({"attention_weight": 0.0, "value_weight": 0.0}, "attention_weight"),
        ({"task_weight": -1.0}, "task_weight"),
        ({"teacher_layer": 1.5}, "teacher_layer"),
        ({"teacher": ["teacher", "assistant"]}, "teacher"),
        ({"relation_heads": 12}, "relation_heads"),
    ],
)
def test_settings_that_cannot_be_answer_one_line_that_begins_with_the_key(settings: Any, key: str) -> None:
    with pytest.raises(UserError, match=f"^distill.{key}: [^\n]*$"):
        config.construct(tiny.node("distill", "minilm") | settings, "distill")


@pytest.mark.parametrize(("finetuned_later", "weight"), [(False, 1.0), (True, 0.0)])
def test_the_task_weight_auto_keeps_a_trained_head_from_going_stale(finetuned_later: bool, weight: float) -> None:
    node = tiny.node("distill", "minilm")
    stage = config.construct(node, "distill")
    effect = tiny.effect(stage, head_trained=True, finetuned_later=finetuned_later)
    assert effect.decided == {"task_weight": weight}
