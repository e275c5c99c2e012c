"""Multi-level distillation: its relations against float64 loops, what depends on the batch and what not, its fits."""

from __future__ import annotations

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
from edgemin.distillation.mlkd import MLKD
from edgemin.distillation.relation import relation_kl
from edgemin.distillation.sample_relations import contrastive_relation, sample_relation
from edgemin.distillation.token_relations import attention_relation, token_relation
from edgemin.encoder import building, slicing, taps
from edgemin.encoder.outline import Outline
from edgemin.errors import UserError
from edgemin.tasks.regression import Regression
from edgemin.training.hidden_states import hidden_mse
from edgemin.training.soft_targets import output_loss

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")

LENGTHS = [5, 7, 1, 3]  # of 7
MASK = (torch.arange(7) < torch.tensor(LENGTHS)[:, None]).long()
LABELS = torch.tensor([0, 1, 0, 2])


def states(seed: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 7, width, generator=generator, dtype=torch.float64).to(dtype)


def side(seed: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (states(3 * seed + part, width) for part in range(3))
    return query, key, value


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def dot(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def softmax(scores: list[float]) -> list[float]:
    exponentials = [math.exp(score - max(scores)) for score in scores]
    return [value / sum(exponentials) for value in exponentials]


def relation(vectors: list[list[float]]) -> list[list[float]]:
    """softmax(X Xᵀ / √d), row by row."""
    scale = math.sqrt(len(vectors[0]))
    return [softmax([dot(row, other) / scale for other in vectors]) for row in vectors]


def divergence(teacher: list[list[float]], student: list[list[float]]) -> float:
    """KL of two relations, mean over rows."""
    rows = zip(relation(teacher), relation(student), strict=True)
    return mean([sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)) for p, q in rows])


# The losses


def test_tokens_equal_a_float64_loop_whatever_the_widths() -> None:
    teacher, student = states(0, 12), states(1, 8)
    sides = zip(teacher.tolist(), student.tolist(), LENGTHS, strict=True)
    expected = mean([divergence(t[:length], s[:length]) for t, s, length in sides])
    assert expected > 0.01
    assert token_relation(teacher, student, MASK).item() == pytest.approx(expected, rel=1e-10)


def outputs(of: tuple[Tensor, Tensor, Tensor], example: int, heads: int) -> list[list[float]]:
    """softmax(Q Kᵀ / √D) V of every head, side by side, of an example's tokens."""
    size, length = of[0].shape[-1] // heads, LENGTHS[example]
    found: list[list[float]] = [[] for _ in range(length)]
    for head in range(heads):
        cut = slice(head * size, (head + 1) * size)
        query, key, value = (part[example, :length, cut].tolist() for part in of)
        for token in range(length):
            weights = softmax([dot(query[token], other) / math.sqrt(size) for other in key])
            found[token] += [dot(weights, column) for column in zip(*value, strict=True)]
    return found


@pytest.mark.parametrize(("teacher_heads", "student_heads", "parts"), [(4, 2, 2), (4, 2, 4), (3, 6, 1), (2, 2, 6)])
def test_attention_equals_a_float64_loop_with_any_number_of_heads_on_either_side(
    teacher_heads: int, student_heads: int, parts: int
) -> None:
    teacher, student = side(0, 24 if teacher_heads == 4 else 12), side(1, 12)
    sequences = []
    for example in range(4):
        found = outputs(teacher, example, teacher_heads), outputs(student, example, student_heads)
        sizes = [len(of[0]) // parts for of in found]
        split = [
            [[token[part * size : (part + 1) * size] for token in of] for of, size in zip(found, sizes, strict=True)]
            for part in range(parts)
        ]
        sequences.append(mean([divergence(*pair) for pair in split]))
    loss = attention_relation(
        teacher, student, MASK, teacher_heads=teacher_heads, student_heads=student_heads, relation_heads=parts
    )
    assert loss.item() == pytest.approx(mean(sequences), rel=1e-8)


def test_samples_equal_a_float64_loop_and_are_those_of_one_batch_alone() -> None:
    teacher, student = states(0, 12)[:, 0], states(1, 8)[:, 0]
    loss = sample_relation(teacher, student)
    assert loss.item() == pytest.approx(divergence(teacher.tolist(), student.tolist()), rel=1e-10)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(sample_relation(teacher[order], student[order]), loss)
    halves = [sample_relation(teacher[part], student[part]) for part in (slice(2), slice(2, 4))]
    assert abs(torch.stack(halves).mean() - loss) > 1e-3, "by nature it depends on who else is in the batch"
    assert sample_relation(teacher[:1], student[:1]).item() == 0


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_the_contrast_equals_a_float64_loop(temperature: float) -> None:
    teacher, student = states(0, 12)[:, 0], states(1, 12)[:, 0]
    vectors = [[value / math.sqrt(dot(v, v)) for value in v] for v in [*teacher.tolist(), *student.tolist()]]
    classes, anchors = LABELS.tolist() * 2, []
    for i, anchor in enumerate(vectors):
        others = [a for a in range(8) if a != i]
        total = sum(math.exp(dot(anchor, vectors[a]) / temperature) for a in others)
        positives = [p for p in others if classes[p] == classes[i]]
        terms = [-math.log(math.exp(dot(anchor, vectors[p]) / temperature) / total) for p in positives]
        anchors.append(mean(terms))
    loss = contrastive_relation(teacher, student, LABELS, temperature)
    assert loss.item() == pytest.approx(mean(anchors), rel=1e-10)


def test_the_contrast_falls_as_classes_gather_and_needs_no_second_example() -> None:
    apart = torch.eye(3, dtype=torch.float64)[LABELS]
    gathered = contrastive_relation(apart, apart, LABELS, 0.1)
    # Class 0 has four vectors, so each of them three positives of equal similarity.
    assert gathered.item() == pytest.approx(math.log(3) / 2, rel=1e-3)
    assert gathered < contrastive_relation(apart, apart.roll(1, 0), LABELS, 0.1)
    student = states(1, 12)[:1, 0].requires_grad_()
    alone = contrastive_relation(states(0, 12)[:1, 0], student, LABELS[:1], 0.1)
    alone.backward()
    assert alone.item() == 0 and student.grad is not None and student.grad.isfinite().all()


def heads(teacher: int, student: int, relation: int) -> dict[str, int]:
    return {"teacher_heads": teacher, "student_heads": student, "relation_heads": relation}


def test_a_student_equal_to_its_teacher_has_no_relation_left_to_learn() -> None:
    one = side(0, 12)
    assert token_relation(one[0], one[0], MASK).item() == pytest.approx(0, abs=1e-12)
    assert attention_relation(one, one, MASK, **heads(3, 3, 4)).item() == pytest.approx(0, abs=1e-12)
    assert sample_relation(one[0][:, 0], one[0][:, 0]).item() == pytest.approx(0, abs=1e-12)


def between_tokens(teacher: Any, student: Any, mask: Tensor) -> list[Tensor]:
    return [
        token_relation(teacher[0], student[0], mask),
        attention_relation(teacher, student, mask, **heads(3, 2, 2)),
    ]


def test_between_tokens_neither_padding_nor_the_neighbours_in_a_batch_change_anything() -> None:
    teacher, student = side(0, 12), side(1, 8)
    losses = between_tokens(teacher, student, MASK)
    padded = [[functional.pad(x, (0, 0, 0, 4), value=9.0) for x in of] for of in (teacher, student)]
    torch.testing.assert_close(between_tokens(*padded, functional.pad(MASK, (0, 4))), losses)
    alone = [
        between_tokens(*([x[[i], :n] for x in of] for of in (teacher, student)), MASK[[i], :n])
        for i, n in enumerate(LENGTHS)
    ]
    torch.testing.assert_close([torch.stack(each).mean() for each in zip(*alone, strict=True)], losses)


def test_the_teacher_gets_no_gradient_and_the_student_a_right_one() -> None:
    teacher, student = side(0, 12), side(1, 12)
    for part in (*teacher, *student):
        part.requires_grad_()
    first = [x[:, 0] for x in (teacher[0], student[0])]
    losses = [*between_tokens(teacher, student, MASK), sample_relation(*first)]
    torch.stack([*losses, contrastive_relation(*first, LABELS, 0.5)]).sum().backward()
    assert all(part.grad is None for part in teacher)
    assert all(part.grad is not None and part.grad.isfinite().all() for part in student)
    target, small = (x[0][:, 0].detach() for x in (teacher, student))
    assert torch.autograd.gradcheck(lambda learnt: sample_relation(target, learnt), (small.requires_grad_(),))
    assert torch.autograd.gradcheck(lambda learnt: contrastive_relation(target, learnt, LABELS, 0.5), (small,))
    query, key, value = (x[:2, :3].detach() for x in teacher)
    short = tuple(x[:2, :3, :4].detach().requires_grad_() for x in student)
    assert torch.autograd.gradcheck(
        lambda *of: attention_relation((query, key, value), of, MASK[:2, :3], **heads(3, 2, 2)), short
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_arithmetic_is_float32_for_16_bit_tensors_and_under_autocast(dtype: torch.dtype) -> None:
    teacher, student = ([x.to(dtype) for x in side(seed, 12)] for seed in (0, 1))

    def losses(teacher: list[Tensor], student: list[Tensor]) -> list[Tensor]:
        first = teacher[0][:, 0], student[0][:, 0]
        return [*between_tokens(teacher, student, MASK), contrastive_relation(*first, LABELS, 0.1)]

    expected = losses([x.float() for x in teacher], [x.float() for x in student])
    with torch.autocast("cpu", dtype=dtype):
        found = losses(teacher, student)
    assert all(loss.dtype == torch.float32 for loss in found)
    torch.testing.assert_close(found, expected)


# The stage


def distillation(**settings: Any) -> MLKD:
    given: dict[str, Any] = {"steps": 5, "prediction_share": 0.4, "batch_size": 8, "learning_rate": 1e-3}
    return tiny.stage(MLKD, **(given | settings))


def inside(of: PreTrainedModel, batch: dict[str, Tensor]) -> taps.Reading:
    """All hidden states, logits and projections of a model; projections count layers from 0."""
    layers = len(building.outline(of).layers)
    with torch.no_grad():
        return taps.read(of, batch, projections=range(layers), hidden=range(layers + 1), logits=True)


def contexts(of: PreTrainedModel, batch: dict[str, Tensor]) -> list[Tensor]:
    """What the attention heads of every layer really put out."""
    with torch.no_grad(), taps.head_contexts(of) as found:
        taps.logits(of, batch)
    return list(found)


WEIGHTS = {"embedding": 1.0, "attention": 1.0, "hidden": 1.0, "sample": 1.0, "contrastive": 1.0, "soft": 1.0}


@pytest.mark.parametrize(
    ("settings", "pairs", "parts"),
    [
        ({}, {1: 2, 2: 4}, 2),
        ({"layer_map": {2: 1}, "relation_heads": 8}, {2: 1}, 8),
        ({"embedding_weight": 0.5, "attention_weight": 2.0, "hidden_weight": 0.25}, {1: 2, 2: 4}, 2),
        ({"embedding_weight": 0.0, "hidden_weight": 0.0}, {1: 2, 2: 4}, 2),
    ],
)
def test_the_first_loss_is_the_weighted_sum_over_the_layers(
    settings: Any, pairs: dict[int, int], parts: int, data: DataModule, batch: dict[str, Tensor]
) -> None:
    student, teacher = tiny.model(layers=2, heads=2), tiny.model(layers=4, hidden=64, seed=5)
    stage = tiny.prepared(distillation(**settings), student, teacher, data)
    assert stage.projection is not None
    weight = {name: settings.get(f"{name}_weight", value) for name, value in WEIGHTS.items()}
    mask, mine, theirs = batch["attention_mask"], inside(student, batch), inside(teacher, batch)
    heard = contexts(teacher, batch), contexts(student, batch)
    expected = weight["embedding"] * relation_kl(theirs.hidden[0], mine.hidden[0], mask, 1)
    for layer, of in pairs.items():
        found = relation_kl(heard[0][of - 1], heard[1][layer - 1], mask, parts)
        expected = expected + weight["attention"] * found
        mapped = mine.hidden[layer] @ stage.projection.weight.detach().T
        expected = expected + weight["hidden"] * hidden_mse(theirs.hidden[of], mapped, mask)
    torch.testing.assert_close(stage.loss(batch).detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"sample_weight": 3.0, "soft_weight": 0.5}, {"contrastive_weight": 0.0}])
def test_the_second_loss_is_the_weighted_sum_over_the_examples(
    settings: Any, data: DataModule, batch: dict[str, Tensor]
) -> None:
    student, teacher = tiny.model(layers=2, heads=2), tiny.model(layers=4, hidden=64, seed=5)
    stage = tiny.prepared(distillation(temperature=2.0, **settings), student, teacher, data)
    stage.phase = 1
    assert stage.projection is not None
    weight = {name: settings.get(f"{name}_weight", value) for name, value in WEIGHTS.items()}
    mine, theirs = inside(student, batch), inside(teacher, batch)
    assert mine.logits is not None and theirs.logits is not None
    first = theirs.hidden[4][:, 0], mine.hidden[2][:, 0]
    mapped = first[1] @ stage.projection.weight.detach().T
    expected = weight["sample"] * sample_relation(*first)
    expected = expected + weight["contrastive"] * contrastive_relation(first[0], mapped, batch["labels"], 0.1)
    expected = expected + weight["soft"] * output_loss(data.kind, [theirs.logits], mine.logits, 2.0)
    torch.testing.assert_close(stage.loss(batch).detach(), expected, rtol=1e-4, atol=1e-5)


def test_everything_that_should_learn_has_a_gradient_first_inside_then_to_the_head(
    data: DataModule, batch: dict[str, Tensor]
) -> None:
    student, teacher = tiny.model(layers=2, heads=2), tiny.model(layers=4, hidden=64, seed=5)
    stage = tiny.prepared(distillation(), student, teacher, data)
    assert stage.projection is not None
    head = {name for name, _ in student.named_parameters() if "pooler" in name or "classifier" in name}
    stage.loss(batch).backward()
    learns = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert learns == {name for name, _ in student.named_parameters()} - head
    assert stage.projection.weight.grad is not None and stage.projection.weight.grad.abs().sum() > 0
    stage.zero_grad()
    stage.phase = 1
    stage.loss(batch).backward()
    assert all(parameter.grad is not None for parameter in (*student.parameters(), stage.projection.weight))
    assert not any(of is parameter for of in teacher.parameters() for parameter in stage.parameters())


def test_killed_and_resumed_it_ends_with_the_very_same_weights_and_as_a_plain_encoder(
    data: DataModule, tmp_path: Path
) -> None:
    student = tiny.model(layers=2, heads=2)
    names, shape = set(student.state_dict()), building.outline(student)

    def run(work: str, **how: Any) -> PreTrainedModel:
        student, teacher = tiny.model(layers=2, heads=2), tiny.model(layers=4, hidden=64, seed=5)
        stage = distillation(steps=6, prediction_share=0.5)
        return tiny.fit(stage, student, data, [teacher], work=tmp_path / work, seconds=0, **how).model

    unbroken = run("a")
    assert set(unbroken.state_dict()) == names and building.outline(unbroken) == shape
    with pytest.raises(tiny.KilledError):
        run("b", callbacks=[tiny.Kill(2, 1)])
    assert tiny.same_weights(run("b"), unbroken)


def test_it_brings_student_and_teacher_closer(data: DataModule, tmp_path: Path) -> None:
    student, teacher = tiny.model(layers=2, heads=2, dropout=0.0), tiny.model(layers=4, hidden=64, seed=5)
    batch = data.train.batch(range(24))
    measure = tiny.prepared(distillation(), tiny.model(layers=2, heads=2), teacher, data)
    fitted = tiny.fit(
        distillation(steps=40, prediction_share=0.0, learning_rate=5e-3), student, data, [teacher], work=tmp_path / "w"
    )
    before, after = inside(measure.model, batch), inside(fitted.model, batch)
    target = inside(teacher, batch).hidden[0]
    mask = batch["attention_mask"]
    assert token_relation(target, after.hidden[0], mask) < 0.8 * token_relation(target, before.hidden[0], mask)


def test_relation_heads_are_the_students_or_the_next_below_that_divide_both_widths(data: DataModule) -> None:
    student, teacher = tiny.model(layers=2), tiny.model(layers=4, hidden=64, seed=5)
    slicing.slice_heads(student, 1, [0, 1, 3])  # three heads of 8; with 64 they share 2
    stage = distillation()
    stage.match(tiny.outline("bert", 2, 32, None), [tiny.outline("bert", 4, 64, 4)])
    tiny.prepared(stage, student, teacher, data)
    (note,) = stage.notes
    assert "student layer 2" in note and "2 instead of 3" in note
    assert stage.loss(data.train.batch(range(4))).isfinite()


def test_what_a_regression_has_no_classes_for_is_left_out_and_it_says_so(batch: dict[str, Tensor]) -> None:
    student, teacher = tiny.model(layers=2), tiny.model(layers=2, seed=5)
    for model in (student, teacher):
        building.attach_head(model, ["score"], "regression")
    outlines = building.outline(student), [building.outline(teacher)]
    stage = tiny.planned(distillation())
    stage._data = tiny.of_kind(Regression())
    stage.match(*outlines)
    stage.equip(*outlines)
    stage.phase = 1
    (note,) = stage.notes
    assert "contrast by label" in note
    found = stage.terms(inside(student, batch), [inside(teacher, batch)], batch)
    assert set(found) == {"sample", "soft"}
    alone = tiny.planned(distillation(sample_weight=0.0, soft_weight=0.0))
    alone._data = tiny.of_kind(Regression())
    with pytest.raises(UserError, match="above 0"):
        alone.equip(*outlines)


def test_on_a_corpus_there_is_the_first_fit_alone_and_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a good film\n" * 20)
    stage = distillation(corpus=str(tmp_path))
    assert len(stage.fits()) == 1 and not tiny.effect(stage).trains_head and not tiny.effect(stage).reads_answers
    stage.equip(building.outline(tiny.model(layers=2)), [building.outline(tiny.model(layers=4, seed=5))])
    (note,) = stage.notes
    assert "predictions" in note


def test_the_head_is_trained_where_answers_are_learnt() -> None:
    assert tiny.effect(distillation()).trains_head and tiny.effect(distillation()).reads_answers
    for settings in ({"soft_weight": 0.0}, {"prediction_share": 0.0}):
        stage = distillation(**settings)
        assert (
            not tiny.effect(stage).trains_head
            and tiny.effect(stage).leaves_head_stale
            and not tiny.effect(stage).reads_answers
        )
    first, second = distillation(patience=2, prediction_learning_rate=1e-4).fits()
    assert (first.patience, second.patience, second.steps, second.learning_rate) == (None, 2, 2, 1e-4)


BASE = tiny.outline("bert", 12, 768, 12)


@pytest.mark.parametrize(
    ("settings", "student", "key"),
    [
        ({"layer_map": {7: 1}}, tiny.outline("bert", 6, 384, 12), "layer_map"),
        ({"layer_map": {}}, tiny.outline("bert", 6, 384, 12), "layer_map"),
        ({}, tiny.outline("modernbert", 6, 384, 12), "attention_weight"),
        ({"relation_heads": 5}, tiny.outline("bert", 6, 384, 12), "relation_heads"),
        ({"relation_heads": 768}, tiny.outline("bert", 6, 384, 12), "relation_heads"),
    ],
)
def test_models_that_cannot_be_matched_are_refused_in_planning(settings: Any, student: Outline, key: str) -> None:
    with pytest.raises(UserError, match=f"^{key}: expected [^\n]* given [^\n]*$"):
        distillation(**settings).match(student, [BASE])
    distillation().match(tiny.outline("bert", 6, 384, 3), [BASE])


def test_without_attention_modernbert_will_do(data: DataModule, batch: dict[str, Tensor]) -> None:
    stage = distillation(attention_weight=0.0)
    teacher = tiny.model("modernbert", layers=4, hidden=64, seed=5)
    assert tiny.prepared(stage, tiny.model(layers=2), teacher, data).loss(batch).isfinite()


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"hidden_weight": -1.0}, "hidden_weight"),
        ({"soft_weight": math.nan}, "soft_weight"),
        ({"embedding_weight": 0.0, "attention_weight": 0.0, "hidden_weight": 0.0}, "embedding_weight"),
        ({"sample_weight": 0.0, "contrastive_weight": 0.0, "soft_weight": 0.0}, "sample_weight"),
        ({"temperature": -1.0}, "temperature"),
        ({"contrastive_temperature": 0.0}, "contrastive_temperature"),
        ({"relation_heads": 0}, "relation_heads"),
        ({"prediction_share": 1.0}, "prediction_share"),
        ({"prediction_learning_rate": 0.0}, "prediction_learning_rate"),
        ({"prediction_share": 0.0, "patience": 1}, "patience"),
        ({"task_weight": 1.0}, "task_weight"),
    ],
)
def test_settings_that_cannot_be_answer_one_line_that_begins_with_the_key(settings: Any, key: str) -> None:
    with pytest.raises(UserError, match=f"^distill.{key}: [^\n]*$"):
        config.construct(tiny.node("distill", "mlkd") | settings, "distill")
