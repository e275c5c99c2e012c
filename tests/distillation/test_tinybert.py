"""TinyBERT: its four losses against float64 loops, its layer map, its two fits."""

from __future__ import annotations

import math
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
from edgemin.distillation.tinybert import TinyBERT, score_mse
from edgemin.encoder import building, slicing, taps
from edgemin.encoder.outline import Outline
from edgemin.errors import UserError
from edgemin.tasks.classification import soft_cross_entropy
from edgemin.training.hidden_states import hidden_mse
from edgemin.training.layer_maps import matched_layers

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")

LENGTHS = [5, 7, 1, 3]  # of 7
MASK = (torch.arange(7) < torch.tensor(LENGTHS)[:, None]).long()
HEADS = 3


def states(seed: int, width: int = 12, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(4, 7, width, generator=generator, dtype=torch.float64)).to(dtype)


def side(seed: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (states(3 * seed + part, width, dtype) for part in range(3))
    return query, key, value


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def hidden_reference(teacher: Tensor, student: Tensor) -> float:
    sequences = []
    for t, s, length in zip(teacher.tolist(), student.tolist(), LENGTHS, strict=True):
        pairs = [pair for token in range(length) for pair in zip(t[token], s[token], strict=True)]
        sequences.append(mean([(a - b) ** 2 for a, b in pairs]))
    return mean(sequences)


def score_reference(teacher: tuple[Tensor, ...], student: tuple[Tensor, ...]) -> float:
    sequences = []
    for example, length in enumerate(LENGTHS):
        errors = []
        for head in range(HEADS):
            scores = []
            for query, key, _ in (teacher, student):
                size = query.shape[-1] // HEADS
                cut = slice(head * size, (head + 1) * size)
                rows, columns = (x[example, :length, cut].tolist() for x in (query, key))
                scores.append(
                    [sum(a * b for a, b in zip(q, k, strict=True)) / math.sqrt(size) for q in rows for k in columns]
                )
            errors += [(a - b) ** 2 for a, b in zip(*scores, strict=True)]
        sequences.append(mean(errors))
    return mean(sequences)


# The losses


def test_hidden_states_equal_a_float64_loop() -> None:
    expected = hidden_reference(states(0), states(1))
    assert hidden_mse(states(0), states(1), MASK).item() == pytest.approx(expected, rel=1e-12)
    in_float32 = hidden_mse(states(0).float(), states(1).float(), MASK)
    assert in_float32.dtype == torch.float32 and in_float32.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("teacher_width", "student_width"), [(12, 12), (24, 12), (6, 15)])
def test_scores_equal_a_float64_loop_each_side_with_the_scale_of_its_own_head_size(
    teacher_width: int, student_width: int
) -> None:
    teacher, student = side(0, teacher_width), side(1, student_width)
    expected = score_reference(teacher, student)
    assert score_mse(teacher, student, MASK, HEADS).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_predictions_equal_a_float64_loop_and_their_gradient_that_of_the_kl(temperature: float) -> None:
    teacher, student = states(0, 3)[:, 0], states(1, 3)[:, 0].requires_grad_()
    examples = []
    for t, s in zip(teacher.tolist(), student.tolist(), strict=True):
        p, q = ([math.exp(z / temperature) for z in logits] for logits in (t, s))
        examples.append(-sum(a / sum(p) * math.log(b / sum(q)) for a, b in zip(p, q, strict=True)))
    loss = soft_cross_entropy(teacher, student, temperature)
    assert loss.item() == pytest.approx(temperature**2 * mean(examples), rel=1e-12)
    kl = temperature**2 * functional.kl_div(
        (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1), reduction="batchmean"
    )
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in (loss, kl)))


def test_predictions_are_averaged_over_examples_and_not_over_classes_as_the_published_code_does() -> None:
    teacher, student = states(0, 3)[:, 0], states(1, 3)[:, 0]
    published = (-teacher.softmax(-1) * student.log_softmax(-1)).mean()
    torch.testing.assert_close(soft_cross_entropy(teacher, student), 3 * published)


def test_a_student_equal_to_its_teacher_has_no_loss_inside_and_no_gradient_of_its_answers() -> None:
    learning = states(0).requires_grad_()
    assert hidden_mse(states(0), learning, MASK).item() == 0
    assert score_mse(side(0, 12), side(0, 12), MASK, HEADS).item() == 0
    soft_cross_entropy(states(0)[:, 0], learning[:, 0], 1.0).backward()
    assert learning.grad is not None and learning.grad.abs().max() < 1e-12


def every_loss(teacher: Any, student: Any, mask: Tensor) -> list[Tensor]:
    """Both losses between layers, on the same tensors: queries serve as hidden states too."""
    return [hidden_mse(teacher[0], student[0], mask), score_mse(teacher, student, mask, HEADS)]


def test_padding_is_no_part_and_the_neighbours_in_a_batch_change_nothing() -> None:
    teacher, student = side(0, 12), side(1, 12)
    losses = every_loss(teacher, student, MASK)
    padded = [[functional.pad(x, (0, 0, 0, 4), value=math.inf) for x in of] for of in (teacher, student)]
    torch.testing.assert_close(every_loss(*padded, functional.pad(MASK, (0, 4))), losses)
    alone = [
        every_loss(*([x[[i], :n] for x in of] for of in (teacher, student)), MASK[[i], :n])
        for i, n in enumerate(LENGTHS)
    ]
    torch.testing.assert_close([torch.stack(each).mean() for each in zip(*alone, strict=True)], losses)
    emptied = MASK.clone()
    emptied[1] = 0
    others = [0, 2, 3]
    torch.testing.assert_close(
        every_loss(teacher, student, emptied),
        every_loss(*([x[others] for x in of] for of in (teacher, student)), MASK[others]),
    )
    assert every_loss(teacher, student, torch.zeros_like(MASK)) == [0, 0]


def test_padding_gets_no_gradient_and_neither_does_the_teacher() -> None:
    teacher, student = side(0, 12), side(1, 12)
    for part in (*teacher, *student):
        part.requires_grad_()
    torch.stack(
        [*every_loss(teacher, student, MASK), soft_cross_entropy(teacher[0][:, 0], student[0][:, 0])]
    ).sum().backward()
    assert all(part.grad is None for part in teacher)
    for part in student[:2]:
        assert part.grad is not None and part.grad[MASK == 0].eq(0).all() and part.grad[MASK == 1].ne(0).all()


def test_the_gradients_pass_gradcheck() -> None:
    teacher, student = side(0, 6), [x.requires_grad_() for x in side(1, 6)]
    for index in range(2):
        assert torch.autograd.gradcheck(
            lambda query, key, index=index: every_loss(teacher, (query, key, key), MASK)[index], tuple(student[:2])
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_arithmetic_is_float32_for_16_bit_tensors_and_under_autocast(dtype: torch.dtype) -> None:
    teacher, student = side(0, 12, dtype), side(1, 12, dtype)
    expected = every_loss(*([x.float() for x in of] for of in (teacher, student)), MASK)
    with torch.autocast("cpu", dtype=dtype):
        found = every_loss(teacher, student, MASK)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


# The layers


def test_layers_spread_as_in_the_paper_where_one_depth_divides_the_other() -> None:
    for student, teacher in ((4, 12), (6, 12), (3, 6), (12, 12), (1, 7)):
        assert matched_layers(None, student, teacher) == {m: m * teacher // student for m in range(1, student + 1)}
    assert matched_layers(None, 4, 6) == {1: 2, 2: 3, 3: 5, 4: 6}
    assert matched_layers({1: 6, 3: 2}, 3, 6) == {1: 6, 3: 2}


@pytest.mark.parametrize(("asked", "given"), [({0: 1}, "0"), ({4: 1}, "4"), ({1: 7}, "7"), ({1: 0}, "0"), ({}, "none")])
def test_layers_that_do_not_exist_are_refused(asked: dict[int, int], given: str) -> None:
    with pytest.raises(UserError, match=f"^layer_map: expected [^\n]*, given {given}$"):
        matched_layers(asked, 3, 6)


# The stage


def distillation(**settings: Any) -> TinyBERT:
    given: dict[str, Any] = {"steps": 5, "prediction_share": 0.4, "batch_size": 8, "learning_rate": 1e-3}
    return tiny.stage(TinyBERT, **(given | settings))


@pytest.mark.parametrize(
    ("settings", "pairs"),
    [
        ({}, {1: 2, 2: 4}),
        ({"layer_map": {2: 1}}, {2: 1}),
        ({"embedding_weight": 2.0, "hidden_weight": 0.5, "attention_weight": 0.1}, {1: 2, 2: 4}),
        ({"embedding_weight": 0.0, "attention_weight": 0.0}, {1: 2, 2: 4}),
        ({"embedding_weight": 0.0, "hidden_weight": 0.0}, {1: 2, 2: 4}),
    ],
)
def test_the_first_loss_is_the_sum_over_the_layers_of_what_both_sides_hold(
    settings: Any, pairs: dict[int, int], data: DataModule, batch: dict[str, Tensor]
) -> None:
    student, teacher = tiny.model(layers=2), tiny.model(layers=4, hidden=64, seed=5)
    stage = tiny.prepared(distillation(**settings), student, teacher, data)
    weights = {f"{name}_weight": 1.0 for name in ("embedding", "hidden", "attention")} | settings
    mask, mine, theirs = batch["attention_mask"], *(inside(of, batch) for of in (student, teacher))
    maps = {name: linear.weight.detach().T for name, linear in stage.projections.items()}
    assert maps.keys() == {name for name in ("embedding", "hidden") if weights[f"{name}_weight"]}
    expected = torch.zeros(())
    if weights["embedding_weight"]:
        found = hidden_mse(theirs.hidden[0], mine.hidden[0] @ maps["embedding"], mask)
        expected = expected + weights["embedding_weight"] * found
    for layer, of in pairs.items():
        if weights["hidden_weight"]:
            found = hidden_mse(theirs.hidden[of], mine.hidden[layer] @ maps["hidden"], mask)
            expected = expected + weights["hidden_weight"] * found
        found = score_mse(theirs.projections[of - 1], mine.projections[layer - 1], mask, 4)
        expected = expected + weights["attention_weight"] * found
    torch.testing.assert_close(stage.loss(batch).detach(), expected, rtol=1e-5, atol=1e-6)


def inside(of: PreTrainedModel, batch: dict[str, Tensor]) -> taps.Reading:
    """All hidden states, logits and projections of a model; projections count layers from 0."""
    layers = len(building.outline(of).layers)
    with torch.no_grad():
        return taps.read(of, batch, projections=range(layers), hidden=range(layers + 1), logits=True)


def test_the_second_loss_is_of_the_answers_alone(data: DataModule, batch: dict[str, Tensor]) -> None:
    student, teacher = tiny.model(layers=2), tiny.model(layers=4, hidden=64, seed=5)
    stage = tiny.prepared(distillation(temperature=2.0), student, teacher, data)
    stage.phase = 1
    expected = soft_cross_entropy(tiny.logits(teacher, batch), tiny.logits(student, batch), 2.0)
    torch.testing.assert_close(stage.loss(batch).detach(), expected)


def test_everything_that_should_learn_has_a_gradient_first_inside_then_to_the_head(
    data: DataModule, batch: dict[str, Tensor]
) -> None:
    student, teacher = tiny.model(layers=2), tiny.model(layers=4, hidden=64, seed=5)
    stage = tiny.prepared(distillation(), student, teacher, data)
    head = {name for name, _ in student.named_parameters() if "pooler" in name or "classifier" in name}
    stage.loss(batch).backward()
    learns = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert learns == {name for name, _ in student.named_parameters()} - head
    assert all(linear.weight.grad.abs().sum() > 0 for linear in stage.projections.values())
    stage.zero_grad()
    stage.phase = 1
    stage.loss(batch).backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(linear.weight.grad is None for linear in stage.projections.values())
    assert not any(of is parameter for of in teacher.parameters() for parameter in stage.parameters())


def test_it_brings_student_and_teacher_closer_and_ends_as_a_plain_encoder(data: DataModule, tmp_path: Path) -> None:
    student, teacher = tiny.model(layers=2, dropout=0.0), tiny.model(layers=4, hidden=64, seed=5)
    batch, shape, before = (
        data.train.batch(range(24)),
        building.outline(student),
        tiny.logits(student, data.train.batch(range(24))),
    )
    stage = distillation(steps=60, prediction_share=1 / 3, learning_rate=5e-3, prediction_learning_rate=2e-3)
    names = set(student.state_dict())
    fitted = tiny.fit(stage, student, data, [teacher], work=tmp_path / "w")
    assert fitted.steps == 60 and fitted.notes == []
    assert building.outline(fitted.model) == shape and set(fitted.model.state_dict()) == names
    answers = tiny.logits(teacher, batch)
    after = tiny.logits(fitted.model, batch)
    assert soft_cross_entropy(answers, after) < soft_cross_entropy(answers, before)


def test_equal_widths_can_be_compared_as_they_are_and_a_copy_then_loses_nothing(
    data: DataModule, batch: dict[str, Tensor]
) -> None:
    teacher = tiny.model(seed=5)
    stage = tiny.prepared(distillation(projection="none"), tiny.model(seed=5), teacher, data)
    assert not list(stage.projections.children())
    assert stage.loss(batch).item() == 0
    learnt = tiny.prepared(distillation(), tiny.model(seed=5), teacher, data)
    assert learnt.loss(batch).item() == pytest.approx(0, abs=1e-6), "learnt maps begin as the identity"


@pytest.mark.parametrize(("batch_killed", "phase"), [(2, 0), (2, 1)])
def test_killed_in_either_fit_and_resumed_it_ends_with_the_very_same_weights(
    batch_killed: int, phase: int, data: DataModule, tmp_path: Path
) -> None:
    def run(work: str, **how: Any) -> PreTrainedModel:
        student, teacher = tiny.model(layers=2), tiny.model(layers=4, hidden=64, seed=5)
        stage = distillation(steps=6, prediction_share=0.5)
        return tiny.fit(stage, student, data, [teacher], work=tmp_path / work, seconds=0, **how).model

    unbroken = run("a")
    with pytest.raises(tiny.KilledError):
        run("b", callbacks=[tiny.Kill(batch_killed, phase)])
    assert tiny.same_weights(run("b"), unbroken)


def test_a_fit_without_steps_is_left_out(data: DataModule, tmp_path: Path) -> None:
    student, teacher = tiny.model(layers=2), tiny.model(layers=4, hidden=64, seed=5)
    head = tiny.weights(student)["classifier.weight"]
    stage = distillation(prediction_share=0.0)
    assert (
        not tiny.effect(stage).trains_head
        and tiny.effect(stage).leaves_head_stale
        and not tiny.effect(stage).reads_answers
    )
    assert len(stage.fits()) == 1
    fitted = tiny.fit(stage, student, data, [teacher], work=tmp_path / "w")
    assert fitted.steps == 5 and torch.equal(fitted.model.state_dict()["classifier.weight"], head)


def test_patience_is_of_the_predictions(data: DataModule) -> None:
    first, second = distillation(patience=2, prediction_learning_rate=1e-4, decay="cosine").fits()
    assert (first.patience, second.patience) == (None, 2)
    assert (first.steps, second.steps, first.learning_rate, second.learning_rate) == (3, 2, 1e-3, 1e-4)
    assert first.decay == second.decay == "cosine" and first.batch_size == second.batch_size


@pytest.mark.parametrize(("steps", "share", "parts"), [(500, 0.2, [400, 100]), (7, 0.5, [3, 4]), (2, 0.2, [2])])
def test_steps_are_the_whole_budget_of_which_the_second_fit_has_its_rounded_share(
    steps: int, share: float, parts: list[int]
) -> None:
    assert [fit.steps for fit in distillation(steps=steps, prediction_share=share).fits()] == parts


def test_epochs_are_divided_as_steps_are() -> None:
    fits = distillation(steps=None, epochs=3.0, prediction_share=0.25).fits()
    assert [(fit.steps, fit.epochs) for fit in fits] == [(None, 2.25), (None, 0.75)]


def test_on_a_corpus_there_is_the_first_fit_alone_and_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a good film\n" * 20)
    stage = distillation(corpus=str(tmp_path))
    assert [fit.steps for fit in stage.fits()] == [5], "the whole budget"
    assert not tiny.effect(stage).trains_head and not tiny.effect(stage).reads_answers
    stage.equip(building.outline(tiny.model(layers=2)), [building.outline(tiny.model(layers=4, seed=5))])
    (note,) = stage.notes
    assert "predictions" in note


@pytest.mark.parametrize(
    ("settings", "student", "key"),
    [
        ({"layer_map": {7: 1}}, tiny.outline("bert", 6, 768, 12), "layer_map"),
        ({"layer_map": {1: 13}}, tiny.outline("bert", 6, 768, 12), "layer_map"),
        ({}, tiny.outline("bert", 6, 768, 6), "attention_weight"),
        ({}, tiny.outline("modernbert", 6, 768, 12), "attention_weight"),
        ({"projection": "none"}, tiny.outline("bert", 6, 384, 12), "projection"),
    ],
)
def test_models_that_cannot_be_matched_are_refused_in_planning(settings: Any, student: Outline, key: str) -> None:
    with pytest.raises(UserError, match=f"^{key}: expected [^\n]* given [^\n]*$"):
        distillation(**settings).match(student, [tiny.outline("bert", 12, 768, 12)])


def test_without_attention_any_family_and_any_number_of_heads_will_do(data: DataModule, batch: Any) -> None:
    stage = distillation(attention_weight=0.0)
    stage.match(tiny.outline("modernbert", 2, 32, 2), [tiny.outline("bert", 4, 64, 4)])
    student = tiny.model("modernbert", layers=2, heads=2)
    assert tiny.prepared(stage, student, tiny.model(layers=4, hidden=64, seed=5), data).loss(batch).isfinite()


def test_a_pruned_layer_is_refused_when_its_heads_are_known(data: DataModule) -> None:
    student = tiny.model()
    slicing.slice_heads(student, 1, [0, 1, 3])
    stage = distillation()
    stage.match(tiny.outline("bert", 3, 32, None), [tiny.outline("bert", 3, 32, 4)])
    with pytest.raises(UserError, match=r"^attention_weight: .* given 3 heads in the student and 4 in the teacher$"):
        tiny.prepared(stage, student, tiny.model(seed=5), data)
    tiny.prepared(distillation(layer_map={1: 1, 3: 3}), student, tiny.model(seed=5), data)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"embedding_weight": -1.0}, "embedding_weight"),
        ({"attention_weight": math.nan}, "attention_weight"),
        ({"embedding_weight": 0.0, "hidden_weight": 0.0, "attention_weight": 0.0}, "hidden_weight"),
        ({"temperature": 0.0}, "temperature"),
        ({"projection": "identity"}, "projection"),
        ({"prediction_share": 1.0}, "prediction_share"),
        ({"prediction_share": -0.1}, "prediction_share"),
        ({"prediction_learning_rate": 0.0}, "prediction_learning_rate"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"prediction_share": 0.0, "patience": 1}, "patience"),
        ({"layer_map": "skip"}, "layer_map"),
        ({"task_weight": 1.0}, "task_weight"),
        ({"teacher": ["teacher", "assistant"]}, "teacher"),
    ],
)
def test_settings_that_cannot_be_answer_one_line_that_begins_with_the_key(settings: Any, key: str) -> None:
    with pytest.raises(UserError, match=f"^distill.{key}: [^\n]*$"):
        config.construct(tiny.node("distill", "tinybert") | settings, "distill")
