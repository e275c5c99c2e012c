"""Self-attention relation distillation: MiniLMv2 (Wang et al. 2021, arXiv 2012.15828).

The projections of all attention heads of a layer are joined and split again into A relation heads, so teacher
and student need neither equally many attention heads nor equal widths. With X, Y among queries, keys and
values, and d = H / A one side's own relation-head size:

    R_a = softmax(X_a Y_aᵀ / √d)
    L_XY = 1 / (A |x|) · Σ_a Σ_t KL(R_a,t of the teacher ‖ R_a,t of the student)

Only tokens that are no padding, |x| of them, are rows or columns of a relation.

Shapes: B batch, T tokens, Ht and Hs widths of teacher and student, A relation heads, D relation-head size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from edgemin.distillation.relation_blocks import Projected, blocked_relation_kl
from edgemin.encoder.outline import Outline
from edgemin.errors import UserError
from edgemin.training.averages import arithmetic, over_sequences

PAIRS = tuple(rows + columns for rows in "qkv" for columns in "qkv")
"""The nine relations, query side first: `qk` has rows of queries and columns of keys, as attention has."""

Projections = tuple[Tensor, Tensor, Tensor]  # queries, keys and values
_TEACHER_LAYERS = {("bert", 24, 1024): 21, ("roberta", 24, 1024): 19}


def relation_kl(
    teacher: Tensor,
    student: Tensor,
    mask: Tensor,
    relation_heads: int,
    teacher_keys: Tensor | None = None,
    student_keys: Tensor | None = None,
) -> Tensor:
    """KL divergence of the teacher's relation from the student's (equation above), averaged over sequences.

    The teacher is the target, Σ p_teacher (ln p_teacher - ln p_student), and gets no gradient. Inside a sequence the
    mean is over relation heads and rows that are no padding, so neither padding nor the length of the neighbours in the
    batch changes the loss. A sequence without any token adds nothing and is not counted.

    Scores and softmax are computed in float32 also under autocast and for 16-bit projections, because the
    diagonal of a self-relation leaves float16's range and bfloat16's precision; with a float64 argument they
    are computed in float64.

    Args:
        teacher: `[B, T, Ht]`, raw projections (before any rotary embedding) that give the rows.
        student: `[B, T, Hs]`, the student's of the same tokens.
        mask: `[B, T]`, non-zero where there is a token.
        relation_heads: A, a divisor of both Ht and Hs.
        teacher_keys: `[B, T, Ht]`, what gives the columns; the same as the rows if not given.
        student_keys: `[B, T, Hs]`, given exactly if `teacher_keys` is.

    Returns:
        A scalar in nats; 0 for equal relations.

    Raises:
        UserError: `relation_heads` does not divide a width.
    """
    assert teacher.shape[:2] == student.shape[:2] == mask.shape, "teacher and student must read the same tokens"
    assert (teacher_keys is None) == (student_keys is None), "keys belong to both sides or to none"
    _check_relation_heads(relation_heads, teacher.shape[-1], student.shape[-1])
    sides = Projected(teacher, teacher_keys), Projected(student, student_keys)
    return blocked_relation_kl(*sides, mask.bool(), relation_heads)


def attention_kl(teacher: Projections, student: Projections, mask: Tensor, heads: int) -> Tensor:
    """L_AT of MiniLM: KL of the teacher's attention distributions from the student's, averaged over sequences.

    Args:
        teacher: raw queries, keys and values `[B, T, Ht]` of the teacher's layer.
        student: those of the student's layer, `[B, T, Hs]`.
        mask: `[B, T]`, non-zero where there is a token.
        heads: attention heads, equally many on both sides.

    Returns:
        A scalar in nats; 0 for equal distributions.
    """
    return relation_kl(teacher[0], student[0], mask, heads, teacher[1], student[1])


def value_kl(teacher: Projections, student: Projections, mask: Tensor, heads: int) -> Tensor:
    """L_VR of MiniLM: KL of the teacher's value relations from the student's; arguments as for `attention_kl`."""
    return relation_kl(teacher[2], student[2], mask, heads)


def plain_relation_kl(
    teacher: Tensor,
    student: Tensor,
    mask: Tensor,
    relation_heads: int,
    teacher_keys: Tensor | None = None,
    student_keys: Tensor | None = None,
) -> Tensor:
    """`relation_kl` written down in a few lines of autograd, with all relations in memory at once.

    Slow and large: tests and `benchmarks/relation_loss.py` compare `relation_kl` with it.
    """
    tokens = mask.bool()
    dtype = arithmetic(teacher, student)
    with torch.autocast(student.device.type, enabled=False):
        with torch.no_grad():
            target = _log_relation(teacher, teacher_keys, tokens, relation_heads, dtype)
        learned = _log_relation(student, student_keys, tokens, relation_heads, dtype)
        rows = F.kl_div(learned, target, reduction="none", log_target=True).sum(-1)  # [B, A, T]
        sums = rows.masked_fill(~tokens[:, None], 0.0).sum((1, 2))
        return over_sequences(sums, relation_heads * tokens.sum(-1))


def relations_loss(
    teacher: tuple[Tensor, Tensor, Tensor],
    student: tuple[Tensor, Tensor, Tensor],
    mask: Tensor,
    relation_heads: int,
    weights: Mapping[str, float],
) -> Tensor:
    """Weighted sum of relation losses, Σ α_XY L_XY.

    MiniLMv2 itself has weight 1 on each of `qq`, `kk` and `vv`.

    Args:
        teacher: queries, keys and values `[B, T, Ht]` of the teacher's layer.
        student: those of the student's layer, `[B, T, Hs]`.
        mask: `[B, T]`, non-zero where there is a token.
        relation_heads: a divisor of both widths.
        weights: of each relation, by its name in `PAIRS`; what is absent or has weight 0 is not computed.

    Raises:
        UserError: the weights cannot be used (see `check_weights`), or `relation_heads` does not divide a
            width.
    """
    check_weights(weights)
    of_teacher, of_student = (dict(zip("qkv", side, strict=True)) for side in (teacher, student))
    terms = []
    for pair, weight in weights.items():
        if weight == 0:
            continue
        row, column = pair[0], pair[1]
        keys = (None, None) if row == column else (of_teacher[column], of_student[column])
        terms.append(weight * relation_kl(of_teacher[row], of_student[row], mask, relation_heads, *keys))
    return torch.stack(terms).sum()


def check_weights(weights: Mapping[str, float]) -> None:
    """Refuse weights that name no relation, are negative or not finite, or are all zero.

    Raises:
        UserError: with the first such key.
    """
    for pair, weight in weights.items():
        if pair not in PAIRS:
            raise UserError(f"relations: expected names among {', '.join(PAIRS)}, given {pair!r}")
        if not 0 <= weight < math.inf:
            raise UserError(f"relations.{pair}: expected a number of at least 0, given {weight}")
    if not any(weights.values()):
        raise UserError(f"relations: expected at least one relation of weight above 0, given {dict(weights)}")


def common_relation_heads(asked: int, *widths: int) -> int:
    """The largest number of relation heads, not above the one asked for, that divides every width.

    `common_relation_heads(48, 768, 384)` is 48; with the student's layer pruned to 10 heads of 32, a width
    of 320, it is 32.

    Raises:
        UserError: `asked` is below 1.
    """
    if asked < 1:
        raise UserError(f"relation_heads: expected at least 1, given {asked}")
    assert widths and min(widths) > 0
    common = math.gcd(*widths)
    return next(heads for heads in range(min(asked, common), 0, -1) if common % heads == 0)


def check_relation_heads(asked: int | None, student: Outline, teacher: Outline, pairs: Mapping[int, int]) -> None:
    """Refuse a number of relation heads that was asked for and does not divide the width of a whole layer.

    Layers that heads were removed from take fewer, as [`common_relation_heads`]
    [edgemin.distillation.relation.common_relation_heads] says.

    Args:
        asked: `None` takes what is published.
        student: the model of the layers that learn.
        teacher: the model of those that are learnt from.
        pairs: {student layer: teacher layer}, counted from 1.

    Raises:
        UserError: it does not divide one of the widths.
    """
    for side, model, matched in (("student", student, pairs), ("teacher", teacher, pairs.values())):
        for layer in (model.layers[number - 1] for number in matched):
            if asked is not None and not model.is_cut(layer) and model.width(layer) % asked:
                raise UserError(
                    f"relation_heads: expected a divisor of the {side}'s width {model.width(layer)}, given {asked}"
                )


def preset(layers: int, hidden: int, family: str) -> tuple[int, int]:
    """The teacher layer (from 1) and the number of relation heads published for a teacher of this shape.

    | teacher                    | shape     | layer | heads | source                                     |
    |----------------------------|-----------|-------|-------|--------------------------------------------|
    | BERT-base, RoBERTa-base    | 12 x 768  | 12    | 48    | MiniLMv2; bloomberg/minilmv2.bb `run.sh`   |
    | BERT-large                 | 24 x 1024 | 21    | 64    | MiniLMv2                                   |
    | RoBERTa-large, XLM-R-large | 24 x 1024 | 19    | 64    | MiniLMv2; PaddleNLP: 64 for large teachers |
    | any other                  |           | last  | below | none: compare layers before relying on it  |

    Any other teacher is read at its last layer (DistilBERT: 6). Its relation heads are the largest divisor of
    its width not above 48, or not above 64 from a width of 1024 on. A student whose width it does not divide
    needs `common_relation_heads` of both widths.

    Args:
        layers: layers of the teacher.
        hidden: width of the teacher.
        family: as [`family`][edgemin.encoder.families.family] names it; XLM-R belongs to `roberta`.
    """
    layer = _TEACHER_LAYERS.get((family, layers, hidden), layers)
    return layer, common_relation_heads(48 if hidden < 1024 else 64, hidden)


def _check_relation_heads(relation_heads: int, teacher_width: int, student_width: int) -> None:
    if relation_heads < 1 or teacher_width % relation_heads or student_width % relation_heads:
        raise UserError(
            f"relation_heads: expected a divisor of the teacher's width {teacher_width} and of the student's "
            f"width {student_width}, given {relation_heads}"
        )


def _log_relation(rows: Tensor, keys: Tensor | None, tokens: Tensor, relation_heads: int, dtype: torch.dtype) -> Tensor:
    """Logarithm of a relation `[B, A, T, T]`; padding columns have probability 0."""
    queries = _split(rows, relation_heads, dtype)
    columns = queries if keys is None else _split(keys, relation_heads, dtype)
    scores = (queries * queries.shape[-1] ** -0.5) @ columns.transpose(-1, -2)
    # Finite, unlike minus infinity: the softmax is 0 as well, and a difference of logarithms is a number.
    scores = scores.masked_fill_(~tokens[:, None, None], torch.finfo(dtype).min)
    return F.log_softmax(scores, dim=-1)


def _split(projection: Tensor, relation_heads: int, dtype: torch.dtype) -> Tensor:
    """`[B, T, H]` to `[B, A, T, D]`."""
    batch, tokens, width = projection.shape
    return projection.to(dtype).view(batch, tokens, relation_heads, width // relation_heads).transpose(1, 2)
