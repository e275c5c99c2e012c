"""Attention as runtimes fuse it: two products, one scale, one mask.

What torch's own fused attention becomes in ONNX transposes the keys by way of a tensor of three dimensions, scales both
factors, and checks after every softmax whether a token may look at none. OpenVINO and ONNX Runtime do not fuse that.

Shapes: B sentences, A heads, T tokens, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, eager_mask

_NAME = "edgemin_export"


def direct(model: PreTrainedModel) -> None:
    """Have a model compute its attention in this form, in place; the answers stay those of any other."""
    model.set_attn_implementation(_NAME)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """`softmax(s Q Kᵀ + mask) V`.

    Args:
        module: whose attention it is; nothing of it is read.
        query: `[B, A, T, D]`, as keys and values are.
        key: what queries look at.
        value: what is added up.
        attention_mask: `[B, 1, 1 or T, T]`, what is added to the scores.
        scaling: s; `None`: `1 / sqrt(D)`.

    Returns:
        `[B, T, A, D]`, and no attention probabilities, as transformers has it of fused attention.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query * scale, key.transpose(2, 3)) + attention_mask
    return torch.matmul(scores.softmax(-1), value).transpose(1, 2).contiguous(), None


def mask(*, mask_function: Any, attention_mask: Tensor, dtype: torch.dtype, **others: Any) -> Tensor:
    """What is added to the scores: 0, or the least number where nobody may look.

    Where all tokens may look at the same ones, one row says it, `[B, 1, 1, T]`; where they see a window only, each has
    its own, `[B, 1, T, T]`.
    """
    if mask_function is not bidirectional_mask_function:
        rows: Tensor = eager_mask(mask_function=mask_function, attention_mask=attention_mask, dtype=dtype, **others)
        return rows
    return torch.where(attention_mask[:, None, None, :], 0.0, torch.finfo(dtype).min)


AttentionInterface.register(_NAME, attend)
AttentionMaskInterface.register(_NAME, mask)
