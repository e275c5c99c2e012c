"""Kinds of task: what holds for all of them, and what each says of labels, losses and answers."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

import edgemin
from edgemin.encoder import parts
from edgemin.encoder.building import ProblemType
from edgemin.errors import UserError
from edgemin.tasks.base import Kind, LabelColumn, Labels
from edgemin.tasks.table import KINDS, find

CLASSES, NUMBERS = find("classification"), find("regression")
EVERY = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
# Labels as they are read, for every kind.
VALUES = {
    "classification": ["a", "b", "c", "a", "b", "a"],
    "regression": [0.5, 1.0, 2.0, -1.0, 0.0, 3.0],
    "multi_label": ["a", "a|b", "", "c", "b", "b|a"],
}


def column(kind: Kind) -> LabelColumn:
    return LabelColumn("label", "train", VALUES[kind.name])


def read(kind: Kind) -> tuple[tuple[str, ...], Labels]:
    names = kind.names(column(kind))
    return names, kind.read(column(kind), names)


def logits(kind: Kind, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, len(read(kind)[0]), generator=generator, dtype=torch.float64).to(dtype)


# All kinds


@EVERY
def test_a_batchs_loss_is_the_mean_of_its_examples_losses(kind: Kind) -> None:
    labels = torch.from_numpy(read(kind)[1])
    alone = [kind.loss(logits(kind)[[row]], labels[[row]]) for row in range(6)]
    torch.testing.assert_close(kind.loss(logits(kind), labels, "none"), torch.stack(alone))
    torch.testing.assert_close(kind.loss(logits(kind), labels), torch.stack(alone).mean())
    assert kind.has_loss(logits(kind), labels)
    assert kind.loss(logits(kind, dtype=torch.bfloat16), labels).dtype == torch.float32


@EVERY
def test_equal_answers_are_no_distance_and_others_are(kind: Kind) -> None:
    one, other = logits(kind), logits(kind, seed=1)
    assert kind.distance(one, one) == 0 < kind.distance(one, other)
    assert kind.flips(one, one) in (0, None)
    learning = one.clone().requires_grad_()
    for entropy in (False, True):
        loss = kind.soft_loss(one, learning, 2.0, entropy=entropy)
        (gradient,) = torch.autograd.grad(loss, learning)
        assert gradient.abs().max() < 1e-12 and (entropy or loss.item() == 0)
        teacher = one.clone().requires_grad_()
        kind.soft_loss(teacher, other.requires_grad_(), 2.0, entropy=entropy).backward()
        assert teacher.grad is None and other.grad is not None
    pulls = [
        torch.autograd.grad(kind.soft_loss(one, learning + 1, 3.0, entropy=entropy), learning)[0]
        for entropy in (False, True)
    ]
    torch.testing.assert_close(*pulls)


@EVERY
def test_the_arithmetic_is_float32_for_16_bit_logits_and_under_autocast(kind: Kind) -> None:
    one, other = (logits(kind, seed, torch.bfloat16) for seed in (0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = kind.soft_loss(one, other, 2.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, kind.soft_loss(one.float(), other.float(), 2.0), rtol=0, atol=0)


@EVERY
def test_labels_answered_rightly_score_best_and_one_answer_is_found(kind: Kind) -> None:
    names, labels = read(kind)
    truth, outputs = torch.from_numpy(labels), len(names)
    metrics = kind.checked_metrics(None, outputs)
    always = kind.majority(truth, outputs)
    one = torch.zeros(6, outputs) if always is None else always
    assert kind.is_constant(kind.answers(one)) and not kind.is_constant(truth)
    assert kind.answers(one).shape == truth.shape and kind.answers(one).dtype in (truth.dtype, torch.bool)
    lead = metrics[0]
    assert kind.score(one, truth, metrics, outputs)[lead] < 1
    assert isinstance(kind.shown(kind.answers(one)[0], names), str | float)
    with pytest.raises(UserError, match=r"^task\.metrics: expected some of .*, given bleu$"):
        kind.checked_metrics(["bleu"], outputs)


@EVERY
def test_strata_are_one_number_per_example_and_labels_have_a_row_each(kind: Kind) -> None:
    names, labels = read(kind)
    assert kind.strata(labels).shape == (6,) and len(labels) == 6
    assert not kind.check_train(labels, names)


@EVERY
def test_a_model_gets_a_head_of_the_kind_and_keeps_it(kind: Kind) -> None:
    assert kind.problem_type in get_args(ProblemType)
    names, model = read(kind)[0], tiny.model()
    kind.ensure_head(model, names)
    assert (parts.label_names(model), model.config.problem_type) == (names, kind.problem_type)
    before = tiny.weights(model)
    kind.ensure_head(model, names)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    other = CLASSES if kind is not CLASSES else NUMBERS
    assert not other.takes_head(kind.problem_type)


def test_an_unknown_kind_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(UserError, match=rf"^task\.kind: expected one of {', '.join(KINDS)}, given ranking$"):
        find("ranking")


def test_no_other_module_asks_what_kind_a_task_is_of() -> None:
    """A kind is named by its own file, transformers' words by `encoder`, and the default by the task's settings.

    Prediction, which loads no torch and so no kind, goes by transformers' words too.
    """
    package = Path(edgemin.__file__).parent
    allowed = {"data/task.py", "encoder/building.py", "deploy/pipeline.py"}
    for path in package.rglob("*.py"):
        place = path.relative_to(package).as_posix()
        if place in allowed or place.startswith("tasks/"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.Constant) and node.value in KINDS), f"{place}:{node.lineno}"
            assert not (isinstance(node, ast.Name | ast.arg | ast.Attribute) and set(vars(node).values()) & set(KINDS))


# Each of them


def test_the_loss_of_classes_is_cross_entropy_and_that_of_numbers_the_squared_error() -> None:
    by_hand = [math.log(1 + math.exp(-3)), math.log(2)]
    found = CLASSES.loss(torch.tensor([[2.0, -1.0], [0.5, 0.5]]), torch.tensor([0, 1]), "none")
    assert found.tolist() == pytest.approx(by_hand)
    scores = torch.tensor([[1.0], [4.0]])
    assert NUMBERS.loss(scores, torch.tensor([2.0, 2.0])).item() == pytest.approx((1 + 4) / 2)
    for temperature in (1.0, 5.0):
        assert NUMBERS.soft_loss(scores, torch.tensor([[3.0], [3.0]]), temperature, entropy=True).item() == 2.5


def test_a_label_beyond_the_heads_classes_has_no_loss() -> None:
    assert CLASSES.has_loss(torch.zeros(2, 3), torch.tensor([0, 2]))
    assert not CLASSES.has_loss(torch.zeros(2, 2), torch.tensor([0, 2]))


def test_draws_keep_the_share_of_classes_and_not_of_numbers() -> None:
    assert CLASSES.strata(np.array([2, 0, 2, 5])).tolist() == [1, 0, 1, 2]
    assert NUMBERS.strata(np.array([2, 0, 2, 5], dtype=np.float32)).tolist() == [0, 0, 0, 0]


def test_numbers_have_no_names_and_classes_are_at_least_two() -> None:
    with pytest.raises(UserError, match=r"^task\.labels: expected null for a regression, given"):
        NUMBERS.check_names(["a", "b"])
    with pytest.raises(UserError, match=r"^task\.labels: expected at least two classes, given"):
        CLASSES.check_names(["a"])


def test_a_head_of_which_nothing_is_said_may_be_of_classes_or_a_number_as_in_transformers() -> None:
    assert CLASSES.takes_head(None) and NUMBERS.takes_head(None)
    assert not find("multi_label").takes_head(None)
