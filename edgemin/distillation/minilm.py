"""Deep self-attention distillation: MiniLM (Wang et al. 2020, arXiv 2002.10957).

Of one layer of each side, the last in the paper, with A attention heads, queries Q_a, keys K_a, values V_a and head
size d (each side's own), the student learns

    the attention distributions  A_a  = softmax(Q_a K_aᵀ / √d)
    the value relations          VR_a = softmax(V_a V_aᵀ / √d)

    L = L_AT + L_VR,   L_AT = 1 / (A |x|) · Σ_a Σ_t KL(A_a,t of the teacher ‖ A_a,t of the student),   L_VR likewise

Heads are matched one by one, so both layers need equally many; their sizes may differ. Only tokens that are no
padding, |x| of them, are rows or columns. MiniLMv2 (:mod:`edgemin.distillation.relation`) re-splits the heads instead.

Shapes: B batch, T tokens, Ht and Hs widths of the projections of teacher and student.
"""

from __future__ import annotations

from torch import Tensor

from edgemin.distillation.relation import relation_kl

Projections = tuple[Tensor, Tensor, Tensor]


def attention_kl(teacher: Projections, student: Projections, mask: Tensor, heads: int) -> Tensor:
    """L_AT: KL of the teacher's attention distributions from the student's, averaged over sequences.

    Args:
        teacher: raw queries, keys and values ``[B, T, Ht]`` of the teacher's layer (an ``encoder.Projections``).
        student: those of the student's layer, ``[B, T, Hs]``.
        mask: ``[B, T]``, non-zero where there is a token.
        heads: attention heads, equally many on both sides.

    Returns:
        A scalar in nats; 0 for equal distributions.
    """
    return relation_kl(teacher[0], student[0], mask, heads, teacher[1], student[1])


def value_kl(teacher: Projections, student: Projections, mask: Tensor, heads: int) -> Tensor:
    """L_VR: KL of the teacher's value relations from the student's; arguments as for ``attention_kl``."""
    return relation_kl(teacher[2], student[2], mask, heads)
