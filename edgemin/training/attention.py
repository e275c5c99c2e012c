"""What a layer's attention computes, rebuilt from its raw projections, since fused attention does not return it.

With A heads of size D, queries Q_a, keys K_a and values V_a of head a:

    S_a = Q_a K_aᵀ / √D        scores
    O_a = softmax(S_a) V_a     outputs, padding keys left out

This holds for a model without dropout whose attention is nothing more: a rotary embedding, which turns queries and
keys after their projection, or a window cannot be seen in the projections.

Shapes: B batch, T tokens, A attention heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from edgemin.encoder.outline import Outline
from edgemin.errors import UserError
from edgemin.training.averages import arithmetic


def attention_scores(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """The scores before the softmax, without a mask.

    Args:
        query: `[B, T, A*D]`, raw projections, the heads side by side.
        key: `[B, T, A*D]`.
        heads: A.

    Returns:
        `[B, A, T, T]`, rows of queries and columns of keys.
    """
    queries, keys = split_heads(query, heads), split_heads(key, heads)
    return (queries / math.sqrt(queries.shape[-1])) @ keys.transpose(-1, -2)


def attention_outputs(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, heads: int) -> Tensor:
    """The outputs of the heads side by side, before the layer's output projection.

    Computed in float32 also under autocast and for 16-bit projections; with float64 arguments in float64.

    Args:
        query: `[B, T, A*D]`, raw projections, the heads side by side.
        key: `[B, T, A*D]`.
        value: `[B, T, A*D]`.
        mask: `[B, T]`, non-zero where there is a token. Outputs at padding mean nothing.
        heads: A.

    Returns:
        `[B, T, A*D]`.
    """
    tokens = mask.bool()
    visible = tokens | ~tokens.any(-1, keepdim=True)  # a sequence without tokens sees its padding: a number, no NaN
    dtype = arithmetic(query)
    with torch.autocast(query.device.type, enabled=False):
        queries, keys, values = (split_heads(projection.to(dtype), heads) for projection in (query, key, value))
        outputs = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible[:, None, None])
    return outputs.transpose(1, 2).flatten(2)


def split_heads(projection: Tensor, heads: int) -> Tensor:
    """`[B, T, A*D]` to `[B, A, T, D]`."""
    batch, tokens, width = projection.shape
    assert width % heads == 0, f"{heads} heads do not divide a width of {width}"
    return projection.view(batch, tokens, heads, width // heads).transpose(1, 2)


def check_rebuildable(student: Outline, teacher: Outline) -> None:
    """Refuse an `attention_weight` where a family's attention is not what its projections give.

    Raises:
        UserError: one of them is ModernBERT.
    """
    for side, outline in (("student", student), ("teacher", teacher)):
        if outline.family == "modernbert":
            raise UserError(
                f"attention_weight: expected 0 with a {side} of family modernbert, which turns queries and keys after "
                "they were projected and sees windows, so that its attention is not what is read, given a weight "
                "above 0"
            )


def matched_heads(
    student: Outline,
    teacher: Outline,
    pairs: Mapping[int, int],
    key: str = "attention_weight",
    expected: str = "0 where heads cannot be matched one by one",
) -> dict[int, int]:
    """The attention heads of each matched student layer, which its teacher layer has too.

    Args:
        student: a pair of which one side's number is not known yet is passed over.
        teacher: likewise.
        pairs: {student layer: teacher layer}, counted from 1.
        key: the setting to name.
        expected: what it should be instead.

    Raises:
        UserError: the numbers of two matched layers differ.
    """
    found = {}
    for mine, theirs in pairs.items():
        ours, others = student.layers[mine - 1].heads, teacher.layers[theirs - 1].heads
        if ours is None or others is None:
            continue
        if ours != others:
            raise UserError(
                f"{key}: expected {expected}, given {ours} heads in the student and {others} in the teacher"
            )
        found[mine] = ours
    return found
