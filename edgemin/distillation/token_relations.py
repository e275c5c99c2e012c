"""Relations of the tokens of a sequence, which are distilled whatever the widths (terms of MLKD).

With R(X) = softmax(X Xᵀ / √d) the relation of the rows of X, d their size:

    L_EMB = KL(R(E_T) ‖ R(E_S))                                 embeddings of the tokens of a sequence
    L_MHA = 1/A · Σ_a KL(R(O_T,a) ‖ R(O_S,a))                   outputs of attention heads, re-split into A parts

Shapes: B batch, T tokens, Ht and Hs widths of teacher and student.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgemin.distillation.relation import relation_kl
from edgemin.training.attention import attention_outputs


def token_relation(teacher: Tensor, student: Tensor, mask: Tensor) -> Tensor:
    """L_EMB: KL of the teacher's relation of tokens from the student's, averaged over sequences.

    Args:
        teacher: embeddings `[B, T, Ht]`; get no gradient.
        student: embeddings `[B, T, Hs]` of the same tokens.
        mask: `[B, T]`, non-zero where there is a token.

    Returns:
        A scalar in nats; 0 for equal relations.
    """
    return relation_kl(teacher, student, mask, relation_heads=1)


def attention_relation(
    teacher: tuple[Tensor, Tensor, Tensor],
    student: tuple[Tensor, Tensor, Tensor],
    mask: Tensor,
    *,
    teacher_heads: int,
    student_heads: int,
    relation_heads: int,
) -> Tensor:
    """L_MHA of one pair of layers: KL of the relations of attention's outputs, averaged over sequences.

    Args:
        teacher: raw queries, keys and values `[B, T, Ht]` of the teacher's layer; get no gradient.
        student: those of the student's layer, `[B, T, Hs]`.
        mask: `[B, T]`, non-zero where there is a token.
        teacher_heads: attention heads of the teacher's layer.
        student_heads: attention heads of the student's layer.
        relation_heads: A, the parts that the outputs of all heads are re-split into; a divisor of both widths.

    Returns:
        A scalar in nats; 0 for equal relations.
    """
    with torch.no_grad():
        target = attention_outputs(*teacher, mask, teacher_heads)
    return relation_kl(target, attention_outputs(*student, mask, student_heads), mask, relation_heads)
