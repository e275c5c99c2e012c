"""The diagonal Fisher information of a gate that each unit is multiplied by."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from edgemin.pruning.criteria.base import ByExample, Needs
from edgemin.pruning.criteria.gradients import gates
from edgemin.pruning.structures import StructureName


class Fisher(ByExample):
    """I_u = E_x (a_u(x)ᵀ ∂L(x) / ∂a_u(x))²: twice what the loss rises by without the unit, to second order.

    Kwon et al. 2022 (arXiv 2204.09656). Their code squares the gradient of a batch's mean loss, so that the batch size
    changes the ranking; here it is that of each example's own loss. No rescaling of a unit changes it, and layers are
    compared as they are.
    """

    needs: ClassVar[Needs] = "gradients"
    comparable = "everywhere"
    structures: ClassVar[tuple[StructureName, ...]] = ("heads", "ffn", "layers", "hidden")

    def per_example(self, outputs: Tensor, gradient: Tensor | None, mask: Tensor, units: int) -> Tensor:
        """The square of each example's gradient by the units' gates."""
        assert gradient is not None, "no gradient has reached this layer"
        return gates(outputs, gradient, mask, units).square()
