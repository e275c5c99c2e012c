"""The relation loss over blocks that fit the cache, its gradient formed while a block is hot.

What is computed, and why, is said in [`relation`][edgemin.distillation.relation], whose `plain_relation_kl` is the
same in a few lines of autograd. That form passes about ten tensors B x A x T x T through memory. Here a block is some
relations, or some rows of them, in three buffers that stay in the cache. With s the scores times log2(e), E = 2^s, and
Z the sum of a row of E, the passes over a block are

    s_T, s_S               two matrix products
    D = s_T - s_S
    E_T, Z_T and E_S, Z_S  2^x in place and a sum, twice
    KL / ln 2              Σ E_T D / Z_T + log2(Z_S / Z_T): a product and a sum
    G                      E_S - E_T Z_S / Z_T = Z_S (p_S - p_T): one fused pass in place
    gradients              of rows, G K, and of keys, Gᵀ Q: two matrix products, 1 / Z_S joining the rows' weights

and the backward has nothing left but to scale tensors of the student's shape. Base 2 is the cheapest exponential
there is. Rows are shifted by their maxima only where a bound on the scores says that they could overflow.

Shapes: S sequences worked on together, N tokens of the longest of them, R = S A relations, D relation-head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from edgemin.training.averages import arithmetic

# One buffer's share of a thread: with it the speed is within some per cent of the best from 1 to 4 MiB (cores
# with 1 MiB of level 2 cache and a level 3 cache behind it). Smaller blocks lose to the cost of calling.
_BYTES_PER_THREAD = 2**21
_MOST_BYTES = 2**24  # where threads are many, each one's share lies in its level 2 cache all the same
_BYTES_ON_ACCELERATOR = 2**28
# Numbers whose arithmetic takes about as long as calling the operations of one more stack.
_NUMBERS_PER_STACK = 2**15
# Added to the score of a column that is no token. Finite, so that a difference of two such scores is 0.
_FAR = -1e30
# Up to this score, in powers of two, rows need no shift: E, sums of E and ratios of sums stay inside float32.
_SAFE_SCORE = 60.0


class Projected(NamedTuple):
    """The projections that give one side's relation: rows `[B, T, H]`, and keys where they are not the same."""

    rows: Tensor
    keys: Tensor | None


def blocked_relation_kl(teacher: Projected, student: Projected, tokens: Tensor, relation_heads: int) -> Tensor:
    """`relation_kl` for arguments that it has checked; its mask is given as booleans, `[B, T]`.

    A sequence costs what its tokens cost, padding nothing. It can be differentiated once: `create_graph=True` is
    refused with a `RuntimeError`.
    """
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in student)
    with torch.autocast(tokens.device.type, enabled=False):
        if learns:
            loss: Tensor = _BlockedKL.apply(*student, teacher, tokens, relation_heads)  # type: ignore[no-untyped-call]
        else:
            with torch.no_grad():
                loss, _ = _divergence(teacher, student, tokens, relation_heads, learns=False)
    return loss


class _BlockedKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, keys: Tensor | None, teacher: Projected, tokens: Tensor, relation_heads: int
    ) -> Tensor:
        loss, gradients = _divergence(teacher, Projected(rows, keys), tokens, relation_heads, learns=True)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = rows.dtype, rows.dtype if keys is None else keys.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, of_loss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # else a second derivative would silently lack this loss's part
            raise RuntimeError("the relation loss has no second derivative, which create_graph=True asks for")
        of_student = [(of_loss * x).to(dtype) for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=False)]
        return of_student[0], of_student[1] if len(of_student) > 1 else None, None, None, None


class _Side(NamedTuple):
    """Rows and keys of one side's relations, `[R, D, N]` each; the same tensor for self-relations."""

    rows: Tensor
    keys: Tensor

    def part(self, relations: slice, rows: slice) -> _Side:
        return _Side(self.rows[relations, :, rows], self.keys[relations])


class _Stack(NamedTuple):
    """Sequences of about one length, the relation heads of all of them one after the other."""

    positions: Tensor  # [S N], of the batch as [B T, H]; a shorter sequence is filled up with its first token
    weights: Tensor  # [R, N, 1], what a row's divergence counts for in the loss, 0 for filling
    filling: Tensor | None  # [R, 1, N], added to the scores to take filled columns out; None without filling
    heads: int

    def side(self, projected: Projected, dtype: torch.dtype) -> _Side:
        rows = self._split(projected.rows, dtype)
        return _Side(rows, rows if projected.keys is None else self._split(projected.keys, dtype))

    def _split(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`[B, T, H]` to `[R, D, N]`, scaled such that products of two are scores in powers of two."""
        size, length = x.shape[-1] // self.heads, self.weights.shape[1]
        taken = x.flatten(0, 1).index_select(0, self.positions).to(dtype)
        heads = taken.view(-1, length, self.heads, size).permute(0, 2, 3, 1)
        # Tokens last in memory: matrix products of so few columns are several times slower the other way round.
        return heads.contiguous().mul_(_unit(size)).view(-1, size, length)

    def add_joined(self, gradient: Tensor, total: Tensor) -> None:
        """Add `gradient`, that of what `_split` returned, to `total`, that of its argument."""
        _, size, length = gradient.shape
        heads = gradient.view(-1, self.heads, size, length).permute(0, 3, 1, 2)
        joined = (heads * (math.log(2) * _unit(size))).reshape(-1, self.heads * size)
        total.flatten(0, 1).index_add_(0, self.positions, joined)


def _unit(size: int) -> float:
    return math.sqrt(math.log2(math.e) / math.sqrt(size))


def _divergence(
    teacher: Projected, student: Projected, tokens: Tensor, heads: int, *, learns: bool
) -> tuple[Tensor, list[Tensor]]:
    """The loss and, where it is learnt from, its gradients in the student's rows and, where given, keys."""
    dtype = arithmetic(teacher.rows, student.rows)
    numbers = _block_numbers(tokens.device, dtype)
    losses = [torch.zeros((), dtype=dtype, device=tokens.device)]
    gradients = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in student if learns and x is not None]
    for stack in _stacks(tokens, heads, numbers, dtype):
        of_teacher, of_student = stack.side(teacher, dtype), stack.side(student, dtype)
        sums = [torch.zeros_like(x) for x in of_student[: len(gradients)]]
        into = _Side(sums[0], sums[-1]) if learns else None
        losses.append(_stack_divergence(of_teacher, of_student, stack, numbers, into))
        for of_stack, gradient in zip(sums, gradients, strict=True):
            stack.add_joined(of_stack, gradient)
    return torch.stack(losses).sum() * math.log(2), gradients


def _stacks(tokens: Tensor, heads: int, numbers: int, dtype: torch.dtype) -> Iterator[_Stack]:
    """Long sequences each by itself, short ones of about one length together as long as they fit one block."""
    lengths: list[int] = tokens.sum(-1).tolist()
    positions = tokens.flatten().nonzero().squeeze(-1).split(lengths)
    longest_first = sorted((x for x in positions if len(x)), key=len, reverse=True)
    share = 1 / (heads * max(len(longest_first), 1))
    stack: list[Tensor] = []
    for sequence in longest_first:
        if stack:
            filled, own = heads * len(stack[0]) ** 2, heads * len(sequence) ** 2
            if (len(stack) + 1) * filled > numbers or filled - own > _NUMBERS_PER_STACK:
                yield _stack(stack, heads, share, dtype)
                stack = []
        stack.append(sequence)
    if stack:
        yield _stack(stack, heads, share, dtype)


def _stack(sequences: list[Tensor], heads: int, share: float, dtype: torch.dtype) -> _Stack:
    length, device = len(sequences[0]), sequences[0].device
    lengths = torch.tensor([len(x) for x in sequences], device=device)[:, None]
    real = torch.arange(length, device=device) < lengths  # [S, N]
    weights = (real * (share / lengths.to(dtype))).repeat_interleave(heads, 0)[..., None]
    filling = None
    if len(sequences[-1]) < length:
        filling = (~real).to(dtype).mul_(_FAR).repeat_interleave(heads, 0)[:, None]
    filled = torch.cat([torch.cat([x, x[:1].expand(length - len(x))]) for x in sequences])
    return _Stack(filled, weights, filling, heads)


def _stack_divergence(teacher: _Side, student: _Side, stack: _Stack, numbers: int, gradients: _Side | None) -> Tensor:
    """The stack's part of the loss in bits; its gradients are added to those given."""
    relations, _, length = student.rows.shape
    count, height = _block_shape(relations, length, numbers)
    buffers = student.rows.new_empty(3, count * height * length)
    shift = max(_largest_score(teacher), _largest_score(student)) > _SAFE_SCORE
    losses = []
    for first in range(0, relations, count):
        some = slice(first, first + count)
        filling = None if stack.filling is None else stack.filling[some]
        for top in range(0, length, height):
            here = slice(top, top + height)
            weights = stack.weights[some, here]
            shape = (*weights.shape[:2], length)
            block = [x[: math.prod(shape)].view(shape) for x in buffers]
            into = None if gradients is None else gradients.part(some, here)
            sides = teacher.part(some, here), student.part(some, here)
            losses.append(_block_divergence(block, *sides, weights, filling, shift, into))
    return torch.stack(losses).sum()


def _block_divergence(
    block: list[Tensor],
    teacher: _Side,
    student: _Side,
    weights: Tensor,
    filling: Tensor | None,
    shift: bool,
    gradients: _Side | None,
) -> Tensor:
    of_teacher, of_student, difference = block
    for scores, side in ((of_teacher, teacher), (of_student, student)):
        torch.bmm(side.rows.mT, side.keys, out=scores)
        if filling is not None:
            scores.add_(filling)
        if shift:
            scores.sub_(scores.amax(-1, keepdim=True))
    torch.sub(of_teacher, of_student, out=difference)
    teacher_sum = of_teacher.exp2_().sum(-1, keepdim=True)
    student_sum = of_student.exp2_().sum(-1, keepdim=True)
    ratio = student_sum / teacher_sum
    divergence = difference.mul_(of_teacher).sum(-1, keepdim=True) / teacher_sum + ratio.log2()
    if gradients is not None:
        slope = of_student.addcmul_(of_teacher, ratio, value=-1)
        row_weights = (weights / student_sum).mT
        gradients.keys.baddbmm_(student.rows * row_weights, slope)
        gradients.rows.addcmul_(torch.bmm(student.keys, slope.mT), row_weights)
    return (divergence * weights).sum()


def _largest_score(side: _Side) -> float:
    """A bound on the absolute scores, by Cauchy and Schwarz; of all relations together, for speed."""
    rows, keys = side.rows.square().sum(1).amax(), side.keys.square().sum(1).amax()
    return math.sqrt(float(rows * keys))


def _block_numbers(device: torch.device, dtype: torch.dtype) -> int:
    on_cpu = min(_BYTES_PER_THREAD * torch.get_num_threads(), _MOST_BYTES)
    return (on_cpu if device.type == "cpu" else _BYTES_ON_ACCELERATOR) // dtype.itemsize


def _block_shape(relations: int, length: int, numbers: int) -> tuple[int, int]:
    """How many relations, and how many rows of each, a block has: as many for each thread, and all blocks alike."""
    threads = torch.get_num_threads()
    count = numbers // length**2
    count = min(max(count - count % threads, threads), relations)
    rows = min(max(numbers // (count * length), 1), length)
    return _evenly(relations, count, threads), _evenly(length, rows, 1)


def _evenly(total: int, most: int, multiple: int) -> int:
    """The size of equal parts of a total, of at most `most`, in multiples where that does not exceed it."""
    parts = -(-total // most)
    size = -(-total // parts)
    return min(-(-size // multiple) * multiple, most)
