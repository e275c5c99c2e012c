"""Criteria by the gradient of the task loss at what units hand on.

With a_u(x) what unit u hands on for example x, all tokens of it (of a head: its context, which goes into the output
projection), and L(x) the loss of that example alone. Norm and absolute value are taken per example. Published codes
take them per token (Michel et al.'s own) or per batch (run_bertology), which rank heads differently.

Shapes: B batch, T tokens, U units of a group, S size of a unit.
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from edgemin.pruning.criteria.base import ByExample, Needs, by_unit
from edgemin.pruning.structures import StructureName


def gradient_norm(gradient: Tensor, mask: Tensor, units: int) -> Tensor:
    """Norm of each example's gradient at what each unit hands on, over tokens and dimensions together.

    Args:
        gradient: `[B, T, U*S]`, of each example's own loss.
        mask: `[B, T]`, non-zero where there is a token.
        units: U.

    Returns:
        `[B, U]`, at least float32.
    """
    return by_unit(gradient, mask, units).square().sum((1, 3)).sqrt()


def gates(outputs: Tensor, gradient: Tensor, mask: Tensor, units: int) -> Tensor:
    """Gradient of each example's own loss by a gate that each unit is multiplied by, at 1.

    Args:
        outputs: `[B, T, U*S]`, what units hand on.
        gradient: `[B, T, U*S]`, of each example's own loss.
        mask: `[B, T]`, non-zero where there is a token.
        units: U.

    Returns:
        `[B, U]`, at least float32.
    """
    return (by_unit(outputs, mask, units) * by_unit(gradient, mask, units)).sum((1, 3))


def taylor(outputs: Tensor, gradient: Tensor, mask: Tensor, units: int) -> Tensor:
    """Absolute value of each example's product of what a unit hands on and the gradient there.

    The product is summed over tokens and dimensions before the absolute value is taken.

    Args:
        outputs: `[B, T, U*S]`, what units hand on.
        gradient: `[B, T, U*S]`, of each example's own loss.
        mask: `[B, T]`, non-zero where there is a token.
        units: U.

    Returns:
        `[B, U]`, at least float32.
    """
    return gates(outputs, gradient, mask, units).abs()


class GradientNorm(ByExample):
    """I_u = E_x ‖∂L(x) / ∂a_u(x)‖₂, one norm over tokens and dimensions (EdgeMIN, equation 2).

    It says how steep the loss is at what the unit hands on, not what removing the unit costs: with W_V multiplied and
    W_O divided by c the model is the same, and I_u is divided by c. Layers are not brought to one scale. At the output
    of a layer, or of what adds up to a hidden unit, it would rank by depth or by position alone: it has no such units.
    """

    needs: ClassVar[Needs] = "gradients"

    def per_example(self, outputs: Tensor, gradient: Tensor | None, mask: Tensor, units: int) -> Tensor:
        """The norm of each example's gradient."""
        assert gradient is not None, "no gradient has reached this layer"
        return gradient_norm(gradient, mask, units)


class Taylor(ByExample):
    """I_u = E_x |a_u(x)ᵀ ∂L(x) / ∂a_u(x)|, ranked over the l2 norm of its group (Michel et al. 2019, arXiv 1905.10650).

    The first-order estimate of what removing the unit costs; no rescaling changes it. A search within a budget takes it
    as it is. It is the gradient of a gate that the unit is multiplied by: of a layer, what it adds to the residual
    stream; of a hidden unit, its value at all places of the stream, by one gate.
    """

    needs: ClassVar[Needs] = "gradients"
    structures: ClassVar[tuple[StructureName, ...]] = ("heads", "ffn", "layers", "hidden")
    comparable = "everywhere"

    def per_example(self, outputs: Tensor, gradient: Tensor | None, mask: Tensor, units: int) -> Tensor:
        """The absolute value of each example's product of output and gradient."""
        assert gradient is not None, "no gradient has reached this layer"
        return taylor(outputs, gradient, mask, units)

    def ranked(self, scores: list[Tensor]) -> list[Tensor]:
        """Each group divided by its l2 norm."""
        return [F.normalize(group, dim=0, eps=1e-20) for group in scores]
