"""What losses over tokens share: the precision they are computed in, and the mean over sequences of means inside each.

So neither padding nor a long neighbour in the batch changes the weight of a sequence.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def arithmetic(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: the one that holds all tensors, at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def over_tokens(errors: Tensor, tokens: Tensor) -> Tensor:
    """Mean over sequences of the mean over tokens.

    Args:
        errors: `[B, T]`.
        tokens: `[B, T]`, true where there is a token; errors elsewhere may be anything.

    Returns:
        A scalar. A sequence without any token adds nothing and is not counted.
    """
    return over_sequences(errors.masked_fill(~tokens, 0.0).sum(-1), tokens.sum(-1))


def over_sequences(sums: Tensor, counts: Tensor) -> Tensor:
    """Mean over sequences of the mean inside each.

    Args:
        sums: `[B]`, of what is averaged inside a sequence; 0 where that is nothing.
        counts: `[B]`, whole numbers: how many were summed.

    Returns:
        A scalar. A sequence of which nothing was summed adds nothing and is not counted.
    """
    return (sums / counts.clamp(min=1)).sum() / counts.count_nonzero().clamp(min=1)
