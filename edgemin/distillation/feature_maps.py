"""Differences of feature maps, the outputs of layers (MobileBERT, Sun et al. 2020, arXiv 2004.02984).

With H_t the feature map at token t (N units):

    L_FMT = 1 / (T N) · Σ_t Σ_n (H_t,n of the teacher - H_t,n of the student)²

The published code (google-research/mobilebert, `run_pretraining.py`) splits it into what is left of a feature map when
each token's mean and variance over its units are taken off, and these two:

    L_norm = 1 / (T N) · Σ_t Σ_n (LN(H_t)_n of the teacher - LN(H_t)_n of the student)²    times 100
    L_mean = 1 / T · Σ_t (mean(H_t) of the teacher - mean(H_t) of the student)²            times 5000
    L_var  = 1 / T · Σ_t |var(H_t) of the teacher - var(H_t) of the student|               times 5

Here all are means over sequences and, inside one, over tokens that are no padding.

Shapes: B batch, T tokens, H hidden size (N above).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from edgemin.training.averages import arithmetic, over_tokens


def feature_map_error(teacher: Tensor, student: Tensor, mask: Tensor, *, normalize: bool) -> Tensor:
    """Mean squared error of feature maps: L_FMT, or L_norm.

    Computed in float32 also under autocast and for 16-bit feature maps; with a float64 argument in float64.

    Args:
        teacher: `[B, T, H]`; gets no gradient.
        student: `[B, T, H]`, of the same tokens.
        mask: `[B, T]`, non-zero where there is a token.
        normalize: Whether each token's mean and variance are taken off before (a LayerNorm without scale and bias).

    Returns:
        A scalar. A sequence without any token adds nothing and is not counted.
    """
    assert teacher.shape == student.shape, "feature maps of equal widths"

    def error(target: Tensor, learnt: Tensor) -> Tensor:
        if normalize:
            target, learnt = (F.layer_norm(side, side.shape[-1:], eps=1e-12) for side in (target, learnt))
        return (learnt - target).square().mean(-1)

    return _averaged(error, teacher, student, mask)


def mean_error(teacher: Tensor, student: Tensor, mask: Tensor) -> Tensor:
    """L_mean: squared difference of each token's mean over its units; arguments as for `feature_map_error`."""
    return _averaged(lambda target, learnt: (learnt.mean(-1) - target.mean(-1)).square(), teacher, student, mask)


def variance_error(teacher: Tensor, student: Tensor, mask: Tensor) -> Tensor:
    """L_var: absolute difference of each token's variance over its units; arguments as for `feature_map_error`."""

    def error(target: Tensor, learnt: Tensor) -> Tensor:
        return (learnt.var(-1, correction=0) - target.var(-1, correction=0)).abs()

    return _averaged(error, teacher, student, mask)


def _averaged(error: Callable[[Tensor, Tensor], Tensor], teacher: Tensor, student: Tensor, mask: Tensor) -> Tensor:
    """Mean over sequences of the mean over tokens of an error `[B, T]`."""
    assert teacher.shape[:2] == student.shape[:2] == mask.shape, "teacher and student must read the same tokens"
    dtype = arithmetic(teacher, student)
    with torch.autocast(student.device.type, enabled=False):
        return over_tokens(error(teacher.detach().to(dtype), student.to(dtype)), mask.bool())
