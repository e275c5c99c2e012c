"""The relation loss in blocks equals the plain form, whatever the blocks, and never holds more than one of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from edgemin.distillation import relation_blocks
from edgemin.distillation.relation import plain_relation_kl, relation_kl

WIDTH, HEADS = 11, 6  # tokens of the longest sequence, relation heads
LENGTHS = {
    "whole": [11, 11, 11],
    "padded": [11, 10, 3, 1, 10],
    "with an empty one": [4, 0, 9],
    "nothing": [0, 0],
}
# Numbers of a block: some rows of one relation, a few relations, several sequences.
BLOCKS = (20, 300, 10**6)


def sample(lengths: list[int], *, scale: float = 1.0, cross: bool = False, dtype: torch.dtype = torch.float64) -> tuple:
    generator = torch.Generator().manual_seed(len(lengths))
    widths = (4 * HEADS, 2 * HEADS) * (2 if cross else 1)
    drawn = [
        (scale * torch.randn(len(lengths), WIDTH, width, generator=generator, dtype=torch.float64)).to(dtype)
        for width in widths
    ]
    mask = torch.arange(WIDTH) < torch.tensor(lengths)[:, None]
    return drawn[0], drawn[1], mask, HEADS, *drawn[2:]


def value_and_gradients(of: Any, arguments: tuple) -> tuple[Tensor, ...]:
    teacher, student, mask, heads, *keys = arguments
    learning = [x.clone().requires_grad_() for x in (student, *keys[1:])]
    loss = of(teacher, learning[0], mask, heads, *([keys[0], learning[1]] if keys else []))
    return loss.detach(), *torch.autograd.grad(3 * loss, learning)


@pytest.fixture(params=BLOCKS)
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(relation_blocks, "_block_numbers", lambda device, dtype: request.param)
    monkeypatch.setattr(relation_blocks, "_NUMBERS_PER_STACK", 10**5)
    return int(request.param)


@pytest.mark.parametrize("scale", [1, 30], ids=["as they come", "shifted"])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_value_and_gradients_are_those_of_the_plain_form(
    block: int, lengths: list[int], cross: bool, scale: float
) -> None:
    arguments = sample(lengths, scale=scale, cross=cross)
    ours, plain = (value_and_gradients(form, arguments) for form in (relation_kl, plain_relation_kl))
    assert len(ours) == 3 if cross else 2
    for mine, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_float32_is_within_a_hundred_thousandth_of_the_plain_form_in_float64(block: int, cross: bool) -> None:
    arguments = sample(LENGTHS["padded"], cross=cross, dtype=torch.float32)
    exact = tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments)
    ours, plain = value_and_gradients(relation_kl, arguments), value_and_gradients(plain_relation_kl, exact)
    for mine, expected in zip(ours, plain, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("bound", [59, 61, 1e4])
def test_float32_neither_overflows_nor_vanishes_at_the_largest_scores_that_are_not_shifted_nor_beyond(
    bound: float,
) -> None:
    teacher, student, mask, heads = sample(LENGTHS["whole"], dtype=torch.float32)
    for side in (teacher, student):  # rows that differ as much as they can in length and direction
        side[:, ::2] *= -1
        side[:, 1::3] *= 1e-3
        split = side.unflatten(-1, (heads, -1))
        largest = split.square().sum(-1).max() / split.shape[-1] ** 0.5 / 0.6931
        side *= (bound / largest) ** 0.5
    ours = value_and_gradients(relation_kl, (teacher, student, mask, heads))
    plain = value_and_gradients(plain_relation_kl, (teacher.double(), student.double(), mask, heads))
    for mine, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_tokens_may_stand_anywhere_and_what_stands_at_padding_may_be_anything(block: int) -> None:
    teacher, student, mask, heads = sample([11, 11, 11])
    mask = torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    expected = value_and_gradients(plain_relation_kl, (teacher, student, mask, heads))
    teacher[~mask], student[~mask] = torch.nan, torch.inf
    ours = value_and_gradients(relation_kl, (teacher, student, mask, heads))
    for mine, plain in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-11, atol=1e-12)


def test_the_strides_of_a_projection_do_not_matter(block: int) -> None:
    teacher, student, mask, heads = sample(LENGTHS["padded"])
    expected = value_and_gradients(relation_kl, (teacher, student, mask, heads))
    fused = torch.cat([student, -student], -1)[..., : student.shape[-1]]
    tokens_first = student.transpose(0, 1).contiguous().transpose(0, 1)
    for strided in (fused, tokens_first):
        learning = strided.detach().requires_grad_()
        loss = relation_kl(teacher, learning, mask, heads)
        (gradient,) = torch.autograd.grad(3 * loss, learning)
        assert not learning.is_contiguous()
        torch.testing.assert_close((loss.detach(), gradient), expected)


def test_gradients_have_the_students_type_and_only_reach_what_learns() -> None:
    teacher, student, mask, heads, *keys = sample(LENGTHS["padded"], cross=True)
    rows, columns = student.bfloat16().requires_grad_(), keys[1].requires_grad_()
    relation_kl(teacher.requires_grad_(), rows, mask, heads, keys[0], columns).backward()
    assert rows.grad is not None and rows.grad.dtype == torch.bfloat16
    assert columns.grad is not None and columns.grad.dtype == torch.float64
    assert teacher.grad is None
    of_both = columns.grad.clone()
    columns.grad = None
    relation_kl(teacher, rows.detach(), mask, heads, keys[0], columns).backward()
    torch.testing.assert_close(columns.grad, of_both)


def test_without_gradients_the_value_is_the_same_and_nothing_is_kept() -> None:
    teacher, student, mask, heads = sample(LENGTHS["padded"])
    learning = student.clone().requires_grad_()
    loss = relation_kl(teacher, learning, mask, heads)
    with torch.no_grad():
        assert torch.equal(relation_kl(teacher, learning, mask, heads), loss)
        assert not relation_kl(teacher, learning, mask, heads).requires_grad
    assert not relation_kl(teacher, student, mask, heads).requires_grad


def test_a_second_derivative_is_refused() -> None:
    teacher, student, mask, heads = sample(LENGTHS["padded"])
    student.requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(relation_kl(teacher, student, mask, heads), student, create_graph=True)


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = result if isinstance(result, (tuple, list)) else [result]
        self.numbers = max([self.numbers, *(x.numel() for x in given if isinstance(x, Tensor))])
        return result


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_no_more_than_a_block_of_the_relations_is_ever_held(monkeypatch: pytest.MonkeyPatch, cross: bool) -> None:
    numbers = 1000
    monkeypatch.setattr(relation_blocks, "_block_numbers", lambda device, dtype: numbers)
    teacher, student, mask, heads, *keys = (
        x.repeat(1, 8, 1) if isinstance(x, Tensor) and x.ndim == 3 else x for x in sample(LENGTHS["whole"], cross=cross)
    )
    mask = mask.repeat(1, 8)
    student.requires_grad_()
    with Largest() as blocked:
        loss = relation_kl(teacher, student, mask, heads, *keys)
    with Largest() as plain:
        plain_relation_kl(teacher, student, mask, heads, *keys)
    relations = len(mask) * heads * mask.shape[1] ** 2
    assert plain.numbers == relations
    assert blocked.numbers <= max(3 * numbers, teacher.numel()) < relations / 10
    kept: list[Tensor] = [x for x in loss.grad_fn.saved_tensors]  # type: ignore[union-attr]
    assert [x.shape for x in kept] == [student.shape] * (2 if cross else 1)


@pytest.mark.parametrize("numbers", [1, 50, 3000, 10**6])
@pytest.mark.parametrize("lengths", [[30] * 9, [30, 29, 5, 4, 30, 1, 0, 12], [1]])
def test_every_token_is_in_one_stack_and_filling_costs_less_than_the_calls_it_saves(
    lengths: list[int], numbers: int
) -> None:
    tokens = torch.arange(30) < torch.tensor(lengths)[:, None]
    stacks = list(relation_blocks._stacks(tokens, HEADS, numbers, torch.float64))
    real = torch.cat([stack.positions[stack.weights[::HEADS].flatten() > 0] for stack in stacks])
    assert sorted(real.tolist()) == tokens.flatten().nonzero().flatten().tolist()
    for stack in stacks:
        relations, length, _ = stack.weights.shape
        sequences = relations // HEADS
        own = [int(n) for n in (stack.weights[::HEADS, :, 0] > 0).sum(-1)]
        assert len(stack.positions) == sequences * length and max(own) == length
        assert sequences == 1 or relations * length**2 <= numbers
        wasted = sum(HEADS * (length**2 - n**2) for n in own)
        assert wasted <= (sequences - 1) * relation_blocks._NUMBERS_PER_STACK
        assert (stack.filling is None) == (not wasted)
    weights = torch.stack([stack.weights.sum() for stack in stacks]).sum()
    assert weights.item() == pytest.approx(1)


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("numbers", [10, 1000, 2**19])
@pytest.mark.parametrize("length", [1, 7, 128, 512, 3000])
@pytest.mark.parametrize("relations", [1, 12, 48, 64])
def test_blocks_are_alike_within_the_cache_and_have_work_for_every_thread(
    monkeypatch: pytest.MonkeyPatch, relations: int, length: int, numbers: int, threads: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    count, rows = relation_blocks._block_shape(relations, length, numbers)
    assert 1 <= count <= relations and 1 <= rows <= length
    assert count * rows * length <= max(numbers, min(threads, relations) * length)
    assert count == relations or count % threads == 0
    if rows < length:
        assert count == min(threads, relations)  # long texts: rows are parted only where relations cannot be
