r"""Gates between 0 and 1 that learn to be exactly 0, and what they make of a model's size on average.

The hard concrete distribution (Louizos et al. 2018, arXiv 1712.01312) as CoFi has it (Xia et al. 2022, arXiv
2204.00408): for uniform noise u

$$
s = \sigma((\log u - \log(1 - u) + \log\alpha) / \beta), \qquad
z = \min(1, \max(0, s (\zeta - \gamma) + \gamma)), \qquad \beta = 2/3, \gamma = -0.1, \zeta = 1.1
$$

Functions take log α of any number of gates, or what was computed from it, some of them in the form of
[`Gates`][edgemin.encoder.gates.Gates].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edgemin.encoder.gates import Gates

TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1  # β, γ, ζ
SHARPNESS = 0.8  # of gates that stay, at test time
LARGEST = math.log(100)  # of log α, either way


def sample(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """Gates z for uniform noise in (0, 1) of the same shape; log α has a gradient where z is neither 0 nor 1."""
    stretched = torch.sigmoid((uniform.logit() + log_alpha) / TEMPERATURE) * (HIGH - LOW) + LOW
    return stretched.clamp(0.0, 1.0)


@torch.no_grad()
def limit(log_alpha: Tensor) -> None:
    """Clamp log α, in place, to where a gate can still open or close: 0.01 <= α <= 100."""
    log_alpha.clamp_(-LARGEST, LARGEST)


def open_probability(log_alpha: Tensor) -> Tensor:
    """P(z > 0), which is the gate's expected L0 norm."""
    return torch.sigmoid(log_alpha - TEMPERATURE * math.log(-LOW / HIGH))


def expected_open(log_alpha: Tensor, shift: float = 0.0) -> int:
    """How many gates are open on average, rounded, if every log α were larger by `shift`."""
    return round(float(open_probability(log_alpha.double() + shift).sum()))


def settled(log_alpha: Tensor, open_gates: int | None = None) -> Tensor:
    """The gates `[U]` at test time: the `open_gates` highest are open, by default as many as expected; others are 0.

    An open gate is σ(0.8 log α / β): without noise and without stretching, but sharper.
    """
    count = expected_open(log_alpha) if open_gates is None else open_gates
    gates = torch.sigmoid(log_alpha / TEMPERATURE * SHARPNESS)
    return gates.index_fill(0, log_alpha.argsort(stable=True)[: len(log_alpha) - count], 0.0)


def expected_weights(open: Gates, head_size: int, ffn_matrices: int = 2) -> Tensor:
    """Weights of all layers' matrices on average, biases apart, from each gate's probability to be open.

    A head has 4 H D weights, an FFN unit 2 H, with a gate of its own (ModernBERT) 3 H; the gates that a weight passes
    are independent of each other.
    """
    # sums of products, as a matrix product would be in bf16 under autocast: its sparsities are 0.4 % apart
    heads = (open.attention * torch.stack([own.sum() for own in open.heads])).sum()
    units = (open.ffn * torch.stack([own.sum() for own in open.units])).sum()
    return open.hidden.sum() * (4 * head_size * heads + ffn_matrices * units)


def target_sparsity(target: float, step: int, warmup_steps: int) -> float:
    """The sparsity asked for at a step: it rises from 0 in equal steps to the target, then stays."""
    return target * min(1.0, step / warmup_steps) if warmup_steps else target


def lagrangian(sparsity: Tensor, target: float, linear: Tensor, quadratic: Tensor) -> Tensor:
    """λ1 (s - t) + λ2 (s - t)^2: gates descend it, both multipliers ascend it, so in the end s is t."""
    return linear * (sparsity - target) + quadratic * (sparsity - target) ** 2
