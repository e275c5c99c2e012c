"""Relational distillation: distances and angles against a float64 loop, what they do not depend on, the stage."""

from __future__ import annotations

import math
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from edgemin import config
from edgemin.data.module import DataModule
from edgemin.distillation.rkd import RelationalDistillation, angle_loss, distance_loss
from edgemin.encoder import taps
from edgemin.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")

LOSSES = [distance_loss, angle_loss]


def vectors(seed: int, width: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(5, width, generator=generator, dtype=torch.float64)).to(dtype)


# An independent reference: the equations, one number at a time, in Python's float64.


def huber(difference: float) -> float:
    return difference**2 / 2 if abs(difference) <= 1 else abs(difference) - 0.5


def distances(of: list[list[float]]) -> dict[tuple[int, ...], float]:
    found = {(i, j): math.dist(of[i], of[j]) for i, j in permutations(range(len(of)), 2)}
    mean = sum(found.values()) / len(found)
    return {pair: distance / mean for pair, distance in found.items()}


def angles(of: list[list[float]]) -> dict[tuple[int, ...], float]:
    def cosine(i: int, j: int, k: int) -> float:
        first, second = ([a - b for a, b in zip(of[end], of[j], strict=True)] for end in (i, k))
        product = sum(a * b for a, b in zip(first, second, strict=True))
        return product / (math.hypot(*first) * math.hypot(*second))

    return {triple: cosine(*triple) for triple in permutations(range(len(of)), 3)}


@pytest.mark.parametrize(("loss", "relation"), zip(LOSSES, [distances, angles], strict=True))
def test_equals_a_float64_loop_over_the_equation_whatever_the_widths(loss: Any, relation: Any) -> None:
    teacher, student = vectors(0, width=8), vectors(1, width=3)
    theirs, mine = relation(teacher.tolist()), relation(student.tolist())
    expected = sum(huber(mine[which] - theirs[which]) for which in theirs) / len(theirs)
    assert expected > 0.01
    assert loss(teacher, student).item() == pytest.approx(expected, rel=1e-12)
    assert loss(teacher.float(), student.float()).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_turned_scaled_and_moved_copy_loses_nothing(loss: Any) -> None:
    teacher = vectors(0)
    turn = torch.linalg.qr(vectors(3).T @ vectors(3) + torch.eye(6)).Q
    student = (7 * teacher @ turn + 3).requires_grad_()
    found = loss(teacher, student)
    found.backward()
    assert found.item() == pytest.approx(0, abs=1e-20)
    assert student.grad is not None and student.grad.abs().max() < 1e-9


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_passes_gradcheck_and_the_teacher_gets_none(loss: Any) -> None:
    teacher, student = vectors(0).requires_grad_(), vectors(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda learnt: loss(teacher.detach(), learnt), (student,))
    loss(teacher, student).backward()
    assert teacher.grad is None and student.grad is not None


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_examples_have_a_finite_gradient_and_too_small_a_batch_no_loss(loss: Any) -> None:
    student = vectors(1)[[0, 0, 1, 2]].requires_grad_()
    loss(vectors(0)[[0, 0, 1, 2]], student).backward()
    assert student.grad is not None and student.grad.isfinite().all() and student.grad.abs().max() < 10
    one = vectors(1)[:1].requires_grad_()
    lonely = loss(vectors(0)[:1], one)
    lonely.backward()
    assert lonely.item() == 0 and one.grad is not None and not one.grad.any()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_arithmetic_is_float32_for_16_bit_vectors_and_under_autocast(loss: Any, dtype: torch.dtype) -> None:
    teacher, student = vectors(0, dtype=dtype), vectors(1, dtype=dtype)
    with torch.autocast("cpu", dtype=dtype):
        found = loss(teacher, student)
    assert found.dtype == torch.float32 and torch.equal(found, loss(teacher.float(), student.float()))


# The stage


@pytest.fixture
def data(tmp_path: Path) -> DataModule:
    return tiny.data(tmp_path)


def distillation(**settings: Any) -> RelationalDistillation:
    given = {"_target_": "edgemin.distillation.rkd.RelationalDistillation", "steps": 30, "batch_size": 16}
    return config.construct(given | {"learning_rate": 1e-3} | settings, "distill", RelationalDistillation)


def test_its_loss_is_the_weighted_sum_over_the_cls_states_of_the_last_layers(data: DataModule) -> None:
    student, teacher = tiny.model(layers=2, dropout=0.0), tiny.model("roberta", layers=4, hidden=64, seed=5)
    stage = tiny.prepared(distillation(distance_weight=0.5, angle_weight=3.0), student, teacher, data)
    batch = data.train.batch(range(8))
    with torch.no_grad():
        theirs, mine = (
            taps.read(model, batch, projections=[], hidden=(depth,), logits=False).hidden[depth][:, 0]
            for model, depth in ((teacher, 4), (student, 2))
        )
    expected = 0.5 * distance_loss(theirs, mine) + 3.0 * angle_loss(theirs, mine)
    assert stage.loss(batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_students_examples_come_to_lie_as_the_teachers(data: DataModule, tmp_path: Path) -> None:
    student, teacher = tiny.model(layers=2, dropout=0.0), tiny.model(layers=4, hidden=64, seed=5)
    stage, batch = distillation(steps=80, learning_rate=3e-3), data.train.batch(range(16))

    def apart() -> float:
        stage.model = student
        with torch.no_grad():
            return float(stage.loss(batch))

    tiny.prepared(stage, student, teacher, data)
    before = apart()
    tiny.fit(stage, student, data, [teacher], work=tmp_path / "work")
    student.eval()
    assert apart() < 0.7 * before


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"distance_weight": 0.0, "angle_weight": 0.0}, r"distill\.distance_weight: expected it or angle_weight above"),
        ({"angle_weight": -1.0}, r"distill\.angle_weight: expected a number of at least 0, given -1\.0"),
        ({"corpus": "text", "task_weight": 0.0}, r"distill\.corpus: expected null, as this method needs"),
        ({"teacher": ["teacher", "other"]}, r"distill\.teacher: expected one model"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=rf"^{line}[^\n]*$"):
        distillation(**settings)
