"""Patient distillation: the [CLS] loss against a float64 loop, the layers it matches, its stage."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor

from edgemin import config
from edgemin.data.module import DataModule
from edgemin.distillation.pkd import PatientDistillation, Strategy, patience_loss, patient_layers
from edgemin.encoder import building, taps
from edgemin.encoder.outline import Outline
from edgemin.errors import UserError
from edgemin.tasks.classification import soft_target_kl

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")


def sample(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(4, 3, 8, generator=generator, dtype=torch.float64)).to(dtype)


def reference(teacher: Tensor, student: Tensor) -> float:
    """The equation, one number at a time, in Python's float64."""
    distances = []
    for of_teacher, of_student in zip(teacher.flatten(0, 1).tolist(), student.flatten(0, 1).tolist(), strict=True):
        lengths = [math.sqrt(sum(value**2 for value in state)) for state in (of_teacher, of_student)]
        pairs = zip(of_teacher, of_student, strict=True)
        distances.append(sum((s / lengths[1] - t / lengths[0]) ** 2 for t, s in pairs))
    return sum(distances) / len(distances)


# The loss


def test_equals_a_float64_loop_over_the_equation() -> None:
    teacher, student = sample(0), sample(1)
    expected = reference(teacher, student)
    assert patience_loss(teacher, student).item() == pytest.approx(expected, rel=1e-12)
    assert patience_loss(teacher.float(), student.float()).item() == pytest.approx(expected, rel=1e-5)


def test_dimensions_are_summed_where_the_published_code_averages_them() -> None:
    teacher, student = sample(0), sample(1)
    published = F.mse_loss(F.normalize(student, dim=2), F.normalize(teacher, dim=2))
    assert patience_loss(teacher, student).item() == pytest.approx(8 * published.item())


def test_equal_directions_have_no_loss_and_opposite_ones_four() -> None:
    teacher = sample(0)
    student = teacher.clone().requires_grad_()
    loss = patience_loss(teacher, student)
    loss.backward()
    assert loss.item() == 0 and student.grad is not None and student.grad.abs().max() < 1e-12
    assert patience_loss(teacher, 3 * teacher).item() == pytest.approx(0, abs=1e-12)
    assert patience_loss(teacher, -teacher).item() == pytest.approx(4)


def test_the_gradient_passes_gradcheck_and_the_teacher_gets_none() -> None:
    teacher, student = sample(0).requires_grad_(), sample(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda learnt: patience_loss(teacher.detach(), learnt), (student,))
    patience_loss(teacher, student).backward()
    assert teacher.grad is None and student.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_arithmetic_is_float32_for_16_bit_states_and_under_autocast(dtype: torch.dtype) -> None:
    teacher, student = sample(0, dtype), sample(1, dtype)
    expected = patience_loss(teacher.float(), student.float())
    with torch.autocast("cpu", dtype=dtype):
        loss = patience_loss(teacher, student)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)


# The layers


@pytest.mark.parametrize(
    ("strategy", "student", "teacher", "expected"),
    [
        ("skip", 6, 12, [2, 4, 6, 8, 10]),
        ("last", 6, 12, [7, 8, 9, 10, 11]),
        ("skip", 3, 12, [4, 8]),
        ("last", 3, 12, [10, 11]),
        ("skip", 3, 6, [2, 4]),
        ("last", 3, 6, [4, 5]),
        ("skip", 4, 6, [2, 3, 5]),
        ("skip", 4, 4, [1, 2, 3]),
        ("last", 4, 4, [1, 2, 3]),
    ],
)
def test_the_strategies_choose_the_published_layers_and_go_on_so(
    strategy: Strategy, student: int, teacher: int, expected: list[int]
) -> None:
    assert patient_layers(strategy, student, teacher) == dict(enumerate(expected, start=1))


@pytest.mark.parametrize("strategy", ["skip", "last"])
@pytest.mark.parametrize("teacher", range(2, 25))
def test_at_any_depth_layers_rise_and_neither_sides_last_is_matched(strategy: Strategy, teacher: int) -> None:
    for student in range(2, teacher + 1):
        chosen = patient_layers(strategy, student, teacher)
        assert list(chosen) == list(range(1, student))
        assert sorted(set(chosen.values())) == list(chosen.values())
        assert chosen[1] >= 1 and chosen[student - 1] < teacher


@pytest.mark.parametrize("strategy", ["skip", "last"])
@pytest.mark.parametrize(("student", "teacher"), [(1, 12), (7, 6)])
def test_a_student_without_a_layer_to_match_or_deeper_than_its_teacher_is_refused(
    strategy: Strategy, student: int, teacher: int
) -> None:
    with pytest.raises(UserError, match=rf"^layer_map: expected [^\n]* for {strategy}, given one of {student}$"):
        patient_layers(strategy, student, teacher)


# The stage


def distillation(**settings: Any) -> PatientDistillation:
    given: dict[str, Any] = {"temperature": 10.0, "alpha": 0.7, "beta": 0.65, "steps": 2, "batch_size": 8}
    return tiny.stage(PatientDistillation, **(given | settings))


def states(of: Any, batch: dict[str, Tensor], layers: list[int]) -> Tensor:
    """[CLS] after some layers of a BERT, as Hugging Face returns them."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        hidden = of.eval()(**inputs, output_hidden_states=True).hidden_states
    return torch.stack([hidden[layer][:, 0] for layer in layers], dim=1)


@pytest.mark.parametrize(
    ("settings", "pairs"),
    [
        ({}, {1: 2, 2: 4}),
        ({"layer_map": "last"}, {1: 4, 2: 5}),
        ({"layer_map": {1: 6, 3: 6}}, {1: 6, 3: 6}),
        ({"alpha": 0.0}, {1: 2, 2: 4}),
        ({"alpha": 1.0}, {1: 2, 2: 4}),
    ],
)
def test_the_stages_loss_is_the_equation_on_what_both_sides_hold(
    settings: Any, pairs: dict[int, int], data: DataModule, batch: dict[str, Tensor]
) -> None:
    student, teacher = tiny.model(dropout=0.0), tiny.model(layers=6, seed=5)
    stage = distillation(**settings)
    tiny.prepared(stage, student, teacher, data)
    alpha, learnt = stage.alpha, tiny.logits(student, batch)
    expected = (1 - alpha) * F.cross_entropy(learnt, batch["labels"])
    expected += alpha * soft_target_kl(tiny.logits(teacher, batch), learnt, 10.0)
    expected += 0.65 * reference(states(teacher, batch, list(pairs.values())), states(student, batch, list(pairs)))
    loss = stage.loss(batch)
    torch.testing.assert_close(loss.detach(), expected, atol=1e-6, rtol=1e-5)
    loss.backward()
    without = {name for name, parameter in student.named_parameters() if parameter.grad is None}
    assert not without, "the head learns as well"


def test_without_beta_the_layers_do_not_matter_and_widths_may_differ(
    data: DataModule, batch: dict[str, Tensor]
) -> None:
    stage = distillation(beta=0.0)
    stage.match(tiny.outline("bert", 12, 384, 12), [tiny.outline("bert", 6, 768, 12)])
    student, teacher = tiny.model(layers=3), tiny.model(layers=2, hidden=64, seed=5)
    tiny.prepared(stage, student, teacher, data)
    found = stage.terms(taps.read(student, batch, logits=True), [taps.read(teacher, batch, logits=True)], batch)
    assert set(found) == {"soft"}


def test_it_trains_the_head_and_compares_states_of_the_same_tokens() -> None:
    stage = distillation(alpha=0.0)
    assert tiny.effect(stage).trains_head and not tiny.effect(stage).leaves_head_stale and tiny.effect(stage).reads_task
    assert stage.same_tokens and not stage.several_teachers
    assert tiny.effect(distillation()).reads_answers and not tiny.effect(stage).reads_answers


@pytest.mark.parametrize(
    ("settings", "student", "teacher", "key"),
    [
        ({}, tiny.outline("bert", 6, 384, 12), tiny.outline("bert", 12, 768, 12), "beta"),
        ({}, tiny.outline("bert", 12, 768, 12), tiny.outline("bert", 6, 768, 12), "layer_map"),
        ({"layer_map": {7: 1}}, tiny.outline("bert", 6, 768, 12), tiny.outline("bert", 12, 768, 12), "layer_map"),
        ({"layer_map": {1: 13}}, tiny.outline("bert", 6, 768, 12), tiny.outline("bert", 12, 768, 12), "layer_map"),
        ({"layer_map": {0: 1}}, tiny.outline("bert", 6, 768, 12), tiny.outline("bert", 12, 768, 12), "layer_map"),
    ],
)
def test_models_that_cannot_be_matched_are_refused_in_planning(
    settings: Any, student: Outline, teacher: Outline, key: str
) -> None:
    with pytest.raises(UserError, match=rf"^{key}: expected [^\n]* given [^\n]*$"):
        distillation(**settings).match(student, [teacher])


def test_widths_that_differ_are_refused_at_the_start_too(data: DataModule) -> None:
    with pytest.raises(UserError, match=r"^beta: expected 0 where the student's hidden size 32 [^\n]* 64, [^\n]*$"):
        tiny.prepared(distillation(), tiny.model(), tiny.model(layers=6, hidden=64), data)


def test_a_teacher_of_other_classes_is_refused_where_its_answers_are_learnt(data: DataModule) -> None:
    teacher = tiny.model(layers=6)
    building.attach_head(teacher, ["a", "b", "c"])
    with pytest.raises(UserError, match=r"^teacher: expected a head of 2 outputs, [^\n]* given one of 3$"):
        tiny.prepared(distillation(), tiny.model(), teacher, data)
    tiny.prepared(distillation(alpha=0.0), tiny.model(), teacher, data)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"alpha": -0.1}, "alpha"),
        ({"alpha": 1.1}, "alpha"),
        ({"alpha": 0.0, "beta": 0.0}, "alpha"),
        ({"beta": -1.0}, "beta"),
        ({"beta": math.inf}, "beta"),
        ({"layer_map": "first"}, "layer_map"),
        ({"layer_map": {}}, "layer_map"),
        ({"teacher": ["teacher", "second"]}, "teacher"),
        ({"corpus": "some/text"}, "corpus"),
    ],
)
def test_settings_that_cannot_be_answer_one_line_that_begins_with_the_key(settings: Any, key: str) -> None:
    with pytest.raises(UserError, match=rf"^distill\.{key}: expected [^\n]* given [^\n]*$"):
        config.construct(tiny.node("distill", "pkd") | settings, "distill")
