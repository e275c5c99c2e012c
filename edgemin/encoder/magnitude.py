"""How much a unit matters by its weights alone: two scores, of what it reads with and what it writes with.

A head's values may be rescaled without a change of what the model computes: what it reads with times c, what it writes
with divided by c. `products` do not see that, `norms` do.

Shapes: U units of a layer, S size of a unit (that of a head; 1 for a single neuron), N inputs and M outputs of a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor


def norms(read: Tensor, write: Tensor) -> Tensor:
    """√(‖R_u‖² + ‖W_u‖²) of each unit.

    Args:
        read: `[U, S, N]`, the rows of R that are a unit's alone.
        write: `[U, S, M]`, the columns of W that are a unit's alone, as rows.

    Returns:
        `[U]`, float64.
    """
    return torch.cat([read, write], dim=2).double().flatten(1).square().sum(1).sqrt()


def products(read: Tensor, write: Tensor) -> Tensor:
    """‖W_u R_u‖² of each unit: of the map from what it reads to what it writes. A dead unit has none.

    Args:
        read: `[U, S, N]`, the rows of R that are a unit's alone.
        write: `[U, S, M]`, the columns of W that are a unit's alone, as rows.

    Returns:
        `[U]`, float64.
    """
    read, write = read.double(), write.double()
    # ‖W R‖² = tr(Wᵀ W R Rᵀ), without the M x N product.
    return torch.sum((write @ write.mT) * (read @ read.mT), dim=(1, 2))
