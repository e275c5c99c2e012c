"""Multi-level knowledge distillation: relations of tokens and of samples (MLKD-BERT, Zhang, Yang and Ji 2024).

We know arXiv 2407.02775 by its abstract and by summaries that others published, not by its text: nothing here could be
checked against the paper or a code of its authors.

The abstract says: knowledge of several levels, relations among it, is distilled, and the student may have any number of
attention heads. The summaries say: two stages, the first of embeddings and layers, the second of predictions, with
equally weighted sums

    L_1 = L_EMB + L_MHA + L_FFN,    L_2 = L_SS + L_SC + L_KD

With R(X) = softmax(X Xᵀ / √d) the relation of the rows of X, d their size, and g TinyBERT's even layer map:

    L_EMB = KL(R(E_T) ‖ R(E_S))                                 embeddings of the tokens of a sequence
    L_MHA = Σ_l 1/A · Σ_a KL(R(O_T,g(l),a) ‖ R(O_S,l,a))        outputs of attention heads, re-split into A parts
    L_FFN = Σ_l MSE(H_S,l W_h, H_T,g(l))                        hidden states, with a learnt matrix
    L_SS  = KL(R(C_T) ‖ R(C_S))                                 [CLS] of the examples of a batch
    L_SC  = contrast of [CLS] by label over both models         InfoNCE; see ``contrastive_relation``
    L_KD  = τ² KL(softmax(z_T / τ) ‖ softmax(z_S / τ))          soft targets

Our own choices, where the summaries are silent: every KL is a mean over rows, then sequences; attention outputs are
those before the output projection and without dropout; A is the student's number of heads, or the next below that
divides both widths; the contrast is that of Khosla et al. (arXiv 2004.11362), of cosines at temperature 0.1, with the
student's [CLS] put through W_h; τ is 1.

A relation of samples depends on who else is in the batch, by nature: its size and composition are settings of L_2.

Shapes: B batch, T tokens, Ht and Hs widths of teacher and student.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgemin.distillation.attention import attention_outputs
from edgemin.distillation.averages import arithmetic
from edgemin.distillation.relation import relation_kl


def token_relation(teacher: Tensor, student: Tensor, mask: Tensor) -> Tensor:
    """L_EMB: KL of the teacher's relation of tokens from the student's, averaged over sequences.

    Args:
        teacher: embeddings ``[B, T, Ht]``; get no gradient.
        student: embeddings ``[B, T, Hs]`` of the same tokens.
        mask: ``[B, T]``, non-zero where there is a token.

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
    """L_MHA of one pair of layers: KL of the relations of what attention puts out, averaged over sequences.

    Args:
        teacher: raw queries, keys and values ``[B, T, Ht]`` of the teacher's layer; get no gradient.
        student: those of the student's layer, ``[B, T, Hs]``.
        mask: ``[B, T]``, non-zero where there is a token.
        teacher_heads: attention heads of the teacher's layer.
        student_heads: attention heads of the student's layer.
        relation_heads: A, the parts that the outputs of all heads are re-split into; a divisor of both widths.

    Returns:
        A scalar in nats; 0 for equal relations.
    """
    with torch.no_grad():
        target = attention_outputs(*teacher, mask, teacher_heads)
    return relation_kl(target, attention_outputs(*student, mask, student_heads), mask, relation_heads)


def sample_relation(teacher: Tensor, student: Tensor) -> Tensor:
    """L_SS: KL of the teacher's relation of the examples of a batch from the student's, averaged over examples.

    Args:
        teacher: one vector per example, ``[B, Ht]``; gets no gradient.
        student: ``[B, Hs]``.

    Returns:
        A scalar in nats; 0 for equal relations, and for a batch of one.
    """
    everyone = torch.ones(1, len(student), dtype=torch.bool, device=student.device)
    return relation_kl(teacher[None], student[None], everyone, relation_heads=1)


def contrastive_relation(teacher: Tensor, student: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """L_SC: examples of one class closer than others, over both models' vectors of a batch.

    With the 2B vectors z of teacher and student normalised, and P(i) those other than i whose label is that of i (the
    other model's vector of the same example always is):

        L = 1 / 2B · Σ_i 1 / |P(i)| · Σ_(p in P(i)) -ln(exp(z_i · z_p / τ) / Σ_(a ≠ i) exp(z_i · z_a / τ))

    This is the supervised contrast of Khosla et al. (2020, arXiv 2004.11362) with two models in place of two views.
    Computed in float32 also under autocast; with a float64 argument in float64.

    Args:
        teacher: one vector per example, ``[B, H]``; gets no gradient.
        student: ``[B, H]``, projected to the teacher's width.
        labels: ``[B]``, class indices.
        temperature: τ, above 0.

    Returns:
        A scalar in nats, above 0 but for a batch of one.
    """
    assert teacher.shape == student.shape and labels.shape == student.shape[:1]
    dtype = arithmetic(teacher, student)
    with torch.autocast(student.device.type, enabled=False):
        vectors = F.normalize(torch.cat([teacher.detach().to(dtype), student.to(dtype)]), dim=-1)
        itself = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
        similarities = (vectors @ vectors.T / temperature).masked_fill(itself, -torch.inf)
        classes = labels.repeat(2)
        positive = (classes[:, None] == classes) & ~itself
        chosen = F.log_softmax(similarities, dim=-1).masked_fill(~positive, 0.0)
        return -(chosen.sum(-1) / positive.sum(-1)).mean()
