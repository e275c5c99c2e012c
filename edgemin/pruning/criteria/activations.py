"""Criteria by what units hand on, without labels or gradients.

Shapes: B batch, T tokens, U units of a group, S size of a unit.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from edgemin.pruning.criteria.base import ByExample, by_unit
from edgemin.pruning.structures import StructureName, Units, Watch


def activation(outputs: Tensor, mask: Tensor, units: int) -> Tensor:
    """Norm of what each unit hands on at a token, the mean over the tokens of each example.

    Args:
        outputs: `[B, T, U*S]`, what units hand on.
        mask: `[B, T]`, non-zero where there is a token, in each example at least one.
        units: U.

    Returns:
        `[B, U]`, at least float32.
    """
    norms = by_unit(outputs, mask, units).square().sum(3).sqrt()  # [B, T, U]
    return norms.sum(1) / mask.bool().sum(1, keepdim=True)


class Activation(ByExample):
    """I_u = E_x mean_t ‖a_u(x, t)‖₂, with a_u(x, t) what the unit hands on at token t (Minitron, arXiv 2407.14679).

    Minitron brings the norms together over tokens and examples in several ways. Here it is the mean over an example's
    tokens, as in the average head output norm of arXiv 2504.03889, then the mean over examples, so that neither padding
    nor the batch size matters. A rescaling between what the unit reads and writes with, which changes nothing that the
    model computes, changes it. Of a hidden unit the mean is over all places of the residual stream too. Of a layer it
    is 1 - cos(input, output) at a token, the block influence of ShortGPT (arXiv 2403.03853).
    """

    structures: ClassVar[tuple[StructureName, ...]] = ("heads", "ffn", "layers", "hidden")

    def watch(self, structure: Units, model: PreTrainedModel) -> Watch:
        """The structure's `activity`: that whose norm is taken."""
        return structure.activity(model)

    def per_example(self, outputs: Tensor, gradient: Tensor | None, mask: Tensor, units: int) -> Tensor:
        """The mean norm over each example's tokens."""
        return activation(outputs, mask, units)
