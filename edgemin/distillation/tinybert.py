"""Transformer distillation: TinyBERT (Jiao et al. 2019, arXiv 1909.10351).

With matched layers l -> g(l), hidden states H, embeddings E = H after no layer, attention scores
S_a = Q_a K_aᵀ / √d before the softmax, logits z, learnt matrices W_e and W_h and a temperature t:

    L_embd = MSE(E_S W_e, E_T)
    L_hidn = Σ_l MSE(H_S,l W_h, H_T,g(l))
    L_attn = Σ_l 1/A · Σ_a MSE(S_S,l,a, S_T,g(l),a)
    L_pred = CE(z_T / t, z_S / t) = -Σ_c softmax(z_T / t)_c · ln softmax(z_S / t)_c

A mean of squares is over sequences and, inside one, over its tokens and their dimensions, or over heads, rows and
columns. The published code differs in four points that are not followed here: it means over padding too (scores of
-100 and less, as masked ones are, become 0 on both sides); one ``nn.Linear`` with a bias is W_e and W_h at once; its
L_pred ends in ``.mean()``, which divides by the number of classes as well; and where the output is a score it trains
on the labels in place of the teacher's outputs.

Shapes: B batch, T tokens, H hidden size, A attention heads, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgemin.distillation.attention import attention_scores
from edgemin.distillation.averages import arithmetic, over_sequences
from edgemin.distillation.logits import squared_error


def hidden_mse(teacher: Tensor, student: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of hidden states or embeddings, averaged over sequences.

    Inside a sequence the mean is over tokens that are no padding and over dimensions. Computed in float32 also under
    autocast and for 16-bit states; with a float64 argument in float64.

    Args:
        teacher: ``[B, T, H]``; gets no gradient.
        student: ``[B, T, H]``, of the same tokens, projected to the teacher's width.
        mask: ``[B, T]``, non-zero where there is a token.

    Returns:
        A scalar. A sequence without any token adds nothing and is not counted.
    """
    assert teacher.shape == student.shape and teacher.shape[:2] == mask.shape, "the same tokens, equal widths"
    tokens = mask.bool()
    dtype = arithmetic(teacher, student)
    with torch.autocast(student.device.type, enabled=False):
        errors = student.to(dtype) - teacher.detach().to(dtype)
        squares = errors.masked_fill(~tokens[..., None], 0.0).square().sum((1, 2))
        return over_sequences(squares / errors.shape[-1], tokens.sum(-1))


def score_mse(
    teacher: tuple[Tensor, Tensor, Tensor], student: tuple[Tensor, Tensor, Tensor], mask: Tensor, heads: int
) -> Tensor:
    """Mean squared error of the attention scores of one pair of layers, averaged over sequences.

    Inside a sequence the mean is over heads and over those rows and columns that are no padding. Arithmetic as in
    ``hidden_mse``.

    Args:
        teacher: raw queries, keys and values ``[B, T, Ht]`` of the teacher's layer (an ``encoder.Projections``); they
            get no gradient, and the values are not used.
        student: those of the student's layer, ``[B, T, Hs]``.
        mask: ``[B, T]``, non-zero where there is a token.
        heads: A, attention heads, equally many on both sides; each side's scores have the scale of its own head size.

    Returns:
        A scalar. A sequence without any token adds nothing and is not counted.
    """
    assert teacher[0].shape[:2] == student[0].shape[:2] == mask.shape, "teacher and student must read the same tokens"
    tokens = mask.bool()
    dtype = arithmetic(teacher[0], student[0])

    def scores(query: Tensor, key: Tensor) -> Tensor:
        # Queries and keys of padding are made 0: then so are scores in its rows and columns, on both sides.
        queries, keys = (part.to(dtype).masked_fill(~tokens[..., None], 0.0) for part in (query, key))
        return attention_scores(queries, keys, heads)

    with torch.autocast(student[0].device.type, enabled=False):
        with torch.no_grad():
            target = scores(teacher[0], teacher[1])
        squares = (scores(student[0], student[1]) - target).square().sum((1, 2, 3))
        lengths = tokens.sum(-1)
        return over_sequences(squares / heads / lengths.clamp(min=1), lengths)


def prediction_loss(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """L_pred, averaged over examples: soft cross-entropy, or squared error where there is one output, a score.

    The cross-entropy comes times t², which keeps the size of its gradient as the temperature changes (and is 1 in the
    paper). Its least value is t² times the entropy of the teacher's distribution. Arithmetic as in ``hidden_mse``.

    Args:
        teacher: logits ``[B, C]``; get no gradient.
        student: logits ``[B, C]``.
        temperature: t, above 0.

    Returns:
        A scalar, in nats where C is not 1.
    """
    assert teacher.shape == student.shape, "teacher and student must know the same classes"
    if student.shape[-1] == 1:
        return squared_error(teacher, student)
    dtype = arithmetic(teacher, student)
    with torch.autocast(student.device.type, enabled=False):
        target = F.softmax(teacher.detach().to(dtype) / temperature, dim=-1)
        return temperature**2 * F.cross_entropy(student.to(dtype) / temperature, target)
