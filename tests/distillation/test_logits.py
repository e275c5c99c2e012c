"""Soft targets against a float64 loop over the equation; the stage that learns from them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor

from edgemin import config
from edgemin.data.module import DataModule
from edgemin.distillation.logits import LogitsDistillation
from edgemin.encoder import building, taps
from edgemin.errors import UserError
from edgemin.tasks.base import Kind
from edgemin.tasks.classification import Classification, soft_target_kl
from edgemin.tasks.regression import Regression
from edgemin.training.soft_targets import check_outputs, output_loss

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")


def sample(seed: int, classes: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(5, classes, generator=generator, dtype=torch.float64)).to(dtype)


def softened(logits: list[float], temperature: float) -> list[float]:
    highest = max(logits)
    exponentials = [math.exp((value - highest) / temperature) for value in logits]
    return [value / sum(exponentials) for value in exponentials]


def reference(teacher: Tensor, student: Tensor, temperature: float) -> float:
    """The equation, one number at a time, in Python's float64."""
    losses = []
    for of_teacher, of_student in zip(teacher.double().tolist(), student.double().tolist(), strict=True):
        target, learnt = softened(of_teacher, temperature), softened(of_student, temperature)
        losses.append(sum(p * (math.log(p) - math.log(q)) for p, q in zip(target, learnt, strict=True)))
    return temperature**2 * sum(losses) / len(losses)


def kind_of(logits: Tensor) -> Kind:
    return Regression() if logits.shape[1] == 1 else Classification()


# The loss


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_equals_a_float64_loop_over_the_equation(classes: int, temperature: float) -> None:
    teacher, student = sample(0, classes), sample(1, classes)
    expected = reference(teacher, student, temperature)
    loss = soft_target_kl(teacher, student, temperature)
    assert loss.dtype == torch.float64 and loss.item() == pytest.approx(expected, rel=1e-10)
    assert soft_target_kl(teacher.float(), student.float(), temperature).item() == pytest.approx(expected, rel=1e-4)


def test_the_teacher_is_the_target_and_classes_are_summed() -> None:
    teacher, student = sample(0), sample(1)
    loss = soft_target_kl(teacher, student, 2.0)
    assert loss.item() != pytest.approx(reference(student, teacher, 2.0), rel=0.05), "the other way round"
    published = 4 * F.kl_div((student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="none").mean()
    assert loss.item() == pytest.approx(3 * published.item()), "a mean over 3 classes too is 3 times too small"


def test_a_high_temperature_leaves_half_the_squared_distance_of_centred_logits_per_class() -> None:
    teacher, student = sample(0), sample(1)
    difference = (teacher - teacher.mean(-1, keepdim=True)) - (student - student.mean(-1, keepdim=True))
    limit = (difference**2).sum(-1).mean() / (2 * 3)  # Hinton et al., section 2.1, integrated
    assert soft_target_kl(teacher, student, 1e4).item() == pytest.approx(limit.item(), rel=1e-3)


def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient() -> None:
    for classes in (1, 3):
        teacher = sample(0, classes)
        student = teacher.clone().requires_grad_()
        loss = output_loss(kind_of(student), [teacher, teacher], student, 2.0)
        loss.backward()
        assert loss.item() == 0 and student.grad is not None and student.grad.abs().max() < 1e-12


def test_examples_are_averaged_so_that_a_batch_is_the_mean_of_its_halves() -> None:
    teacher, student = sample(0), sample(1)
    alone = [soft_target_kl(teacher[[i]], student[[i]], 2.0) for i in range(5)]
    torch.testing.assert_close(soft_target_kl(teacher, student, 2.0), torch.stack(alone).mean())


@pytest.mark.parametrize("classes", [1, 3])
def test_several_teachers_count_the_same_and_pull_like_the_mean_of_their_answers(classes: int) -> None:
    teachers, student = [sample(seed, classes) for seed in (0, 1, 2)], sample(3, classes).requires_grad_()
    loss = output_loss(kind_of(student), teachers, student, 2.0)
    alone = [output_loss(kind_of(student), [teacher], student, 2.0) for teacher in teachers]
    torch.testing.assert_close(loss, torch.stack(alone).mean())
    if classes == 1:
        mean = torch.stack(teachers).mean(0)
    else:
        mean = 2.0 * torch.stack([(teacher / 2).softmax(-1) for teacher in teachers]).mean(0).log()
    of_mean = output_loss(kind_of(student), [mean], student, 2.0)
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in (loss, of_mean)))


def test_one_output_is_a_score_and_knows_no_temperature() -> None:
    teacher, student = sample(0, 1), sample(1, 1)
    expected = sum((t - s) ** 2 for t, s in zip(teacher[:, 0].tolist(), student[:, 0].tolist(), strict=True)) / 5
    for temperature in (1.0, 7.0):
        assert output_loss(kind_of(student), [teacher], student, temperature).item() == pytest.approx(expected)


@pytest.mark.parametrize("classes", [1, 3])
def test_the_gradient_passes_gradcheck_and_the_teacher_gets_none(classes: int) -> None:
    teacher, student = sample(0, classes).requires_grad_(), sample(1, classes).requires_grad_()
    kind = kind_of(student)
    assert torch.autograd.gradcheck(lambda learnt: output_loss(kind, [teacher.detach()], learnt, 3.0), (student,))
    output_loss(kind, [teacher], student, 3.0).backward()
    assert teacher.grad is None and student.grad is not None


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_arithmetic_is_float32_for_16_bit_logits_and_under_autocast(dtype: torch.dtype, classes: int) -> None:
    teacher, student = sample(0, classes, dtype), sample(1, classes, dtype)
    expected = output_loss(kind_of(student), [teacher.float()], student.float(), 2.0)
    with torch.autocast("cpu", dtype=dtype):
        loss = output_loss(kind_of(student), [teacher], student, 2.0)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)


def test_a_teacher_of_other_outputs_is_refused() -> None:
    two, three = (tiny.outline().with_labels(labels) for labels in (2, 3))
    check_outputs(three, [three, three])
    check_outputs(replace(two, labels=None), [three])  # its head is yet to come
    with pytest.raises(UserError, match=r"^teacher: expected a head of 3 outputs, [^\n]* given one of 2$"):
        check_outputs(three, [three, two])


# The stage


def distillation(**settings: Any) -> LogitsDistillation:
    given: dict[str, Any] = {"temperature": 2.0, "alpha": 0.4, "steps": 2, "batch_size": 8}
    return tiny.stage(LogitsDistillation, **(given | settings))


@pytest.mark.parametrize("alpha", [0.4, 1.0])
@pytest.mark.parametrize("teachers", [1, 2])
def test_the_stages_loss_is_the_equation_on_what_both_sides_answer(
    teachers: int, alpha: float, data: DataModule, batch: dict[str, Tensor]
) -> None:
    student = tiny.model(dropout=0.0)
    taught_by = [tiny.model(layers=2, hidden=64, seed=5 + seed) for seed in range(teachers)]
    stage = distillation(alpha=alpha, teacher=["teacher", "second"][:teachers])
    tiny.plan(stage, student, taught_by)
    stage.prepare(student, data, taught_by)
    learnt = taps.read(student, batch, logits=True).logits
    assert learnt is not None
    soft = sum(reference(tiny.logits(teacher, batch), learnt, 2.0) for teacher in taught_by) / teachers
    expected = alpha * soft + (1 - alpha) * F.cross_entropy(learnt, batch["labels"]).item()
    loss = stage.loss(batch)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    without = {name for name, parameter in student.named_parameters() if parameter.grad is None}
    assert not without, "the head learns as well"


def test_a_regression_learns_the_teachers_score(tmp_path: Path) -> None:
    student, teacher = tiny.model(dropout=0.0), tiny.model(seed=5)
    for model in (student, teacher):
        building.attach_head(model, ["score"], "regression")
    stage = distillation(alpha=1.0)
    stage._data = tiny.of_kind(Regression())
    batch = tiny.data(tmp_path).train.batch(range(6))
    stage.match(building.outline(student), [building.outline(teacher)])
    readings = [taps.read(model, batch, logits=True) for model in (student, teacher)]
    terms = stage.terms(readings[0], readings[1:], batch)
    expected = F.mse_loss(tiny.logits(student, batch), tiny.logits(teacher, batch))
    torch.testing.assert_close(terms["soft"].detach(), expected)


def test_it_trains_the_head_and_needs_labels_but_not_the_same_tokens() -> None:
    stage = distillation(alpha=1.0)
    assert tiny.effect(stage).trains_head and not tiny.effect(stage).leaves_head_stale and tiny.effect(stage).reads_task
    assert stage.several_teachers and not stage.same_tokens and tiny.effect(stage).reads_answers
    assert not tiny.effect(distillation(steps=0)).trains_head
    stage.match(tiny.outline("bert", 3, 32, 4), [tiny.outline("roberta", 12, 768, 12)])


def test_distillation_brings_the_answers_closer(data: DataModule, tmp_path: Path) -> None:
    student, teacher = tiny.model(dropout=0.0), tiny.model(hidden=64, seed=5)
    batch = data.train.batch(range(24))
    target = tiny.logits(teacher, batch)
    before = soft_target_kl(target, tiny.logits(student, batch), 2.0)
    stage = distillation(alpha=1.0, steps=20, learning_rate=2e-3)
    tiny.fit(stage, student, data, [teacher], work=tmp_path / "work")
    assert soft_target_kl(target, tiny.logits(student, batch), 2.0) < 0.7 * before


def test_a_teacher_of_another_task_is_refused_with_both_numbers(data: DataModule) -> None:
    teacher = tiny.model()
    building.attach_head(teacher, ["a", "b", "c"])
    with pytest.raises(UserError, match=r"^teacher: expected a head of 2 outputs, [^\n]* given one of 3$"):
        tiny.prepared(distillation(), tiny.model(), teacher, data)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        *(({"temperature": value}, "temperature") for value in (0.0, -1.0, math.inf, math.nan)),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": 1.1}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"alpha": "half"}, "alpha"),
        ({"teacher": ["teacher", "teacher"]}, "teacher"),
        ({"teacher": []}, "teacher"),
        ({"corpus": "some/text"}, "corpus"),
    ],
)
def test_settings_that_cannot_be_answer_one_line_that_begins_with_the_key(settings: Any, key: str) -> None:
    with pytest.raises(UserError, match=rf"^distill\.{key}: expected [^\n]* given [^\n]*$"):
        config.construct(tiny.node("distill", "logits") | settings, "distill")
