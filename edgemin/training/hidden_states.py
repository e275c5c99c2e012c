"""The squared error of hidden states: a term of several methods, and what reconstruction minimizes.

Shapes: B batch, T tokens, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgemin.training.averages import arithmetic, over_sequences


def hidden_mse(teacher: Tensor, student: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of hidden states or embeddings, averaged over sequences.

    Inside a sequence the mean is over tokens that are no padding and over dimensions. Computed in float32 also under
    autocast and for 16-bit states; with a float64 argument in float64.

    Args:
        teacher: `[B, T, H]`; gets no gradient.
        student: `[B, T, H]`, of the same tokens, projected to the teacher's width.
        mask: `[B, T]`, non-zero where there is a token.

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
