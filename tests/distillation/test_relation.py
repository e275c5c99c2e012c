"""The relation loss against a float64 loop over the paper's equation, and the pitfalls of published codes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from edgemin.distillation import relation
from edgemin.distillation.relation import (
    PAIRS,
    check_weights,
    common_relation_heads,
    preset,
    relation_kl,
    relations_loss,
)
from edgemin.errors import UserError
from edgemin.training.layer_maps import layer_map

LENGTHS = [5, 7, 1, 3]  # of 7


def padding_mask(lengths: list[int], width: int) -> Tensor:
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).long()


def sample(seed: int, teacher_width: int, student_width: int, *, dtype: torch.dtype = torch.float32) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (
        2 * torch.randn(len(LENGTHS), 7, width, generator=generator, dtype=torch.float64).to(dtype)
        for width in (teacher_width, student_width)
    )
    return teacher, student, padding_mask(LENGTHS, 7)


def softmax_row(query: list[float], keys: list[list[float]], scale: float) -> list[float]:
    scores = [scale * sum(q * k for q, k in zip(query, key, strict=True)) for key in keys]
    highest = max(scores)
    exponentials = [math.exp(score - highest) for score in scores]
    return [value / sum(exponentials) for value in exponentials]


def reference(
    teacher: Tensor,
    student: Tensor,
    mask: Tensor,
    heads: int,
    teacher_keys: Tensor | None = None,
    student_keys: Tensor | None = None,
) -> float:
    """The equation, one number at a time, in Python's float64."""
    keys_of = {
        0: teacher if teacher_keys is None else teacher_keys,
        1: student if student_keys is None else student_keys,
    }
    rows_of = {0: teacher, 1: student}
    losses = []
    for example, row_mask in enumerate(mask.tolist()):
        tokens = [index for index, kept in enumerate(row_mask) if kept]
        total = 0.0
        for head in range(heads):
            for token in tokens:
                rows = []
                for side in (0, 1):
                    size = rows_of[side].shape[-1] // heads
                    part = slice(head * size, (head + 1) * size)
                    query = rows_of[side][example, token, part].double().tolist()
                    keys = [keys_of[side][example, other, part].double().tolist() for other in tokens]
                    rows.append(softmax_row(query, keys, 1 / math.sqrt(size)))
                total += sum(p * (math.log(p) - math.log(q)) for p, q in zip(*rows, strict=True))
        losses.append(total / (heads * len(tokens)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    ("teacher_width", "student_width", "heads"),
    [(24, 24, 4), (48, 24, 12), (24, 48, 6), (32, 12, 4), (16, 8, 1), (16, 24, 8)],
)
def test_equals_a_float64_loop_over_the_equation(teacher_width: int, student_width: int, heads: int) -> None:
    teacher, student, mask = sample(heads, teacher_width, student_width)
    expected = reference(teacher, student, mask, heads)
    assert expected > 0.01
    assert relation_kl(teacher, student, mask, heads).item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    in_float64 = relation_kl(teacher.double(), student.double(), mask, heads)
    assert in_float64.dtype == torch.float64
    assert in_float64.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("pair", PAIRS)
def test_every_relation_equals_the_loop_with_the_query_side_as_rows(pair: str) -> None:
    teacher = tuple(sample(seed, 24, 12)[0] for seed in range(3))
    student = tuple(sample(seed, 24, 12)[1] for seed in range(3))
    mask = padding_mask(LENGTHS, 7)
    row, column = ("qkv".index(letter) for letter in pair)
    expected = reference(teacher[row], student[row], mask, 3, teacher[column], student[column])
    assert relations_loss(teacher, student, mask, 3, {pair: 1.0}).item() == pytest.approx(expected, rel=1e-5)


def test_relations_are_summed_by_their_weights_and_weight_zero_is_not_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teacher = tuple(sample(seed, 24, 12)[0] for seed in range(3))
    student = tuple(sample(seed, 24, 12)[1] for seed in range(3))
    mask = padding_mask(LENGTHS, 7)
    single = {pair: relations_loss(teacher, student, mask, 3, {pair: 1}) for pair in ("qq", "vv", "kv")}
    calls = []

    def counting(*arguments: object) -> Tensor:
        calls.append(arguments)
        return relation_kl(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(relation, "relation_kl", counting)
    together = relations_loss(teacher, student, mask, 3, {"qq": 1.0, "kk": 0.0, "vv": 0.5, "kv": 2.0})
    assert len(calls) == 3
    torch.testing.assert_close(together, single["qq"] + 0.5 * single["vv"] + 2 * single["kv"])


def test_pitfall_a_the_teacher_is_the_target_of_the_divergence() -> None:
    teacher, student, mask = sample(0, 24, 12)
    forward, reverse = reference(teacher, student, mask, 3), reference(student, teacher, mask, 3)
    assert abs(forward - reverse) > 0.01
    assert relation_kl(teacher, student, mask, 3).item() == pytest.approx(forward, rel=1e-5)


def test_pitfall_b_the_divisor_is_heads_times_tokens_of_each_sequence() -> None:
    teacher, student, mask = sample(0, 24, 12, dtype=torch.float64)
    loss = relation_kl(teacher, student, mask, 3)
    # Equal heads, tokens and sequences, twice as many: a mean stays, batchmean (over B alone) would grow.
    whole = torch.ones_like(mask)
    rows = relation_kl(teacher, student, whole, 3)
    doubled = relation_kl(torch.cat([teacher, teacher], -1), torch.cat([student, student], -1), whole, 6)
    torch.testing.assert_close(doubled, rows)
    torch.testing.assert_close(
        relation_kl(*(x.repeat(2, 1, 1) for x in (teacher, student)), mask.repeat(2, 1), 3), loss
    )
    alone = [relation_kl(teacher[[i], :n], student[[i], :n], mask[[i], :n], 3) for i, n in enumerate(LENGTHS)]
    torch.testing.assert_close(loss, torch.stack(alone).mean())

    def scores(x: Tensor) -> Tensor:
        split = x.unflatten(-1, (3, -1)).transpose(1, 2)
        return split @ split.mT / math.sqrt(split.shape[-1])

    elements = F.kl_div(scores(student).log_softmax(-1), scores(teacher).softmax(-1), reduction="none")
    torch.testing.assert_close(elements.sum() / elements[..., 0].numel(), rows)
    for wrong in (elements.mean(), elements.sum() / len(elements)):  # torch's "mean" and "batchmean"
        assert not torch.isclose(wrong, rows, rtol=0.1)


def test_pitfall_c_padding_is_neither_row_nor_column() -> None:
    teacher, student, mask = sample(0, 24, 12)
    student.requires_grad_()
    loss = relation_kl(teacher, student, mask, 3)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient[mask == 0].eq(0).all() and gradient[mask == 1].ne(0).any()
    noise = 50 * torch.randn(teacher.shape, generator=torch.Generator().manual_seed(1))
    other_teacher = torch.where(mask.bool()[..., None], teacher, noise)
    other_student = torch.where(mask.bool()[..., None], student, noise[..., :12])
    assert torch.equal(relation_kl(other_teacher, other_student, mask, 3), loss)


def test_pitfall_d_the_scale_is_of_each_sides_own_relation_head_size() -> None:
    teacher, student, mask = sample(0, 48, 24)
    loss = relation_kl(teacher, student, mask, 12)
    assert loss.item() == pytest.approx(reference(teacher, student, mask, 12), rel=1e-5)
    # Attention heads of size 8 on both sides instead, then the teacher's relation-head size on both.
    for teacher_size, student_size in ((8, 8), (4, 4)):
        wrong = relation_kl(teacher * (4 / teacher_size) ** 0.25, student * (2 / student_size) ** 0.25, mask, 12)
        assert abs(wrong.item() - loss.item()) > 1e-3


def test_pitfall_e_layers_count_from_one() -> None:
    assert layer_map(6, 12) == {1: 2, 2: 4, 3: 6, 4: 8, 5: 10, 6: 12}
    assert layer_map(3, 6)[3] == 6
    assert preset(12, 768, "bert")[0] == 12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_pitfall_g_scores_are_in_float32_for_16_bit_projections_and_under_autocast(
    dtype: torch.dtype, autocast: bool
) -> None:
    teacher, student, mask = (x * 40 if x.is_floating_point() else x for x in sample(0, 48, 24))
    teacher, student = teacher.to(dtype), student.to(dtype)
    assert teacher.float().square().unflatten(-1, (3, -1)).sum(-1).max() > torch.finfo(torch.float16).max
    expected = relation_kl(teacher.float(), student.float(), mask, 3)
    assert expected.isfinite()
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        loss = relation_kl(teacher, student, mask, 3)
        of_float32 = relation_kl(teacher.float(), student.float(), mask, 3)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected) and torch.equal(of_float32, expected)


def test_pitfall_j_relations_of_other_tokens_are_refused() -> None:
    teacher, student, mask = sample(0, 24, 12)
    with pytest.raises(AssertionError, match="same tokens"):
        relation_kl(teacher[:, :6], student, mask, 3)


@pytest.mark.parametrize("pair", ["qq", "qv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pitfall_k_the_loss_of_a_student_equal_to_its_teacher_is_exactly_zero(pair: str, dtype: torch.dtype) -> None:
    sides = tuple(sample(seed, 24, 12, dtype=dtype)[0] for seed in range(3))
    learning = tuple(side.clone().requires_grad_() for side in sides)
    loss = relations_loss(sides, learning, padding_mask(LENGTHS, 7), 6, {pair: 1.0})
    assert loss.item() == 0
    loss.backward()
    for side in learning:
        assert side.grad is None or side.grad.abs().max() < 1e-6


@pytest.mark.parametrize("extra", [1, 9])
def test_pitfall_k_extra_padding_changes_neither_loss_nor_gradient(extra: int) -> None:
    teacher, student, mask = sample(0, 24, 12, dtype=torch.float64)
    student.requires_grad_()
    loss = relation_kl(teacher, student, mask, 3)
    padded = relation_kl(
        *(F.pad(x, (0, 0, 0, extra), value=9.0) for x in (teacher, student)), F.pad(mask, (0, extra)), 3
    )
    torch.testing.assert_close(padded, loss)
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in (padded, loss)))


def test_the_order_of_examples_does_not_matter_and_a_mask_of_any_type_or_side_will_do() -> None:
    teacher, student, mask = sample(0, 24, 12, dtype=torch.float64)
    loss = relation_kl(teacher, student, mask, 3)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(relation_kl(teacher[order], student[order], mask[order], 3), loss)
    torch.testing.assert_close(relation_kl(teacher.flip(1), student.flip(1), mask.flip(1), 3), loss)
    for kind in (torch.bool, torch.float32):
        assert torch.equal(relation_kl(teacher, student, mask.to(kind), 3), loss)


@pytest.mark.parametrize("cross", [False, True])
def test_the_gradient_passes_gradcheck(cross: bool) -> None:
    teacher, student, mask = sample(3, 8, 12, dtype=torch.float64)
    teacher, student, mask = teacher[:2, :5], student[:2, :5] / 2, padding_mask([3, 5], 5)
    keys = (student.flip(-1) + 0.1).requires_grad_()
    student.requires_grad_()
    if cross:
        assert torch.autograd.gradcheck(
            lambda rows, columns: relation_kl(teacher, rows, mask, 4, teacher.flip(-1), columns),
            (student, keys),
        )
    else:
        assert torch.autograd.gradcheck(lambda rows: relation_kl(teacher, rows, mask, 4), (student,))


def test_the_teacher_gets_no_gradient() -> None:
    teacher, student, mask = sample(0, 24, 12)
    teacher.requires_grad_(), student.requires_grad_()
    relation_kl(teacher, student, mask, 3, teacher.flip(-1), student.flip(-1)).backward()
    assert teacher.grad is None and student.grad is not None


def test_a_sequence_without_tokens_adds_nothing_and_is_not_counted() -> None:
    teacher, student, mask = sample(0, 24, 12)
    student.requires_grad_()
    mask[1] = 0
    others = [0, 2, 3]
    loss = relation_kl(teacher, student, mask, 3)
    torch.testing.assert_close(loss, relation_kl(teacher[others], student[others], mask[others], 3))
    nothing = relation_kl(teacher, student, torch.zeros_like(mask), 3)
    (loss + nothing).backward()
    assert nothing.item() == 0 and student.grad is not None and student.grad.isfinite().all()


@pytest.mark.parametrize("heads", [0, -3, 5, 24])
def test_relation_heads_that_divide_not_both_widths_are_refused_with_both_named(heads: int) -> None:
    teacher, student, mask = sample(0, 24, 12)
    with pytest.raises(UserError, match=rf"^relation_heads: .* 24 .* 12, given {heads}$"):
        relation_kl(teacher, student, mask, heads)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"qx": 1.0}, "relations: expected .*qk.*'qx'"),
        ({"q": 1.0}, "relations: expected .*'q'"),
        ({"qq": 1.0, "kk": -1.0}, r"relations\.kk: .*-1"),
        ({"vv": math.nan}, r"relations\.vv: .*nan"),
        ({"vv": math.inf}, r"relations\.vv: .*inf"),
        ({"qq": 0.0}, "at least one"),
        ({}, "at least one"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_weights(weights)


@pytest.mark.parametrize(
    ("asked", "widths", "expected"),
    [
        (48, (768, 384), 48),
        (64, (1024, 384), 64),
        (48, (768, 320), 32),
        (48, (1024,), 32),
        (48, (768, 312), 24),
        (5, (7, 9), 1),
        (99, (12,), 12),
    ],
)
def test_common_relation_heads_are_the_largest_divisor_of_all_widths(
    asked: int, widths: tuple[int, ...], expected: int
) -> None:
    assert common_relation_heads(asked, *widths) == expected
    assert max(n for n in range(1, asked + 1) if all(width % n == 0 for width in widths)) == expected


def test_common_relation_heads_below_one_are_refused() -> None:
    with pytest.raises(UserError, match=r"^relation_heads: .* given 0$"):
        common_relation_heads(0, 12)


@pytest.mark.parametrize("student_layers", range(1, 25))
@pytest.mark.parametrize("teacher_layers", [1, 3, 6, 12, 24])
def test_the_layer_map_is_equation_one(student_layers: int, teacher_layers: int) -> None:
    mapping = layer_map(student_layers, teacher_layers)
    assert list(mapping) == list(range(1, student_layers + 1))
    assert mapping[student_layers] == teacher_layers
    for layer, target in mapping.items():  # the ceiling, without division
        assert target * student_layers >= layer * teacher_layers > (target - 1) * student_layers


@pytest.mark.parametrize(
    ("layers", "hidden", "family", "expected"),
    [
        (12, 768, "bert", (12, 48)),
        (12, 768, "roberta", (12, 48)),
        (6, 768, "distilbert", (6, 48)),
        (24, 1024, "bert", (21, 64)),
        (24, 1024, "roberta", (19, 64)),
        (24, 1024, "electra", (24, 64)),
        (28, 1024, "modernbert", (28, 64)),
        (12, 384, "bert", (12, 48)),
        (4, 312, "bert", (4, 39)),
        (2, 32, "bert", (2, 32)),
    ],
)
def test_presets_are_the_published_ones_and_else_the_last_layer(
    layers: int, hidden: int, family: str, expected: tuple[int, int]
) -> None:
    assert preset(layers, hidden, family) == expected
